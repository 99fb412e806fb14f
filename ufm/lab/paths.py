"""Where a trajectory is among the critical points: nearest saddle modulo symmetry, and where it rests."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.signal
from jaxtyping import Float, Int

from ufm.lab.atlas import CriticalPoint, critical_points, partition_type
from ufm.model.problem import Params, Problem, tie_features
from ufm.theory.atlas import Partition, check_partition

MOST = 1000  # labelled partitions, which seven classes of one size have
DIP = 1.0  # decades by which ‖∇f‖ falls into a plateau and rises out of it
LEVEL = 0.01  # of the fall of f over the whole path: within a plateau f changes by less


@dataclass(frozen=True)
class Landmarks:
    """Every partition saddle of a problem with its classes labelled, the optimum among them.

    Attributes:
        problem: with a column per class.
        partitions: of the classes; two that differ by exchanging classes of equal size are two.
        values: f of each.
        curvatures: λ_min of each.
        W, M, b: classifier, class means and bias, a leading axis for the landmarks.
    """

    problem: Problem
    partitions: tuple[Partition, ...]
    values: Float[np.ndarray, " L"]
    curvatures: Float[np.ndarray, " L"]
    W: Float[np.ndarray, "L K d"]
    M: Float[np.ndarray, "L d K"]
    b: Float[np.ndarray, "L K"]

    @property
    def names(self) -> tuple[str, ...]:
        """Of each landmark its groups of classes."""
        return tuple(map(partition_name, self.partitions))


def partition_name(partition: Partition) -> str:
    """The groups with their classes, as in "012 34"."""
    wide = max(max(group) for group in partition) > 9
    return " ".join((" " if wide else "").join(map(str, group)).join("()" if wide else ("", "")) for group in partition)


def landmarks(problem: Problem) -> Landmarks:
    """All labelled partition saddles (THEORY 8.3), from the lowest f up.

    Raises:
        ValueError: if there are more than a thousand partitions, or as critical_points does.
    """
    tied, counts = tie_features(problem), np.asarray(problem.counts)
    if (number := _labels(counts)) > MOST:
        raise ValueError(f"K must be smaller to tell all labelled partitions apart: {number} are more than {MOST}")
    points = critical_points(tied)
    of_type = {partition_type(counts, point.partition): point for point in points}
    found = [(of_type[partition_type(counts, p)], p) for p in _labelled(counts) if partition_type(counts, p) in of_type]
    found.sort(key=lambda pair: (pair[0].value, pair[1]))
    rows = [_relabelled(counts, point, partition) for point, partition in found]
    x = [point.params for point, _ in found]
    return Landmarks(
        tied,
        tuple(partition for _, partition in found),
        np.array([point.value for point, _ in found]),
        np.array([point.smallest_eigenvalue for point, _ in found]),
        np.stack([np.asarray(p.W)[row] for p, row in zip(x, rows, strict=True)]),
        np.stack([np.asarray(p.H)[:, row] for p, row in zip(x, rows, strict=True)]),
        np.stack([np.asarray(p.b)[row] for p, row in zip(x, rows, strict=True)]),
    )


def _labels(counts: np.ndarray) -> int:
    """How many partitions _labelled lists: a product of Bell numbers, by their triangle."""
    number = 1
    for size in np.unique(counts, return_counts=True)[1]:
        row = [1]
        for _ in range(int(size) - 1):
            row = list(itertools.accumulate(row, initial=row[-1]))
        number *= row[-1]
    return number


def _labelled(counts: np.ndarray) -> Iterator[Partition]:
    """Every partition of the classes that merges classes of equal size only."""
    classes = [np.flatnonzero(counts == n).tolist() for n in np.unique(counts)]
    for parts in itertools.product(*(list(_set_partitions(group)) for group in classes)):
        yield check_partition(len(counts), [group for part in parts for group in part])


def _set_partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in _set_partitions(items[1:]):
        yield [[items[0]], *rest]
        for i, group in enumerate(rest):
            yield [*rest[:i], [items[0], *group], *rest[i + 1 :]]


def _relabelled(counts: np.ndarray, point: CriticalPoint, partition: Partition) -> list[int]:
    """For every class one of the point's that plays its part under another partition of the same type."""
    parts: dict[tuple[int, int], list[int]] = {}
    for group in point.partition:
        parts.setdefault((int(counts[group[0]]), len(group)), []).append(group[0])
    row = [0] * len(counts)
    for group in partition:
        model = parts[int(counts[group[0]]), len(group)].pop()
        for k in group:
            row[k] = model
    return row


def nearest(marks: Landmarks, x: Params) -> tuple[Int[np.ndarray, " T"], Float[np.ndarray, " T"]]:
    """The landmark nearest to each point of a path, modulo O(d) and shifts of a free bias, and its distance.

    ‖·‖ over all variables, every sample with its own column; the best rotation is that of the orthogonal Procrustes
    problem. Distances below 1e-8 of the norm of the point are rounding.

    Args:
        marks: landmarks of the path's problem.
        x: points with a column per class (class_path), a leading axis for the path; H's spread within classes is not
            seen.
    """
    W, M, b = (np.asarray(part) for part in (x.W, x.H, x.b))
    n = np.asarray(marks.problem.counts)
    if not all(np.isfinite(part).all() for part in (W, M, b)):
        raise ValueError("x must be finite to be near anything; leave out the records after the trajectory's end")
    found = [_distances(marks, n, *point) for point in zip(W, M, b, strict=True)]
    index = np.argmin(found, axis=1)
    return index, np.take_along_axis(np.asarray(found), index[:, None], axis=1)[:, 0]


def _distances(marks: Landmarks, n: np.ndarray, W: np.ndarray, M: np.ndarray, b: np.ndarray) -> np.ndarray:
    overlap = np.swapaxes(marks.W, 1, 2) @ W + (marks.M * n) @ M.T
    U, _, V = np.linalg.svd(overlap)
    R = U @ V
    shift = b - marks.b
    if not marks.problem.use_bias:
        shift = 0 * shift
    elif marks.problem.lam_b == 0:
        shift = shift - shift.mean(1, keepdims=True)
    rows = ((W - marks.W @ R) ** 2).sum((1, 2))
    columns = (n * (M - np.swapaxes(R, 1, 2) @ marks.M) ** 2).sum((1, 2))
    return np.sqrt(rows + columns + (shift**2).sum(1))


def class_path(problem: Problem, x: Params) -> Params:
    """The point with class means for features; for observe."""
    share = problem.Y * problem.multiplicity / problem.counts[:, None]
    return Params(x.W, x.H @ share.T, x.b)


@dataclass(frozen=True)
class Plateau:
    """A stretch of a path on which f hardly falls.

    Attributes:
        first, last: records between which f stays within 1 % of its whole fall of its value at the middle.
        middle: the record of least gradient.
    """

    first: int
    last: int
    middle: int


def plateaus(value: Float[np.ndarray, " T"], grad_norm: Float[np.ndarray, " T"]) -> list[Plateau]:
    """Where a path rests: at minima of ‖∇f‖ a decade deep, the start's included and the end's not."""
    f, slope = value, np.log10(np.maximum(grad_norm, np.finfo(float).tiny))
    high = slope.max() + 2 * DIP
    middles = scipy.signal.find_peaks(-np.concatenate([[high], slope]), prominence=DIP)[0] - 1
    found = []
    for middle in middles:
        off = np.flatnonzero(np.abs(f - f[middle]) > LEVEL * (f.max() - f.min()))
        before, after = off[off < middle], off[off > middle]
        if after.size:
            found.append(Plateau(int(before.max() + 1) if before.size else 0, int(after.min() - 1), int(middle)))
    return found
