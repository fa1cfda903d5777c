"""A real tiny model through the decoder, and a stub server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.data.render import prompt_ids
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.decode import Completion, Generator, Sampling
from distill_jax.eval.answerers import ModelAnswerer, UrlAnswerer, model_answerer, parse_reply
from distill_jax.models.config import ModelConfig
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.traces.world.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return load_tokenizer(str(build_tokenizer(tmp_path_factory.mktemp("tok"), "compact")))


class Scripted:
    """A generator that writes what it is told; remembers what it was asked."""

    def __init__(self, tok, *said):
        self.tok, self.said, self.asked = tok, said, []
        self.model = type("M", (), {"config": type("C", (), {"context_length": 64})})

    def generate(self, prompts, sampling, seeds, *, progress=None):
        self.asked += [(p.tolist(), sampling.stop_ids) for p in prompts]
        ids = [self.tok.encode(s)[0] for s in self.said]
        return [Completion(ids=i, logprobs=np.zeros(len(i)), behaviour=np.zeros(len(i)), finish="stop") for i in ids]


def answer(tok, said):
    generator = Scripted(tok, said)
    (out,) = ModelAnswerer(generator=generator, tokenizer=tok, sampling=Sampling(max_new_tokens=8))(["ask oslo grows"])
    assert generator.asked[0] == (prompt_ids("ask oslo grows", tok).tolist(), (2,))
    return out


def test_thinking_is_split_off_and_counted(tok):
    a = answer(tok, "<think> oslo grows tea </think> tea<end>")
    assert (a.thinking.split(), a.text.strip(), a.finished) == (["oslo", "grows", "tea"], "tea", True)
    assert (a.thinking_tokens, a.tokens) == (3, 7)
    assert answer(tok, "tea<end>").text.strip() == "tea"
    assert answer(tok, "tea oslo").finished, "cut by the limit within the answer: what is there counts"


def test_unterminated_thinking_is_no_answer(tok):
    for said in ("<think> oslo grows tea", "<think>", "<think> tea<end>"):
        a = answer(tok, said)
        assert not a.finished and a.text.strip() == ""


def test_over_long_prompts_are_not_dropped(tok):
    generator = Scripted(tok, "tea<end>")
    answers = ModelAnswerer(generator=generator, tokenizer=tok, sampling=Sampling(max_new_tokens=60))(
        ["ask oslo grows", "tea"])
    assert len(generator.asked) == 1 and answers[1].text.strip() == "tea"
    assert answers[0].problem.startswith("prompt too long: 5 tokens") and answers[0].finished


def test_a_model_answers(tok):
    config = ModelConfig(vocab_size=tok.real, hidden_size=16, mlp_size=16, num_layers=1, num_heads=2, num_kv_heads=2,
                         head_dim=8, context_length=32)
    model = Transformer(config, dtype=jnp.float32)
    params = init_params(model, jax.random.key(0))
    ask = model_answerer(model, params, tok, max_new_tokens=4, batch_size=4)
    said = ask(["ask oslo grows", "doc " * 40, "ask rome grows"])
    assert [bool(a.problem) for a in said] == [False, True, False]
    assert 1 <= said[0].tokens <= 4 and said[0].seconds > 0
    prompts = [prompt_ids("ask oslo grows", tok)]
    direct = Generator(model, params).generate(prompts, Sampling(max_new_tokens=4, stop_ids=(2,)), [0])
    assert said[0].tokens == len(direct[0].ids)
    with pytest.raises(ValueError, match="--context 64 is more than the 32 tokens the model can take"):
        model_answerer(model, params, tok, context=64)


class Server(BaseHTTPRequestHandler):
    """Replies by what the question says."""

    failures = 0
    seen: list = []  # noqa: RUF012

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.seen.append((self.path, self.headers.get("Authorization"), body))
        question = body["messages"][0]["content"]
        if question == "busy" and Server.failures < 2:
            Server.failures += 1
            return self._send(503, {"error": "overloaded"})
        if question == "long":
            return self._send(400, {"error": {"message": "This model's maximum context length is 10 tokens"}})
        if question == "cut":  # the connection ends before the reply does
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            return None
        if question == "odd":
            return self._send(200, {"choices": [{"message": None}]})
        if question == "broken":
            return self._send(200, {"choices": []})
        message = {"content": "<think>hm hm</think>\n\nOslo" if question != "split" else "Oslo"}
        if question == "split":
            message["reasoning_content"] = "long thought"
        self._send(200, {"choices": [{"message": message, "finish_reason": "stop"}],
                         "usage": {"completion_tokens": 12}})

    def _send(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def url():
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Server.failures, Server.seen = 0, []
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_server(url):
    ask = UrlAnswerer(url=url, model="m", api_key="k", pause=0.01, max_new_tokens=7, parallel=3)
    plain, split, busy, long, broken = ask(["q", "split", "busy", "long", "broken"])
    assert (plain.text, plain.thinking, plain.finished, plain.tokens) == ("Oslo", "hm hm", True, 12)
    assert 0 < plain.thinking_tokens < 12 and plain.seconds > 0
    assert (split.text, split.thinking) == ("Oslo", "long thought")
    assert busy.text == "Oslo" and Server.failures == 2, "a busy server is asked again"
    assert long.problem.startswith("prompt too long") and broken.problem.startswith("server: IndexError")
    cut, odd = UrlAnswerer(url=url, model="m", retries=1, pause=0.01)(["cut", "odd"])
    assert "2 attempts failed, the last with IncompleteRead" in cut.problem
    assert odd.problem.startswith("server: AttributeError")
    path, key, body = Server.seen[0]
    assert path == "/v1/chat/completions" and key == "Bearer k"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 7, 0)


def test_server_that_is_not_there():
    (a,) = UrlAnswerer(url="http://127.0.0.1:9/v1", model="m", retries=1, pause=0.01)(["q"])
    assert a.problem.startswith("server:")


def test_replies():
    reply = lambda finish="stop", **m: {"choices": [{"message": m, "finish_reason": finish}]}
    assert not parse_reply(reply("length", content="<think>and so on")).finished
    assert not parse_reply(reply("length", content=None, reasoning_content="and so on")).finished
    parts = [{"type": "text", "text": "Os"}, {"type": "text", "text": "lo"}, {"type": "refusal"}]
    assert parse_reply(reply(content=parts)).text == "Oslo"
    a = parse_reply(reply(content="hm</think>Oslo") | {"usage": {
        "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 5}}})
    assert (a.text, a.thinking, a.thinking_tokens, a.tokens) == ("Oslo", "hm", 5, 9), "the prompt opened the thinking"
