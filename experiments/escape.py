"""Escape times and terminal rates of descent, measured beside predicted: two linear regimes (THEORY 1.3, 1.4)."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.tree_util import Partial
from jaxtyping import Array
from tqdm import tqdm

from ufm import Params, Problem, balanced, coarse_etf, global_minimiser, hessian_spectrum, objective
from ufm.lab.escapes import Outcome, departure, flow_departure, random_start, steepest_start
from ufm.lab.plots_rates import draw_escapes
from ufm.lab.records import write_run
from ufm.numerics.dynamics import descend
from ufm.numerics.flow import gradient_norm
from ufm.theory.rates import (
    Method,
    escape_rate,
    escape_steps,
    escape_time,
    log_factor,
    projection_loss,
    terminal_rate,
)

FALL = 1e-8, 1e-11  # of the first gradient norm, between which a terminal rate is measured
SWINGING = 1e-1, 1e-11  # the same where roots are complex, so that the distance swings


@dataclass(frozen=True)
class Config:
    """Saddles, λ's, distances and steps, every combination of them."""

    out: tyro.conf.Positional[Path]
    """New folder for the record and escapes.png."""
    saddles: tuple[tuple[int, int], ...] = (
        (2, 1),
        (4, 1),
        (4, 2),
        (10, 1),
        (10, 5),
        (30, 1),
        (30, 10),
        (100, 1),
        (100, 50),
    )
    """K and the number of equal groups: 1 is the origin."""
    loads: tuple[float, ...] = (3e-4, 3e-3, 3e-2, 3e-1)
    """K√n s, of which 1 is the threshold; s = √(λ_Wλ_H)."""
    ratio: float = 4.0
    """λ_W/λ_H at the saddles; at the optima of the same K to arrive at it is 1."""
    terminal_momenta: tuple[float, ...] = (0.5, 0.9)
    """β there, besides none: with 0.5 the slowest root is real for small λ, with 0.9 it is complex."""
    n: int = 2
    """Samples per class."""
    distances: tuple[float, ...] = (1e-10, 1e-9, 1e-8, 1e-7, 1e-6)
    """ε of the start."""
    radius: float = 1e-3
    """Of the ball to leave, from saddles other than the origin in units of their norm where that is less than 1."""
    etas: tuple[float, ...] = (0.03, 0.3, 1.0)
    """Step sizes, in units of 1/λ_max at the saddle."""
    momenta: tuple[float, ...] = (0.0, 0.9)
    """β; both without and with momentum of this size."""
    random: int = 400
    """Starts in random directions, for K = 10 at the origin."""
    seed: int = 0
    """Seed of the random directions."""
    tolerance: float = 0.01
    """Largest relative deviation of times and rates that is asserted."""


def main(config: Config) -> Path:
    """Assert that every escape and every terminal rate is as predicted; draw."""
    jax.config.update("jax_enable_x64", True)
    start = time.perf_counter()
    escapes = [row for K, m in tqdm(config.saddles, desc="saddles") for row in _escapes(config, K, m)]
    arrivals = [
        row for K in tqdm(sorted({K for K, _ in config.saddles}), desc="optima") for row in _arrivals(config, K)
    ]
    drawn = _random(config)
    assert {row["outcome"] for row in escapes} == {Outcome.LEFT.name}
    worst = {
        "escape time": _worst(escapes, "measured", "predicted"),
        "escape rate": _worst(escapes, "rate", "predicted_rate"),
        "terminal rate": _worst(arrivals, "rate", "predicted_rate"),
    }
    assert max(worst.values()) <= config.tolerance, worst
    summary = {"worst_relative_deviation": worst, "random": drawn | {"steps": None}, "escapes": escapes}
    folder = write_run(
        config.out, config, summary | {"arrivals": arrivals}, {"random_steps": drawn["steps"]}, start=start
    )
    draw_escapes(folder)
    return folder


def _worst(rows: list[dict[str, Any]], measured: str, predicted: str) -> float:
    return float(np.max([abs(row[measured] / row[predicted] - 1) for row in rows]))


def _problem(config: Config, K: int, load: Any, ratio: float) -> Problem:
    s = load / (K * config.n**0.5)
    return balanced(K, config.n, K + 1, lam_W=s * ratio**0.5, lam_H=s / ratio**0.5)


def _groups(K: int, m: int) -> list[list[int]]:
    return np.arange(K).reshape(m, -1).tolist()


def _escapes(config: Config, K: int, m: int) -> Iterator[dict[str, Any]]:
    """Rows of one saddle: every λ, distance, step size and momentum, and the flow."""
    loads, sizes = np.array(config.loads), np.array(config.distances)
    problems = [_problem(config, K, load, config.ratio) for load in loads]
    spectra = [hessian_spectrum(problem, _groups(K, m)).eigenvalues for problem in problems]
    least, largest = (np.array([end(x) for x in spectra]) for end in (np.min, np.max))
    saddles = [coarse_etf(problem, m) for problem in problems]
    norms = [float(optax.tree.norm(saddle)) for saddle in saddles]
    radii = config.radius * np.array([min(norm, 1) if norm else 1 for norm in norms])
    points = _stack(
        [_stack([steepest_start(p, x, size) for size in sizes]) for p, x in zip(problems, saddles, strict=True)]
    )
    lams = _stack([{"lam_W": p.lam_W, "lam_H": p.lam_H} for p in problems])
    centres, labels = _stack(saddles), {"K": K, "groups": m}

    def over(measure: Any, *rest: Any) -> Any:
        """measure(problem, saddle, start, radius, *rest) over loads and distances, in one program."""

        def at(lam: Any, centre: Params, starts: Params, radius: Array, *more: Any) -> Any:
            problem = balanced(K, config.n, K + 1, **lam)
            return jax.vmap(lambda x: measure(problem, centre, x, radius, *more))(starts)

        return jax.jit(jax.vmap(at))(lams, centres, points, jnp.asarray(radii), *rest)

    def rows(found: Any, predicted: Any, rate: Any, method: str, eta: Any) -> Iterator[dict[str, Any]]:
        for i, load in enumerate(loads):
            for j, size in enumerate(sizes):
                yield labels | {
                    "load": load, "distance": size, "radius": radii[i], "curvature": least[i], "method": method,
                    "eta": eta[i], "predicted": float(predicted[i, j]), "measured": float(found.time[i, j]),
                    "predicted_rate": float(rate[i]), "rate": float(found.rate[i, j]),
                    "outcome": Outcome(int(found.outcome[i, j])).name,
                }  # fmt: skip

    for beta in config.momenta:
        for eta in config.etas:
            method = Method(jnp.asarray(eta / largest), beta)
            predicted = escape_steps(least[:, None], sizes, radii[:, None], Method(method.eta[:, None], beta))
            steps = int(np.ceil(1.05 * predicted.max())) + 5
            found = over(
                lambda p, c, x, r, eta, beta=beta, steps=steps: departure(p, c, x, r, Method(eta, beta), steps),
                method.eta,
            )
            rate = escape_rate(least, method) * method.eta
            yield from rows(found, predicted, rate, f"momentum {beta:g}" if beta else "gradient descent", method.eta)
    predicted = escape_time(least[:, None], sizes, radii[:, None])
    found = over(flow_departure, jnp.asarray(1.05 * predicted.max(1)))
    yield from rows(found, predicted, -least, "flow", np.zeros(len(loads)))


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)


def _arrivals(config: Config, K: int) -> Iterator[dict[str, Any]]:
    """Rows of one K's optimum: the rate at which ‖∇f‖ falls from a start near it."""
    for load in config.loads:
        problem = _problem(config, K, load, 1.0)
        spectrum, best = hessian_spectrum(problem), global_minimiser(problem)
        near = random_start(problem, best, 0.1 * optax.tree.norm(best), jax.random.key(config.seed))
        for beta in (0.0, *config.terminal_momenta):
            method = Method(1 / float(spectrum.eigenvalues.max()), beta)
            rate = float(terminal_rate(spectrum, method))
            swings = beta > 0 and rate >= -np.log(beta) / 2 * (1 - 1e-12)
            steps = int(np.log(1e13) / rate)
            yield {
                "K": K, "load": load, "method": f"momentum {beta:g}" if beta else "gradient descent",
                "eta": method.eta, "complex": swings, "predicted_rate": rate,
                "rate": _terminal_rate(problem, near, method, steps, SWINGING if swings else FALL),
            }  # fmt: skip


def _terminal_rate(problem: Problem, near: Params, method: Method, steps: int, fall: tuple[float, float]) -> float:
    """The slope of log max_{j ≥ k} ‖∇f(x_j)‖ over the steps k by least squares, within a fall."""
    fun = Partial(objective, problem)
    step, slope = optax.sgd(method.eta, method.momentum), Partial(gradient_norm, fun)
    found = descend(fun, near, step, steps, observe=slope)
    norm = np.maximum.accumulate(np.asarray(found.observed)[::-1])[::-1]
    used = np.flatnonzero((norm < fall[0] * norm[0]) & (norm > fall[1] * norm[0]))
    return -float(np.polyfit(used, np.log(norm[used]), 1)[0])


def _random(config: Config) -> dict[str, Any]:
    """Steps to leave the origin of K = 10 from random directions, and their predicted mean and spread."""
    problem = _problem(config, 10, config.loads[-1], config.ratio)
    origin, size = coarse_etf(problem, 1), config.distances[0]
    levels = hessian_spectrum(problem, "origin")
    curvature, variables = float(levels.eigenvalues.min()), sum(levels.multiplicities)
    method = Method(1 / float(levels.eigenvalues.max()))
    mean, deviation = projection_loss(levels.index, variables)
    growth = float(log_factor(curvature, method))
    predicted = float(escape_steps(curvature, size, config.radius, method)) + float(mean) / growth
    steps = int(np.ceil(predicted + 10 * float(deviation) / growth)) + 5

    @jax.jit
    @jax.vmap
    def run(key: Array) -> Array:
        return departure(problem, origin, random_start(problem, origin, size, key), config.radius, method, steps).time

    found = np.asarray(run(jax.random.split(jax.random.key(config.seed), config.random)))
    return {
        "K": 10, "unstable": levels.index, "variables": variables, "predicted_mean": predicted,
        "predicted_deviation": float(deviation) / growth, "mean": found.mean(), "deviation": found.std(ddof=1),
        "steps": found,
    }  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.escape"))
