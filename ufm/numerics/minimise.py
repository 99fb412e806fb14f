"""L-BFGS with a zoom line search (optax) for any scalar function of any pytree, saying how it ended."""

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PyTree

PATIENCE = 20  # steps without a new least value or least gradient after which rounding has won


class Status(enum.IntEnum):
    """How a minimisation ended."""

    CONVERGED = 0
    STEP_LIMIT = 1
    STALLED = 2
    NOT_FINITE = 3


class Solution(eqx.Module):
    """Where a minimisation ended, and how.

    Attributes:
        params: the last point.
        value: the function there.
        grad_norm: the Euclidean norm of its gradient there.
        steps: L-BFGS steps taken.
        status: a Status; STALLED means 20 steps without a new least value or gradient, as when rounding has won.
    """

    params: PyTree
    value: Float[Array, "..."]
    grad_norm: Float[Array, "..."]
    steps: Int[Array, "..."]
    status: Int[Array, "..."]

    @property
    def converged(self) -> Bool[Array, "..."]:
        """Whether the gradient norm fell to the tolerance."""
        return self.status == Status.CONVERGED


class _State(NamedTuple):
    x: PyTree
    opt: Any
    steps: Array
    best_value: Array
    best_grad: Array
    idle: Array
    status: Array


def as_pytree_function(fun: Callable) -> Partial:
    """The same function with the arguments that functools.partial bound as leaves, so that jit caches by shape."""
    if isinstance(fun, Partial):
        return fun
    if isinstance(fun, functools.partial):
        return Partial(fun.func, *fun.args, **fun.keywords)
    return Partial(fun)


def minimise(
    fun: Callable[[PyTree], Float[Array, ""]],
    params: PyTree,
    *,
    tol: float | Array = 1e-10,
    max_steps: int | Array = 10_000,
    memory: int = 10,
) -> Solution:
    """min fun, by L-BFGS from params until ‖∇fun‖ ≤ tol.

    Compiled once per function and shapes: pass data as functools.partial(fun, data), and new data of the same
    shape needs no new compilation. jit, vmap and lax.map go through it.

    Args:
        fun: a scalar function of a pytree of floating arrays, smooth.
        params: where to start.
        tol: absolute tolerance on the Euclidean norm of the gradient.
        max_steps: the largest number of L-BFGS steps.
        memory: pairs of steps and gradient differences kept.

    Returns:
        A Solution; a failure is its status, never an exception.

    Source: optax.lbfgs (Nocedal & Wright 2006, algorithms 7.4, 7.5, 3.5 and 3.6).
    """
    return _minimise(as_pytree_function(fun), params, tol, max_steps, memory, is_split(params))


def is_split(tree: PyTree) -> bool:
    """Whether a leaf is known to be split over devices."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return any(not isinstance(leaf, jax.core.Tracer) and not leaf.is_fully_replicated for leaf in leaves)


def flatten(tree: PyTree, split: bool) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """The tree as one vector, or as a vector for each leaf with the last axis outermost, and the way back.

    One vector is whole on every device. A vector for each leaf stays split as the leaf's last axis is, but on one
    device it makes L-BFGS a tenth slower.
    """
    if not split:
        return ravel_pytree(tree)
    vectors = jax.tree.map(lambda leaf: leaf.ravel(order="F"), tree)
    return vectors, lambda x: jax.tree.map(lambda v, leaf: v.reshape(leaf.shape, order="F"), x, tree)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _minimise(fun: Partial, params: PyTree, tol: Any, max_steps: Any, memory: int, split: bool) -> Solution:
    x0, unravel = flatten(params, split)
    flat = lambda x: fun(unravel(x))  # noqa: E731
    solver = optax.lbfgs(memory_size=memory)

    def step(state: _State) -> _State:
        value, grad = _value_and_grad(state.opt)
        updates, opt = solver.update(grad, state.opt, state.x, value=value, grad=grad, value_fn=flat)
        return _judge(state, optax.apply_updates(state.x, updates), opt, tol)

    def going(state: _State) -> Array:
        return (state.status == Status.STEP_LIMIT) & (state.steps < max_steps)

    value, grad = jax.value_and_grad(flat)(x0)
    opt = optax.tree.set(solver.init(x0), value=value, grad=grad)
    zero = jnp.zeros((), int)
    start = _State(x0, opt, zero - 1, value, jnp.inf * jnp.ones_like(value), zero, zero)
    end = jax.lax.while_loop(going, step, _judge(start, x0, opt, tol))
    value, grad = _value_and_grad(end.opt)
    return Solution(unravel(end.x), value, optax.tree.norm(grad), end.steps, end.status)


def _value_and_grad(opt: Any) -> tuple[Array, PyTree]:
    return optax.tree.get(opt, "value"), optax.tree.get(opt, "grad")


def _judge(state: _State, x: PyTree, opt: Any, tol: Any) -> _State:
    """The next state at x, with STEP_LIMIT standing for "not yet ended otherwise"."""
    value, grad = _value_and_grad(opt)
    grad_norm = optax.tree.norm(grad)
    better = (value < state.best_value) | (grad_norm < state.best_grad)
    idle = jnp.where(better, 0, state.idle + 1)
    status = jnp.select(
        [~jnp.isfinite(value + grad_norm), grad_norm <= tol, idle >= PATIENCE],
        [Status.NOT_FINITE, Status.CONVERGED, Status.STALLED],
        Status.STEP_LIMIT,
    )
    best = jnp.minimum(value, state.best_value), jnp.minimum(grad_norm, state.best_grad)
    return _State(x, opt, state.steps + 1, *best, idle, status)
