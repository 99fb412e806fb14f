"""The Hessian by brute force, for sizes at which that is possible: the oracle of every spectrum."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from ufm.model.problem import Params, Problem, objective


@jax.jit
def _hessian(problem: Problem, params: Params) -> jax.Array:
    """∇²f in the coordinates (W, √ω_i h_i, b), in which ω_i equal columns are as long as one."""
    flat, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, params))

    def moved(x: jax.Array) -> jax.Array:
        step = unravel(x)
        H = params.H + step.H / jnp.sqrt(problem.multiplicity)
        return objective(problem, Params(params.W + step.W, H, params.b + step.b))

    return jax.hessian(moved)(flat)


def dense_eigenvalues(problem: Problem, params: Params) -> Float[np.ndarray, " D"]:
    """All eigenvalues of ∇²f over (W, √ω_i h_i, b), or (W, √ω_i h_i) where there is no bias, ascending, by brute force.

    Where every column is one sample (ω = 1) that is the plain Hessian; class_mean_problem's are those of the model with
    all samples on movements that are alike within classes.
    """
    H = np.asarray(_hessian(problem, params))  # the bias comes last
    used = len(H) if problem.use_bias else len(H) - problem.K
    return np.linalg.eigvalsh(H[:used, :used])
