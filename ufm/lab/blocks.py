"""Sums over the samples of a problem whose features come in batches, with one piece of them in memory at a time."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ufm.measure.moments import CHUNK, Batches
from ufm.model.problem import Params, Problem

Piece = tuple[Any, Any, Any]  # H (d×B), labels (B), which of the columns are samples (B)
Sums = dict[str, Any]


class Stream(NamedTuple):
    """Samples that come in batches, and the classifier they meet.

    Attributes:
        batches: pairs (H, labels), to be read several times.
        tied: the class-mean problem of their counts, with the λ's.
        W: classifier.
    """

    batches: Batches
    tied: Problem
    W: Float[Array, "K d"]


def add_up(stream: Stream, part: Callable[..., tuple[Sums, Sums]], *arguments: Any) -> Sums:
    """All pieces' part(tied, W, piece, *arguments), a dict of terms and one of peaks: sums in float64, and maxima.

    Raises:
        ValueError: if the batches do not hold the samples that stream.tied counts.
    """
    total: Sums = {}
    for piece in _pieces(stream.batches, stream.tied):
        result = part(stream.tied, stream.W, piece, *arguments)
        terms, peaks = jax.tree.map(lambda x: np.asarray(x, np.float64), result)
        total |= {name: total.get(name, 0.0) + x for name, x in terms.items()}
        total |= {name: np.maximum(total.get(name, x), x) for name, x in peaks.items()}
    return total


def as_problem(tied: Problem, W: Float[Array, "K d"], piece: Piece, b: Float[Array, " K"]) -> tuple[Problem, Params]:
    """The samples of a piece as a problem of their own; f is the mean of their objectives, weighted by samples.

    So that it is, λ_H becomes λ_H N/B for B samples. Columns that only pad the piece have multiplicity 0, which no
    check outside jit would let pass.
    """
    H, labels, live = piece
    Y = jax.nn.one_hot(labels, tied.K, axis=0, dtype=H.dtype)
    own = Y, jnp.asarray(live, H.dtype), tied.lam_H * tied.total / jnp.sum(live)
    return eqx.tree_at(lambda p: (p.Y, p.multiplicity, p.lam_H), tied, own), Params(W, H, b)


def _pieces(batches: Batches, tied: Problem) -> Iterator[Piece]:
    counts, seen = np.asarray(tied.counts), np.zeros(tied.K)
    for H, labels in batches() if callable(batches) else batches:
        H, labels = np.asarray(H), np.asarray(labels).astype(np.intp)
        found = np.bincount(labels, minlength=tied.K)
        seen += found[: tied.K] if found.size == tied.K else np.nan
        for start in range(0, labels.size, CHUNK):
            yield _padded(H[:, start : start + CHUNK], labels[start : start + CHUNK])
    if (seen != counts).any():
        raise ValueError(
            f"batches gave {counts.sum():.0f} samples, then {seen.sum():.0f} or other classes: "
            "every reading must be the same"
        )


def _padded(H: np.ndarray, labels: np.ndarray) -> Piece:
    """The width is made a power of two, so that few shapes are compiled."""
    size, width = labels.size, 1 << (labels.size - 1).bit_length()
    columns, own = np.zeros((len(H), width), jnp.result_type(float)), np.zeros(width, np.int32)
    columns[:, :size], own[:size] = H, labels
    return columns, own, np.arange(width) < size
