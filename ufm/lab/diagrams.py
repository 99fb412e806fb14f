"""Phase diagrams drawn from the dataset of a sweep, the theory's lines over what was found."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ufm.theory.atlas import index_threshold

if TYPE_CHECKING:
    from xarray import DataArray, Dataset

LINE: dict[str, Any] = {"color": "tab:red", "ls": "--", "lw": 1.5}


def draw_diagram(preset: str, dataset: "Dataset", path: Path) -> Path:
    """The figure of a preset's sweep, as a PNG file at the path."""
    figure = Figure(figsize=SIZES.get(preset, (7, 5)), layout="constrained")
    DRAWN[preset](figure, dataset)
    figure.savefig(path, dpi=150)
    return path


def _collapse(figure: Figure, found: "Dataset") -> None:
    axes = figure.subplots()
    K, n = found.K.values, _fixed(found, "n")
    _map(axes, found.margin_mean, "lam", "K", label="mean logit margin t found, nats")
    axes.plot(1 / (K * np.sqrt(n)), K, **LINE, label="K√n λ = 1")
    axes.set(xscale="log", xlabel="λ = λ_W = λ_H", ylabel="classes K", yticks=K[:: max(len(K) // 10, 1)])
    axes.legend()


def _norms(figure: Figure, found: "Dataset") -> None:
    names = {"margin_mean": "logit margin t, nats", "w_norm2_mean": "mean ‖w‖²", "h_norm2_mean": "mean ‖h‖²"}
    for axes, (name, label) in zip(figure.subplots(1, 3), names.items(), strict=True):
        for i, K in enumerate(found.K.values):
            axes.plot(found.lam, found[name].sel(K=K), ".", color=f"C{i}", label=f"K = {K}, found")
            axes.plot(found.lam, found[f"predicted_{name}"].sel(K=K), color=f"C{i}", lw=1)
            axes.axvline(1 / (K * np.sqrt(_fixed(found, "n"))), color=f"C{i}", ls=":", lw=0.8)
        axes.set(xscale="log", xlabel="λ = λ_W = λ_H", ylabel=label)
    axes.legend(fontsize=8, title="lines: closed form\ndotted: threshold", title_fontsize=8)


def _minority(figure: Figure, found: "Dataset") -> None:
    axes = figure.subplots()
    _map(axes, found.minority_cosine, "R", "lam", label="cosine between two minority classifiers")
    R, n, K = found.R.values, _fixed(found, "n"), _fixed(found, "K")
    total = n * ((K + 1) // 2 + K // 2 / R)
    axes.plot(R, np.sqrt(n / R) / total, **LINE, label="√n_B = N λ: minority classes merge")
    axes.set(xscale="log", yscale="log", xlabel="imbalance ratio R = n_A/n_B", ylabel="λ = λ_W = λ_H")
    axes.set_ylim(found.lam.min(), found.lam.max())
    axes.legend(loc="lower left")


def _conditioning(figure: Figure, found: "Dataset") -> None:
    left, right = figure.subplots(1, 2)
    for K in found.K.values:
        row = found.sel(K=K)
        left.plot(found["load"], row.condition_number, label=f"K = {K}")
        right.plot(found["load"], 1 - row.descent_rate)
    left.set(xscale="log", yscale="log", xlabel="K√(nλ_Wλ_H)", ylabel="condition number across the orbit")
    right.set(xscale="log", yscale="log", xlabel="K√(nλ_Wλ_H)", ylabel="1 − rate of gradient descent at step 1/λ_max")
    left.legend()


def _index(figure: Figure, found: "Dataset") -> None:
    axes = figure.subplots()
    K, d = _fixed(found, "K"), _fixed(found, "d")
    for i, m in enumerate(found["groups"].values):
        axes.plot(found["load"], found["index"].sel(groups=m), color=f"C{i}", label=f"m = {m}")
        axes.plot(found["load"], np.full(len(found["load"]), d * (K - m)), color=f"C{i}", ls=":", lw=0.8)
        if 3 <= m < K:
            axes.axvline(index_threshold(int(m)), color=f"C{i}", ls="--", lw=0.8)
    axes.set(xlabel="κ = K√(nλ_Wλ_H)", ylabel=f"Morse index of the saddle of m equal groups, K = {K}, d = {d}")
    axes.legend(title="dotted: d(K−m)\ndashed: κ*(m)", fontsize=9, title_fontsize=9)


def _map(axes: Axes, values: "DataArray", x: str, y: str, *, label: str) -> None:
    """A quantity over two axes as colours; cells without a number stay grey."""
    axes.set_facecolor("0.8")
    mesh = axes.pcolormesh(values[x], values[y], values.transpose(y, x), shading="nearest", cmap="viridis")
    axes.figure.colorbar(mesh, ax=axes, label=label)


def _fixed(found: "Dataset", name: str) -> int:
    return int(json.loads(found.attrs["settings"])["fixed"][name])


DRAWN = {"collapse": _collapse, "norms": _norms, "minority": _minority, "conditioning": _conditioning, "index": _index}
SIZES = {"norms": (13, 4), "conditioning": (11, 4)}
