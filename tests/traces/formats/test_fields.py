import json

import pytest

from distill_jax.traces.formats import Reject, load_join, parse_map
from distill_jax.traces.formats.fields import Fields, lookup


def test_lookup_walks_objects_lists_and_sums():
    row = {"a": {"b": [{"c": 1}, {"c": 2}]}, "x.y": "dotted", "p": "one", "q": "two"}
    assert lookup(row, "a.b.c") == [1, 2] and lookup(row, "a.b.1.c") == 2 and lookup(row, "x.y") == "dotted"
    assert lookup(row, "p+q") == "one\ntwo" and lookup(row, "p+nothing") == "one"
    assert lookup(row, "a.z") is None and lookup(row, "a.b.7.c") is None and lookup(row, "p.q") is None


def test_names_are_tried_in_order_without_case_and_only_if_they_fit():
    fields = Fields()
    assert fields.path({"Question": "q", "prompt": "p"}, "question") == "Question"
    assert fields.path({"question": None, "prompt": "p"}, "question") == "prompt"
    assert fields.path({"correct": "A"}, "gold") == "correct" and fields.path({"correct": "A"}, "correct") is None
    assert fields.path({"correct": True}, "correct") == "correct" and fields.path({"correct": True}, "gold") is None
    assert fields.path({"code": "print(1)"}, "response") is None and fields.path({"code": ["a"]}, "response") == "code"


def test_map_wins_and_pins_hold_where_the_field_is():
    fields = parse_map(["gold=meta.truth"]).pin({"question": "q"})
    assert fields.get({"answer": "1", "meta": {"truth": "2"}}, "gold") == "2"
    assert fields.path({"q": "", "prompt": "p"}, "question") == "q"
    assert fields.path({"prompt": "p"}, "question") == "prompt"


@pytest.mark.parametrize("option", ["question", "question=", "colour=x", "=x"])
def test_bad_map(option):
    with pytest.raises(ValueError, match="expected FIELD=PATH"):
        parse_map([option])


def test_map_twice():
    with pytest.raises(ValueError, match="given twice"):
        parse_map(["gold=a", "gold=b"])


@pytest.fixture
def side(tmp_path):
    path = tmp_path / "items.json"
    path.write_text(json.dumps([{"id": 7, "prompt": "q", "type": "side"}, {"id": 8, "prompt": "r", "type": "side"}]))
    return path


def test_join_adds_what_is_missing(side):
    join = load_join(f"{side}:id=item")
    assert join.apply({"item": "7", "type": "own"}) == {
        "items": {"id": 7, "prompt": "q", "type": "side"}, "id": 7, "prompt": "q", "type": "own", "item": "7"}
    assert load_join(f"{side}:#=n").apply({"n": 1})["prompt"] == "r"
    for row, reason in (({"item": 9}, "join_missing"), ({"other": 7}, "join_no_key")):
        with pytest.raises(Reject) as e:
            join.apply(row)
        assert e.value.reason == reason


@pytest.mark.parametrize("option,message", [
    ("items.json", "expected FILE:SIDE_KEY=ROW_KEY"), ("{side}:id", "expected FILE"),
    ("{side}:key=id", "has no field 'key'"),
    ("{side}:type=id", "twice"), ("nothing.json:id=id", "No such file"),
])
def test_bad_join(side, option, message):
    with pytest.raises(ValueError, match=message):
        load_join(option.format(side=side))
