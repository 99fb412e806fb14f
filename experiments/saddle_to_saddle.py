"""From saddle to saddle: which critical points small and tied starts pass, and when each is left (THEORY 3.4, 8.3)."""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ufm import Params, Problem, balanced, critical_points, hessian_spectrum, imbalanced, init, optimal_value
from ufm.lab.courses import course, rests
from ufm.lab.escapes import random_start
from ufm.lab.landscape import atlas_rows
from ufm.lab.optimisers import optimiser
from ufm.lab.paths import landmarks, nearest
from ufm.lab.plots_rates import draw_fall, draw_journeys
from ufm.lab.records import write_run
from ufm.theory.escape import predicted_curvature
from ufm.theory.imbalance import minority_threshold
from ufm.theory.optimum import origin
from ufm.theory.rates import Method, escape_steps

TOLERANCE = 0.03  # relative, of the steps predicted
STEP = 0.3  # in units of 1/λ_max at the origin
GROWN = 0.01  # of its final size, from which on a contrast counts as grown


@dataclass(frozen=True)
class Config:
    """Two journeys of gradient descent: unequal classes from near zero, and equal classes from a tied start."""

    out: tyro.conf.Positional[Path]
    """New folder for the record, journeys.png and fall.gif."""
    counts: tuple[int, ...] = (30, 30, 30, 1, 1)
    """Class sizes of the first journey."""
    lams: tuple[float, float] = (1e-2, 1e-3)
    """Its λ_W and λ_H; the bias is free."""
    scale: float = 1e-8
    """Distance of its start from W = H = 0."""
    K: int = 6
    """Classes of the second, two samples each."""
    load: float = 0.3
    """Its K√n s, with λ_W = λ_H."""
    splits: tuple[float, ...] = (1e-4, 1e-8, 1e-13)
    """Its start: differences between 012 and 345; between 0 and 12; between all others."""
    steps: int = 15_000
    """Of each."""
    every: int = 5
    """Steps between records."""
    seed: int = 0
    """Of the starts."""


def main(config: Config) -> Path:
    """Assert that both end at the optimum and that contrasts within a tied group grow when predicted; draw."""
    jax.config.update("jax_enable_x64", True)
    start, key = time.perf_counter(), jax.random.key(config.seed)
    unequal = imbalanced(config.counts, len(config.counts) + 2, lam_W=config.lams[0], lam_H=config.lams[1])
    s = config.load / (config.K * 2**0.5)
    equal = balanced(config.K, 2, config.K + 2, lam_W=s, lam_H=s)
    starts = random_start(unequal, origin(unequal), config.scale, key), _tied_start(equal, config, key)
    journeys, arrays, ways = [], {}, {}
    for name, problem, x in zip(("unequal", "tied"), (unequal, equal), starts, strict=True):
        journey, kept, ways[name] = _journey(config, problem, x)
        journeys.append({"name": name} | journey)
        arrays |= {f"{name} {key}": value for key, value in kept.items()}
    atlas = atlas_rows(critical_points(equal))
    arrays |= _frames(equal, ways["tied"], [row["groups"] for row in atlas])
    folder = write_run(config.out, config, {"journeys": journeys, "atlas": atlas}, arrays, start=start)
    draw_journeys(folder)
    draw_fall(folder)
    return folder


def _tied_start(problem: Problem, config: Config, key: Any) -> Params:
    """Random rows and features, one for every group of each of three partitions, at their sizes."""
    K = config.K
    groupings = np.arange(K) // (K // 2), np.minimum(np.arange(K), 1) + (np.arange(K) >= K // 2), np.arange(K)
    x = init(problem, key, scale=0.0)
    for i, (group, size) in enumerate(zip(groupings, config.splits, strict=True)):
        drawn = init(problem, jax.random.fold_in(key, i), scale=size)
        first = np.searchsorted(np.asarray(problem.Y).argmax(0), group)
        x = Params(x.W + drawn.W[group], x.H + drawn.H[:, first] @ problem.Y, x.b)
    return x


def _frames(problem: Problem, kept: dict[str, np.ndarray], atlas: list[str]) -> dict[str, np.ndarray]:
    """The way down to f − f* = 1e-6: step, f, classifier, and which kind of saddle of the atlas is nearest."""
    marks, excess = landmarks(problem), kept["value"] - float(optimal_value(problem))
    used = slice(0, int(np.flatnonzero(excess > 1e-6).max()) + 1)
    index, _ = nearest(marks, Params(*(jnp.asarray(kept[name][used]) for name in ("W", "M", "b"))))
    kinds = ["+".join(map(str, sorted(map(len, partition), reverse=True))) for partition in marks.partitions]
    near = np.array([atlas.index(kinds[i]) for i in index])
    return {"frame step": kept["step"][used], "frame value": kept["value"][used], "frame W": kept["W"][used],
            "frame nearest": near}  # fmt: skip


def _journey(
    config: Config, problem: Problem, x: Params
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What is passed on the way down, and when each contrast of classes grows; what to keep of the way; the way."""
    eta = STEP / float(hessian_spectrum(problem, "origin").eigenvalues.max())
    end, kept = course(problem, optimiser(problem, "sgd", eta), x, config.steps, every=config.every)
    excess = float(end.value - optimal_value(problem))
    assert 0 <= excess + 1e-12 < 1e-9, excess
    contrasts = _contrasts(problem, x, kept, Method(eta))
    off = max(abs(row["measured"] / row["predicted"] - 1) for row in contrasts)
    assert off < TOLERANCE, contrasts
    marks = landmarks(problem)
    index, away = nearest(marks, Params(*(jnp.asarray(kept[name]) for name in ("W", "M", "b"))))
    passed = rests(problem, marks, kept)
    journey = {"eta": eta, "excess": excess, "passed": passed, "contrasts": contrasts}
    journey |= {"landmarks": marks.names, "landmark_values": marks.values, "optimum": float(optimal_value(problem))}
    names = ("step", "value", "grad_norm", "gap", "nc0", "nc1", "nc2", "nc3")
    return journey, {name: kept[name] for name in names} | {"nearest": index, "distance": away}, kept


def _contrasts(problem: Problem, x: Params, kept: dict[str, np.ndarray], method: Method) -> list[dict[str, Any]]:
    """When the rows of two classes of equal size come apart, predicted from the start alone.

    As long as they are tied the difference of their rows and √n times that of their features see the curvature of
    [[λ_W, −σ], [−σ, λ_H]], σ = √n/N, outside the row space of W, whatever else happens (THEORY 3.4).
    """
    counts, rows = np.asarray(problem.counts), []
    W0, M0 = np.asarray(x.W), np.asarray(x.H @ (problem.Y / counts[:, None]).T)
    for i, j in itertools.combinations(range(problem.K), 2):
        if counts[i] == counts[j]:
            sigma = float(minority_threshold(problem)[i])
            curvature = float(predicted_curvature(problem, jnp.asarray(sigma)))
            along = np.array([sigma, float(problem.lam_W) - curvature])
            along /= np.linalg.norm(along)
            size = np.linalg.norm(along[0] * (W0[i] - W0[j]) + along[1] * counts[i] ** 0.5 * (M0[:, i] - M0[:, j]))
            apart = np.linalg.norm(kept["W"][:, i] - kept["W"][:, j], axis=1)
            level = GROWN * apart[-1]
            predicted = float(escape_steps(curvature, along[0] * size, level, method))
            rows.append({"classes": [i, j], "predicted": predicted, "measured": _first(kept["step"], apart, level)})
    return rows


def _first(step: np.ndarray, size: np.ndarray, level: float) -> float:
    """The step from which on the size exceeds the level, between records by its logarithm."""
    i = int(np.flatnonzero(size < level).max()) + 1
    low, high = np.log(size[i - 1 : i + 1])
    return float(step[i - 1] + (np.log(level) - low) / (high - low) * (step[i] - step[i - 1]))


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.saddle_to_saddle"))
