"""Problems of different K in one shape, so that one compiled program serves them all."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ufm.model.losses import CrossEntropy
from ufm.model.problem import Problem, check_integer, is_concrete


def padded(
    K: Any, n: Any, d: int, *, largest: int, lam_W: Any, lam_H: Any, lam_b: Any = 0.0, use_bias: bool = True
) -> Problem:  # fmt: skip
    """The class-mean problem of K equal classes among `largest` rows and columns; the others are absent.

    W, H and b have the shapes of the largest problem, zero beyond the first K classes, where the objective, its
    gradient, the solvers, the certificate and the balanced closed forms are those of K classes with n samples each.
    K, n and the λ's may be traced: one program, jitted or vmapped, for every K.

    Raises:
        ValueError: if K or n is no whole number, K is less than 2 or more than largest, or as Problem does. Traced
            values are not checked.
    """
    check_integer("largest", largest, at_least=2)
    _check_whole("K", K, at_least=2)
    _check_whole("n", n, at_least=1)
    if is_concrete(K) and largest < K:
        raise ValueError(f"K must be at most largest = {largest}, got {K}")
    present = (np.arange(largest) < K).astype(jnp.result_type(float))
    return Problem(np.eye(largest), n * present, CrossEntropy(present), lam_W, lam_H, lam_b, d, use_bias)


def check_unpadded(problem: Problem) -> None:
    """Refuse a padded problem, for what takes its K rows for the number of classes."""
    if problem.is_padded:
        raise ValueError("the problem is padded, which serves certificates and balanced optima; build it unpadded")


def _check_whole(name: str, value: Any, *, at_least: int) -> None:
    if not is_concrete(value):
        return
    x = np.asarray(value)
    if x.ndim or x.dtype.kind not in "iuf" or not (at_least <= x < np.inf and x == np.floor(x)):
        raise ValueError(f"{name} must be a whole number of at least {at_least}, got {value!r}")
