"""Prompts exact to the token, the supervised turn token by token, and the invariants of every row."""

import functools
import gzip
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_jax.core.roles import (
    ANSWER,
    INJECTED,
    QUESTION,
    SYSTEM,
    TEMPLATE,
    THINK,
    TOOL,
    TOOL_CALL,
    Role,
)
from distill_jax.data.render import Style, prompt_ids, render, split_completion, template_id
from distill_jax.data.tokenizer import Tokenizer, load_tokenizer
from distill_jax.traces.store import Row
from distill_jax.traces.trace import FLAG_TRUNCATED, FLAG_UNTERMINATED, Encoded, Segment, Trace, simple_trace

TOOLS = [{"type": "function", "function": {"name": "get_w", "description": "weather",
                                           "parameters": {"type": "object", "properties": {}}}}]
CHATS = {
    "one": [{"role": "user", "content": "  What is 2+2?\n"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Héllo \U0001f999?"}],
    "history": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c"}],
    "tool": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get_w", "arguments": {"city": "Paris"}}}]},
        {"role": "tool", "tool_call_id": "1", "name": "get_w", "content": "22"}],
}


def layout(row: Row, tok: Tokenizer) -> list[tuple[str, str]]:
    """Runs of one role with their text."""
    out: list[tuple[str, str]] = []
    for t, r in zip(row.tokens, row.roles):
        name, text = Role(int(r)).name, tok.token_bytes(int(t)).decode("utf-8", "replace")
        if out and out[-1][0] == name:
            out[-1] = (name, out[-1][1] + text)
        else:
            out.append((name, text))
    return out


def check_row(row: Row) -> None:
    """Token bytes by span rebuild the text, in order; parts slice their segments; every token has a role."""
    raw, at = row.text.encode(), 0
    segments = [s.text.encode() for s in row.trace.segments]
    for t in range(len(row.tokens)):
        part, (a, b) = int(row.parts[t]), row.spans[t].tolist()
        assert a <= b
        piece = raw[at:at + b - a]
        if part < 0:
            assert a == at
        else:
            assert segments[part][a:b] == piece[:max(0, len(segments[part]) - a)]
            assert row.trace.segments[part].step == row.steps[t]
        at += b - a
    assert at == len(raw)
    assert row.roles.min(initial=1) >= 1 and len(row.roles) == len(row.tokens) == len(row.parts) == len(row.steps)
    assert (row.roles.dtype, row.parts.dtype, row.spans.dtype) == (np.uint8, np.int16, np.int32)


@pytest.fixture(scope="module")
def reference(load, tmp_path_factory):
    """`reference(name)`: the transformers tokenizer on the folder we save."""
    from transformers import AutoTokenizer

    @functools.cache
    def get(name):
        folder = tmp_path_factory.mktemp("hf") / name
        load(name).save(folder)
        return AutoTokenizer.from_pretrained(folder)

    return get


@pytest.mark.parametrize("chat", sorted(CHATS))
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "deepseek_r1", "torchtitan_tiny"])
def test_prompt_equals_transformers(load, reference, name, chat):
    """The generation prompt, to the token, of the reference implementation on the same folder."""
    tok = load(name)
    messages = json.loads(json.dumps(CHATS[chat]))
    if name == "deepseek_r1" and chat == "tool":  # its template wants JSON text
        messages[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Paris"}'
    for kwargs in ({}, {"enable_thinking": False}, {"tools": TOOLS}):
        if name == "torchtitan_tiny" and chat == "tool":
            continue
        want = reference(name).apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                                       return_dict=False, **kwargs)
        assert tok.encode(tok.prompt_text(CHATS[chat], **kwargs))[0].tolist() == list(want)


MISTRAL = [("mistral_v1", "no_tools", "v1")] + [("mistral_v3", s, "v2") for s in (
    "no_tools", "get_weather_full", "get_weather_no_history", "get_weather_no_system_prompt", "parallel_calls",
    "several_calls")]


@pytest.mark.parametrize(("name", "sample", "version"), MISTRAL)
def test_mistral_golden(load, tokenizers_dir, name, sample, version):
    """Published text and ids of conversations with tools, from raw sentencepiece models."""
    folder = tokenizers_dir / "mistral"
    chat = json.loads((folder / f"{sample}__sample.json").read_text())
    tok = load(name)
    text = tok.prompt_text(chat["messages"], tools=chat["tools"])
    want = json.loads((folder / f"{sample}__tokens_{version}.json").read_text())["tokens"]
    ids = tok.encode(text)[0].tolist()
    assert ids == want
    golden = (folder / f"{sample}__text_{version}.txt").read_text()
    shown = "".join(tok.backend.pieces[i] for i in ids)
    assert shown.replace("\u2581", " ") == golden.replace("\u2581", " ")


def test_thinking_turn(load):
    tr = simple_trace("What is 2+2?", "Two and two.", "It is 4.", system="Be brief.")
    row = render(tr, load("qwen3"))
    check_row(row)
    assert layout(row, load("qwen3")) == [
        ("TEMPLATE", "<|im_start|>system\n"), ("SYSTEM", "Be brief."), ("TEMPLATE", "<|im_end|>\n<|im_start|>user\n"),
        ("QUESTION", "What is 2+2?"), ("TEMPLATE", "<|im_end|>\n<|im_start|>assistant\n"),
        ("THINK", "<think>\nTwo and two.\n</think>\n\n"), ("ANSWER", "It is 4.<|im_end|>")]
    r1 = layout(render(tr, load("deepseek_r1")), load("deepseek_r1"))
    assert r1[-2:] == [("THINK", "<think>\nTwo and two.\n</think>\n\n"), ("ANSWER", "It is 4.<｜end▁of▁sentence｜>")]


def test_ids_equal_the_template_where_it_keeps_thinking(load):
    """Qwen3's template writes the last turn's thinking as we do: same text, same ids."""
    tok = load("qwen3")
    tr = simple_trace("q", "hm. I see", "Yes!")
    full = tok.render([{"role": "user", "content": "q"},
                       {"role": "assistant", "reasoning_content": "hm. I see", "content": "Yes!"}],
                      generation_prompt=False)
    row = render(tr, tok)
    assert row.text + "\n" == full and row.tokens.tolist() == tok.encode(full)[0].tolist()[:-1]


@pytest.mark.parametrize("mode", ["on", "off"])
def test_supervised_tokens_equal_what_the_engine_counted(load, data_dir, mode):
    """Real generations of Qwen3-8B: our supervised turn has as many tokens as the engine sampled."""
    tok, off_by = load("qwen3"), Counter()
    with gzip.open(data_dir / f"2_traces/qwen3_think_on_off/qwen3-8b__think-{mode}.jsonl.gz", "rt") as f:
        for row in map(json.loads, f):
            if row["done_reason"] == "stop":
                tr = simple_trace("q", row["thinking"], row["content"])
                off_by[len(render(tr, tok).tokens) - len(prompt_ids(tr, tok)) - row["eval_count"]] += 1
    assert off_by[0] > 90 and off_by.total() - off_by[0] <= 1, off_by


def test_plain_template_and_think_tags_option(load):
    tok, tr = load("qwen2.5"), simple_trace("q", "t", "a")
    assert layout(render(tr, tok), tok)[-2:] == [("THINK", "<think>\nt\n</think>\n\n"), ("ANSWER", "a<|im_end|>")]
    plain = layout(render(tr, tok, style=Style(think_tags=False)), tok)
    assert plain[-2:] == [("THINK", "t\n\n"), ("ANSWER", "a<|im_end|>")]


def test_text_is_verbatim(load):
    tok = load("qwen3")
    row = render(simple_trace("q", "\nt\n", "\na"), tok)
    assert row.text.endswith("<think>\n\nt\n\n</think>\n\n\na<|im_end|>")
    check_row(row)
    assert split_completion(row.tokens[len(prompt_ids("q", tok)):], tok) == ("\nt\n", "\na", True)


def test_no_thinking_follows_the_template(load):
    tr = simple_trace("q", "", "a")
    q3 = render(tr, load("qwen3"))
    assert q3.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\na<|im_end|>")
    assert THINK not in q3.roles  # the prompt closes the block
    assert prompt_ids(tr, load("qwen3")).tolist() == q3.tokens[q3.roles != ANSWER].tolist()
    r1 = layout(render(tr, load("deepseek_r1")), load("deepseek_r1"))
    assert r1[-2][0] == "THINK" and r1[-2][1] == "<think>\n\n</think>\n\n"
    assert THINK not in render(tr, load("qwen2.5")).roles
    assert THINK not in render(tr, load("deepseek_r1"), style=Style(empty_think=False)).roles


def test_prompt_that_opens_the_thinking(load, tmp_path):
    """R1-Distill templates end the prompt with `<think>\\n`: that tag is TEMPLATE, and not written twice."""
    template = load("deepseek_r1").chat.text.replace("{{'<｜Assistant｜>'}}{% endif %}",
                                                     "{{'<｜Assistant｜><think>\\n'}}{% endif %}")
    assert template != load("deepseek_r1").chat.text
    (tmp_path / "t.jinja").write_text(template)
    load("deepseek_r1").save(tmp_path / "m")
    tok = load_tokenizer(tmp_path / "m", chat_template=tmp_path / "t.jinja")
    row = render(simple_trace("q", "t", "a"), tok)
    assert layout(row, tok)[-3:] == [("TEMPLATE", "<｜Assistant｜><think>\n"), ("THINK", "t\n</think>\n\n"),
                                     ("ANSWER", "a<｜end▁of▁sentence｜>")]
    assert split_completion("t\n</think>\n\na<｜end▁of▁sentence｜>", tok) == ("t", "a", True)
    assert split_completion("still thinking", tok) == ("still thinking", "", False)
    bare = layout(render(simple_trace("q", "", "a"), tok), tok)
    assert bare[-2:] == [("THINK", "\n</think>\n\n"), ("ANSWER", "a<｜end▁of▁sentence｜>")]


def test_unfinished_traces_do_not_teach_to_stop(load):
    tok = load("qwen3")
    row = render(Trace(segments=(Segment(role=QUESTION, text="q"), Segment(role=THINK, text="hm")),
                       flags=(FLAG_UNTERMINATED,)), tok)
    assert row.text.endswith("<think>\nhm")
    assert render(simple_trace("q", "t", "a cut", flags=(FLAG_TRUNCATED,)), tok).text.endswith("a cut")


def test_earlier_turns_are_context(load):
    tr = Trace(segments=(Segment(role=QUESTION, text="a"), Segment(role=THINK, text="old"),
                         Segment(role=ANSWER, text="b"), Segment(role=QUESTION, text="c", turn=1),
                         Segment(role=THINK, text="new", turn=1), Segment(role=ANSWER, text="d", turn=1)))
    for name in ("qwen3", "deepseek_r1", "qwen2.5"):
        row = render(tr, load(name))
        check_row(row)
        assert "old" not in row.text and 1 not in row.parts
        assert set(row.roles[row.parts == 2].tolist()) == {int(QUESTION)}
        assert set(row.roles[row.parts == 5].tolist()) == {int(ANSWER)}


CALL = Trace(segments=(
    Segment(role=QUESTION, text="weather?"), Segment(role=THINK, text="call it"),
    Segment(role=TOOL_CALL, text='{"name": "get_w", "arguments": {"city": "Paris"}}'),
    Segment(role=TOOL, text='{"t": "22"}'), Segment(role=THINK, text="so 22"), Segment(role=ANSWER, text="22 C")),
    meta={"tools": TOOLS})


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "deepseek_r1", "mistral_v3"])
def test_tool_calls(load, name):
    tok = load(name)
    row = render(CALL, tok)
    check_row(row)
    roles = [r for r, _ in layout(row, tok)]
    assert roles[-10:] == ["QUESTION", "TEMPLATE", "THINK", "TOOL_CALL", "ANSWER", "TEMPLATE", "TOOL", "TEMPLATE",
                           "THINK", "ANSWER"]
    if name == "qwen3":  # the template keeps thinking within a tool loop, so the row is what it renders
        chat = [{"role": "user", "content": "weather?"},
                {"role": "assistant", "content": "", "reasoning_content": "call it", "tool_calls": [
                    {"function": {"name": "get_w", "arguments": {"city": "Paris"}}}]},
                {"role": "tool", "content": '{"t": "22"}'},
                {"role": "assistant", "content": "22 C", "reasoning_content": "so 22"}]
        assert row.text + "\n" == tok.render(chat, generation_prompt=False, tools=TOOLS)
        assert set(row.parts[row.roles == TOOL].tolist()) == {3}


def test_tool_results_need_a_template_that_shows_them(load):
    plain = Trace(segments=CALL.segments)
    with pytest.raises(ValueError, match=r"cannot render a conversation|does not show the tool result"):
        render(plain, load("mistral_v1"))


def test_sampled_ids_are_kept(load):
    """A split the encoder would not make survives, with roles; a forced token is INJECTED."""
    tok = load("qwen3")
    base = render(simple_trace("q", "hello", "yes"), tok)
    n = int((base.roles == TEMPLATE).sum() + (base.roles == QUESTION).sum())
    hello = tok.encode("hello")[0]
    odd = np.concatenate([tok.encode(c)[0] for c in ("he", "llo")])
    at = base.tokens.tolist().index(int(hello[0]))
    ids = np.concatenate([base.tokens[:at], odd, base.tokens[at + 1:]])
    injected = np.zeros(len(ids), bool)
    injected[n] = True  # <think>
    tr = simple_trace("q", "hello", "yes", encoded=Encoded(tokenizer=tok.hash, ids=ids, prompt_length=n,
                                                           injected=injected))
    row = render(tr, tok)
    check_row(row)
    assert row.tokens.tolist() == ids.tolist() and row.text == base.text
    assert row.roles[n] == INJECTED and set(row.roles[at:at + 2].tolist()) == {int(THINK)}
    assert len(odd) > 1 and row.parts[at:at + len(odd)].tolist() == [1] * len(odd)
    assert row.spans[at:at + len(odd)].tolist()[0] == [0, 2] and row.spans[at + len(odd) - 1, 1] == 5
    assert prompt_ids(tr, tok).tolist() == ids[:n].tolist()


def test_sampled_text_that_differs_from_the_rendering(load):
    """One newline instead of two after `</think>`, no end token: roles still follow the segments."""
    tok = load("qwen3")
    prompt, said = prompt_ids("q", tok), tok.encode("<think>\nhello\n</think>\nyes")[0]
    tr = simple_trace("q", "hello", "yes", encoded=Encoded(
        tokenizer=tok.hash, ids=np.concatenate([prompt, said]), prompt_length=len(prompt)))
    row = render(tr, tok)
    check_row(row)
    assert layout(row, tok)[-2:] == [("THINK", "<think>\nhello\n</think>\n"), ("ANSWER", "yes")]


@pytest.mark.parametrize("name", ["qwen3", "qwen2.5", "mistral_v3"])
def test_split_completion_inverts_render(load, name):
    tok = load(name)
    row = render(simple_trace("q", "a\n\nb", "c. \n d"), tok)
    n = len(prompt_ids("q", tok))
    assert split_completion(row.tokens[n:], tok) == ("a\n\nb", "c. \n d", True)
    assert split_completion(row.tokens[n:-1], tok) == ("a\n\nb", "c. \n d", False)
    assert split_completion("just this", tok) == ("", "just this", False)


def test_template_id(load):
    q = load("qwen2.5")
    ids = {template_id(q), template_id(q, style=Style(think_tags=False)), template_id(q, enable_thinking=False),
           template_id(load("qwen3"))}
    assert len(ids) == 4 and template_id(q) == template_id(q)


def test_errors(load):
    with pytest.raises(ValueError, match="nothing to learn from"):
        render(Trace(segments=(Segment(role=QUESTION, text="q"),)), load("qwen3"))
    with pytest.raises(ValueError, match="role TEMPLATE"):
        render(Trace(segments=(Segment(role=TEMPLATE, text="q"), Segment(role=ANSWER, text="a"))), load("qwen3"))


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\U000f0000"), min_size=1, max_size=30)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(system=st.one_of(st.just(""), TEXT), q=TEXT, thoughts=st.lists(TEXT, max_size=3), a=TEXT)
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "deepseek_r1", "mistral_v3", "t5"])
def test_every_row_is_consistent(load, name, system, q, thoughts, a):
    segments = [Segment(role=SYSTEM, text=system)] if system else []
    segments += [Segment(role=QUESTION, text=q)]
    segments += [Segment(role=THINK, text=t, step=i + 1) for i, t in enumerate(thoughts)]
    segments += [Segment(role=ANSWER, text=a)]
    row = render(Trace(segments=tuple(segments)), load(name))
    check_row(row)
    body = f"<think>\n{''.join(thoughts)}\n</think>\n\n" if thoughts else ""
    assert row.text.endswith(body + a + load(name).chat.turn_end)
