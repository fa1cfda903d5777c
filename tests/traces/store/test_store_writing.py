"""Writers: atomic shards, resume, full disks, races, and the same bytes whatever happened in between."""

import errno
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from distill_jax.traces.store import Row, StoreHeader, TraceStore
from distill_jax.traces.store.kv import Kv
from tests.faults.campaign import differences
from tests.traces.store.store_builders import HEADER, build, make_row, same_arrays


def go_on(url: object, rows: int, shard_rows: int = 4) -> TraceStore:
    """What a resumed import does: continue from the state of the last commit."""
    store = TraceStore.open_or_create(str(url), HEADER)
    with store.writer(shard_rows=shard_rows) as writer:
        for i in range(writer.state.get("next", 0), rows):
            writer.append(make_row(i), {"next": i + 1})
    return store


def test_interrupted_writer_gives_the_same_bytes(tmp_path):
    whole = build(tmp_path / "whole", rows=14, shard_rows=4)
    for stop in (0, 1, 4, 6, 13):
        url = tmp_path / f"stopped{stop}"
        store = TraceStore.create(url, HEADER)
        with pytest.raises(RuntimeError), store.writer(shard_rows=4) as writer:
            for i in range(stop):
                writer.append(make_row(i), {"next": i + 1})
            raise RuntimeError
        assert len(TraceStore.open(url)) == stop // 4 * 4 and not TraceStore.open(url).complete
        assert store.writer(shard_rows=4).state == ({"next": stop // 4 * 4} if stop >= 4 else {})
        assert go_on(url, 14).complete
        assert differences(Path(whole.url), url) == []
    go_on(whole.url, 14)  # complete: opening and closing a writer changes nothing
    assert differences(Path(whole.url), tmp_path / "stopped0") == []


def test_rows_before_the_commit_are_invisible(tmp_path):
    store = TraceStore.create(tmp_path / "s", HEADER)
    writer = store.writer(shard_rows=4)
    assert [writer.append(make_row(i)) for i in range(5)] == [0, 1, 2, 3, 4] and writer.next_row == 5
    assert len(TraceStore.open(store.url)) == 4
    writer.close()
    assert len(TraceStore.open(store.url)) == 5


def test_data_without_a_commit_is_invisible_and_cleared(tmp_path):
    """A writer killed between data and commit; the one after it is given other rows."""
    store = build(tmp_path / "s", rows=3, shard_rows=4)
    shards = Path(store.url) / "data"
    left = shards / "000001-deadbeef" / "tokens"
    left.mkdir(parents=True)
    (left / "c.0.0.0.__lock").write_bytes(b"half a file")
    assert len(TraceStore.open(store.url)) == 3
    go_on(store.url, 9)
    assert sorted(p.name[:6] for p in shards.iterdir()) == ["000000", "000001", "000002"]
    assert not left.exists()
    TraceStore.open(store.url).verify()


def test_append_to_a_closed_store(tmp_path):
    store = build(tmp_path / "s", rows=6, shard_rows=4)
    go_on(store.url, 10)
    opened = TraceStore.open(store.url)
    assert len(opened) == 10 and opened.complete
    same_arrays(opened.read([8])[0], make_row(8))


def test_closing_at_a_shard_boundary_is_recorded(tmp_path):
    store = TraceStore.create(tmp_path / "s", HEADER)
    with store.writer(shard_rows=2) as writer:
        for i in range(4):
            writer.append(make_row(i))
        assert not TraceStore.open(store.url).complete
        writer.state = {"sources": "all read"}
    opened = TraceStore.open(store.url)
    assert opened.complete and [c.rows for c in opened.shards] == [2, 2, 0]
    assert opened.writer().state == {"sources": "all read"}
    opened.verify()
    same_arrays(opened.read([3])[0], make_row(3))


def test_long_rows_end_a_shard_early(tmp_path):
    store = TraceStore.create(tmp_path / "s", HEADER)
    with store.writer(shard_rows=100, shard_tokens=700) as writer:
        for i in range(12):
            writer.append(make_row(i))
    lengths = store.lengths()
    assert len(store.shards) > 2 and len(store) == 12
    for commit in store.shards:
        held = lengths[commit.first_row : commit.first_row + commit.rows]
        assert held[:-1].sum() < 700


def test_two_writers_one_loses(tmp_path):
    """The second to commit a shard gets an error, and what the first committed stays whole."""
    TraceStore.create(tmp_path / "s", HEADER)
    first, second = (TraceStore.open(tmp_path / "s").writer(shard_rows=2) for _ in range(2))
    first.append(make_row(0))
    second.append(make_row(5))
    first.append(make_row(1))
    with pytest.raises(ValueError, match="another writer has committed"):
        second.append(make_row(6))
    store = TraceStore.open(tmp_path / "s")
    store.verify()
    same_arrays(store.read([1])[0], make_row(1))
    assert len(list((tmp_path / "s" / "data").iterdir())) == 1


def test_full_disk_by_patch(tmp_path, monkeypatch):
    """One clear error, nothing committed; afterwards the same rows give the undisturbed store."""
    whole = build(tmp_path / "whole", rows=10, shard_rows=4)
    store = build(tmp_path / "s", rows=4, shard_rows=4)
    writer = store.writer(shard_rows=4)

    class Future:
        def result(self):
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']")

    class Full:
        def __init__(self, kv):
            self._kv = kv

        def __getattr__(self, name):
            return getattr(self._kv, name)

        def write(self, key, value, **kwargs):
            return Future() if key.endswith("c.0.0.0") else self._kv.write(key, value, **kwargs)

    monkeypatch.setattr(store.kv, "_kv", Full(store.kv._kv))
    with pytest.raises(OSError, match=r"no space left on the device.*run the same command again") as caught:
        for i in range(4, 8):
            writer.append(make_row(i), {"next": i + 1})
    assert caught.value.errno == errno.ENOSPC and writer.next_row == 4
    assert [p.name[:6] for p in (tmp_path / "s" / "data").iterdir()] == ["000000"]
    monkeypatch.undo()
    # the 4-row store was closed at row 4, which made its last commit final: compare what was added since
    go_on(store.url, 10)
    rows = TraceStore.open(store.url)
    rows.verify()
    for i, row in enumerate(rows.read(np.arange(10))):
        same_arrays(row, whole.read([i])[0])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)], capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a small tmpfs takes root and a kernel that lets it")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk_for_real(small_disk, tmp_path):
    url = small_disk / "s"
    with pytest.raises(OSError, match="no space left on the device") as caught:
        go_on(url, 300, shard_rows=16)
    assert caught.value.errno == errno.ENOSPC
    store = TraceStore.open(url)
    store.verify()
    assert 0 < len(store) < 300 and len(store) % 16 == 0
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    go_on(url, 300, shard_rows=16)
    build(tmp_path / "whole", rows=300, shard_rows=16)
    assert differences(tmp_path / "whole", url) == []


@pytest.mark.parametrize("change,message", [
    ({"tokens": np.zeros(0, np.int32)}, "at least one token"),
    ({"tokens": np.array([1 << 24] * 3)}, "outside 0..16777215"),
    ({"tokens": np.array([0.0] * 3)}, "expected integers of shape"),
    ({"roles": np.array([1, 2])}, r"roles: expected integers of shape \(3,\)"),
    ({"roles": np.array([1, 2, 9])}, "roles: values run from 1 to 9"),
    ({"parts": np.array([-2, 0, 0])}, "parts: values run from -2"),
    ({"parts": np.array([0, 1, 3])}, "segment 3 of a trace with 3"),
    ({"spans": np.array([[0, 1], [3, 2], [2, 3]])}, "ends before it starts"),
])
def test_bad_rows(tmp_path, change, message):
    writer = TraceStore.create(tmp_path / "s", HEADER).writer()
    good = make_row(0, low=3, high=4)
    with pytest.raises(ValueError, match=message):
        writer.append(Row(**{**vars(good), **change}))
    assert writer.next_row == 0


def test_values_that_are_not_json(tmp_path):
    with pytest.raises(ValueError, match="header must be plain JSON"):
        TraceStore.create(tmp_path / "s", StoreHeader(extra={"x": object()}))
    assert not (tmp_path / "s").exists()
    writer = TraceStore.create(tmp_path / "s", HEADER).writer(shard_rows=1)
    row = make_row(0)
    with pytest.raises(ValueError, match="plain JSON values"):
        writer.append(Row(**{**vars(row), "trace": row.trace.replace(meta={"x": {1, 2}})}))


def test_urls():
    for url, message in (("ftp://a/b", "unknown scheme 'ftp'"), ("s3:///a", "no bucket")):
        with pytest.raises(ValueError, match=message):
            Kv(url)
