"""The convex problem (NUC) with one column per class in CVXPY, in a process of its own that can be stopped."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cvxpy as cp
import numpy as np
from scipy.special import logsumexp

ROOT = Path(__file__).parents[1]
START_UP = 30.0  # seconds granted for starting Python and building the cone program


def solve_by_cvxpy(
    counts: list[int], lam_W: float, lam_H: float, solver: str, options: dict[str, Any]
) -> dict[str, Any]:
    """min Σ_k (n_k/N) ℓ(z_k + b; k) + s‖Z D^{1/2}‖_* over X = Z D^{1/2} and b: its value at the point found, and times.

    `seconds` is the solver's own time, the median of as many solves as fit into a second.
    """
    n = np.asarray(counts, float)
    s, weight = np.sqrt(lam_W * lam_H), n / n.sum()
    X, b = cp.Variable((n.size, n.size)), cp.Variable((n.size, 1))
    Z = X @ np.diag(n**-0.5) + b @ np.ones((1, n.size))
    problem = cp.Problem(cp.Minimize(weight @ (cp.log_sum_exp(Z, axis=0) - cp.diag(Z)) + s * cp.normNuc(X)))
    seconds: list[float] = []
    start = time.perf_counter()
    while sum(seconds) < 1:
        problem.solve(solver=solver, warm_start=False, **options)
        seconds.append(problem.solver_stats.solve_time)
        if len(seconds) == 1:
            construction = time.perf_counter() - start - seconds[0]
    logits = X.value / np.sqrt(n) + b.value
    value = weight @ (logsumexp(logits, axis=0) - np.diag(logits)) + s * np.linalg.norm(X.value, "nuc")
    return {
        "seconds": statistics.median(seconds),
        "construction": construction,
        "steps": problem.solver_stats.num_iters,
        "status": problem.status,
        "value": value,
    }


def within_limit(limit: float, **arguments: Any) -> dict[str, Any] | None:
    """solve_by_cvxpy elsewhere; None if it was not done after limit seconds.

    Raises:
        subprocess.CalledProcessError: if it failed.
    """
    command = [sys.executable, "-m", "benchmarks.by_cvxpy", json.dumps(arguments)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=limit + START_UP, check=True, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout)


if __name__ == "__main__":
    json.dump(solve_by_cvxpy(**json.loads(sys.argv[1])), sys.stdout)
