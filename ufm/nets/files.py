"""The files that image sets are published in: where they are found, how they are fetched, how they are read."""

import gzip
import hashlib
import http.client
import math
import os
import tempfile
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

SYSTEM = Path("/usr/share/datasets")  # where Debian's dataset packages install
CURE = "replace it by the published file"
RECORD = 1 + 3 * 32 * 32  # bytes of one CIFAR-10 image: its label, then 32×32 of red, of green, of blue


@dataclass(frozen=True)
class Published:
    """The address of a set's gzipped IDX files and the SHA-256 digest of each, by the name without `.gz`."""

    address: str
    sha256: dict[str, str]


PUBLISHED = {
    "fashion-mnist": Published(
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        {
            "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
    "mnist": Published(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
}


def cache_folder(name: str) -> Path:
    """The folder that downloads of a set go to: `$XDG_CACHE_HOME/ufm/<name>`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ufm" / name


def search_folders(name: str) -> list[Path]:
    """The folders that may hold a set, in order: `$UFM_DATA/<name>`, `$UFM_DATA`, the cache, the system's."""
    given = os.environ.get("UFM_DATA")
    own = [Path(given) / name, Path(given)] if given else []
    return [*own, cache_folder(name), SYSTEM / name]


def find(folder: Path, file: str) -> Path | None:
    """The file in the folder, plain or gzipped; None if it is there in neither form."""
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def locate(folders: Sequence[Path], files: Sequence[str]) -> list[Path] | None:
    """The files, all from the first folder that holds every one of them; None if no folder does."""
    for folder in folders:
        paths = [path for file in files if (path := find(folder, file))]
        if len(paths) == len(files):
            return paths
    return None


def idx_files(name: str) -> dict[str, Path]:
    """The four IDX files of a set by name, found on this machine or else downloaded into the cache.

    Raises:
        ValueError: they are nowhere and cannot be had: says where they were looked for and what to do.
    """
    files = list(PUBLISHED[name].sha256)
    paths = locate(search_folders(name), files) or _download(name)
    return dict(zip(files, paths, strict=True))


def _download(name: str) -> list[Path]:
    """Every file of a set that its cache folder lacks, fetched and checked; the paths of all."""
    published, folder = PUBLISHED[name], cache_folder(name)
    missing = [file for file in published.sha256 if find(folder, file) is None]
    for file in tqdm(missing, desc=f"downloading {name}", unit="file"):
        url = f"{published.address}{file}.gz"
        try:
            _write_whole(folder / f"{file}.gz", _fetch(url, published.sha256[file]))
        except (OSError, http.client.HTTPException) as error:
            looked = ", ".join(map(str, search_folders(name)))
            raise ValueError(
                f"{name}: no folder of {looked} holds {', '.join(published.sha256)} (or these with .gz), and "
                f"{url} could not be downloaded ({error}): put the files in $UFM_DATA/{name}"
            ) from None
    return [path for file in published.sha256 if (path := find(folder, file))]


def _fetch(url: str, sha256: str) -> bytes:
    """The bytes at an address if their digest is as published, else OSError."""
    with urllib.request.urlopen(url, timeout=60) as response:
        data = response.read()
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise OSError(f"its {len(data)} bytes have SHA-256 {digest}, published is {sha256}")
    return data


def _write_whole(path: Path, data: bytes) -> None:
    """A file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        part = Path(scratch) / path.name
        part.write_bytes(data)
        os.replace(part, path)


def read_whole(path: Path) -> bytes:
    """The bytes of a file, unpacked if it ends in `.gz`.

    Raises:
        ValueError: the file is unreadable, or is not one whole gzip stream.
    """
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): {CURE}") from None


def read_idx(path: Path, axes: int) -> UInt8[np.ndarray, "..."]:
    """The array of unsigned bytes in an IDX file: magic number, big-endian lengths, then the entries.

    Raises:
        ValueError: wrong magic number, no entries, or a size other than the header's.
    """
    data, magic, start = read_whole(path), bytes((0, 0, 8, axes)), 4 + 4 * axes
    if data[:4] != magic:
        raise ValueError(
            f"{path} begins with the bytes {data[:4].hex(' ')}, an IDX file of {axes} axes "
            f"with {magic.hex(' ')}: {CURE}"
        )
    shape = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4))
    size = start + math.prod(shape)
    if len(data) != size:
        raise ValueError(f"{path} has {len(data)} bytes, its header says {size} for the shape {shape}: {CURE}")
    if 0 in shape:
        raise ValueError(f"{path} is empty, its header says shape {shape}: {CURE}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_cifar(path: Path) -> tuple[UInt8[np.ndarray, "N 32 32 3"], UInt8[np.ndarray, " N"]]:
    """The images, channels last, and labels in a CIFAR-10 binary file.

    Raises:
        ValueError: the size is no positive multiple of a record's 3073 bytes.
    """
    data = read_whole(path)
    if not data or len(data) % RECORD:
        raise ValueError(f"{path} has {len(data)} bytes, no positive multiple of {RECORD}: {CURE}")
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]
