"""A store behind Grain's reading threads: damage comes out with its place, an object store is as good as a disk."""

import jax
import numpy as np
import pytest

from distill_jax.data.source_specs import Store
from distill_jax.data.sources import open_source, serve
from distill_jax.traces.store import CorruptShard, TraceStore
from tests.data.storing import make_store, some_traces


def opened(url, tok):
    return open_source(Store(path=str(url), rows=2, seq_len=128, signals=("topk",)), tok, seed=0)


@pytest.mark.parametrize("harm", ["flipped", "missing"])
def test_damage_names_shard_and_row_and_nothing_hangs(tiny, tmp_path, harm):
    make_store(tmp_path / "s", some_traces(40), tiny, "topk")
    source = opened(tmp_path / "s", tiny)
    shard = next((tmp_path / "s" / "signals" / "topk" / "data").glob("000001-*")) / "outcomes" / "c.0.0.0"
    if harm == "missing":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[5] ^= 1
        shard.write_bytes(bytes(data))
    with pytest.raises(CorruptShard, match=r"shard 1, row \d+: .*outcomes") as caught:
        for _ in serve(source, stop_step=60):
            pass
    assert caught.value.shard == 1 and 16 <= caught.value.row < 32 and "\n" not in str(caught.value)


def test_s3_through_grain_is_the_local_store(tiny, tmp_path, monkeypatch):
    server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in (("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_REGION", "us-east-1"),
                        ("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"),
                        ("AWS_EC2_METADATA_DISABLED", "true")):
        monkeypatch.setenv(name, value)
    try:
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="rows-bucket")
        urls = [tmp_path / "s", "s3://rows-bucket/s"]
        local = make_store(tmp_path / "s", some_traces(20), tiny, "topk")
        for file in (f for f in (tmp_path / "s").rglob("*") if f.is_file()):
            boto3.client("s3", region_name="us-east-1").put_object(
                Bucket="rows-bucket", Key=f"s/{file.relative_to(tmp_path / 's')}", Body=file.read_bytes())
        assert TraceStore.open(urls[1]).fingerprint() == local.fingerprint()
        batches = [list(serve(opened(url, tiny), 1, stop_step=4)) for url in urls]
        for ours, theirs in zip(*(jax.tree.leaves(b) for b in batches), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    finally:
        running.stop()
