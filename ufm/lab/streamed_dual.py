"""The dual value of THEORY 8.1 at features that come in batches: the sums of duality.dual_value, piece by piece."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ufm.lab.blocks import Piece, Stream, Sums, add_up, as_problem
from ufm.model.problem import Problem, logits
from ufm.theory.duality import rebalancing, sample_gradient

MAX_STEPS = 100  # of Newton's method, as in bias.optimal_bias


def dual_value(stream: Stream, b: Float[Array, " K"]) -> tuple[float, float]:
    """D(Λ) ≤ f* and a bound on its rounding, as duality.dual_value has them for the whole of H.

    A free bias needs Λ1 = 0 exactly: what each class then gives or receives depends on its mean residual alone.

    Args:
        stream: the samples and W.
        b: where Newton's method for the best bias starts.
    """
    tied, shift = stream.tied, jnp.zeros((stream.tied.K, stream.tied.K))
    if tied.use_bias:
        b = optimal_bias(stream, b)
        if tied.lam_b == 0:
            sums = add_up(stream, _class_residuals, b)["residuals"]
            shift = rebalancing(tied, jnp.asarray(sums, float) / tied.counts)
    at = add_up(stream, _dual_sums, b, shift)
    sigma = largest_singular_value(at["gram"])
    scale = max(1.0, sigma / float(tied.s), float(at["overshoot"]))
    entropy = float(add_up(stream, _entropy, b, shift, scale)["entropy"])
    eps, K, N = float(jnp.finfo(b.dtype).eps), tied.K, float(tied.total)
    norm_rounding = eps * (N * at["rows"].max() / max(sigma**2, np.finfo(float).tiny) + 10 * K)
    bias_cost, bias_rounding = _bias_terms(tied, at, scale, eps * (N + K + 8))
    relative = eps * (N + K + 8) + norm_rounding
    return entropy - bias_cost, relative * (entropy + bias_cost) + bias_rounding


def optimal_bias(stream: Stream, b: Float[Array, " K"]) -> Float[Array, " K"]:
    """argmin_b of the fit with λ_b/2 ‖b‖², by the steps of bias.optimal_bias, a reading each.

    They end when the last moved nothing by √eps: Newton's next would be about the square of that.
    """
    tied, best = stream.tied, np.asarray(b, np.float64)
    lam_b = float(tied.lam_b)
    for _ in range(MAX_STEPS):
        at = add_up(stream, _bias_derivatives, jnp.asarray(best, b.dtype))
        gauge = 0 if lam_b else np.trace(at["hessian"]) / tied.K**2
        hessian = jnp.asarray(at["hessian"] + lam_b * np.eye(tied.K) + gauge)  # JAX solves what is singular, by NaN
        move = np.asarray(-jnp.linalg.solve(hessian, jnp.asarray(at["gradient"] + lam_b * best)), np.float64)
        move = np.nan_to_num(move, posinf=0, neginf=0)
        move = move / np.maximum(1, np.abs(move).max())
        best = best + move
        if np.abs(move).max() <= jnp.finfo(b.dtype).eps ** 0.5:
            break
    return jnp.asarray(best, b.dtype)


def largest_singular_value(gram: Float[np.ndarray, "K K"]) -> float:
    """‖G‖₂ from GGᵀ; NaN if that is not finite."""
    size = np.abs(gram).max()
    top = jnp.linalg.eigvalsh(jnp.asarray(gram / (size if size > 0 else 1)))[-1]
    return float(np.sqrt(size * np.maximum(0, float(top))))


def _bias_terms(tied: Problem, at: Sums, scale: float, roundings: float) -> tuple[float, float]:
    """‖Λ1‖²/(2λ_b), 0 for a free or absent bias, and the effect of rounding in Λ1 on the dual value."""
    if not tied.use_bias:
        return 0.0, 0.0
    r, lam = at["mean"] / scale, float(tied.lam_b)
    error = roundings * float(np.linalg.norm(at["mean_size"])) / scale
    if lam > 0:
        return float(r @ r) / (2 * lam), error * (float(np.linalg.norm(r)) + error) / lam
    slope = 2 * at["logit"] + np.log(tied.K)
    return 0.0, (np.abs(r).sum() + error * np.sqrt(tied.K)) * slope


def _residual(tied: Problem, W: Array, piece: Piece, b: Array) -> tuple[Problem, Array, Array]:
    block, x = as_problem(tied, W, piece, b)
    Z = logits(block, x)
    return block, Z, block.loss.residual(Z, block.Y)


@jax.jit
def _bias_derivatives(tied: Problem, W: Array, piece: Piece, b: Array) -> tuple[Sums, Sums]:
    block, Z, R = _residual(tied, W, piece, b)
    weights = jnp.asarray(block.multiplicity / tied.total)
    return {"gradient": R @ weights, "hessian": block.loss.mean_hessian(Z, block.Y, weights)}, {}


@jax.jit
def _class_residuals(tied: Problem, W: Array, piece: Piece, b: Array) -> tuple[Sums, Sums]:
    block, _, R = _residual(tied, W, piece, b)
    return {"residuals": (R * block.multiplicity) @ block.Y.T}, {}


@jax.jit
def _dual_sums(tied: Problem, W: Array, piece: Piece, b: Array, shift: Array) -> tuple[Sums, Sums]:
    block, Z, R = _residual(tied, W, piece, b)
    R, weights = R + shift @ block.Y, block.multiplicity / tied.total
    G = block.total / tied.total * sample_gradient(block, R)
    size = jnp.abs(G)
    terms = {
        "gram": jnp.matmul(G, G.T, precision="highest"),
        "rows": size @ jnp.sum(size, axis=0),
        "mean": R @ weights,
        "mean_size": jnp.abs(R) @ weights,
    }
    live = block.multiplicity
    peaks = {"overshoot": jnp.max(-jnp.sum(block.Y * R, axis=0) * live), "logit": jnp.max(jnp.abs(Z) * live)}
    return terms, peaks


@jax.jit
def _entropy(tied: Problem, W: Array, piece: Piece, b: Array, shift: Array, scale: Any) -> tuple[Sums, Sums]:
    block, _, R = _residual(tied, W, piece, b)
    R = (R + shift @ block.Y) / scale
    return {"entropy": -(block.multiplicity @ block.loss.conjugate(R, block.Y)) / tied.total}, {}
