"""Token roles: what each token of a trace is. Frozen numbers: they are stored on disk.

No jax here: `traces/` imports this module.
"""

from enum import IntEnum


class Role(IntEnum):
    """Role of a token or of a segment of a trace. Never renumber: stores hold these as uint8."""

    PAD = 0
    TEMPLATE = 1
    SYSTEM = 2
    QUESTION = 3
    THINK = 4  # includes `</think>`, and `<think>` where the model writes it
    ANSWER = 5  # includes the token that ends the turn
    TOOL_CALL = 6
    TOOL = 7
    INJECTED = 8


PAD, TEMPLATE, SYSTEM, QUESTION, THINK, ANSWER, TOOL_CALL, TOOL, INJECTED = Role
NUM_ROLES = len(Role)

SUPERVISED: tuple[Role, ...] = (THINK, ANSWER, TOOL_CALL)
"""What a model writes itself, and therefore what a loss is taken on unless a term says otherwise."""

ROLE_STYLE: dict[Role, str] = {
    PAD: "dim", TEMPLATE: "grey50", SYSTEM: "magenta", QUESTION: "cyan", THINK: "yellow",
    ANSWER: "green", TOOL_CALL: "blue", TOOL: "bright_blue", INJECTED: "red",
}
"""Rich style of each role, for `store inspect` and `batch`."""


def parse_roles(names: str | list[str] | tuple[str | int | Role, ...]) -> tuple[Role, ...]:
    """`"think,answer"`, `["THINK"]` or `(4, 5)` -> `(Role.THINK, ...)`. Raises ValueError with the known names."""
    items = names.split(",") if isinstance(names, str) else names
    out: list[Role] = []
    for item in items:
        try:
            out.append(Role[item.strip().upper()] if isinstance(item, str) else Role(item))
        except (KeyError, ValueError):
            raise ValueError(f"unknown role {item!r}; known roles: {[r.name.lower() for r in Role]}") from None
    return tuple(out)
