"""`ufm sweep`: the field's phase diagrams, resumable, on every device and on other machines."""

import contextlib
import json
import os
import webbrowser
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from ufm.cli.cache import use_cache

Name = Literal["collapse", "norms", "minority", "conditioning", "index"]


@dataclass(frozen=True)
class Sweep:
    """A phase diagram: the quantity over its grid, in a folder, with the theory's line over it.

    collapse: the logit margin found from random starts over λ and K, and K√(nλ_Wλ_H) = 1. norms: margin and norms
    found, over the closed form. minority: cosine of minority classes over imbalance R and λ, and the exact threshold.
    conditioning: condition number and rate at the optimum. index: Morse index of saddles of equal groups. A sweep that
    was interrupted goes on where it stopped if it is started again with the same --out.
    """

    preset: Annotated[Name, tyro.conf.Positional]
    """Which picture."""
    points: int = 60
    """Points along every continuous axis."""
    out: Path | None = None
    """Folder for config.json, grid.zarr, done-marks, summary.json and the figure; runs/sweep-... if not given."""
    batch: int = 1024
    """The most cells of a block, which is computed at once and kept as one chunk."""
    devices: int = os.cpu_count() or 1
    """CPU devices to split every block over, where there is no accelerator; one for every core if not given."""
    scheduler: str = ""
    """Address of a Dask scheduler whose workers compute the blocks, such as tcp://host:8786."""
    open: bool = False
    """Show the figure when it is drawn."""
    json: bool = False
    """Print one JSON document instead of a table."""

    def run(self) -> int:
        """Run it; the exit status."""
        from ufm.lab.diagrams import draw_diagram
        from ufm.lab.presets import PRESETS
        from ufm.lab.records import read_json

        for name in ("points", "batch", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)}")
        with contextlib.suppress(RuntimeError):  # devices are known already, as in a notebook
            jax.config.update("jax_num_cpu_devices", self.devices)
        folder = (self.out and self.out.expanduser()) or Path(
            "runs"
        ) / f"sweep-{self.preset}-{datetime.now():%Y%m%d-%H%M%S}"
        preset = PRESETS[self.preset]
        with _workers(self.scheduler) as executor:
            found = preset.sweep(self.points, store=folder, batch_size=self.batch, executor=executor)
        figure = draw_diagram(self.preset, found, folder / f"{self.preset}.png")
        summary = read_json(folder / "summary.json")
        if self.json:
            print(json.dumps({"folder": str(folder), "figure": str(figure), **summary}))
        else:
            print(f"{preset.title}\n{summary['cells']} cells by {summary['method']}, {summary['failed']} failed")
            print(f"{found}\n\nfigure: {figure}\ncompiled programs: {use_cache() or 'no folder can be made for them'}")
        if self.open:
            webbrowser.open(figure.absolute().as_uri())
        return 0


@contextlib.contextmanager
def _workers(scheduler: str) -> Iterator[Executor | None]:
    """The workers of a Dask scheduler, or nobody's."""
    if not scheduler:
        yield None
        return
    from distributed import Client

    with Client(scheduler) as client, client.get_executor() as executor:
        yield executor
