"""A server that speaks the OpenAI chat protocol, on localhost, for tests."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any]], tuple[int, Any]]


@contextlib.contextmanager
def serving(reply: Reply, model: str = "stub") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(URL as far as /v1, bodies received); `reply(body)` gives status and JSON value (bytes: sent as they are).

    Status 0 drops the connection: before any answer where the value is None, in the middle of it otherwise.
    """
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def send(self, status: int, value: Any) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            if status or value is not None:
                self.send_response(status or 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data if status else data[:len(data) // 2])
            self.close_connection = True

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.send(200, {"data": [{"id": model}] if model else []})
            else:
                self.send(404, {"error": "no such path"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body | {"key": self.headers.get("Authorization")})
            self.send(*reply(body))

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def said(content: str, finish: str = "stop", logprobs: list[float] | None = None, **message: Any) -> tuple[int, Any]:
    """A chat completion."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    if logprobs is not None:
        choice["logprobs"] = {"content": [{"token": "x", "logprob": x} for x in logprobs]}
    return 200, {"choices": [choice]}
