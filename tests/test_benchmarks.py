"""The comparisons run, and every contender does the same job; their times are nobody's theorem."""

import json
import pathlib
import resource
import time

import jax
import numpy as np
import pytest
from threadpoolctl import threadpool_info

from benchmarks import scale, sweeps
from benchmarks.by_numpy import NumpyObjective, descend_by_numpy, flatten
from benchmarks.curvature import COUNTERS
from benchmarks.descend import ETA, descended
from benchmarks.imbalanced import ACCURATE, ATTEMPTS
from benchmarks.race import HAS_TORCH, Contender, fewest_steps, race
from benchmarks.run import Config, main
from benchmarks.solve import SCIPY, TARGET, TORCH
from ufm import Params, balanced, init, objective, optimal_value

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
    ours = descended(problem, start, steps=30)
    theirs = descend_by_numpy(NumpyObjective(problem), flatten(start), steps=30, eta=ETA)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=TOL, atol=TOL)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not a dependency of the project")
def test_the_pytorch_descent_leads_there_too(problem, start):
    from benchmarks.by_torch import TorchObjective, descend_by_torch

    ours = descended(problem, start, steps=30)
    theirs = descend_by_torch(TorchObjective(problem), start, steps=30, eta=ETA)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=TOL, atol=TOL)


@pytest.mark.parametrize("cell", sweeps.DESCENTS.values())
def test_swept_descents_lead_where_every_loop_leads(cell):
    lams = np.array([1e-3, 2e-2])
    problems = [balanced(3, 4, 3, lam_W=lam, lam_H=lam) for lam in lams]
    others = sweeps.descend_by_others(problems, 30)
    assert len(others) == 1 + 2 * HAS_TORCH
    ours = [jax.tree.leaves(cell(problem, steps=30)) for problem in problems]
    for theirs in (other() for other in others.values()):
        for point, expected in zip(ours, theirs, strict=True):
            for a, b in zip(point, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=TOL, atol=TOL)


@pytest.mark.parametrize("load", [0.3, 1.0, 1.7])
def test_others_get_the_problem_that_the_padded_sweep_has(load):
    ours = sweeps.at_load(K=3, load=load, n=4, d=5, largest=6)
    x = init(ours, jax.random.key(0))
    value, _ = NumpyObjective(sweeps.mean_problem(3, load, 4, 5))(flatten(Params(x.W[:3], x.H[:, :3], x.b[:3])))
    assert value == pytest.approx(float(objective(ours, x)), rel=TOL)


def test_the_loads_have_the_threshold_among_them():
    loads = sweeps.through_threshold(64)
    assert len(set(loads)) == 64
    assert 1.0 in loads


def test_beginning_computes_nothing_and_resuming_only_what_is_missing(tmp_path, monkeypatch, hastily):
    monkeypatch.setattr(scale, "certified", lambda problem: {"value": optimal_value(problem)})
    store = tmp_path / "store"
    scale.grow((2, 600), store)
    marks = {mark.name: mark.stat().st_mtime_ns for mark in (store / "done").iterdir()}
    assert len(marks) == 2
    lost, kept = marks
    (store / "done" / lost).unlink()
    scale.begin((2, 600), store)
    assert [mark.name for mark in (store / "done").iterdir()] == [kept]
    scale.grow((2, 600), store)
    assert (store / "done" / lost).exists()
    assert (store / "done" / kept).stat().st_mtime_ns == marks[kept]


def test_compilations_are_counted_as_long_as_one_asks():
    with scale.counting_compilations() as counts:
        jax.jit(lambda x: 3 * x + 1.25)(np.ones(7)).block_until_ready()
    assert counts["programs"] == 1
    assert counts["compiling"] > 0
    jax.jit(lambda x: 3 * x + 2.25)(np.ones(7)).block_until_ready()
    assert counts["programs"] == 1


def test_padding_saves_compilations(monkeypatch, hastily):
    monkeypatch.setattr(scale, "certified", lambda problem: {"value": optimal_value(problem)})
    rows = scale.compare_compiling(range(2, 6), 2, scale.here)
    compiled = {row.contender: int(row.note.split()[0]) for row in rows}
    assert 1 <= compiled["padded"] <= 2
    assert 4 <= compiled["a program for every K"] <= 5
    assert rows[0].ratio == 1


def test_the_peak_of_memory_is_between_what_is_held_and_what_the_system_counted():
    resident = pathlib.Path("/proc/self/statm")
    if not resident.exists():
        pytest.skip("no /proc here")
    held = int(resident.read_text().split()[1]) * resource.getpagesize() / 2**20
    assert 0.99 * held <= scale.peak_memory() <= 1.01 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_a_quick_run_reaches_what_it_states_and_records_what_made_it(tmp_path, hastily):
    record = json.loads(main(Config(quick=True, record=tmp_path / "quick.json")).read_text())
    assert {"command", "blas", "rivals", "versions", "machine", "device", "revision", "quick"} <= record.keys()
    timed = {row["contender"]: row for row in record["rows"] if row["seconds"] is not None}
    for name, most in most_error().items():
        assert -TOL <= timed[name]["error"] <= most, name
        assert timed[name]["ratio"] > 0
    for name in sweeps.CLOSED:
        assert float(timed[f"ufm.sweep of {name}"]["note"].split()[-1]) < TOL
    assert timed["resumed, finished"]["prepare"] == 0
    missing = [row["note"] for row in record["rows"] if row["seconds"] is None]
    lacking = ["not installed"] * [*COUNTERS.values()].count(None) + ["torch not installed"] * 6 * (not HAS_TORCH)
    assert sorted(missing) == lacking


def most_error():
    """What each was asked for; SCS bounds residuals, so its objective is granted a multiple of them."""
    solvers = ["ufm.minimise", SCIPY, *[TORCH] * HAS_TORCH]
    asked = dict.fromkeys(solvers, TARGET) | {"ufm.global_minimiser": 1e-9, sweeps.SCIPY_LOOP: TARGET}
    asked |= {f"ufm.sweep of {name}": TOL for name in sweeps.CLOSED}
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
