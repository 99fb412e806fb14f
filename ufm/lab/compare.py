"""Features and a classifier beside what the theory predicts for their λ's."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ufm.lab.optimum import global_minimiser
from ufm.measure.features import Features
from ufm.measure.moments import class_means
from ufm.model.losses import CrossEntropy
from ufm.model.problem import Params, Problem, logits, objective
from ufm.theory.certificate import Certificate, certify, check_point
from ufm.theory.optimum import is_balanced, nonnegative_minimiser


def problem_of_features(
    features: Features, *, lam_W: float, lam_H: float | None, lam_b: float
) -> tuple[Problem, Params]:
    """The model whose free features would be these, and the point they are, in the default float type.

    Args:
        features: any numbers of samples per class, but at least one.
        lam_W: λ_W.
        lam_H: λ_H per sample; None takes the one that balance implies.
        lam_b: λ_b; ignored without b.

    Raises:
        ValueError: if a λ is out of range, a class has no sample, shapes disagree or entries are not finite.
    """
    if np.ndim(features.W) != 2:
        raise ValueError(f"W has shape {np.shape(features.W)}, but must be K×d with a row for each class")
    K, d = np.shape(features.W)
    class_means([(features.H, features.labels)], K, d)  # refuses what are not features of K classes
    Y, use_bias = np.eye(K)[:, np.asarray(features.labels)], features.b is not None
    lam_H = implied_lam_H(features, lam_W) if lam_H is None else lam_H
    lam = [np.asarray(x) for x in (lam_W, lam_H, lam_b)]
    problem = Problem(Y, np.ones(Y.shape[1]), CrossEntropy(), lam[0], lam[1], lam[2], d, use_bias)
    dtype = jnp.result_type(float)
    b = features.b if use_bias else np.zeros(K)
    params = Params(*(jnp.asarray(np.asarray(x), dtype) for x in (features.W, features.H, b)))
    check_point(problem, params)
    return problem, params


def implied_lam_H(features: Features, lam_W: float) -> float:
    """The λ_H = λ_W ‖W‖²/‖H‖² of which the balance λ_W‖W‖² = λ_H‖H‖² would be that of a critical point (THEORY 0).

    Raises:
        ValueError: if W or H is zero or not finite, when no λ_H is implied.
    """
    W2, H2 = (np.sum(np.asarray(x, np.float64) ** 2) for x in (features.W, features.H))
    if not (0 < W2 < np.inf and 0 < H2 < np.inf):
        raise ValueError(f"W and H must be finite and nonzero to imply lam_H, got ‖W‖² = {W2:g}, ‖H‖² = {H2:g}")
    return float(lam_W * W2 / H2)


def class_margins(problem: Problem, params: Params) -> Float[Array, " N"]:
    """z_y − mean_{j≠y} z_j of every sample: the logit margin t where logits are symmetric."""
    Z = logits(problem, params)
    true = jnp.sum(problem.Y * Z, axis=0)
    return true - (jnp.sum(Z, axis=0) - true) / (problem.classes - 1)


def compare(problem: Problem, params: Params) -> tuple[dict[str, dict[str, float]], Certificate]:
    """Observed beside predicted, each as summarise gives it, and the certificate at the point.

    `predicted` is the global optimum of the same K, counts, d and λ's with free features; `predicted_nonnegative`, for
    equal counts, d ≥ K and features that are nowhere negative, the one under H ≥ 0.

    Raises:
        ValueError: as certify and global_minimiser do.
    """
    check_point(problem, params)
    points = {"observed": params, "predicted": global_minimiser(problem)}
    if is_balanced(problem) and problem.d >= problem.K and bool(jnp.all(params.H >= 0)):
        points["predicted_nonnegative"] = nonnegative_minimiser(problem)
    return {name: summarise(problem, point) for name, point in points.items()}, certify(problem, params)


def summarise(problem: Problem, x: Params) -> dict[str, float]:
    """The quantities of a point as plain numbers."""
    return {name: float(value) for name, value in quantities(problem, x).items()}


def quantities(problem: Problem, x: Params) -> dict[str, Any]:
    """f, logit margins, mean squared norms of rows and features, balance and bias spread of a point, padded or not."""
    W2, H2 = jnp.sum(x.W**2), jnp.sum(problem.multiplicity * x.H**2)
    margins = class_margins(problem, x)
    exists = jnp.asarray(problem.present) > 0
    return {
        "value": objective(problem, x),
        "margin_mean": problem.multiplicity @ margins / problem.total,
        "margin_min": jnp.min(jnp.where(problem.multiplicity > 0, margins, jnp.inf)),
        "w_norm2_mean": W2 / problem.classes,
        "h_norm2_mean": H2 / problem.total,
        "balance": problem.lam_W * W2 / (problem.lam_H * H2),
        "bias_spread": jnp.max(jnp.where(exists, x.b, -jnp.inf)) - jnp.min(jnp.where(exists, x.b, jnp.inf)),
    }
