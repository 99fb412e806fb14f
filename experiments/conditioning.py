"""Condition number of the optimum and the rate of gradient descent there, in closed form (THEORY 1.3)."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from ufm.lab.diagrams import draw_diagram
from ufm.lab.presets import PRESETS


@dataclass(frozen=True)
class Config:
    """2 to 100 classes, the load K√(nλ_Wλ_H) over six decades."""

    out: tyro.conf.Positional[Path]
    """Folder for the store and conditioning.png; what it holds of this sweep already is kept."""
    points: int = 200
    """Points along every continuous axis."""


def main(config: Config) -> Path:
    """Assert that it falls to one least value and then rises to the threshold; draw."""
    jax.config.update("jax_enable_x64", True)
    found = PRESETS["conditioning"].sweep(config.points, store=config.out)
    assert (found.status == 1).all()
    for K in found.K.values:
        condition = found.condition_number.sel(K=K).values
        rises, least = np.diff(condition) > 0, np.argmin(condition)
        assert 0 < least < len(condition) - 1, K
        assert rises[-1], K
        assert not rises[:least].any(), K
    draw_diagram("conditioning", found, config.out / "conditioning.png")
    return config.out


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.conditioning"))
