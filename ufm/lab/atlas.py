"""The catalogue of partition saddles: energy, rank, Morse index, and which falls to which (THEORY 8.3)."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from ufm.lab.dense import dense_eigenvalues
from ufm.lab.optimum import solve_tied
from ufm.model.problem import Params, Problem, is_concrete, logits, objective, tie_features
from ufm.theory.atlas import (
    Partition,
    check_partition,
    coarse_etf,
    integer_partitions,
    merged_block,
    partition_number,
    random_integer_partition,
)
from ufm.theory.duality import sample_gradient
from ufm.theory.optimum import is_balanced
from ufm.theory.orbits import tie_classes
from ufm.theory.spectrum import hessian_spectrum

CERTIFIED = 1e-6  # relative excess of the tied dual norm over s above which a tied optimum is refused
MERGED = 1e-6  # relative distance below which classes count as merged
RANK = 1e-12  # singular values of the logits, relative to the largest or to 1 nat
ZERO = 1e-13  # eigenvalues of a merged block of unit diagonal
TYPES = 200  # of partitions that are listed without being asked for a sample
Type = tuple[tuple[int, int], ...]  # (class size, classes merged) of every group, sorted


@dataclass(frozen=True)
class CriticalPoint:
    """The global optimum among points whose classes are tied as the partition says: a critical point of f.

    Attributes:
        partition: the groups of merged classes.
        params: the point, a column for every column of the problem.
        value: f, nats.
        rank: of W; 0 at the origin.
        index: number of negative Hessian eigenvalues.
        nullity: number of zero ones.
        smallest_eigenvalue: λ_min(∇²f), every sample with its own column.
        orbit_dimension: of the point's orbit under O(d) and shifts of a free bias; a larger nullity is degeneracy.
        points: how many partitions there are of this type; each has such an orbit.
    """

    partition: Partition
    params: Params
    value: float
    rank: int
    index: int
    nullity: int
    smallest_eigenvalue: float
    orbit_dimension: int
    points: int

    @property
    def groups(self) -> tuple[int, ...]:
        """Sizes of the groups, descending."""
        return tuple(sorted(map(len, self.partition), reverse=True))


def critical_points(
    problem: Problem, *, samples: int | None = None, key: Key[Array, ""] | None = None
) -> tuple[CriticalPoint, ...]:
    """Every partition saddle, one of each type, from the lowest f up; for d ≥ K − 1 the optimum is the first.

    Classes of equal size may be merged, so W = H = 0 is one of them for equal counts only. Tied problems are solved in
    their symmetric coordinates (orbits.py), equal groups of equal counts in closed form; index, nullity and least
    eigenvalue are those of the merged groups' blocks, the rest of the Hessian being that of a global optimum, taken to
    be degenerate in its orbit alone. Partitions into more than d + 1 groups are left out; those whose optimum merges
    further (THEORY 1.2, 3.4) are listed once, as merged.

    Args:
        problem: cross-entropy, concrete.
        samples: so many types at random (uniform over types, without repetition) where all are too many; the finest and
            the coarsest are always among them.
        key: for samples.

    Raises:
        ValueError: if there are more than 200 types and no samples are asked for, or values are traced.
        ArithmeticError: if a tied optimum could not be certified.

    Source: THEORY 8.3, 1.6; index and eigenvalues derived for this project.
    """
    if not all(is_concrete(x) for x in jax.tree.leaves(problem)):
        raise ValueError("problem must be known, not traced, to list its critical points")
    number = math.prod(partition_number(k, k) for k in Counter(np.asarray(problem.counts).tolist()).values())
    if samples is None and number > TYPES:
        raise ValueError(f"samples must be given for so many classes: there are {number} types of partitions")
    if samples is not None and key is None:
        raise ValueError("key must be given to draw samples of the partitions")
    types = _types(problem) if samples is None or number <= samples else _sampled_types(problem, samples, key)
    found = {point.partition: point for point in (critical_point(problem, _example(problem, t)) for t in types)}
    return tuple(sorted(found.values(), key=lambda point: (point.value, point.partition)))


def lattice(points: tuple[CriticalPoint, ...], counts: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Pairs (i, j): points[j] is of the type that points[i] becomes when one merged group splits in two.

    Splitting is what the negative directions at points[i] do: each is a difference within one merged group.
    """
    types = {partition_type(counts, point.partition): i for i, point in enumerate(points)}
    pairs = ((i, types.get(finer)) for t, i in types.items() for finer in _splits(t))
    return tuple(sorted({(i, j) for i, j in pairs if j is not None}))


def partition_type(counts: np.ndarray, partition: Partition) -> Type:
    """The partition up to exchanging classes of equal size."""
    return tuple(sorted((int(counts[group[0]]), len(group)) for group in partition))


def _splits(t: Type) -> Iterator[Type]:
    for i, (n, size) in enumerate(t):
        for part in range(1, size // 2 + 1):
            yield tuple(sorted((*t[:i], *t[i + 1 :], (n, part), (n, size - part))))


def _types(problem: Problem) -> list[Type]:
    """All types with at most d + 1 groups."""
    sizes = sorted(Counter(np.asarray(problem.counts).astype(int).tolist()).items())
    choices = itertools.product(*(integer_partitions(k) for _, k in sizes))
    return [t for t in (_type(sizes, parts) for parts in choices) if len(t) <= problem.d + 1]


def _sampled_types(problem: Problem, samples: int, key: Any) -> list[Type]:
    """The finest, the coarsest, and others at random."""
    sizes = sorted(Counter(np.asarray(problem.counts).astype(int).tolist()).items())
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    types = [_type(sizes, [(1,) * k for _, k in sizes]), _type(sizes, [(k,) for _, k in sizes])]
    while len(types) < samples:
        drawn = _type(sizes, [random_integer_partition(k, random) for _, k in sizes])
        types += [drawn] if drawn not in types else []
    return [t for t in types if len(t) <= problem.d + 1]


def _type(sizes: list[tuple[int, int]], parts: Any) -> Type:
    return tuple(sorted((n, part) for (n, _), chosen in zip(sizes, parts, strict=True) for part in chosen))


def _example(problem: Problem, t: Type) -> Partition:
    """A partition of the type, successive classes of each size merged in turn."""
    counts = np.asarray(problem.counts).astype(int)
    classes = {n: iter(np.flatnonzero(counts == n).tolist()) for n in set(counts.tolist())}
    return check_partition(problem.K, [list(itertools.islice(classes[n], size)) for n, size in t])


def _number(t: Type) -> int:
    """How many partitions are of the type."""
    total = 1
    for n in {n for n, _ in t}:
        sizes = [size for m, size in t if m == n]
        repeats = math.prod(map(math.factorial, Counter(sizes).values()))
        total *= math.factorial(sum(sizes)) // (math.prod(map(math.factorial, sizes)) * repeats)
    return total


def critical_point(problem: Problem, partition: Partition) -> CriticalPoint:
    """The partition saddle of one partition, as critical_points lists it; of a coarser one where groups merge."""
    tied = tie_features(problem)
    means = _tied_optimum(tied, partition)
    _check_tied_optimum(tied, means, partition)
    rank = _rank(tied, means.W)
    partition = _as_merged(tied, means, partition, rank)
    orbit = rank * (problem.d - rank) + rank * (rank - 1) // 2 + (problem.use_bias and float(problem.lam_b) == 0)
    index, degenerate, least = _merged_signs(tied, means, partition)
    if index == 0:
        least = 0.0 if orbit else _least_eigenvalue(tied, means, rank)
    params = Params(means.W, means.H @ problem.Y, means.b)
    points = _number(partition_type(np.asarray(problem.counts), partition))
    value = float(objective(tied, means))
    return CriticalPoint(partition, params, value, rank, index, orbit + degenerate, least, orbit, points)


def _tied_optimum(tied: Problem, partition: Partition) -> Params:
    if is_balanced(tied) and len(set(map(len, partition))) == 1:
        return coarse_etf(tied, partition)
    return solve_tied(tie_classes(tied, partition), tied)


def _check_tied_optimum(tied: Problem, means: Params, partition: Partition) -> None:
    """‖∇_Z g‖₂ ≤ s on logits tied within the groups: the certificate of THEORY 0 for the tied problem."""
    indicator = np.zeros((tied.K, len(partition)))
    for i, group in enumerate(partition):
        indicator[list(group), i] = len(group) ** -0.5
    G = sample_gradient(tied, tied.loss.residual(logits(tied, means), tied.Y))
    excess = float(np.linalg.norm(indicator.T @ np.asarray(G) @ indicator, 2) / tied.s) - 1
    if not excess <= CERTIFIED:
        raise ArithmeticError(f"tied optimum of {partition} not certified: its dual norm exceeds s by {excess:.1e}")


def _as_merged(tied: Problem, means: Params, partition: Partition, rank: int) -> Partition:
    """The partition with groups joined that agree in class size, rows of W and bias."""
    W, b = np.asarray(means.W) * (rank > 0), np.asarray(means.b)[:, None]
    scaled = [W / max(np.abs(W).max(), np.finfo(W.dtype).tiny), b / max(np.abs(b).max(), 1)]
    rows = np.concatenate([*scaled, np.asarray(tied.counts)[:, None]], axis=1)
    joined: dict[int, list[int]] = {}
    for group in partition:
        leader = next((k for k in joined if np.abs(rows[k] - rows[group[0]]).max() <= MERGED), group[0])
        joined.setdefault(leader, []).extend(group)
    return check_partition(tied.K, joined.values())


def _rank(tied: Problem, W: Array) -> int:
    """Singular values of the logits, √n-weighted, that exceed rounding: those of W squared, by balance."""
    sigma = np.linalg.svd(np.asarray(W), compute_uv=False) ** 2 * float(jnp.sqrt(tied.lam_W / tied.lam_H))
    return int((sigma > RANK * max(sigma[0], 1)).sum())


def _merged_signs(tied: Problem, means: Params, partition: Partition) -> tuple[int, int, float]:
    """Negative and zero eigenvalues on the differences inside merged groups, and the least of them.

    Signs are those of the block with a unit diagonal, which Sylvester's law allows and disparate λ's ask for.
    """
    index, zeros, least = 0, 0, np.inf
    for group in partition:
        if len(group) > 1:
            block = merged_block(tied, means, group)
            root = np.sqrt(np.diag(block))
            values = np.linalg.eigvalsh(block / np.outer(root, root))
            index += (len(group) - 1) * int((values < -ZERO).sum())
            zeros += (len(group) - 1) * int((np.abs(values) <= ZERO).sum())
            least = min(least, float(np.linalg.eigvalsh(block)[0]))
    return index, zeros, least


def _least_eigenvalue(tied: Problem, means: Params, rank: int) -> float:
    """λ_min at a minimum whose orbit is points: the origin, or two groups in one dimension.

    By the dense Hessian over class means, and by the features' own where they vary within a class.
    """
    if not rank:
        return float(np.min(hessian_spectrum(tied, "origin").eigenvalues))
    least = [float(dense_eigenvalues(tied, means)[0])]
    for Z, y, n in zip(logits(tied, means).T, tied.Y.T, tied.counts, strict=True):
        if n > 1:
            C = tied.loss.mean_hessian(Z[:, None], y[:, None], jnp.ones(1))
            least.append(float(tied.lam_H + jnp.linalg.eigvalsh(means.W.T @ C @ means.W)[0] / tied.total))
    return min(least)
