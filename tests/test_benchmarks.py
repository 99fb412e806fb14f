"""The comparisons run, and every contender does the same job; their times are nobody's theorem."""

import json
import time

import jax
import numpy as np
import pytest
from threadpoolctl import threadpool_info

from benchmarks.by_numpy import NumpyObjective, descend_by_numpy, flatten
from benchmarks.curvature import COUNTERS
from benchmarks.descend import ETA, descend
from benchmarks.imbalanced import ACCURATE, ATTEMPTS
from benchmarks.race import HAS_TORCH, Contender, fewest_steps, race
from benchmarks.run import Config, main
from benchmarks.solve import SCIPY, TARGET, TORCH
from ufm import balanced, init, objective

TOL = 1e-12  # relative: sums of a few hundred terms in float64


@pytest.fixture(scope="module")
def problem():
    return balanced(3, 4, 3, lam_W=5e-3, lam_H=2e-3, lam_b=1e-2)


@pytest.fixture(scope="module")
def start(problem):
    return init(problem, jax.random.key(1))


def test_the_numpy_objective_is_the_models(problem, start):
    value, grad = NumpyObjective(problem)(flatten(start))
    expected, slope = jax.value_and_grad(lambda x: objective(problem, x))(start)
    assert value == pytest.approx(float(expected), rel=TOL)
    np.testing.assert_allclose(grad, flatten(slope), rtol=TOL, atol=TOL)


def test_descents_lead_to_the_same_point(problem, start):
    ours = descend(problem, start, steps=30)
    theirs = descend_by_numpy(NumpyObjective(problem), flatten(start), steps=30, eta=ETA)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=TOL, atol=TOL)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not a dependency of the project")
def test_the_pytorch_descent_leads_there_too(problem, start):
    from benchmarks.by_torch import TorchObjective, descend_by_torch

    ours = descend(problem, start, steps=30)
    theirs = descend_by_torch(TorchObjective(problem), start, steps=30, eta=ETA)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=TOL, atol=TOL)


def test_a_quick_run_reaches_what_it_states_and_records_what_made_it(tmp_path, hastily):
    record = json.loads(main(Config(quick=True, record=tmp_path / "quick.json")).read_text())
    assert {"command", "blas", "rivals", "versions", "machine", "device", "revision", "quick"} <= record.keys()
    timed = {row["contender"]: row for row in record["rows"] if row["seconds"] is not None}
    for name, most in most_error().items():
        assert -TOL <= timed[name]["error"] <= most, name
        assert timed[name]["ratio"] > 0
    missing = [row["note"] for row in record["rows"] if row["seconds"] is None]
    assert missing == ["torch not installed"] * 2 * (not HAS_TORCH) + ["not installed"] * [*COUNTERS.values()].count(
        None
    )


def most_error():
    """What each was asked for; SCS bounds residuals, so its objective is granted a multiple of them."""
    solvers = ["ufm.minimise", SCIPY, *[TORCH] * HAS_TORCH]
    asked = dict.fromkeys(solvers, TARGET) | {"ufm.global_minimiser": 1e-9}
    scs, tight, clarabel = ATTEMPTS
    return asked | {scs: 1e-4, tight: ACCURATE, clarabel: ACCURATE}


@pytest.mark.parametrize("needed", [1, 2, 7, 64])
def test_fewest_steps_finds_the_first_that_reaches_the_target(needed):
    assert fewest_steps(lambda steps: 1.0 if steps < needed else 0.0, 0.5) == needed


def test_fewest_steps_says_when_the_target_is_out_of_reach():
    with pytest.raises(ArithmeticError, match="still above"):
        fewest_steps(lambda steps: 1.0, 0.5, most=8)


def test_a_race_keeps_each_contenders_fastest_thread_count():
    def slow_on_one_thread():
        if max(pool["num_threads"] for pool in threadpool_info()) == 1:
            time.sleep(0.1)
        return 2.0

    ours, theirs = race(
        "job",
        [Contender("ours", lambda: 1.0, threads=[1]), Contender("theirs", slow_on_one_thread, threads=[1, 2])],
        float,
        repeats=3,
    )
    assert (ours.contender, ours.error, ours.ratio) == ("ours", 1.0, 1.0)
    assert (theirs.contender, theirs.error, theirs.threads) == ("theirs", 2.0, 2)
    assert theirs.ratio == theirs.seconds / ours.seconds
