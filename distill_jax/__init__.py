"""distill_jax: distil reasoning traces into small JAX students.

`distill_jax.load(MODEL)` gives `(model, params)`; everything else is imported from its own module.
Importing this package does not import jax.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def load(source: str, **kwargs: Any) -> Any:
    """`model, params = distill_jax.load(MODEL)`; see `distill_jax.loading.load`."""
    from distill_jax.loading import load as _load

    return _load(source, **kwargs)
