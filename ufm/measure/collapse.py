"""Neural collapse, measured: NC0 to NC4 of features and a classifier from anywhere, each under its own name.

Notation: μ_k the mean of class k, μ_G the global mean, M = [μ_k − μ_G] (d×K), w_k the rows of W; P = I − 11ᵀ/K,
Σ_W = (1/N) Σ_i (h_i − μ_{y_i})(h_i − μ_{y_i})ᵀ, Σ_B = (1/K) M Mᵀ; norms are Euclidean or Frobenius; "pairs" are
the K(K−1)/2 pairs of classes. Sources beside the papers: tding1 is the code of zhu2021, the notebook that of
papyan2020, rhubarbwu the neural-collapse library of wu2024, nc-toolbox the library of that name.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float, Integer

from ufm.measure.moments import Batches, ClassMeans, class_means, spread_about

Centre = Literal["class_means", "samples"]


@dataclass(frozen=True)
class Collapse:
    """What collapse is said to be, one float per published definition; zero at collapse unless stated.

    Quotients x/0 are inf and 0/0 nan, without warning, as when class means coincide or a row of W is zero. A
    difference of means shorter than its rounding error, max(N, d) eps √tr(Σ_W + Σ_B), counts as zero.
    """

    nc0: float
    """‖Wᵀ1‖², the squared length of the sum of the rows of W; grows as W².
    Source: THEORY 5.10 (zhao2026; its code logs the root)."""

    nc1_pinv: float
    """tr(Σ_W Σ_B^†)/K; directions without between-class variance are left out; inf if none is left, nan if all
    features coincide. Source: papyan2020, Fig. 6 (the notebook omits 1/K); tding1; rhubarbwu."""

    nc1_svd: float
    """(1/K) Σ_j v_jᵀΣ_W v_j / σ_j over the leading min(K−1, d) eigenpairs (σ_j, v_j) of Σ_B: nc1_pinv if Σ_B
    has that rank, inf or nan if less. Source: the notebook, with the 1/K of rhubarbwu ("svd")."""

    nc1_quot: float
    """tr Σ_W / tr Σ_B; inf if all class means coincide, nan if all features do.
    Source: rhubarbwu ("quotient")."""

    nc1_cdnv: float
    """Average over pairs of (v_k + v_l)/(2‖μ_k − μ_l‖²) with v_k = (1/n_k) Σ_{i in k} ‖h_i − μ_k‖²; inf or nan
    if two means coincide. Source: THEORY 5.9; rhubarbwu."""

    nc2_equinorm_means: float
    """Std_k ‖μ_k − μ_G‖ / Avg_k ‖μ_k − μ_G‖, the Std unbiased (over K−1); nan if all means coincide.
    Source: papyan2020, Fig. 2; the notebook."""

    nc2_equinorm_weights: float
    """Std_k ‖w_k‖ / Avg_k ‖w_k‖, the Std unbiased (over K−1). Source: papyan2020, Fig. 2; the notebook."""

    nc2_equiangle_means: float
    """Std over pairs of cos(μ_k − μ_G, μ_l − μ_G), biased (over their number); nan if a centred mean is zero.
    Source: papyan2020, Fig. 3."""

    nc2_equiangle_weights: float
    """Std over pairs of cos(w_k, w_l), biased (over their number); nan if a row is zero.
    Source: papyan2020, Fig. 3."""

    nc2_maxangle_means: float
    """Average over pairs of |cos(μ_k − μ_G, μ_l − μ_G) + 1/(K−1)|; nan if a centred mean is zero.
    Source: papyan2020, Fig. 4; the notebook."""

    nc2_maxangle_weights: float
    """Average over pairs of |cos(w_k, w_l) + 1/(K−1)|; nan if a row is zero.
    Source: papyan2020, Fig. 4; the notebook."""

    nc2_etf_err: float
    """‖MᵀM/‖MᵀM‖ − P/√(K−1)‖, of the means; nan if all coincide. Source: rhubarbwu."""

    nc2_etf_err_weights: float
    """‖WWᵀ/‖WWᵀ‖ − P/√(K−1)‖, of W: what zhu2021 calls NC2. Source: THEORY 1.7 (tding1)."""

    nc2g_log: float
    """Variance over pairs, biased (over their number), of −log ‖u_k − u_l‖, u_k = (μ_k − μ_G)/‖μ_k − μ_G‖;
    nan if two directions coincide. Source: THEORY 5.9 (GNC2); rhubarbwu."""

    nc3_self_dual: float
    """‖Wᵀ/‖W‖ − M/‖M‖‖², between 0 and 4; nan if all means coincide.
    Source: papyan2020, Fig. 5; the notebook."""

    nc3_dual_err: float
    """‖WM/‖WM‖ − P/√(K−1)‖: what zhu2021 calls NC3; nan if all means coincide.
    Source: THEORY 1.7 (tding1); rhubarbwu."""

    nc3u_uni_dual: float
    """Variance over classes, unbiased (over K−1), of ⟨w_k, μ_k − μ_G⟩, not divided by norms: grows as W²M².
    Source: THEORY 5.9; rhubarbwu."""

    nc4_disagree: float
    """Fraction of samples with argmax_k (⟨w_k, h⟩ + b_k) ≠ argmin_k ‖h − μ_k‖, ties to the lowest class.
    Source: papyan2020, Fig. 7 (there on test samples)."""

    nc4_agree: float
    """Fraction of samples with argmax_k ⟨w_k, h⟩ = argmin_k ‖h − μ_k‖, b ignored; 1 at collapse.
    Source: rhubarbwu."""

    bias_collapse: float
    """‖W μ_G + b‖; grows as W and b. Source: THEORY 1.7 (tding1)."""

    toolbox_nc1_cdnv: float
    """nc1_cdnv with v_k = Σ_{i in k} ‖h_i − μ_k‖²/(n_k − 1); nan if a class has one sample.
    Source: nc-toolbox."""

    toolbox_nc2_equinormness: float
    """Average over pairs k < l of log ‖μ_k − μ_G‖ − log ‖μ_l − μ_G‖, signed: it depends on the order of the
    classes and can vanish far from collapse. Source: nc-toolbox."""

    toolbox_nc2_equiangularity: float
    """Average over pairs of cos(μ_k − μ_G, μ_l − μ_G) + 1/(K−1), signed: it vanishes for means of equal norm
    about their own mean, whatever the angles. Source: nc-toolbox."""

    toolbox_nc3_self_duality: float
    """‖W/‖W‖ − Mᵀ/‖M‖‖, the root of nc3_self_dual. Source: nc-toolbox."""

    toolbox_nc4_agreement: float
    """1 − nc4_disagree, b included; 1 at collapse. Source: nc-toolbox."""


def collapse_metrics(
    H: Float[Array | np.ndarray, "d N"],
    labels: Integer[Array | np.ndarray, " N"],
    W: Float[Array | np.ndarray, "K d"],
    b: Float[Array | np.ndarray, " K"] | None,
    *,
    centre: Centre = "class_means",
) -> Collapse:
    """NC0 to NC4 of features H with labels under the classifier h ↦ Wh + b, computed in float64.

    Args:
        H: features, a column a sample.
        labels: class numbers 0..K−1, every class present.
        W: classifier, a row a class; K ≥ 2, and K > d is allowed.
        b: bias, or None where the classifier has none.
        centre: what μ_G is: the mean of the class means (rhubarbwu and the notebook; about it alone an ETF of
            means stays one under unequal counts) or of all samples (tding1, nc-toolbox and the text of
            papyan2020). They differ under unequal counts only.

    Raises:
        ValueError: if a shape, dtype or value is not of this form.

    Source: THEORY 1.7, 2, 5.9 and 5.10; each field of Collapse names its own.
    """
    return collapse_metrics_stream([(H, labels)], W, b, centre=centre)


def collapse_metrics_stream(
    batches: Batches,
    W: Float[Array | np.ndarray, "K d"],
    b: Float[Array | np.ndarray, " K"] | None,
    *,
    centre: Centre = "class_means",
) -> Collapse:
    """collapse_metrics of features that come in batches, in memory O(dK + K²) beyond one batch.

    Args:
        batches: pairs (H, labels), H a column a sample; a list, or a function that returns a fresh iterator.
            Read twice, since what refers to the means needs them first: the same samples, in any order.
        W: classifier, a row a class.
        b: bias, or None.
        centre: as in collapse_metrics.

    Raises:
        ValueError: as collapse_metrics does, and if batches are empty or differ between the two readings.
    """
    W, b = _checked_classifier(W, b)
    means = class_means(batches, *W.shape)
    global_mean = _global_mean(means, centre)
    M = means.offsets - global_mean[:, None]
    V, sigma, _ = np.linalg.svd(M, full_matrices=False)
    V, sigma = V[:, : W.shape[0] - 1], sigma[: W.shape[0] - 1]  # centred means have rank at most K−1
    spread = spread_about(batches, means, global_mean, V, W, b)

    n, N = means.counts, means.counts.sum()
    within = n @ spread.variances / N
    rounding = max(N, W.shape[1]) * np.finfo(float).eps * np.sqrt(within + (M**2).sum(0).mean())
    M = np.where(np.linalg.norm(M, axis=0) > rounding, M, 0.0)
    sigma = np.where(sigma > rounding, sigma, 0.0)
    gaps = _gaps(means.offsets, rounding)
    with np.errstate(all="ignore"):
        fields = {
            "nc0": (W.sum(0) ** 2).sum(),
            **_variability(M, within, spread.along, sigma),
            "nc1_cdnv": _cdnv(spread.variances, gaps),
            **_frames(M, W, rounding),
            **_duality(M, W),
            "nc4_disagree": (N - spread.hits) / N,
            "nc4_agree": spread.hits_without_bias / N,
            "bias_collapse": np.linalg.norm(W @ (means.origin + global_mean) + b),
            "toolbox_nc1_cdnv": _cdnv(spread.variances * n / (n - 1), gaps),
            "toolbox_nc4_agreement": spread.hits / N,
        }
    return Collapse(**{name: float(value) for name, value in fields.items()})


def _checked_classifier(W: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    W = np.asarray(W)
    if W.ndim != 2 or W.shape[0] < 2 or W.shape[1] < 1:
        raise ValueError(f"W has shape {W.shape}, but must be K×d with a row for each of at least 2 classes")
    b = np.zeros(W.shape[0]) if b is None else np.asarray(b)
    if b.shape != W.shape[:1]:
        raise ValueError(f"b has shape {b.shape}, but must be ({W.shape[0]},) like the rows of W, or None")
    return _as_float64("W", W), _as_float64("b", b)


def _as_float64(name: str, x: np.ndarray) -> np.ndarray:
    if not np.can_cast(x.dtype, np.float64):
        raise ValueError(f"{name} has dtype {x.dtype}, which is not real: cast it to a floating type")
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"{name} holds {x[~np.isfinite(x)][0]}: every entry must be finite")
    return x


def _global_mean(means: ClassMeans, centre: str) -> np.ndarray:
    """μ_G − origin."""
    if centre == "class_means":
        return means.offsets.mean(1)
    if centre == "samples":
        return means.offsets @ (means.counts / means.counts.sum())
    raise ValueError(f'centre is {centre!r}, but must be "class_means" or "samples"')


def _variability(M: np.ndarray, within: float, along: np.ndarray, sigma: np.ndarray) -> dict[str, float]:
    K = M.shape[1]
    terms = along / (sigma**2 / K)
    quotient = within / ((M**2).sum() / K)
    pinv = terms[sigma > 0].sum() / K if sigma.any() else quotient
    return {"nc1_pinv": pinv, "nc1_svd": terms.sum() / K, "nc1_quot": quotient}


def _cdnv(variances: np.ndarray, gaps: np.ndarray) -> float:
    i, j = np.triu_indices(variances.size, 1)
    return ((variances[i] + variances[j]) / (2 * gaps**2)).mean()


def _frames(M: np.ndarray, W: np.ndarray, rounding: float) -> dict[str, float]:
    K = W.shape[0]
    lengths = np.linalg.norm(M, axis=0)
    cos_M, cos_W = _cosines(M.T), _cosines(W)
    i, j = np.triu_indices(K, 1)
    return {
        "nc2_equinorm_means": _relative_deviation(lengths),
        "nc2_equinorm_weights": _relative_deviation(np.linalg.norm(W, axis=1)),
        "nc2_equiangle_means": cos_M.std(),
        "nc2_equiangle_weights": cos_W.std(),
        "nc2_maxangle_means": np.abs(cos_M + 1 / (K - 1)).mean(),
        "nc2_maxangle_weights": np.abs(cos_W + 1 / (K - 1)).mean(),
        "nc2_etf_err": _etf_error(M.T @ M),
        "nc2_etf_err_weights": _etf_error(W @ W.T),
        "nc2g_log": np.log(_gaps(M / lengths, rounding / lengths.min())).var(),
        "toolbox_nc2_equinormness": (np.log(lengths[i]) - np.log(lengths[j])).mean(),
        "toolbox_nc2_equiangularity": (cos_M + 1 / (K - 1)).mean(),
    }


def _duality(M: np.ndarray, W: np.ndarray) -> dict[str, float]:
    self_dual = ((W / np.linalg.norm(W) - M.T / np.linalg.norm(M)) ** 2).sum()
    return {
        "nc3_self_dual": self_dual,
        "nc3_dual_err": _etf_error(W @ M),
        "nc3u_uni_dual": np.einsum("kd,dk->k", W, M).var(ddof=1),
        "toolbox_nc3_self_duality": np.sqrt(self_dual),
    }


def _relative_deviation(x: np.ndarray) -> float:
    return x.std(ddof=1) / x.mean()


def _cosines(vectors: np.ndarray) -> np.ndarray:
    """The cosine between every two rows, a number per pair."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(unit), 1)]


def _gaps(M: np.ndarray, rounding: float) -> np.ndarray:
    """‖m_k − m_l‖ of every two columns, in the order of triu_indices; below rounding it is zero."""
    rows = np.ascontiguousarray(M.T)
    gaps = np.concatenate([np.linalg.norm(rows[k + 1 :] - rows[k], axis=1) for k in range(len(rows) - 1)])
    return np.where(gaps > rounding, gaps, 0.0)


def _etf_error(G: np.ndarray) -> float:
    """‖G/‖G‖ − P/√(K−1)‖."""
    K = len(G)
    return float(np.linalg.norm(G / np.linalg.norm(G) - (np.eye(K) - 1 / K) / np.sqrt(K - 1)))
