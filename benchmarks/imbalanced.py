"""The optimum for class sizes from 1 to 1000: ufm.global_minimiser, certified, beside CVXPY's solvers."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.race import CORES, Contender, Row, compile_time, race
from ufm import Params, Problem, certify, class_mean_problem, global_minimiser

LIMIT = 240.0  # seconds after which a solver is stopped
START_UP = 30.0  # seconds granted to it beyond that, for starting Python and building the cone program
ACCURATE = 1e-8
TIGHT = {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iters": 10**6}
ATTEMPTS = {
    "CVXPY: SCS as it comes": ("SCS", {}),
    "CVXPY: SCS, tolerances 1e-9": ("SCS", TIGHT),
    "CVXPY: CLARABEL as it comes": ("CLARABEL", {}),
}


def compare_optima(K: int, lam_W: float, lam_H: float, repeats: int) -> list[Row]:
    """Ours, with its certified gap as accuracy, and CVXPY's solvers, each with the accuracy it reached.

    Times leave out compilation here and the construction of the cone program there. A solver is stopped at the limit,
    or once it has taken longer than another needed for 1e-8; its ratio then is a lower bound.
    """
    counts = np.round(np.geomspace(1, 1000, K)).astype(int)
    problem = class_mean_problem(counts, K, lam_W=lam_W, lam_H=lam_H)
    solve = partial(_solve, problem)
    ours = Contender("ufm.global_minimiser", solve, prepare=compile_time(solve), threads=[CORES])
    rows = race(f"optimum K={K}, class sizes 1 to 1000", [ours], partial(_certified_gap, problem), repeats)
    optimum = float(certify(problem, solve()).value)
    limit = LIMIT
    for name, (solver, options) in ATTEMPTS.items():
        arguments = {"counts": counts.tolist(), "lam_W": lam_W, "lam_H": lam_H, "solver": solver, "options": options}
        rows.append(row := _attempt(name, arguments, limit, rows[0], optimum))
        if row.error is not None and row.error <= ACCURATE:
            limit = min(limit, row.seconds)
    return rows


def _solve(problem: Problem) -> Params:
    return jax.block_until_ready(global_minimiser(problem))


def _certified_gap(problem: Problem, params: Params) -> float:
    certificate = certify(problem, params)
    return float(certificate.gap + certificate.rounding)


def _attempt(name: str, arguments: dict[str, Any], limit: float, ours: Row, optimum: float) -> Row:
    found = _within(limit, arguments)
    if found is None:
        note = "stopped: the ratio is a lower bound"
        return Row(ours.job, name, CORES, limit, ratio=limit / ours.seconds, note=note)
    error, note = found["value"] - optimum, "" if found["status"] == "optimal" else found["status"]
    seconds, steps = found["seconds"], found["steps"]
    return Row(ours.job, name, CORES, seconds, steps, error, seconds / ours.seconds, found["construction"], note)


def _within(limit: float, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """What benchmarks.by_cvxpy found, or None if it was not done in time."""
    command = [sys.executable, "-m", "benchmarks.by_cvxpy", json.dumps(arguments)]
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=limit + START_UP, check=True, cwd=root)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout)
