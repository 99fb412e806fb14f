"""Newton's method with conjugate gradients: the last digits, where comparing values has run out of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.scipy.sparse.linalg import cg
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from ufm.numerics.minimise import Solution, Status, as_pytree_function, flatten, is_split


def polish(
    fun: Callable[[PyTree], Float[Array, ""]],
    params: PyTree,
    *,
    tol: float | Array = 0.0,
    max_steps: int | Array = 20,
    max_products: int = 500,
) -> Solution:
    """∇fun = 0 near params, by Newton steps that are kept only while each at least halves ‖∇fun‖.

    Meant for a point that minimise has brought close: a line search there compares values that differ by less than
    their rounding, while the gradient still knows the way. Directions in which the Hessian vanishes together with the
    gradient, such as symmetry orbits, do no harm.

    Args:
        fun: a scalar function of a pytree of floating arrays, twice differentiable.
        params: where to start; returned as it is if no step helps.
        tol: absolute tolerance on the Euclidean norm of the gradient.
        max_steps: the largest number of Newton steps.
        max_products: the largest number of Hessian products for each.

    Returns:
        A Solution; STALLED, the usual end, means that a further step no longer halves the gradient.
    """
    return _polish(as_pytree_function(fun), params, tol, max_steps, max_products, is_split(params))


@functools.partial(jax.jit, static_argnums=(4, 5))
def _polish(fun: Partial, params: PyTree, tol: Any, max_steps: Any, max_products: int, split: bool) -> Solution:
    x0, unravel = flatten(params, split)
    gradient = jax.grad(lambda x: fun(unravel(x)))

    def step(state: tuple) -> tuple:
        x, grad, steps, _ = state
        product = jax.linearize(gradient, x)[1]
        newton = cg(product, optax.tree.scale(-1, grad), tol=1e-3, maxiter=max_products)[0]
        end = optax.tree.add(x, newton)
        new_grad = gradient(end)
        helps = optax.tree.norm(new_grad) <= optax.tree.norm(grad) / 2
        kept = jax.tree.map(functools.partial(jnp.where, helps), (end, new_grad), (x, grad))
        return *kept, steps + helps, ~helps

    def going(state: tuple) -> Array:
        _, grad, steps, stalled = state
        return ~stalled & (optax.tree.norm(grad) > tol) & (steps < max_steps)

    start = (x0, gradient(x0), jnp.zeros((), int), jnp.zeros((), bool))
    x, grad, steps, stalled = jax.lax.while_loop(going, step, start)
    value, grad_norm = fun(unravel(x)), optax.tree.norm(grad)
    status = jnp.select(
        [~jnp.isfinite(value + grad_norm), grad_norm <= tol, stalled],
        [Status.NOT_FINITE, Status.CONVERGED, Status.STALLED],
        Status.STEP_LIMIT,
    )
    return Solution(unravel(x), value, grad_norm, steps, status)
