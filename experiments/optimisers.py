"""Coupled against decoupled weight decay: which optimisers collapse where all else is exact (zhao2026)."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro
from jaxtyping import Array, Key
from tqdm import tqdm

from ufm import Params, Problem, balanced, init, optimal_value
from ufm.lab.courses import METRICS, along_path
from ufm.lab.optimisers import MOMENTUM, OPTIMISERS, optimiser
from ufm.lab.plots_rates import draw_optimisers
from ufm.lab.records import write_run
from ufm.numerics.dynamics import Fate, descend

GRADIENT = ("sgd", "momentum", "nesterov", "sgdw")  # those whose steps scale with the gradient
NAMES = (*(name for name in OPTIMISERS if name != "lbfgs"), "lbfgs")
QUANTITIES = ("excess", "gap", *METRICS)


@dataclass(frozen=True)
class Config:
    """One balanced model; every optimiser from the same random starts, with every learning rate."""

    out: tyro.conf.Positional[Path]
    """New folder for the record and optimisers.png."""
    names: tuple[str, ...] = NAMES
    """Optimisers."""
    K: int = 10
    """Number of classes."""
    n: int = 5
    """Samples per class."""
    d: int = 16
    """Feature dimension."""
    lam_W: float = 5e-3
    """λ_W."""
    lam_H: float = 2e-3
    """λ_H."""
    lam_b: float = 1e-2
    """λ_b."""
    gradient_rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Learning rates of SGD, momentum, Nesterov's momentum and SGDW."""
    adaptive_rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    """Learning rates of the others; L-BFGS has none."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine (to zero) or constant."""
    steps: int = 20_000
    """Of each run."""
    records: int = 40
    """Of each run, equally spaced."""
    seeds: int = 5
    """Random starts, of entries N(0, 1)."""
    seed: int = 0
    """Of the starts."""


def main(config: Config) -> Path:
    """Run all; assert what theory says of them; draw."""
    jax.config.update("jax_enable_x64", True)
    start, c = time.perf_counter(), config
    problem = balanced(c.K, c.n, c.d, lam_W=c.lam_W, lam_H=c.lam_H, lam_b=c.lam_b)
    rows, arrays = [], {}
    for name in tqdm(c.names, desc="optimisers"):
        rates = (None,) if name == "lbfgs" else c.gradient_rates if name in GRADIENT else c.adaptive_rates
        for rate in rates:
            row, kept = _runs(config, problem, name, rate)
            rows.append(row)
            arrays |= {f"{name} {rate} {quantity}": value for quantity, value in kept.items()}
    _assert_theory(config, rows, arrays)
    folder = write_run(c.out, config, {"optimum": float(optimal_value(problem)), "rows": rows}, arrays, start=start)
    draw_optimisers(folder)
    return folder


def _runs(config: Config, problem: Problem, name: str, rate: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """All seeds of one optimiser and rate: how they end, mean and standard deviation, and the means over the way."""
    every = config.steps // config.records
    descent = optimiser(problem, name, None if rate is None else _schedule(config, rate))

    @jax.jit
    @jax.vmap
    def run(key: Key[Array, ""]) -> Any:
        found = descend(
            descent.fun, init(problem, key), descent.optimiser, config.records * every, observe=_same, every=every
        )
        return found.observed, found.fate

    observed, fates = run(jax.random.split(jax.random.key(config.seed), config.seeds))
    paths = [_measured(problem, jax.tree.map(lambda x, i=i: x[i], observed)) for i in range(config.seeds)]
    kept = {quantity: np.stack([path[quantity] for path in paths]) for quantity in (*QUANTITIES, "other excess")}
    ends = {quantity: values[:, -1] for quantity, values in kept.items()}
    row = {"name": name, "rate": rate, "coupled": OPTIMISERS[name].coupled}
    row |= {"fates": [Fate(int(fate)).name for fate in fates]}
    for quantity, end in ends.items():
        row |= {quantity: {"mean": end.mean(), "deviation": end.std(ddof=1), "largest": end.max()}}
    return row, {quantity: values.mean(0) for quantity, values in kept.items()}


def _schedule(config: Config, rate: float) -> optax.Schedule:
    if config.schedule == "constant":
        return optax.constant_schedule(rate)
    return optax.cosine_decay_schedule(rate, config.steps)


def _same(x: Params) -> Params:
    return x


def _measured(problem: Problem, x: Params) -> dict[str, np.ndarray]:
    """QUANTITIES along a path, and f − f* in the model with 1 − β times the λ's."""
    kept = along_path(problem, x)
    other = _lighter(problem)
    values = along_path(other, x)["value"] - float(optimal_value(other))
    return kept | {"excess": kept["value"] - float(optimal_value(problem)), "other excess": values}


def _lighter(problem: Problem) -> Problem:
    p, keep = problem, 1 - MOMENTUM
    return Problem(p.Y, p.multiplicity, p.loss, keep * p.lam_W, keep * p.lam_H, keep * p.lam_b, p.d, p.use_bias)


def _assert_theory(config: Config, rows: list[dict[str, Any]], arrays: dict[str, Any]) -> None:
    """Gradient descent shrinks 1ᵀW by 1 − η_kλ_W a step; SGDW ends where λ's are (1 − β)λ; who else collapses."""
    for rate in config.gradient_rates if "sgd" in config.names else ():
        nc0, every = arrays[f"sgd {rate} nc0"], config.steps // config.records
        lr = _schedule(config, rate)(np.arange(every))
        predicted = 2 * np.sum(np.log1p(-config.lam_W * np.asarray(lr)))
        assert abs(np.log(nc0[1] / nc0[0]) / predicted - 1) < 1e-6
    assert all(fate == "DESCENDED" for row in rows for fate in row["fates"] if row["coupled"])
    best = {
        name: min((r for r in rows if r["name"] == name), key=lambda r: r["excess"]["mean"]) for name in config.names
    }
    for name in {"sgd", "momentum", "nesterov", "adam", "lbfgs"} & set(config.names):
        assert best[name]["gap"]["largest"] < 1e-10, (name, best[name])
    if "sgdw" in config.names:
        sgdw = min((r for r in rows if r["name"] == "sgdw"), key=lambda r: r["other excess"]["mean"])
        assert abs(sgdw["other excess"]["largest"]) < 1e-10 < best["sgdw"]["excess"]["mean"]
    for name in {"adamw", "signumw", "muonw"} & set(config.names):
        assert best[name]["excess"]["mean"] > 1e-3, (name, best[name])


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.optimisers"))
