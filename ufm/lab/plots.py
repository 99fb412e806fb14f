"""Figures drawn from records, and from nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ufm.lab.records import read_json

OBSERVED: dict[str, Any] = {"marker": ".", "lw": 1.2}
PREDICTED: dict[str, Any] = {"ls": "--", "lw": 1.2, "color": "black"}
NONNEGATIVE: dict[str, Any] = {"ls": ":", "lw": 1.2, "color": "black"}


def draw_claims(folder: Path) -> Path:
    """claims.png of a verify run: every claim's worst residual beside its tolerance."""
    claims = read_json(folder / "summary.json")["claims"]
    figure = Figure(figsize=(8, 0.34 * len(claims) + 1.2), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(claims))[::-1]
    worst = np.clip([float(c["worst"]) for c in claims], 1e-17, 1e3)
    tolerance = np.maximum([c["tolerance"] for c in claims], 1e-17)
    colours = ["tab:blue" if c["holds"] else "tab:red" for c in claims]
    axes.hlines(rows, worst, tolerance, color="0.8", lw=1)
    axes.scatter(worst, rows, c=colours, label="worst residual (red: fails)", zorder=2)
    axes.plot(tolerance, rows, "|", color="black", ms=12, label="tolerance")
    axes.set(xscale="log", yticks=rows, yticklabels=[f"{c['name']} ({c['cases']})" for c in claims])
    axes.set_xlabel("residual (1e-17 stands for zero, 1e3 for a contradiction)")
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return _save(figure, folder / "claims.png")


def draw_training(folder: Path) -> Path:
    """training.png of a train run: errors, collapse metrics, geometry and certified gap over epochs, theory dashed."""
    config, history = read_json(folder / "config.json"), read_json(folder / "history.json")
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(11, 7), layout="constrained")
    (errors, collapse, margin), (norms, balance, gap) = figure.subplots(2, 3)
    _errors(errors, epochs, history)
    _collapse(collapse, epochs, [row["collapse"] for row in history])
    _beside_theory(margin, epochs, history, ("margin_mean",), "logit margin t")
    _beside_theory(norms, epochs, history, ("w_norm2_mean", "h_norm2_mean"), "mean squared norm")
    _beside_theory(balance, epochs, history, ("balance",), "λ_W‖W‖² / (λ_H‖H‖²)")
    _values(gap, epochs, history)
    for axes in (errors, collapse, margin, norms, balance, gap):
        axes.set_xlabel("epoch")
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(_caption(config, history[-1]), fontsize=10)
    return _save(figure, folder / "training.png")


def _caption(config: dict[str, Any], last: dict[str, Any]) -> str:
    kind = {"decay": "weight decay on all weights, λ_H implied by balance", "features": "explicit feature penalty"}
    images = f"{config['limit'] or 'all'} images of {config['data']}"
    lambdas = f"λ_W = {config['lam_W']:g}, λ_H = {last['lam_H']:.3g}"
    return f"ResNet18 of width {config['width']} on {images}: {kind[config['regulariser']]} ({lambdas})"


def _errors(axes: Axes, epochs: Sequence[int], history: list[dict[str, Any]]) -> None:
    for name in ("train_error", "test_error"):
        axes.plot(epochs, [100 * row[name] for row in history], label=name.replace("_", " "), **OBSERVED)
    axes.set(ylabel="per cent", yscale="symlog", ylim=(0, None))
    axes.set_yscale("symlog", linthresh=0.01)


def _collapse(axes: Axes, epochs: Sequence[int], rows: list[dict[str, float]]) -> None:
    names = {
        "nc1_pinv": "NC1 tr(Σ_W Σ_B⁺)/K",
        "nc2_etf_err": "NC2 of the means",
        "nc2_etf_err_weights": "NC2 of W",
        "nc3_dual_err": "NC3",
        "nc4_disagree": "NC4 disagreement",
    }
    for name, label in names.items():
        axes.plot(epochs, [row[name] or np.nan for row in rows], label=label, **OBSERVED)
    axes.set(yscale="log", ylabel="collapse metric")


def _beside_theory(
    axes: Axes, epochs: Sequence[int], history: list[dict[str, Any]], names: Sequence[str], label: str
) -> None:
    for name in names:
        axes.plot(epochs, [row["observed"][name] for row in history], label=name.replace("_", " "), **OBSERVED)
        axes.plot(epochs, [row["predicted"][name] for row in history], **PREDICTED)
        if "predicted_nonnegative" in history[-1]:
            axes.plot(epochs, [row["predicted_nonnegative"][name] for row in history], **NONNEGATIVE)
    axes.plot([], [], label="theory, H free", **PREDICTED)
    if "predicted_nonnegative" in history[-1]:
        axes.plot([], [], label="theory, H ≥ 0", **NONNEGATIVE)
    axes.set(ylabel=label, yscale="log" if len(names) > 1 or "balance" in names else "linear")


def _values(axes: Axes, epochs: Sequence[int], history: list[dict[str, Any]]) -> None:
    axes.plot(epochs, [row["observed"]["value"] for row in history], label="f of the features", **OBSERVED)
    axes.plot(epochs, [row["gap"] for row in history], label="certified gap ≥ f − f*", **OBSERVED)
    axes.plot(epochs, [row["predicted"]["value"] for row in history], label="f*", **PREDICTED)
    if "predicted_nonnegative" in history[-1]:
        axes.plot(epochs, [row["predicted_nonnegative"]["value"] for row in history], label="f*, H ≥ 0", **NONNEGATIVE)
    axes.set(yscale="log", ylabel="nats")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
