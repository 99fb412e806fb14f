"""The convex problem reduced by its symmetry: what is alike counts once.

(NUC) is convex and unchanged by permuting classes of equal size, so averaging over permutations keeps an optimum
optimal. The same holds when the classes of each group of a partition are merged, which makes the optimum a critical
point of f where merged classes have equal size (THEORY 8.3). Groups of as many classes of the same size are then
alike; call all that are alike a kind. With every class a group of its own, the kinds are the distinct class sizes and
the optimum is that of f.

Logits are unique up to a constant per column and, in a free bias, per row; the nuclear norm, strictly smaller without
either, sets both to zero. For a class k of group i of kind A and a sample of group j of kind B they are

    z_kl = c_AB + [A = B] a_A ([i = j] − 1/k_A),

and with k_A groups of w_A classes of n_A samples in kind A, √ω-weighted, in the basis of sum-zero vectors over the
groups of each kind and the kinds' indicator vectors,

    ‖Z D^{1/2}‖_* = Σ_A (k_A − 1) w_A √n_A |a_A| + ‖C‖_*,    C_AB = √(k_A w_A) c_AB √(k_B w_B n_B).

With a_A = u_A²/(s w_A √n_A) and C = WH/s the penalty is Σ_A (k_A − 1) u_A² + (‖W‖² + ‖H‖²)/2: smooth, and m kinds cost
K×m per evaluation. Two kinds are THEORY 3.5, all sizes distinct THEORY 8.2.
"""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.lax.linalg import SvdAlgorithm, svd
from jaxtyping import Array, Float, Int

from ufm.model.geometry import centring
from ufm.model.padding import check_unpadded
from ufm.model.problem import Params, Problem, tie_features
from ufm.theory.atlas import check_partition
from ufm.theory.optimum import margin, wrong_class_probability


class Orbit(eqx.Module):
    """Coordinates of a symmetric point, in units in which every penalty has weight one."""

    u: Float[Array, " m"]
    W: Float[Array, "m m"]
    H: Float[Array, "m m"]
    b: Float[Array, " m"]


class TiedProblem(eqx.Module):
    """A problem with its classes merged into groups, and groups that are alike into kinds.

    Attributes:
        representatives: the problem of one sample column per kind, which stands for all its samples.
        group: the group of each class.
        kind: the kind of each class.
        sizes: groups per kind, k_A.
        widths: classes per group of each kind, w_A.
        counts: samples per class of each kind, n_A.
    """

    representatives: Problem
    group: Int[Array | np.ndarray, " K"]
    kind: Int[Array | np.ndarray, " K"]
    sizes: Float[Array | np.ndarray, " m"]
    widths: Float[Array | np.ndarray, " m"]
    counts: Float[Array | np.ndarray, " m"]


def tie_classes(problem: Problem, partition: Sequence[Sequence[int]] | None = None) -> TiedProblem:
    """Merge the classes of each group of a partition (each class its own if None); the counts must be concrete.

    Raises:
        ValueError: if it is no partition of the classes, or merges classes of different size.
    """
    check_unpadded(problem)
    p, counts = problem, np.asarray(problem.counts)
    groups = check_partition(p.K, [[k] for k in range(p.K)] if partition is None else partition)
    if mixed := [group for group in groups if np.ptp(counts[list(group)]) > 0]:
        raise ValueError(f"partition must merge classes of equal size for a critical point, got the group {mixed[0]}")
    group = np.empty(p.K, int)
    for i, classes in enumerate(groups):
        group[list(classes)] = i
    alike = np.stack([counts, np.bincount(group)[group]])
    (_, width), first, kind = np.unique(alike, axis=1, return_index=True, return_inverse=True)
    return _tied(p, group, kind, first, width)


def tie_kinds(problem: Problem, kind: Sequence[int]) -> TiedProblem:
    """Every class a group of its own, those of a kind alike; the counts may be traced and are not checked.

    Args:
        problem: the model, with as many samples in every class of a kind.
        kind: 0, 1, … of each class; every number up to the largest occurs.
    """
    check_unpadded(problem)
    kinds, first = np.unique(kind, return_index=True)
    return _tied(problem, np.arange(problem.K), np.asarray(kind), first, np.ones(len(kinds)))


def _tied(problem: Problem, group: np.ndarray, kind: np.ndarray, first: np.ndarray, width: np.ndarray) -> TiedProblem:
    """The reduction, given the groups, the kinds, the first class of each and how many classes its groups merge."""
    n, sizes = problem.counts[first], np.bincount(kind) / width
    Y = np.eye(problem.K)[:, first]
    representatives = eqx.tree_at(lambda q: (q.Y, q.multiplicity), tie_features(problem), (Y, sizes * width * n))
    return TiedProblem(representatives, group, kind, sizes, width, n)


def orbit_objective(tied: TiedProblem, orbit: Orbit) -> Float[Array, ""]:
    """f at its least over all factorisations of the orbit's logits, in nats."""
    p = tied.representatives
    Z = _logits(tied, orbit, jnp.argmax(p.Y, axis=0))
    if p.use_bias:
        Z = Z + orbit.b[tied.kind][:, None]
    fit = p.multiplicity @ p.loss(Z, p.Y) / p.total
    penalty = jnp.sum(orbit.W**2) + jnp.sum(orbit.H**2) + 2 * jnp.sum((tied.sizes - 1) * orbit.u**2)
    if p.use_bias:
        penalty = penalty + p.lam_b * jnp.sum(tied.sizes * tied.widths * orbit.b**2)
    return jnp.asarray(fit + penalty / 2)


def class_logits(tied: TiedProblem, orbit: Orbit) -> Float[Array, "K K"]:
    """Z, the logits without bias of a sample of each class, a column a class."""
    return _logits(tied, orbit, jnp.arange(len(tied.group)))


def initial_orbit(tied: TiedProblem) -> Orbit:
    """The simplex-encoded logits t P of the groups, t the balanced margin at the largest class size, at least 0.1."""
    p, k, w, n = tied.representatives, jnp.asarray(tied.sizes), jnp.asarray(tied.widths), jnp.asarray(tied.counts)
    t = jnp.maximum(margin(p.K, wrong_class_probability(n.max(), p.s)), 0.1)
    C = p.s * t * (np.eye(k.size) - jnp.sqrt(jnp.outer(k, k)) * w / p.K) * jnp.sqrt(jnp.outer(w, w * n))
    W, H = balanced_factors(C)
    return Orbit(jnp.sqrt(p.s * t * w) * n**0.25, W, H, jnp.zeros(k.size))


def balanced_factors(C: Float[Array, "m l"]) -> tuple[Float[Array, "m r"], Float[Array, "r l"]]:
    """W = UΣ^{1/2}, H = Σ^{1/2}Vᵀ: the factors of C = WH of least (‖W‖² + ‖H‖²)/2, which is ‖C‖_*.

    Singular values that are no larger than rounding become zero, whose root would not be small.
    """
    U, sigma, V = svd(C, full_matrices=False, algorithm=SvdAlgorithm.QR)  # divide and conquer can give NaN
    rounding = 4 * max(C.shape) * jnp.finfo(C.dtype).eps * sigma[0]
    root = jnp.sqrt(jnp.where(sigma > rounding, sigma, 0))
    return U * root, root[:, None] * V


def point_of_logits(problem: Problem, Z: Float[Array, "K K"], b: Float[Array, " K"]) -> Params:
    """The (W, H, b) of least penalty with W h_i = Z e_{y_i} for all samples (THEORY 0); d ≥ rank Z, 1ᵀZ = 0.

    The rank of Z is at most K − 1, so the least singular value is dropped.
    """
    K, d = problem.K, problem.d
    r = min(K - 1, d)
    root_n = jnp.sqrt(problem.counts)
    W, M = balanced_factors(jnp.asarray(centring(K)) @ Z * root_n)
    ratio = (problem.lam_H / problem.lam_W) ** 0.25
    W = jnp.zeros((K, d)).at[:, :r].set(ratio * W[:, :r])
    M = jnp.zeros((d, K)).at[:r].set(M[:r] / ratio / root_n)
    return Params(W, M @ problem.Y, b)


def _logits(tied: TiedProblem, orbit: Orbit, of: Int[Array | np.ndarray, " l"]) -> Float[Array, "K l"]:
    """Z of every class for a sample of each of the classes `of`."""
    k, w, n = jnp.asarray(tied.sizes), jnp.asarray(tied.widths), jnp.asarray(tied.counts)
    c = orbit.W @ orbit.H / (tied.representatives.s * jnp.sqrt(jnp.outer(k * w, k * w * n)))
    a = orbit.u**2 / (tied.representatives.s * w * jnp.sqrt(n))
    kind, group = jnp.asarray(tied.kind), jnp.asarray(tied.group)
    merged, alike = (x[:, None] == x[of][None, :] for x in (group, kind))
    return c[kind][:, kind[of]] + a[kind[of]] * (merged - alike / k[kind[of]])
