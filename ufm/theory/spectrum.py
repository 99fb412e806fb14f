"""The whole Hessian spectrum at symmetric critical points, in closed form (THEORY 1.3 to 1.6).

At the saddle of a partition into m equal groups of g = K/m classes (m = K is the optimum, m = 1 the origin) the
symmetries of the point split the Hessian into blocks of size at most 4. With κ = K√n s, σ = 1/(K√n), q = √n s the
probability of each class of another group, t = log(1 + m(1/κ − 1)) the margin between groups, p = 1 − (m−1)gq the
probability of the own group and θ = t/m, their entries are elementary; THEORY 1.3 derives them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ufm.model.losses import CrossEntropy
from ufm.model.problem import Problem, is_concrete, tie_features
from ufm.theory.atlas import equal_groups
from ufm.theory.duality import sample_gradient
from ufm.theory.optimum import check_dimension, class_size, is_balanced, origin_logits

Where = Literal["optimum", "origin"] | Sequence[Sequence[int]]
OUTSIDE = "outside the row space of W"


class Block(NamedTuple):
    """A symmetric matrix that the Hessian repeats: in an adapted basis it is matrix ⊗ I."""

    label: str
    multiplicity: int
    matrix: Any
    symmetry: Any = False  # whether its first eigenvalue is the zero of a symmetry orbit


class Spectrum(eqx.Module):
    """Eigenvalues of ∇²f over (W, H, b), every sample with its own column.

    Attributes:
        eigenvalues: one per level, block by block.
        symmetry: whether a level is tangent to the orbit of the point under O(d) and shifts of a free bias.
        multiplicities: of each level; their sum is the number of variables, Kd + dN + K (without bias Kd + dN).
        labels: of each level, "symmetry block: what moves".
    """

    eigenvalues: Float[Array | np.ndarray, " levels"]
    symmetry: Bool[Array | np.ndarray, " levels"]
    multiplicities: tuple[int, ...] = eqx.field(static=True)
    labels: tuple[str, ...] = eqx.field(static=True)

    @property
    def index(self) -> int | Int[Array, ""]:
        """Number of negative eigenvalues, the Morse index; an int unless traced, as the other counts are."""
        return self._count(self.eigenvalues < 0)

    @property
    def nullity(self) -> int | Int[Array, ""]:
        """Number of eigenvalues that are zero to rounding; the point is degenerate where it exceeds orbit_dimension."""
        return self._count(self.eigenvalues == 0)

    @property
    def orbit_dimension(self) -> int | Int[Array, ""]:
        """Dimension of the point's orbit under O(d) and shifts of a free bias."""
        return self._count(self.symmetry)

    @property
    def condition_number(self) -> Float[Array | np.ndarray, ""]:
        """λ_max over the least eigenvalue across the orbit; infinite where that is not positive."""
        xp = _namespace(self.eigenvalues)
        across = xp.min(xp.where(self.symmetry, xp.inf, self.eigenvalues))
        return xp.asarray(xp.where(across > 0, xp.max(self.eigenvalues) / xp.where(across > 0, across, 1), xp.inf))

    @property
    def descent_rate(self) -> Float[Array | np.ndarray, ""]:
        """1 − 1/condition_number: the factor by which gradient descent shrinks the distance to a minimum's orbit.

        Per step of size 1/λ_max, asymptotically and at worst.
        """
        return _namespace(self.eigenvalues).asarray(1 - 1 / self.condition_number)

    def levels(self) -> list[tuple[float, int, str]]:
        """(eigenvalue, multiplicity, label), ascending."""
        values = np.asarray(self.eigenvalues).tolist()
        return sorted(zip(values, self.multiplicities, self.labels, strict=True))

    def _count(self, which: Any) -> Any:
        xp = _namespace(self.eigenvalues)
        count = xp.sum(xp.where(which, xp.asarray(self.multiplicities), 0))
        return int(count) if xp is np else count


def hessian_spectrum(problem: Problem, at: Where = "optimum") -> Spectrum:
    """Every eigenvalue of ∇²f with its multiplicity and meaning at a symmetric critical point, in constant time.

    Args:
        problem: cross-entropy; the λ's may be traced. A column that stands for ω_i samples counts as ω_i columns, so
            that class_mean_problem gives the spectrum of the model with all samples.
        at: "optimum" (equal counts, d ≥ K − 1); "origin", W = H = 0 at the best bias (any counts, in one K×K
            eigenproblem if they differ); or a partition of the classes 0, …, K − 1 into m groups of equal size (equal
            counts, d ≥ m − 1), at its coarse simplex ETF.

    Raises:
        ValueError: if the point has no closed form or `at` is not one of these.

    Source: THEORY 1.3, 1.4, 1.6, derived for this project.
    """
    blocks, xp = spectrum_blocks(problem, at), _namespace_of(problem)
    values, symmetry, multiplicities, labels = [], [], [], []
    for block in blocks:
        size = len(block.matrix)
        levels = _eigenvalues(xp, block.matrix)
        for j in range(size):
            zero = xp.asarray(block.symmetry) & (j == 0)
            values.append(xp.where(zero, 0, levels[j]))
            symmetry.append(zero)
            multiplicities.append(block.multiplicity)
            labels.append(block.label if size == 1 else f"{block.label}, {j + 1} of {size}")
    return Spectrum(xp.stack(values), xp.stack(symmetry), tuple(multiplicities), tuple(labels))


def _eigenvalues(xp: Any, matrix: Any) -> Any:
    """Ascending, with the signs of the matrix of unit diagonal (Sylvester's law), which disparate λ's do not blur."""
    if len(matrix) == 1:
        return matrix[0]
    root = xp.sqrt(xp.diagonal(matrix))
    signs = xp.linalg.eigvalsh(matrix / (root[:, None] * root))
    signs = xp.where(xp.abs(signs) <= 16 * xp.finfo(matrix.dtype).eps, 0, xp.sign(signs))
    return signs * xp.abs(xp.linalg.eigvalsh(matrix))


def _namespace(*arrays: Any) -> Any:
    """numpy for values known now, which compiles nothing; jax.numpy inside a transformation."""
    return np if all(is_concrete(x) for x in arrays) else jnp


def _namespace_of(problem: Problem) -> Any:
    return _namespace(problem.lam_W, problem.lam_H, problem.lam_b)


def spectrum_blocks(problem: Problem, at: Where) -> list[Block]:
    """The blocks of hessian_spectrum, those that occur."""
    return [block for block in _blocks(problem, at) if block.multiplicity > 0]


def _blocks(problem: Problem, at: Any) -> Iterator[Block]:
    if not isinstance(problem.loss, CrossEntropy):
        raise ValueError(f"loss must be CrossEntropy for the closed form, got {type(problem.loss).__name__}")
    if isinstance(at, str) and at not in ("optimum", "origin"):
        raise ValueError(f"at must be 'optimum', 'origin' or a partition of the classes, got {at!r}")
    if not isinstance(at, str):
        return partition_blocks(problem, len(equal_groups(problem.K, at)))
    if at == "optimum":
        check_dimension(problem)
        return partition_blocks(problem, problem.K)
    return partition_blocks(problem, 1) if is_balanced(problem) else origin_blocks(problem)


class _Frame(NamedTuple):
    """What the entries of the blocks are made of; see the top of the file."""

    t: Any
    p: Any
    q: Any
    theta: Any
    s: Any
    sigma: float


def _frame(problem: Problem, m: int) -> _Frame:
    K, n, xp = problem.K, class_size(problem), _namespace_of(problem)
    sigma = 1 / (K * np.sqrt(n))
    kappa = xp.minimum(xp.sqrt(problem.lam_W) * xp.sqrt(problem.lam_H) / sigma, 1)
    t = xp.log1p(m * (1 / kappa - 1))
    return _Frame(t, 1 - (m - 1) * kappa / m, kappa / K, t / m, kappa * sigma, sigma)


def partition_blocks(problem: Problem, m: int) -> Iterator[Block]:
    """The blocks at the coarse simplex ETF of m equal groups; from the threshold κ = 1 on it is the origin."""
    K, d, N, xp = problem.K, problem.d, _samples(problem), _namespace_of(problem)
    if d < m - 1:
        raise ValueError(f"d must be at least m - 1 = {m - 1} for a frame of {m} groups, got {d}")
    lam_W, lam_H, lam_b = problem.lam_W, problem.lam_H, problem.lam_b
    t, p, _, theta, s, sigma = frame = _frame(problem, m)
    row, within, outside, alive = m - 1, K - m, d - m + 1, t > 0

    def one(x: Any) -> Any:
        return xp.array([[x]])

    def pair(x: Any, c: Any) -> Any:
        return xp.array([[lam_W * (1 + x), -c], [-c, lam_H * (1 + x)]])

    yield Block(f"{OUTSIDE}, within classes: H", (N - K) * outside, one(lam_H))
    yield Block(f"{OUTSIDE}, within groups: W, H", within * outside, pair(0, sigma))
    yield Block(f"{OUTSIDE}, between groups: W, H", row * outside, pair(0, s), alive)
    yield Block(f"{OUTSIDE}, along 1: W", outside, one(lam_W))
    yield Block(f"{OUTSIDE}, along 1: H", outside, one(lam_H))
    if m > 1:
        yield Block("within classes, along w: H", N - K, one(lam_H * (1 + t * p)))
        yield Block("within classes, across w: H", (N - K) * (m - 2), one(lam_H * (1 + theta)))
        yield Block("within groups, across w: W, H", within * (m - 2), pair(theta, sigma))
        yield Block("within groups, along w: W, H, b", within, _along(problem, m, frame))
        yield Block("along 1, in the row space of W: W", row, one(lam_W))
        yield Block("between groups, trivial: W, H growing", 1, pair(t * p, s * (1 - t * p)))
        yield Block("between groups, symmetric: W, H", m * (m - 3) // 2, pair(theta, s * (1 - theta)))
        yield Block(
            "between groups, antisymmetric: W, H turning", row * (m - 2) // 2, pair(theta, s * (1 + theta)), alive
        )
        yield Block("between groups, standard: W, H, b", row, _standard(problem, m, frame))
    if problem.use_bias:
        if m == 1:
            yield Block("class differences: b", within, one(1 / K + lam_b))
        yield Block("along 1: b", 1, one(lam_b), lam_b == 0)


def _along(problem: Problem, m: int, frame: _Frame) -> Any:
    """Differences inside a group: of its rows of W along their own mean, of its features likewise, and of b."""
    xp, g = _namespace_of(problem), problem.K // m
    t, p, q, _, _, sigma = frame
    step = xp.sqrt(problem.lam_W * t / (q * m * (m - 1)))  # logit of another group's features per unit of W, negative
    own, other = p / g / m, q * (m - 1) / m
    fit = own * xp.array([(m - 1) * step, 1])[:, None] * xp.array([(m - 1) * step, 1])
    fit = fit + other * xp.array([-step, 1])[:, None] * xp.array([-step, 1])
    matrix = xp.array(
        [
            [problem.lam_W + fit[0, 0], -sigma, fit[0, 1]],
            [-sigma, problem.lam_H * (1 + t * p), 0],
            [fit[0, 1], 0, problem.lam_b + fit[1, 1]],
        ]
    )
    return matrix if problem.use_bias else matrix[:2, :2]


def _standard(problem: Problem, m: int, frame: _Frame) -> Any:
    """Group contrasts: of W and H along the frame (not for two groups), of the mean feature, and of b."""
    xp, lam_W, lam_H = _namespace_of(problem), problem.lam_W, problem.lam_H
    t, _, q, _, s, _ = frame
    r = 1 - problem.K * q
    root = r * np.sqrt(m - 2)
    C = xp.array([[1 + r * (m - 2), root], [root, 1 + r]]) / m
    x, y = xp.sqrt(t * lam_W), xp.sqrt(t * lam_H)
    L = xp.array([[x, y, 0, 0], [0, 0, y, xp.sqrt(q * m)]])
    matrix = L.T @ C @ L + xp.array([[lam_W, -s, 0, 0], [-s, lam_H, 0, 0], [0, 0, lam_H, 0], [0, 0, 0, problem.lam_b]])
    kept = slice(2 if m == 2 else 0, 4 if problem.use_bias else 3)
    return matrix[kept, kept]


def origin_blocks(problem: Problem) -> Iterator[Block]:
    """The blocks at W = H = 0 and the best bias, for any class counts: one for each singular value of ∇_Z g."""
    K, d, N, xp = problem.K, problem.d, _samples(problem), _namespace_of(problem)
    lam_W, lam_H, tied = problem.lam_W, problem.lam_H, tie_features(problem)
    Z = origin_logits(tied)
    G = xp.asarray(sample_gradient(tied, tied.loss.residual(Z, tied.Y)))
    for i, sigma in enumerate(xp.linalg.svd(G, compute_uv=False)[:-1]):  # the last is 0: 1ᵀG = 0
        yield Block(f"class difference {i + 1}: W, H", d, xp.array([[lam_W, -sigma], [-sigma, lam_H]]))
    yield Block("along 1: W", d, xp.array([[lam_W]]))
    yield Block("all else: H", (N - K + 1) * d, xp.array([[lam_H]]))
    if problem.use_bias:
        hessian = xp.asarray(tied.loss.mean_hessian(Z, tied.Y, jnp.asarray(tied.multiplicity) / tied.total))
        for i, value in enumerate(xp.linalg.eigvalsh(hessian)[1:]):
            yield Block(f"class difference {i + 1}: b", 1, xp.array([[value + problem.lam_b]]))
        yield Block("along 1: b", 1, xp.array([[problem.lam_b]]), problem.lam_b == 0)


def _samples(problem: Problem) -> int:
    N = float(problem.total)
    if int(N) != N:
        raise ValueError(f"multiplicity must add up to whole samples for the spectrum, got {N}")
    return int(N)
