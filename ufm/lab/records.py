"""A run is a folder in open formats, written whole or not at all, and never over another."""

import contextlib
import dataclasses
import io
import json
import os
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

PACKAGES = ("ufm", "jax", "jaxlib", "numpy", "equinox", "optax")


def create_folder(folder: str | os.PathLike[str]) -> Path:
    """A new folder for a run.

    Raises:
        ValueError: if it exists already or cannot be made; a run is never overwritten.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def check_new(folder: str | os.PathLike[str]) -> Path:
    """The folder's path; ValueError if it exists already, which is better said before the work than after it."""
    path = Path(folder)
    if os.path.lexists(path):
        raise _exists(path)
    return path


def _exists(path: Path) -> ValueError:
    return ValueError(f"folder {path} exists already: a run is never overwritten, name another")


def write_run(
    folder: str | os.PathLike[str],
    config: Any,
    summary: Mapping[str, Any],
    arrays: Mapping[str, Any] | None = None,
    *,
    start: float,
) -> Path:
    """A finished run: config.json, summary.json and, if there are arrays, arrays.npz, in a new folder.

    The folder appears under its name only when complete; whatever goes wrong leaves nothing behind.

    Args:
        folder: its name, new.
        config: what was asked for; anything that as_json takes.
        summary: scalars found; provenance is added.
        arrays: plain arrays found, by name.
        start: time.perf_counter() when the run began.

    Raises:
        ValueError: if the folder exists already or cannot be written.
    """
    with whole_folder(check_new(folder)) as partial:
        write_json(partial / "config.json", as_json(config))
        write_json(partial / "summary.json", as_json(summary) | provenance(start))
        if arrays:
            write_arrays(partial / "arrays.npz", arrays)
    return Path(folder)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears under its name only when all is in it.

    Raises:
        ValueError: if it cannot be made, or the name is taken meanwhile.
    """
    partial = _beside(path)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    except OSError as error:
        raise (_exists(path) if os.path.lexists(path) else _unwritable(path, error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"folder {path} cannot be made ({error.strerror}): name a writable one")


def _beside(path: Path) -> Path:
    """A name in the same folder that nobody else has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file whole; numbers must be finite, as as_json leaves them."""
    _replace(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Replace an .npz file of plain arrays whole."""
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **{k: np.asarray(v) for k, v in arrays.items()})
    _replace(path, file.getvalue())


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run.

    Raises:
        ValueError: if it is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: is {Path(path).parent} the folder of a run?") from error


def as_json(x: Any) -> Any:
    """Dataclasses, arrays, enums and numbers as JSON values; NaN and infinities as their names."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {f.name: as_json(getattr(x, f.name)) for f in dataclasses.fields(x)}
    if isinstance(x, Mapping):
        return {str(k): as_json(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [as_json(v) for v in x]
    if isinstance(x, np.ndarray | np.generic | jax.Array):
        return as_json(np.asarray(x).tolist())
    if isinstance(x, float) and not np.isfinite(x):
        return str(x)
    return x if x is None or isinstance(x, bool | int | float | str) else str(x)


def provenance(start: float) -> dict[str, Any]:
    """Wall time since start (of time.perf_counter), versions, hardware and git revision of what made a record."""
    device = jax.devices()[0]
    return {
        "wall_seconds": time.perf_counter() - start,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "device": f"{device.platform} {device.device_kind}",
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "revision": _revision(),
    }


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _revision() -> str | None:
    """The git revision of the source, with "+" if the tree has changes; None outside a checkout."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # a copy installed inside another checkout is not its
        return _git("describe", "--always", "--dirty=+", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _replace(path: Path, content: bytes) -> None:
    partial = _beside(path)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): name a writable folder") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
