"""Claims about unequal classes (THEORY 3, 8.2)."""

import math
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np

from ufm.lab.claims.claim import Cases, claim
from ufm.lab.optimum import global_minimiser
from ufm.model.geometry import geometry_distance
from ufm.model.problem import Params, Problem, class_mean_problem, logits
from ufm.theory.certificate import certify
from ufm.theory.imbalance import minority_threshold, ridge_margins, seli_grams
from ufm.theory.optimum import collapse_threshold

KINDS: tuple[dict[str, Any], ...] = ({}, {"lam_b": 1e-2}, {"use_bias": False})
COUNTS = ([100, 30, 10, 3, 1], [10, 10, 10, 1, 1], [500, 500, 500, 100, 100])
VANISHING = (1e-6, 1e-8, 1e-10, 1e-12)  # λ = N s
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
    "for d ≥ K−1 classes of the same size n_B share their logits iff √n_B ≤ N√(λ_Wλ_H), whatever the others",
    "THEORY 3.4; hong2023 announces a sharp threshold",
    1e-9,
)
def minority_collapse(full: bool) -> Cases:
    """Relative spread of the group's logits 1e-5 above the threshold; inf if 1e-5 below it is not of that size."""
    for counts in _counts(full):
        for size in sorted({n for n in counts if counts.count(n) > 1}):
            for kind in KINDS:
                first, second = [k for k, n in enumerate(counts) if n == size][:2]
                s = float(minority_threshold(_problem(counts, 1.0, kind))[first])
                above, below = (
                    _spread(global_minimiser(_problem(counts, factor * s, kind)), first, second)
                    for factor in (1 + 1e-5, 1 - 1e-5)
                )
                yield f"counts={counts} n_B={size} {kind}", above if below > 1e-5 else math.inf


def _spread(x: Params, k: int, l: int) -> float:  # noqa: E741
    Z = x.W @ x.H
    return float(jnp.linalg.norm(Z[:, k] - Z[:, l]) / (1e-12 + jnp.max(jnp.abs(Z))))


@claim(
    "SELI, logarithmically",
    "as λ → 0 without bias (or with λ_b fixed) WWᵀ approaches SELI's, at a distance whose inverse grows linearly in "
    "log(1/λ); with a free bias it approaches the Gram of the centred labels instead",
    "thrampoulidis2022 for the limit under STEP imbalance; THEORY 3.2, 3.3; the free bias derived here",
    2e-2,
)
def seli_limit(full: bool) -> Cases:
    """Relative change between successive slopes of 1/distance against log(1/λ), itself O(1/log²(1/λ)) here."""
    for counts in COUNTS[:2]:
        for kind in KINDS:
            inverse = [_inverse_distance(counts, lam, kind) for lam in VANISHING]
            for k, (a, b) in enumerate(pairwise(np.diff(inverse))):
                yield f"counts={counts} {kind} slope {k}", abs(b / a - 1) if a > 0 else math.inf


def _vanishing(counts: list[int], lam: float, kind: dict[str, Any]) -> tuple[Problem, Params]:
    problem = _problem(counts, lam / sum(counts), kind)
    return problem, global_minimiser(problem)


def _inverse_distance(counts: list[int], lam: float, kind: dict[str, Any]) -> float:
    W = _vanishing(counts, lam, kind)[1].W
    limit = seli_grams(jnp.array(counts, float), free_bias=kind == {})[0]
    return 1 / float(geometry_distance(W @ W.T, limit))


@claim(
    "Margins at small λ",
    "(z+b)_y − (z+b)_c = log(1/(Ns)) − log|A^{†/2}E|_cy + o(1), E = I, or I − p̂1ᵀ with a free bias",
    "THEORY 3.3 without bias; the free bias derived here",
    3e-2,
)
def margin_law(full: bool) -> Cases:
    """|o(1)| at λ = 0, by a parabola in 1/log(1/λ) through the three smallest λ's; the next term is cubic."""
    for counts in COUNTS[:2]:
        for kind in KINDS:
            errors = np.stack([_margin_errors(counts, lam, kind) for lam in VANISHING[1:]])
            powers = np.vander(1 / np.log(1 / np.array(VANISHING[1:])), 3)
            intercept = np.linalg.solve(powers, errors.reshape(3, -1))[-1]
            yield f"counts={counts} {kind}", float(np.max(np.abs(intercept)))


def _margin_errors(counts: list[int], lam: float, kind: dict[str, Any]) -> np.ndarray:
    problem, x = _vanishing(counts, lam, kind)
    Z = logits(problem, x)
    return np.asarray(jnp.diag(Z) - Z - ridge_margins(problem))


CLAIMS = (certified_optimum, zero_threshold, minority_collapse, seli_limit, margin_law)
