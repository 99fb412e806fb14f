"""Blocks sent to somebody else's workers: the same numbers, and a lost worker costs a retry."""

import collections
import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import dask
import numpy as np
import pytest
import xarray
from distributed import Client, LocalCluster

from ufm.lab.sweep import sweep
from ufm.theory.optimum import balanced_value

ROOT = Path(__file__).parents[2]
GRID = {
    "K": [2, 3, 5],
    "n": 2,
    "d": [3, 4],
    "lam_W": np.geomspace(1e-4, 1, 7),
    "lam_H": [1e-3, 1e-2],
}  # d < K - 1 raises
BATCH = 2
TIMES = [2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1]  # the first to see what a cell returns, the seventh as it is deadly


def logged(settings):
    """A number, and a line in a file; at one place the death of the worker, once or whenever it is tried."""
    x, log = settings["x"], Path(settings["log"])
    with log.open("a") as lines:
        lines.write(f"{x}\n")
    if x == settings["deadly"] and not (settings["once"] and log.with_suffix(".died").exists()):
        log.with_suffix(".died").touch()
        time.sleep(0.5)  # what this worker has finished is on its way
        os.kill(os.getpid(), signal.SIGKILL)
    return x**2


def logging(tmp_path, *, once):
    return {"x": np.arange(12.0), "log": str(tmp_path / "log"), "deadly": 6.0, "once": once}


def evaluations(tmp_path):
    """How often each cell was evaluated."""
    return collections.Counter(float(line) for line in (tmp_path / "log").read_text().splitlines())


def run_logged(grid, executor, store=None):
    return sweep(logged, grid, make=dict, method="python", batch_size=BATCH, executor=executor, store=store)


@pytest.fixture(scope="module")
def here():
    return sweep(balanced_value, GRID, method="vmap", batch_size=4)


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Workers import this file by the name that pytest gives it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.fixture(scope="module")
def dask_executor():
    quiet = {"distributed.scheduler.allowed-failures": 0, "logging.distributed": "critical"}
    with (
        dask.config.set(quiet),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", memory_limit=None) as cluster,
        Client(cluster) as client,
        client.get_executor() as executor,
    ):
        yield executor


def assert_same(ds, here):
    xarray.testing.assert_identical(ds.load().drop_attrs(), here.drop_attrs())
    for name in ("settings", "cells", "failed"):
        assert ds.attrs[name] == here.attrs[name]
    key = lambda failure: json.dumps(failure, sort_keys=True)  # noqa: E731
    assert sorted(json.loads(ds.failures), key=key) == sorted(json.loads(here.failures), key=key)


def test_threads_give_the_same(here, tmp_path):
    with ThreadPoolExecutor(2) as executor:
        assert_same(sweep(balanced_value, GRID, method="vmap", batch_size=4, executor=executor), here)
        kept = sweep(balanced_value, GRID, method="vmap", batch_size=4, executor=executor, store=tmp_path / "store")
        assert_same(kept, here)
    assert int((here.status == 3).sum()) == 14  # d < K - 1


def test_processes_give_the_same(here, processes):
    assert_same(sweep(balanced_value, GRID, method="vmap", batch_size=4, executor=processes), here)


def test_dask_gives_the_same(here, dask_executor):
    assert_same(sweep(balanced_value, GRID, method="vmap", batch_size=4, executor=dask_executor), here)


def test_a_worker_killed_under_dask_costs_its_block_a_retry(dask_executor, tmp_path):
    grid = logging(tmp_path, once=True)
    ds = run_logged(grid, dask_executor, tmp_path / "store")
    np.testing.assert_array_equal(ds.value, grid["x"] ** 2)
    assert (ds.status == 1).all()
    times = evaluations(tmp_path)
    assert [times[x] for x in grid["x"]] == TIMES


def test_a_block_that_kills_every_worker_ends_in_an_error_and_the_rest_stays(dask_executor, tmp_path):
    grid = logging(tmp_path, once=False)
    with pytest.raises(Exception, match="workers died"):
        run_logged(grid, dask_executor, tmp_path / "store")
    assert evaluations(tmp_path)[6.0] == 3
    kept = xarray.open_zarr(tmp_path / "store" / "grid.zarr", chunks=None, consolidated=False)
    done = kept.status.values == 1
    assert done.any()
    np.testing.assert_array_equal(kept.value, np.where(done, grid["x"] ** 2, np.nan))
    assert not done[6:8].any()


def test_a_broken_pool_of_processes_keeps_what_was_done(tmp_path):
    grid = logging(tmp_path, once=True)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor, pytest.raises(BrokenProcessPool):
        run_logged(grid, executor, tmp_path / "store")
    ds = run_logged(grid, None, tmp_path / "store")
    np.testing.assert_array_equal(ds.value, grid["x"] ** 2)
    times = evaluations(tmp_path)
    assert [times[x] for x in grid["x"]] == TIMES


class Unreliable(ThreadPoolExecutor):
    """Loses its worker at the first attempts of every task."""

    def __init__(self, failures, error=RuntimeError):
        super().__init__(2)
        self.attempts, self.failures, self.error = collections.Counter(), failures, error
        self.lock = threading.Lock()

    def submit(self, function, *arguments):
        def lose_or_run():
            with self.lock:
                place = float(arguments[4]["x"][0])
                self.attempts[place] += 1
            if self.attempts[place] <= self.failures(place):
                raise self.error(f"lost at {place}")
            return function(*arguments)

        return super().submit(lose_or_run)


def squares(settings):
    return settings["x"] ** 2


SQUARES = {"x": np.arange(12.0)}


def test_two_losses_of_every_block_are_made_up_for():
    with Unreliable(lambda place: 2) as executor:
        ds = sweep(squares, SQUARES, make=dict, batch_size=BATCH, method="vmap", executor=executor)
    np.testing.assert_array_equal(ds.value, SQUARES["x"] ** 2)
    assert executor.attempts == dict.fromkeys(np.arange(0.0, 12, BATCH), 3)


@pytest.mark.parametrize(("error", "attempts"), [(RuntimeError, 3), (ValueError, 1)])
def test_the_third_loss_of_a_block_and_any_refusal_is_raised(error, attempts, tmp_path):
    with Unreliable(lambda place: 99 * (place == 4), error) as executor, pytest.raises(error, match=r"lost at 4\.0"):
        sweep(squares, SQUARES, make=dict, batch_size=BATCH, method="vmap", executor=executor, store=tmp_path / "store")
    assert executor.attempts[4.0] == attempts
    ds = sweep(squares, SQUARES, make=dict, batch_size=BATCH, method="vmap", store=tmp_path / "store")
    np.testing.assert_array_equal(ds.value, SQUARES["x"] ** 2)
    assert json.loads(ds.computed) <= 10


def test_forked_processes_are_refused():
    """In them JAX's threads are missing, and they would wait for ever."""
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor,
        pytest.raises(ValueError, match="executor must spawn its processes"),
    ):
        sweep(balanced_value, GRID, method="vmap", batch_size=4, executor=executor)
