"""Labelled images to train on, standardised: digits, Fashion-MNIST, MNIST, CIFAR-10 from their own files."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt8

from ufm.nets.files import CURE, idx_files, locate, read_cifar, read_idx, search_folders

SPLITS = ("train", "test")
K = 10  # classes of every set here

Raw = tuple[UInt8[np.ndarray, "N rows columns channels"], UInt8[np.ndarray, " N"]]


@dataclass(frozen=True)
class Images:
    """N images x, channels last and standardised, with their classes 0 … K − 1 and the name of their set."""

    x: Float32[np.ndarray, "N rows columns channels"]
    labels: Int32[np.ndarray, " N"]
    K: int
    name: str


def load(name: str, split: str, *, limit: int | None = None) -> Images:
    """(pixels − μ)/σ channel by channel, μ and σ the mean and deviation over the whole training split.

    "digits" comes with scikit-learn: 1797 images of 8×8; in file order, each class's 5th, 10th, … image is test
    (355 images), the others train (1442). "fashion-mnist" and "mnist" are four IDX files, gzipped or not;
    "cifar10" is the binary version's six files in a folder cifar-10-batches-bin. The files of a set come from the
    first of these folders that holds them all: `$UFM_DATA/<name>`, `$UFM_DATA` (taken to be the set asked for),
    `~/.cache/ufm/<name>` (`$XDG_CACHE_HOME/ufm/<name>`) and `/usr/share/datasets/<name>`, where Debian's
    package dataset-fashion-mnist installs. IDX files found nowhere are downloaded to the cache and checked
    against their published SHA-256.

    Args:
        name: "digits", "fashion-mnist", "mnist" or "cifar10".
        split: "train" or "test".
        limit: keep limit/K images of each class, the first in file order; all of them unless given.

    Raises:
        ValueError: unknown name or split; a limit that K does not divide or a class cannot fill; files that
            are missing, malformed or do not fit together.
    """
    if name not in READERS:
        raise ValueError(f"name = {name!r}: give one of {', '.join(READERS)}")
    if split not in SPLITS:
        raise ValueError(f"split = {split!r}: give one of {', '.join(SPLITS)}")
    pixels, labels = READERS[name](split)
    train = pixels if split == "train" else READERS[name]("train")[0]
    if train.shape[1:] != pixels.shape[1:]:
        raise ValueError(
            f"{name}: training images have shape {train.shape[1:]}, test images {pixels.shape[1:]}: "
            f"replace both by the published files"
        )
    if limit is not None:
        keep = _first_of_each_class(labels, limit)
        pixels, labels = pixels[keep], labels[keep]
    return Images(_standardised(pixels, train, name), labels.astype(np.int32), K, name)


def _standardised(pixels: np.ndarray, train: np.ndarray, name: str) -> Float32[np.ndarray, "N _ _ _"]:
    """(pixels − μ)/σ with the channel means μ and deviations σ of the training pixels."""
    channels = np.moveaxis(train, -1, 0)
    mean, deviation = ([f(channel) for channel in channels] for f in (np.mean, np.std))
    if not all(deviation):
        raise ValueError(f"{name}: all training pixels of a channel are equal: replace the files by the published")
    x = pixels.astype(np.float32)
    x -= mean
    x /= deviation
    return x


def _first_of_each_class(labels: UInt8[np.ndarray, " N"], limit: int) -> Int[np.ndarray, " kept"]:
    """Positions, in file order, of the first limit/K images of each class."""
    if limit < K or limit % K:
        raise ValueError(f"limit = {limit}: give a positive multiple of K = {K}, that it be the same for each class")
    n, counts = limit // K, np.bincount(labels, minlength=K)
    if n > counts.min():
        raise ValueError(
            f"limit = {limit} needs {n} of each class, but class {counts.argmin()} has {counts.min()}: "
            f"give at most {K * counts.min()}"
        )
    return np.sort(np.concatenate([np.flatnonzero(labels == k)[:n] for k in range(K)]))


def _read_digits(split: str) -> Raw:
    """scikit-learn's digits, pixels 0 … 16."""
    from sklearn.datasets import load_digits  # a slow import that no other set needs

    digits = load_digits()
    test = _every_fifth_of_each_class(digits.target)
    chosen = test if split == "test" else ~test
    return digits.images[chosen, :, :, None].astype(np.uint8), digits.target[chosen].astype(np.uint8)


def _every_fifth_of_each_class(labels: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """True at the 5th, 10th, … image of each class."""
    chosen = np.zeros(len(labels), bool)
    for k in range(K):
        chosen[np.flatnonzero(labels == k)[4::5]] = True
    return chosen


def _read_idx_split(name: str, split: str) -> Raw:
    """The images and labels of one split of a set in IDX files."""
    prefix = "train" if split == "train" else "t10k"
    files = idx_files(name)
    images, labels = files[f"{prefix}-images-idx3-ubyte"], files[f"{prefix}-labels-idx1-ubyte"]
    pixels, classes = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(classes):
        raise ValueError(
            f"{labels} holds {len(classes)} labels for the {len(pixels)} images of {images}: "
            f"replace both by the published files"
        )
    return pixels[..., None], _in_range(classes, labels)


def _read_cifar10_split(split: str) -> Raw:
    """The images and labels of one split of CIFAR-10."""
    files = [f"data_batch_{batch}.bin" for batch in range(1, 6)] + ["test_batch.bin"]
    folders = [folder / "cifar-10-batches-bin" for folder in search_folders("cifar10")]
    paths = locate(folders, files)
    if paths is None:
        raise ValueError(
            f"cifar10: no folder of {', '.join(map(str, folders))} holds {', '.join(files)}: unpack "
            f"cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html in $UFM_DATA"
        )
    chosen = paths[:5] if split == "train" else paths[5:]
    batches = [(read_cifar(path), path) for path in chosen]
    pixels = np.concatenate([images for (images, _), _ in batches])
    return pixels, np.concatenate([_in_range(labels, path) for (_, labels), path in batches])


def _in_range(labels: UInt8[np.ndarray, " N"], path: Path) -> UInt8[np.ndarray, " N"]:
    """The labels, each checked to be a class."""
    if labels.max() >= K:
        raise ValueError(f"{path} holds the label {labels.max()}, not 0 to {K - 1}: {CURE}")
    return labels


READERS: dict[str, Callable[[str], Raw]] = {
    "digits": _read_digits,
    "fashion-mnist": partial(_read_idx_split, "fashion-mnist"),
    "mnist": partial(_read_idx_split, "mnist"),
    "cifar10": _read_cifar10_split,
}
