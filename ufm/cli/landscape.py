"""`ufm landscape`: the way down from a saddle, spectra, the atlas, and where a trained network sits."""

import json
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from ufm.cli.model import Model
from ufm.cli.report import table
from ufm.lab.records import as_json, check_new, write_run


@dataclass(frozen=True)
class Landscape:
    """Every kind of critical point of a small model, with its curvature: figures with a table beside each.

    escape.png: f along the steepest escape from a saddle and over its plane, the predicted parabola over it.
    spectrum.png: eigenvalues with multiplicities, theory over dense. atlas.png: energy against index, arrows to where
    each saddle falls. network.png, with --network: a trained network's features among the saddles of the model with
    its λ's.
    """

    model: Annotated[Model, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Model(K=6, n=2, d=7, lam_W=5e-3, lam_H=5e-3, lam_b=1e-2)
    )
    saddle: tuple[int, ...] = ()
    """Group sizes of the saddle to look down from, such as 2 2 2; the lowest of equal groups if not given."""
    hunt: int = 100
    """Searches for critical points that are no partition saddles; 0 for none."""
    seed: int = 0
    """Seed of the searches."""
    network: Path | None = None
    """Folder of a train run, with features.npz and history.json."""
    out: Path | None = None
    """New folder for config.json, summary.json, arrays.npz and the figures; runs/landscape-<time> if not given."""
    json: bool = False
    """Print one JSON document instead of tables."""

    def run(self) -> int:
        """Run it; the exit status."""
        from ufm.lab.landscape import network_place, survey
        from ufm.lab.plots import draw_landscape

        start = time.perf_counter()
        folder = check_new(self.out or Path("runs") / f"landscape-{datetime.now():%Y%m%d-%H%M%S}")
        quiet = self.json or not sys.stderr.isatty()
        key = jax.random.key(self.seed)
        network = {} if self.network is None else {"network": network_place(self.network)}
        result, arrays = survey(self.model.problem(), saddle=self.saddle, hunted=self.hunt, key=key, quiet=quiet)
        result |= network
        figures = draw_landscape(write_run(folder, self, result, arrays, start=start))
        if self.json:
            print(json.dumps(as_json(result)))
        else:
            print(_tables(result))
            print("Figures and numbers:", *figures)
        return 0


def _tables(result: dict[str, Any]) -> str:
    """The tables that stand beside the figures."""
    names = ("groups", "value", "rank", "index", "nullity", "smallest_eigenvalue", "points")
    parts = ["Partition saddles", table(names, result["atlas"])]
    if "hunt" in result:
        h = result["hunt"]
        parts.append(
            f"Hunt: {h['converged']} of {h['starts']} searches ended on {h['distinct']} critical points, {h['new']} of "
            f"them no partition saddles; without negative curvature above the lowest: {h['spurious']}"
        )
        parts.append(table((*names[:-1], "known", "hits"), h["orbits"]))
    for where, rows in result["spectra"].items():
        parts += [f"Spectrum at the {where}", table(("eigenvalue", "theory", "dense", "what"), rows)]
    if "network" in result:
        n = result["network"]
        parts.append(
            f"Network {n['run']}: f = {n['value']:.6g}, relative gradient {n['relative_gradient']:.1e}, "
            f"{n['negative']} negative and {n['zero']} zero eigenvalues"
        )
    return "\n\n".join(parts)
