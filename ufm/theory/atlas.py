"""Critical points that are not global minima: partitions of the classes, and coarse simplex ETFs (THEORY 1.6, 8.3)."""

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import scipy.optimize
from jaxtyping import Float

from ufm.model.geometry import simplex_etf
from ufm.model.problem import Params, Problem, logits
from ufm.theory.optimum import class_size, frame_point, margin, wrong_class_probability

Partition = tuple[tuple[int, ...], ...]


def check_partition(K: int, partition: Any) -> Partition:
    """The partition in normal form: groups and their classes ascending; ValueError if it is none of 0, …, K − 1."""
    try:
        groups = tuple(sorted(tuple(sorted(operator.index(k) for k in group)) for group in partition))
    except TypeError:
        raise ValueError(f"partition must be a sequence of groups of classes, got {partition!r}") from None
    if sorted(k for group in groups for k in group) != list(range(K)) or () in groups:
        raise ValueError(f"partition must hold each of the classes 0, ..., {K - 1} once, got {partition!r}")
    return groups


def equal_groups(K: int, partition: Sequence[Sequence[int]]) -> Partition:
    """check_partition, and ValueError unless all groups are of one size."""
    groups = check_partition(K, partition)
    if len({len(group) for group in groups}) > 1:
        raise ValueError(f"partition must have groups of equal size for the closed form, got {groups}")
    return groups


def successive_groups(K: int, m: int) -> Partition:
    """The partition of K classes into m groups of K/m successive ones; ValueError if m does not divide K."""
    if not 1 <= m <= K or K % m:
        raise ValueError(f"m must divide the K = {K} classes into equal groups, got {m}")
    return tuple(tuple(int(k) for k in group) for group in np.arange(K).reshape(m, -1))


def coarse_etf(problem: Problem, partition: int | Sequence[Sequence[int]]) -> Params:
    """The critical point whose classes are merged into m equal groups, the groups on a simplex ETF.

    A number m alone means groups of successive classes. The logit gap between groups is t_m = log(1/(g√n s) − m + 1),
    g = K/m. All classes apart is the global minimiser and all together the origin; any other is a strict saddle while
    K√n s < 1, with ‖∇_Z g‖₂ = 1/(K√n).

    Raises:
        ValueError: if groups or counts are unequal, m does not divide K, the loss is not cross-entropy, or d < m − 1.

    Source: THEORY 1.6, derived for this project.
    """
    K = problem.K
    groups = successive_groups(K, partition) if isinstance(partition, int) else equal_groups(K, partition)
    m, size = len(groups), len(groups[0])
    q = size * wrong_class_probability(class_size(problem), problem.s)
    M = np.empty((K, problem.d))
    for group, row in zip(groups, simplex_etf(m, problem.d), strict=True):
        M[list(group)] = row
    return frame_point(problem, M, margin(m, q))


def index_threshold(m: int) -> float:
    """κ* = m/(m+u), u(m+u) = m(1+u)log(1+u): below it m ≥ 3 equal groups have index d(K−m), from it on (d−1)(K−m).

    For a free bias, κ = K√n s. Two groups and one have the former for all κ < 1.

    Raises:
        ValueError: if m is less than 3.

    Source: THEORY 8.3, derived for this project.
    """
    if m < 3:
        raise ValueError(f"m must be at least 3 groups for the index to change, got {m}")
    u = scipy.optimize.brentq(lambda u: u * (m + u) - m * (1 + u) * math.log1p(u), 1e-3, 1e3 * m, xtol=1e-14)
    return m / (m + u)


def merged_block(problem: Problem, means: Params, group: Sequence[int]) -> Float[np.ndarray, "r r"]:
    """The Hessian on the differences between the classes of one merged group, which it repeats len(group) − 1 times.

    At a point tied within the group, for sum-zero e over its classes, the movements δW = e xᵀ, δh_k = e_k y/√n_k, δb =
    η e see

        [ λ_W I + Σ_l (n_l/N) p_l h_l h_lᵀ   −(√n/N) I        Σ_l (n_l/N) p_l h_l      ]
        [ −(√n/N) I                          λ_H I + WᵀCW/N   0                        ]
        [ Σ_l (n_l/N) p_l h_lᵀ               0                λ_b + Σ_l (n_l/N) p_l    ],

    p_l the probability that a sample of class l gives to one class of the group. Its lower right corner is positive,
    so it has at most d negative eigenvalues; where Wa = 0 it has d − rank W times (λ_W+λ_H)/2 − √((λ_W−λ_H)²/4 +
    n/N²).

    Args:
        problem: cross-entropy with one column per class (tie_features of any).
        means: a critical point of it that is tied within the group.
        group: two or more classes of one size.

    Source: THEORY 8.3, derived for this project.
    """
    d, k = problem.d, group[0]
    W, M, N = np.asarray(means.W), np.asarray(means.H), float(problem.total)
    p = np.asarray(jax.nn.softmax(logits(problem, means), axis=0))
    weight = np.asarray(problem.multiplicity) / N * p[k]
    C = np.diag(p[:, k]) - np.outer(p[:, k], p[:, k])
    block = np.zeros((2 * d + 1, 2 * d + 1))
    block[:d, :d] = problem.lam_W * np.eye(d) + (M * weight) @ M.T
    block[:d, d:-1] = block[d:-1, :d] = -np.sqrt(problem.multiplicity[k]) / N * np.eye(d)
    block[d:-1, d:-1] = problem.lam_H * np.eye(d) + W.T @ C @ W / N
    block[:d, -1] = block[-1, :d] = M @ weight
    block[-1, -1] = problem.lam_b + weight.sum()
    return block if problem.use_bias else block[:-1, :-1]


@functools.cache
def partition_number(k: int, most: int) -> int:
    """How many ways there are to write k as a sum of positive integers of at most `most`."""
    if k == 0:
        return 1
    return sum(partition_number(k - part, part) for part in range(1, min(k, most) + 1))


def random_integer_partition(k: int, random: np.random.Generator) -> tuple[int, ...]:
    """One way to write k as a sum of positive integers, all ways equally likely, the parts descending."""
    parts: list[int] = []
    while k:
        most = min(k, parts[-1] if parts else k)
        weights = [partition_number(k - part, part) for part in range(1, most + 1)]
        total = sum(weights)
        parts.append(1 + int(random.choice(most, p=[weight / total for weight in weights])))
        k -= parts[-1]
    return tuple(parts)


def integer_partitions(k: int, most: int | None = None) -> Iterator[tuple[int, ...]]:
    """Every way to write k as a sum of positive integers, the parts descending."""
    if k == 0:
        yield ()
    for part in range(min(k, most or k), 0, -1):
        for rest in integer_partitions(k - part, part):
            yield (part, *rest)
