"""Features and classifier in files that any framework can write: npz (never pickled) and safetensors.

Keys: `H` (d×N, a column a sample) or `features` (N×d, a row a sample, as most frameworks hold them); `labels`
(N class numbers from 0); `W` (K×d, a row a class); and `b` (K) where there is a bias. Others are ignored.
"""

import contextlib
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16; comes with JAX)
import numpy as np
from jaxtyping import Array, Shaped

KEYS = ("H", "features", "labels", "W", "b")


@dataclass(frozen=True)
class Features:
    """The arguments of collapse_metrics, in the dtypes of their file; shapes and values are checked there."""

    H: Shaped[Array | np.ndarray, "..."]
    """Features, d×N, a column a sample."""

    labels: Shaped[Array | np.ndarray, "..."]
    """Class numbers, N."""

    W: Shaped[Array | np.ndarray, "..."]
    """Classifier, K×d, a row a class."""

    b: Shaped[Array | np.ndarray, "..."] | None
    """Bias, K, or None where there is none."""


def load_features(path: str | os.PathLike[str]) -> Features:
    """(H, labels, W, b) as they stand in a .npz or .safetensors file; rows of `features` become columns of H.

    Args:
        path: the file; its suffix tells the format. safetensors needs the extra ufm[features].

    Raises:
        ValueError: if the file is missing, damaged, pickled, of another format, or lacks a key; one line.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(f"{path} ends in neither .npz nor .safetensors: export the features as one of them")
    try:
        arrays = _READERS[path.suffix](path)
    except ImportError as error:
        raise ValueError(f"{path} needs the package safetensors: pip install 'ufm[features]'") from error
    except Exception as error:  # a damaged file can break zip, zlib, npy headers, JSON, memory ...
        raise ValueError(f"{path} cannot be read ({_reason(error)}): export the features again") from error
    if ("H" in arrays) == ("features" in arrays):
        raise ValueError(f"{path} has keys {_names(arrays)}, but must have one of H (d×N) and features (N×d)")
    if missing := {"labels", "W"} - arrays.keys():
        raise ValueError(f"{path} has no {_names(missing)}: export labels (N) and W (K×d) as well")
    H = arrays["H"] if "H" in arrays else arrays["features"].T
    return Features(H, arrays["labels"], arrays["W"], arrays.get("b"))


def save_features(path: str | os.PathLike[str], features: Features) -> None:
    """Write an .npz that load_features reads back; a file of that name is replaced whole or not at all.

    bfloat16, which npz lacks, is written as float32.

    Raises:
        ValueError: if path does not end in .npz or cannot be written, or if an array would need pickling.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path} does not end in .npz, the one format written here: rename it")
    arrays = {name: _storable(x) for name, x in vars(features).items() if x is not None}
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with partial.open("xb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        partial.replace(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be written ({_reason(error)}): choose a writable folder") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        present = [name for name in KEYS if f"{name}.npy" in archive.namelist()]
        return {name: _read_npy(archive, f"{name}.npy") for name in present}


def _read_npy(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        file.read()  # to the end, where the checksum is compared
    return array


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in KEYS if name in file.keys()}  # noqa: SIM118


_READERS = {".npz": _read_npz, ".safetensors": _read_safetensors}


def _storable(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [type(error).__name__])[0]


def _names(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys)) or "none"
