"""What a store keeps, computes again and refuses; attacks by the system are in test_store_attacked.py."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray

from ufm.lab.records import read_json
from ufm.lab.sweep import sweep

GRID = {"x": (np.arange(30) / 30).tolist(), "kind": ["a", "bc"]}
BATCH = 4
evaluated: list[float] = []
control = {"stop": float("inf")}


def cell(settings):
    """Numbers, an array, a NaN and an error; its place in `evaluated`; an interruption where control says."""
    x, kind = settings["x"], settings["kind"]
    if len(evaluated) >= control["stop"]:
        raise KeyboardInterrupt
    evaluated.append(x)
    if x == 0.5:
        raise ArithmeticError(f"no {kind} at one half")
    return {"square": x**2 if x != 0.1 else np.nan, "pair": np.array([x, len(kind)]), "long": x > 0.3}


def other_cell(settings):
    return cell(settings)


def run(folder, *, swept=cell, grid=GRID, make=dict, method="python", batch_size=BATCH, **options):
    return sweep(swept, grid, make=make, method=method, batch_size=batch_size, store=folder, **options)


def files(folder):
    """The content of every file but summaries and what a killed writer left unfinished beside them."""
    found = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != "summary.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if p.suffix not in (".part", ".partial")}


def marks(folder):
    return len(list(folder.glob("done/*.json")))


@pytest.fixture
def again(monkeypatch):
    """Count evaluations from zero, and perhaps stop."""

    def start(stop=float("inf")):
        evaluated.clear()
        monkeypatch.setitem(control, "stop", stop)

    start()
    return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run's folder; copied, never changed."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    run(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_a_store_holds_what_a_sweep_without_one_returns(whole):
    kept, plain = xarray.open_zarr(whole / "grid.zarr", chunks=None, consolidated=False).load(), run(None)
    xarray.testing.assert_equal(kept, plain)
    xarray.testing.assert_equal(run(whole).load(), plain)
    assert kept.x.values.tolist() == GRID["x"]
    assert kept.sel(kind="bc", x=0.2).pair.values.tolist() == [0.2, 2.0]
    assert int((kept.status == 3).sum()) == int((kept.status == 2).sum()) == 2
    for name in kept.variables:
        assert {k: v for k, v in kept[name].attrs.items() if k != "_FillValue"} == plain[name].attrs
    assert json.loads(kept.settings) == read_json(whole / "config.json") == json.loads(plain.settings)


def test_a_store_tells_what_went_wrong_and_what_made_it(whole):
    ds, summary = run(whole), read_json(whole / "summary.json")
    assert summary["cells"] == summary["computed"] == 60
    assert summary["failed"] == 4 == len(summary["failures"])
    assert json.loads(ds.failures) == summary["failures"]
    assert {"x": 0.5, "kind": "bc", "message": "ArithmeticError: no bc at one half"} in summary["failures"]
    assert {"x": 0.1, "kind": "a", "message": "square is NaN"} in summary["failures"]
    assert {"versions", "device", "revision", "wall_seconds"} <= summary.keys()


def test_a_finished_store_computes_nothing(whole, again):
    ds = run(whole)
    assert not evaluated
    assert json.loads(ds.computed) == 0


def test_going_on_computes_only_what_is_missing(tmp_path, whole, again):
    again(stop=4 * BATCH + 2)  # in the fifth block, the first cell being tried once to see what it returns
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "store")
    partial = xarray.open_zarr(tmp_path / "store" / "grid.zarr", chunks=None, consolidated=False)
    assert int((partial.status > 0).sum()) == 4 * BATCH == BATCH * marks(tmp_path / "store")
    again()
    ds = run(tmp_path / "store")
    assert len(evaluated) == json.loads(ds.computed) == 60 - 4 * BATCH
    assert files(tmp_path / "store") == files(whole)


def test_a_summary_that_a_kill_prevented_is_made_up_for(copy):
    (copy / "summary.json").unlink()
    run(copy)
    assert read_json(copy / "summary.json")["failed"] == 4


def change(name):
    def damage(folder):
        path = folder / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def garble_message(folder):
    mark = folder / "done" / "3-0.json"
    mark.write_text(mark.read_text().replace("one half", "one third"))


def borrow_mark(folder):
    shutil.copy(folder / "done" / "4-0.json", folder / "done" / "3-0.json")


CHUNK, MARK = "grid.zarr/square/c/3/0", "done/3-0.json"
DAMAGE = {
    "a bit of a chunk": change(CHUNK),
    "a bit of an array's chunk": change("grid.zarr/pair/c/3/0/0"),
    "a bit of the status": change("grid.zarr/status/c/3/0"),
    "half a chunk": lambda folder: os.truncate(folder / CHUNK, 10),
    "an empty chunk": write(CHUNK, b""),
    "no chunk": lambda folder: (folder / CHUNK).unlink(),
    "no chunks of an output": lambda folder: (folder / "grid.zarr/long/c/3/0").unlink(),
    "no mark": lambda folder: (folder / MARK).unlink(),
    "an empty mark": write(MARK, b""),
    "half a mark": lambda folder: os.truncate(folder / MARK, 30),
    "bytes": write(MARK, b"\xff\x00"),
    "a list": write(MARK, b"[]"),
    "a null": write(MARK, b"null"),
    "a mark without a digest": write(MARK, b'{"failures": {}}'),
    "a message": garble_message,
    "the mark of another block": borrow_mark,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found_and_that_block_computed_again(damage, copy, whole, again):
    damage(copy)
    assert files(copy) != files(whole)
    run(copy)
    assert len(evaluated) == BATCH
    assert 0.5 in evaluated
    assert files(copy) == files(whole)


@pytest.mark.parametrize("name", ["zarr.json", "square/zarr.json"])
@pytest.mark.parametrize("content", [b"{", None])
def test_damaged_metadata_are_told_in_a_line(copy, name, content):
    path = copy / "grid.zarr" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"grid\.zarr .* new folder") as caught:
        run(copy)
    assert "\n" not in str(caught.value)


OTHERS = {
    "grid": {"grid": GRID | {"x": [*GRID["x"][:-1], 0.99]}},
    "grid, more": {"grid": GRID | {"more": [1, 2]}},
    "fixed": {"grid": GRID | {"more": 1}},
    "cell": {"swept": other_cell},
    "make": {"make": lambda **settings: settings},
    "block": {"batch_size": 5},
}


@pytest.mark.parametrize(("what", "options"), [(name.split(",")[0], x) for name, x in OTHERS.items()], ids=OTHERS)
def test_other_settings_are_refused_by_name(what, options, copy, whole, again):
    with pytest.raises(ValueError, match=rf"another ([a-z]+, )*{what}[,;].* new folder") as caught:
        run(copy, **options)
    assert "\n" not in str(caught.value)
    assert not evaluated
    assert files(copy) == files(whole)


def test_another_precision_is_refused(copy):
    with jax.enable_x64(False), pytest.raises(ValueError, match="another precision;"):
        run(copy)


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"cell": "f"}'])
def test_a_folder_that_is_no_sweep_is_refused(tmp_path, content):
    (tmp_path / "something").mkdir()
    (tmp_path / "something" / "config.json").write_text(content)
    with pytest.raises(ValueError, match="something") as caught:
        run(tmp_path / "something")
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_taken(tmp_path, whole):
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty")
    assert files(tmp_path / "empty") == files(whole)


def test_labels_are_right_where_their_file_is_lost(copy, whole):
    shutil.rmtree(copy / "grid.zarr" / "x" / "c")
    np.testing.assert_array_equal(run(copy).x, GRID["x"])


def test_home_is_understood(tmp_path, monkeypatch, whole):
    monkeypatch.setenv("HOME", str(tmp_path))
    run("~/below")
    assert files(tmp_path / "below") == files(whole)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file"):
        run(tmp_path / "file")
    with pytest.raises(ValueError, match=r"file.* cannot be made \(Not a directory\)"):
        run(tmp_path / "file" / "below")


def classes(problem):
    return {"K": problem.classes, "s": problem.s}["s"] * problem.classes


def test_padded_and_compiled_sweeps_go_on_by_the_method_they_were_made_with(tmp_path):
    grid = {"K": [2, 3, 5], "n": 2, "d": 5, "lam_W": [0.1, 0.2], "lam_H": 0.1}
    made = sweep(classes, grid, pad=True, store=tmp_path / "store", batch_size=2).load()
    before = files(tmp_path / "store")
    next(iter((tmp_path / "store" / "done").iterdir())).unlink()
    resumed = sweep(classes, grid, pad=True, store=tmp_path / "store", batch_size=2)
    assert json.loads(resumed.computed) == 2
    assert resumed.settings == made.settings
    assert files(tmp_path / "store") == before
    xarray.testing.assert_equal(resumed.load(), made)
    np.testing.assert_allclose(made.value, np.outer([2, 3, 5], np.sqrt([0.01, 0.02])), rtol=1e-15)
    with pytest.raises(ValueError, match="another cell, fixed;"):
        sweep(classes, grid, store=tmp_path / "store", batch_size=2)
    other = {"vmap": "map", "map": "vmap"}[json.loads(made.settings)["method"]]
    with pytest.raises(ValueError, match="another method;"):
        sweep(classes, grid, pad=True, store=tmp_path / "store", batch_size=2, method=other)
