"""The comparisons of `benchmarks/`: their cells are objectives that can be built, their tables say what is missing."""

from benchmarks import kept_fraction, objectives
from benchmarks.world_cells import WORLDS
from distill_jax.objective.term import build_objective
from distill_jax.rollout.scoring import SignalSpec

ROW = {"seeds": [0], "accuracy_by_k": {"2": [1.0, 0.9, 1.0], "4": [0.5, 0.4, 0.6]}, "gap_by_k": {"4": [0.1, 0.0, 0.2]},
       "kl": 0.25, "ece": 0.125, "bytes_per_token": 30.0, "seconds_per_step": 0.1, "peak_gib": 1.0, "steps": 4}
VALUE = {"machine": "a machine", "date": "2026-11-28", "world": vars(WORLDS["smoke"]), "cells": [2, 3],
         "teacher_entropy": 0.5, "not_available": {"sampled": "unknown signal"}}


def test_every_method_is_one_objective_on_its_signal():
    can, cannot = objectives.available(list(objectives.METHODS), 10)
    assert set(cannot) <= {"sampled"} and set(can) | set(cannot) == set(objectives.METHODS)
    for name in can:
        cell = objectives.METHODS[name](10)
        objective = build_objective(cell.terms)
        objective.init()
        assert objective.signals == ((cell.signal_name,) if cell.signal else ())
        if cell.signal:
            SignalSpec.parse(cell.signal)


def test_table_of_objectives():
    text = objectives.table(VALUE | {"methods": {
        "cross_entropy": ROW, "taid": ROW | {"difference": {"4": [0.1, -0.1, 0.3]}}}})
    assert "**Partial: 2 of 3 cells.**" in text and "0.500 nats" in text
    assert "| taid | 1 | 50.0 [40.0, 60.0] | +10.0 [-10.0, +30.0] | 10.0 [0.0, 20.0] | 0.2500 | 0.1250 | 30.0 |" in text
    assert "| sampled | not available: unknown signal |" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {11}
    assert "Partial" not in objectives.table(VALUE | {"cells": [3, 3], "methods": {}})


def test_table_of_kept_fractions():
    half = ROW | {"accuracy_by_k": {"4": [0.47, 0.4, 0.5]}, "steps": 2}
    text = kept_fraction.table(VALUE | {"students": {"all@1": ROW, "all@0.5": half, "think@0.5": half}})
    assert "| all | 0.5 | 1 | 2 | 47.0 [40.0, 50.0] | 94% |" in text and "| think | 0.5 |" in text
    assert kept_fraction.name_of("all", 1.0) == "all@1"
