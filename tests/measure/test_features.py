"""Feature files: what is written is read back, and whatever is wrong with a file is said in one line."""

import io
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ufm.measure.features import Features, load_features, save_features

RNG = np.random.default_rng(0)
ARRAYS = {
    "H": RNG.normal(size=(4, 6)).astype(np.float32),
    "labels": np.arange(6) % 3,
    "W": RNG.normal(size=(3, 4)),
    "b": RNG.normal(size=3).astype(np.float16),
}
ROWS = {("features" if k == "H" else k): (np.ascontiguousarray(x.T) if k == "H" else x) for k, x in ARRAYS.items()}
WRITE = {".npz": lambda path, arrays: np.savez(path, **arrays), ".safetensors": lambda path, a: save_file(a, path)}
SUFFIXES = sorted(WRITE)


def written(folder, suffix, arrays):
    path = folder / f"run{suffix}"
    WRITE[suffix](path, arrays)
    return path


def assert_holds(got, arrays):
    for name, expected in arrays.items():
        array = getattr(got, name)
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def error_line(path):
    with pytest.raises(ValueError, match=path.name) as error:
        load_features(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("arrays", [ARRAYS, ROWS, ARRAYS | {"epoch": np.array(7)}], ids=["H", "features", "more"])
def test_columns_or_rows_of_either_format(tmp_path, suffix, arrays):
    assert_holds(load_features(written(tmp_path, suffix, arrays)), ARRAYS)
    assert_holds(load_features(str(tmp_path / f"run{suffix}")), ARRAYS)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_bias(tmp_path, suffix):
    arrays = {name: x for name, x in ARRAYS.items() if name != "b"}
    assert load_features(written(tmp_path, suffix, arrays)).b is None


def test_safetensors_in_bfloat16(tmp_path):
    H = np.asarray(jnp.asarray(ARRAYS["H"]).astype("bfloat16"))
    got = load_features(written(tmp_path, ".safetensors", ARRAYS | {"H": H}))
    np.testing.assert_array_equal(got.H.astype(np.float64), H.astype(np.float64))


@pytest.mark.parametrize("b", [ARRAYS["b"], None])
def test_saved_features_are_read_back(tmp_path, b):
    path = tmp_path / "run.npz"
    for offset in (0, 1):  # the second replaces the first
        features = Features(ARRAYS["H"] + offset, ARRAYS["labels"], jnp.asarray(ARRAYS["W"]), b)
        save_features(path, features)
        got = load_features(path)
        assert_holds(got, {"H": ARRAYS["H"] + offset, "labels": ARRAYS["labels"], "W": ARRAYS["W"]})
        assert (got.b is None) == (b is None)
    assert list(tmp_path.iterdir()) == [path]


def test_bfloat16_is_saved_exactly_as_float32(tmp_path):
    H = jnp.asarray(ARRAYS["H"]).astype("bfloat16")
    save_features(tmp_path / "run.npz", Features(H, ARRAYS["labels"], ARRAYS["W"], None))
    assert_holds(load_features(tmp_path / "run.npz"), {"H": np.asarray(H).astype(np.float32)})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_anywhere_is_refused(tmp_path, suffix):
    path = written(tmp_path, suffix, ARRAYS)
    whole = path.read_bytes()
    for size in [0, 1, 7, 8, 9, *range(30, len(whole), 61), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert "cannot be read" in error_line(path)


@pytest.mark.parametrize("compress", [np.savez, np.savez_compressed])
def test_an_npz_with_a_wrong_bit_in_its_numbers_is_refused(tmp_path, compress):
    path = tmp_path / "run.npz"
    compress(path, **ARRAYS)
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("H.npy")
    whole[info.header_offset + 50 + info.compress_size - 20] ^= 16
    path.write_bytes(whole)
    assert "cannot be read" in error_line(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"not features", b"\x80\x04N.", b"\xff" * 64])
def test_a_file_of_another_format_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"run{suffix}"
    path.write_bytes(content)
    assert "cannot be read" in error_line(path)


def test_an_array_in_a_file_that_says_npz_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, ARRAYS["H"])
    (tmp_path / "run.npz").write_bytes(buffer.getvalue())
    assert "not a zip file" in error_line(tmp_path / "run.npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_and_a_folder(tmp_path, suffix):
    assert "No such file" in error_line(tmp_path / f"run{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    assert "cannot be read" in error_line(tmp_path / f"folder{suffix}")


def test_an_unknown_suffix(tmp_path):
    assert "neither .npz nor .safetensors" in error_line(tmp_path / "run.pt")


def test_pickled_arrays_are_never_loaded(tmp_path):
    arrays = ARRAYS | {"labels": np.array(["cat", None, 3], dtype=object)}
    assert "allow_pickle" in error_line(written(tmp_path, ".npz", arrays))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_keys_are_named(tmp_path, suffix):
    without = lambda *names: {k: x for k, x in ARRAYS.items() if k not in names}  # noqa: E731
    assert "has no W, labels:" in error_line(written(tmp_path, suffix, without("W", "labels")))
    assert "has keys W, b, labels, but must have one of H" in error_line(written(tmp_path, suffix, without("H")))
    both = error_line(written(tmp_path, suffix, ARRAYS | {"features": ROWS["features"]}))
    assert "has keys H, W, b, features, labels, but must have one of" in both


def test_without_the_package_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    path = written(tmp_path, ".safetensors", ARRAYS)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "ufm[features]" in error_line(path)


@pytest.mark.parametrize("name", ["nowhere/run.npz", "file/run.npz", "run.npy", "folder.npz"])
def test_a_place_that_cannot_be_written(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(ValueError, match=name) as error:
        save_features(tmp_path / name, Features(**ARRAYS))
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.npz"}


def test_a_failed_save_leaves_the_old_file_whole(tmp_path):
    path = written(tmp_path, ".npz", ARRAYS)
    pickled = np.array([None] * 6, dtype=object)
    with pytest.raises(ValueError, match="cannot be written"):
        save_features(path, Features(ARRAYS["H"], pickled, ARRAYS["W"], None))
    assert_holds(load_features(path), ARRAYS)
    assert list(tmp_path.iterdir()) == [path]
