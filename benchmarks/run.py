"""All comparisons in one run: a table on the terminal and a record beside it."""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from threadpoolctl import threadpool_info
from tqdm import tqdm

from benchmarks.curvature import compare_counts, compare_ends
from benchmarks.descend import compare_descents
from benchmarks.imbalanced import compare_optima
from benchmarks.race import CORES, HAS_TORCH, Row
from benchmarks.scale import apart, compare_compiling, compare_growth, compare_resuming, here
from benchmarks.solve import compare_solvers
from benchmarks.sweeps import CLOSED, OPTIMA, compare_descent_sweeps, compare_optimum_sweeps, through_threshold
from ufm.lab.records import as_json, provenance, write_json

LAMBDAS = (5e-3, 5e-5), (5e-4, 1e-5)
HEADER = ("threads", "seconds", "steps", "f − f*", "prepare", "theirs/ours")


@dataclasses.dataclass(frozen=True)
class Config:
    """Wall times of ufm beside those of what one would pick instead, all in float64; a ratio above 1: ufm is ahead.

    It takes about twenty minutes, most of it in CVXPY at K = 100.
    """

    quick: bool = False
    """Tiny sizes: shows that all of it runs. The times mean nothing."""
    record: Path = Path(__file__).parent / "records" / "latest.json"
    """The JSON file that keeps the times, ratios, accuracies, versions and hardware; replaced if it exists."""


def main(config: Config) -> Path:
    """Run every comparison, print its table as soon as it is done, and write the record."""
    jax.config.update("jax_enable_x64", True)
    start = time.perf_counter()
    command = shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]])
    setting = {"command": command, "quick": config.quick, "blas": _kernels(), "rivals": _rivals()}
    config.record.parent.mkdir(parents=True, exist_ok=True)
    tqdm.write(f"{setting['blas']}; {CORES} cores; prepare: seconds to compile, or to build the cone program")
    rows: list[Row] = []
    for compare in tqdm(_comparisons(config), unit="comparison", leave=False):
        rows += (found := compare())
        tqdm.write(table(found))
    write_json(config.record, as_json({**setting, **provenance(start), "rows": rows}))
    tqdm.write(f"\nrecord: {config.record}")
    return config.record


def table(rows: list[Row]) -> str:
    """The rows of one job under its name."""
    lines = [f"\n{rows[0].job:<46}" + "".join(f"{title:>12}" for title in HEADER)]
    for row in rows:
        cells = (
            _cell(row.threads, "d"),
            _cell(row.seconds, ".4g"),
            _cell(row.steps, "d"),
            _cell(row.error, ".1e"),
            _cell(row.prepare, ".2g"),
            _cell(row.ratio, ".3g"),
        )
        lines.append(f"  {row.contender:<44}" + "".join(f"{cell:>12}" for cell in cells) + f"  {row.note}".rstrip())
    return "\n".join(lines)


def _cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _comparisons(config: Config) -> list[Callable[[], list[Row]]]:
    return [*_of_single_runs(config), *_of_sweeps(config)]


def _of_single_runs(config: Config) -> list[Callable[[], list[Row]]]:
    size, steps, repeats, Ks = ((3, 4, 3), 20, 2, (3,)) if config.quick else ((10, 100, 20), 1000, 15, (10, 50, 100))
    return [
        *(partial(compare_solvers, *size, *lams, repeats) for lams in LAMBDAS[: 1 if config.quick else None]),
        partial(compare_descents, *size, *LAMBDAS[0], steps, repeats),
        *(partial(compare_optima, K, 1e-3, 1e-3, repeats) for K in Ks),
        partial(compare_counts, *((3, 4, 4) if config.quick else (10, 50, 16)), 5e-3, 5e-4),
        partial(
            compare_ends, *((3, 4, 4) if config.quick else (100, 20, 128)), 5e-3, 5e-5, places=1 if config.quick else 4
        ),
    ]


def _of_sweeps(config: Config) -> list[Callable[[], list[Row]]]:
    if config.quick:
        return [
            partial(compare_descent_sweeps, 3, 4, 3, np.geomspace(1e-3, 1e-2, 2), 20, 2),
            partial(compare_optimum_sweeps, CLOSED, (2, 3), through_threshold(3), 4, 3, 2),
            partial(compare_growth, [(1, 3)], here),
            partial(compare_resuming, (1, 3), here),
        ]
    return [
        partial(compare_descent_sweeps, 10, 100, 20, np.geomspace(1e-5, 5e-3, 16), 1000, 3),
        partial(compare_optimum_sweeps, OPTIMA, (2, 5, 10, 20), through_threshold(64), 10, 20, 5),
        partial(compare_growth, [(10 ** (p // 2), 10 ** (p - p // 2)) for p in range(1, 6)], apart),
        partial(compare_resuming, (1000, 1000), apart),
        partial(compare_compiling, range(2, 22), 50, apart),
    ]


def _kernels() -> str:
    blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    return ", ".join(sorted({f"{b['internal_api']} {b['version']} with {b['architecture']} kernels" for b in blas}))


def _rivals() -> dict[str, str]:
    names = ["scipy", "cvxpy", "scs", "clarabel"] + ["torch"] * HAS_TORCH
    return {name: version(name) for name in names}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", CORES)  # as the command line does for sweeps
    main(tyro.cli(Config, prog="python -m benchmarks.run"))
