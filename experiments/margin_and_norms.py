"""Logit margin and squared norms found from random starts, over the closed form (THEORY 1.2)."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from ufm.lab.diagrams import draw_diagram
from ufm.lab.presets import PRESETS


@dataclass(frozen=True)
class Config:
    """2, 4, 10 and 20 classes, λ_W = λ_H over four decades and a half."""

    out: tyro.conf.Positional[Path]
    """Folder for the store and norms.png; what it holds of this sweep already is kept."""
    points: int = 60
    """Points along every continuous axis."""


def main(config: Config) -> Path:
    """Assert that all three are the closed form's to 1e-6 where the optimum is not the origin; draw."""
    jax.config.update("jax_enable_x64", True)
    found = PRESETS["norms"].sweep(config.points, store=config.out)
    assert (found.status == 1).all()
    alive = found.K * found.lam * np.sqrt(10) < 0.999
    for name in ("margin_mean", "w_norm2_mean", "h_norm2_mean"):
        error = abs(found[name] / found[f"predicted_{name}"] - 1)
        assert float(error.where(alive).max()) < 1e-6, name
    draw_diagram("norms", found, config.out / "norms.png")
    return config.out


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.margin_and_norms"))
