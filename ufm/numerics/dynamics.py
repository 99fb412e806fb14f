"""Trajectories of optimisers, for any scalar function of any pytree, saying how they ended."""

import enum
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key, PyTree

from ufm.numerics.minimise import as_pytree_function

ROUNDINGS = 16  # units of f's last place by which a value that has not changed may differ


class Fate(enum.IntEnum):
    """How a trajectory ended.

    STILL: f is what it was at the start, to rounding, as from a critical point (a saddle amplifies rounding errors, and
    is left at last). DIVERGED: f ended above its start, as with steps that are too large. NOT_FINITE: the point was inf
    or NaN at a record, or f was at the start or the end. STEP_LIMIT: a flow ran out of steps before its time: f is too
    stiff for them, or it runs off to infinity before.
    """

    DESCENDED = 0
    STILL = 1
    DIVERGED = 2
    NOT_FINITE = 3
    STEP_LIMIT = 4


class Trajectory(eqx.Module):
    """What an optimiser did.

    Attributes:
        params: the last point that was recorded as finite.
        value: fun there; if fun draws, with the key that was given.
        steps: taken to get there, in all.
        fate: a Fate; with a fun that draws or an optimiser that adds noise, DIVERGED may be noise.
        at: step numbers of the records, the first one that of the start.
        observed: what was observed, a leading axis for the records; floats are NaN once the point is not finite.
        start_value: fun at step 0.
        state: the optimiser's, with which descend goes on.
    """

    params: PyTree
    value: Float[Array, "..."]
    steps: Int[Array, "..."]
    fate: Int[Array, "..."]
    at: Int[Array, "... records"]
    observed: PyTree
    start_value: Float[Array, "..."]
    state: PyTree


def descend(
    fun: Callable[..., Float[Array, ""]],
    params: PyTree | Trajectory,
    optimiser: optax.GradientTransformation,
    steps: int,
    *,
    observe: Callable[[PyTree], PyTree] | None = None,
    every: int = 1,
    key: Key[Array, ""] | None = None,
) -> Trajectory:
    """x_{k+1} = x_k + updates of the optimiser at ∇fun(x_k), in one compiled scan that keeps only what is observed.

    Compiled once per function, optimiser and shapes: pass data as functools.partial(fun, data). jit and vmap go
    through it, also over hyper-parameters of an optimiser made inside the mapped function. The numbers of a seed are
    the same bit for bit on one machine, in one go or continued by two steps or more (a loop of one step is compiled
    into something else, which may round otherwise).

    Args:
        fun: a scalar function of a pytree of floating arrays; if a key is given, of a pytree and a key.
        params: where to start, or a Trajectory of the same optimiser to go on with, whose last point is then the first
            record.
        optimiser: of optax, also one that searches lines.
        steps: how many, a multiple of `every`.
        observe: what to record of a point; nothing if None.
        every: steps between records; whether the point is finite is seen there too.
        key: for a fun that draws, as a mini-batch: step k gets fold_in(key, k).

    Raises:
        ValueError: if steps is no multiple of every, either is no integer or too small, or a Trajectory's state is not
            of this optimiser's form.
    """
    check_steps(steps, every)
    if isinstance(params, Trajectory):
        _check_state(optimiser, params)
    observe = as_pytree_function(nothing if observe is None else observe)
    begun = params if isinstance(params, Trajectory) else None
    return _descend(as_pytree_function(fun), params, begun is None, optimiser, steps // every, every, observe, key)


def check_steps(steps: int, every: int) -> None:
    """Refuse steps that are no multiple of every."""
    if not all(isinstance(x, int | np.integer) for x in (steps, every)) or every < 1 or steps < 0 or steps % every:
        raise ValueError(f"steps must be a multiple of every ≥ 1, got steps = {steps}, every = {every}")


def _check_state(optimiser: optax.GradientTransformation, begun: Trajectory) -> None:
    wanted: Any = jax.tree.structure(jax.eval_shape(optimiser.init, begun.params))
    if jax.tree.structure(begun.state) != wanted:
        raise ValueError("optimiser must be the one of the trajectory that it goes on with; its state has another form")


def nothing(x: PyTree) -> None:
    """What is recorded of a point where nobody observes."""


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _descend(
    fun: Partial, params: Any, fresh: bool, optimiser: Any, records: int, every: int, observe: Partial, key: Any
) -> Trajectory:
    update = optax.with_extra_args_support(optimiser).update

    def step(carry: tuple, number: Array) -> tuple[tuple, None]:
        x, state = carry
        now = fun if key is None else functools.partial(_with_key, fun, jax.random.fold_in(key, number))
        value, grad = jax.value_and_grad(now)(x)
        updates, state = update(grad, state, x, value=value, grad=grad, value_fn=now)
        return (optax.apply_updates(x, updates), state), None

    def record(carry: tuple, _: None) -> tuple[tuple, PyTree]:
        x, state, number, alive = carry
        moved, _ = jax.lax.scan(step, (x, state), number + jnp.arange(every))
        alive = alive & is_finite(moved[0])
        x, state = jax.tree.map(functools.partial(jnp.where, alive), moved, (x, state))
        return (x, state, number + every * alive, alive), masked(observe(x), alive)

    fun_at = fun if key is None else functools.partial(_with_key, fun, key)
    x, state, number, start_value = _beginning(fun_at, params, fresh, optimiser)
    first, finite = masked(observe(x), is_finite(x)), is_finite((x, start_value))
    (x, state, end, alive), later = jax.lax.scan(record, (x, state, number, finite), length=records)
    value = fun_at(x)
    observed = jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a)[None], b]), first, later)
    fate = judge(start_value, value, alive)
    return Trajectory(x, value, end, fate, number + every * jnp.arange(records + 1), observed, start_value, state)


def _with_key(fun: Callable, key: Array, x: PyTree) -> Array:
    return fun(x, key)


def _beginning(fun: Callable, params: Any, fresh: bool, optimiser: Any) -> tuple[PyTree, PyTree, Array, Array]:
    """Point, optimiser's state, step number and the value at step 0."""
    if not fresh:
        return params.params, params.state, params.steps, params.start_value
    x = jax.tree.map(jnp.asarray, params)
    return x, optimiser.init(x), jnp.zeros((), int), fun(x)


def is_finite(tree: PyTree) -> Array:
    """Whether every entry of every leaf is."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def masked(observed: PyTree, alive: Array) -> PyTree:
    """Floats as NaN unless alive."""

    def mask(x: Array) -> Array:
        return jnp.where(alive, x, jnp.nan) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else jnp.asarray(x)

    return jax.tree.map(mask, observed)


def judge(start: Array, end: Array, alive: Array) -> Array:
    """The Fate of a trajectory from the value at its start to the one at its end."""
    same = jnp.abs(end - start) <= ROUNDINGS * jnp.finfo(end.dtype).eps * jnp.abs(start)
    alive = alive & jnp.isfinite(end)
    return jnp.select([~alive, same, end > start], [Fate.NOT_FINITE, Fate.STILL, Fate.DIVERGED], Fate.DESCENDED)
