"""The convex problem (NUC) with one column per class in CVXPY; a process of its own: arguments and result are JSON."""

import json
import statistics
import sys
import time
from typing import Any

import cvxpy as cp
import numpy as np
from scipy.special import logsumexp


def solve_by_cvxpy(
    counts: list[int], lam_W: float, lam_H: float, solver: str, options: dict[str, Any]
) -> dict[str, Any]:
    """min Σ_k (n_k/N) ℓ(z_k + b; k) + s‖Z D^{1/2}‖_* over X = Z D^{1/2} and b: its value where the solver ended.

    `seconds` is the solver's own time, the median of the cold solves that a second holds; `construction` what CVXPY
    adds to the first.
    """
    n = np.asarray(counts, float)
    s, weight = np.sqrt(lam_W * lam_H), n / n.sum()
    X, b = cp.Variable((n.size, n.size)), cp.Variable((n.size, 1))
    Z = X @ np.diag(n**-0.5) + b @ np.ones((1, n.size))
    problem = cp.Problem(cp.Minimize(weight @ (cp.log_sum_exp(Z, axis=0) - cp.diag(Z)) + s * cp.normNuc(X)))
    start = time.perf_counter()
    seconds = [_solve(problem, solver, options)]
    construction = time.perf_counter() - start - seconds[0]
    while time.perf_counter() - start < 1:
        seconds.append(_solve(problem, solver, options))
    logits = X.value / np.sqrt(n) + b.value
    return {
        "seconds": statistics.median(seconds),
        "construction": construction,
        "steps": problem.solver_stats.num_iters,
        "status": problem.status,
        "value": weight @ (logsumexp(logits, axis=0) - np.diag(logits)) + s * np.linalg.norm(X.value, "nuc"),
    }


def _solve(problem: cp.Problem, solver: str, options: dict[str, Any]) -> float:
    problem.solve(solver=solver, warm_start=False, **options)
    return problem.solver_stats.solve_time


if __name__ == "__main__":
    json.dump(solve_by_cvxpy(**json.loads(sys.argv[1])), sys.stdout)
