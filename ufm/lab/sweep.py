"""One quantity over a grid of hyper-parameters: a compiled program a shape, kept block by block, resumable."""

import dataclasses
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tqdm import tqdm

from ufm.lab.farm import compute
from ufm.lab.grid import Grid, cell_count, make_grid, problem_at
from ufm.lab.identity import function_name, outputs_and_digest, without_addresses
from ufm.lab.program import METHODS, Like, Recipe, error_text, measure_methods
from ufm.lab.records import as_json, provenance, read_json, write_json
from ufm.lab.store import FILL, Memory, Output, Store, is_free, open_store

if TYPE_CHECKING:
    from xarray import Dataset

SHOWN = 1000  # failures that the attributes name
LONG = 1000  # values of an axis that the settings list
STATUS = Output((), np.dtype("int8"), (), {"flag_values": [0, 1, 2, 3], "flag_meanings": "missing done nan raised"})
AXES = {
    "K": "classes",
    "n": "samples per class",
    "counts": "samples of each class",
    "d": "feature dimension",
    "lam_W": "λ_W of (UFM)",
    "lam_H": "λ_H of (UFM), per sample",
    "lam_b": "λ_b of (UFM); 0 leaves the bias free",
    "seed": "seed of the key",
}


def sweep(
    cell: Callable[..., Any], grid: Mapping[str, Any], *, make: Callable[..., Any] = problem_at, pad: bool = False,
    batch_size: int = 1024, method: str | None = None, store: str | Path | None = None,
    devices: Sequence[jax.Device] | None = None, executor: Executor | None = None,
    describe: Mapping[str, Mapping[str, Any]] | None = None,
) -> "Dataset":  # fmt: skip
    """cell(problem) at every point of a grid, as a labelled array for each of its outputs.

    Floating axes and `seed` are leaves: traced scalars, all in one compiled program. Integers (K, n, d), strings and
    tuples are shapes: a program each. With pad=True K is a leaf too, and every problem has the largest K classes, of
    which those beyond its own are masked. Lists, ranges and arrays in the grid are axes; anything else is fixed.

    Args:
        cell: what to compute, traceable: a function of a Problem, and of a key where the grid has a seed, that returns
            a scalar, an array, or a pytree of them, of the same shapes everywhere.
        grid: values by name, of the arguments of `make`.
        make: makes the cell's argument of a point of the grid; the class-mean problem unless stated. make=dict hands
            over the settings themselves.
        pad: whether to pad K; `make` is then also given the `largest`.
        batch_size: the most cells of a block, which is computed at once and kept as one chunk.
        method: "vmap" over the cells of a block; "map" over one after the other, better where a cell loops until it is
            done; "python" for cells that cannot be traced. The faster of the first two on the first block if None.
        store: folder for config.json, grid.zarr (Zarr 3; xarray.open_zarr(..., consolidated=False)), done-marks and
            summary.json. If it exists, only blocks that are missing or damaged are computed, by the method it was made
            with; the result is bitwise that of an uninterrupted run on as many devices of the same kind. A sweep is the
            same if its settings are and, at the first shapes, the program that the cell lowers to; with
            method="python" a cell is known by its name and source alone.
        devices: those to split every block over; all of this process if None.
        executor: whatever has the interface of concurrent.futures, to send the blocks to; its workers use all their
            devices. A block whose worker is lost is tried again. Processes must be spawned, not forked.
        describe: attributes (units, normalisation, long_name; dims names the dimensions of an array) by output.

    Returns:
        An xarray.Dataset with the grid's axes as coordinates, each output, and the `status` of every cell: 1 done, 2
        NaN, 3 raised. The attributes tell the settings, the provenance and, by cell, what went wrong.

    Raises:
        ValueError: if the grid is not of this form, the cell fails everywhere or returns other shapes elsewhere, or the
            store cannot be written or holds a sweep with other settings.
    """
    start = time.perf_counter()
    g = make_grid(grid, batch_size=batch_size, pad=pad)
    folder = None if store is None else Path(store).expanduser()
    kept = _kept(folder)
    recipe = _recipe(cell, make, g, method or kept.get("method"))
    like, digest = _first_that_works(recipe, g, _like_of(kept))
    recipe, seconds = (recipe, {}) if recipe.method else _fastest(recipe, g, devices)
    settings, outputs = _settings(recipe, g, like, digest), _outputs(g, like, describe or {})
    about = {"settings": settings, "seconds": seconds, "made": provenance(start) | {"wall_seconds": None}}
    coordinates = _coordinates(g, describe or {}, about)
    place: Memory | Store = Memory(g, outputs)
    if folder is not None:
        place, kept_method = open_store(folder, g, settings, coordinates, outputs, any_method=method is None)
        recipe = dataclasses.replace(recipe, method=kept_method)
    todo = [block for block in g.blocks() if not place.is_kept(block)]
    with tqdm(total=g.cells, initial=g.cells - sum(map(cell_count, todo)), unit="cell", disable=None) as bar:
        for block, values, failures in compute(recipe, g, like, todo, devices, executor, place.is_kept):
            place.write(block, values, failures)
            bar.update(cell_count(block))
    computed = {"method": recipe.method, "computed": sum(map(cell_count, todo))}
    return _finished(place, coordinates, computed | provenance(start))


def _kept(store: Path | None) -> dict[str, Any]:
    """The settings of the sweep that a folder holds, if there is one."""
    if store is None or is_free(store):
        return {}
    settings = read_json(store / "config.json")
    if not (isinstance(settings, dict) and {"cell", "method", "outputs"} <= settings.keys()):
        raise ValueError(f"store {store} holds something that is no sweep; name a new folder")
    return settings


def _recipe(cell: Callable, make: Callable, g: Grid, method: str | None) -> Recipe:
    if method not in (None, *METHODS):
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    fixed = g.fixed if g.largest is None else g.fixed | {"largest": g.largest}
    leaves = tuple((name, g.axes[name].dtype.name) for name in g.leaves)
    return Recipe(cell, make, fixed, leaves, method or "", bool(jax.config.read("jax_enable_x64")), uuid.uuid4().hex)


def _like_of(settings: Mapping[str, Any]) -> Like:
    """What a store says that its cell returns."""
    return {k: jax.ShapeDtypeStruct(shape, dtype) for k, (dtype, shape) in settings.get("outputs", {}).items()}


def _first_that_works(recipe: Recipe, g: Grid, known: Like) -> tuple[Like, str]:
    """What the cell returns and the digest of what it computes, at the first shapes at which it returns anything."""
    errors = []
    for shapes, block in g.first_blocks().items():
        try:
            return outputs_and_digest(recipe, shapes, g.leaves_of(block), known)
        except Exception as error:
            errors.append(error)
    cure = "; method='python' needs no tracing" if isinstance(errors[-1], jax.errors.JAXTypeError) else ""
    raise ValueError(f"cell fails at every shape of the grid, at last with {error_text(errors[-1])}{cure}")


def _fastest(recipe: Recipe, g: Grid, devices: Any) -> tuple[Recipe, dict[str, float]]:
    """The recipe with the method that takes least on the first block on which one succeeds, and what each took."""
    for shapes, block in g.first_blocks().items():
        if seconds := measure_methods(recipe, shapes, g.leaves_of(block), g.size, devices):
            return dataclasses.replace(recipe, method=min(seconds, key=seconds.__getitem__)), seconds
    return dataclasses.replace(recipe, method="map"), {}


def _settings(recipe: Recipe, g: Grid, like: Like, digest: str) -> dict[str, Any]:
    """All that the numbers depend on."""
    return {
        "cell": f"{function_name(recipe.cell)} {digest}",
        "make": function_name(recipe.make),
        "grid": {name: _axis_label(values) for name, values in g.axes.items()},
        "fixed": {name: _label(x) for name, x in recipe.fixed.items()},
        "block": g.chunk,
        "method": recipe.method,
        "precision": "float64" if recipe.x64 else "float32",
        "outputs": {name: [x.dtype.name, list(x.shape)] for name, x in like.items()},
    }


def _axis_label(values: np.ndarray) -> Any:
    """All values of an axis, or of a long one its ends and a digest."""
    if len(values) <= LONG or values.dtype == object:
        return [_label(x) for x in values]
    digest = hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()
    return {"first": values[0], "last": values[-1], "count": len(values), "digest": digest}


def _label(x: Any) -> Any:
    """A plain value or tuple itself, of anything else a text; its content is in the digest of the program."""
    if isinstance(x, tuple):
        return [_label(part) for part in x]
    return as_json(x) if isinstance(x, bool | int | float | str | np.generic | None) else without_addresses(repr(x))


def _outputs(g: Grid, like: Like, describe: Mapping[str, Mapping[str, Any]]) -> dict[str, Output]:
    found = {name: _output(name, x, describe.get(name, {})) for name, x in like.items()}
    dims = {pair for output in found.values() for pair in zip(output.dims, output.shape, strict=True)}
    names = [*g.axes, "status", *found, *(dim for dim, _ in dims)]
    if not found:
        raise ValueError("cell must return a number, an array or a pytree of them, got nothing")
    if clash := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"axes, outputs and dimensions must have different names, got {', '.join(clash)} twice")
    return found | {"status": STATUS}


def _output(name: str, x: jax.ShapeDtypeStruct, about: Mapping[str, Any]) -> Output:
    if getattr(x.dtype, "kind", None) not in FILL or "/" in name:
        raise ValueError(f"cell must return numbers or booleans under names without /, got {name} of {x.dtype}")
    attributes = dict(about)
    dims = tuple(attributes.pop("dims", (f"{name}_{i}" for i in range(len(x.shape)))))
    if len(dims) != len(x.shape) or len(set(dims)) < len(dims):
        raise ValueError(f"describe must name {len(x.shape)} different dimensions of {name}, got {', '.join(dims)}")
    return Output(x.shape, x.dtype, dims, attributes)


def _coordinates(g: Grid, describe: Mapping[str, Mapping[str, Any]], attributes: Mapping[str, Any]) -> "Dataset":
    import xarray

    axes = {name: (name, _labels(values), _about(name, describe)) for name, values in g.axes.items()}
    return xarray.Dataset(coords=axes, attrs=_as_text(attributes))


def _labels(values: np.ndarray) -> np.ndarray:
    """Numbers as they are, all else as text of variable length, which Zarr 3 specifies."""
    return values if values.dtype.kind in "biuf" else np.array([str(x) for x in values], object)


def _about(name: str, describe: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return dict(describe.get(name, {"long_name": AXES[name]} if name in AXES else {}))


def _finished(place: Memory | Store, coordinates: "Dataset", summary: dict[str, Any]) -> "Dataset":
    """The whole dataset, with what went wrong and what made it among its attributes; the store's summary is renewed."""
    failures = list(_failures(place))
    summary = {"cells": place.grid.cells, "failed": len(failures), "failures": failures[:SHOWN]} | summary
    if isinstance(place, Store) and (summary["computed"] or not (place.folder / "summary.json").exists()):
        write_json(place.folder / "summary.json", as_json(summary))
    return place.dataset(coordinates).assign_attrs(_as_text(summary))


def _as_text(attributes: Mapping[str, Any]) -> dict[str, str]:
    return {name: json.dumps(as_json(x), ensure_ascii=False) for name, x in attributes.items()}


def _failures(place: Memory | Store) -> Iterator[dict[str, Any]]:
    for block in place.grid.blocks():
        for cell, message in place.failures(block).items():
            yield place.grid.coordinates(block, cell) | {"message": message}
