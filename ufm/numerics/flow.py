"""The gradient flow of any scalar function of any pytree, with events, saying how it ended."""

from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PyTree

from ufm.numerics.dynamics import Fate, is_finite, judge, masked, nothing
from ufm.numerics.minimise import as_pytree_function

MOST_STEPS = 1_000_000  # after which a flow counts as lost


class Flow(eqx.Module):
    """What the gradient flow did.

    Attributes:
        params: the last point.
        value: fun there.
        time: when it was reached.
        fate: a Fate.
        event: which of `until` stopped it; −1 if none did in the time given.
        at: times of the records.
        observed: what was observed at them, a leading axis for the records; NaN after the end.
    """

    params: PyTree
    value: Float[Array, "..."]
    time: Float[Array, "..."]
    fate: Int[Array, "..."]
    event: Int[Array, "..."]
    at: Float[Array, "... records"]
    observed: PyTree


def gradient_flow(
    fun: Callable[[PyTree], Float[Array, ""]],
    params: PyTree,
    time: float | Array,
    *,
    until: Sequence[Callable[[PyTree], Float[Array, ""]]] = (),
    observe: Callable[[PyTree], PyTree] | None = None,
    at: Sequence[float] | np.ndarray | Array = (),
    rtol: float | Array = 1e-8,
    atol: float | Array = 1e-12,
) -> Flow:
    """dx/dt = −∇fun(x) from params, by the method of Tsitouras (order 5) with adaptive steps (diffrax).

    The displacement from params is what is integrated, so that tolerances are relative to it: near a saddle far from
    zero it can be smaller than the rounding of a relative error in x.

    Args:
        fun: a scalar function of a pytree of floating arrays.
        params: where to start.
        time: how long.
        until: functions of the point; the flow stops where the first of them changes sign, as left_ball and
            small_gradient do. What is past at the start already does not stop it.
        observe: what to record of a point, floating arrays; nothing if None.
        at: times of the records, ascending, from 0 to time.
        rtol: relative tolerance on each step.
        atol: absolute tolerance on each step, in units of x; to be far below the distance from a saddle that is left.

    Raises:
        ValueError: if `at` is not ascending within 0 and time, or time is negative, where they are known.
    """
    _check_times(time, at)
    observe = as_pytree_function(nothing if observe is None else observe)
    events = tuple(as_pytree_function(event) for event in until)
    return _flow(as_pytree_function(fun), params, time, events, observe, jnp.asarray(at, float), rtol, atol)


def _check_times(time: Any, at: Any) -> None:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((time, at))):
        return
    if not time >= 0:
        raise ValueError(f"time must be at least 0, got {time}")
    if len(at) and not (np.all(np.diff(at) > 0) and at[0] >= 0 and at[-1] <= time):
        raise ValueError(f"at must be ascending times from 0 to {time}, got {list(map(float, at))}")


@jax.jit
def _flow(
    fun: Partial, params: PyTree, time: Any, events: tuple, observe: Partial, at: Array, rtol: Any, atol: Any
) -> Flow:
    gradient = jax.grad(fun)

    def point(y: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, params, y)

    def field(t: Any, y: PyTree, args: Any) -> PyTree:
        return jax.tree.map(jnp.negative, gradient(point(y)))

    def ahead(x: PyTree) -> Array:
        """The events, all positive until they happen."""
        return jnp.stack([jnp.where(event(params) < 0, -1, 1) * event(x) for event in events])

    def condition(t: Any, y: PyTree, args: Any, **kwargs: Any) -> Array:
        return jnp.min(ahead(point(y)))

    saved = [diffrax.SubSaveAt(t1=True)]
    if at.size:
        saved.append(diffrax.SubSaveAt(ts=at, fn=lambda t, y, args: observe(point(y))))
    root: Any = optimistix.Newton(1e-8, 1e-8)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field), diffrax.Tsit5(), 0.0, time, None, jax.tree.map(jnp.zeros_like, params),
        saveat=diffrax.SaveAt(subs=saved),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        event=diffrax.Event(condition, root) if events else None,
        adjoint=diffrax.ForwardMode(), max_steps=MOST_STEPS, throw=False,
    )  # fmt: skip
    x = point(jax.tree.map(lambda y: y[0], solution.ys[0]))
    end, value = solution.ts[0][0], fun(x)
    event = jnp.where(solution.event_mask, jnp.argmin(ahead(x)), -1) if events else jnp.array(-1)
    observed = jax.vmap(masked)(solution.ys[1], (at <= end) & is_finite(params)) if at.size else None
    spent = solution.result == diffrax.RESULTS.max_steps_reached
    fate = judge(fun(params), value, is_finite((x, end)))
    fate = jnp.where(spent & (fate != Fate.NOT_FINITE), Fate.STEP_LIMIT, fate)
    return Flow(x, value, end, fate, event, at, observed)


def left_ball(centre: PyTree, radius: float | Array) -> Partial:
    """x ↦ log(‖x − centre‖/radius), which changes sign where the ball is left."""
    return Partial(_log_distance, centre, radius)


def small_gradient(fun: Callable[[PyTree], Float[Array, ""]], tol: float | Array) -> Partial:
    """x ↦ log(‖∇fun(x)‖/tol), which changes sign where the gradient becomes small."""
    return Partial(_log_gradient, as_pytree_function(fun), tol)


def distance(x: PyTree, centre: PyTree) -> Float[Array, ""]:
    """‖x − centre‖, Euclidean over all leaves."""
    return optax.tree.norm(jax.tree.map(jnp.subtract, x, centre))


def gradient_norm(fun: Callable[[PyTree], Float[Array, ""]], x: PyTree) -> Float[Array, ""]:
    """‖∇fun(x)‖, Euclidean over all leaves."""
    return optax.tree.norm(jax.grad(fun)(x))


def _log_distance(centre: PyTree, radius: Any, x: PyTree) -> Array:
    return jnp.log(jnp.maximum(distance(x, centre), jnp.finfo(float).tiny) / radius)


def _log_gradient(fun: Partial, tol: Any, x: PyTree) -> Array:
    return jnp.log(gradient_norm(fun, x) / tol)
