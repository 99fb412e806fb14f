"""Claims about whole phase diagrams, each computed by one compiled program."""

from typing import Any

import numpy as np
from xarray import Dataset

from ufm.lab.claims.claim import Cases, claim
from ufm.lab.grid import problem_at
from ufm.lab.optimum import global_minimiser
from ufm.lab.presets import minority, two_sizes
from ufm.lab.sweep import sweep
from ufm.model.problem import Problem
from ufm.theory.certificate import certify
from ufm.theory.imbalance import minority_threshold

KINDS: dict[str, dict[str, Any]] = {"free bias": {}, "no bias": {"use_bias": False}, "λ_b = 0.01": {"lam_b": 1e-2}}


def _certified(problem: Problem) -> dict:
    found = certify(problem, global_minimiser(problem))
    return {"value": found.value, "gap": found.gap, "dual_norm": found.dual_norm}


@claim(
    "One program for every K",
    "with the classes beyond its own masked, a problem of the largest K has the f*, gap and ‖∇_Z g‖₂ of each K",
    "THEORY 0, 1.2, 8.1 with the absent classes masked; derived for this project",
    1e-12,
)
def padding(full: bool) -> Cases:
    """Distance of padded from unpadded numbers, relative to f (‖∇_Z g‖₂ to itself): a few hundred roundings."""
    loads = np.geomspace(1e-4, 1.2, 40 if full else 6)
    K = list(range(2, 22)) if full else [2, 4]
    for text, kind in list(KINDS.items())[: None if full else 2]:
        grid = {"K": K, "lam_W": loads, "lam_H": 1e-2, "n": 4, "d": max(K), **kind}
        padded, plain = (sweep(_certified, grid, make=problem_at, pad=pad, method="map") for pad in (True, False))
        for name, scale in {"value": "value", "gap": "value", "dual_norm": "dual_norm"}.items():
            yield f"{text}: {name}", float((abs(padded[name] - plain[name]) / plain[scale]).max(skipna=False))


@claim(
    "Phase diagram of minority collapse",
    "over imbalance R and λ every optimum of two class sizes is certified, and the smaller classes share their logits "
    "iff √n_B ≤ N√(λ_Wλ_H)",
    "THEORY 3.4, 8.1",
    1e-11,
)
def minority_diagram(full: bool) -> Cases:
    """The largest gap over f at every R; inf where a λ farther than 0.1 % from the threshold is on the wrong side."""
    points = 40 if full else 8
    for K in (4, 10) if full else (4,):
        fixed = {"K": K, "n": 500, "d": K}
        grid = {"R": np.geomspace(1, 1000, points), "lam": np.geomspace(1e-5, 3e-2, points), **fixed}
        found = sweep(minority, grid, make=two_sizes, method="map")
        load = _load(found, fixed)
        wrong = (abs(load - 1) > 1e-3) & ((found.minority_margin > 1e-5) != (load < 1)) | (found.status != 1)
        for R in found.R.values:
            gap = abs(found.gap / found.value).sel(R=R).max(skipna=False)
            yield f"K={K} R={R:.3g}, {points} λ's", np.inf if wrong.sel(R=R).any() else float(gap)


def _load(found: Dataset, fixed: dict) -> np.ndarray:
    """λ over the threshold of the smaller classes, at every cell."""
    threshold = [float(minority_threshold(two_sizes(R=R, lam=1.0, **fixed))[-1]) for R in found.R.values]
    return found.lam.values / np.array(threshold)[:, None]


CLAIMS = (padding, minority_diagram)
