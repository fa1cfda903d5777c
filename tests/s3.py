"""A local S3-compatible server (moto)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def s3_bucket(name: str) -> Iterator[Any]:
    """A boto3 client of a server with one empty bucket; meanwhile the environment points there. Skips without moto."""
    server = pytest.importorskip("moto.server", reason="needs moto[server]")
    boto3 = pytest.importorskip("boto3", reason="needs moto[server]")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in (("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_REGION", "us-east-1"),
                                    ("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"),
                                    ("AWS_EC2_METADATA_DISABLED", "true")):
                patch.setenv(variable, value)
            client = boto3.client("s3", region_name="us-east-1")
            client.create_bucket(Bucket=name)
            yield client
    finally:
        running.stop()
