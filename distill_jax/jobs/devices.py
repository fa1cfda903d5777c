"""`--mesh data=1,fsdp=-1,tensor=2`: the devices a command works on."""

from jax.sharding import Mesh

from distill_jax.sharding import AXES, make_mesh


def parse_mesh(text: str) -> Mesh | None:
    """A mesh from `axis=size,...`; axes left out are 1. None for an empty text: the first device alone.

    Raises ValueError for an unknown axis, or sizes that do not fit the devices.
    """
    if not text.strip():
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (x.strip() for x in part.partition("="))
        if axis not in AXES or axis in sizes or not size.lstrip("-").isdigit():
            raise ValueError(f"--mesh {text!r}: expected axis=size with each of {', '.join(AXES)} at most once, "
                             f"got {part.strip()!r}")
        sizes[axis] = int(size)
    return make_mesh(devices=None, **sizes)
