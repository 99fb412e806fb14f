"""Morse index of the saddles of equal groups, and where it falls from d(K−m) to (d−1)(K−m) (THEORY 8.3)."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from ufm.lab.diagrams import draw_diagram
from ufm.lab.presets import PRESETS
from ufm.theory.atlas import index_threshold


@dataclass(frozen=True)
class Config:
    """Twelve classes merged into 1, 2, 3, 4, 6 and 12 groups, the load from 0 to 1."""

    out: tyro.conf.Positional[Path]
    """Folder for the store and index.png; what it holds of this sweep already is kept."""
    points: int = 400
    """Points along every continuous axis."""


def main(config: Config) -> Path:
    """Assert the index on either side of κ*(m); draw."""
    jax.config.update("jax_enable_x64", True)
    found = PRESETS["index"].sweep(config.points, store=config.out)
    assert (found.status == 1).all()
    K, d = 12, 16
    for m in found["groups"].values:
        above = found["load"] > (index_threshold(int(m)) if 3 <= m < K else 1.0)
        np.testing.assert_array_equal(found["index"].sel(groups=m), (d - above) * (K - m))
    draw_diagram("index", found, config.out / "index.png")
    return config.out


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.saddle_index"))
