"""The checks of `doctor`: each looks at one way in which a distillation run goes wrong without saying so."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.core.batch import FOREIGN
from distill_jax.core.roles import SUPERVISED
from distill_jax.data.chat import THINK_CLOSE
from distill_jax.data.choosing import CUT_ANSWER, held_out
from distill_jax.data.render import render, template_id
from distill_jax.data.tokenizer import Tokenizer, same_real_ids
from distill_jax.jobs.patient import Finding, Patient
from distill_jax.traces.formats import LOOK, detect, read_rows
from distill_jax.traces.store import RowArrays, SampledRow, TopKRow, TraceStore
from distill_jax.traces.trace import Trace

WRITTEN = [int(r) for r in SUPERVISED]
SHIFTS = (-2, -1, 0, 1, 2)


def supervised_mask(p: Patient) -> list[Finding]:
    """Rows in which no token carries a loss."""
    length = p.spec.seq_len
    empty = [int(n) for n, r in zip(p.sample, p.rows) if not np.isin(r.roles[1:length], WRITTEN).any()]
    if not empty:
        return []
    every = len(empty) == len(p.rows)
    roles = Counter(int(r) for row in p.rows[:8] for r in row.roles)
    return [Finding(
        check="empty mask", severity="error" if every else "warning",
        message=f"{len(empty)} of {len(p.rows)} rows have no supervised token within {length} (row {empty[0]}); roles "
                f"found: {dict(sorted(roles.items()))}",
        mend="look at a row with `distill-jax store inspect --row N`: are thinking and answer segments there, and does "
             "the prompt leave room for them?")]


def think_tags(p: Patient) -> list[Finding]:
    """`</think>` must be the same run of tokens in every row, and in the teacher's rows as in the student's."""
    runs = Counter(run for r in p.rows if (run := _tag_run(r.tokens, r.roles, p.tok)) is not None)
    out = []
    if len(runs) > 1:
        shown = ", ".join(f"{[p.tok.decode([t]) for t in run]} ({n} rows)" for run, n in runs.most_common(4))
        out.append(Finding(
            check="think tag", severity="warning",
            message=f"{THINK_CLOSE} is not one run of tokens: it merges with the text around it: {shown}",
            mend="use a tokenizer that has the tag as a token of its own, or style.think_tags=False"))
    if not runs:
        return out
    mine = runs.most_common(1)[0][0]
    for name, tag in _teacher_tags(p):
        if tag is not None and tag != tuple(p.tok.token_bytes(t) for t in mine):
            out.append(Finding(
                check="think tag", severity="warning",
                message=f"{THINK_CLOSE} is {[t.decode('utf-8', 'replace') for t in tag]} for {name} and "
                        f"{[p.tok.decode([t]) for t in mine]} for the student: a signal says nothing there",
                mend="give the student the teacher's think tokens, keep a cross-entropy term for the tags, or write no "
                     "tags (style.think_tags=False)"))
    return out


def _tag_run(tokens: np.ndarray, roles: np.ndarray, tok: Tokenizer) -> tuple[int, ...] | None:
    """Ids of the tokens that hold the last written `</think>`, without the blank line behind it."""
    raw = [tok.token_bytes(int(t)) if 0 <= t < tok.real else b"" for t in tokens]
    starts = np.concatenate([[0], np.cumsum([len(b) for b in raw])])
    tag = THINK_CLOSE.encode()
    at = b"".join(raw).rfind(tag)
    if at < 0:
        return None
    first = int(np.searchsorted(starts, at, "right")) - 1
    last = int(np.searchsorted(starts, at + len(tag), "left"))
    return tuple(int(t) for t in tokens[first:last]) if roles[first] in WRITTEN else None


def _teacher_tags(p: Patient) -> Iterable[tuple[str, tuple[bytes, ...] | None]]:
    """(who, bytes of the tag's tokens) of every teacher whose tokenizer is at hand, and of the store's tokenizer."""
    thinking = [t for t in p.traces if t.thinking][:4]
    for name, tok in p.teachers.items():
        for trace in thinking[:1]:
            row = render(trace, tok)
            run = _tag_run(row.tokens, row.roles, tok)
            yield f"teacher {name}", None if run is None else tuple(tok.token_bytes(t) for t in run)
    if THINK_CLOSE in p.store.header.tokenizer.get("added", {}):
        yield "the tokenizer of the store", (THINK_CLOSE.encode(),)


def template_drift(p: Patient) -> list[Finding]:
    """Rows rendered by another tokenizer or template than the student's."""
    if p.fits:
        return []
    header = p.store.header
    there = header.tokenizer.get("chat_template", "").splitlines()
    here = p.tok.chat.text.splitlines()
    changed = [line for line in difflib.unified_diff(there, here, lineterm="", n=0) if not line.startswith(
        ("---", "+++", "@@"))]
    found = same_real_ids(header.tokenizer, p.tok) if header.tokenizer.get("hash") else ["the store names no tokenizer"]
    if found:
        severe = bool(p.spec.signals) and header.tokenizer.get("base_hash") != p.tok.base_hash
        return [Finding(
            check="template drift", severity="error" if severe else "warning",
            message=f"the store was made with another tokenizer: {'; '.join(found[:4])}",
            mend="score with a teacher of the student's vocabulary" if severe else
                 "rows are rendered again, signals attached by bytes; to save that, import with --tokenizer STUDENT")]
    where = f"; first difference: {changed[0][:160]!r}" if changed else " (style or template arguments)"
    return [Finding(
        check="template drift", severity="warning",
        message=f"the store was rendered with template {header.template}, the student's is "
                f"{template_id(p.tok, style=p.spec.style)}{where}",
        mend="rows are rendered again for this student; if that is not meant, give the store's template: "
             "chat_template.jinja of the model it was imported for")]


def padded_vocabulary(p: Patient) -> list[Finding]:
    """Ids that no tokenizer has: in the head, in the rows, in a signal."""
    out, real = [], p.tok.real
    for name, size in p.vocabularies.items():
        ids = p.teachers[name].real if name in p.teachers else real
        if size < ids:
            out.append(Finding(
                check="padded vocabulary", severity="error",
                message=f"the head of {name} has {size:,} rows, its tokenizer {ids:,} ids",
                mend="use the tokenizer that belongs to the model, or enlarge its embedding"))
        elif size > ids:
            out.append(Finding(
                check="padded vocabulary", severity="note",
                message=f"the head of {name} has {size:,} rows for {ids:,} real ids: {size - ids:,} are padding",
                mend="they are masked in training and decoding here; another program must not sample them"))
    known = int(p.store.header.tokenizer.get("real", real))
    beyond = sum(int((r.tokens >= known).sum()) for r in p.stored)
    if beyond:
        out.append(Finding(check="padded vocabulary", severity="error",
                           message=f"{beyond} tokens of the rows have ids of {known:,} and above, which no token has",
                           mend="import the traces again with the right tokenizer"))
    for name, reader in p.signals.items():
        outside = total = 0
        for s in reader.read(p.sample[p.sample < len(reader)][:64]):
            if isinstance(s, TopKRow | SampledRow):
                mass = np.exp(s.logprobs.astype(np.float64)) if isinstance(s, TopKRow) else s.weights
                padding = (s.ids >= known) & (s.ids < FOREIGN)
                outside, total = outside + mass[padding].sum(), total + mass.sum()
        if outside:
            out.append(Finding(
                check="padded vocabulary", severity="error",
                message=f"signal {name} gives {outside / total:.2%} of its mass to padding (ids from {known:,})",
                mend="score again with the padded rows of the teacher's head masked"))
    return out


def truncated_answers(p: Patient) -> list[Finding]:
    """Traces that stop before their answer does."""
    chosen = set(p.chosen.tolist())
    flagged = [i for i, flags in enumerate(p.index.flags) if any(f in CUT_ANSWER for f in flags)]
    inside = [i for i in flagged if i in chosen]
    out = []
    if inside:
        out.append(Finding(
            check="truncated answers", severity="error",
            message=f"{len(inside)} of {len(chosen)} rows that are trained on have no whole answer (row {inside[0]}: "
                    f"{', '.join(p.index.flags[inside[0]])})",
            mend="over_long='drop' leaves them out"))
    elif flagged:
        out.append(Finding(
            check="truncated answers", severity="note", message=f"{len(flagged)} of {len(p.index.flags)} rows have no "
            "whole answer; they are left out", mend="sample them again with a larger token limit"))
    looks = [int(i) for i, t in zip(p.sample, p.traces) if int(i) not in set(inside) and looks_cut(t)]
    if len(looks) > max(1, 0.03 * len(p.sample)):
        tail = next(t for i, t in zip(p.sample, p.traces) if i == looks[0]).answer[-60:]
        out.append(Finding(
            check="truncated answers", severity="warning",
            message=f"{len(looks)} of {len(p.sample)} answers look as if they were cut off, and are not flagged (row "
                    f"{looks[0]} ends {tail!r})",
            mend="check the generator's length limit; import with its finish_reason so that cut traces are recognised"))
    return out


_OPEN_WORDS = frozenset([
    "a", "an", "and", "are", "as", "at", "be", "because", "but", "by", "for", "from", "has", "have", "if", "in", "into",
    "is", "it", "its", "let", "of", "on", "or", "so", "than", "that", "the", "their", "then", "there", "this", "to",
    "was", "we", "when", "which", "with", "you"])


def looks_cut(trace: Trace) -> bool:
    """Whether the answer stops in the middle: inside a formula or code block, or on a word that opens something."""
    text = trace.answer.rstrip()
    if not text:
        return False
    if text.count("```") % 2 or text.count("$$") % 2 or text.count(r"\[") > text.count(r"\]"):
        return True
    if r"\boxed{" in text:
        tail = text[text.rindex(r"\boxed{"):]
        if tail.count("{") > tail.count("}"):
            return True
    word = re.search(r"([A-Za-z]+)$", text)
    return text[-1] in ",;:+=(-" or (word is not None and " " in text and word[1] in _OPEN_WORDS)


def duplicate_questions(p: Patient) -> list[Finding]:
    """Questions that are trained on and also held out, or asked in a file that should be unseen."""
    out = []
    if p.spec.holdout:
        held = held_out(p.index.groups, p.spec.holdout)
        sides: dict[str, set[bool]] = {}
        example: dict[str, int] = {}
        for i, trace in enumerate(p.store.traces()):
            key = normalised(trace.prompt_text)
            sides.setdefault(key, set()).add(bool(held[i]))
            example.setdefault(key, i)
        both = [k for k, s in sides.items() if len(s) > 1]
        if both:
            out.append(Finding(
                check="duplicate questions", severity="error",
                message=f"{len(both)} questions stand in the training and in the held-out split in nearly the same "
                        f"words (row {example[both[0]]}: {both[0][:80]!r})",
                mend="give them one group when importing (an id field, --map group=...), or leave duplicates out"))
    if p.against:
        mine = {normalised(t.prompt_text) for t in p.store.traces(p.chosen)}
        mine |= {normalised(t) for t in _questions_only(p.store.traces(p.chosen))}
        for path in p.against:
            theirs = [normalised(q) for q in _read_questions(path)]
            seen = [q for q in theirs if q in mine]
            if seen:
                out.append(Finding(
                    check="duplicate questions", severity="error",
                    message=f"{len(seen)} of {len(theirs)} questions of {path} are trained on ({seen[0][:80]!r})",
                    mend="take them out of the training store, or evaluate on others"))
    return out


def normalised(text: str) -> str:
    """A question without what does not tell questions apart: case, punctuation, white space."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def _questions_only(traces: Iterable[Trace]) -> Iterable[str]:
    return (t.question for t in traces)


def _read_questions(path: str) -> Iterable[str]:
    if "://" in path or Path(path).is_dir():
        yield from _questions_only(TraceStore.open(path).traces())
        return
    rows = list(read_rows(path))
    importer = detect(rows[:LOOK], where=path)
    for i, row in enumerate(rows):
        found = [r for r in importer.records(row, path, i) if isinstance(r, Trace)]
        yield from dict.fromkeys(t.question for t in found)


def turn_tokens(p: Patient) -> list[Finding]:
    """One BOS where the tokenizer wants one, and an end token that is learned."""
    return [*_begins(p), *_ends(p)]


def _begins(p: Patient) -> list[Finding]:
    tok, out = p.tok, []
    if tok.bos_id is None:
        return out
    bos = repr(tok.decode([tok.bos_id]))
    double = sum(int(len(r.tokens) > 1 and (r.tokens[:2] == tok.bos_id).all()) for r in p.rows)
    if double:
        out.append(Finding(
            check="BOS", severity="error", message=f"{double} of {len(p.rows)} rows begin with two {bos}",
            mend="the template writes it already: do not add another one to the question or by the tokenizer"))
    missing = sum(int(r.tokens[0] != tok.bos_id) for r in p.rows)
    if missing and tok.config.get("add_bos_token"):
        out.append(Finding(
            check="BOS", severity="warning",
            message=f"{missing} of {len(p.rows)} rows do not begin with {bos}, which this tokenizer adds elsewhere",
            mend="let the chat template write {{ bos_token }}"))
    return out


def _ends(p: Patient) -> list[Finding]:
    tok = p.tok
    if not tok.eos_ids:
        return [Finding(
            check="EOS", severity="error",
            message="neither the template nor the tokenizer ends a turn: the student would never stop",
            mend="set eos_token in tokenizer_config.json, or end the assistant's turn in the template")]
    out = []
    whole = [(int(i), r) for i, r in zip(p.sample, p.rows) if not set(p.index.flags[i]) & set(CUT_ANSWER)]
    endless = [(i, r) for i, r in whole if int(r.tokens[-1]) not in tok.eos_ids or r.roles[-1] not in WRITTEN]
    if endless:
        i, row = endless[0]
        out.append(Finding(
            check="EOS", severity="error",
            message=f"{len(endless)} of {len(whole)} whole rows do not end with a supervised end token (row {i} ends "
                    f"with {tok.decode([row.tokens[-1]])!r})",
            mend=f"rows must end with {tok.chat.turn_end!r}; import them again with this tokenizer"))
    other = Counter(int(r.tokens[-1]) for _, r in whole if int(r.tokens[-1]) in tok.eos_ids[1:])
    if other:
        out.append(Finding(
            check="EOS", severity="warning",
            message=f"{sum(other.values())} of {len(whole)} rows end with {tok.decode([next(iter(other))])!r} instead "
                    f"of {tok.chat.turn_end!r}",
            mend="the student learns another end of turn than the template's; check the teacher's ids"))
    return out


def shifted_signal(p: Patient) -> list[Finding]:
    """A signal must say most about the token it stands at, not about the one before or behind."""
    out = []
    for name, reader in p.signals.items():
        numbers = [j for j, i in enumerate(p.sample) if i < len(reader)][:64]
        signals = reader.read(p.sample[numbers]) if numbers else []
        rows = [p.stored[j] for j in numbers]
        if reader.header.kind not in _SHIFT_SCORES:  # states say nothing without the head
            continue
        score, unit = _SHIFT_SCORES[reader.header.kind]
        scores = {s: score(rows, signals, s) for s in SHIFTS}
        best = max(scores, key=lambda s: scores[s])
        if best != 0 and scores[best] > scores[0] + 0.02:
            out.append(Finding(
                check="shifted signal", severity="error",
                message=f"signal {name} at t describes the token at t{best:+d}: {unit} {scores[best]:.3f} there, "
                        f"{scores[0]:.3f} at t",
                mend=f"every field at t describes token t given the tokens before it: score again, or move the "
                     f"ingested signal by {best:+d}"))
    return out


def _pairs(row: RowArrays, mask: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """(t, token at t + shift) where the signal speaks, for the tokens that are inside the row under every shift."""
    reach = max(SHIFTS)
    t = np.flatnonzero(mask)
    t = t[(t >= reach) & (t < len(row.tokens) - reach)]
    return t, row.tokens[t + shift]


def _likelihood(rows: Sequence[RowArrays], signals: Sequence[Any], shift: int) -> float:
    """Mean log-prob the top-k gives to the token `shift` further on; tokens it does not list get a thousandth of what
    is left."""
    values = []
    for row, s in zip(rows, signals):
        t, tokens = _pairs(row, s.mask, shift)
        hit = (s.ids[t] == tokens[:, None]) & (tokens[:, None] >= 0)
        tail = np.log(np.clip(1 - np.exp(s.logprobs[t].astype(np.float64)).sum(1), 1e-6, 1) / 1000)
        listed = np.where(hit, s.logprobs[t], -np.inf).max(axis=1, initial=-np.inf)
        values.append(np.where(hit.any(1), listed, tail))
    flat = np.concatenate(values) if values else np.zeros(0)
    return float(flat.mean()) if len(flat) else 0.0


def _drawn(rows: Sequence[RowArrays], signals: Sequence[Any], shift: int) -> float:
    """Mean share of the draws that are the token `shift` further on."""
    values = []
    for row, s in zip(rows, signals):
        t, tokens = _pairs(row, s.mask, shift)
        values.append(np.where(s.ids[t] == tokens[:, None], s.weights[t], 0).sum(axis=1))
    flat = np.concatenate(values) if values else np.zeros(0)
    return float(flat.mean()) if len(flat) else 0.0


def _explained(rows: Sequence[RowArrays], signals: Sequence[Any], shift: int) -> float:
    """Correlation of the log-prob with the mean log-prob of the other places of the same token id: high only where
    token and log-prob belong together."""
    tokens, values = [], []
    for row, s in zip(rows, signals):
        t, here = _pairs(row, s.mask, shift)
        tokens.append(here)
        values.append(s.logprobs[t].astype(np.float64))
    if not tokens or sum(map(len, tokens)) < 8:
        return 0.0
    _, kind = np.unique(np.concatenate(tokens), return_inverse=True)
    x = np.concatenate(values)
    count, total = np.bincount(kind), np.bincount(kind, x)
    often = count[kind] > 1
    rest = (total[kind] - x)[often] / (count[kind][often] - 1)
    if often.sum() < 8 or rest.std() == 0 or x[often].std() == 0:
        return 0.0
    return float(np.corrcoef(rest, x[often])[0, 1])


_SHIFT_SCORES = {"topk": (_likelihood, "mean log-prob of the realised token"),
                 "token": (_explained, "correlation of log-prob and token"),
                 "sampled": (_drawn, "share of the draws that are the realised token")}


CHECKS = (supervised_mask, think_tags, template_drift, padded_vocabulary, truncated_answers, duplicate_questions,
          turn_tokens, shifted_signal)
