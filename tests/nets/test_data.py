import gzip
import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ufm.nets import files
from ufm.nets.data import Images, load

FLOAT32_TOL = 1e-6  # a few float32 roundings on values of order one
COUNTS = {"train": 3, "t10k": 2}  # images of each class in the tiny sets below


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch, tmp_path):
    """No data folder, an empty cache, no system folder, an address that cannot be reached."""
    monkeypatch.delenv("UFM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "SYSTEM", tmp_path / "system")
    for name, published in files.PUBLISHED.items():
        nowhere = files.Published((tmp_path / "nowhere").as_uri() + "/", published.sha256)
        monkeypatch.setitem(files.PUBLISHED, name, nowhere)


def _idx(array):
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def _tiny_idx(seed=0):
    """The four files of a set of 5×4 images by name, and the arrays in them."""
    rng, arrays = np.random.default_rng(seed), {}
    for prefix, n in COUNTS.items():
        labels = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), n))
        arrays[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (10 * n, 5, 4), np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = labels
    return arrays


def _write(folder, arrays, *, zipped=False):
    folder.mkdir(parents=True)
    for file, array in arrays.items():
        data = _idx(array)
        (folder / (f"{file}.gz" if zipped else file)).write_bytes(gzip.compress(data) if zipped else data)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny set that is read as "mnist": its folder and its arrays."""
    arrays = _tiny_idx()
    _write(tmp_path / "data" / "mnist", arrays)
    monkeypatch.setenv("UFM_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "mnist", arrays


def _refused(*arguments, match, **options):
    with pytest.raises(ValueError, match=match) as error:
        load(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_idx_set_is_standardised_by_its_training_split(tiny):
    _, arrays = tiny
    train = arrays["train-images-idx3-ubyte"].astype(float)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, pixels = load("mnist", split), arrays[f"{prefix}-images-idx3-ubyte"]
        assert (images.K, images.name, images.x.dtype, images.labels.dtype) == (10, "mnist", np.float32, np.int32)
        expected = (pixels - train.mean()) / train.std()
        np.testing.assert_allclose(images.x, expected[..., None], atol=FLOAT32_TOL)
        np.testing.assert_array_equal(images.labels, arrays[f"{prefix}-labels-idx1-ubyte"])


def test_digits_split_is_a_stratified_partition_of_scikit_learns():
    train, test = load("digits", "train"), load("digits", "test")
    assert (len(train.x), len(test.x), train.x.shape[1:]) == (1442, 355, (8, 8, 1))
    assert abs(train.x.mean(dtype=float)) < FLOAT32_TOL
    assert abs(train.x.std(dtype=float) - 1) < FLOAT32_TOL
    whole = load_digits()
    assert list(np.bincount(test.labels)) == list(np.bincount(whole.target) // 5)
    both = np.concatenate([train.x, test.x])[..., 0]
    scale = np.ptp(whole.images) / np.ptp(both)
    pixels = np.rint((both - both.min()) * scale)
    seen = sorted(zip(map(tuple, pixels.reshape(1797, 64)), np.r_[train.labels, test.labels], strict=True))
    published = sorted(zip(map(tuple, whole.images.reshape(1797, 64)), whole.target, strict=True))
    assert seen == published


def test_limit_keeps_the_first_of_each_class_in_file_order(tiny):
    whole, part = load("mnist", "train"), load("mnist", "train", limit=20)
    keep = [i for i, k in enumerate(whole.labels) if list(whole.labels[:i]).count(k) < 2]
    np.testing.assert_array_equal(part.x, whole.x[keep])
    np.testing.assert_array_equal(part.labels, whole.labels[keep])
    assert list(np.bincount(part.labels)) == [2] * 10


def test_limit_of_everything_is_everything(tiny):
    np.testing.assert_array_equal(load("mnist", "test", limit=20).x, load("mnist", "test").x)


@pytest.mark.parametrize("limit", [-10, 0, 5, 15])
def test_limit_must_be_a_multiple_of_the_classes(limit):
    _refused("digits", "train", limit=limit, match="give a positive multiple of K = 10")


def test_limit_beyond_the_smallest_class_says_how_many_there_are():
    _refused("digits", "test", limit=350, match="class 8 has 34: give at most 340")
    assert len(load("digits", "test", limit=340).x) == 340


def test_records_are_frozen():
    with pytest.raises(AttributeError):
        load("digits", "test").K = 3


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("place", ["data/mnist", "data", "cache/ufm/mnist", "system/mnist"])
def test_each_folder_is_searched(place, zipped, tmp_path, monkeypatch):
    arrays = _tiny_idx()
    monkeypatch.setenv("UFM_DATA", str(tmp_path / "data"))
    _write(tmp_path / place, arrays, zipped=zipped)
    np.testing.assert_array_equal(load("mnist", "train").labels, arrays["train-labels-idx1-ubyte"])


def test_earlier_folders_win_and_files_of_two_folders_never_mix(tmp_path, monkeypatch):
    monkeypatch.setenv("UFM_DATA", str(tmp_path / "data"))
    for seed, place in enumerate(["system/mnist", "cache/ufm/mnist", "data", "data/mnist"]):
        _write(tmp_path / place, _tiny_idx(seed))
        np.testing.assert_array_equal(load("mnist", "test").labels, _tiny_idx(seed)["t10k-labels-idx1-ubyte"])
    (tmp_path / "data" / "mnist" / "train-images-idx3-ubyte").unlink()
    np.testing.assert_array_equal(load("mnist", "test").labels, _tiny_idx(2)["t10k-labels-idx1-ubyte"])


def test_default_cache_is_below_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder("mnist") == tmp_path / ".cache" / "ufm" / "mnist"


def _serve(tmp_path, monkeypatch, arrays):
    """Publish the arrays at a file address with their digests."""
    _write(tmp_path / "site", arrays, zipped=True)
    digests = {file: hashlib.sha256((tmp_path / "site" / f"{file}.gz").read_bytes()).hexdigest() for file in arrays}
    published = files.Published((tmp_path / "site").as_uri() + "/", digests)
    monkeypatch.setitem(files.PUBLISHED, "fashion-mnist", published)


def test_download_fills_the_cache_once(tmp_path, monkeypatch):
    arrays = _tiny_idx()
    _serve(tmp_path, monkeypatch, arrays)
    np.testing.assert_array_equal(load("fashion-mnist", "train").labels, arrays["train-labels-idx1-ubyte"])
    cached = sorted(path.name for path in (tmp_path / "cache" / "ufm" / "fashion-mnist").iterdir())
    assert cached == sorted(f"{file}.gz" for file in arrays)
    monkeypatch.setattr(files, "_fetch", lambda url, sha256: pytest.fail(f"{url} is cached"))
    assert len(load("fashion-mnist", "test").x) == 20


def test_interrupted_download_continues_with_what_is_missing(tmp_path, monkeypatch):
    arrays = _tiny_idx()
    _serve(tmp_path, monkeypatch, arrays)
    last = tmp_path / "site" / "t10k-labels-idx1-ubyte.gz"
    last.rename(tmp_path / "away")
    _refused("fashion-mnist", "train", match="could not be downloaded")
    assert len(list((tmp_path / "cache" / "ufm" / "fashion-mnist").iterdir())) == 3
    (tmp_path / "away").rename(last)
    (tmp_path / "site" / "train-images-idx3-ubyte.gz").unlink()
    assert len(load("fashion-mnist", "train").x) == 30


def test_download_with_another_digest_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    _serve(tmp_path, monkeypatch, _tiny_idx())
    (tmp_path / "site" / "train-images-idx3-ubyte.gz").write_bytes(b"<html>log in first</html>")
    _refused("fashion-mnist", "train", match="25 bytes have SHA-256 [0-9a-f]{64}, published is")
    assert not list((tmp_path / "cache").rglob("*"))


def test_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    _serve(tmp_path, monkeypatch, _tiny_idx())
    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("fashion-mnist", "train")
    assert not list((tmp_path / "cache" / "ufm" / "fashion-mnist").iterdir())


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_offline_error_names_the_folders_and_the_cure(name, tmp_path):
    message = _refused(name, "train", match=f"put the files in \\$UFM_DATA/{name}")
    assert str(tmp_path / "system" / name) in message


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_published_digests_are_four_distinct_sha256_of_the_idx_files(name):
    digests = files.PUBLISHED[name].sha256
    assert set(digests) == set(_tiny_idx())
    assert {len(bytes.fromhex(digest)) for digest in digests.values()} == {32}
    assert len(set(digests.values())) == 4


def test_unknown_names_and_splits_list_the_known():
    _refused("imagenet", "train", match="give one of digits, fashion-mnist, mnist, cifar10")
    _refused("digits", "valid", match="give one of train, test")


LABELS, IMAGES = "train-labels-idx1-ubyte", "train-images-idx3-ubyte"


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        (IMAGES, lambda data: data[:-1], "bytes, its header says 616"),
        (IMAGES, lambda data: data + b"0", "bytes, its header says 616"),
        (IMAGES, lambda data: data[:10], "has 10 bytes"),
        (IMAGES, lambda data: b"", "begins with the bytes"),
        (IMAGES, lambda data: data[:4] + b"\xff" * 12 + data[16:], "bytes, its header says"),
        (IMAGES, lambda data: _idx(np.zeros((0, 5, 4), np.uint8)), "is empty"),
        (IMAGES, lambda data: _idx(np.zeros((30, 20), np.uint8)), "begins with the bytes 00 00 08 02"),
        (IMAGES, lambda data: b"\x00\x00\x09\x03" + data[4:], "begins with the bytes 00 00 09 03"),
        (IMAGES, lambda data: _idx(np.full((30, 5, 4), 7, np.uint8)), "all training pixels"),
        (LABELS, lambda data: data[:-3], "has 35 bytes, its header says 38"),
        (LABELS, lambda data: data[:-1] + b"\x0a", "holds the label 10, not 0 to 9"),
        (LABELS, lambda data: _idx(np.zeros(29, np.uint8)), "holds 29 labels for the 30 images"),
    ],
)
def test_malformed_idx_files_are_refused(tiny, file, change, match):
    folder, _ = tiny
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    message = _refused("mnist", "train", match=match)
    assert "replace" in message
    assert str(folder / file) in message or match == "all training pixels"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda packed: packed[:-20],
        lambda packed: packed[:40] + bytes(20) + packed[60:],
        lambda packed: b"not gzip at all",
        lambda packed: packed[:-8] + bytes(8),
    ],
)
def test_corrupt_gzip_is_refused(tiny, spoil):
    folder, _ = tiny
    plain = folder / IMAGES
    (folder / f"{IMAGES}.gz").write_bytes(spoil(gzip.compress(plain.read_bytes())))
    plain.unlink()
    message = _refused("mnist", "test", match="cannot be read")
    assert f"{IMAGES}.gz" in message


def test_splits_of_different_sizes_are_refused(tiny):
    folder, _ = tiny
    (folder / "t10k-images-idx3-ubyte").write_bytes(_idx(np.zeros((20, 4, 5), np.uint8)))
    _refused("mnist", "test", match=r"training images have shape \(5, 4, 1\), test images \(4, 5, 1\)")


CIFAR = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


@pytest.fixture
def tiny_cifar(tmp_path, monkeypatch):
    """Ten images a file, each file holding every class: their folder and the records."""
    folder, rng = tmp_path / "data" / "cifar-10-batches-bin", np.random.default_rng(0)
    folder.mkdir(parents=True)
    monkeypatch.setenv("UFM_DATA", str(tmp_path / "data"))
    records = {}
    for file in CIFAR:
        pixels = rng.integers(0, 256, (10, 3, 32, 32), np.uint8) // np.array([1, 2, 4], np.uint8)[:, None, None]
        records[file] = (rng.permutation(10).astype(np.uint8), pixels)
        labels, pixels = records[file]
        image_bytes = (bytes([k]) + image.tobytes() for k, image in zip(labels, pixels, strict=True))
        (folder / file).write_bytes(b"".join(image_bytes))
    return folder, records


def test_cifar_is_standardised_channel_by_channel(tiny_cifar):
    _, records = tiny_cifar
    pixels = np.concatenate([records[file][1] for file in CIFAR[:5]]).astype(float)
    for split, chosen in (("train", CIFAR[:5]), ("test", CIFAR[5:])):
        images = load("cifar10", split)
        np.testing.assert_array_equal(images.labels, np.concatenate([records[file][0] for file in chosen]))
        for c in range(3):
            raw = np.concatenate([records[file][1][:, c] for file in chosen])
            expected = (raw - pixels[:, c].mean()) / pixels[:, c].std()
            np.testing.assert_allclose(images.x[..., c], expected, atol=FLOAT32_TOL)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data[:-1], "has 30729 bytes, no positive multiple of 3073"),
        (lambda data: b"", "has 0 bytes"),
        (lambda data: b"\xff" + data[1:], "holds the label 255"),
    ],
)
def test_malformed_cifar_files_are_refused(tiny_cifar, change, match):
    folder, _ = tiny_cifar
    (folder / CIFAR[3]).write_bytes(change((folder / CIFAR[3]).read_bytes()))
    assert str(folder / CIFAR[3]) in _refused("cifar10", "train", match=match)


def test_missing_cifar_file_names_the_cure(tiny_cifar):
    folder, _ = tiny_cifar
    (folder / CIFAR[5]).unlink()
    _refused("cifar10", "train", match="unpack cifar-10-binary.tar.gz")


def test_real_fashion_mnist_has_6000_training_and_1000_test_images_of_each_class(monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv("UFM_DATA", raising=False)
    if not (files.SYSTEM / "fashion-mnist").is_dir():
        pytest.skip("the package dataset-fashion-mnist is not installed")
    train, test = load("fashion-mnist", "train"), load("fashion-mnist", "test")
    assert isinstance(train, Images)
    assert list(np.bincount(train.labels)) == [6000] * 10
    assert list(np.bincount(test.labels)) == [1000] * 10
    assert train.x.shape[1:] == test.x.shape[1:] == (28, 28, 1)
    assert abs(train.x.mean(dtype=float)) < FLOAT32_TOL
    assert abs(train.x.std(dtype=float) - 1) < FLOAT32_TOL
