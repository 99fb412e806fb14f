"""Figures drawn from records, and from nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ufm.lab.records import read_json

OBSERVED: dict[str, Any] = {"marker": ".", "lw": 1.2}
THEORY: dict[str, dict[str, Any]] = {
    "predicted": {"ls": "--", "lw": 1.2, "color": "black", "label": "theory, H free"},
    "predicted_nonnegative": {"ls": ":", "lw": 1.2, "color": "black", "label": "theory, H ≥ 0"},
}
Row = dict[str, Any]


def draw_claims(folder: Path) -> Path:
    """claims.png of a verify run: every claim's worst residual beside its tolerance."""
    claims = read_json(folder / "summary.json")["claims"]
    figure = Figure(figsize=(8, 0.34 * len(claims) + 1.2), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(claims))[::-1]
    worst = np.clip([float(c["worst"]) for c in claims], 1e-17, 1e3)
    tolerance = np.maximum([c["tolerance"] for c in claims], 1e-17)
    holds = np.array([c["holds"] for c in claims])
    axes.hlines(rows, worst, tolerance, color="0.8", lw=1)
    axes.scatter(worst[holds], rows[holds], color="tab:blue", label="worst residual", zorder=2)
    if not holds.all():
        axes.scatter(worst[~holds], rows[~holds], color="tab:red", label="claim fails", zorder=2)
    axes.plot(tolerance, rows, "|", color="black", ms=12, label="tolerance")
    axes.set(xscale="log", yticks=rows, yticklabels=[f"{c['name']} ({c['cases']})" for c in claims])
    axes.set_xlabel("residual (1e-17 stands for zero, 1e3 for a contradiction)")
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    return _save(figure, folder / "claims.png")


def draw_training(folder: Path) -> Path:
    """training.png of a train run: errors, collapse metrics, geometry and certified gap over epochs, theory dashed."""
    config, history = read_json(folder / "config.json"), read_json(folder / "history.json")
    figure = Figure(figsize=(11, 7), layout="constrained")
    (errors, collapse, margin), (norms, balance, value) = panels = figure.subplots(2, 3)
    _errors(errors, history)
    _collapse(collapse, history)
    _beside_theory(margin, history, {"margin_mean": "mean logit margin t"}, log=False)
    _beside_theory(norms, history, {"w_norm2_mean": "mean ‖w‖²", "h_norm2_mean": "mean ‖h‖²"})
    _beside_theory(balance, history, {"balance": "λ_W‖W‖² / (λ_H‖H‖²)"})
    balance.set_ylim(*np.clip(balance.get_ylim(), (0, 10), (0.1, np.inf)))
    _beside_theory(value, history, {"value": "f of the features"})
    _line(value, history, [row["gap"] for row in history], label="certified gap ≥ f − f*", **OBSERVED)
    value.set_ylabel("nats")
    for axes in panels.flat:
        axes.set_xlabel("epoch")
        axes.legend(fontsize=8, framealpha=0.7, edgecolor="none")
    figure.suptitle(_caption(config, history[-1]), fontsize=10)
    return _save(figure, folder / "training.png")


def _caption(config: Row, last: Row) -> str:
    kind = {"decay": "weight decay on all weights, λ_H implied by balance", "features": "explicit feature penalty"}
    images = f"{config['limit'] or 'all'} images of {config['data']}"
    lambdas = f"λ_W = {config['lam_W']:g}, λ_H = {last['lam_H']:.3g}"
    return f"ResNet18 of width {config['width']} on {images}: {kind[config['regulariser']]} ({lambdas})"


def _line(axes: Axes, history: Sequence[Row], values: Sequence[Any], **style: Any) -> None:
    """Values over epochs; those that are not finite leave a gap, and zeros leave a logarithmic axis below."""
    numbers = np.array([float(value) for value in values])
    axes.plot([row["epoch"] for row in history], np.where(np.isfinite(numbers), numbers, np.nan), **style)


def _errors(axes: Axes, history: Sequence[Row]) -> None:
    for name in ("train_error", "test_error"):
        _line(axes, history, [100 * row[name] for row in history], label=name.replace("_", " "), **OBSERVED)
    shown = [100 * row[name] for row in history for name in ("train_error", "test_error") if row[name]]
    axes.set_yscale("symlog", linthresh=10 ** np.ceil(np.log10(min(shown, default=1.0))), linscale=0.3)
    axes.set(ylabel="per cent", ylim=(0, 1.3 * max(shown, default=1.0)))


def _collapse(axes: Axes, history: Sequence[Row]) -> None:
    names = {
        "nc1_pinv": "NC1 tr(Σ_W Σ_B⁺)/K",
        "nc2_etf_err": "NC2 of the means",
        "nc2_etf_err_weights": "NC2 of W",
        "nc3_dual_err": "NC3",
        "nc4_disagree": "NC4 disagreement",
    }
    for name, label in names.items():
        _line(axes, history, [row["collapse"][name] for row in history], label=label, **OBSERVED)
    axes.set_ylabel("collapse metric")
    _logarithmic(axes)


def _beside_theory(axes: Axes, history: Sequence[Row], names: dict[str, str], *, log: bool = True) -> None:
    """Observed quantities by name and label, and the theory's lines for them."""
    for name, label in names.items():
        _line(axes, history, [row["observed"][name] for row in history], label=label, **OBSERVED)
    for side, style in THEORY.items():
        for name in names if side in history[-1] else ():
            _line(axes, history, [row[side][name] if side in row else np.nan for row in history], **style)
            style = style | {"label": None}
    axes.set_ylabel(", ".join(names.values()))
    if log:
        _logarithmic(axes)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis, where there is something to show on it."""
    if any(np.any(np.asarray(line.get_ydata()) > 0) for line in axes.get_lines()):
        axes.set_yscale("log")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
