"""Figures of the experiments on dynamics, drawn from their records."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ufm.lab.records import read_json

Row = dict[str, Any]
MARKERS = {"gradient descent": "o", "flow": "+"}


def draw_escapes(folder: Path) -> Path:
    """escapes.png: escape times, measured against predicted, for every K, λ, ε, η; random starts; terminal rates."""
    summary = read_json(folder / "summary.json")
    with np.load(folder / "arrays.npz") as arrays:
        steps = arrays["random_steps"]
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    (times, off), (drawn, ends) = figure.subplots(2, 2)
    _against(times, summary["escapes"], "predicted", "measured")
    times.set(xlabel="predicted steps (time of the flow)", ylabel="measured", title="leaving a saddle")
    _deviation(off, summary["escapes"])
    _random(drawn, summary["random"], steps)
    _against(ends, summary["arrivals"], "predicted_rate", "rate")
    ends.set(xlabel="predicted −log factor per step", ylabel="measured", title="arriving at the optimum")
    return _save(figure, folder / "escapes.png")


def _colours(rows: list[Row]) -> dict[int, Any]:
    Ks = sorted({row["K"] for row in rows})
    return {K: f"C{i}" for i, K in enumerate(Ks)}


def _marker(method: str) -> str:
    return MARKERS.get(method, "x")


def _against(axes: Axes, rows: list[Row], predicted: str, measured: str) -> None:
    """Measured against predicted, log-log, with the diagonal: colour K, marker the method."""
    for method in dict.fromkeys(row["method"] for row in rows):
        axes.plot([], [], _marker(method), color="0.3", label=method, mfc="none")
    for K, colour in _colours(rows).items():
        axes.plot([], [], "s", color=colour, label=f"K = {K}")
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["K"] == K and row["method"] == method]
            axes.plot([row[predicted] for row in mine], [row[measured] for row in mine], _marker(method), color=colour,
                      mfc="none", ms=5)  # fmt: skip
    ends = np.array([f([row[predicted] for row in rows]) for f in (min, max)])
    axes.plot(ends, ends, color="black", lw=0.8, label="equal")
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize=8, ncols=2)


def _deviation(axes: Axes, rows: list[Row]) -> None:
    for K, colour in _colours(rows).items():
        mine = [row for row in rows if row["K"] == K]
        off = [100 * abs(row["measured"] / row["predicted"] - 1) for row in mine]
        axes.plot([row["load"] for row in mine], np.maximum(off, 1e-9), ".", color=colour, label=f"K = {K}")
    axes.axhline(1, color="black", lw=0.8, ls="--", label="1 %")
    axes.set(xscale="log", yscale="log", xlabel="load K√n s", ylabel="|measured/predicted − 1|, per cent",
             title="deviation of the time")  # fmt: skip
    axes.legend(fontsize=8, loc="lower right", ncols=2)


def _random(axes: Axes, row: Row, steps: np.ndarray) -> None:
    axes.hist(steps, bins=30, density=True, color="tab:blue", alpha=0.6, label=f"{len(steps)} random directions")
    x = np.linspace(steps.min(), steps.max(), 200)
    mean, deviation = row["predicted_mean"], row["predicted_deviation"]
    bell = np.exp(-(((x - mean) / deviation) ** 2) / 2) / (deviation * np.sqrt(2 * np.pi))
    axes.plot(x, bell, color="black", label="predicted mean and spread")
    axes.set(xlabel="steps", ylabel="density", title=f"from a random direction: the origin of K = {row['K']}")
    axes.legend(fontsize=8)


def draw_journeys(folder: Path) -> Path:
    """journeys.png: f − f* and ‖∇f‖ of each journey, the saddles that it rests at, and when contrasts should grow."""
    journeys = read_json(folder / "summary.json")["journeys"]
    with np.load(folder / "arrays.npz") as arrays:
        kept = dict(arrays)
    figure = Figure(figsize=(10, 3.6 * len(journeys)), layout="constrained")
    for axes, journey in zip(figure.subplots(len(journeys)), journeys, strict=True):
        of = {name.partition(" ")[2]: x for name, x in kept.items() if name.startswith(journey["name"])}
        _journey(axes, journey, of)
    return _save(figure, folder / "journeys.png")


def _journey(axes: Axes, journey: Row, kept: dict[str, np.ndarray]) -> None:
    step, excess = kept["step"], kept["value"] - journey["optimum"]
    axes.plot(step, np.maximum(excess, 1e-16), label="f − f*", color="C0")
    axes.plot(step, kept["grad_norm"], label="‖∇f‖", color="C1", lw=0.9)
    for i, rest in enumerate(journey["passed"]):
        axes.axvspan(rest["first"], rest["last"], color="0.9", zorder=0)
        axes.text((rest["first"] + rest["last"]) / 2, 1.02 + 0.07 * (i % 2), _rest_name(rest["saddle"]), ha="center",
                  va="bottom", fontsize=8, transform=axes.get_xaxis_transform())  # fmt: skip
    for i, contrast in enumerate(journey["contrasts"]):
        label = "predicted: two classes part" if i == 0 else None
        axes.axvline(contrast["predicted"], color="black", lw=0.6, ls=":", label=label)
    axes.set(yscale="log", xlabel="step", ylabel="nats; gradient norm", xlim=(0, step[excess > 1e-8].max()))
    axes.set_ylim(1e-8, 3 * max(excess.max(), kept["grad_norm"].max()))
    axes.set_title(f"{journey['name']} start", loc="right", fontsize=10)
    axes.legend(fontsize=8, loc="upper right")


def _rest_name(saddle: Row | None) -> str:
    if saddle is None:
        return "no critical point"
    kind = "" if saddle["known"] else ", no partition saddle" if saddle["rank"] else ", origin"
    return f"{saddle['partition'].replace(' ', '|')}, index {saddle['index']}{kind}"


def draw_fall(folder: Path) -> Path:
    """fall.gif: the tied start on its way down; rows of W in the plane of its end, and f among the atlas's saddles."""
    atlas = read_json(folder / "summary.json")["atlas"]
    with np.load(folder / "arrays.npz") as arrays:
        step, value, W, near = (arrays[f"frame {name}"] for name in ("step", "value", "W", "nearest"))
    return animate_fall(atlas, step, value, W, near, folder / "fall.gif")


def animate_fall(
    atlas: list[Row], step: np.ndarray, value: np.ndarray, W: np.ndarray, near: np.ndarray, path: Path
) -> Path:
    """A GIF of a trajectory among the partition saddles, a frame a record.

    Args:
        atlas: rows with groups, index and value, as landscape.atlas_rows makes them.
        step: of every frame.
        value: f at every frame.
        W: classifiers, frames × K × d; shown in the plane of the last one's first two principal axes.
        near: row of the atlas that is nearest.
        path: of the GIF.
    """
    plane = W @ np.linalg.svd(W[-1])[2][:2].T
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    rows, energies = figure.subplots(1, 2)
    reach = 1.15 * np.abs(plane).max()
    rows.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title="rows of W", xticks=[], yticks=[])
    dots = rows.scatter(*plane[0].T, c=[f"C{k}" for k in range(W.shape[1])], s=60, alpha=0.8)
    energies.plot([p["index"] for p in atlas], [p["value"] for p in atlas], "o", color="0.6", ms=5)
    ring = energies.plot([], [], "o", mfc="none", mec="C3", ms=12, label="nearest")[0]
    level = energies.axhline(value[0], color="C0", lw=1, label="f of the trajectory")
    energies.set(xlabel="Morse index", ylabel="f, nats", title=" ")
    energies.legend(fontsize=8, loc="lower right")

    def show(i: int) -> list[Any]:
        dots.set_offsets(plane[i])
        level.set_ydata([value[i], value[i]])
        ring.set_data([atlas[near[i]]["index"]], [atlas[near[i]]["value"]])
        energies.set_title(f"step {step[i]}, nearest saddle {atlas[near[i]]['groups']}", fontsize=10)
        return [dots, level, ring]

    FuncAnimation(figure, show, frames=len(step)).save(path, writer=PillowWriter(fps=10), dpi=70)
    return path


SHOWN = {"excess": "f − f*, nats", "nc0": "NC0", "nc1": "NC1", "nc2": "NC2", "nc3": "NC3"}


def draw_optimisers(folder: Path) -> Path:
    """optimisers.png: f − f* and NC0 to NC3 at the end, by optimiser and learning rate, mean and spread over seeds."""
    rows = read_json(folder / "summary.json")["rows"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    panels = figure.subplots(1, len(SHOWN), sharey=True)
    for axes, (quantity, label) in zip(panels, SHOWN.items(), strict=True):
        for name in names:
            mine = [row for row in rows if row["name"] == name]
            for i, row in enumerate(mine):
                _end(axes, row, quantity, names.index(name) + 0.22 * (i - (len(mine) - 1) / 2))
        axes.set(xscale="log", xlabel=label, xlim=(1e-17, 1e6))
        axes.axvspan(1e-17, 1e-9, color="0.95", zorder=0)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    for label, colour in {"decay coupled": "C0", "decay decoupled": "C3"}.items():
        panels[-1].plot([], [], "o", color=colour, label=label)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return _save(figure, folder / "optimisers.png")


def _end(axes: Axes, row: Row, quantity: str, y: float) -> None:
    """Mean and standard deviation over seeds; what is at or below 1e-17 stands at the edge."""
    mean, deviation = (float(row[quantity][name]) for name in ("mean", "deviation"))
    low, high = (max(x, 1e-17) for x in (mean - deviation, mean + deviation))
    colour = "C0" if row["coupled"] else "C3"
    axes.plot([low, high], [y, y], color=colour, lw=1)
    axes.plot([max(mean, 1e-17)], [y], "o", color=colour, ms=4)


def draw_rate_to_seli(folder: Path) -> Path:
    """seli.png: distance of WWᵀ from SELI's against the time of the flow for every λ, and the optimum's at t = 1/λ."""
    summary = read_json(folder / "summary.json")
    with np.load(folder / "arrays.npz") as arrays:
        kept = dict(arrays)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(summary["rows"]):
        lam = f"{row['lam']:g}"
        axes.plot(kept[f"time {lam}"], kept[f"distance {lam}"], color=f"C{i}", label=f"λ = {lam}")
        axes.axhline(row["optimum"], color=f"C{i}", lw=0.7, ls=":")
    axes.plot([1 / row["lam"] for row in summary["rows"]], [row["optimum"] for row in summary["rows"]], "k.--", lw=0.8,
              label="global optimum of λ, at t = 1/λ")  # fmt: skip
    fit = summary["fit"]
    t = np.geomspace(fit["from"], fit["to"], 50)
    axes.plot(t, 1 / (fit["intercept"] + fit["slope"] * np.log(t)), color="0.6", lw=4, zorder=0,
              label=f"1/({fit['intercept']:.2f} + {fit['slope']:.3f} log t)")  # fmt: skip
    axes.axhline(summary["etf"], color="0.5", ls="-.", lw=0.8, label="simplex ETF")
    axes.set(xscale="log", yscale="log", xlabel="time of the gradient flow of Σ CE + λ/2 (‖W‖² + ‖H‖²)",
             ylabel="‖WWᵀ/‖WWᵀ‖ − G/‖G‖‖, G of SELI")  # fmt: skip
    axes.legend(fontsize=8)
    return _save(figure, folder / "seli.png")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
