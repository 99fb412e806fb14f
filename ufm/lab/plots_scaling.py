"""Measured cost of every operation over its size, and the derived lines through it to sizes nobody has measured."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ufm.lab.records import read_json

Row = dict[str, Any]
SECONDS, BYTES = ("cpu_seconds", "processor seconds"), ("own_bytes", "bytes beyond the process's own")
LEAST = {"cpu_seconds": 1e-9, "own_bytes": 4096}  # what a logarithmic axis shows for nothing measured
NAMES = {
    "closed_form": "closed form",
    "certificate": "certificate at class means",
    "spectrum": "Hessian spectrum",
    "solved": "solved, certified, unequal counts",
    "gradient": "objective and gradient",
    "product": "Hessian product",
    "streamed": "streamed certificate",
    "swept": "sweep of certificates, K = 10",
}


def draw_scaling(folder: Path) -> Path:
    """scaling.png: time and memory over K (d with it), over N and over cells; dashed: the derived power."""
    rungs = read_json(folder / "summary.json")["rungs"]
    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(2, 3, sharey="row")
    by_classes = {"closed_form": 3, "certificate": 3, "solved": 3, "spectrum": 2}
    by_samples = {"gradient": 1, "product": 1, "streamed": 1}
    for row, (quantity, label) in zip(panels, (SECONDS, BYTES), strict=True):
        memory = quantity == BYTES[0]
        _ladders(row[0], rungs, "K", quantity, dict.fromkeys(by_classes, 2) if memory else by_classes, 5e4)
        _ladders(row[1], rungs, "N", quantity, by_samples | ({"streamed": 0} if memory else {}), 1e9)
        _ladders(row[2], rungs, "cells", quantity, {"swept": 0 if memory else 1}, 1e6)
        row[0].set_ylabel(label)
    for axes, label in zip(panels[1], ("classes K, d ≥ K", "samples N", "cells of a sweep"), strict=True):
        axes.set_xlabel(label)
    figure.suptitle("dots: measured; dashed: the derived power of the size, through the largest measured", fontsize=10)
    figure.savefig(folder / "scaling.png", dpi=150)
    return folder / "scaling.png"


def _ladders(axes: Axes, rungs: list[Row], size: str, quantity: str, powers: dict[str, int], end: float) -> None:
    """Each operation's measured rungs, one ladder for each shape, and its power of the size up to the end."""
    for name, power in powers.items():
        mine = [rung for rung in rungs if rung["operation"] == name]
        for shape in sorted({_shape(rung, size) for rung in mine}):
            ladder = [rung for rung in mine if _shape(rung, size) == shape]
            x, y = (np.array([rung[key] for rung in ladder], float) for key in (size, quantity))
            y = np.maximum(y, LEAST[quantity])
            far, color = np.array([x[-1], end]), f"C{len(axes.lines) // 2}"
            label = NAMES[name] + "".join(f", {letter} = {value}" for letter, value in shape)
            axes.plot(x, y, ".-", color=color, label=label)
            axes.plot(far, y[-1] * (far / x[-1]) ** power, "--", color=color, lw=1)
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=7)


def _shape(rung: Row, size: str) -> tuple[tuple[str, int], ...]:
    """What tells one ladder from another: K and d, where N is what grows."""
    return (("K", rung["K"]), ("d", rung["d"])) if size == "N" else ()
