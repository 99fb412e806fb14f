"""Where everything collapses to zero: the margin found from random starts, and K√(nλ_Wλ_H) = 1 (THEORY 1.2)."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from ufm.lab.diagrams import draw_diagram
from ufm.lab.presets import PRESETS


@dataclass(frozen=True)
class Config:
    """2 to 20 classes, λ_W = λ_H across the threshold."""

    out: tyro.conf.Positional[Path]
    """Folder for the store and collapse.png; what it holds of this sweep already is kept."""
    points: int = 60
    """Points along every continuous axis."""


def main(config: Config) -> Path:
    """Assert that the minimum found is the closed form's, certified, and zero exactly from the threshold on; draw."""
    jax.config.update("jax_enable_x64", True)
    found = PRESETS["collapse"].sweep(config.points, store=config.out)
    assert (found.status == 1).all()
    load = found.K * found.lam * np.sqrt(10)
    assert float(abs(found.excess).max()) < 1e-12
    assert float(abs(found.gap).max()) < 1e-12
    assert ((found.margin_mean > 1e-4) == (load < 1)).where(abs(load - 1) > 1e-3, True).all()
    draw_diagram("collapse", found, config.out / "collapse.png")
    return config.out


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.collapse_threshold"))
