"""`ufm escape`: how long a saddle holds a start, measured beside predicted."""

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

SMALL = Model(K=6, n=2, d=8, lam_W=5e-3, lam_H=5e-3)


@dataclass(frozen=True)
class Escape:
    """How long a saddle holds a start: steps of gradient descent and time of the gradient flow, beside the prediction.

    Along the steepest direction, an eigenvector of λ_min, a step without momentum multiplies the distance by
    1 + η|λ_min|, and the flow moves like e^{|λ_min|t}. Random directions lose log(‖x‖/‖Px‖) of log distance, P onto the
    (d − rank W)(K − groups) copies of λ_min; its mean and deviation are exact where no other eigenvalue is negative, as
    at the origin of equal counts. What did not leave is named, not numbered. escape.png shows the table.
    """

    model: Annotated[Model, tyro.conf.arg(name="")] = field(default_factory=lambda: SMALL)
    saddle: tuple[int, ...] = ()
    """Group sizes of the saddle, such as 2 2 2; if not given, all classes of one size merged (equal counts: W = 0)."""
    distances: tuple[float, ...] = (1e-9, 1e-8, 1e-7, 1e-6, 1e-5)
    """Distances from the saddle at the start."""
    radius: float = 1e-3
    """Distance at which the saddle counts as left; the prediction is for small ones."""
    eta: float | None = None
    """Step size η; 1/(2λ_max) at the saddle if not given."""
    momentum: float = 0.0
    """β, from 0 up to but not including 1."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    seeds: int = 20
    """Starts in random directions from every distance; 0 for the steepest direction only."""
    seed: int = 0
    """Seed of the random directions."""
    out: Path | None = None
    """New folder for config.json, summary.json, arrays.npz and escape.png; runs/escape-<time> if not given."""
    json: bool = False
    """Print one JSON document instead of tables."""

    def run(self) -> int:
        """Run it; the exit status."""
        from ufm.lab.escape_table import escape_table
        from ufm.lab.plots_dynamics import draw_escape_times

        start = time.perf_counter()
        folder = check_new(self.out or Path("runs") / f"escape-{datetime.now():%Y%m%d-%H%M%S}")
        result, arrays = escape_table(
            self.model.problem(), self.saddle, self.distances, self.radius,
            eta=self.eta, momentum=self.momentum, nesterov=self.nesterov, seeds=self.seeds,
            key=jax.random.key(self.seed), quiet=self.json or not sys.stderr.isatty(),
        )  # fmt: skip
        figure = draw_escape_times(write_run(folder, self, result, arrays, start=start))
        if self.json:
            print(json.dumps(as_json(result)))
        else:
            print(_tables(result))
            print("\nFigure and numbers:", figure)
        return 0


def _tables(result: dict[str, Any]) -> str:
    """What the saddle is, and a table each of steps, flow and random starts."""
    rows = result["escapes"]
    parts = [
        _saddle(result["saddle"], result["method"]),
        f"Steps to distance {result['radius']:g}, from along the steepest direction",
        _beside(rows, "steps", "outcome"),
        "Growth of log distance per step",
        _beside(rows, "rate", "outcome"),
        "Time of the gradient flow to the same distance",
        _beside(rows, "flow_time", "flow_outcome"),
    ]
    if result["seeds"]:
        s = result["saddle"]
        copies = f"{s['multiplicity']} copies of λ_min in {s['variables']} variables"
        parts += [f"Steps from {result['seeds']} random directions, which see {copies}", _random(rows)]
    return "\n\n".join(parts)


def _saddle(s: dict[str, Any], m: dict[str, Any]) -> str:
    kind = "Gradient descent" if not m["momentum"] else "Nesterov's momentum" if m["nesterov"] else "Momentum"
    verdict = "not below" if m["above_limit"] else "below"
    return (
        f"Saddle that merges classes as {s['groups']}: f = {s['value']:.8g}, rank {s['rank']}, index {s['index']}, "
        f"λ_min = {s['smallest_eigenvalue']:.8g}, λ_max = {s['largest_eigenvalue']:.8g}\n"
        f"{kind} with η = {m['eta']:.6g}, β = {m['momentum']:g}; η is {verdict} {m['step_limit']:.6g}, "
        "from which on steps grow along λ_max"
    )


def _beside(rows: list[dict[str, Any]], name: str, outcome: str) -> str:
    shown = [{"distance": row["distance"], **row[name], "outcome": row[outcome]} for row in rows]
    for row in shown:
        row["deviation"] = None if row["deviation"] is None else f"{row['deviation']:.1e}"
    return table(("distance", "predicted", "measured", "deviation", "outcome"), shown)


def _random(rows: list[dict[str, Any]]) -> str:
    shown = [
        {
            "distance": row["distance"],
            "predicted mean ± sd": _spread(row["random"]["predicted_mean"], row["random"]["predicted_sd"]),
            "measured mean ± sd": _spread(row["random"]["mean"], row["random"]["sd"]),
            "outcomes": ", ".join(f"{number} {name}" for name, number in row["random"]["outcomes"].items()),
        }
        for row in rows
    ]
    return table(tuple(shown[0]), shown)


def _spread(mean: float | None, sd: float | None) -> str:
    return "" if mean is None else f"{mean:.2f}" if sd is None else f"{mean:.2f} ± {sd:.2f}"
