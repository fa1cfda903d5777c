"""Ways of thinking about Knights and Knaves: `careful` and `varied` traces, read back from the printed text."""

import re
from collections import Counter

import pytest

from distill_jax.traces.world.generate import WorldSpec, traces

TEST = r"\w+ (?:true|false) says .*? (?:true|false) (?:ok|no)\b"


def spec_of(style: str, **changes) -> WorldSpec:
    return WorldSpec(**{"kind": "knights", "k": 3, "style": style, **changes})


def read(thinking: str) -> list[tuple[str, list[str]]]:
    """`suppose` or `check` with the roles or tests that follow it; tests are what stands before each ok / no."""
    out = []
    for mark, rest in re.findall(r"(suppose|check) (.*?)(?= suppose| check|$)", thinking):
        roles = re.match(r"(?:\w+ (?:true|false)(?! says) ?)+", rest)[0] if mark == "suppose" else ""
        plain = roles.strip().replace("true", "knight").replace("false", "knave")
        out.append((plain or "check", re.findall(TEST, rest[len(roles):])))
    return out


def judge(test: str, said: dict[str, str], roles: dict[str, str]) -> bool:
    """Holds a printed test against the printed question; -> whether it fits."""
    speaker, held, truth, verdict = re.fullmatch(
        r"(\w+ (?:true|false)) says (.*) (true|false) (ok|no)", test).groups()
    supposed = [words.split() for words in (speaker, *re.findall(r"\w+ (?:true|false)", held))]
    assert all((roles[name] == "knight") == (role == "true") for name, role in supposed)
    speaker, claims = speaker.split()[0], re.sub(r" (true|false)\b", "", held)
    assert said[speaker] == re.sub(r" (yes|no)\b", "", claims)
    if re.search(r" (same|differ) ", claims):
        holds = (supposed[1][1] == supposed[2][1]) == (" same " in claims)
    else:
        parts = re.findall(r"(\w+) (?:is )?(knight|knave) (yes|no)", claims)
        assert parts and all((roles[a] == claimed) == (yes == "yes") for a, claimed, yes in parts)
        holds = (any if " or " in held else all)(yes == "yes" for *_, yes in parts)
    assert holds == (truth == "true") and (holds == (roles[speaker] == "knight")) == (verdict == "ok")
    return verdict == "ok"


def said_of(question: str) -> dict[str, str]:
    return dict(s.split(" says ") for s in question.removesuffix(" ask knight or knave").split(" ; "))


def roles_of(text: str) -> dict[str, str]:
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


def number(roles: str) -> int:
    return sum(2**i for i, r in enumerate(roles_of(roles).values()) if r == "knight")


@pytest.mark.parametrize("k", [2, 3])
def test_careful_traces_test_every_supposition_and_search_in_order(k):
    wrong = Counter()
    for t in traces(spec_of("careful", k=k), 300):
        steps = careful(t)
        assert all(roles != "check" for roles, _ in steps)
        wrong[len(steps) - 1] += 1
    assert set(wrong) >= set(range(2**k - 1)) and 0.3 < wrong[0] / 300 < 0.5


def careful(t) -> list[tuple[str, list[str]]]:
    """Asserts that a trace searches with care, and that what it tests again is what it has just found; -> `read`."""
    assert t.thinking.startswith("seek suppose")
    said, steps = said_of(t.question), read(t.thinking)
    supposed = [(roles, tests) for roles, tests in steps if roles != "check"]
    k = len(said)
    for roles, tests in supposed:
        fits = [judge(x, said, roles_of(roles)) for x in tests]
        assert all(fits[:-1]) and fits[-1] == (roles == t.answer) and (not fits[-1] or len(fits) == k)
    assert supposed[-1][0] == t.answer
    tried = [number(roles) for roles, _ in supposed]
    assert tried == [(tried[0] + i) % 2**k for i in range(len(tried))] and len(set(tried)) == len(tried)
    assert all(x == ("check", supposed[-1][1]) for x in steps[len(supposed):])
    return steps


def test_two_thirds_of_varied_traces_hardly_test_and_are_right():
    """The first word tells the way; a quick trace tests the last supposition once or not at all, and one before it."""
    made = list(traces(spec_of("varied"), 600))
    quick = [t for t in made if not t.thinking.startswith("seek")]
    assert 0.58 < len(quick) / len(made) < 0.72
    checks = Counter(sum(roles == "check" for roles, _ in careful(t)) for t in made if t.thinking.startswith("seek"))
    assert set(checks) == {0, 1, 2} and checks[2] > checks[1] + checks[0] and checks[0] > 15
    seen = Counter()
    for t in quick:
        said, steps = said_of(t.question), read(t.thinking)
        assert steps[-1][0] == t.answer == t.gold and t.verdict is True
        assert all(roles != "check" and len(tests) <= 1 for roles, tests in steps)
        fits = [judge(x, said, roles_of(roles)) for roles, tests in steps for x in tests]
        assert fits[:len(steps) - 1] == [False] * (len(steps) - 1)
        seen[len(steps), len(steps[-1][1])] += 1
    assert set(seen) == {(n, tests) for n in (1, 2) for tests in (0, 1)} and min(seen.values()) > 50


def test_the_question_is_the_same_in_every_style():
    """So that what RL asks does not depend on what the warm-up read."""
    first, *others = [[(t.question, t.answer) for t in traces(spec_of(s), 20)]
                      for s in ("minimal", "extended", "careful", "varied")]
    assert all(x == first for x in others)


def test_rich_traces_say_the_supposed_roles():
    (t,) = traces(spec_of("careful", rendering="rich"), 1)
    claims = re.findall(r'"([^"]+)" Supposed: (.+?)\.', t.thinking)
    assert len(claims) >= 3 and all(quoted in t.question for quoted, _ in claims)
    assert all(re.fullmatch(r"\w+ a kn\w+(?: and \w+ a kn\w+)?", supposed) for _, supposed in claims)


@pytest.mark.parametrize("style", ["careful", "varied"])
def test_the_ways_are_for_knights_and_knaves_alone(style):
    with pytest.raises(ValueError, match=f"style '{style}' is for kind='knights', got kind='two_hop'"):
        WorldSpec(style=style)
