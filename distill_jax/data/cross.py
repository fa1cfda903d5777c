"""Teacher and student with different tokenizers: their tokens side by side, by the bytes they stand for.

Groups. Both sides cut the same text. Wherever both have a boundary at the same byte, the text is cut; what lies between
two such cuts is a group: consecutive tokens of each side that cover the same bytes, and nothing smaller does. Tokens
without bytes (a sentencepiece dummy prefix) belong to the group that follows. The chain rule makes the likelihood of a
group on each side the product over its tokens.

Distributions. Where a group begins both models have read the same bytes, so the teacher's next-token distribution there
is a target for the student's, its outcomes mapped by their bytes (`byte_map`). Inside a group it is not: the teacher
never stood there. The same bytes are not quite the same event. Where the teacher has a longer token (`there`) that the
student writes in two, its mass belongs to the student's `the`: `prefix=True` puts it there. Where the student has the
longer one, a part of the teacher's `the` is its `there`, and no map of ids can tell which.

Faithful. A tokenizer that normalises (T5: NFKC, runs of blanks, unknown characters) reads another text than the one
that stands there. Byte offsets still exist, likelihoods of that text do not: groups with a token whose own bytes are
not those of the text get no signal. (What stands before them the teacher has read as it reads it.)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from distill_jax.core.batch import FOREIGN
from distill_jax.core.roles import SUPERVISED
from distill_jax.data.align import MIN_COVERAGE, Alignment, TokenArrays, align
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.traces.store import Row
from distill_jax.traces.store.signals import SampledRow, SignalRow, TopKRow

_PART = 1 << 32  # a byte of segment p is numbered p * _PART + offset
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, kw_only=True)
class ByteGroups:
    """source int32 [S], target int32 [T]: the group of each token, from 0 in the order of the text, -1 where the two
    sides have no common cut around it. count: number of groups; each has tokens on both sides."""

    source: np.ndarray
    target: np.ndarray
    count: int

    def sums(self, values: np.ndarray, of: np.ndarray) -> np.ndarray:
        """float64 [count]: sum of `values` over the tokens of each group, `of` being `source` or `target`. With
        log-probabilities: the log-likelihood of the group."""
        inside = of >= 0
        return np.bincount(of[inside], np.asarray(values, np.float64)[inside], self.count)

    def firsts(self, of: np.ndarray) -> np.ndarray:
        """int64 [count]: index of the first token of each group."""
        inside = np.flatnonzero(of >= 0)
        return inside[np.unique(of[inside], return_index=True)[1]]

    def sizes(self, of: np.ndarray) -> np.ndarray:
        """int64 [count]: tokens of each group."""
        return np.bincount(of[of >= 0], minlength=self.count)


def group_spans(source: np.ndarray, target: np.ndarray, source_parts: np.ndarray | None = None,
                target_parts: np.ndarray | None = None) -> ByteGroups:
    """Minimal groups of two tokenisations, given as byte spans [S,2] and [T,2] in text order that do not overlap.

    parts [S], [T]: which text each span counts in (segments of a trace); -1: none, such a token has no group.
    """
    sides = [_keys(source, source_parts), _keys(target, target_parts)]
    cuts = np.intersect1d(np.concatenate([sides[0][0], sides[0][1]]), np.concatenate([sides[1][0], sides[1][1]]))
    if len(cuts) < 2:
        none = [np.full(len(s), -1, np.int32) for s in (source, target)]
        return ByteGroups(source=none[0], target=none[1], count=0)
    size = np.diff(cuts)
    size[cuts[:-1] // _PART != cuts[1:] // _PART] = -1  # between two segments lies nothing
    raw = [_places(starts, ends, cuts, size) for starts, ends in sides]
    whole = size > 0
    for (starts, ends), at in zip(sides, raw):  # a side that leaves bytes out says nothing about them
        inside = at >= 0
        whole &= np.bincount(at[inside], (ends - starts)[inside], len(size)).astype(np.int64) == size
    number = np.where(whole, np.cumsum(whole) - 1, -1).astype(np.int32)
    of_source, of_target = (np.where(at >= 0, number[np.maximum(at, 0)], -1).astype(np.int32) for at in raw)
    return ByteGroups(source=of_source, target=of_target, count=int(whole.sum()))


def _keys(spans: np.ndarray, parts: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the first byte and of the one behind the last; negative for tokens of no part."""
    part = np.zeros(len(spans), np.int64) if parts is None else parts.astype(np.int64)
    wide = spans.astype(np.int64).reshape(-1, 2)
    start, end = np.where(part >= 0, part * _PART + wide.T, -1)
    return start, end


def _places(starts: np.ndarray, ends: np.ndarray, cuts: np.ndarray, size: np.ndarray) -> np.ndarray:
    """int64 [T]: the gap between cuts each token lies in, -1 if in none. No token lies across a cut."""
    at = np.searchsorted(cuts, starts, "right") - 1
    last = np.minimum(np.maximum(at, 0), len(size) - 1)
    behind = (starts == ends) & ((at == len(size)) | (size[last] < 0)) & (cuts[np.maximum(at, 0)] == starts)
    at = np.where(behind, at - 1, at)  # a token without bytes at the very end: nothing follows it
    inside = (at >= 0) & (at < len(size)) & (starts >= 0)
    safe = np.where(inside, at, 0)
    return np.where(inside & (size[safe] > 0) & (ends <= cuts[safe + 1]), at, -1)


@lru_cache(maxsize=4)
def token_table(tok: Tokenizer) -> list[bytes]:
    """The bytes of every real id (the content of an added token)."""
    return [tok.token_bytes(i) for i in range(tok.real)]


def byte_map(source: Tokenizer, target: Tokenizer, *, prefix: bool = False) -> np.ndarray:
    """int32 [real ids of source]: the target's id of the same bytes, or `FOREIGN` + the source's id.

    Added tokens correspond by content, the end of the turn by its meaning. Where several ids have the same bytes (a
    piece and its byte fallback) the piece counts, on both sides, so no target id is hit twice.

    prefix: an id without counterpart goes to the longest id of the target that its bytes begin with: what the student
    writes first if it writes those bytes. Several ids may then go to one, and `merge_outcomes` adds them. Byte-Prefix
    Marginalization (2607.22334): mass is kept, and the target is the teacher's marginal over the student's next bytes
    wherever these do not reach over several of its tokens.
    """
    added, twins, own = source.backend.added, target.backend.added, _canonical(target)
    out = np.arange(source.real, dtype=np.int32) + np.int32(FOREIGN)
    for raw, i in _canonical(source).items():
        if (j := own.get(raw)) is not None:
            out[i] = j
    for content, i in added.items():
        out[i] = twins.get(content, FOREIGN + i)
    if prefix:
        table = token_table(source)
        for i in sorted(set(np.flatnonzero(out >= FOREIGN).tolist()) - set(added.values())):
            lengths = range(len(table[i]), 0, -1)
            out[i] = next((own[table[i][:n]] for n in lengths if table[i][:n] in own), FOREIGN + i)
    if source.eos_ids and target.eos_ids:
        twin = np.flatnonzero(out == target.eos_ids[0])
        out[twin] = FOREIGN + twin  # one source id for the end of the turn
        out[source.eos_ids[0]] = target.eos_ids[0]
    return out


def _canonical(tok: Tokenizer) -> dict[bytes, int]:
    """The learned id of each byte string; a piece goes before a byte fallback of the same byte."""
    added, pieces = set(tok.backend.added.values()), tok.backend.pieces
    out: dict[bytes, int] = {}
    for i, raw in enumerate(token_table(tok)):
        fallback = len(raw) == 1 and bool(_BYTE.fullmatch(pieces[i]))
        if raw and i not in added and (raw not in out or (not fallback and _BYTE.fullmatch(pieces[out[raw]]))):
            out[raw] = i
    return out


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """Tokens of one side in the coordinates both sides share: number int64 [T] of the stretch of text (-1: none), spans
    int64 [T,2] in it, begins: where in the row's whole text each stretch starts."""

    number: np.ndarray
    spans: np.ndarray
    begins: np.ndarray


def _streams(source: TokenArrays, target: TokenArrays) -> tuple[_Stream, _Stream]:
    """Every segment that both rows hold is a stretch; supervised neighbours with equally long text between them are
    one, so that what the renderer writes between thinking and answer (`</think>`) is grouped too."""
    offsets, found = [], []
    for row in (source, target):
        ends = np.cumsum((row.spans[:, 1] - row.spans[:, 0]).astype(np.int64))  # spans are a partition of the text
        offsets.append(np.stack([ends - (row.spans[:, 1] - row.spans[:, 0]), ends], axis=1))
        content = np.flatnonzero(row.parts >= 0)
        parts, at = np.unique(row.parts[content], return_index=True)
        first, last = content[at], content[len(content) - 1 - np.unique(row.parts[content][::-1], return_index=True)[1]]
        begin = offsets[-1][first, 0] - row.spans[first, 0]
        written = np.isin(row.roles[first], [int(r) for r in SUPERVISED])
        found.append({int(p): (int(b), int(e), bool(w)) for p, b, e, w in zip(
            parts, begin, begin + row.spans[last, 1], written)})
    joined: list[list[int]] = []
    for p in sorted(found[0].keys() & found[1].keys()):
        before = joined[-1][-1] if joined else -2
        neighbours = before == p - 1 and all(f[p][2] and f[before][2] for f in found)
        if neighbours and len({f[p][0] - f[before][0] for f in found}) == 1:
            joined[-1].append(p)
        else:
            joined.append([p])
    sides = []
    for where, f in zip(offsets, found):
        begins = np.array([f[g[0]][0] for g in joined], np.int64)
        stops = np.array([f[g[-1]][1] for g in joined], np.int64)
        number = np.searchsorted(begins, where[:, 0], "right") - 1
        inside = (number >= 0) & (where[:, 0] < np.append(stops, 0)[number])
        shift = np.where(inside, np.append(begins, 0)[number], 0)
        sides.append(_Stream(number=np.where(inside, number, -1), spans=where - shift[:, None], begins=begins))
    return sides[0], sides[1]


def _faithful(tokens: np.ndarray, stream: _Stream, tok: Tokenizer, text: bytes, begins: np.ndarray
              ) -> tuple[np.ndarray, np.ndarray]:
    """(bool [T], bool [T]): tokens whose own bytes are those of the text they stand for, and those of them that begin
    with a blank that is not in the text (a dummy prefix). text: of the row whose stretches begin at `begins`. Tokens
    outside the stretches are not looked at (True, False)."""
    table = token_table(tok)
    good, blank = np.ones(len(tokens), bool), np.zeros(len(tokens), bool)
    for number, begin in enumerate(begins.tolist()):
        at = np.flatnonzero(stream.number == number)
        raw = [table[i] for i in tokens[at].tolist()]
        spans = stream.spans[at] + begin
        if len(at) and b"".join(raw) == text[spans[0, 0]:spans[-1, 1]]:
            continue
        for t, own, (start, end) in zip(at.tolist(), raw, spans.tolist()):
            want = text[start:end]
            blank[t] = tok.adds_blank and own == b" " + want
            good[t] = own == want or blank[t]
    return good, blank


def cross_align(source: Row, target: TokenArrays, mapping: np.ndarray, toks: tuple[Tokenizer, Tokenizer]) -> Alignment:
    """Where the teacher's signal of `source` goes in `target`, another rendering of the same trace: `toks` are the
    tokenizers of the two, `mapping` is `byte_map` of them (without prefixes).

    `index` names, for the first token of each group, the source's first: the distribution there. `pairs` keeps those
    where both stand alone in their group and are the same token. Both also hold the template tokens that a model writes
    (end of turn) where they are one token on both sides. `covered` counts the tokens in faithful groups.
    """
    sides = _streams(source, target)
    groups = group_spans(sides[0].spans, sides[1].spans, sides[0].number, sides[1].number)
    text = source.text.encode("utf-8", "surrogatepass")
    sound, blanks = np.ones(groups.count, bool), []
    for row, stream, tok, of in zip((source, target), sides, toks, (groups.source, groups.target)):
        good, blank = _faithful(row.tokens, stream, tok, text, sides[0].begins)
        sound[of[(of >= 0) & ~good]] = False
        blanks.append(blank)
    first, begins = groups.firsts(groups.source), groups.firsts(groups.target)
    clear = sound & (blanks[0][first] == blanks[1][begins])  # else every outcome is off by the blank
    outside = (target.parts < 0) & (sides[1].number < 0)
    index = np.where(outside, align(source, target, mapping).index, -1).astype(np.int32)
    pairs = index.copy()
    index[begins[clear]] = first[clear]
    single = clear & (groups.sizes(groups.source) == 1) & (groups.sizes(groups.target) == 1)
    single &= mapping[source.tokens[first]] == target.tokens[begins]
    pairs[begins[single]] = first[single]
    supervised = np.isin(target.roles, [int(r) for r in SUPERVISED]) & (target.parts >= 0)
    inside = (groups.target >= 0) & np.append(sound, False)[groups.target]
    return Alignment(index=index, pairs=pairs, supervised=int(supervised.sum()),
                     covered=int((supervised & inside).sum()), begun=int((supervised & (index >= 0)).sum()))


def require_same_text(found: Mapping[int, Alignment], names: tuple[str, str], least: float = MIN_COVERAGE) -> float:
    """Share of the supervised tokens of these rows ({row number: alignment}) whose bytes both tokenizers keep. Raises
    ValueError naming the worst row when it is below `least`."""
    covered, supervised = (sum(getattr(a, k) for a in found.values()) for k in ("covered", "supervised"))
    share = covered / supervised if supervised else 0.0
    if share < least:
        worst = min(found, key=lambda i: found[i].covered / max(1, found[i].supervised))
        one = found[worst]
        raise ValueError(
            f"row {worst}: of its {one.supervised} supervised tokens only {one.covered} stand for the same bytes to "
            f"the teacher ({names[0]}) and to the student ({names[1]}); {share:.1%} over {len(found)} rows, at least "
            f"{least:.0%} is asked. One of the tokenizers changes the text (normalises it, drops blanks or line ends, "
            "has no token for a character). Use a teacher whose tokenizer keeps it (byte-level, or with byte "
            "fallback), or train on the text alone (cross-entropy).")
    return share


def merged(row: SignalRow) -> SignalRow:
    """The row with outcomes of the same id added up into one (`byte_map` with `prefix` makes such)."""
    if isinstance(row, TopKRow):
        ids, logprobs = merge_outcomes(row.ids, row.logprobs)
        return replace(row, ids=ids, logprobs=logprobs)
    if isinstance(row, SampledRow):
        with np.errstate(divide="ignore"):
            ids, logs = merge_outcomes(row.ids, np.log(row.weights))
        return replace(row, ids=ids, weights=np.exp(logs))
    return row


def merge_outcomes(ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[T,K] each: outcomes of the same id at one token added up into one; the places of the others become -1, -inf."""
    if not ids.size:
        return ids, logprobs
    order = np.argsort(ids, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    p = np.exp(np.take_along_axis(logprobs, order, axis=1), dtype=np.float64)
    head = np.ones(ids.shape, bool)
    head[:, 1:] = ids[:, 1:] != ids[:, :-1]
    out = np.full(ids.shape, -np.inf, np.float32)
    with np.errstate(divide="ignore"):
        out[head] = np.log(np.add.reduceat(p.reshape(-1), np.flatnonzero(head))).astype(np.float32)
    keep = head & (ids >= 0)
    return np.where(keep, ids, -1).astype(np.int32), np.where(keep, out, np.float32(-np.inf))
