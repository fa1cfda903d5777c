"""No changed byte of any file is ever returned as data, and the error names the place."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from distill_jax.traces.store import CorruptShard, SignalHeader, TraceStore
from tests.traces.store.store_builders import ARRAYS, build, make_row, make_token, make_topk, same_arrays

ROWS = 10


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    store = build(tmp_path_factory.mktemp("good") / "s", rows=ROWS, shard_rows=5)
    with store.signal_writer("topk8", SignalHeader(kind="topk", k=8, teacher="t")) as writer:
        for i, n in enumerate(store.lengths()):
            writer.append(make_topk(i, n, vocab=60))
    with store.signal_writer("token", SignalHeader(kind="token", teacher="t")) as writer:
        for i, n in enumerate(store.lengths()):
            writer.append(make_token(i, n))
    store.verify()
    return Path(store.url)


def contents(url: Path) -> list[tuple]:
    """Everything a reader can get out of a store."""
    store = TraceStore.open(url)
    out: list[tuple] = [(store.header,), tuple(store.lengths()), (store.index().groups,)]
    for i in range(len(store)):
        row = store.row(i)
        out.append((row.text, row.trace.to_json(), *(getattr(row, n).tobytes() for n in ARRAYS)))
    for name in store.signals():
        reader = store.signal(name)
        out.append((name, reader.header))
        for s in reader.read(np.arange(len(reader))):
            out.append((s.logprobs.tobytes(), s.mask.tobytes(), getattr(s, "ids", s.mask).tobytes()))
    return out


def files(url: Path) -> list[Path]:
    return sorted(p.relative_to(url) for p in url.rglob("*") if p.is_file())


def test_every_file_random_flips(good, tmp_path):
    """Flip one random bit at random places of every file: `verify` raises, and a reader raises or returns what was
    written (a byte nobody reads, as those of zarr.json)."""
    expected = contents(good)
    rng = np.random.default_rng(0)
    kinds = set()
    for name in files(good):
        original = (good / name).read_bytes()
        places = {0, len(original) - 1, *rng.integers(0, len(original), 6).tolist()}
        for at in places:
            damaged = bytearray(original)
            damaged[at] ^= 1 << int(rng.integers(0, 8))
            (good / name).write_bytes(bytes(damaged))
            try:
                with pytest.raises(CorruptShard) as caught:
                    TraceStore.open(good).verify()
                shard = re.search(r"(\d{6})[-.]", str(name))
                assert caught.value.shard == (int(shard[1]) if shard else None), (name, at, caught.value)
                try:
                    assert contents(good) == expected, (name, at)
                except CorruptShard as e:
                    kinds.add((name.name, e.row is not None))
            finally:
                (good / name).write_bytes(original)
    assert ("c.0.0.0", True) in kinds and ("manifest.json", False) in kinds
    TraceStore.open(good).verify()


def chunk_of(url: Path, path: str) -> Path:
    return next(p for p in url.rglob("c.0.0.0") if re.search(path, p.as_posix()))


def test_names_the_row_and_spares_the_others(good, tmp_path):
    """Damage inside one row's chunk: that row raises with its number, its neighbours are still read."""
    url = tmp_path / "s"
    shutil.copytree(good, url)
    path = chunk_of(url, r"s/data/000001-\w+/tokens")
    data = bytearray(path.read_bytes())
    data[10] ^= 255  # the shard's first chunk: its first row
    path.write_bytes(bytes(data))
    store = TraceStore.open(url)
    for read in (store.read, lambda ids: [store.row(i) for i in ids]):
        with pytest.raises(CorruptShard, match="shard 1, row 5") as caught:
            read([7, 5])
        assert (caught.value.shard, caught.value.row) == (1, 5)
    same_arrays(store.read([6])[0], make_row(6))
    with pytest.raises(CorruptShard) as caught:
        store.verify()
    assert (caught.value.shard, caught.value.row) == (1, 5)


@pytest.mark.parametrize("damage", ["deleted", "cut", "empty", "other shard's file"])
def test_valid_bytes_in_the_wrong_place(good, tmp_path, damage):
    """What no checksum of a chunk notices: a missing file reads as zeros in zarr, a swapped one as valid data."""
    url = tmp_path / "s"
    shutil.copytree(good, url)
    for table in (r"s/data/000000-\w+/tokens", "topk8/data/000000-\\w+/outcomes", "token/data/000000-\\w+/tokens"):
        path = chunk_of(url, table)
        original = path.read_bytes()
        if damage == "deleted":
            path.unlink()
        elif damage == "other shard's file":
            path.write_bytes(chunk_of(url, table.replace("000000", "000001")).read_bytes())
        else:
            path.write_bytes(original[: len(original) // 2 if damage == "cut" else 0])
        with pytest.raises(CorruptShard):
            contents(url)
        with pytest.raises(CorruptShard):
            TraceStore.open(url).verify()
        path.write_bytes(original)
    assert contents(url) == contents(good)


def test_signal_of_other_rows(good, tmp_path):
    """A signal folder copied beside another store's rows is refused."""
    other = build(tmp_path / "other", rows=ROWS, shard_rows=4)
    shutil.copytree(good / "signals", Path(other.url) / "signals")
    with pytest.raises(CorruptShard, match="made for"):
        other.signal("topk8")
    changed = TraceStore.create(tmp_path / "changed", other.header)
    with changed.writer(shard_rows=5) as writer:
        for i in range(ROWS):
            writer.append(make_row(i + 1 if i == 7 else i))
    shutil.copytree(good / "signals", tmp_path / "changed" / "signals")
    with pytest.raises(CorruptShard, match="another row") as caught:
        changed.signal("token")
    assert (caught.value.shard, caught.value.row) == (1, 7)


def test_missing_and_foreign_commits(good, tmp_path):
    url = tmp_path / "s"
    shutil.copytree(good, url)
    first, second = url / "shards" / "000000.json", url / "shards" / "000001.json"
    original = first.read_bytes()
    first.unlink()
    with pytest.raises(CorruptShard, match=r"000000\.json is missing") as caught:
        TraceStore.open(url)
    assert caught.value.shard == 0
    first.write_bytes(second.read_bytes())
    with pytest.raises(CorruptShard, match="belongs to another place"):
        TraceStore.open(url)
    first.write_bytes(original)
    assert len(TraceStore.open(url)) == ROWS
