"""A sweep against a plain Python loop over its cells; programs, methods, and what it records."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufm.lab.optimum import global_minimiser
from ufm.lab.program import Program
from ufm.lab.sweep import sweep
from ufm.model.problem import class_mean_problem, init, objective
from ufm.numerics.minimise import minimise
from ufm.theory.certificate import certify
from ufm.theory.optimum import balanced_value, collapse_threshold

TOL = 1e-12  # of the larger of 1 and the number itself
EPS32 = float(np.finfo(np.float32).eps)
LAMS = {"lam_W": [1e-4, 1e-2], "lam_H": [1e-5, 3e-2, 1.0]}
SMALL = {"K": 3, "n": 2, "d": 4, "lam_W": [1e-3, 1e-2], "lam_H": 1e-3}


def certified(problem):
    """Nested, with an integer, a boolean, and arrays of one and two dimensions."""
    x = global_minimiser(problem)
    c = certify(problem, x)
    norms = jnp.stack([jnp.sum(x.W**2), jnp.sum(x.H**2), jnp.sum(x.b**2)])
    return {
        "value": balanced_value(problem),
        "certificate": {"gap": c.gap, "code": c.code},
        "collapsed": problem.s > collapse_threshold(problem),
        "norms": norms,
        "products": jnp.outer(norms, norms),
    }


def solved(problem, key):
    start = init(problem, key)
    end = minimise(functools.partial(objective, problem), start, tol=1e-9)
    return {"start": objective(problem, start), "end": end.value, "converged": end.converged}


def at_a_point(problem):
    x = init(problem, jax.random.key(0))
    return objective(problem, x), jax.grad(objective, argnums=1)(problem, x).b[-1]


def mixed(settings, key=None):
    sign = {"plus": 1.0, "minus": -1.0}[settings["sign"]]
    draw = 0.0 if key is None else jax.random.normal(key)
    return sign * settings["x"] ** 2 + settings["power"] + sum(settings["parts"]) + draw


def problem(*, d, K=None, n=None, counts=None, **rest):
    return class_mean_problem([n] * K if counts is None else counts, d, **rest)


def points(grid):
    """Every place of the grid and its settings."""
    grid = {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in grid.items()}
    axes = {name: x for name, x in grid.items() if isinstance(x, list | range)}
    for place in itertools.product(*(range(len(x)) for x in axes.values())):
        yield place, dict(grid) | {name: x[i] for (name, x), i in zip(axes.items(), place, strict=True)}


def named(result):
    parts = jax.tree.leaves_with_path(result)
    return {".".join(str(getattr(p, "key", getattr(p, "idx", p))) for p in path) or "value": x for path, x in parts}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def compiled(cell, make, static, leaves, key):
    return cell(make(**dict(static), **leaves), *key)


def alone(cell, make, settings):
    """What the cell returns there, one program a shape."""
    key = (jax.random.key(settings.pop("seed")),) if "seed" in settings else ()
    leaves = {name: x for name, x in settings.items() if isinstance(x, float)}
    return compiled(cell, make, tuple((name, x) for name, x in settings.items() if name not in leaves), leaves, key)


def assert_is_loop(ds, cell, grid, make=problem, tol=TOL):
    """Every output at every point is what the cell returns when called there alone."""
    for place, settings in points(grid):
        expected = named(alone(cell, make, settings))
        assert ds.data_vars.keys() == expected.keys() | {"status"}
        for name, x in expected.items():
            got = ds[name].values[place]
            assert got.dtype == x.dtype
            np.testing.assert_allclose(got, x, rtol=0, atol=tol * max(1, np.max(np.abs(x))), err_msg=f"{name} {place}")
    assert (ds.status == 1).all()
    assert json.loads(ds.failed) == 0
    assert json.loads(ds.failures) == []


@pytest.mark.parametrize(
    ("cell", "grid", "options"),
    [
        (balanced_value, {"K": [2, 4], "n": np.array([9]), "d": range(3, 5), **LAMS}, {"method": "vmap"}),
        (
            solved,
            {"seed": [0, 7, 2**31], "K": 3, "n": 2, "d": 3, "lam_W": [1e-3, 1e-2], "lam_H": 1e-2},
            {"method": "map"},
        ),
        (at_a_point, {"counts": [(2, 2), (1, 2, 4)], "d": 2, **LAMS}, {"method": "map"}),
        (at_a_point, {"counts": (1, 4), "d": 2, "use_bias": [False], "lam_W": 0.1, "lam_H": 0.1}, {"method": "python"}),
        (balanced_value, {"K": [3, 2], "n": 2, "d": 4, "lam_W": 1e-3, "lam_H": 1e-3}, {}),  # no leaf
    ],
)
def test_numbers_are_those_of_a_plain_loop(cell, grid, options, hastily):
    assert_is_loop(sweep(cell, grid, batch_size=4, **options), cell, grid)


@pytest.mark.parametrize("method", ["vmap", "map", "python"])
def test_settings_of_every_kind_reach_the_cell(method):
    grid = {"x": np.linspace(-1, 1, 5), "sign": ["plus", "minus"], "power": 3, "parts": [(1,), (2, 3)], "seed": 5}
    assert_is_loop(sweep(mixed, grid, make=dict, method=method, batch_size=3), mixed, grid, dict)
    del grid["seed"]
    grid |= {"parts": (4,), "power": 1}
    assert_is_loop(sweep(mixed, grid, make=dict, method=method), mixed, grid, dict)


def test_methods_agree():
    found = [sweep(balanced_value, SMALL | LAMS, method=method).value for method in ("vmap", "map", "python")]
    np.testing.assert_allclose(found[1], found[0], rtol=TOL)
    np.testing.assert_allclose(found[2], found[0], rtol=TOL)


def test_in_single_precision_where_jax_is():
    with jax.enable_x64(False):
        ds = sweep(balanced_value, SMALL | LAMS)
        assert_is_loop(ds, balanced_value, SMALL | LAMS, tol=16 * EPS32)
    assert ds.value.dtype == np.float32
    assert ds.lam_H.dtype == np.float64
    assert json.loads(ds.settings)["precision"] == "float32"


@pytest.mark.parametrize("method", ["vmap", "python"])
def test_axes_in_single_precision_give_cells_in_double(method):
    axis = np.array([1e-3, 1e-2], np.float32)
    grid = SMALL | {"lam_W": axis}
    ds = sweep(lambda p: p.lam_W, grid, method=method)
    assert ds.value.dtype == np.float64
    np.testing.assert_array_equal(ds.value, axis)
    np.testing.assert_array_equal(ds.lam_W, axis)


@dataclasses.dataclass
class Times:
    """Callable, not hashable, and it can change."""

    factor: float

    def __call__(self, problem):
        return self.factor * problem.s


factor = 1.0


def times_a_global(problem):
    return factor * problem.s


def test_no_program_outlives_what_it_was_made_of(monkeypatch):
    """Compiled programs are shared by sweeps of the same cell, but not of another that looks the same."""
    once = sweep(times_a_global, SMALL).value
    monkeypatch.setitem(globals(), "factor", 4.0)
    np.testing.assert_array_equal(sweep(times_a_global, SMALL).value, 4 * once)
    changing = Times(1.0)
    for k in (2.0, 4.0):  # exact
        changing.factor = k
        np.testing.assert_array_equal(sweep(changing, SMALL).value, k * once)
        np.testing.assert_array_equal(sweep(lambda p: k * p.s, SMALL).value, k * once)  # noqa: B023
        np.testing.assert_array_equal(sweep(functools.partial(Times.__call__, Times(k)), SMALL).value, k * once)


def test_what_a_cell_calls_may_change_between_sweeps():
    helper = lambda x: x  # noqa: E731
    cell = lambda p: helper(p.lam_W)  # noqa: E731
    once = sweep(cell, SMALL).value
    helper = lambda x: 100 * x  # noqa: E731
    np.testing.assert_array_equal(sweep(cell, SMALL).value, 100 * once)


def test_complex_numbers():
    ds = sweep(lambda p: jnp.where(p.lam_W > 5e-3, jnp.nan, 1j * p.lam_W), SMALL)
    assert ds.value[0] == 1e-3j
    assert ds.status.values.tolist() == [1, 2]


@pytest.fixture
def compilations(monkeypatch):
    """Names of the methods for which a program was made."""
    made = []

    class Counted(Program):
        def __init__(self, recipe, *arguments):
            made.append(recipe.method)
            super().__init__(recipe, *arguments)

    monkeypatch.setattr("ufm.lab.program.Program", Counted)
    return made


def test_padding_changes_no_number_and_takes_one_program(compilations, hastily):
    """Both are what each unpadded problem gives alone."""
    grid = {"K": [2, 4], "n": 3, "d": [4], **LAMS, "lam_b": [0.0, 1e-2]}
    together = sweep(certified, grid, pad=True, method="map", batch_size=5)
    assert compilations == ["map"]
    apart = sweep(certified, grid, method="map", batch_size=5)
    assert compilations == ["map"] * 3
    for name, x in apart.items():
        np.testing.assert_allclose(together[name], x, rtol=0, atol=TOL * max(1, abs(x).max()))
    assert_is_loop(apart.sel(K=[4]), certified, grid | {"K": [4]})


def test_blocks_of_one_shape_share_a_program(compilations):
    cell = functools.partial(balanced_value)  # of its own programs
    sweep(cell, SMALL | {"K": [2, 3], "lam_W": list(np.geomspace(1e-4, 1, 17))}, method="vmap", batch_size=4)
    assert compilations == ["vmap"] * 2


def test_the_faster_method_is_taken_and_told(compilations):
    ds = sweep(functools.partial(balanced_value), SMALL)
    seconds = json.loads(ds.seconds)
    assert compilations == ["vmap", "map"]
    assert seconds.keys() == {"vmap", "map"}
    assert min(seconds.values()) > 0
    assert json.loads(ds.settings)["method"] == min(seconds, key=seconds.get)


def test_measured_cost_decides():
    """A loop that one cell of a hundred runs long costs a vmap all of them; an operation a cell costs a map a step."""

    def loops(p):
        steps = jnp.where(p["x"] == 0, 200, 1)
        return jax.lax.fori_loop(0, steps, lambda _, x: jnp.tanh(x @ x), jnp.eye(40))

    many = np.arange(20_000.0)
    assert json.loads(sweep(loops, {"x": np.arange(100.0)}, make=dict).settings)["method"] == "map"
    found = sweep(lambda p: jnp.tanh(p["x"]), {"x": many}, make=dict, batch_size=many.size)
    assert json.loads(found.settings)["method"] == "vmap"


def test_no_batched_lapack_on_a_cpu():
    """Where jaxlib's batched calls can wait for one another for ever."""
    ds = sweep(lambda p: jnp.linalg.eigvalsh(jnp.eye(3) * p.lam_W)[0], SMALL)
    assert json.loads(ds.settings)["method"] == "map"
    assert json.loads(ds.seconds).keys() == {"map"}
    np.testing.assert_allclose(ds.value, SMALL["lam_W"], rtol=TOL)


def test_coordinates_attributes_and_provenance():
    grid = {"counts": [(1, 2), (2, 2, 2)], "d": 3, "lam_W": 0.1, "lam_H": [0.1, 0.2], "use_bias": [False, True]}
    about = {
        "f": {"units": "nats", "dims": ("point", "twice")},
        "lam_H": {"long_name": "penalty"},
        "g.h": {"long_name": "square"},
    }
    ds = sweep(lambda p: {"f": jnp.ones((2, 3)) * p.s, "g": {"h": p.s**2}}, grid, describe=about, method="vmap")
    assert ds.f.dims == ("counts", "lam_H", "use_bias", "point", "twice")
    assert ds["g.h"].dims == ds.status.dims == ("counts", "lam_H", "use_bias")
    assert ds.counts.values.tolist() == ["(1, 2)", "(2, 2, 2)"]
    assert ds.lam_H.values.tolist() == [0.1, 0.2]
    assert ds.use_bias.values.tolist() == [False, True]
    assert ds.sel(counts="(1, 2)", lam_H=0.2, use_bias=True).f.shape == (2, 3)
    assert ds.f.attrs == {"units": "nats"}
    assert ds["g.h"].attrs == {"long_name": "square"}
    assert ds.lam_H.attrs == {"long_name": "penalty"}
    assert ds.counts.attrs["long_name"]
    assert ds.status.attrs["flag_meanings"].split() == ["missing", "done", "nan", "raised"]
    attributes = {name: json.loads(x) for name, x in ds.attrs.items()}
    axes = {"counts": [[1, 2], [2, 2, 2]], "lam_H": [0.1, 0.2], "use_bias": [False, True]}
    assert attributes["settings"]["grid"] == axes
    assert attributes["settings"]["fixed"] == {"d": 3, "lam_W": 0.1}
    assert attributes["settings"]["outputs"] == {"f": ["float64", [2, 3]], "g.h": ["float64", []]}
    assert attributes["cells"] == attributes["computed"] == 8
    assert attributes["wall_seconds"] > 0
    assert {"jax", "ufm"} <= attributes["versions"].keys()
    assert {"device", "revision"} <= attributes.keys()


@pytest.mark.parametrize("progress", [True, False])
def test_progress_only_on_a_terminal(capsys, monkeypatch, progress):
    monkeypatch.setattr("sys.stderr.isatty", lambda: progress, raising=False)
    sweep(balanced_value, SMALL, method="vmap")
    shown = capsys.readouterr().err
    assert ("2/2" in shown) == progress
    assert progress or not shown
