"""The best bias for given logits: a convex problem in K variables."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ufm.model.problem import Problem


@jax.jit
def optimal_bias(
    problem: Problem, Z: Float[Array, "K N"], b: Float[Array, " K"], *, max_steps: int = 100
) -> Float[Array, " K"]:
    """argmin_b (1/N) Σ_i ω_i ℓ(z_i + b; y_i) + λ_b/2 ‖b‖², by Newton's method from b.

    A step moves no logit by more than 1, which keeps Newton's method inside the region where the curvature of a
    softmax changes by a bounded factor. With a free bias the component along 1, which changes nothing, stays, and so
    does all of an absent class.
    The last step moved b by less than √eps, so that the next would by about the square of that. Whatever is left after
    max_steps is a worse bias, not an error: callers bound its effect.
    """
    weights = jnp.asarray(problem.multiplicity / problem.total)
    present = jnp.asarray(problem.present)
    blind = jnp.outer(present, present) / problem.classes + jnp.diag(1 - present)

    def gradient(b: Array) -> Array:
        return problem.loss.residual(Z + b[:, None], problem.Y) @ weights + problem.lam_b * b

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        b, steps, _ = state
        hessian = problem.loss.mean_hessian(Z + b[:, None], problem.Y, weights)
        gauge = jnp.where(problem.lam_b > 0, 0, jnp.trace(hessian) / problem.classes) * blind
        move = -jnp.linalg.solve(hessian + problem.lam_b * jnp.eye(problem.K) + gauge, gradient(b))
        move = jnp.nan_to_num(move / jnp.maximum(1, jnp.max(jnp.abs(move))))
        return b + move, steps + 1, jnp.max(jnp.abs(move))

    def going(state: tuple[Array, Array, Array]) -> Array:
        b, steps, move = state
        return (steps < max_steps) & (move > jnp.sqrt(jnp.finfo(b.dtype).eps) * (1 + jnp.max(jnp.abs(b))))

    return jax.lax.while_loop(going, step, (b, jnp.zeros((), int), jnp.ones((), b.dtype)))[0]
