"""The optimum for class sizes from 1 to 1000: ufm.global_minimiser, certified, beside CVXPY's solvers."""

from functools import partial

import jax
import numpy as np

from benchmarks.by_cvxpy import within_limit
from benchmarks.race import CORES, Contender, Row, compile_time, race
from ufm import Params, Problem, certify, class_mean_problem, global_minimiser

ACCURATE = 1e-8
TIGHT = {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iters": 10**6}
ATTEMPTS = {
    "CVXPY: SCS as it comes": ("SCS", {}),
    "CVXPY: SCS, tolerances 1e-9": ("SCS", TIGHT),
    "CVXPY: CLARABEL as it comes": ("CLARABEL", {}),
}


def compare_optima(K: int, lam_W: float, lam_H: float, limit: float, repeats: int) -> list[Row]:
    """Ours with its certified gap as accuracy; CVXPY's solvers, each with what it reached.

    Times leave out compilation here and the construction of the cone program there. A solver is stopped at the limit,
    or when it has taken longer than another needed for 1e-8; its ratio then is a lower bound.
    """
    counts = np.round(np.geomspace(1, 1000, K)).astype(int)
    problem = class_mean_problem(counts, K, lam_W=lam_W, lam_H=lam_H)
    solve = partial(_solve, problem)
    ours = Contender("ufm.global_minimiser", solve, prepare=compile_time(solve), threads=[CORES])
    rows = race(f"optimum K={K}, sizes 1 to 1000", [ours], partial(_certified_gap, problem), repeats)
    optimum = float(certify(problem, solve()).value)
    for name, (solver, options) in ATTEMPTS.items():
        arguments = {"counts": counts.tolist(), "lam_W": lam_W, "lam_H": lam_H, "solver": solver, "options": options}
        rows.append(_attempt(name, arguments, limit, rows[0], optimum))
        if rows[-1].error is not None and rows[-1].error <= ACCURATE:
            limit = min(limit, rows[-1].seconds)
    return rows


def _solve(problem: Problem) -> Params:
    return jax.block_until_ready(global_minimiser(problem))


def _certified_gap(problem: Problem, params: Params) -> float:
    certificate = certify(problem, params)
    return float(certificate.gap + certificate.rounding)


def _attempt(name: str, arguments: dict, limit: float, ours: Row, optimum: float) -> Row:
    found = within_limit(limit, **arguments)
    if found is None:
        note = "stopped: the ratio is a lower bound"
        return Row(ours.job, name, CORES, limit, ratio=limit / ours.seconds, note=note)
    error, note = found["value"] - optimum, "" if found["status"] == "optimal" else found["status"]
    seconds, steps = found["seconds"], found["steps"]
    return Row(ours.job, name, CORES, seconds, steps, error, seconds / ours.seconds, found["construction"], note)
