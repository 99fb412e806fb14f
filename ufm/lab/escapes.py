"""Escape times: how long a saddle holds a start, measured beside what theory predicts."""

import enum
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from ufm.model.problem import Params, Problem, is_concrete, logits, objective
from ufm.numerics.dynamics import Fate, descend, judge
from ufm.numerics.flow import distance, gradient_flow, left_ball
from ufm.theory.escape import escape_direction
from ufm.theory.rates import Method

FLOW_ACCURACY = 1e-8  # of the flow's steps, relative to the start's distance
ROUNDINGS = 64  # units of the saddle's last place within which a start counts as on it


class Outcome(enum.IntEnum):
    """Whether a saddle was left.

    STAYED: not within the steps or the time given. ON_SADDLE: the start is the saddle to rounding, so that nothing but
    rounding errors could leave it. DIVERGED: f was above its start where the ball was left, or at the end if it was
    not, as with steps too large. NOT_FINITE: f or the point was inf or NaN before. OUTSIDE: the start was not inside.
    STEP_LIMIT: the flow ran out of steps.
    """

    LEFT = 0
    STAYED = 1
    ON_SADDLE = 2
    DIVERGED = 3
    NOT_FINITE = 4
    OUTSIDE = 5
    STEP_LIMIT = 6


FAILED = {
    Fate.NOT_FINITE: Outcome.NOT_FINITE,
    Fate.DIVERGED: Outcome.DIVERGED,
    Fate.STEP_LIMIT: Outcome.STEP_LIMIT,
}


class Departure(eqx.Module):
    """How a trajectory left the ball of some radius about a critical point.

    Attributes:
        time: steps, or the time of the flow, until then, interpolated in the logarithm of the distance.
        rate: growth of log distance per step (or unit of time) from the geometric mean of the start's distance and the
            radius to the radius; both NaN unless LEFT.
        outcome: an Outcome.
    """

    time: Float[Array, "..."]
    rate: Float[Array, "..."]
    outcome: Int[Array, "..."]


def steepest_start(problem: Problem, saddle: Params, size: float | Array) -> Params:
    """The point at this distance from a partition saddle along its steepest direction (THEORY 0), an eigenvector.

    Raises:
        ValueError: if a column of the problem stands for more than one sample, as in departure.
    """
    _check_columns(problem)
    v = escape_direction(problem, saddle, problem.loss.residual(logits(problem, saddle), problem.Y))
    return jax.tree.map(lambda a, da: a + size * da, saddle, v)


def random_start(problem: Problem, saddle: Params, size: float | Array, key: Key[Array, ""]) -> Params:
    """The point at this distance from a saddle in an isotropic random direction of all variables.

    Raises:
        ValueError: as steepest_start does.
    """
    _check_columns(problem)
    keys = jax.tree.unflatten(jax.tree.structure(saddle), jax.random.split(key, 3))
    v = jax.tree.map(lambda x, k: jax.random.normal(k, jnp.shape(x)), saddle, keys)
    v = v if problem.use_bias else eqx.tree_at(lambda p: p.b, v, 0 * v.b)
    return jax.tree.map(lambda a, da: a + size / optax.tree.norm(v) * da, saddle, v)


def _check_columns(problem: Problem) -> None:
    if is_concrete(problem.multiplicity) and not bool(np.all(np.asarray(problem.multiplicity) == 1)):
        raise ValueError("problem must have a column for every sample, as balanced and imbalanced make it, to descend")


def departure(
    problem: Problem, saddle: Params, start: Params, radius: float | Array, method: Method, steps: int
) -> Departure:
    """When optax.sgd(η, β) from a start leaves the ball about a saddle, within so many steps; vmap goes through it.

    Args:
        problem: the model.
        saddle: a critical point, the centre of the ball.
        start: inside the ball. On the saddle itself, to rounding, the outcome is ON_SADDLE whatever rounding grows to.
        radius: of the ball.
        method: the step; η and β may be traced.
        steps: the most that are taken; all are.

    Raises:
        ValueError: if a column stands for more than one sample, whose descent is another than theory's.
    """
    _check_columns(problem)
    optimiser = optax.sgd(method.eta, method.momentum, method.nesterov)
    seen = Partial(_distance_and_value, problem, saddle)
    found = descend(Partial(objective, problem), start, optimiser, steps, observe=seen)
    sizes, values = found.observed
    logs = jnp.log(jnp.maximum(sizes, jnp.finfo(sizes.dtype).tiny))
    end, middle = (_crossing(logs, level) for level in (jnp.log(radius), (jnp.log(radius) + logs[0]) / 2))
    rate = (jnp.log(radius) - logs[0]) / 2 / (end - middle)
    left = jnp.isfinite(end)
    there = values[jnp.argmax(logs > jnp.log(radius))]
    fate = jnp.where(left, judge(values[0], there, jnp.isfinite(there)), found.fate)
    return _departure(saddle, sizes[0], radius, end, rate, left, fate)


def _departure(
    saddle: Params, size: Array, radius: Any, time: Array, rate: Array, left: Array, fate: Array
) -> Departure:
    rounding = ROUNDINGS * jnp.finfo(size.dtype).eps * optax.tree.norm(saddle)
    outcome = jnp.select(
        [~jnp.isfinite(size), size <= rounding, ~(size < radius), *(fate == x for x in FAILED), left],
        [Outcome.NOT_FINITE, Outcome.ON_SADDLE, Outcome.OUTSIDE, *FAILED.values(), Outcome.LEFT],
        Outcome.STAYED,
    )
    time, rate = (jnp.where(outcome == Outcome.LEFT, x, jnp.nan) for x in (time, rate))
    return Departure(time, rate, outcome)


def _distance_and_value(problem: Problem, centre: Params, x: Params) -> tuple[Array, Array]:
    return distance(x, centre), objective(problem, x)


def _crossing(logs: Float[Array, " records"], level: Array) -> Array:
    """Where a sequence first exceeds a level, linearly interpolated; NaN if it does not."""
    above = logs > level
    i = jnp.maximum(jnp.argmax(above), 1)
    return jnp.where(above.any(), i - 1 + (level - logs[i - 1]) / (logs[i] - logs[i - 1]), jnp.nan)


def flow_departure(
    problem: Problem, saddle: Params, start: Params, radius: float | Array, time: float | Array
) -> Departure:
    """When the gradient flow from a start leaves the ball about a saddle, within so much time."""
    _check_columns(problem)
    fun, size = Partial(objective, problem), distance(start, saddle)
    finest = jnp.finfo(size.dtype).eps * 1e-4  # below which float32 would take no step
    flow = partial(gradient_flow, fun, start, time, atol=jnp.clip(FLOW_ACCURACY * size, finest, 1e-12))
    middle, end = (flow(until=[left_ball(saddle, level)]) for level in (jnp.sqrt(size * radius), radius))
    rate = jnp.log(radius / size) / 2 / (end.time - middle.time)
    return _departure(saddle, size, radius, end.time, rate, end.event == 0, end.fate)
