"""`ufm descend`: one descent of f from a random start, measured along its way."""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from ufm.cli.escape import SMALL
from ufm.cli.model import Model
from ufm.cli.report import table
from ufm.lab.records import as_json, check_new, write_run

Name = Literal[
    "sgd", "momentum", "nesterov", "sgdw", "adam", "adamw", "sign", "signum", "signumw", "muon", "muonw", "lbfgs"
]
DECOUPLED = ("sgdw", "adamw", "signumw", "muonw")


@dataclass(frozen=True)
class Descend:
    """One descent of f from a random start: f − f*, certified gap, NC0 to NC3, and where it rests on the way.

    For sgd, momentum and nesterov at a constant rate on equal counts the terminal factor, by which a step shrinks the
    distance to the optimum in the end, stands beside the one measured. course.png shows it all. A descent that was
    interrupted goes on where it stopped if it is started again with the same --out.
    """

    model: Annotated[Model, tyro.conf.arg(name="")] = field(default_factory=lambda: SMALL)
    optimiser: Name = "sgd"
    """momentum, nesterov and sgdw have β = 0.9; a name with a w at its end decays weights apart from the gradient."""
    lr: float = 1.0
    """Learning rate; adam wants about 0.01, lbfgs searches its own."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine falls to 0 at the last step."""
    steps: int = 5000
    """How many, a multiple of --every."""
    every: int = 10
    """Steps between records."""
    scale: float = 1.0
    """Standard deviation of the start's entries; small ones start beside the saddle at the origin."""
    batch: int | None = None
    """Samples drawn for every step, with replacement; all of them, none drawn, if not given."""
    seed: int = 0
    """Seed of the start and of the batches."""
    out: Path | None = None
    """Folder for config.json, summary.json, arrays.npz and course.png; runs/descend-<time> if not given."""
    json: bool = False
    """Print one JSON document instead of tables."""

    def run(self) -> int:
        """Run it; the exit status."""
        from ufm.lab.descent import descent
        from ufm.lab.plots_dynamics import draw_course

        start = time.perf_counter()
        folder = check_new(self.out or Path("runs") / f"descend-{datetime.now():%Y%m%d-%H%M%S}")
        with _unfinished(folder) as file:
            result, arrays = descent(
                self.model.problem(), self.optimiser, None if self.optimiser == "lbfgs" else self.lr,
                schedule=self.schedule, steps=self.steps, every=self.every, scale=self.scale, batch=self.batch,
                key=jax.random.key(self.seed), file=file, quiet=self.json or not sys.stderr.isatty(),
            )  # fmt: skip
            result = {"seed": self.seed} | result
            write_run(folder, self, result, arrays, start=start)
        figure = draw_course(folder)
        if self.json:
            print(json.dumps(as_json(result)))
        else:
            print(_tables(result))
            print("\nFigure and numbers:", figure)
        return 0


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A file in a hidden folder beside, with which an interrupted run goes on; gone once the run is written."""
    hidden = folder.with_name(f".{folder.name}.unfinished")
    try:
        yield hidden / "course.npz"
        shutil.rmtree(hidden)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"start again with --out {folder} to go on") from None
    finally:
        with contextlib.suppress(OSError):
            hidden.rmdir()  # if nothing is in it


def _tables(result: dict[str, Any]) -> str:
    """How it ended, its terminal factor, and where it rested."""
    rate = "searched" if result["lr"] is None else f"lr {result['lr']:g} {result['schedule']}"
    batch = "all samples" if result["batch"] is None else f"batches of {result['batch']}"
    names = {
        "value": "f, nats", "optimal_value": "f*", "excess": "f − f*", "gap": "certified gap ≥ f − f*",
        "rounding": "rounding of the gap", "grad_norm": "‖∇f‖", **{f"nc{i}": f"NC{i}" for i in range(4)},
    }  # fmt: skip
    last = [{"quantity": label, "last": result[name]} for name, label in names.items()]
    parts = [
        f"{result['optimiser']}, {rate}, {batch}, seed {result['seed']}: {result['fate']} in {result['steps']} steps",
        table(("quantity", "last"), last),
        _terminal(result["terminal"]),
        _plateaus(result["plateaus"], result["unnamed"]),
    ]
    if result["optimiser"] in DECOUPLED:
        parts.append("Decay is not coupled: what this optimiser ends on is in general no critical point of f.")
    return "\n\n".join(parts)


def _terminal(terminal: dict[str, Any] | str) -> str:
    if isinstance(terminal, str):
        return f"Terminal factor: {terminal}"
    if terminal["predicted_factor"] >= 1:
        return f"Terminal factor: none, for lr is not below {terminal['step_limit']:.6g}, the step limit at the optimum"
    measured = terminal["measured_factor"]
    said = "not reached" if measured is None else f"{measured:.8g} from step {terminal['first']} to {terminal['last']}"
    return (
        f"Terminal factor of the distance, per step: {terminal['predicted_factor']:.8g} predicted, measured: {said}\n"
        f"Step limit at the optimum: lr {terminal['step_limit']:.6g}"
    )


def _plateaus(rests: list[dict[str, Any]], unnamed: str | None) -> str:
    """Where f rested: from step to step, the partition saddle nearest, and the critical point Newton finds there."""
    if not rests:
        return f"Plateaus: none{'' if unnamed is None else f', {unnamed}'}"
    names = ("first", "last", "value", "nearest", "distance")
    rows = [rest | {"critical point": _critical(rest["saddle"])} for rest in rests]
    shown = table((*names, "critical point"), rows)
    return f"Plateaus\n{shown}" if unnamed is None else f"Plateaus, without names: {unnamed}\n{shown}"


def _critical(saddle: dict[str, Any] | None) -> str | None:
    if saddle is None:
        return None
    kind = "partition saddle" if saddle["known"] else "no partition saddle"
    return f"{saddle['partition']}, {kind}, f = {saddle['value']:.6g}, index {saddle['index']}"
