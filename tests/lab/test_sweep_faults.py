"""What a sweep refuses, and cells that fail: each with its message and status, the rest unaffected."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufm.lab.sweep import sweep
from ufm.theory.optimum import balanced_value

SMALL = {"K": 3, "n": 2, "d": 4, "lam_W": [1e-3, 1e-2], "lam_H": 1e-3}


def grow(p):
    return p.counts


BAD = {
    "an empty axis": ({"lam_W": []}, {}, "lam_W must be a value or a list of at least one"),
    "an axis with NaN": ({"lam_W": [0.1, np.nan]}, {}, "lam_W must be finite"),
    "an axis with an infinity": ({"lam_W": [0.1, np.inf]}, {}, "lam_W must be finite"),
    "a value twice": ({"lam_W": [0.1, 0.1]}, {}, "lam_W must not repeat"),
    "a tuple twice": ({"K": None, "counts": [(1, 2), (1, 2)]}, {}, "counts must not repeat"),
    "an axis of two dimensions": ({"lam_W": np.ones((2, 2))}, {}, "lam_W must be .* shape"),
    "lists in a list": ({"counts": [[1, 2], [1, 2, 3]]}, {}, "counts must .* tuples"),
    "no batch": ({}, {"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    "an unknown method": ({}, {"method": "fast"}, "method must be one of vmap, map, python, got 'fast'"),
    "padding without K": ({}, {"pad": True}, "pad=True needs an axis K"),
    "padding with K's that are no integers": ({"K": [2.0, 3.0]}, {"pad": True}, "K must be integers"),
    "counts beside K": ({"counts": (3, 3), "K": [2, 3]}, {}, "counts say what K and n are"),
    "values of two kinds": ({"K": [2, "3"]}, {}, "K must be (integers|values of one kind)"),
    "a λ below zero": ({"lam_b": [0.1, -1.0]}, {}, "lam_b must be zero or positive"),
    "nothing that varies": ({"lam_W": 0.1}, {}, "at least one axis"),
    "a setting that is missing": ({"n": None}, {}, "cell fails at every shape .* Type"),
    "a setting unknown": ({"lam": 0.1}, {}, "cell fails at every shape .* 'lam'"),
    "a dimension too small everywhere": ({"d": 1}, {}, "cell fails at every shape .* d must be at least K - 1"),
    "too few names of dimensions": ({}, {"describe": {"value": {"dims": ("k",)}}}, "describe must name 0 .* value"),
}


@pytest.mark.parametrize(("change", "options", "message"), BAD.values(), ids=BAD.keys())
def test_refuses_in_one_line(change, options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        sweep(balanced_value, SMALL | change, store=tmp_path / "new", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


CELLS = {
    "an output named as an axis": (lambda p: {"lam_W": p.s}, {}, "names, got lam_W twice"),
    "an output named status": (lambda p: {"status": p.s}, {}, "names, got status twice"),
    "an output with a path for a name": (lambda p: {"dL/dW": p.s}, {}, "names without /, got dL/dW"),
    "a dimension named as an axis": (grow, {"describe": {"value": {"dims": ("lam_W",)}}}, "names, got lam_W twice"),
    "a dimension of two lengths": (
        lambda p: (jnp.ones(2), jnp.ones(3)),
        {"describe": {"0": {"dims": ("k",)}, "1": {"dims": ("k",)}}},
        "names, got k twice",
    ),
    "nothing": (lambda p: None, {}, "cell must return a number"),
    "a key": (lambda p: jax.random.key(0), {}, "cell must return numbers"),
    "text": (lambda p: "value", {}, "cell fails at every shape .* TypeError"),
    "a cell that cannot be traced": (lambda p: 1.0 if p.s > 0 else 2.0, {}, "cell fails .* method='python'"),
}


@pytest.mark.parametrize(("cell", "options", "message"), CELLS.values(), ids=CELLS.keys())
def test_refuses_cells_that_return(cell, options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        sweep(cell, SMALL, store=tmp_path / "new", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("method", ["vmap", "python"])
@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (grow, r"value is float64\[2\] at .*2.*, else float64\[3\]"),
        (lambda p: {"a": p.s} if p.K == 3 else {"b": p.s}, "is missing at .*2.*, else float64"),
        (lambda p: p.s if p.K == 3 else p.s > 0, r"value is bool\[\] at .*2.*, else float64"),
    ],
)
def test_refuses_outputs_that_depend_on_the_place(cell, message, method):
    with pytest.raises(ValueError, match=message) as caught:
        sweep(cell, SMALL | {"K": [3, 2]}, method=method)
    assert "\n" not in str(caught.value)


def failures(ds):
    assert json.loads(ds.failed) == len(json.loads(ds.failures)) == int((ds.status > 1).sum())
    return json.loads(ds.failures)


def with_count(problem):
    return {"f": balanced_value(problem), "classes": jnp.asarray(problem.K)}


@pytest.mark.parametrize("method", [None, "map", "python"])
def test_shapes_that_raise_are_recorded_and_the_rest_goes_on(method):
    grid = SMALL | {"K": [9, 3, 2], "d": [1, 4]}  # the first shape of all raises
    ds = sweep(with_count, grid, method=method)
    raises = np.array([[d < K - 1 for d in grid["d"]] for K in grid["K"]])
    np.testing.assert_array_equal(ds.status, np.where(raises, 3, 1)[:, :, None] * np.ones(2))
    assert all(f["message"].startswith("ValueError: d must be at least K - 1") for f in failures(ds))
    places = {(f["K"], f["d"], f["lam_W"]) for f in failures(ds)}
    assert places == {(K, d, lam) for K in (9, 3, 2) for d in (1, 4) for lam in SMALL["lam_W"] if d < K - 1}
    assert ds.f.isnull().values[raises].all()
    assert (ds.classes.values[raises] == 0).all()
    for K in (3, 2):
        alone = sweep(with_count, grid | {"K": K, "d": 4}, method=method)
        np.testing.assert_array_equal(ds.sel(K=K, d=4).f, alone.f)
        assert (alone.classes == K).all()


def test_nan_is_recorded_and_the_rest_goes_on():
    def cell(p):
        f = balanced_value(p)
        return {
            "f": jnp.where(p.lam_W == 1e-3, jnp.nan, f),
            "pair": jnp.stack([f, jnp.where(p.lam_H > 0.5, jnp.nan, f)]),
        }

    ds = sweep(cell, SMALL | {"lam_H": [1e-3, 1.0]}, batch_size=3)
    assert ds.status.values.tolist() == [[2, 2], [1, 2]]
    assert [f["message"] for f in failures(ds)] == ["f is NaN", "pair is NaN", "pair is NaN"]


def run_time_error(p):
    def check(x):
        if x > 5e-3:
            raise RuntimeError(f"no number at {x:.3f}")
        return x

    return jax.pure_callback(check, jax.ShapeDtypeStruct((), p.lam_W.dtype), p.lam_W, vmap_method="sequential")


@pytest.mark.parametrize("method", [None, "vmap", "map", "python"])
@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (run_time_error, "no number at 0.010"),
        (lambda p: eqx.error_if(p.lam_W, p.lam_W > 5e-3, "no such λ"), "no such λ"),
    ],
)
def test_an_error_at_run_time_costs_its_cell_alone(cell, message, method):
    ds = sweep(cell, SMALL | {"lam_W": [1e-3, 1e-2, 2e-3]}, method=method)
    assert ds.status.values.tolist() == [1, 3, 1]
    np.testing.assert_array_equal(ds.value, [1e-3, np.nan, 2e-3])
    (failure,) = failures(ds)
    assert failure["lam_W"] == 1e-2
    assert message in failure["message"]
    assert "\n" not in failure["message"]


def test_where_nothing_can_be_measured_cells_go_one_by_one():
    ds = sweep(run_time_error, SMALL)
    assert json.loads(ds.seconds) == {}
    assert json.loads(ds.settings)["method"] == "map"


def test_many_failures_are_counted_and_the_first_named():
    ds = sweep(lambda p: jnp.where(p["x"] >= 0, jnp.nan, 0.0), {"x": np.arange(1500.0)}, make=dict, method="vmap")
    assert json.loads(ds.failed) == 1500
    assert len(json.loads(ds.failures)) == 1000
