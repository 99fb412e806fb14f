"""Every experiment runs at a tiny size, asserts what it claims and leaves a record with its figure."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import classification
from ufm.lab.census import hunt
from ufm.lab.presets import PRESETS
from ufm.measure.features import Features, save_features
from ufm.model.problem import balanced
from ufm.theory.certificate import Verdict
from ufm.theory.optimum import balanced_minimiser

MODULES = sorted(p.stem for p in (Path(__file__).parents[1] / "experiments").glob("*.py") if p.stem != "__init__")
TINY = {
    "atlas": {"counts": (2, 2), "d": 2},
    "classification": {"points": 60},
    "escape": {
        "saddles": ((2, 1),),
        "loads": (0.1,),
        "distances": (1e-6,),
        "etas": (0.3,),
        "momenta": (0.0,),
        "terminal_momenta": (),
        "random": 3,
    },
    "optimisers": {
        "names": ("sgdw", "adamw"),
        "K": 3,
        "n": 2,
        "d": 4,
        "lam_W": 2e-2,
        "lam_H": 2e-2,
        "lam_b": 2e-2,
        "steps": 4000,
        "records": 2,
        "seeds": 2,
        "gradient_rates": (2.0,),
        "adaptive_rates": (0.1,),
    },
    "rate_to_seli": {"lams": (1e-1, 1e-3), "records": 30},
    "saddle_profile": {"K": 4, "groups": 2, "n": 1, "d": 4},
    "saddle_to_saddle": {"counts": (8, 8, 1, 1), "steps": 20_000, "every": 50},
    "network": {"run": Path("network")},
    "saddle_hunt": {"K": 2, "dimensions": (2,), "loads": (0.1,), "starts": 3},
    "scaling": {"equal": ((3, 4),), "unequal": (), "features": ((3, 4, 12),), "streams": ((3, 4, 12),), "cells": ()},
    "spectrum": {"K": 4, "n": 2, "d": 4, "groups": 2},
}
SWEPT = {
    "collapse_threshold": "collapse",
    "conditioning": "conditioning",
    "margin_and_norms": "norms",
    "minority_collapse": "minority",
    "saddle_index": "index",
}
TINY |= {name: {"points": 5} for name in SWEPT}
FIGURE = SWEPT | {
    "atlas": "atlas",
    "escape": "escapes",
    "optimisers": "optimisers",
    "rate_to_seli": "seli",
    "saddle_profile": "escape",
    "saddle_to_saddle": "journeys",
    "network": "network",
    "saddle_hunt": "census",
    "scaling": "scaling",
    "spectrum": "spectrum",
}


def _run(name, **changes):
    experiment = importlib.import_module(f"experiments.{name}")
    return experiment.main(experiment.Config(Path("new"), **TINY[name] | changes))


def smaller(preset):
    """With the first two values of an axis of shapes."""

    def grid(points):
        return {k: list(x)[:2] if k in {"K", "groups"} and np.ndim(x) else x for k, x in preset.grid(points).items()}

    return dataclasses.replace(preset, grid=grid)


def _network():
    """A train run that ended at the optimum."""
    folder, problem = Path("network"), balanced(2, 3, 4, lam_W=0.02, lam_H=0.01)
    folder.mkdir()
    x = balanced_minimiser(problem)
    save_features(folder / "features.npz", Features(np.asarray(x.H), np.arange(6) // 3, np.asarray(x.W), np.zeros(2)))
    (folder / "config.json").write_text('{"lam_W": 0.02, "lam_b": 0.0, "regulariser": "features"}')
    history = [{"epoch": epoch, "lam_H": 0.01, "observed": {"value": 1 / epoch}} for epoch in (1, 2, 4)]
    (folder / "history.json").write_text(json.dumps(history))


@pytest.fixture(autouse=True)
def _here(as_a_user):
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.mark.parametrize("name", MODULES)
def test_it_runs_and_leaves_its_record(name, monkeypatch, hastily):
    _network()
    if name in SWEPT:  # a smaller grid of the same kind
        monkeypatch.setitem(PRESETS, SWEPT[name], smaller(PRESETS[SWEPT[name]]))
    if name == "classification":  # without searches, which take most of its time
        monkeypatch.setattr(classification, "hunt", lambda problem, starts, key: hunt(problem, 0, key))
        monkeypatch.setattr(classification, "HUNTED", classification.HUNTED[:1])
        monkeypatch.setattr(classification, "SHAPES", classification.SHAPES[:3])
    folder = _run(name)
    assert folder == Path("new")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["wall_seconds"] > 0
    config = json.loads((folder / "config.json").read_text())
    assert config["method"] in {"vmap", "map"} if name in SWEPT else config["out"] == "new"
    if name in FIGURE:
        assert (folder / f"{FIGURE[name]}.png").read_bytes().startswith(b"\x89PNG")


def test_every_experiment_is_tried():
    assert sorted(TINY) == MODULES


def test_a_wrong_verdict_is_counted(monkeypatch):
    """Calling every point a global optimum is wrong of all saddles and random points."""
    monkeypatch.setattr(classification, "HUNTED", ())
    monkeypatch.setattr(classification, "SHAPES", classification.SHAPES[:1])
    always = int(Verdict.GLOBAL)
    monkeypatch.setattr(classification.Batch, "verdicts", lambda self, *_: np.full(len(self.kinds), always))
    summary = json.loads((_run("classification") / "summary.json").read_text())
    row = {name: kinds["GLOBAL"] for name, kinds in summary["table"].items()}
    assert sum(row.values()) == summary["points"] > 0
    assert 0 < summary["wrong"] < summary["points"]
    assert {mistake["verdict"] for mistake in summary["mistakes"]} == {"GLOBAL"}


def test_a_run_is_never_overwritten():
    Path("new").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        _run("saddle_profile")
