"""Moments of features by class, in float64 and in two passes over batches.

The first pass yields the class means, the second everything that refers to them. No raw second moment is ever
formed: features are measured from one of the samples, then from their class mean, so a large common offset or
nearly full collapse costs no digits. Memory is O(d K), no d×d matrix included, whatever N is; time O(N d K).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

CHUNK = 2048  # samples cast to float64 at a time

Batches = Iterable[tuple[Any, Any]] | Callable[[], Iterable[tuple[Any, Any]]]


@dataclass(frozen=True)
class ClassMeans:
    """Class means μ_k, kept as differences from one of the samples."""

    counts: Float[np.ndarray, " K"]
    """n_k, samples in class k."""

    origin: Float[np.ndarray, " d"]
    """The first sample."""

    offsets: Float[np.ndarray, "d K"]
    """μ_k − origin."""


@dataclass(frozen=True)
class Spread:
    """How features scatter about their class means, and which of them two classifiers agree on."""

    variances: Float[np.ndarray, " K"]
    """(1/n_k) Σ_{i in class k} ‖h_i − μ_k‖²."""

    along: Float[np.ndarray, " r"]
    """vᵀ Σ_W v for each column v of V, with Σ_W = (1/N) Σ_i (h_i − μ_{y_i})(h_i − μ_{y_i})ᵀ."""

    hits: int
    """Number of samples that argmax (W h + b) and the nearest class mean send to the same class."""

    hits_without_bias: int
    """The same for argmax W h."""


def class_means(batches: Batches, K: int, d: int) -> ClassMeans:
    """μ_k = (1/n_k) Σ_{i in class k} h_i, accumulated over batches.

    Args:
        batches: pairs (H, labels) with H d×N_batch and integer labels in 0..K−1.
        K: number of classes.
        d: feature dimension.

    Raises:
        ValueError: if batches can be read only once, hold no sample, miss a class, or hold bad arrays.
    """
    if isinstance(batches, Iterator):
        raise ValueError(f"batches is a {type(batches).__name__}, read only once: pass a list or a function")
    counts, totals, origin = np.zeros(K), np.zeros((d, K)), None
    for X, y in _chunks(batches, K, d):
        origin = X[:, 0].copy() if origin is None else origin
        X -= origin[:, None]
        counts += np.bincount(y, minlength=K)
        totals += X @ (y[:, None] == np.arange(K))
    if origin is None:
        raise ValueError("batches hold no sample: pass some of every class, afresh each time")
    if (missing := np.flatnonzero(counts == 0)).size:
        shown = ", ".join(map(str, missing[:10])) + (", ..." if missing.size > 10 else "")
        raise ValueError(f"labels have no sample of class {shown}, but each of the {K} rows of W needs one")
    return ClassMeans(counts, origin, totals / counts)


def spread_about(
    batches: Batches,
    means: ClassMeans,
    centre: Float[np.ndarray, " d"],
    V: Float[np.ndarray, "d r"],
    W: Float[np.ndarray, "K d"],
    b: Float[np.ndarray, " K"],
) -> Spread:
    """Variances about the class means, in all and along the columns of V, and agreement of two classifiers.

    Args:
        batches: the pairs that the means came from, in any order.
        means: what class_means returned.
        centre: global mean minus means.origin; nearest means are found in coordinates about it.
        V: orthonormal columns.
        W: classifier, a row per class.
        b: bias.

    Raises:
        ValueError: if the batches are not those of the first pass.
    """
    K, d = W.shape
    M = means.offsets - centre[:, None]
    reach = (M**2).sum(0)[:, None] / 2  # argmin_k ‖x − m_k‖ = argmax_k m_kᵀx − ‖m_k‖²/2
    base = (W @ (means.origin + centre))[:, None]
    counts, squares, along, hits = np.zeros(K), np.zeros(K), np.zeros(V.shape[1]), np.zeros(2, int)
    for X, y in _chunks(batches, K, d):
        X -= means.origin[:, None]
        deviations = X - means.offsets[:, y]
        counts += np.bincount(y, minlength=K)
        squares += np.bincount(y, weights=(deviations**2).sum(0), minlength=K)
        along += ((V.T @ deviations) ** 2).sum(1)
        X -= centre[:, None]
        nearest, logits = (M.T @ X - reach).argmax(0), W @ X + base
        hits += [((logits + shift).argmax(0) == nearest).sum() for shift in (b[:, None], 0.0)]
    if (counts != means.counts).any():
        first, second = int(means.counts.sum()), int(counts.sum())
        raise ValueError(
            f"batches gave {first} samples, then {second} or other classes: every reading must be the same"
        )
    return Spread(squares / counts, along / counts.sum(), *hits.tolist())


def _chunks(batches: Batches, K: int, d: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces (X, y) of every batch: X a d×B float64 copy with B ≥ 1, y its labels."""
    for number, batch in enumerate(batches() if callable(batches) else batches):
        where = f"batch {number}: " if number else ""  # the first may be all there is
        H, labels = _checked(batch, K, d, where)
        for start in range(0, labels.size, CHUNK):
            X = H[:, start : start + CHUNK].astype(np.float64)
            if not np.isfinite(X).all():
                i, j = np.argwhere(~np.isfinite(X))[0]
                raise ValueError(f"{where}H[{i}, {start + j}] is {X[i, j]}: every entry must be finite")
            yield X, labels[start : start + CHUNK]


def _checked(batch: Any, K: int, d: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        H, labels = batch
    except (TypeError, ValueError):
        raise ValueError(f"{where}a {type(batch).__name__} is no batch: yield pairs (H, labels)") from None
    H, labels = np.asarray(H), np.asarray(labels)
    if H.ndim != 2 or H.shape[0] != d:
        cure = "pass its transpose" if H.shape[1:] == (d,) else "W has another width"
        raise ValueError(f"{where}H has shape {H.shape}, but must be d×N with d = {d}, the width of W: {cure}")
    if not np.can_cast(H.dtype, np.float64):
        raise ValueError(f"{where}H has dtype {H.dtype}, which is not real: cast it to a floating type")
    if labels.shape != H.shape[1:]:
        raise ValueError(f"{where}labels have shape {labels.shape}, but H has N = {H.shape[1]}: pass one each")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{where}labels have dtype {labels.dtype}: cast class numbers to an integer type")
    if (outside := labels[(labels < 0) | (labels >= K)]).size:
        raise ValueError(f"{where}labels hold {outside[0]}: number the classes of W from 0 to K−1 = {K - 1}")
    return H, labels.astype(np.intp)
