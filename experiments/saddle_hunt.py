"""The census of critical points: what random searches find, beside the atlas of partition saddles (THEORY 8.3, 8.4)."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from ufm import balanced, critical_points
from ufm.lab.atlas import lattice
from ufm.lab.census import hunt
from ufm.lab.landscape import atlas_rows, hunted_rows
from ufm.lab.plots import draw_censuses
from ufm.lab.records import write_run


@dataclass(frozen=True)
class Config:
    """Hunts at d = K, d = K − 1 (where the strict-saddle theorem is open) and d < K − 1, for each κ."""

    out: tyro.conf.Positional[Path]
    """New folder for the record and census.png."""
    K: int = 4
    """Number of classes."""
    n: int = 1
    """Samples per class; at critical points it only scales λ_H."""
    dimensions: tuple[int, ...] = (4, 3, 2)
    """Feature dimensions d."""
    loads: tuple[float, ...] = (0.01, 0.05, 0.3)
    """κ = K√n s, of which 1 is the collapse threshold."""
    starts: int = 400
    """Searches for each."""
    seed: int = 0
    """Seed of the searches."""


def main(config: Config) -> Path:
    """Write every census; a critical point above the lowest f without negative curvature is printed as such."""
    jax.config.update("jax_enable_x64", True)
    start, c, censuses = time.perf_counter(), config, []
    for d in c.dimensions:
        for load in c.loads:
            s = load / (c.K * c.n**0.5)
            problem = balanced(c.K, c.n, d, lam_W=s, lam_H=s)
            census = hunt(problem, c.starts, jax.random.key(c.seed), quiet=not sys.stderr.isatty())
            points = critical_points(problem)
            row: dict[str, Any] = {
                "d": d,
                "kappa": load,
                "starts": census.starts,
                "converged": census.converged,
                "distinct": len(census.orbits),
                "known": len(census.orbits) - len(census.new),
                "new": len(census.new),
                "missed": ["+".join(map(str, point.groups)) for point in census.missed],
                "spurious": len(census.spurious),
                "lowest": census.lowest,
                "orbits": hunted_rows(census.orbits),
                "atlas": atlas_rows(points),
                "arrows": [list(pair) for pair in lattice(points, problem.counts)],
            }
            print({name: value for name, value in row.items() if name not in ("orbits", "atlas", "arrows")})
            censuses.append(row)
    folder = write_run(c.out, c, {"censuses": censuses}, start=start)
    draw_censuses(folder)
    return folder


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.saddle_hunt"))
