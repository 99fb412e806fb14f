"""The atlas: energy against Morse index of every partition saddle, with arrows to where each falls (THEORY 8.3)."""

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from ufm import critical_points, imbalanced, inertia
from ufm.lab.atlas import lattice
from ufm.lab.landscape import atlas_rows
from ufm.lab.plots import draw_atlas
from ufm.lab.records import write_run


@dataclass(frozen=True)
class Config:
    """A problem of few classes; those of equal size merge."""

    out: tyro.conf.Positional[Path]
    """New folder for the record and atlas.png."""
    counts: tuple[int, ...] = (2,) * 8
    """Samples of each class."""
    d: int = 8
    """Feature dimension."""
    lam_W: float = 5e-3
    """λ_W."""
    lam_H: float = 5e-3
    """λ_H."""


def main(config: Config) -> Path:
    """Assert that elimination counts the same signs at every point, then draw."""
    jax.config.update("jax_enable_x64", True)
    start, c = time.perf_counter(), config
    problem = imbalanced(c.counts, c.d, lam_W=c.lam_W, lam_H=c.lam_H)
    points = critical_points(problem)
    for point in points:
        assert inertia(problem, point.params)[:2] == (point.index, point.nullity), point.partition
    summary = {"atlas": atlas_rows(points), "arrows": lattice(points, np.asarray(problem.counts))}
    folder = write_run(c.out, c, summary, start=start)
    draw_atlas(folder)
    return folder


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.atlas"))
