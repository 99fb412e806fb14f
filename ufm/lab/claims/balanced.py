"""Claims about the optimum of equal classes (THEORY 1.2 to 1.4, 2)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ufm.lab.claims.claim import Cases, claim
from ufm.lab.claims.grid import balanced_problems, solved
from ufm.lab.dense import dense_eigenvalues
from ufm.measure.collapse import collapse_metrics
from ufm.model.problem import Params, Problem, objective
from ufm.theory.certificate import Verdict, certify
from ufm.theory.optimum import balanced_minimiser, balanced_value, collapse_threshold

BELOW = (1e-6, 1e-3, 0.03, 0.3, 0.9)  # loads K√n s at which the optimum is not the origin


@claim(
    "Balanced optimum",
    "the minimum over (W, H, b) from random starts is f* = log(1+(K−1)e^{−t}) + (K−1)t√(nλ_Wλ_H)",
    "THEORY 1.2; guo2024 published a closed form first",
    1e-12,
)
def optimum_value(full: bool) -> Cases:
    """|f_min − f*|; Newton's method leaves a gradient g near rounding, and g²/2μ of f (g^{4/3} at K√n s = 1)."""
    for text, problem in balanced_problems(full):
        found = objective(problem, solved(problem, seed=0))
        yield text, abs(float(found - balanced_value(problem)))


@claim(
    "Closed form is global",
    "the simplex ETF with ‖w_k‖² = (K−1)t/(Kc), h = c w has duality gap zero",
    "THEORY 1.2, 8.1",
    1e-12,
)
def optimum_certified(full: bool) -> Cases:
    """The larger of gap/f and the relative error of the stated norms; inf without the verdict GLOBAL."""
    for text, problem in balanced_problems(full):
        x = balanced_minimiser(problem)
        c = certify(problem, x)
        residual = max(float(jnp.abs(c.gap) / c.value), _norm_error(problem, x))
        yield text, residual if c.verdict == Verdict.GLOBAL else np.inf


def _norm_error(problem: Problem, x: Params) -> float:
    K, n = problem.K, float(problem.counts[0])
    s, c = float(problem.s), float(jnp.sqrt(problem.lam_W / (n * problem.lam_H)))
    t = np.log(1 / (np.sqrt(n) * s) - K + 1) if K * np.sqrt(n) * s < 1 else 0.0
    squared = float(jnp.max(jnp.abs(jnp.sum(x.W**2, axis=1) - (K - 1) / (K * c) * t)))
    aligned = float(jnp.max(jnp.abs(x.H - c * x.W.T @ problem.Y)))
    return max(squared * c, aligned / c) / max(t, 1e-3)


@claim(
    "Unique up to rotation",
    "minimisers from different random starts have the Gram matrices of the closed form",
    "zhu2021, Theorem 3.1; THEORY 1.2",
    1e-7,
)
def optimum_unique(full: bool) -> Cases:
    """Relative distance of the Grams of [Wᵀ H]; a relative gradient of 1e-14 times a condition number of 1e6."""
    for text, problem in balanced_problems(full, BELOW):
        closed = _gram(balanced_minimiser(problem))
        for seed in (1, 2):
            found = _gram(solved(problem, seed))
            yield f"{text} seed={seed}", float(jnp.linalg.norm(found - closed) / jnp.linalg.norm(closed))


def _gram(x: Params) -> jax.Array:
    both = jnp.concatenate([x.W.T, x.H], axis=1)
    return both.T @ both


@claim(
    "Collapse to zero",
    "W = H = 0 is global iff K√(nλ_Wλ_H) ≥ 1, and a strict saddle below",
    "THEORY 1.2, 1.4",
    1e-12,
)
def zero_threshold(full: bool) -> Cases:
    """Relative distance of the computed from the stated threshold; inf if a verdict on it or 1 % off is wrong."""
    for load, verdict in ((0.99, Verdict.STRICT_SADDLE), (1.0, Verdict.GLOBAL), (1.01, Verdict.GLOBAL)):
        for text, problem in balanced_problems(full, (load,)):
            K, n = problem.K, float(problem.counts[0])
            residual = abs(float(collapse_threshold(problem)) * K * np.sqrt(n) - 1)
            right = certify(problem, _origin(problem)).verdict == verdict
            yield f"{text} K√n s={load!r}", residual if right else np.inf


def _origin(problem: Problem) -> Params:
    return jax.tree.map(jnp.zeros_like, balanced_minimiser(problem))


@claim(
    "Balance",
    "λ_W WᵀW = λ_H HHᵀ at minimisers found from random starts",
    "THEORY 0, the critical points of f",
    1e-9,
)
def balance(full: bool) -> Cases:
    """‖λ_W WᵀW − λ_H HHᵀ‖ relative to ‖λ_W WᵀW‖: twice the relative gradient, 1e-14 after Newton's method, times √d."""
    for text, problem in balanced_problems(full, BELOW):
        x = solved(problem, seed=3)
        left, right = problem.lam_W * x.W.T @ x.W, problem.lam_H * x.H @ x.H.T
        yield text, float(jnp.linalg.norm(left - right) / jnp.linalg.norm(left))


@claim(
    "Origin's curvature",
    "below the threshold the Hessian at W = H = 0 has exactly (K−1)d negative eigenvalues, "
    "all (λ_W+λ_H)/2 − √((λ_W−λ_H)²/4 + 1/(K²n))",
    "THEORY 1.4",
    1e-12,
)
def origin_index(full: bool) -> Cases:
    """Relative distance of the dense negative eigenvalues from the stated one; inf if their number differs."""
    for text, problem in balanced_problems(full, (1e-3, 0.3, 0.9)):
        K, n, d = problem.K, float(problem.counts[0]), problem.d
        if K * (n + 1) * d > 1500:
            continue
        values = dense_eigenvalues(problem, _origin(problem))
        mean, half = float(problem.lam_W + problem.lam_H) / 2, float(problem.lam_W - problem.lam_H) / 2
        least = mean - np.hypot(half, 1 / (K * np.sqrt(n)))
        negative = values[values < least / 2]
        right = len(negative) == (K - 1) * d and (values[len(negative) :] > -1e-14).all()
        yield text, np.max(np.abs(negative - least)) / abs(least) if right else np.inf


@claim(
    "NC1 to NC4",
    "a minimiser found from a random start is collapsed by eleven metrics of NC1 to NC4",
    "zhu2021, Theorem 3.1; papyan2020",
    1e-7,
)
def collapsed(full: bool) -> Cases:
    """The largest of the eleven, at most linear in the distance to the optimum, as in the claim of uniqueness."""
    names = ("nc1_pinv", "nc1_quot", "nc2_equinorm_means", "nc2_equinorm_weights", "nc2_maxangle_means",
             "nc2_maxangle_weights", "nc2_etf_err", "nc2_etf_err_weights", "nc3_self_dual", "nc3_dual_err",
             "nc4_disagree")  # fmt: skip
    for text, problem in balanced_problems(full, BELOW):
        x = solved(problem, seed=4)
        labels = np.asarray(problem.Y).argmax(0)
        metrics = dataclasses.asdict(collapse_metrics(x.H, labels, x.W, x.b))
        name = max(names, key=lambda name: metrics[name])
        yield f"{text} {name}", metrics[name]


CLAIMS = (optimum_value, optimum_certified, optimum_unique, zero_threshold, balance, origin_index, collapsed)
