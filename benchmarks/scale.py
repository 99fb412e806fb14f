"""What a sweep costs as it grows: time and memory per cell, resuming a store, compiling for many K's.

Each measurement has a process of its own, which starts with nothing compiled.
"""

import contextlib
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.race import CORES, Row, clock
from ufm import Problem, certify, global_minimiser
from ufm.cli.cache import use_cache
from ufm.lab.sweep import sweep

COMPILED = "/jax/core/compile/backend_compile_duration"
CACHED = "/jax/compilation_cache/cache_hits"
Run = Callable[..., dict[str, Any]]
Shape = tuple[int, int]


def certified(problem: Problem) -> dict[str, Any]:
    """f* and its certified gap."""
    certificate = certify(problem, global_minimiser(problem))
    return {"value": certificate.value, "gap": certificate.gap}


def compare_growth(shapes: Sequence[Shape], run: Run) -> list[Row]:
    """Cells per second for so many λ_W's × λ_H's at K = 10, tracing and compiling counted."""
    return [_grown(shape, stored, run) for shape in shapes for stored in (False, True)]


def _grown(shape: Shape, stored: bool, run: Run) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        found = run([partial(grow, shape, Path(folder) / "store" if stored else None)])
    count, seconds = math.prod(shape), found["seconds"][0]
    place = "into a store" if stored else "in memory"
    note = f"{count / seconds:.3g} cells/s, {_peak(found)}"
    return Row("cells of one sweep", f"{count} {place}", CORES, seconds, prepare=found["compiling"], note=note)


def compare_resuming(shape: Shape, run: Run) -> list[Row]:
    """Seconds to find that a store has all its cells, and to begin with what is missing where it has half of them."""
    job = f"a store of {math.prod(shape)} cells"
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        made = run([partial(grow, shape, store)])
        finished = run([partial(grow, shape, store)])
        marks = sorted((store / "done").iterdir())
        for mark in marks[::2]:
            mark.unlink()
        half = run([partial(begin, shape, store)])
    rows = {"computed and written": made, "resumed, finished": finished, "resumed, half of it missing": half}
    return [Row(job, name, CORES, x["seconds"][0], prepare=x["compiling"], note=_peak(x)) for name, x in rows.items()]


def compare_compiling(Ks: range, points: int, run: Run) -> list[Row]:
    """Every K padded to the largest in one program, or a program each; from the start of Python to the last number."""
    rows: list[Row] = []
    for name, pad in (("padded", True), ("a program for every K", False)):
        with tempfile.TemporaryDirectory() as folder:
            for cache, state in ((None, ""), (folder, ", filling the cache"), (folder, ", from the cache")):
                seconds, found = clock(partial(run, [partial(many, Ks, points, pad)], cache))
                note = f"{found['programs']} compilations, {found['cached']} read from the cache, {_peak(found)}"
                ratio = seconds / (rows[0].seconds if rows else seconds)
                job = f"certified optima of {len(Ks)} K's × {points} λ's"
                rows.append(Row(job, name + state, CORES, seconds, ratio=ratio, prepare=found["compiling"], note=note))
    return rows


def grow(shape: Shape, store: Path | None) -> None:
    """Certified optima for so many λ_W's × λ_H's at K = 10, computed as far as a store lacks them."""
    sweep(certified, _lambdas(*shape) | {"K": 10}, store=store, method="map")


def begin(shape: Shape, store: Path) -> None:
    """The same, until the first block would be computed."""
    with contextlib.suppress(InterruptedError):
        sweep(certified, _lambdas(*shape) | {"K": 10}, store=store, method="map", executor=Refusing())


def many(Ks: range, points: int, pad: bool) -> None:
    """A certified optimum for every K and λ_W."""
    sweep(certified, _lambdas(points, 1) | {"K": Ks}, pad=pad)


def _lambdas(rows: int, columns: int) -> dict[str, Any]:
    return {"lam_W": np.geomspace(1e-4, 1e-1, rows), "lam_H": np.geomspace(1e-3, 1e-2, columns), "n": 10, "d": 20}


class Refusing(Executor):
    """Stops whoever asks for work, and keeps what was asked for."""

    def submit(self, function: Callable, *arguments: Any, **options: Any) -> Future:
        """Keep the task and raise InterruptedError."""
        self.task = partial(function, *arguments, **options)
        raise InterruptedError


def here(works: Sequence[Callable[[], None]], _: str | None = None) -> dict[str, Any]:
    """What works cost in this process, without a cache."""
    return measured(works)


def apart(works: Sequence[Callable[[], None]], cache: str | None = None) -> dict[str, Any]:
    """What works cost in a new process with a device for every core, as the command line has them."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare) as pool:
        return pool.submit(measured, works, cache).result()


def _prepare() -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", CORES)
    jax.config.update("jax_compilation_cache_dir", None)


def measured(works: Sequence[Callable[[], None]], cache: str | None = None) -> dict[str, Any]:
    """What works cost one after the other: seconds of each, compilations, and the most memory of the process."""
    if cache:
        os.environ["XDG_CACHE_HOME"] = cache
        use_cache()
    with counting_compilations() as counts:
        seconds = [clock(work)[0] for work in works]
    return counts | {"seconds": seconds, "peak": peak_memory()}


@contextlib.contextmanager
def counting_compilations() -> Iterator[dict[str, float]]:
    """Programs that the compiler was asked for, the seconds it took, and how many the cache had."""
    counts = {"programs": 0, "compiling": 0.0, "cached": 0}

    def count(event: str, seconds: float, **_: Any) -> None:
        if event == COMPILED:
            counts["programs"] += 1
            counts["compiling"] += seconds

    def count_read(event: str, **_: Any) -> None:
        counts["cached"] += event == CACHED

    jax.monitoring.register_event_duration_secs_listener(count)
    jax.monitoring.register_event_listener(count_read)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
        jax.monitoring.unregister_event_listener(count_read)


def peak_memory() -> float | None:
    """The most memory that this process has held, in MiB, where Linux tells; getrusage also counts its parent's."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


def _peak(found: dict[str, Any]) -> str:
    return "" if found["peak"] is None else f"{found['peak']:.0f} MiB"
