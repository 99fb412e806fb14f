"""Ball arithmetic on arrays: intervals certain to contain the real number meant, NumPy arrays of python-flint's `arb`.

A comparison of balls is True only if it is proved; neither `x >= 0` nor `x < 0` holds of a ball across zero.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

Ball = Any


def exact(x: Any) -> Any:
    """Floats as balls of radius zero: an array of them, or one."""
    import flint

    return np.frompyfunc(flint.arb, 1, 1)(np.asarray(x, np.float64))


def square(x: Any) -> Any:
    """x², of which `**` makes NaN for a ball around zero."""
    return x * x


def root(x: Ball) -> Ball:
    """√x of a number known to be at least 0, also where its ball reaches below."""
    return x.nonnegative_part().sqrt()


def xlogx(q: Ball) -> Ball:
    """Q log q of a number known to be in [0, 1]; between −√q and 0 where its ball reaches 0."""
    return q * q.log() if q > 0 else (-root(q.abs_upper())).union(0)


def product(A: Shaped[np.ndarray, "m k"], B: Shaped[np.ndarray, "k n"]) -> Shaped[np.ndarray, "m n"]:
    """AB, by flint's matrix product."""
    import flint

    C = flint.arb_mat(A.tolist()) * flint.arb_mat(B.tolist())
    return np.array(C.entries(), object).reshape(A.shape[0], B.shape[1])


def spectral_bounds(M: Shaped[np.ndarray, "K K"]) -> tuple[Ball, Ball]:
    """A lower and an upper bound on √λ_max(M) of a positive semidefinite M.

    Below: the Rayleigh quotient ρ of a vector found in floating point. Above: √((1 + 2^−k) ρ) for a large k for which
    elimination proves (1 + 2^−k) ρ I − M positive definite.
    """
    trace = np.trace(M)
    u = exact(np.linalg.eigh(np.nan_to_num((M / trace).astype(float)))[1][:, -1:])
    quotient = (product(product(u.T, M), u) / product(u.T, u))[0, 0]
    for k in range(64, 8, -4):
        above = (1 + exact(2.0**-k)) * quotient
        if is_positive_definite(above * exact(np.eye(len(M))) - M):
            return root(quotient), root(above)
    return root(quotient), root(trace)


def is_positive_definite(A: Shaped[np.ndarray, "K K"]) -> bool:
    """Whether elimination proves every pivot of the symmetric A = LDLᵀ positive."""
    A = A.copy()
    for k in range(len(A)):
        if not A[k, k] > 0:
            return False
        A[k + 1 :, k + 1 :] -= np.outer(A[k + 1 :, k] / A[k, k], A[k, k + 1 :])
    return True


def nearest(x: Ball) -> float:
    """The float64 at the middle of the ball."""
    return float(x.mid())


def above(x: Ball) -> float:
    """The least number of JAX's default precision that is proved at least x, or the next; ∞ if the ball has no end."""
    if not x.is_finite():
        return np.inf
    with np.errstate(over="ignore"):
        y = np.asarray(nearest(x.upper()), jnp.result_type(float))
    return float(y if exact(y) >= x else np.nextafter(y, y.dtype.type(np.inf)))


def below(x: Ball) -> float:
    """The same from the other side."""
    return -above(-x)
