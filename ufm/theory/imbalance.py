"""Unequal classes: the geometry that λ → 0 approaches, and where minority classes merge (THEORY 3)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ufm.model.geometry import centring
from ufm.model.problem import Problem


def seli_grams(counts: Float[Array, " K"]) -> tuple[Float[Array, "K K"], Float[Array, "K K"]]:
    """(A^{1/2}, A^{†/2}) with A = P D P: the Grams W Wᵀ and H̄ᵀH̄ of the simplex-encoded-label interpolation (SELI).

    They solve min (‖W‖² + ‖H‖²)/2 subject to every margin being at least 1, for any class counts; the cross Gram W H̄
    is P, and the value tr A^{1/2}.

    Args:
        counts: n_k, the diagonal of D.

    Source: thrampoulidis2022, Theorem 1, for STEP imbalance; THEORY 3.2, derived for this project, for any counts.
    """
    P = jnp.asarray(centring(len(counts)))
    values, vectors = jnp.linalg.eigh((P * counts) @ P)
    values, vectors = values[1:], vectors[:, 1:]
    return (vectors * jnp.sqrt(values)) @ vectors.T, (vectors / jnp.sqrt(values)) @ vectors.T


def ridge_margins(problem: Problem) -> Float[Array, "K K"]:
    """log(1/(N s)) − log |A^{†/2}|: the optimal z_y − z_c (row c, column y) up to o(1) as s → 0; 0 on the diagonal.

    Source: THEORY 3.3, derived for this project in the sum form λ = N s.
    """
    K = problem.K
    G = seli_grams(jnp.asarray(problem.counts))[1]
    off = jnp.abs(G) * (1 - jnp.eye(K)) + jnp.eye(K)
    return (1 - jnp.eye(K)) * (-jnp.log(problem.total * problem.s) - jnp.log(off))


def minority_threshold(problem: Problem) -> Float[Array, " K"]:
    """√n_k / N: from this s on, classes that share the size n_k share their rows, means and logits.

    Holds for every size that at least two classes have, whatever the others and the bias (THEORY 3.4, derived for this
    project); equal counts make it the threshold of everything, 1/(K√n).
    """
    return jnp.sqrt(problem.counts) / problem.total
