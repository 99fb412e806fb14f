"""Where minority classes merge: certified optima over imbalance and λ, and √n_B = N√(λ_Wλ_H) (THEORY 3.4)."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from ufm.lab.diagrams import draw_diagram
from ufm.lab.presets import PRESETS


@dataclass(frozen=True)
class Config:
    """Ten classes, five of 500 samples and five of 500/R."""

    out: tyro.conf.Positional[Path]
    """Folder for the store and minority.png; what it holds of this sweep already is kept."""
    points: int = 100
    """Points along every continuous axis."""


def main(config: Config) -> Path:
    """Assert that every optimum is certified and minority classes merge exactly from the threshold on; draw."""
    jax.config.update("jax_enable_x64", True)
    found = PRESETS["minority"].sweep(config.points, store=config.out)
    assert (found.status == 1).all()
    n, R = 500, found.R
    load = found.lam * 5 * n * (1 + 1 / R) / np.sqrt(n / R)
    assert float(abs(found.gap / found.value).max()) < 1e-11
    assert ((found.minority_margin > 1e-5) == (load < 1)).where(abs(load - 1) > 1e-3, True).all()
    draw_diagram("minority", found, config.out / "minority.png")
    return config.out


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.minority_collapse"))
