"""The way down from a saddle: f along its steepest escape, with the curvature that THEORY 0 predicts drawn over it."""

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from ufm import balanced, coarse_etf, objective
from ufm.lab.dense import dense_eigenvalues
from ufm.lab.landscape import escape_profile
from ufm.lab.plots import draw_escape
from ufm.lab.records import write_run
from ufm.theory.escape import predicted_curvature


@dataclass(frozen=True)
class Config:
    """A balanced problem and the coarse simplex ETF of it to look down from."""

    out: tyro.conf.Positional[Path]
    """New folder for the record and escape.png."""
    K: int = 6
    """Number of classes."""
    groups: int = 3
    """Number of equal groups into which they are merged; 1 is the origin."""
    n: int = 2
    """Samples per class."""
    d: int = 7
    """Feature dimension."""
    lam_W: float = 5e-3
    """λ_W."""
    lam_H: float = 5e-3
    """λ_H."""


def main(config: Config) -> Path:
    """Assert that the predicted curvature is the least eigenvalue by brute force, then draw."""
    jax.config.update("jax_enable_x64", True)
    start, c = time.perf_counter(), config
    problem = balanced(c.K, c.n, c.d, lam_W=c.lam_W, lam_H=c.lam_H)
    saddle = coarse_etf(problem, c.groups)
    curvature = float(predicted_curvature(problem, 1 / (c.K * c.n**0.5)))
    assert abs(dense_eigenvalues(problem, saddle)[0] - curvature) < 1e-13
    summary = {"groups": "+".join([str(c.K // c.groups)] * c.groups), "value": objective(problem, saddle)}
    profile = escape_profile(problem, saddle)
    folder = write_run(c.out, c, {"saddle": summary | {"curvature": curvature}}, profile, start=start)
    draw_escape(folder)
    return folder


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.saddle_profile"))
