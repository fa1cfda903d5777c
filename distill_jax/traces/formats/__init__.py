"""Importers: files of other people's traces -> `Trace`.

`read_rows` gives the rows of a file, `detect` picks the importer, `Format.records` turns a row into traces.
"""

from distill_jax.traces.formats.base import Format
from distill_jax.traces.formats.detect import LOOK, detect
from distill_jax.traces.formats.fields import Fields, Join, load_join, parse_map
from distill_jax.traces.formats.read import BadRow, iter_rows, read_rows
from distill_jax.traces.formats.text import Reject

__all__ = ["LOOK", "BadRow", "Fields", "Format", "Join", "Reject", "detect", "iter_rows", "load_join", "parse_map",
           "read_rows"]
