"""The way down from a critical point that is not global: direction, curvature, drop (THEORY 0)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ufm.model.problem import Params, Problem, objective
from ufm.theory.duality import generic, sample_gradient, top_singular_pair

LENGTHS = 2.0 ** np.arange(-12, 14)  # where along the ray the drop is looked for


class Escape(eqx.Module):
    """A unit direction, f's curvature along it as predicted and as measured, and how far f falls along it."""

    direction: Params
    predicted: Float[Array, ""]
    measured: Float[Array, ""]
    drop: Float[Array, ""]


def predicted_curvature(problem: Problem, sigma: Float[Array, ""]) -> Float[Array, ""]:
    """(λ_W+λ_H)/2 − √((λ_W−λ_H)²/4 + σ²), negative iff σ > s.

    At a critical point with ‖∇_Z g‖₂ = σ ≥ s and a null vector of W it is the least Hessian eigenvalue (THEORY 0).
    """
    mean, half = (problem.lam_W + problem.lam_H) / 2, (problem.lam_W - problem.lam_H) / 2
    return jnp.asarray(mean - jnp.hypot(half, sigma))


def escape_direction(problem: Problem, params: Params, R: Float[Array, "K N"]) -> Params:
    """Unit Δ = (x u aᵀ, −y a vᵀ, 0) of least curvature in that plane: u, v top singular vectors of ∇_Z g, Wa = 0.

    At a critical point with rank W < d it is an exact eigenvector of the Hessian (THEORY 0); where W has full
    rank d, a is its least right singular vector and nothing is promised.
    """
    sigma, u, v = top_singular_pair(sample_gradient(problem, R))
    a = _null_vector(params.W)
    x, y = sigma, problem.lam_W - predicted_curvature(problem, sigma)
    norm = jnp.hypot(x, y)
    H = -jnp.outer(a, v * jnp.sqrt(problem.share)) * y / norm
    return Params(jnp.outer(u, a) * x / norm, H, jnp.zeros_like(params.b))


def _null_vector(W: Float[Array, "K d"]) -> Float[Array, " d"]:
    """A unit a with Wa = 0 if d > K, else W's least right singular vector."""
    K, d = W.shape
    if d > K:
        return jnp.linalg.qr(W.T, mode="complete")[0][:, -1]
    a = jnp.linalg.svd(W, full_matrices=False)[2][-1]
    return a * jnp.where(generic(d) @ a < 0, -1, 1)  # the sign matters where W has rank d


def escape(problem: Problem, params: Params, R: Float[Array, "K N"]) -> Escape:
    """The steepest escape that THEORY 0 promises from a critical point, with its curvature and drop measured."""
    sigma = top_singular_pair(sample_gradient(problem, R))[0]
    direction = escape_direction(problem, params, R)

    def along(tau: Float[Array, ""]) -> Float[Array, ""]:
        return objective(problem, jax.tree.map(lambda x, dx: x + tau * dx, params, direction))

    grad = jax.grad(lambda x: objective(problem, x))
    product = jax.jvp(grad, (params,), (direction,))[1]
    # optax.tree.vdot would gather H from all devices
    measured = optax.tree.sum(jax.tree.map(jnp.multiply, product, direction))
    drop = objective(problem, params) - jnp.min(jax.lax.map(along, LENGTHS.astype(params.W.dtype)))
    return Escape(direction, predicted_curvature(problem, sigma), measured, jnp.maximum(drop, 0))
