"""Lanczos tridiagonalisation that survives breakdown."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from ufm.numerics.curvature import check_point, flat_operator

BREAKDOWN = 1e3  # roundings of the largest coefficient below which an off-diagonal counts as zero


class Tridiagonal(eqx.Module):
    """T with VᵀAV = T on the Krylov space of a vector.

    Attributes:
        diagonal: α, zero beyond the valid steps.
        off_diagonal: β; entry j couples steps j and j+1. The one after the last valid step is how far the space is
            from invariant: zero at breakdown.
        valid: how many steps were taken: fewer than asked for where the Krylov space became invariant.
    """

    diagonal: Float[Array, " steps"]
    off_diagonal: Float[Array, " steps"]
    valid: Int[Array, ""]

    def eigh(self) -> tuple[Float[Array, " steps"], Float[Array, "steps steps"]]:
        """Ritz values and the eigenvectors of T, as columns; steps that were not taken add uncoupled zeros."""
        inner = self.off_diagonal[:-1]
        return jnp.linalg.eigh(jnp.diag(self.diagonal) + jnp.diag(inner, 1) + jnp.diag(inner, -1))


def lanczos(matvec: Callable[[PyTree], PyTree], v0: PyTree, steps: int) -> Tridiagonal:
    """VᵀAV = T, orthonormal V spanning v0, Av0, A²v0, …, fully re-orthogonalised (twice is enough).

    An operator with few distinct eigenvalues (16 at the optimum of the features model, THEORY 1.3) has a Krylov space
    that is invariant after as many steps. It ends there, with T exact. matfree 0.6 does not: its tridiag_sym goes on
    with the normalised rounding error, or with 0/0 = NaN where the remainder is exactly zero, and does not say at which
    step. jit and vmap go through it.

    Args:
        matvec: a symmetric operator; new leaves of the same shape compile nothing new.
        v0: a pytree of finite floating arrays, not all zero; its length does not matter.
        steps: the most steps, at most the dimension.

    Raises:
        ValueError: if v0 is not of this form, steps not between 1 and the dimension, or matvec changes the structure.
    """
    operator = flat_operator(matvec, v0)
    check_point(v0, "v0")
    flat = ravel_pytree(v0)[0]
    if not 1 <= steps <= flat.size:
        raise ValueError(f"steps must be between 1 and the dimension {flat.size}, got {steps}")
    if not isinstance(flat, jax.core.Tracer) and not flat.any():
        raise ValueError("v0 must not be zero: it spans nothing")
    return flat_lanczos(operator, flat / jnp.max(jnp.abs(flat)), steps)


@eqx.filter_jit
def flat_lanczos(operator: Callable[[Array], Array], v0: Float[Array, " n"], steps: int) -> Tridiagonal:
    """As lanczos, of an operator on vectors."""
    rounding = BREAKDOWN * jnp.finfo(v0.dtype).eps
    v0 = v0 / jnp.linalg.norm(v0)
    unit = jnp.max(jnp.abs(operator(v0)))
    unit = jnp.where(unit > 0, unit, 1)  # squares of numbers near 1 neither vanish nor overflow

    def step(j: Array, state: tuple) -> tuple:
        V, alpha, beta, scale, valid, alive = state
        w = operator(V[j]) / unit
        a = V[j] @ w
        scale = jnp.maximum(scale, jnp.linalg.norm(w))
        for _ in range(2):
            w = w - (V @ w) @ V
        b = jnp.linalg.norm(w)
        goes_on = alive & (b > rounding * scale)
        b = jnp.where(goes_on, b, 0)
        V = V.at[j + 1].set(jnp.where(goes_on, w / jnp.where(goes_on, b, 1), 0))
        return V, alpha.at[j].set(a), beta.at[j].set(b), scale, valid + alive, goes_on

    V = jnp.zeros((steps + 1, v0.size), v0.dtype).at[0].set(v0)
    nothing, zero = jnp.zeros(steps, v0.dtype), jnp.zeros((), v0.dtype)
    state = (V, nothing, nothing, zero, jnp.zeros((), int), jnp.ones((), bool))
    _, alpha, beta, _, valid, _ = jax.lax.fori_loop(0, steps, step, state)
    return Tridiagonal(alpha * unit, beta * unit, valid)
