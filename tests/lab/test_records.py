"""A run is a folder, whole or absent: strict JSON, plain arrays, one winner, nothing left behind."""

import dataclasses
import enum
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufm.lab import records
from ufm.lab.records import as_json, create_folder, provenance, read_json, write_arrays, write_json, write_run


@dataclasses.dataclass(frozen=True)
class Config:
    K: int = 3
    lam: float = float("inf")
    out: Path | None = None


class Colour(enum.Enum):
    RED = "red"


def _strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def _write(folder, summary=None, **rest):
    return write_run(folder, Config(), summary or {"x": 1.5}, start=time.perf_counter(), **rest)


def _everything_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_run_reads_back_as_it_was_written(tmp_path):
    W = np.arange(6.0).reshape(2, 3)
    summary = {"gap": jnp.asarray(1e-300), "nc": {"nan": float("nan"), "inf": -np.inf}, "counts": np.array([3, 1])}
    folder = write_run(tmp_path / "a" / "run", Config(), summary, {"W": W}, start=time.perf_counter())
    assert _everything_below(tmp_path) == ["a", "a/run", "a/run/arrays.npz", "a/run/config.json", "a/run/summary.json"]
    assert _strict((folder / "config.json").read_text("utf-8")) == {"K": 3, "lam": "inf", "out": None}
    found = _strict((folder / "summary.json").read_text("utf-8"))
    assert found["gap"] == 1e-300
    assert found["nc"] == {"nan": "nan", "inf": "-inf"}
    assert found["counts"] == [3, 1]
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["W"]
        np.testing.assert_array_equal(arrays["W"], W)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.int64(7), 7),
        (jnp.array([[1.0, jnp.nan]]), [[1.0, "nan"]]),
        ((1, None, "α"), [1, None, "α"]),
        ({1: {2: jnp.inf}}, {"1": {"2": "inf"}}),
        (Path("a/b"), "a/b"),
        (Colour.RED, "Colour.RED"),
        (2**70, 2**70),
        (5e-324, 5e-324),
    ],
)
def test_values_become_strict_json_without_loss(value, expected):
    assert _strict(json.dumps(as_json(value), allow_nan=False)) == expected


def test_json_that_no_other_reader_would_take_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"value": float("nan")})
    assert _everything_below(tmp_path) == []


@pytest.mark.parametrize("write", [_write, create_folder])
def test_a_run_is_never_overwritten(tmp_path, write):
    (tmp_path / "run").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("run", "file"):
        with pytest.raises(ValueError, match=f"folder .*{name} exists already.*name another"):
            write(tmp_path / name)
    assert _everything_below(tmp_path) == ["file", "run"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("write", [_write, create_folder])
@pytest.mark.parametrize("name", ["file/run", "file/deep/run", "x" * 300, "/proc/run"])
def test_a_folder_that_cannot_be_made_is_one_line_and_leaves_nothing(tmp_path, write, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"folder .* cannot be made .*: name a writable one") as error:
        write(tmp_path / name)
    assert "\n" not in str(error.value)
    assert ".part" not in str(error.value)
    assert _everything_below(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", ["write_json", "write_arrays", "provenance"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), TypeError("bug")])
def test_whatever_fails_on_the_way_leaves_nothing_behind(tmp_path, monkeypatch, failing, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr(records, failing, fail)
    with pytest.raises((ValueError, KeyboardInterrupt, TypeError)) as error:
        _write(tmp_path / "run", arrays={"W": np.ones(2)})
    assert isinstance(error.value, ValueError) == isinstance(failure, OSError)
    assert _everything_below(tmp_path) == []


def test_a_name_taken_meanwhile_is_refused_and_what_took_it_stays(tmp_path, monkeypatch):
    def take(*_):
        create_folder(tmp_path / "run")
        (tmp_path / "run" / "theirs").write_text("x")
        return {}

    monkeypatch.setattr(records, "provenance", take)
    with pytest.raises(ValueError, match=r"folder .*run exists already"):
        _write(tmp_path / "run")
    assert _everything_below(tmp_path) == ["run", "run/theirs"]


@pytest.mark.parametrize("write", [_write, create_folder])
def test_of_many_that_want_one_name_at_once_one_gets_it(tmp_path, write):
    barrier, outcomes = threading.Barrier(8), []

    def race():
        barrier.wait()
        try:
            outcomes.append(write(tmp_path / "run"))
        except ValueError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(outcome, Path) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, str) and "\n" not in outcome for outcome in outcomes) == 7
    assert {path.parts[0] for path in map(Path, _everything_below(tmp_path))} == {"run"}


@pytest.mark.parametrize(("write", "old", "new"), [(write_json, [1], [2]), (write_arrays, {"x": [1]}, {"x": [2]})])
@pytest.mark.parametrize("at", ["write_bytes", "replace"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_cut_short_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, write, old, new, at, failure):
    path = tmp_path / "file"
    write(path, old)
    before = path.read_bytes()

    def fail(self, *_):
        self.touch()
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(Path, at, fail)
        with pytest.raises((ValueError, KeyboardInterrupt)) as error:
            write(path, new)
    if isinstance(failure, OSError):
        assert str(error.value) == f"{path} cannot be written (No space left on device): name a writable folder"
    assert path.read_bytes() == before
    assert _everything_below(tmp_path) == ["file"]
    write(path, new)
    assert path.read_bytes() != before


def test_a_file_below_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"cannot be written \(Not a directory\)"):
        write_json(tmp_path / "file" / "x.json", [1])


def test_arrays_that_would_need_pickling_are_refused(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle"):
        write_arrays(tmp_path / "x.npz", {"x": np.array([{}], object)})
    assert _everything_below(tmp_path) == []


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"\xff\xfe", b"\x00" * 10])
def test_json_that_is_missing_or_damaged_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json cannot be read as JSON: is .* the folder of a run\?") as error:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(error.value)


def test_json_is_utf8_whatever_the_locale(tmp_path):
    script = r"from ufm.lab.records import *; p = Path('x'); write_json(p, ['\u03bb']); print(ascii(read_json(p)))"
    ascii_only = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=ascii_only, capture_output=True, text=True)
    assert run.stdout.strip() == r"['\u03bb']", run.stderr


def test_provenance_says_what_made_the_record_and_not_where():
    start = time.perf_counter()
    found = provenance(start - 10)
    assert found["versions"].keys() >= {"ufm", "jax", "jaxlib", "numpy", "python"}
    assert found["versions"]["jax"] == jax.__version__
    assert found["device"].startswith(jax.devices()[0].platform)
    assert f"{os.cpu_count()} cores" in found["machine"]
    assert 10 <= found["wall_seconds"] < 10 + time.perf_counter() - start
    text = json.dumps(found)
    for folder in {str(Path.cwd()), str(Path.home()), str(Path(records.__file__).parent), "/tmp"} - {"/"}:
        assert folder not in text


def _commit(folder):
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True, env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull})
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def test_the_revision_is_that_of_the_source_with_a_plus_if_it_was_changed(tmp_path, monkeypatch):
    source = tmp_path / "records.py"
    source.write_text("x = 1\n")
    head = _commit(tmp_path)
    monkeypatch.setattr(records, "__file__", str(source))
    assert provenance(0.0)["revision"] == head[:12]
    source.write_text("x = 2\n")
    assert provenance(0.0)["revision"] == f"{head[:12]}+"


def test_a_copy_installed_inside_somebody_elses_checkout_has_no_revision(tmp_path, monkeypatch):
    (tmp_path / ".gitignore").write_text(".venv\n")
    _commit(tmp_path)
    (tmp_path / ".venv").mkdir()
    installed = tmp_path / ".venv" / "records.py"
    installed.write_text("")
    monkeypatch.setattr(records, "__file__", str(installed))
    assert provenance(0.0)["revision"] is None


def test_outside_a_checkout_or_without_git_there_is_no_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance(0.0)["revision"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance(0.0)["revision"] is None
