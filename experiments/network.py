"""Where a trained network sits among the saddles: f of its last-layer features through the energies of the atlas."""

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from ufm.lab.landscape import network_place
from ufm.lab.plots import draw_network
from ufm.lab.records import write_run


@dataclass(frozen=True)
class Config:
    """A run of `ufm train` under the explicit feature penalty, for its λ's are the theory's."""

    out: tyro.conf.Positional[Path]
    """New folder for the record and network.png."""
    run: Path = Path("runs/digits")
    """Folder of the train run, with config.json, history.json and features.npz."""


def main(config: Config) -> Path:
    """Place the network and draw."""
    jax.config.update("jax_enable_x64", True)
    start = time.perf_counter()
    folder = write_run(config.out, config, {"network": network_place(config.run)}, start=start)
    draw_network(folder)
    return folder


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.network"))
