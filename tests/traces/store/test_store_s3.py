"""The same store on an object store: a local S3 server, started here."""

from pathlib import Path

import numpy as np
import pytest

from distill_jax.traces.store import CorruptShard, SignalHeader, TraceStore
from distill_jax.traces.store.kv import RETRIES, Kv, kvstore_spec
from tests.faults.campaign import differences
from tests.s3 import s3_bucket
from tests.traces.store.store_builders import HEADER, build, make_row, make_topk, same_arrays


@pytest.fixture(scope="module")
def bucket():
    """URL of an empty bucket on a moto server; the environment points there."""
    with s3_bucket("traces-bucket") as client:
        yield client, "s3://traces-bucket"


def download(client, prefix: str, to: Path) -> None:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="traces-bucket", Prefix=prefix):
        for entry in page.get("Contents", []):
            path = to / entry["Key"][len(prefix):]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(client.get_object(Bucket="traces-bucket", Key=entry["Key"])["Body"].read())


def test_write_read_resume(bucket, tmp_path):
    """Written in two runs, with a signal: the objects are the files of a local store, to the byte."""
    client, root = bucket
    url = f"{root}/runs/a"
    store = TraceStore.create(url, HEADER)
    with pytest.raises(RuntimeError), store.writer(shard_rows=4) as writer:
        for i in range(6):
            writer.append(make_row(i), {"next": i + 1})
        raise RuntimeError
    store = TraceStore.open_or_create(url, HEADER)
    with store.writer(shard_rows=4) as writer:
        assert writer.state == {"next": 4}
        for i in range(4, 10):
            writer.append(make_row(i), {"next": i + 1})
    local = build(tmp_path / "local", rows=10, shard_rows=4)
    for s in (store, local):
        with s.signal_writer("topk8", SignalHeader(kind="topk", k=8)) as signals:
            for i, n in enumerate(s.lengths()):
                signals.append(make_topk(i, n))
    download(client, "runs/a/", tmp_path / "downloaded")
    assert differences(tmp_path / "local", tmp_path / "downloaded") == []
    opened = TraceStore.open(url + "/")
    opened.verify()
    assert len(opened) == 10 and opened.complete and opened.signals() == ["topk8"]
    for i, row in zip([9, 0, 4], opened.read([9, 0, 4])):
        same_arrays(row, make_row(i))
    ours, theirs = (s.signal("topk8").read([3])[0] for s in (opened, local))
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)


def test_conditional_write_and_delete(bucket):
    _, root = bucket
    kv = Kv(f"{root}/kv")
    assert kv.write_new("x/a", b"1") and kv.write_new("x/a", b"1") and not kv.write_new("x/a", b"2")
    assert kv.read("x/a") == b"1" and kv.read("nothing") is None
    kv.write_many({"x/b/c": b"3", "y": b"4"})
    assert kv.keys("x/") == ["a", "b/c"] and kv.folders("x/") == ["b"]
    kv.delete("x/b/")
    assert kv.keys("") == ["x/a", "y"]


def test_flipped_byte(bucket):
    client, root = bucket
    store = build(f"{root}/flipped", rows=3, shard_rows=4)
    key = next(p for p in store.kv.keys("data/") if p.endswith("tokens/c.0.0.0"))
    data = bytearray(client.get_object(Bucket="traces-bucket", Key=f"flipped/data/{key}")["Body"].read())
    data[5] ^= 1
    client.put_object(Bucket="traces-bucket", Key=f"flipped/data/{key}", Body=bytes(data))
    with pytest.raises(CorruptShard, match="shard 0, row 0"):
        TraceStore.open(f"{root}/flipped").read([0])


def test_missing_bucket_is_one_line(bucket):
    with pytest.raises((OSError, ValueError), match="no-such-bucket") as caught:
        TraceStore.create("s3://no-such-bucket/x", HEADER)
    assert "\n" not in str(caught.value)


def test_no_store_there(bucket):
    with pytest.raises(FileNotFoundError, match="no trace store at s3://"):
        TraceStore.open(f"{bucket[1]}/nothing/here")


def test_an_endpoint_that_does_not_answer_is_one_line(monkeypatch):
    monkeypatch.setitem(RETRIES, "max_retries", 1)
    for name, value in (("AWS_ENDPOINT_URL", "http://127.0.0.1:9"), ("AWS_ACCESS_KEY_ID", "a"),
                        ("AWS_SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match=r"s3://some-bucket/x: manifest.json: .*connect") as caught:
        TraceStore.open("s3://some-bucket/x")
    assert "\n" not in str(caught.value)


def test_spec_honours_the_environment(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    spec = kvstore_spec("s3://abc/d/e")
    assert spec == {"driver": "s3", "bucket": "abc", "path": "d/e/", "s3_request_retries": RETRIES}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9/")
    assert kvstore_spec("s3://abc")["endpoint"] == "http://127.0.0.1:9"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://other")
    assert kvstore_spec("s3://abc")["endpoint"] == "http://other"
    spec = kvstore_spec("gs://abc/d/")
    assert spec == {"driver": "gcs", "bucket": "abc", "path": "d/", "gcs_request_retries": RETRIES}
    assert kvstore_spec("file:///d/e") == kvstore_spec("/d/e/") == {"driver": "file", "path": "/d/e/"}
