"""Chunks against one go to the last bit, interrupted and resumed, and files that are not theirs."""

import functools
import io
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from ufm.lab.chunks import descend_in_chunks
from ufm.lab.identity import without_addresses
from ufm.model.problem import balanced, init, objective
from ufm.numerics.dynamics import Fate, descend

PROBLEM = balanced(3, 2, 3, lam_W=2e-2, lam_H=1e-2)
START = init(PROBLEM, jax.random.key(0))
UFM = Partial(objective, PROBLEM)
ADAM = optax.adam(0.1)
KEY = jax.random.key(3)


def noisy(x, key):
    return objective(PROBLEM, x) + jnp.sum(jax.random.normal(key, x.b.shape) * x.b)


def watch(x):
    return {"W": x.W, "count": jnp.sum(x.H > 0)}


def keep(observed):
    return {"norm": np.linalg.norm(observed["W"], axis=(1, 2)), **{k: np.asarray(v) for k, v in observed.items()}}


def chunked(fun=UFM, start=START, steps=26, *, every=2, chunk=3, key=None, optimiser=ADAM, **given):
    given = {"observe": watch, "keep": keep} | given
    return descend_in_chunks(fun, start, optimiser, steps, every=every, chunk=chunk, key=key, **given)


def same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


STATE = ("params", "value", "steps", "fate", "start_value", "state")


@pytest.mark.parametrize(
    ("fun", "key", "steps", "every", "chunk"),
    [
        (noisy, KEY, 26, 2, 3),  # pieces of 6, the last of 8
        (UFM, None, 13, 1, 4),  # 4, 4 and 5: a piece of one step would be compiled otherwise
        (UFM, None, 0, 2, 3),
    ],
)
def test_chunks_are_one_go_to_the_last_bit(fun, key, steps, every, chunk):
    whole = descend(fun, START, ADAM, steps, observe=watch, every=every, key=key)
    end, kept = chunked(fun, steps=steps, every=every, chunk=chunk, key=key)
    for name in STATE:
        same(getattr(end, name), getattr(whole, name))
    same(kept, keep(whole.observed))
    assert end.observed is None
    assert end.at.tolist() == [steps]


class Interrupted:
    """keep, with ctrl-C at a call."""

    def __init__(self, at=None):
        self.calls, self.at = 0, at

    def __call__(self, observed):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return keep(observed)


@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize(("fun", "key"), [(UFM, None), (noisy, KEY)])
def test_what_was_interrupted_goes_on_bit_for_bit(tmp_path, fun, key, at):
    file, uninterrupted = tmp_path / "course.npz", chunked(fun, key=key)
    with pytest.raises(KeyboardInterrupt):
        chunked(fun, key=key, keep=Interrupted(at), file=file)
    assert file.exists() == (at > 2)  # the first call is for the start
    rest = Interrupted()
    end, kept = chunked(fun, key=key, keep=rest, file=file)
    same((end, kept), uninterrupted)
    assert rest.calls == (5 if at <= 2 else 6 - (at - 1))  # the start's too
    assert [path.name for path in tmp_path.iterdir()] == ["course.npz"]


@pytest.mark.usefixtures("hastily")
def test_a_finished_file_returns_at_once(tmp_path, capsys):
    file, calls = tmp_path / "course.npz", Interrupted()
    first = chunked(file=file, quiet=False)
    assert "step/s" in capsys.readouterr().err
    before = file.read_bytes()
    same(chunked(file=file, keep=calls), first)
    assert calls.calls == 1  # the start's
    assert file.read_bytes() == before
    assert capsys.readouterr() == ("", "")


def large(c, x):
    return jnp.sum(jnp.cosh(x - c))


ZEROS = np.zeros(150)
TWOS = np.where(np.arange(150) == 140, 2.0, 0.0)


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"start": init(PROBLEM, jax.random.key(1))}),
        ({}, {"steps": 28}),
        ({}, {"every": 1}),
        ({}, {"optimiser": optax.adam(0.2)}),
        ({}, {"optimiser": optax.sgd(0.1)}),
        ({}, {"fun": Partial(objective, balanced(3, 2, 3, lam_W=2e-2, lam_H=2e-2))}),
        ({}, {"fun": noisy, "key": KEY}),
        ({"fun": noisy, "key": KEY}, {"fun": noisy, "key": jax.random.key(4)}),
        ({"fun": Partial(large, ZEROS)}, {"fun": Partial(large, TWOS)}),
        ({"fun": Partial(large, jnp.asarray(ZEROS))}, {"fun": Partial(large, jnp.asarray(TWOS))}),
    ],
)
def test_the_file_of_another_run_is_refused_and_left_alone(tmp_path, one, other):
    file = tmp_path / "course.npz"
    if one and "key" not in one:
        plain = {"start": jnp.ones(150), "observe": jnp.sum, "keep": lambda x: {"sum": np.asarray(x)}}
        one, other = one | plain, other | plain
    chunked(**one, file=file)
    before = file.read_bytes()
    refuse(file, r"is of another run \(start, program, steps or what is kept differ\): name another file$", **other)
    assert file.read_bytes() == before


def refuse(file, match, **given):
    with pytest.raises(ValueError, match=match) as caught:
        chunked(file=file, **given)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def _npy():
    file = io.BytesIO()
    np.save(file, np.ones(3))
    return file.getvalue()


def _pickled():
    file = io.BytesIO()
    np.savez(file, identity=np.array([{}], object))
    return file.getvalue()


def _empty_archive():
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").close()
    return file.getvalue()


@pytest.mark.usefixtures("hastily")
def test_damaged_files_are_refused_in_one_line(tmp_path):
    file = tmp_path / "course.npz"
    chunked(file=file)
    whole = file.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 0xFF
    truncated = [whole[:n] for n in (0, 1, 10, len(whole) // 3, len(whole) - 1)]
    for content in [*truncated, bytes(middle), b"no archive", _npy(), _pickled()]:
        file.write_bytes(content)
        refuse(file, "cannot be read as what an earlier run kept: remove it to begin anew$")
    file.write_bytes(_empty_archive())
    refuse(file, "is of another run")
    file.unlink()
    file.mkdir()
    refuse(file, "cannot be read")


def quartic(x):
    return jnp.sum(x**4)


@pytest.mark.usefixtures("hastily")
def test_what_is_not_finite_stops_early_and_stays_so(tmp_path):
    """x ← x − 4x³ from 2 overflows within ten steps."""
    file, calls = tmp_path / "course.npz", []

    def count(x):
        calls.append(len(x))
        return {"x": np.asarray(x)}

    given = {"fun": quartic, "start": jnp.array([2.0]), "optimiser": optax.sgd(1.0), "steps": 1000, "every": 1}
    given |= {"chunk": 5, "observe": Partial(jnp.asarray), "keep": count, "file": file}
    end, kept = chunked(**given)
    whole = descend(quartic, jnp.array([2.0]), optax.sgd(1.0), 10, observe=Partial(jnp.asarray))
    assert Fate(int(end.fate)) == Fate(int(whole.fate)) == Fate.NOT_FINITE
    assert np.isfinite(end.params).all()
    np.testing.assert_array_equal(kept["x"], whole.observed[: len(kept["x"])])
    np.testing.assert_array_equal(end.params, kept["x"][int(end.steps)])
    assert sum(calls) == len(kept["x"]) <= 11
    number = len(calls)
    same(chunked(**given), (end, kept))
    assert calls[number:] == [1]  # the start's alone


@pytest.mark.parametrize(("steps", "every"), [(7, 2), (-2, 2), (4, 0)])
def test_steps_that_cannot_be_are_refused_before_any_is_taken(steps, every):
    calls = Interrupted()
    with pytest.raises(ValueError, match=r"^steps must be a multiple of every ≥ 1, got"):
        chunked(steps=steps, every=every, chunk=1, keep=calls)
    assert calls.calls == 0


def test_data_that_differ_late_in_an_array_are_another_program():
    texts = {
        without_addresses(jax.jit(functools.partial(large, c)).lower(jnp.ones(150)).as_text()) for c in (ZEROS, TWOS)
    }
    assert len(texts) == 2
    assert without_addresses("<function f at 0x7f12ab34cd56>") == "<function f at 0x>"


@pytest.mark.usefixtures("hastily")
def test_what_is_kept_differently_is_another_run(tmp_path):
    file = tmp_path / "course.npz"
    chunked(file=file)
    with pytest.raises(ValueError, match="or what is kept differ"):
        chunked(file=file, keep=lambda x: {"other": np.asarray(x)})


@pytest.mark.usefixtures("hastily")
def test_noise_with_a_key_of_its_own_goes_on(tmp_path):
    """optax.add_noise keeps a typed key in its state."""
    noisy = optax.chain(optax.add_noise(0.01, 0.0, jax.random.key(3)), optax.sgd(0.1))
    given = {"optimiser": noisy, "file": tmp_path / "course.npz"}
    end, kept = chunked(**given)
    again, same_kept = chunked(**given)
    np.testing.assert_array_equal(end.params, again.params)
    assert {name: x.tolist() for name, x in kept.items()} == {name: x.tolist() for name, x in same_kept.items()}


def test_no_record_at_a_time_is_refused():
    with pytest.raises(ValueError, match=r"^chunk must be"):
        chunked(chunk=0)
