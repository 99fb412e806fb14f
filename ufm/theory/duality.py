"""A lower bound on f* from any point, by Fenchel duality of the convex form (THEORY 8.1)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ufm.model.problem import Params, Problem
from ufm.theory.bias import optimal_bias


def sample_gradient(problem: Problem, R: Float[Array, "K N"]) -> Float[Array, "K N"]:
    """∇_Z g with every sample's own column, as a matrix of the same singular values: √ω_i r_i / N."""
    return R * jnp.sqrt(problem.multiplicity) / problem.total


def generic(size: int) -> Float[np.ndarray, " size"]:
    """A fixed vector in no special position, the first entries the same for every size."""
    return np.modf(np.arange(1, size + 1) * np.sqrt(3))[0] - 0.5


def top_singular_pair(
    G: Float[Array, "K N"],
) -> tuple[Float[Array, ""], Float[Array, " K"], Float[Array, " N"]]:
    """σ, u, v with σ = ‖G‖₂, Gv = σu, from the K×K Gram matrix; u = v = 0 if σ = 0.

    If several singular values are ‖G‖₂ to rounding, u is the projection of a fixed vector onto their space, so that it
    depends on G alone and neither on the eigensolver nor on rows of zeros.
    """
    size = jnp.max(jnp.abs(G))
    M = G / jnp.where(size > 0, size, 1)  # whose squares do not underflow
    values, vectors = jnp.linalg.eigh(jnp.matmul(M, M.T, precision="highest"))
    sigma = jnp.sqrt(jnp.maximum(values[-1], 0))
    top = values > values[-1] * (1 - 1024 * jnp.finfo(G.dtype).eps)
    u = vectors @ (top * (generic(len(G)).astype(G.dtype) @ vectors))
    u = u / jnp.where(sigma > 0, jnp.linalg.norm(u), 1)
    return size * sigma, u, u @ M / jnp.where(sigma > 0, sigma, 1)


def dual_value(problem: Problem, params: Params) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """D(Λ) = −g*(Λ) − ‖Λ1‖²/(2λ_b) ≤ f* at the feasible Λ nearest the point, and a bound on its rounding, in nats.

    Λ = θ (P − Y)/N with P the softmax at the point's WH and the best bias for it; θ ≤ 1 shrinks it to ‖Λ‖₂ ≤ s. A
    free bias (λ_b = 0) needs Λ1 = 0 exactly, so what Newton's method left of it is moved between classes first. Any
    feasible Λ will do, so errors in the logits, in P and in the bias make the bound worse but not wrong.

    The rounding counts N + K + 8 terms in each sum of one sign, and for ‖Λ‖₂ the fraction norm_rounding: D is concave
    and 0 at Λ = 0, so shrinking Λ by a fraction costs at most that fraction of it. What rounding leaves of Λ1 costs
    its size times the optimal bias, which λ_b > 0 gives as Λ1/λ_b; if the bias is free, moving that mass back between
    two entries of a column costs at most the difference of their logits.
    """
    Z = jnp.matmul(params.W, params.H, precision="highest")
    logits = Z
    if problem.use_bias:
        logits = Z + optimal_bias(problem, Z, params.b)[:, None]
    R = problem.loss.residual(logits, problem.Y)
    free = problem.use_bias & (problem.lam_b == 0)
    R = R + jnp.where(free, rebalancing(problem, R), 0)
    G = sample_gradient(problem, R)
    sigma = top_singular_pair(G)[0]
    overshoot = jnp.max(-jnp.sum(problem.Y * R, axis=0))
    R = R / jnp.max(jnp.stack([jnp.ones_like(sigma), sigma / problem.s, overshoot]))
    bias_cost, bias_rounding = _bias_terms(problem, R, logits)
    entropy = -jnp.asarray(problem.multiplicity @ problem.loss.conjugate(R, problem.Y)) / problem.total
    relative = (sum(problem.Y.shape) + 8) * jnp.finfo(R.dtype).eps + norm_rounding(G, sigma)
    return entropy - bias_cost, relative * (entropy + bias_cost) + bias_rounding


def _mean_residual(problem: Problem, R: Float[Array, "K N"]) -> Float[Array, " K"]:
    """Λ1, the gradient that the bias sees."""
    return R @ problem.multiplicity / problem.total


def rebalancing(problem: Problem, R: Float[Array, "K N"]) -> Float[Array, "K N"]:
    """What makes Λ1 = 0 when added: a class with too much mass gives from its own samples to those with too little."""
    r = _mean_residual(problem, R)
    excess, lack = jnp.maximum(r, 0), jnp.maximum(-r, 0)
    received = jnp.outer(lack, excess) / jnp.where(jnp.sum(excess) > 0, jnp.sum(excess), 1)
    given = (received - jnp.diag(excess)) * problem.total / jnp.where(problem.counts > 0, problem.counts, 1)
    return given @ problem.Y


def _bias_terms(
    problem: Problem, R: Float[Array, "K N"], logits: Float[Array, "K N"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """‖Λ1‖²/(2λ_b), 0 for a free or absent bias, and the effect of rounding in Λ1 on the dual value."""
    if not problem.use_bias:
        return jnp.zeros(()), jnp.zeros(())
    r = _mean_residual(problem, R)
    size = jnp.linalg.norm(_mean_residual(problem, jnp.abs(R)))
    error = (sum(problem.Y.shape) + 8) * jnp.finfo(R.dtype).eps * size
    lam = jnp.where(problem.lam_b > 0, problem.lam_b, 1)
    cost = jnp.where(problem.lam_b > 0, jnp.sum(r**2) / (2 * lam), 0)
    slope = 2 * jnp.max(jnp.abs(logits)) + jnp.log(problem.classes)
    free = (jnp.sum(jnp.abs(r)) + error * jnp.sqrt(problem.classes)) * slope
    return cost, jnp.where(problem.lam_b > 0, error * (jnp.linalg.norm(r) + error) / lam, free)


def value_rounding(
    problem: Problem, params: Params, R: Float[Array, "K N"], value: Float[Array, ""]
) -> Float[Array, ""]:
    """A bound on |computed f − f|, R the residual at the point.

    Sums of terms of one sign round relatively, by at most one rounding per row and per column if a matrix is summed in
    blocks or row by row, as XLA does; so N + K + d of them. A logit's error e changes ℓ by at most 2e times the wrong
    classes' probability on the way, which is at most exp(2e) times the one at the point.
    """
    K, N = problem.Y.shape
    eps = jnp.finfo(value.dtype).eps
    size = jnp.abs(params.W) @ jnp.abs(params.H) + jnp.abs(params.b)[:, None]
    error = (problem.d + 2) * eps * jnp.max(size, axis=0)
    log_wrong = jnp.log(jnp.maximum(-jnp.sum(problem.Y * R, axis=0), jnp.finfo(value.dtype).tiny))
    wrong = jnp.exp(jnp.minimum(0, log_wrong + 2 * error))
    return eps * (N + K + problem.d + 8) * value + problem.multiplicity @ (2 * error * wrong) / problem.total


def gradient_rounding(problem: Problem, params: Params, R: Float[Array, "K N"]) -> Params:
    """Entrywise bounds on |computed ∇f − ∇f|, R the residual at the point.

    A logit's error e changes a residual by at most the fraction exp(2e) − 1 of it; sums of N terms or less and the
    softmax round by N + K + d + 8 units more of their terms' sizes.
    """
    K, N = problem.Y.shape
    eps = jnp.finfo(R.dtype).eps
    W, H, b = jnp.abs(params.W), jnp.abs(params.H), jnp.abs(params.b)
    logit = (problem.d + 2) * eps * jnp.max(W @ H + problem.use_bias * b[:, None], axis=0)
    fraction = jnp.expm1(2 * logit) + (N + K + problem.d + 8) * eps
    A = jnp.abs(R) * (fraction * problem.multiplicity / problem.total)
    own = (problem.lam_W * W, problem.lam_H * problem.multiplicity * H, problem.lam_b * b)
    return Params(*(jnp.asarray(x + 4 * eps * y) for x, y in zip((A @ H.T, W.T @ A, A.sum(1)), own, strict=True)))


def norm_rounding(G: Float[Array, "K N"], sigma: Float[Array, ""]) -> Float[Array, ""]:
    """A relative bound on the rounding of ‖G‖₂: N eps |G||G|ᵀ in its Gram matrix, 10 K eps in the eigensolver.

    The norm of |G||G|ᵀ is at most its largest row sum, about 4‖G‖₂² at a simplex ETF.
    """
    K, N = G.shape
    M = jnp.abs(G) / jnp.where(sigma > 0, sigma, 1)
    return jnp.finfo(G.dtype).eps * (N * jnp.max(M @ jnp.sum(M, axis=0)) + 10 * K)
