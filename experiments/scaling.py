"""What each operation costs: time and memory at a ladder of sizes, a fresh process each, and where the lines lead."""

import functools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

import ufm
from ufm.lab.plots_scaling import draw_scaling
from ufm.lab.records import write_run
from ufm.measure.moments import CHUNK

LAMS = {"lam_W": 5e-4, "lam_H": 1e-7}
LARGEST, SMALLEST, FULL, SAMPLES = 1300, 732, 895, 1_281_167  # ImageNet's classes, those of the largest size, all
RUNS, ENOUGH = 3, 5.0  # the most warm runs, and the seconds after which no other is begun


@dataclass(frozen=True)
class Config:
    """Ladders of sizes: (K, d), (K, d, N) or cells."""

    out: tyro.conf.Positional[Path]
    """New folder for the record and scaling.png."""
    equal: tuple[tuple[int, int], ...] = ((10, 16), (100, 128), (300, 384), (1000, 2048))
    """(K, d) of the closed form, its certificate and the spectrum, at class means of 1300 samples."""
    unequal: tuple[tuple[int, int], ...] = ((10, 16), (100, 128), (1000, 2048))
    """(K, d) of the solved and certified optimum, class sizes like ImageNet's."""
    features: tuple[tuple[int, int, int], ...] = ((100, 512, 1_000), (100, 512, 10_000), (100, 512, 100_000))
    """(K, d, N) of gradient and Hessian product, with a column for every sample."""
    streams: tuple[tuple[int, int, int], ...] = (
        (100, 512, 10_000), (100, 512, 100_000), (1000, 2048, 10_000), (1000, 2048, 30_000),
    )  # fmt: skip
    """(K, d, N) of the certificate of features that come in blocks."""
    cells: tuple[int, ...] = (100, 1_024, 10_000)
    """Square numbers of cells of a sweep at K = 10, each a certificate at the optimum."""


class Job(NamedTuple):
    """What is timed, and what is told of its result."""

    run: Callable[[], Any]
    tell: Callable[[Any], Mapping[str, Any]]


def main(config: Config) -> Path:
    """Measure every rung in a process of its own, assert that what claims to be optimal is certified, and draw."""
    start, c, rungs = time.perf_counter(), config, []
    ladders = {closed_form: c.equal, certificate: c.equal, spectrum: c.equal, solved: c.unequal, gradient: c.features,
               product: c.features, streamed: c.streams, swept: [(cells,) for cells in c.cells]}  # fmt: skip
    for job, sizes in ladders.items():
        for size in sizes:
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                rungs.append(fresh.submit(measure, job, size).result())
            print({name: x if isinstance(x, str) else float(f"{x:.4g}") for name, x in rungs[-1].items()}, flush=True)
    assert all(rung["gap"] + rung["rounding"] <= 1e-8 * rung["value"] for rung in rungs if rung.get("optimal"))
    folder = write_run(c.out, c, {"rungs": rungs}, start=start)
    draw_scaling(folder)
    return folder


def measure(make: Callable[..., Job], size: Sequence[int]) -> dict[str, Any]:
    """Seconds of the first run with compilation, least seconds of the warm ones, and the peak of resident memory."""
    jax.config.update("jax_enable_x64", True)
    jax.block_until_ready(jax.numpy.zeros(1) + 1)  # start the backend
    before = peak()
    job = make(*size)
    first, result = timed(job.run)
    warm = [timed(job.run)[0]]
    while len(warm) < RUNS and sum(wall for wall, _ in warm) < ENOUGH:
        warm.append(timed(job.run)[0])
    wall, cpu = np.min(warm, axis=0)
    cost = {"wall_seconds": wall, "cpu_seconds": cpu, "first_cpu_seconds": first[1], "peak_bytes": peak()}
    sizes = dict(zip(("cells",) if len(size) == 1 else "KdN", size, strict=False))
    return {"operation": make.__name__, **sizes, **cost, "own_bytes": cost["peak_bytes"] - before, **job.tell(result)}


def timed(run: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """(wall seconds, processor seconds of all threads), and what the run returns."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(run())
    return (time.perf_counter() - wall, time.process_time() - cpu), result


def peak() -> int:
    """The most bytes that this process has held in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def closed_form(K: int, d: int) -> Job:
    """The optimum for equal counts: WH for one column a class."""
    problem = ufm.class_mean_problem([LARGEST] * K, d, **LAMS)
    return Job(lambda: ufm.global_minimiser(problem), lambda _: {"flop": 2 * K**2 * d})


def certificate(K: int, d: int) -> Job:
    """Duality gap at that optimum: nine products with d, two K×K Grams and eigenproblems, Newton steps in b.

    Of those steps the flop count one; up to a hundred are taken.
    """
    problem = ufm.class_mean_problem([LARGEST] * K, d, **LAMS)
    x = ufm.global_minimiser(problem)
    return Job(lambda: ufm.certify(problem, x), lambda c: _proven(c) | {"flop": 18 * K**2 * d + 25 * K**3})


def spectrum(K: int, d: int) -> Job:
    """All eigenvalues of the Hessian at that optimum; only counting the samples depends on K."""
    problem = ufm.class_mean_problem([LARGEST] * K, d, **LAMS)
    variables = K * d + d * LARGEST * K + K
    return Job(lambda: ufm.hessian_spectrum(problem), lambda _: {"variables": variables, "flop": 2 * K**2})


def solved(K: int, d: int) -> Job:
    """The optimum for unequal counts over distinct class sizes, with the certificate that it is returned with."""
    counts = imagenet_like(K)
    problem = ufm.class_mean_problem(counts, d, **LAMS)
    sizes = {"distinct": len(set(counts)), "smallest": min(counts), "samples": sum(counts)}
    return Job(lambda: ufm.global_minimiser(problem), lambda x: _proven(ufm.certify(problem, x)) | sizes)


def gradient(K: int, d: int, N: int) -> Job:
    """The objective and its gradient: three products."""
    problem, x = _full(K, d, N)
    function = jax.jit(jax.value_and_grad(ufm.objective, argnums=1))
    return Job(lambda: function(problem, x), lambda _: {"flop": 6 * K * d * N} | _planned(function, problem, x))


def product(K: int, d: int, N: int) -> Job:
    """A Hessian product, linearised before: six products."""
    problem, x = _full(K, d, N)
    operator = ufm.hessian_operator(functools.partial(ufm.objective, problem), x)
    apply = jax.jit(lambda A, v: A(v))
    return Job(lambda: apply(operator, x), lambda _: {"flop": 12 * K * d * N} | _planned(apply, operator, x))


def streamed(K: int, d: int, N: int) -> Job:
    """The certificate of features near the optimum that are drawn block by block and never held as a whole."""
    x, readings = ufm.global_minimiser(ufm.class_mean_problem([N // K] * K, d, **LAMS)), []
    M = np.asarray(x.H, np.float32)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        readings.append(N)
        for start in range(0, N, CHUNK):
            labels = np.arange(start, min(start + CHUNK, N)) % K
            noise = np.random.default_rng(start).standard_normal((d, len(labels)), np.float32)
            yield M[:, labels] + noise / 100, labels

    def run() -> ufm.Certificate:
        readings.clear()
        return ufm.certify_stream(batches, x.W, x.b, **LAMS)

    def tell(c: ufm.Certificate) -> dict[str, float]:
        steps = len(readings) - 5  # of Newton's method; a free bias takes five readings besides
        flop = (24 + 2 * steps) * K * d * N + (10 + 2 * steps) * K**2 * N
        return _bounds(c) | {"readings": len(readings), "flop": flop}

    return Job(run, tell)


def swept(cells: int) -> Job:
    """A sweep over λ_W and λ_H at K = 10: every cell the closed form and its certificate."""
    lams = np.geomspace(1e-6, 1e-3, math.isqrt(cells))
    grid = {"K": 10, "n": 100, "d": 10, "lam_W": lams, "lam_H": lams}
    return Job(lambda: ufm.sweep(_gap, grid), lambda found: {"largest_gap": float(found.gap.max())})


def _gap(problem: ufm.Problem) -> dict[str, Any]:
    return {"gap": ufm.certify(problem, ufm.global_minimiser(problem)).gap}


def imagenet_like(K: int) -> list[int]:
    """Class sizes drawn like those of ImageNet's train images, not theirs: 89.5 % of 1300, the rest down to 732."""
    full = round(K * FULL / 1000)
    share = (LARGEST - (SAMPLES - FULL * LARGEST) / (1000 - FULL)) / (LARGEST - SMALLEST)  # mean of what is missing
    missing = np.random.default_rng(0).beta(1, 1 / share - 1, K - full)
    return [LARGEST] * full + (LARGEST - np.round((LARGEST - SMALLEST) * missing).astype(int)).tolist()


def _full(K: int, d: int, N: int) -> tuple[ufm.Problem, ufm.Params]:
    problem = ufm.balanced(K, N // K, d, **LAMS)
    return jax.device_put((problem, ufm.init(problem, jax.random.key(0), scale=d**-0.25)))


def _planned(function: Any, *arguments: Any) -> dict[str, int]:
    """The bytes that the compiled program plans for: arguments, outputs and what lies between."""
    plan = function.lower(*arguments).compile().memory_analysis()
    return {"planned_bytes": plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes}


def _proven(c: ufm.Certificate) -> dict[str, Any]:
    return _bounds(c) | {"optimal": c.verdict == ufm.Verdict.GLOBAL}


def _bounds(c: ufm.Certificate) -> dict[str, float]:
    return {"value": float(c.value), "gap": float(c.gap), "rounding": float(c.rounding)}


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.scaling"))
