"""Open what a recipe (or a bare store) would feed a student, without building a model: for `batch` and `doctor`."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_jax.data.source_specs import Mix, Source, Store, map_stores, stores
from distill_jax.data.sources import Reading, Readings
from distill_jax.data.tokenizer import Tokenizer, load_tokenizer
from distill_jax.recipe import Recipe, Stage, Student, resolve
from distill_jax.recipe_file import load_recipe
from distill_jax.traces.store import TraceStore


@dataclass(frozen=True, kw_only=True)
class Feed:
    """A source with the tokenizers that meet on it.

    teachers      by provider, of those that read the student's own tokens
    readings      the views that are in other tokens
    vocabularies  rows of the output head by provider, of the student and those teachers
    """

    source: Source
    tokenizer: Tokenizer
    seed: int = 0
    teachers: Mapping[str, Tokenizer] = field(default_factory=dict)
    readings: Readings = field(default_factory=dict)
    vocabularies: Mapping[str, int] = field(default_factory=dict)

    @property
    def stores(self) -> tuple[Store, ...]:
        return tuple(stores(self.source))


def open_feed(path: str, *, overrides: list[str] | None = None, stage: str | None = None,
              tokenizer: str | None = None, **changes: Any) -> Feed:
    """The feed of a recipe's training stage (the first one, or `stage`), or of a store. `changes` are fields of `Store`
    (seq_len, rows, signals, ...) that are not None. Raises ValueError when there is nothing to open."""
    changes = {k: v for k, v in changes.items() if v is not None}
    if path.endswith((".py", ".yaml", ".yml")):
        feed = _of_recipe(load_recipe(path, overrides), stage, tokenizer)
    else:
        if overrides:
            raise ValueError(f"--set changes a recipe, and {path} is a store; use the options")
        feed = _of_store(path, tokenizer)
    return dataclasses.replace(feed, source=_changed(feed.source, changes))


def _changed(source: Source, changes: Mapping[str, Any]) -> Source:
    """Fields of every store replaced, and the `rows` of a `Mix` with them."""
    if isinstance(source, Store):
        return dataclasses.replace(source, **changes)
    rows = {"rows": changes["rows"]} if isinstance(source, Mix) and "rows" in changes else {}
    return dataclasses.replace(source, sources=tuple(_changed(s, changes) for s in source.sources), **rows)


def _of_store(path: str, tokenizer: str | None) -> Feed:
    store = TraceStore.open(path)
    name = tokenizer or str(store.header.tokenizer.get("name", ""))
    if not name:
        raise ValueError(f"{path} does not say which tokenizer made it; give --tokenizer")
    try:
        tok = load_tokenizer(name)
    except ValueError as e:
        if tokenizer:
            raise
        raise ValueError(f"{path} was made with tokenizer {name!r}, which cannot be loaded here ({e}); "
                         "give --tokenizer") from None
    longest = int(store.lengths().max(initial=2))
    return Feed(source=Store(path=path, seq_len=longest, rows=4), tokenizer=tok)


def _of_recipe(recipe: Recipe, name: str | None, tokenizer: str | None) -> Feed:
    stages = [s for s in recipe.stages if isinstance(s, Stage)]
    chosen = next((s for s in stages if name is None or s.name == name), None)
    if chosen is None:
        raise ValueError(f"recipe {recipe.name!r} has no training stage {name or ''!r}; it has "
                         f"{[s.name for s in stages]}")
    student = next(p for p in chosen.models.values() if p.trainable)
    elsewhere = {v.reader for v in chosen.retokenised.values()}
    teachers = {n: p for n, p in chosen.models.items() if not p.trainable and n not in elsewhere}
    source = map_stores(chosen.source, lambda s: dataclasses.replace(s, path=resolve(recipe, s.path)))
    heads = {n: v for n, p in chosen.models.items() if n not in elsewhere and (v := _vocabulary(recipe, p)) is not None}
    return Feed(source=source, seed=recipe.seed, vocabularies=heads,
                tokenizer=load_tokenizer(tokenizer) if tokenizer else _tokenizer(recipe, student),
                teachers={n: _tokenizer(recipe, p) for n, p in teachers.items()},
                readings=readings_of(chosen, {n: _tokenizer(recipe, chosen.models[n]) for n in elsewhere}))


def readings_of(stage: Stage, tokenizers: Mapping[str, Tokenizer]) -> dict[str, Reading]:
    """The views of a stage that are in other tokens; tokenizers: by provider, at least of their readers."""
    return {name: Reading(tokenizer=tokenizers[view.reader], seq_len=view.seq_len or stage.source.seq_len)
            for name, view in stage.retokenised.items()}


def _tokenizer(recipe: Recipe, provider: Student) -> Tokenizer:
    source = provider.tokenizer or provider.model
    if source is None:
        raise ValueError("a provider with random weights needs tokenizer=")
    return load_tokenizer(resolve(recipe, source))


def _vocabulary(recipe: Recipe, provider: Student) -> int | None:
    """Rows of a provider's head, from its configuration; None where that is not at hand (hub ids)."""
    if provider.config is not None:
        return provider.config.vocab_size
    folder = Path(resolve(recipe, provider.model or ""))
    for file in (folder / "config.json", folder / "model" / "config.json"):
        if file.is_file():
            config = json.loads(file.read_text())
            return config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return None
