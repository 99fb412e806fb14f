"""The Hessian by brute force, for sizes at which that is possible: the oracle of every spectrum."""

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from ufm.model.problem import Params, Problem, objective


@jax.jit
def _hessian(problem: Problem, params: Params) -> jax.Array:
    flat, unravel = ravel_pytree(params)
    return jax.hessian(lambda x: objective(problem, unravel(x)))(flat)


def dense_eigenvalues(problem: Problem, params: Params) -> Float[np.ndarray, " D"]:
    """All eigenvalues of ∇²f over (W, H, b), or (W, H) where there is no bias, ascending, by brute force."""
    H = np.asarray(_hessian(problem, params))  # the bias comes last
    used = len(H) if problem.use_bias else len(H) - problem.K
    return np.linalg.eigvalsh(H[:used, :used])
