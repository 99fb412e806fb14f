"""The balanced optimum in closed form, and the thresholds at which everything collapses (THEORY 1.2, 1.5)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ufm.model.geometry import centring, simplex_etf
from ufm.model.losses import CrossEntropy
from ufm.model.padding import check_unpadded
from ufm.model.problem import Params, Problem, is_concrete, tie_features
from ufm.theory.bias import optimal_bias
from ufm.theory.duality import sample_gradient

Scalar = float | int | np.floating | Float[Array | np.ndarray, ""]


def is_balanced(problem: Problem) -> bool:
    """Whether every class has the same number of samples.

    Raises:
        ValueError: if the problem is padded, or the counts are traced; build the problem inside the traced function,
            from plain integers.
    """
    check_unpadded(problem)
    if not (is_concrete(problem.Y) and is_concrete(problem.multiplicity)):
        raise ValueError(
            "Y is traced, or spread over processes, so its counts are unknown; build the problem where they are"
        )
    return bool(np.ptp(np.asarray(problem.counts)) == 0)


def wrong_class_probability(n: Scalar, s: Scalar) -> Float[Array, ""]:
    """q* = √n s, the softmax probability of each wrong class at a nonzero optimum (THEORY 1.2)."""
    return jnp.sqrt(n) * s


def margin(K: Scalar, q: Scalar) -> Float[Array, ""]:
    """t = log(1/q − K + 1), the logit gap of which each of K − 1 wrong classes gets probability q; 0 if K q ≥ 1."""
    return jnp.log1p(jnp.maximum(0, 1 - K * q) / q)


def balanced_minimiser(problem: Problem) -> Params:
    """The global minimiser for equal class counts: H collapsed on a simplex ETF, W = H̄ᵀ/c, b = 0 (THEORY 1.2).

    It is unique up to a common isometry of R^d, and up to a multiple of 1 in a free bias. Anything may be traced;
    traced counts are taken to be equal. A padded problem has the minimiser of its own classes, and zeros.

    Raises:
        ValueError: if counts are known and unequal, the loss is not cross-entropy, or d < K − 1.

    Source: THEORY 1.2, derived for this project; zhu2021, Theorem 3.1 for the geometry; guo2024 published a
    closed form first.
    """
    check_dimension(problem)
    K = problem.classes
    t = margin(K, wrong_class_probability(equal_size(problem), problem.s))
    M = simplex_etf(problem.K, problem.d) * (np.arange(problem.d) < K - 1)  # Helmert's column j ends in row j + 1
    return frame_point(problem, M, t)


def frame_point(problem: Problem, M: Float[Array | np.ndarray, "K d"], t: Float[Array, ""]) -> Params:
    """W ∝ M and h_i ∝ row y_i of M, balanced (λ_W WᵀW = λ_H HHᵀ), with logits Z = t M Mᵀ Y for equal class counts."""
    root = jnp.sqrt(t)
    ratio = (equal_size(problem) * problem.lam_H / problem.lam_W) ** 0.25
    return Params(root * ratio * M, root / ratio * M.T @ problem.Y, jnp.zeros(problem.K, root.dtype))


def balanced_value(problem: Problem) -> Float[Array, ""]:
    """f* = log(1 + (K−1)e^{−t}) + (K−1) t q*, in nats, for equal class counts (THEORY 1.2).

    Raises:
        ValueError: as balanced_minimiser does.
    """
    check_dimension(problem)
    K, q = problem.classes, wrong_class_probability(equal_size(problem), problem.s)
    t = margin(K, q)
    return jnp.log1p((K - 1) * jnp.exp(-t)) + (K - 1) * t * q


def nonnegative_minimiser(problem: Problem) -> Params:
    """The global minimiser under H ≥ 0, as after a ReLU, for equal class counts: orthogonal class means, W ∝ P H̄ᵀ.

    The margin is that of the free model with the wrong-class probability √(K/(K−1)) times as large: forbidding
    h − h_G costs the norm of the global mean.

    Raises:
        ValueError: as balanced_minimiser does, and if d < K.

    Source: THEORY 3.7, derived for this project without bias, where dang2024 has the geometry. With one: for
    S_k = Σ_{i∈k} h_i ≥ 0 the mean gap is at most √(1/(nK(K−1))) ‖W‖‖H‖, since ‖S P‖² ≤ (1 − 1/K)‖S‖², and for equal
    counts the bias cancels in it; Jensen's inequality does the rest.
    """
    K, n, d = problem.K, class_size(problem), problem.d
    if d < K:
        raise ValueError(f"d must be at least K = {K} for orthogonal class means, got {d}")
    t = margin(K, jnp.sqrt(K / (K - 1)) * wrong_class_probability(n, problem.s))
    ratio = (n * problem.lam_H / problem.lam_W * K / (K - 1)) ** 0.25
    M = np.eye(K, d)
    W, H = jnp.sqrt(t) * ratio * centring(K) @ M, jnp.sqrt(t) / ratio * M.T @ problem.Y
    return Params(W, H, jnp.zeros(K, t.dtype))


def equal_size(problem: Problem) -> Scalar:
    """The n of a balanced cross-entropy problem, padded or not; ValueError for any other, unless counts are traced."""
    if not isinstance(problem.loss, CrossEntropy):
        raise ValueError(f"loss must be CrossEntropy for the closed form, got {type(problem.loss).__name__}")
    counts, present = problem.counts, problem.present
    if is_concrete(counts) and is_concrete(present) and np.ptp(np.asarray(counts)[np.asarray(present) > 0]) > 0:
        raise ValueError(f"counts must be equal for the closed form, got {counts.tolist()}")
    return float(counts[0]) if is_concrete(counts) else counts[0]


def class_size(problem: Problem) -> float:
    """The known n of a balanced cross-entropy problem without padding; ValueError for any other."""
    is_balanced(problem)  # refuses what is traced or padded
    return float(equal_size(problem))


def check_dimension(problem: Problem) -> None:
    """Refuse d < K − 1, where the optimum need not be that of the convex problem (NUC)."""
    if problem.d < problem.K - 1:
        raise ValueError(f"d must be at least K - 1 = {problem.K - 1} for the global optimum, got {problem.d}")


def collapse_threshold(problem: Problem) -> Float[Array, ""]:
    """The s = √(λ_W λ_H) from which on W = H = 0 is the global minimiser: ‖∇_Z g(0, b)‖₂ at the best b.

    1/(K√n) for equal counts; √λ_max(P D P)/N without bias; ‖(p̂1ᵀ − I)D^{1/2}‖₂/N with a free one, p̂ = n_k/N.

    Source: THEORY 1.5 and 0 (the certificate at the origin); λ_b > 0 by the same argument at its best bias.
    """
    tied = tie_features(problem)
    R = tied.loss.residual(origin_logits(tied), tied.Y)
    return jnp.linalg.norm(sample_gradient(tied, R), 2)


def origin_logits(tied: Problem) -> Float[Array, "K K"]:
    """The logits of every class's sample at W = H = 0: the best bias."""
    zero = jnp.zeros((tied.K, tied.K))
    return zero + optimal_bias(tied, zero, zero[0])[:, None] if tied.use_bias else zero


def origin(problem: Problem) -> Params:
    """W = H = 0 at the best bias: a critical point for any counts, bias and λ's (THEORY 1.4, 1.5)."""
    b = origin_logits(tie_features(problem))[:, 0]
    return Params(jnp.zeros((problem.K, problem.d), b.dtype), jnp.zeros((problem.d, problem.Y.shape[1]), b.dtype), b)
