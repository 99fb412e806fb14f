"""The table of escapes: how long a saddle holds starts at several distances, measured beside predicted."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key
from tqdm import tqdm

from ufm.lab.atlas import CriticalPoint, critical_point, critical_points
from ufm.lab.escapes import Departure, Outcome, departure, flow_departure, random_start, steepest_start
from ufm.model.problem import Problem, check_integer, objective
from ufm.numerics.curvature import hessian_operator
from ufm.numerics.eigenpairs import extreme_eigenpairs
from ufm.theory.atlas import check_partition
from ufm.theory.optimum import is_balanced
from ufm.theory.rates import Method, escape_rate, escape_steps, escape_time, projection_loss, step_limit

SLACK, MORE = 1.25, 10  # so many times the steps predicted are taken, and so many more
SPREADS = 4  # standard deviations by which a random start may be later than its mean
MOST = 50_000_000  # distances that are recorded at once
Row = dict[str, Any]


def escape_table(
    problem: Problem, groups: Sequence[int], distances: Sequence[float], radius: float, *,
    eta: float | None = None, momentum: float = 0.0, nesterov: bool = False, seeds: int = 0,
    key: Key[Array, ""], quiet: bool = True,
) -> tuple[Row, dict[str, np.ndarray]]:  # fmt: skip
    """Steps in which optax.sgd, and the time in which the gradient flow leaves a saddle, measured beside predicted.

    From every distance one start lies along the steepest direction, an eigenvector of λ_min, and `seeds` lie in
    isotropic random directions, whose predicted mean and standard deviation are those of projection_loss for the
    (d − rank W) Σ (g − 1) copies of λ_min, over the merged groups of the largest classes, g classes each. That holds
    where λ_min alone is negative, as at the origin of equal counts; elsewhere other negative eigenvalues let random
    starts leave sooner. What is not measured is None: its outcome says why.

    Args:
        problem: cross-entropy, concrete, a column per sample.
        groups: sizes of the saddle's groups of classes; if none are given, all classes of one size are merged, which
            is the origin for equal counts.
        distances: from the saddle at the start.
        radius: where the saddle counts as left.
        eta: step size; 1/(2λ_max) at the saddle if None.
        momentum: β.
        nesterov: Nesterov's form.
        seeds: random starts from every distance.
        key: for them, and for λ_max.
        quiet: without a progress bar.

    Returns:
        The table, and arrays: distance, steps and time (steepest), random (a row per distance); NaN where not LEFT.

    Raises:
        ValueError: if a number is out of range, or there is no such saddle with negative curvature.

    Source: THEORY 1.4; momentum and random starts derived for this project.
    """
    _check(distances, radius, eta, momentum)
    check_integer("seeds", seeds, at_least=0)
    saddle_key, largest_key, start_key = jax.random.split(key, 3)
    saddle = _saddle(problem, groups, saddle_key)
    product = hessian_operator(partial(objective, problem), saddle.params)
    largest = float(extreme_eigenpairs(product, saddle.params, 1, "largest", largest_key).eigenvalues[0])
    method = Method(0.5 / largest if eta is None else eta, momentum, nesterov)
    limit = float(step_limit(largest, method))
    own = [jax.random.fold_in(start_key, i) for i in range(len(distances))]
    keys = [[jax.random.fold_in(k, j) for j in range(seeds)] for k in own]
    starts = tqdm(list(zip(distances, keys, strict=True)), desc="escapes", disable=quiet, leave=False)
    rows, times = zip(*(_row(problem, saddle, size, radius, method, drawn) for size, drawn in starts), strict=True)
    table = {
        "saddle": _described(problem, saddle) | {"largest_eigenvalue": largest},
        "method": method._asdict() | {"step_limit": limit, "above_limit": method.eta >= limit},
        "radius": radius, "seeds": seeds, "escapes": list(rows),
    }  # fmt: skip
    return table, {name: np.array([row[name] for row in times]) for name in times[0]}


def _check(distances: Sequence[float], radius: float, eta: float | None, momentum: float) -> None:
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be positive and finite, got {radius}")
    if not distances:
        raise ValueError("distances must be at least one number, got none")
    for distance in distances:
        if not 0 < distance < radius:
            raise ValueError(f"distances must be positive and smaller than radius = {radius:g}, got {distance:g}")
    if eta is not None and not 0 < eta < math.inf:
        raise ValueError(f"eta must be positive and finite, got {eta}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")


def _points(problem: Problem, groups: Sequence[int], key: Key[Array, ""]) -> tuple[CriticalPoint, ...]:
    """The one of these groups where counts are equal; the coarsest and the finest; or all."""
    if not groups:
        return critical_points(problem, samples=2, key=key)
    if not is_balanced(problem) or sum(groups) != problem.K or min(groups) < 1 or len(groups) > problem.d + 1:
        return critical_points(problem)
    cuts = np.cumsum(groups)[:-1]
    return (critical_point(problem, check_partition(problem.K, np.split(np.arange(problem.K), cuts))),)


def _saddle(problem: Problem, groups: Sequence[int], key: Key[Array, ""]) -> CriticalPoint:
    """The partition saddle of these group sizes, or the coarsest."""
    points = _points(problem, groups, key)
    wanted = [p for p in points if p.groups == tuple(sorted(groups, reverse=True))] if groups else [points[-1]]
    if not wanted:
        listed = ", ".join(dict.fromkeys(_sum(p.groups) for p in points if p.index > 0)) or "there is none"
        raise ValueError(f"saddle must be the group sizes of a saddle of this problem ({listed}), got {list(groups)}")
    point = wanted[0]
    if point.index == 0:
        raise ValueError(
            f"saddle must have negative curvature, and the point of groups {_sum(point.groups)} has none: "
            "merge more classes, or take smaller lam_W and lam_H"
        )
    if point.rank == problem.d:
        raise ValueError(
            f"d must exceed the rank {point.rank} of W at the saddle, for its steepest direction to be known"
        )
    return point


def _sum(groups: Sequence[int]) -> str:
    return "+".join(map(str, groups))


def _described(problem: Problem, saddle: CriticalPoint) -> Row:
    return {
        "groups": _sum(saddle.groups),
        "value": saddle.value,
        "rank": saddle.rank,
        "index": saddle.index,
        "smallest_eigenvalue": saddle.smallest_eigenvalue,
        "multiplicity": unstable_multiplicity(problem, saddle),
        "variables": _variables(problem),
    }


def unstable_multiplicity(problem: Problem, saddle: CriticalPoint) -> int:
    """How often λ_min of a partition saddle with rank W < d is repeated: (d − rank W) Σ (g − 1).

    Over its groups of g > 1 of the largest classes that are merged at all; (d − rank W)(K − groups) for equal counts.

    Source: THEORY 8.3, merged_block.
    """
    counts = np.asarray(problem.counts).astype(int)
    merged: Counter[int] = Counter()
    for group in saddle.partition:
        merged[int(counts[group[0]])] += len(group) - 1
    return (problem.d - saddle.rank) * next(merged[n] for n in sorted(merged, reverse=True) if merged[n])


def _variables(problem: Problem) -> int:
    K, N = problem.Y.shape
    return (K + N) * problem.d + K * problem.use_bias


def _row(
    problem: Problem, saddle: CriticalPoint, distance: float, radius: float, method: Method, keys: list[Array]
) -> tuple[Row, Row]:
    """A row of the table, and the steps and times measured."""
    c, x = saddle.smallest_eigenvalue, saddle.params
    loss, spread = map(float, projection_loss(unstable_multiplicity(problem, saddle), _variables(problem)))
    steps, rate, time = (
        float(predicted)
        for predicted in (
            escape_steps(c, distance, radius, method),
            escape_rate(c, method) * method.eta,
            escape_time(c, distance, radius),
        )
    )
    latest = float(escape_steps(c, distance * math.exp(-loss - SPREADS * spread), radius, method)) if keys else steps
    allowed = _allowed(latest, len(keys))
    starts = [steepest_start(problem, x, distance), *(random_start(problem, x, distance, key) for key in keys)]
    leave = partial(departure, problem, x, radius=radius, method=method, steps=allowed)
    left = jax.vmap(lambda start: leave(start))(jax.tree.map(lambda *parts: jnp.stack(parts), *starts))
    flow = flow_departure(problem, x, starts[0], radius, SLACK * time)
    steepest = jax.tree.map(lambda part: part[0], left)
    row = {
        "distance": distance,
        "steps": _beside(steps, steepest.time),
        "rate": _beside(rate, steepest.rate),
        "outcome": _name(steepest),
        "flow_time": _beside(time, flow.time),
        "flow_rate": _beside(-c, flow.rate),
        "flow_outcome": _name(flow),
        "steps_allowed": allowed,
    }
    times = np.asarray(left.time)
    if keys:
        mean = float(escape_steps(c, distance * math.exp(-loss), radius, method))
        row["random"] = {"predicted_mean": mean, "predicted_sd": spread / rate} | _spread(times[1:], left)
    return row, {"distance": distance, "steps": times[0], "time": float(flow.time), "random": times[1:]}


def _allowed(latest: float, seeds: int) -> int:
    steps = math.ceil(min(SLACK * latest, MOST)) + MORE
    if steps * (1 + seeds) > MOST:
        raise ValueError(
            f"eta must be larger, distances larger or seeds fewer: escapes of {latest:.1e} steps are predicted, "
            f"and starts times steps may be {MOST:.0e}"
        )
    return steps


def _beside(predicted: float, measured: Array) -> Row:
    found = float(measured) if math.isfinite(measured) else None
    return {
        "predicted": predicted,
        "measured": found,
        "deviation": None if found is None else found / predicted - 1,
    }


def _name(left: Departure) -> str:
    return Outcome(int(left.outcome)).name


def _spread(times: np.ndarray, left: Departure) -> Row:
    """Mean and standard deviation of random starts' steps if all have left, and how each has ended."""
    all_left = bool(np.isfinite(times).all())
    outcomes = Counter(Outcome(int(outcome)).name for outcome in np.asarray(left.outcome)[1:])
    return {
        "mean": float(times.mean()) if all_left else None,
        "sd": float(times.std(ddof=1)) if all_left and len(times) > 1 else None,
        "outcomes": dict(outcomes),
    }
