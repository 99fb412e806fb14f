"""`ufm sweep`: a phase diagram with its figure, resumed, refused, and computed by a scheduler's workers."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray

from ufm.cli import cache
from ufm.lab import presets

pytestmark = pytest.mark.usefixtures("hastily")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Four classes at most, so that a picture takes a second."""
    preset = presets.PRESETS["conditioning"]
    grid = lambda points: preset.grid(points) | {"K": [2, 4], "d": 4}  # noqa: E731
    monkeypatch.setitem(presets.PRESETS, "conditioning", dataclasses.replace(preset, grid=grid))


def test_a_picture_with_its_folder_and_where_compiled_programs_lie(ufm):
    status, said, complaint = ufm("sweep", "conditioning", "--points", 5, "--out", "new")
    assert (status, complaint) == (0, "")
    assert "10 cells by " in said
    assert "0 failed" in said
    assert "new/conditioning.png" in said
    assert "compiled programs: " in said
    found = xarray.open_zarr("new/grid.zarr", consolidated=False)
    assert found.condition_number.shape == (2, 5)
    assert found["load"].attrs["long_name"].startswith("K√(nλ_Wλ_H)")
    assert json.loads(found.attrs["settings"])["precision"] == "float64"


def test_a_second_run_finds_all_done_and_draws_again(ufm, tmp_path):
    ufm("sweep", "conditioning", "--points", 5, "--out", "new")
    figure = tmp_path / "work" / "new" / "conditioning.png"
    figure.unlink()
    before = (tmp_path / "work" / "new" / "summary.json").read_text()
    status, said, _ = ufm("sweep", "conditioning", "--points", 5, "--out", "new", "--json")
    assert status == 0
    assert json.loads(said)["cells"] == 10
    assert figure.exists()
    assert (tmp_path / "work" / "new" / "summary.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("conditioning", "--points", 0), "points must be a positive integer, got 0"),
        (("conditioning", "--batch", -1), "batch must be a positive integer, got -1"),
        (("conditioning", "--devices", 0), "devices must be a positive integer, got 0"),
        (("nothing",), "invalid choice 'nothing'"),
        (("conditioning", "--out", "taken"), "taken"),
    ],
)
def test_bad_input_is_one_line(ufm, tmp_path, arguments, says):
    (tmp_path / "work" / "taken").mkdir()
    (tmp_path / "work" / "taken" / "file").touch()
    status, said, complaint = ufm("sweep", *arguments)
    assert (status, said) == (2, "")
    assert says in complaint
    assert complaint.count("\n") == 1


def test_another_sweep_in_the_folder_is_refused(ufm):
    ufm("sweep", "conditioning", "--points", 5, "--out", "new")
    status, _, complaint = ufm("sweep", "conditioning", "--points", 6, "--out", "new")
    assert status == 2
    assert "grid" in complaint


def test_open_shows_the_figure(ufm, monkeypatch):
    shown = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    ufm("sweep", "conditioning", "--points", 3, "--out", "new", "--open")
    assert [address.rsplit("/", 2)[1:] for address in shown] == [["new", "conditioning.png"]]


def test_the_cache_is_the_users_unless_the_environment_names_one(monkeypatch, tmp_path):
    kept = {"jax_compilation_cache_dir": None}
    monkeypatch.setattr(cache, "jax", SimpleNamespace(config=SimpleNamespace(values=kept, update=kept.__setitem__)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Path(cache.use_cache()).parent == tmp_path / "ufm"
    kept["jax_compilation_cache_dir"] = "elsewhere"
    assert cache.use_cache() == "elsewhere"


def test_no_cache_where_no_folder_can_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    kept = {"jax_compilation_cache_dir": None}
    monkeypatch.setattr(cache, "jax", SimpleNamespace(config=SimpleNamespace(values=kept, update=kept.__setitem__)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache.use_cache() is None


def test_numbers_are_those_of_the_closed_form(ufm):
    from ufm.model.problem import class_mean_problem
    from ufm.theory.spectrum import hessian_spectrum

    ufm("sweep", "conditioning", "--points", 3, "--out", "new")
    found = xarray.open_zarr("new/grid.zarr", consolidated=False)
    for K in (2, 4):
        for load in found["load"].values:
            s = load / (K * 10)
            problem = class_mean_problem([100] * K, 4, lam_W=s, lam_H=s, lam_b=1e-2)
            expected = hessian_spectrum(problem).condition_number
            np.testing.assert_allclose(found.condition_number.sel(K=K, load=load), expected, rtol=1e-10)
