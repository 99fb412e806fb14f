"""Features and a classifier beside what the theory predicts for their λ's."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ufm.lab.optimum import global_minimiser
from ufm.measure.features import Features
from ufm.model.losses import CrossEntropy
from ufm.model.problem import Params, Problem, logits, objective
from ufm.theory.certificate import Certificate, certify
from ufm.theory.optimum import is_balanced, nonnegative_minimiser


def problem_of_features(features: Features, *, lam_W: float, lam_H: float, lam_b: float) -> tuple[Problem, Params]:
    """The model whose free features would be these, and the point they are, in the default float type.

    Raises:
        ValueError: if a λ is out of range, a class has no sample or shapes disagree.
    """
    K, d = np.shape(features.W)
    labels = np.asarray(features.labels)
    if labels.size and not (labels.min() >= 0 and labels.max() < K):
        raise ValueError(f"labels must be in 0..{K - 1} for W of {K} rows, got {labels.min()} to {labels.max()}")
    Y = np.eye(K)[:, labels]
    use_bias = features.b is not None
    lam = [np.asarray(x) for x in (lam_W, lam_H, lam_b)]
    problem = Problem(Y, np.ones(Y.shape[1]), CrossEntropy(), lam[0], lam[1], lam[2], d, use_bias)
    dtype = jnp.result_type(float)
    b = features.b if use_bias else np.zeros(K)
    return problem, Params(*(jnp.asarray(np.asarray(x), dtype) for x in (features.W, features.H, b)))


def implied_lam_H(features: Features, lam_W: float) -> float:
    """The λ_H = λ_W ‖W‖²/‖H‖² of which the balance λ_W‖W‖² = λ_H‖H‖² would be that of a critical point (THEORY 0)."""
    W, H = (np.asarray(x, np.float64) for x in (features.W, features.H))
    return float(lam_W * np.sum(W**2) / np.sum(H**2))


def class_margins(problem: Problem, params: Params) -> Float[Array, " N"]:
    """z_y − mean_{j≠y} z_j of every sample: the logit margin t where logits are symmetric."""
    Z = logits(problem, params)
    true = jnp.sum(problem.Y * Z, axis=0)
    return true - (jnp.sum(Z, axis=0) - true) / (problem.K - 1)


def compare(problem: Problem, params: Params) -> tuple[dict[str, dict[str, float]], Certificate]:
    """Observed beside predicted, each as summarise gives it, and the certificate at the point.

    `predicted` is the global optimum of the same K, counts, d and λ's with free features; `predicted_nonnegative`, for
    equal counts, d ≥ K and features that are nowhere negative, the one under H ≥ 0.

    Raises:
        ValueError: as global_minimiser does.
    """
    points = {"observed": params, "predicted": global_minimiser(problem)}
    if is_balanced(problem) and problem.d >= problem.K and bool(jnp.all(params.H >= 0)):
        points["predicted_nonnegative"] = nonnegative_minimiser(problem)
    return {name: summarise(problem, point) for name, point in points.items()}, certify(problem, params)


def summarise(problem: Problem, x: Params) -> dict[str, float]:
    """f, logit margins, mean squared norms of rows and features, balance and bias spread of a point."""
    W2, H2 = jnp.sum(x.W**2), jnp.sum(problem.multiplicity * x.H**2)
    margins = class_margins(problem, x)
    quantities: dict[str, Any] = {
        "value": objective(problem, x),
        "margin_mean": problem.multiplicity @ margins / problem.total,
        "margin_min": jnp.min(margins),
        "w_norm2_mean": W2 / problem.K,
        "h_norm2_mean": H2 / problem.total,
        "balance": problem.lam_W * W2 / (problem.lam_H * H2),
        "bias_spread": jnp.max(x.b) - jnp.min(x.b),
    }
    return {name: float(value) for name, value in quantities.items()}
