"""The whole Hessian spectrum at the optimum, a saddle and the origin: closed form over brute force (THEORY 1.3, 1.6).

The defaults are the case at which general tools fail: K = 10, d = 16, n = 50, 8170 variables, where the origin has 144
negative eigenvalues and the optimum 99 zero ones. Its dense spectra take minutes and 2 GiB.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from tqdm import tqdm

from ufm import balanced, coarse_etf, hessian_spectrum, inertia
from ufm.lab.landscape import spectrum_rows
from ufm.lab.plots import draw_spectra
from ufm.lab.records import write_run
from ufm.theory.atlas import successive_groups


@dataclass(frozen=True)
class Config:
    """A balanced problem below its threshold, and how many groups its saddle has."""

    out: tyro.conf.Positional[Path]
    """New folder for the record and spectrum.png."""
    K: int = 10
    """Number of classes."""
    n: int = 50
    """Samples per class."""
    d: int = 16
    """Feature dimension."""
    groups: int = 5
    """Groups of the saddle between optimum and origin."""
    lam_W: float = 5e-3
    """λ_W."""
    lam_H: float = 5e-5
    """λ_H."""
    lam_b: float = 1e-2
    """λ_b."""


def main(config: Config) -> Path:
    """Assert that theory, elimination and brute force count alike, then draw."""
    jax.config.update("jax_enable_x64", True)
    start, c = time.perf_counter(), config
    problem = balanced(c.K, c.n, c.d, lam_W=c.lam_W, lam_H=c.lam_H, lam_b=c.lam_b)
    spectra: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    places = {"optimum": c.K, f"saddle of {c.groups} groups": c.groups, "origin": 1}
    for name, m in tqdm(places.items(), disable=not sys.stderr.isatty()):
        x, partition = coarse_etf(problem, m), successive_groups(c.K, m)
        theory, signs = hessian_spectrum(problem, partition), inertia(problem, x)
        rows = spectrum_rows(problem, partition, x, dense_up_to=np.inf)
        assert all(row["theory"] == row["dense"] for row in rows), name
        assert (theory.index, theory.nullity) == signs[:2], name
        spectra[name] = rows
        counts[name] = {
            "negative": {
                "theory": theory.index,
                "elimination": signs.negative,
                "dense": sum(row["dense"] for row in rows if row["eigenvalue"] < 0),
            },
            "zero": {
                "theory": theory.nullity,
                "elimination": signs.zero,
                "dense": sum(row["dense"] for row in rows if row["eigenvalue"] == 0),
            },
            "condition_number": theory.condition_number,
        }
    folder = write_run(c.out, c, {"counts": counts, "spectra": spectra}, start=start)
    draw_spectra(folder)
    return folder


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.spectrum"))
