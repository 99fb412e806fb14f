"""The convex problem reduced by its symmetry: classes of equal size are alike, so each distinct size counts once.

(NUC) is convex and unchanged by permuting classes of equal size, so averaging over permutations keeps an optimum
optimal. Its logits are unique up to a constant per column and, in a free bias, per row; the nuclear norm, strictly
smaller without either, sets both to zero. Class-level logits then are, for class k in group A of size k_A and a
sample of class l in group B,

    z_kl = c_AB + [A = B] a_A ([k = l] − 1/k_A),

and √ω-weighted, with sum-zero vectors within each group and the groups' indicator vectors as basis,

    ‖Z D^{1/2}‖_* = Σ_A (k_A − 1) √n_A |a_A| + ‖C‖_*,    C_AB = √k_A c_AB √(k_B n_B).

With a_A = u_A²/(s√n_A) and C = WH/s the penalty is Σ_A (k_A − 1) u_A² + (‖W‖² + ‖H‖²)/2: smooth, and m groups cost
K×m per evaluation. Two groups are THEORY 3.5, all sizes distinct THEORY 8.2.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.lax.linalg import SvdAlgorithm, svd
from jaxtyping import Array, Float, Int

from ufm.model.geometry import centring
from ufm.model.problem import Params, Problem, tie_features
from ufm.theory.optimum import margin, wrong_class_probability


class Orbit(eqx.Module):
    """Coordinates of a symmetric point, in units in which every penalty has weight one."""

    u: Float[Array, " m"]
    W: Float[Array, "m m"]
    H: Float[Array, "m m"]
    b: Float[Array, " m"]


class TiedProblem(eqx.Module):
    """A problem with its classes grouped by size.

    Attributes:
        representatives: the problem of one sample column per group, which stands for the whole group.
        group: the group of each class.
        sizes: classes per group, k_A.
        counts: samples per class of each group, n_A.
    """

    representatives: Problem
    group: Int[Array | np.ndarray, " K"]
    sizes: Float[Array | np.ndarray, " m"]
    counts: Float[Array | np.ndarray, " m"]


def tie_classes(problem: Problem) -> TiedProblem:
    """Group classes of equal size; the counts must be concrete."""
    counts, first, group, sizes = np.unique(
        np.asarray(problem.counts), return_index=True, return_inverse=True, return_counts=True
    )
    p = problem
    Y = np.eye(p.K)[:, first]
    representatives = eqx.tree_at(lambda q: (q.Y, q.multiplicity), tie_features(p), (Y, sizes * counts))
    return TiedProblem(representatives, group, sizes.astype(float), counts)


def orbit_objective(tied: TiedProblem, orbit: Orbit) -> Float[Array, ""]:
    """f at its least over all factorisations of the orbit's logits, in nats."""
    p = tied.representatives
    Z = _between(tied, orbit)[tied.group]
    a = _within(tied, orbit)
    same = tied.group[:, None] == np.arange(len(tied.sizes))
    Z = Z + a * p.Y - same * (a / tied.sizes)
    if p.use_bias:
        Z = Z + orbit.b[tied.group][:, None]
    fit = p.multiplicity @ p.loss(Z, p.Y) / p.total
    penalty = jnp.sum(orbit.W**2) + jnp.sum(orbit.H**2) + 2 * jnp.sum((tied.sizes - 1) * orbit.u**2)
    if p.use_bias:
        penalty = penalty + p.lam_b * jnp.sum(tied.sizes * orbit.b**2)
    return jnp.asarray(fit + penalty / 2)


def class_logits(tied: TiedProblem, orbit: Orbit) -> Float[Array, "K K"]:
    """Z, the logits without bias of a sample of each class, a column a class."""
    g, a = tied.group, _within(tied, orbit)
    same = g[:, None] == g[None, :]
    return _between(tied, orbit)[g][:, g] + jnp.diag(a[g]) - same * (a / tied.sizes)[g]


def initial_orbit(tied: TiedProblem) -> Orbit:
    """The simplex-encoded logits Z = t P, t the balanced margin at the largest class size, at least 0.1."""
    p, k, n = tied.representatives, jnp.asarray(tied.sizes), tied.counts
    t = jnp.maximum(margin(p.K, wrong_class_probability(n.max(), p.s)), 0.1)
    C = p.s * t * (np.eye(k.size) - jnp.sqrt(jnp.outer(k, k)) / p.K) * jnp.sqrt(n)
    W, H = balanced_factors(C)
    return Orbit(jnp.sqrt(p.s * t) * n**0.25, W, H, jnp.zeros(k.size))


def balanced_factors(C: Float[Array, "m l"]) -> tuple[Float[Array, "m r"], Float[Array, "r l"]]:
    """W = UΣ^{1/2}, H = Σ^{1/2}Vᵀ: the factors of C = WH of least (‖W‖² + ‖H‖²)/2, which is ‖C‖_*."""
    U, sigma, V = svd(C, full_matrices=False, algorithm=SvdAlgorithm.QR)  # divide and conquer can give NaN
    root = jnp.sqrt(sigma)
    return U * root, root[:, None] * V


def point_of_logits(problem: Problem, Z: Float[Array, "K K"], b: Float[Array, " K"]) -> Params:
    """The (W, H, b) of least penalty with W h_i = Z e_{y_i} for all samples (THEORY 0); d ≥ K − 1, 1ᵀZ = 0.

    The rank of Z is at most K − 1, so the least singular value is dropped.
    """
    K, d = problem.K, problem.d
    root_n = jnp.sqrt(problem.counts)
    W, M = balanced_factors(jnp.asarray(centring(K)) @ Z * root_n)
    ratio = (problem.lam_H / problem.lam_W) ** 0.25
    W = jnp.zeros((K, d)).at[:, : K - 1].set(ratio * W[:, : K - 1])
    M = jnp.zeros((d, K)).at[: K - 1].set(M[: K - 1] / ratio / root_n)
    return Params(W, M @ problem.Y, b)


def _within(tied: TiedProblem, orbit: Orbit) -> Float[Array, " m"]:
    return orbit.u**2 / (tied.representatives.s * jnp.sqrt(tied.counts))


def _between(tied: TiedProblem, orbit: Orbit) -> Float[Array, "m m"]:
    k = jnp.asarray(tied.sizes)
    return orbit.W @ orbit.H / (tied.representatives.s * jnp.sqrt(jnp.outer(k, k * tied.counts)))
