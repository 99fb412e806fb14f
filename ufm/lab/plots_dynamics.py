"""Figures of trajectories, drawn from the records of descents and escapes."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ufm.lab.records import read_json

MEASURED: dict[str, Any] = {"lw": 1.2}
PREDICTED: dict[str, Any] = {"color": "black", "ls": "--", "lw": 1.2}
REST = "0.88"  # grey of a plateau
HUGE = 1e30  # what diverges leaves the picture there
STEEPEST, RANDOM = "tab:blue", "tab:orange"
Row = dict[str, Any]
Arrays = dict[str, np.ndarray]


def draw_course(folder: Path) -> Path:
    """course.png of a descent: f − f*, certified gap, ‖∇f‖ and NC0 to NC3 over steps, with plateaus and terminal slope.

    Logarithmic in both; what is zero, negative or below rounding leaves a gap, and the start, at step 0, is left out.
    """
    summary, arrays = read_json(folder / "summary.json"), _arrays(folder)
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    values, collapse = figure.subplots(2, 1, sharex=True)
    step, excess = arrays["step"], arrays["value"] - summary["optimal_value"]
    above = np.where(excess > arrays["rounding"], excess, np.nan)
    for series, label in (
        (above, "f − f*, nats"),
        (arrays["gap"], "certified gap ≥ f − f*, nats"),
        (arrays["grad_norm"], "‖∇f‖"),
    ):
        _line(values, step, series, label)
    for i in range(4):
        _line(collapse, step, arrays[f"nc{i}"], f"NC{i}", ls=("-", "-", "-", "--")[i])  # NC2 and NC3 may coincide
    limits = values.get_ylim()
    _terminal(values, summary["terminal"], step, arrays["grad_norm"], above)
    values.set(ylim=limits, ylabel="nats; ‖∇f‖ in nats per unit of the variables")
    collapse.set(xlabel="steps", ylabel="collapse metric", xlim=_steps(step))
    rests = summary["plateaus"] or []
    for axes in (values, collapse):
        for letter, rest in zip(_letters(rests), rests, strict=True):
            _shade(axes, rest, letter)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    if rests:
        figure.supxlabel(_names(rests), fontsize=9)
    figure.suptitle(_course_title(summary), fontsize=11)
    return _save(figure, folder / "course.png")


def _course_title(summary: Row) -> str:
    rate = "" if summary["lr"] is None else f", lr {summary['lr']:g} {summary['schedule']}"
    batch = "" if summary["batch"] is None else f", batches of {summary['batch']}"
    return f"Descent of f by {summary['optimiser']}{rate}{batch}: {summary['fate']} in {summary['steps']} steps"


def _line(axes: Axes, step: np.ndarray, values: np.ndarray, label: str, **style: Any) -> None:
    shown = (step > 0) & (values > 0) & (values < HUGE)
    label = label if shown.any() else f"{label}: zero"
    axes.loglog(step, np.where(shown, values, np.nan), label=label, **MEASURED | style)


def _steps(step: np.ndarray) -> tuple[float, float]:
    """From before the first record after the start to the last."""
    return float(step[1]) / 2, float(step[-1])


def _terminal(axes: Axes, terminal: Row | str, step: np.ndarray, grad_norm: np.ndarray, excess: np.ndarray) -> None:
    """The predicted decay of f − f* and ‖∇f‖ through a point of each, from half as many steps as it was measured on."""
    if isinstance(terminal, str) or terminal["measured_factor"] is None:
        return
    first, last = (int(np.searchsorted(step, terminal[name])) for name in ("first", "last"))
    drawn = np.arange(first // 2, last + 1)
    for values, power, label in ((grad_norm, 1, "predicted decay"), (excess, 2, None)):
        known = drawn[np.isfinite(values[drawn])]
        middle = known[len(known) // 2]
        decay = values[middle] * np.exp(power * np.log(terminal["predicted_factor"]) * (step[drawn] - step[middle]))
        axes.plot(step[drawn], decay, **PREDICTED, label=label)


def _shade(axes: Axes, rest: Row, letter: str) -> None:
    left, right = axes.get_xlim()
    first, last = max(rest["first"], left), min(max(rest["last"], left), right)
    axes.axvspan(first, last, color=REST, zorder=0, lw=0)
    axes.text(np.sqrt(first * last), 1.01, letter, transform=axes.get_xaxis_transform(), ha="center", fontsize=9)


def _letters(rests: list[Row]) -> list[str]:
    return [chr(ord("A") + i) for i in range(len(rests))]


def _names(rests: list[Row]) -> str:
    """A line for every plateau: the nearest partition saddle and the distance to it, if known, and f."""
    lines = []
    for letter, rest in zip(_letters(rests), rests, strict=True):
        saddle = "" if rest["nearest"] is None else f" {rest['distance']:.2g} from {rest['nearest']},"
        lines.append(f"{letter}: rests{saddle} at f = {rest['value']:.4g}")
    return "\n".join(lines)


def draw_escape_times(folder: Path) -> Path:
    """escape.png of an escape run: measured steps over predicted ones, and steps over the distance of the start."""
    summary, arrays = read_json(folder / "summary.json"), _arrays(folder)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    beside, against = figure.subplots(1, 2)
    rows, distance = summary["escapes"], arrays["distance"]
    steepest = np.array([row["steps"]["predicted"] for row in rows])
    _points(beside, steepest, arrays["steps"], "steepest direction", STEEPEST, "o")
    _points(against, distance, arrays["steps"], "steepest direction", STEEPEST, "o")
    against.plot(distance, steepest, color=STEEPEST, lw=1.2, label="predicted")
    if summary["seeds"]:
        _random(beside, against, rows, arrays)
    low, high = _span(rows)
    beside.plot([low, high], [low, high], **PREDICTED, label="measured = predicted")
    beside.set(xscale="log", yscale="log", xlabel="steps predicted", ylabel="steps measured", aspect="equal")
    for axis in (beside.xaxis, beside.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(_plain)
    against.set(xscale="log", xlabel="distance of the start from the saddle")
    against.set_ylabel(f"steps to distance {summary['radius']:g}")
    for axes in (beside, against):
        axes.legend(fontsize=9, frameon=False)
    figure.suptitle(_escape_title(summary), fontsize=11)
    return _save(figure, folder / "escape.png")


def _points(axes: Axes, x: np.ndarray, steps: np.ndarray, label: str, color: str, marker: str) -> None:
    axes.plot(x, steps, marker, color=color, label=label, ms=5)


def _random(beside: Axes, against: Axes, rows: list[Row], arrays: Arrays) -> None:
    """Every random start, over the band of predicted mean and standard deviation."""
    mean = np.array([row["random"]["predicted_mean"] for row in rows])
    sd = np.array([row["random"]["predicted_sd"] for row in rows])
    steps, distance = arrays["random"], arrays["distance"]
    label = "random directions"
    for axes, x in ((beside, mean), (against, distance)):
        _points(axes, np.repeat(x, steps.shape[1]), steps.ravel(), label, RANDOM, ".")
    against.plot(distance, mean, color=RANDOM, lw=1.2, label="predicted mean ± sd")
    against.fill_between(distance, mean - sd, mean + sd, color=RANDOM, alpha=0.25, lw=0)


def _plain(x: float, position: int) -> str:
    """The number itself if its first digit is 2, 3 or 5."""
    return f"{x:g}" if f"{x:e}"[0] in "235" else ""


def _span(rows: list[Row]) -> tuple[float, float]:
    """The least and the most steps predicted."""
    means = [row["random"]["predicted_mean"] for row in rows if "random" in row]
    steps = [row["steps"]["predicted"] for row in rows] + means
    return min(steps), max(steps)


def _escape_title(summary: Row) -> str:
    saddle, method = summary["saddle"], summary["method"]
    where = f"the saddle of groups {saddle['groups']}" if saddle["rank"] else "the origin"
    momentum = f", β = {method['momentum']:g}" if method["momentum"] else ""
    nesterov = " (Nesterov)" if method["momentum"] and method["nesterov"] else ""
    return (
        f"Escape from {where}: λ_min = {saddle['smallest_eigenvalue']:.4g}, η = {method['eta']:.4g}{momentum}{nesterov}"
    )


def _arrays(folder: Path) -> Arrays:
    with np.load(folder / "arrays.npz", allow_pickle=False) as file:
        return dict(file)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
