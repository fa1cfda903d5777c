import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_jax.traces.formats import BadRow, iter_rows, read_rows

ROWS = [{"question": "a\u2028b", "n": 1}, {"question": "c", "n": 2}]


def as_jsonl(rows):
    return "\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode() + b"\n"


@pytest.mark.parametrize("name,data", [
    ("a.jsonl", as_jsonl(ROWS)),
    ("a.json", as_jsonl(ROWS)),  # JSONL under another name
    ("a.json", json.dumps(ROWS).encode()),
    ("a.json", json.dumps(ROWS, indent=2).encode()),
    ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    ("a.json", json.dumps({"version": 3, "rows": ROWS, "few": [{"x": 1}]}).encode()),
])
@pytest.mark.parametrize("packed", [False, True])
def test_json_in_every_wrapping(tmp_path, name, data, packed):
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)
    assert list(read_rows(path)) == ROWS


@pytest.mark.parametrize("packed", [False, True])
def test_parquet(tmp_path, packed):
    path = tmp_path / "a.parquet"
    nested = [{"messages": [{"role": "user", "content": "q"}], "n": 1}]
    pq.write_table(pa.Table.from_pylist(nested), path)
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_rows(path)) == nested


def test_csv_and_lines(tmp_path):
    (tmp_path / "a.csv").write_text('question,answer\n"two\nlines",4\n')
    (tmp_path / "a.txt").write_text("one||two #### 3\n\nfour\n")
    assert list(read_rows(tmp_path / "a.csv")) == [{"question": "two\nlines", "answer": "4"}]
    assert list(read_rows(tmp_path / "a.txt")) == [{"text": "one||two #### 3"}, {"text": "four"}]


def test_what_a_file_says_of_all_rows_belongs_to_each(tmp_path):
    path = tmp_path / "a.json"
    results = [{"q": 1}, {"q": 2, "system_prompt": "own"}]
    path.write_text(json.dumps({"system_prompt": "Think.", "size": 2, "results": results}))
    assert list(read_rows(path)) == [{"system_prompt": "Think.", "q": 1}, {"system_prompt": "own", "q": 2}]


def test_one_object_is_a_row_where_the_name_or_a_conversation_says_so(tmp_path):
    row = {"question": "q", "completions": [{"text": "a"}, {"text": "b"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert list(read_rows(tmp_path / "a.jsonl")) == [row]
    chat = {"messages": [{"role": "user", "content": "q"}], "tools": [{"name": "f"}, {"name": "g"}]}
    (tmp_path / "a.json").write_text(json.dumps(chat))
    assert list(read_rows(tmp_path / "a.json")) == [chat]
    (tmp_path / "b.json").write_text(json.dumps({"x": {"q": 1}, "y": {"q": 2}}))
    assert list(read_rows(tmp_path / "b.json")) == [{"id": "x", "q": 1}, {"id": "y", "q": 2}]


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_broken_line_does_not_lose_the_others(tmp_path, broken):
    lines = [json.dumps({"n": i}) for i in range(3)]
    lines[broken] = '{"n": '
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n[1]\n")
    rows = list(iter_rows(path))
    assert [r["n"] for r in rows if isinstance(r, dict)] == [i for i in range(3) if i != broken]
    assert [r.reason for r in rows if isinstance(r, BadRow)] == ["bad_json", "not_an_object"]
    with pytest.raises(ValueError, match=f"row {broken + 1}: bad_json"):
        list(read_rows(path))


@pytest.mark.parametrize("name,data,message", [
    ("a.jsonl", b"", "holds no rows"),
    ("a.jsonl", b" \n \n", "holds no rows"),
    ("a.json", b"[]", "holds no rows"),
    ("a.json", b"3", "holds a JSON int"),
    ("a.json", b"hello", "neither JSON nor JSONL"),
    ("a.json", b"[{}, {]", "line 1, column"),
    ("a.jsonl", b"\xff\xfe\x00x", "not UTF-8"),
    ("a.jsonl.gz", gzip.compress(as_jsonl(ROWS * 900))[:-20], "cannot be read"),
    ("a.jsonl.gz", b"\x1f\x8bnot gzip at all", "cannot be read"),
    ("a.parquet", b"PAR1 and then nothing", "not readable as Parquet"),
])
def test_unreadable_input_is_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as e:
        list(read_rows(tmp_path / name))
    assert str(e.value).startswith(str(tmp_path / name)) and "\n" not in str(e.value)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        list(read_rows(tmp_path / "nothing.jsonl"))
