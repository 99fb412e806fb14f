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


def draw_landscape(folder: Path) -> list[Path]:
    """The figures of a landscape run: escape.png, spectrum.png, atlas.png and network.png, those it has records for."""
    kinds = {"saddle": draw_escape, "spectra": draw_spectra, "atlas": draw_atlas, "network": draw_network}
    summary = read_json(folder / "summary.json")
    return [draw(folder) for name, draw in kinds.items() if summary.get(name)]


def draw_escape(folder: Path) -> Path:
    """escape.png: f along the steepest escape from a saddle, the predicted parabola over it, and f on its plane."""
    saddle = read_json(folder / "summary.json")["saddle"]
    with np.load(folder / "arrays.npz", allow_pickle=False) as file:
        arrays = dict(file)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    line, plane = figure.subplots(1, 2)
    tau, along, parabola = arrays["tau"], arrays["along"], arrays["parabola"]
    line.plot(tau, along, label="f")
    label = f"f + λ_min τ²/2 with λ_min = {saddle['curvature']:.4g} predicted"
    line.plot(tau, parabola, **THEORY["predicted"] | {"label": label})
    margin = 0.1 * np.ptp(along)
    line.set(xlabel="distance τ along the steepest escape", ylabel="f, nats")
    line.set_ylim(along.min() - margin, along.max() + 3 * margin)
    line.legend(fontsize=9, loc="upper center")
    side, levels = arrays["side"], np.linspace(arrays["plane"].min(), 2 * along.max() - along.min(), 31)
    filled = plane.contourf(side, side, arrays["plane"], levels=levels, cmap="viridis", extend="max")
    plane.contour(side, side, arrays["plane"], levels=[saddle["value"]], colors="white", linewidths=1)
    figure.colorbar(filled, ax=plane, label="f, nats; white: f of the saddle")
    plane.plot(0, 0, "x", color="white", ms=9, mew=2)
    plane.set(xlabel="features move by a vᵀ", ylabel="classifier moves by u aᵀ", aspect="equal")
    figure.suptitle(f"The way down from the saddle that merges classes as {saddle['groups']}", fontsize=11)
    return _save(figure, folder / "escape.png")


def draw_spectra(folder: Path) -> Path:
    """spectrum.png: the multiplicity of every eigenvalue, theory over the number found by brute force."""
    spectra = read_json(folder / "summary.json")["spectra"]
    figure = Figure(figsize=(4.4 * len(spectra), 4), layout="constrained")
    for axes, (where, rows) in zip(np.ravel(figure.subplots(1, len(spectra))), spectra.items(), strict=True):
        position = np.arange(len(rows))
        if rows[0]["dense"] is not None:
            axes.bar(position, [row["dense"] for row in rows], color="tab:blue", alpha=0.6, label="dense")
        axes.plot(position, [row["theory"] for row in rows], "_", color="black", ms=14, mew=2, label="theory")
        axes.set_xticks(position, [f"{row['eigenvalue']:.3g}" for row in rows], rotation=90, fontsize=8)
        axes.set(yscale="log", title=where, xlabel="eigenvalue", ylabel="multiplicity")
        axes.set_ylim(bottom=0.6)
        axes.legend(fontsize=8)
    return _save(figure, folder / "spectrum.png")


def draw_atlas(folder: Path) -> Path:
    """atlas.png: energy against index of the partition saddles, where each falls, and what a hunt found besides."""
    summary = read_json(folder / "summary.json")
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, summary["atlas"], summary["arrows"], summary.get("hunt", {}).get("orbits", []))
    for p in summary["atlas"]:
        axes.annotate(p["groups"], (p["index"], p["value"]), (5, 4), textcoords="offset points", fontsize=7)
    axes.legend(fontsize=9)
    return _save(figure, folder / "atlas.png")


def draw_censuses(folder: Path) -> Path:
    """census.png: energy against index of all that hunts found, beside the atlas, a panel for every d and κ."""
    censuses = read_json(folder / "summary.json")["censuses"]
    rows = sorted({c["d"] for c in censuses}, reverse=True)
    columns = sorted({c["kappa"] for c in censuses})
    figure = Figure(figsize=(4 * len(columns), 3.2 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    for c in censuses:
        axes = panels[rows.index(c["d"]), columns.index(c["kappa"])]
        _scatter(axes, c["atlas"], c["arrows"], c["orbits"])
        axes.set_title(f"d = {c['d']}, κ = {c['kappa']:g}: {c['known']} known, {c['new']} new", fontsize=10)
    panels[0, 0].legend(fontsize=8)
    return _save(figure, folder / "census.png")


def _scatter(axes: Axes, points: list[Row], arrows: list[Any], orbits: list[Row]) -> None:
    """Partition saddles with arrows to where they fall, and the orbits that are none of them."""
    for i, j in arrows:
        ends = [(points[k]["index"], points[k]["value"]) for k in (i, j)]
        axes.annotate("", ends[1], ends[0], arrowprops={"arrowstyle": "->", "color": "0.75", "lw": 0.8})
    axes.plot([p["index"] for p in points], [p["value"] for p in points], "o", label="partition saddles")
    if new := [orbit for orbit in orbits if not orbit["known"]]:
        axes.plot([o["index"] for o in new], [o["value"] for o in new], "x", color="tab:red", label="found by the hunt")
    axes.set(xlabel="Morse index", ylabel="f, nats")


def draw_network(folder: Path) -> Path:
    """network.png: f of a network's features over epochs, through the energies of the partition saddles."""
    network = read_json(folder / "summary.json")["network"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for p in network["atlas"]:
        axes.axhline(p["value"], color="0.8", lw=0.8, zorder=0)
    named = dict(zip(("optimum", "lowest partition saddle"), network["atlas"], strict=False))
    for name, p in (named | {"highest": network["atlas"][-1]}).items():
        axes.annotate(name, (1, p["value"]), (4, 0), fontsize=8, va="center", xycoords=("axes fraction", "data"),
                      textcoords="offset points")  # fmt: skip
    axes.plot(network["epochs"], network["values"], **OBSERVED, label=f"f of the network's features ({network['run']})")
    axes.set(xlabel="epoch", ylabel="f, nats; grey: partition saddles", xscale="log", yscale="log")
    axes.legend(fontsize=9)
    return _save(figure, folder / "network.png")
