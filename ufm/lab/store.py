"""The blocks of a sweep on disk: labelled arrays in Zarr, a chunk a block, and a done-mark for every block."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ufm.lab.grid import Block, Grid, extent
from ufm.lab.records import as_json, read_json, whole_folder, write_json

if TYPE_CHECKING:
    from xarray import Dataset

FILL = {"f": np.nan, "c": np.nan, "i": 0, "u": 0, "b": False}


class Output(NamedTuple):
    """What a cell returns under one name: its shape and dtype, the names of its dimensions, attributes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    dims: tuple[str, ...]
    attributes: dict[str, Any]


Outputs = Mapping[str, Output]


class Memory:
    """The blocks of a sweep that keeps no folder."""

    def __init__(self, grid: Grid, outputs: Outputs) -> None:
        self.grid, self.outputs = grid, outputs
        self.arrays = {k: np.full(grid.shape + o.shape, FILL[o.dtype.kind], o.dtype) for k, o in outputs.items()}
        self.messages: dict[tuple[int, ...], Mapping[int, str]] = {}

    def is_kept(self, block: Block) -> bool:
        """Whether the block has been written."""
        return self.grid.place(block) in self.messages

    def write(self, block: Block, values: Mapping[str, np.ndarray], failures: Mapping[int, str]) -> None:
        """Keep the outputs of a block, one entry a cell, and by cell what failed."""
        for name, array in self.arrays.items():
            array[tuple(block.values())] = values[name].reshape(extent(block) + self.outputs[name].shape)
        self.messages[self.grid.place(block)] = failures

    def failures(self, block: Block) -> Mapping[int, str]:
        """By cell what failed."""
        return self.messages[self.grid.place(block)]

    def dataset(self, coordinates: "Dataset") -> "Dataset":
        """All outputs over the grid."""
        dims = tuple(self.grid.axes)
        return coordinates.assign(
            {k: ((*dims, *o.dims), self.arrays[k], o.attributes) for k, o in self.outputs.items()}
        )


class Store:
    """A folder with config.json, grid.zarr and done/, a mark for every block that is kept.

    A block is one chunk of every array. Its mark is written last and atomically and holds the digest of their files and
    of what failed, by which anything missing, unfinished or damaged is known, however its writer ended. Writers of the
    same sweep do each other no harm: each replaces whole files, by the same content.
    """

    def __init__(self, folder: Path, grid: Grid, outputs: Outputs) -> None:
        import zarr

        self.folder, self.grid, self.outputs = folder, grid, outputs
        try:
            group = zarr.open_group(folder / "grid.zarr", mode="r+")
            arrays: dict[str, Any] = {name: group[name] for name in outputs}
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(f"{folder / 'grid.zarr'} lacks metadata or has damaged ones; name a new folder") from error
        self.arrays = {name: array.with_config({"write_empty_chunks": True}) for name, array in arrays.items()}

    def is_kept(self, block: Block) -> bool:
        """Whether the block is there as it was written."""
        try:
            mark = read_json(self._mark(block))
            return bool(mark["digest"] == self._digest(block, mark["failures"]))
        except (ValueError, KeyError, TypeError, OSError):
            return False

    def write(self, block: Block, values: Mapping[str, np.ndarray], failures: Mapping[int, str]) -> None:
        """Keep the outputs of a block, one entry a cell, and by cell what failed.

        Raises:
            ValueError: if the folder cannot be written.
        """
        messages = {str(cell): message for cell, message in failures.items()}
        try:
            for name, array in self.arrays.items():
                array[tuple(block.values())] = values[name].reshape(extent(block) + self.outputs[name].shape)
            digest = self._digest(block, messages)
        except OSError as error:
            raise ValueError(
                f"{self.folder} cannot be written ({error.strerror}); what is done is kept, run again to go on"
            ) from error
        write_json(self._mark(block), {"digest": digest, "failures": messages})

    def failures(self, block: Block) -> Mapping[int, str]:
        """By cell what failed."""
        return {int(i): message for i, message in read_json(self._mark(block))["failures"].items()}

    def dataset(self, coordinates: "Dataset") -> "Dataset":
        """All outputs over the grid, read when they are asked for."""
        import xarray

        path, axes = self.folder / "grid.zarr", list(self.grid.axes)
        kept = xarray.open_zarr(path, chunks=None, consolidated=False, drop_variables=axes)[list(self.outputs)]
        return kept.assign_coords(coordinates.coords)

    def _mark(self, block: Block) -> Path:
        return self.folder / "done" / f"{'-'.join(map(str, self.grid.place(block)))}.json"

    def _digest(self, block: Block, messages: Any) -> str:
        digest = hashlib.blake2b(json.dumps(messages).encode(), digest_size=16)
        for path in self._chunks(block):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def _chunks(self, block: Block) -> Iterator[Path]:
        for name, array in sorted(self.arrays.items()):
            place = self.grid.place(block) + (0,) * len(self.outputs[name].shape)
            yield self.folder / "grid.zarr" / name / array.metadata.encode_chunk_key(place)


def is_free(folder: Path) -> bool:
    """Whether there is nothing under that name, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def open_store(
    folder: Path, grid: Grid, settings: Mapping[str, Any], coordinates: "Dataset", outputs: Outputs, *, any_method: bool
) -> tuple[Store, str]:
    """The store of a sweep with these settings, made if there is none, and the method it was made with.

    If any method will do, two processes may have chosen differently: the one whose store is there first decides.

    Raises:
        ValueError: if the folder holds something else or a sweep with other settings, or cannot be made.
    """
    if is_free(folder):
        _make(folder, grid, settings, coordinates, outputs)
    kept, wanted = read_json(folder / "config.json"), as_json(settings)
    names = (kept.keys() | wanted.keys()) - ({"method"} if any_method else set())
    if different := sorted(name for name in names if kept.get(name) != wanted.get(name)):
        raise ValueError(f"store {folder} is of a sweep with another {', '.join(different)}; name a new folder")
    return Store(folder, grid, outputs), kept["method"]


def _make(folder: Path, *contents: Any) -> None:
    """The store made whole, unless another process does meanwhile."""
    try:
        with whole_folder(folder) as partial:
            _create(partial, *contents)
    except ValueError:
        if is_free(folder):
            raise


def _create(folder: Path, grid: Grid, settings: Mapping[str, Any], coordinates: "Dataset", outputs: Outputs) -> None:
    import zarr

    (folder / "config.json").write_text(json.dumps(as_json(settings), indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / "done").mkdir()
    coordinates.to_zarr(folder / "grid.zarr", zarr_format=3, consolidated=False)
    group = zarr.open_group(folder / "grid.zarr", mode="r+")
    for name, output in outputs.items():
        group.create_array(
            name, shape=grid.shape + output.shape, chunks=grid.chunks + output.shape, dtype=output.dtype,
            fill_value=FILL[output.dtype.kind], dimension_names=(*grid.axes, *output.dims),
            attributes=output.attributes,
        )  # fmt: skip
