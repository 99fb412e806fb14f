"""Unequal classes: the geometry that λ → 0 approaches, and where minority classes merge (THEORY 3)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ufm.model.geometry import centring
from ufm.model.padding import check_unpadded
from ufm.model.problem import Problem


def seli_grams(
    counts: Float[Array, " K"], *, free_bias: bool = False
) -> tuple[Float[Array, "K K"], Float[Array, "K K"]]:
    """(A^{1/2}, Eᵀ A^{†/2} E) with A = P E D Eᵀ P: the Grams W Wᵀ and H̄ᵀH̄ that λ → 0 approaches up to scale.

    E = I gives the simplex-encoded-label interpolation (SELI): the minimiser of (‖W‖² + ‖H‖²)/2 with every margin at
    least 1, the limit without bias and with λ_b > 0 held fixed. A free bias takes the weighted mean of the labels off
    for nothing, E = I − p̂1ᵀ with p̂ = n_k/N, and the limit is another unless the counts are equal.

    Args:
        counts: n_k, the diagonal of D.
        free_bias: whether λ_b = 0.

    Source: thrampoulidis2022 for STEP imbalance without bias; THEORY 3.2, derived for this project, for any counts;
    the free bias: derived here, with the dual's sign condition (off-diagonal A^{†/2}E ≤ 0) checked, not proved.
    """
    values, vectors, E = _label_spectrum(counts, free_bias)
    return (vectors * jnp.sqrt(values)) @ vectors.T, E.T @ ((vectors / jnp.sqrt(values)) @ vectors.T) @ E


def ridge_margins(problem: Problem) -> Float[Array, "K K"]:
    """log(1/(N s)) − log |A^{†/2} E|: the optimal (z+b)_y − (z+b)_c (row c, column y) up to o(1) as s → 0, else 0.

    A and E are those of seli_grams; the error falls like 1/log(1/s), and with a free bias faster.

    Source: THEORY 3.3, derived for this project in the sum form λ = N s, for no bias; it holds for λ_b > 0 held fixed.
    """
    check_unpadded(problem)
    free = problem.use_bias and bool(problem.lam_b == 0)
    values, vectors, E = _label_spectrum(jnp.asarray(problem.counts), free)
    F = jnp.abs((vectors / jnp.sqrt(values)) @ vectors.T @ E)
    other = 1 - jnp.eye(problem.K)
    return other * (-jnp.log(problem.total * problem.s) - jnp.log(jnp.where(other == 1, F, 1)))


def _label_spectrum(
    counts: Float[Array, " K"], free_bias: bool
) -> tuple[Float[Array, " K-1"], Float[Array, "K K-1"], Float[Array, "K K"]]:
    """The nonzero eigenvalues of A, their eigenvectors, and E."""
    P = jnp.asarray(centring(len(counts)))
    E = jnp.eye(len(counts)) - free_bias * counts[:, None] / jnp.sum(counts)
    values, vectors = jnp.linalg.eigh(P @ (E * counts) @ E.T @ P)
    return values[1:], vectors[:, 1:], E


def minority_threshold(problem: Problem) -> Float[Array, " K"]:
    """√n_k / N: from this s on, and not below, classes that share the size n_k share their rows, means and logits.

    For cross-entropy and d ≥ K − 1, for every size that at least two classes have, whatever the other classes and the
    bias; equal counts make it the threshold of everything, 1/(K√n).

    Source: THEORY 3.4, derived for this project.
    """
    return jnp.asarray(jnp.sqrt(problem.counts) / problem.total)
