"""Claims about unequal classes (THEORY 3, 8.2)."""

import math
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np

from ufm.lab.claims.claim import Cases, claim
from ufm.lab.optimum import global_minimiser
from ufm.model.geometry import geometry_distance
from ufm.model.problem import Params, Problem, class_mean_problem
from ufm.theory.certificate import certify
from ufm.theory.imbalance import minority_threshold, ridge_margins, seli_grams
from ufm.theory.optimum import collapse_threshold

KINDS: tuple[dict[str, Any], ...] = ({}, {"lam_b": 1e-2}, {"use_bias": False})
COUNTS = ([100, 30, 10, 3, 1], [10, 10, 10, 1, 1], [500, 500, 500, 100, 100])
WIDE = ([1000] * 5 + [10] * 5, [7, 7, 7, 2, 2, 1], list(range(1, 21)))


def _counts(full: bool) -> tuple[list[int], ...]:
    return (*COUNTS, *WIDE) if full else COUNTS


def _problem(counts: list[int], s: float, kind: dict) -> Problem:
    return class_mean_problem(counts, len(counts), lam_W=2 * s, lam_H=s / 2, **kind)


@claim(
    "Any class counts",
    "the class-mean problem, reduced to distinct class sizes, has a solution of duality gap zero",
    "THEORY 8.2, 8.1",
    1e-11,
)
def certified_optimum(full: bool) -> Cases:
    """The gap over f at the solution expanded to all classes."""
    for counts in _counts(full):
        for kind in KINDS:
            for s in (1e-2, 1e-4, 1e-6, 1e-9):
                problem = _problem(counts, s, kind)
                c = certify(problem, global_minimiser(problem))
                yield f"counts={counts} s={s:g} {kind}", abs(float(c.gap / c.value))


@claim(
    "Imbalanced collapse to zero",
    "W = 0 is global iff s ≥ √λ_max(PDP)/N without bias, and iff s ≥ ‖(p̂1ᵀ − I)D^{1/2}‖₂/N with a free one",
    "THEORY 1.5",
    1e-12,
)
def zero_threshold(full: bool) -> Cases:
    """Relative distance of the norm at the origin from the formula; inf if the solution 1 % off it is wrong."""
    for counts in _counts(full):
        n = np.array(counts, float)
        P, N = np.eye(len(n)) - 1 / len(n), n.sum()
        formulas = {
            "no bias": (np.sqrt(np.linalg.eigvalsh(P * n @ P)[-1]) / N, {"use_bias": False}),
            "free bias": (np.linalg.norm((np.outer(n / N, np.ones(len(n))) - np.eye(len(n))) * np.sqrt(n), 2) / N, {}),
        }
        for text, (stated, kind) in formulas.items():
            above, below = (_size(_problem(counts, factor * stated, kind)) for factor in (1.01, 0.99))
            computed = float(collapse_threshold(_problem(counts, stated, kind)))
            right = above < 1e-6 and below > 1e-3
            yield f"counts={counts} {text}", abs(computed / stated - 1) if right else math.inf


def _size(problem: Problem) -> float:
    x = global_minimiser(problem)
    return float(jnp.linalg.norm(x.W @ x.H))


@claim(
    "Minority collapse",
    "classes of the same size n_B share their logits iff √n_B ≤ N√(λ_Wλ_H), whatever the others and the bias",
    "THEORY 3.4; the transition is in hong2023 and dang2024",
    1e-6,
)
def minority_collapse(full: bool) -> Cases:
    """Relative spread of the group's logits 2 % above the threshold; inf if 2 % below there is none."""
    for counts in _counts(full):
        for size in sorted({n for n in counts if counts.count(n) > 1}):
            for kind in KINDS:
                first, second = [k for k, n in enumerate(counts) if n == size][:2]
                s = float(minority_threshold(_problem(counts, 1.0, kind))[first])
                above, below = (
                    _spread(global_minimiser(_problem(counts, factor * s, kind)), first, second)
                    for factor in (1.02, 0.98)
                )
                yield f"counts={counts} n_B={size} {kind}", above if below > 1e-4 else math.inf


def _spread(x: Params, k: int, l: int) -> float:  # noqa: E741
    Z = x.W @ x.H
    return float(jnp.linalg.norm(Z[:, k] - Z[:, l]) / (1e-12 + jnp.max(jnp.abs(Z))))


@claim(
    "SELI, logarithmically",
    "as λ → 0 the classifier's Gram approaches SELI's, at a distance whose inverse grows linearly in log(1/λ)",
    "thrampoulidis2022 for the limit; THEORY 3.2, 3.3",
    1e-2,
)
def seli_limit(full: bool) -> Cases:
    """Relative change between successive slopes of 1/distance against log(1/λ), itself O(1/log²(1/λ)) here."""
    for counts in COUNTS[:2]:
        for kind in KINDS if full else KINDS[2:]:
            inverse = [_inverse_distance(counts, 10.0**-k, kind) for k in (6, 8, 10, 12)]
            slopes = np.diff(inverse)
            for k, (a, b) in enumerate(pairwise(slopes)):
                yield f"counts={counts} {kind} slope {k}", abs(b / a - 1) if a > 0 else math.inf


def _inverse_distance(counts: list[int], lam: float, kind: dict) -> float:
    W = global_minimiser(_problem(counts, lam / sum(counts), kind)).W
    return 1 / float(geometry_distance(W @ W.T, seli_grams(jnp.array(counts, float))[0]))


@claim(
    "Margins at small λ",
    "z_y − z_c = log(1/(Ns)) − log|A^{†/2}|_cy + o(1), o(1) falling like 1/log(1/λ)",
    "THEORY 3.3",
    10.0,
)
def margin_law(full: bool) -> Cases:
    """|z_y − z_c − law| · log(1/λ), which stays bounded; inf if the error itself does not fall."""
    for counts in COUNTS[:2]:
        errors = [_margin_error(counts, 10.0**-k) for k in (4, 8, 12)]
        for k, error in zip((4, 8, 12), errors, strict=True):
            falls = errors == sorted(errors, reverse=True)
            yield f"counts={counts} lam=1e-{k}", error * k * math.log(10) if falls else math.inf


def _margin_error(counts: list[int], lam: float) -> float:
    problem = _problem(counts, lam / sum(counts), {"use_bias": False})
    x = global_minimiser(problem)
    Z = x.W @ x.H
    return float(jnp.max(jnp.abs(jnp.diag(Z) - Z - ridge_margins(problem))))


CLAIMS = (certified_optimum, zero_threshold, minority_collapse, seli_limit, margin_law)
