"""How slowly ridge-regularised cross-entropy reaches SELI, in the time of the gradient flow (THEORY 3.3, 5.8)."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array
from tqdm import tqdm

from ufm import Params, Problem, class_mean_problem, global_minimiser, init, objective
from ufm.lab.plots_rates import draw_rate_to_seli
from ufm.lab.records import write_run
from ufm.model.geometry import centring
from ufm.numerics.dynamics import Fate
from ufm.numerics.flow import gradient_flow
from ufm.theory.imbalance import seli_grams

TOLERANCE = 0.1  # of the distance, relative to the line


@dataclass(frozen=True)
class Config:
    """Unequal classes without bias, λ_W = λ_H = λ/N as in the sum form, from a small random start."""

    out: tyro.conf.Positional[Path]
    """New folder for the record and seli.png."""
    counts: tuple[int, ...] = (10, 10, 1, 1)
    """Class sizes."""
    lams: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8)
    """λ of the sum form, Σ_i CE + λ/2 (‖W‖² + ‖H‖²)."""
    scale: float = 1e-2
    """Of the start's entries."""
    first: float = 1.0
    """First time observed, in the sum form's units (N times ours)."""
    beyond: float = 30.0
    """The flow goes on until so many times 1/λ."""
    records: int = 120
    """Times observed, geometrically spaced."""
    seed: int = 0
    """Of the start."""


def main(config: Config) -> Path:
    """Assert that the flow ends at the optimum's geometry, and that the inverse distance grows like log t; draw."""
    jax.config.update("jax_enable_x64", True)
    start, counts = time.perf_counter(), np.asarray(config.counts)
    seli = np.asarray(seli_grams(jnp.asarray(counts, float))[0])
    rows, arrays = [], {}
    for lam in tqdm(config.lams, desc="λ"):
        problem = class_mean_problem(config.counts, len(counts) + 1, use_bias=False,
                                     lam_W=lam / counts.sum(), lam_H=lam / counts.sum())  # fmt: skip
        times, off = _way(config, problem, seli, lam)
        ends = _distance(seli, np.asarray(global_minimiser(problem).W))
        assert abs(off[-1] / ends - 1) < 1e-3, (lam, off[-1], ends)
        rows.append({"lam": lam, "optimum": ends})
        arrays |= {f"time {lam:g}": times, f"distance {lam:g}": off}
    etf = _distance(seli, centring(len(counts)))
    fit = _logarithmic(arrays, min(config.lams))
    assert fit["worst"] < TOLERANCE, fit
    summary = {"rows": rows, "etf": etf, "fit": fit}
    folder = write_run(config.out, config, summary, arrays, start=start)
    draw_rate_to_seli(folder)
    return folder


def _way(config: Config, problem: Problem, seli: np.ndarray, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Times, in the sum form's units, and how far WWᵀ is from SELI's then."""
    N = float(problem.total)
    times = np.geomspace(config.first, config.beyond / lam, config.records)
    x = init(problem, jax.random.key(config.seed), scale=config.scale)
    # f of N samples with a column per class: the flow of all samples' features is that of √n_k times the means
    root = jnp.sqrt(jnp.asarray(problem.multiplicity))
    fun = partial(_of_scaled, problem)
    found = gradient_flow(fun, Params(x.W, x.H * root, x.b), N * times[-1], observe=_classifier, at=N * times)
    assert found.fate == Fate.DESCENDED
    return times, np.array([_distance(seli, W) for W in np.asarray(found.observed)])


def _of_scaled(problem: Problem, x: Params) -> Array:
    return objective(problem, Params(x.W, x.H / jnp.sqrt(jnp.asarray(problem.multiplicity)), x.b))


def _classifier(x: Params) -> Array:
    return x.W


def _distance(seli: np.ndarray, W: np.ndarray) -> float:
    """‖WWᵀ/‖WWᵀ‖ − G/‖G‖‖, Frobenius."""
    G = W @ W.T
    return float(np.linalg.norm(G / np.linalg.norm(G) - seli / np.linalg.norm(seli)))


def _logarithmic(arrays: dict[str, Any], lam: float) -> dict[str, float]:
    """1/distance = intercept + slope log t by least squares for the least λ, from t = λ^−0.4 to 0.1/λ."""
    times, off = arrays[f"time {lam:g}"], arrays[f"distance {lam:g}"]
    used = (times > lam**-0.4) & (times < 0.1 / lam)
    slope, intercept = np.polyfit(np.log(times[used]), 1 / off[used], 1)
    line = intercept + slope * np.log(times[used])
    return {"slope": slope, "intercept": intercept, "worst": float(np.abs(line * off[used] - 1).max()),
            "from": float(times[used][0]), "to": float(times[used][-1])}  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.rate_to_seli"))
