"""Features in batches, of any dtype, and wrong: same numbers, float64 throughout, one line for each mistake."""

import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ufm.measure.collapse import collapse_metrics, collapse_metrics_stream

# Streams.


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 40), max_size=6), shuffle=st.booleans())
def test_a_stream_gives_the_same_numbers_however_it_is_cut(draw, assert_same, seed, cuts, shuffle):
    H, labels, W, b = draw(seed, (9, 1, 20, 10), 3, spread=1e-3)
    order = np.random.default_rng(seed).permutation(40) if shuffle else np.arange(40)
    batches = [(H[:, part], labels[part]) for part in np.split(order, sorted(cuts))]
    assert_same(collapse_metrics_stream(batches, W, b), collapse_metrics(H, labels, W, b), but=["toolbox_nc1_cdnv"])


def test_more_samples_than_one_piece_holds_give_the_same_numbers(monkeypatch, draw, assert_same):
    H, labels, W, b = draw(8, (40, 70, 11), 5)
    whole = collapse_metrics(H, labels, W, b)
    monkeypatch.setattr("ufm.measure.moments.CHUNK", 7)
    assert_same(collapse_metrics(H, labels, W, b), whole)


def test_a_stream_may_come_from_a_function_that_opens_it_again(draw, assert_same):
    H, labels, W, b = draw(9, (5, 6, 7), 4)
    halves = lambda: ((H[:, s], labels[s]) for s in (slice(0, 8), slice(8, None)))  # noqa: E731
    assert_same(collapse_metrics_stream(halves, W, b), collapse_metrics(H, labels, W, b))


def test_memory_does_not_grow_with_the_number_of_samples(draw):
    H, labels, W, b = draw(10, (500, 500), 8)

    def peak(times):
        tracemalloc.start()
        collapse_metrics_stream(lambda: ((H, labels) for _ in range(times)), W, b)
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    peak(1)
    assert peak(50) < 1.2 * peak(2)


# Inputs from anywhere.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_whatever_the_dtype_the_arithmetic_is_float64(dtype, draw):
    H, labels, W, b = draw(11, (5, 6, 7), 4)
    arrays = [jnp.asarray(x).astype(dtype) for x in (H, W, b)]
    wide = [np.asarray(x).astype(np.float64) for x in arrays]
    expected = collapse_metrics(wide[0], labels, *wide[1:])
    assert collapse_metrics(arrays[0], jnp.asarray(labels), *arrays[1:]) == expected
    small = [np.asarray(x) for x in arrays]
    assert collapse_metrics(small[0], labels.astype(np.uint8), *small[1:]) == expected


def test_float64_holds_whatever_the_flag_of_jax(draw):
    H, labels, W, b = draw(12, (5, 6, 7), 4, spread=1e-6)
    expected = collapse_metrics(H, labels, W, b)
    with jax.enable_x64(False):
        assert collapse_metrics(H, labels, W, b) == expected


def test_the_arrays_passed_in_are_left_alone(draw):
    arrays = draw(13, (5, 6, 7), 4)
    copies = [x.copy() for x in arrays]
    collapse_metrics(*arrays)
    assert all((x == y).all() for x, y in zip(arrays, copies, strict=True))


# Errors.

RNG = np.random.default_rng(0)
H, LABELS, W, B = RNG.normal(size=(5, 12)), np.arange(12) % 3, RNG.normal(size=(3, 5)), RNG.normal(size=3)


def altered(array, index, value):
    array = array.astype(type(value)) if isinstance(value, float) else array.copy()
    array[index] = value
    return array


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((H.T, LABELS, W, B), r"H has shape \(12, 5\), .* d = 5, the width of W: pass its transpose"),
        ((H[:3], LABELS, W, B), r"H has shape \(3, 12\).* W has another width"),
        ((H[0], LABELS, W, B), r"H has shape \(12,\)"),
        ((H + 0j, LABELS, W, B), "H has dtype complex128"),
        ((H.astype(object), LABELS, W, B), "H has dtype object"),
        ((altered(H, (2, 7), math.nan), LABELS, W, B), r"H\[2, 7\] is nan: every entry must be finite"),
        ((altered(H, (4, 0), -math.inf), LABELS, W, B), r"H\[4, 0\] is -inf"),
        ((H, LABELS[:-1], W, B), r"labels have shape \(11,\), but H has N = 12"),
        ((H, np.eye(3)[LABELS], W, B), r"labels have shape \(12, 3\)"),
        ((H, LABELS.astype(float), W, B), "labels have dtype float64: cast"),
        ((H, LABELS == 1, W, B), "labels have dtype bool"),
        ((H, LABELS + 1, W, B), "labels hold 3: number the classes of W from 0 to K−1 = 2"),
        ((H, LABELS - 1, W, B), "labels hold -1"),
        ((H, altered(LABELS, LABELS == 1, 2), W, B), "no sample of class 1, but each of the 3 rows"),
        ((H, LABELS * 0, W, B), "no sample of class 1, 2,"),
        ((H, LABELS, np.ones((99, 5)), None), r"no sample of class 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, \.\.\., but"),
        ((H, LABELS, W[0], B), r"W has shape \(5,\), .* at least 2 classes"),
        ((H, LABELS * 0, W[:1], B[:1]), r"W has shape \(1, 5\)"),
        ((H[:0], LABELS, W[:, :0], B), r"W has shape \(3, 0\)"),
        ((H, LABELS, W.astype(str), B), "W has dtype <U"),
        ((H, LABELS, altered(W, (0, 0), math.inf), B), "W holds inf: every entry must be finite"),
        ((H, LABELS, W, altered(B, 1, math.nan)), "b holds nan"),
        ((H, LABELS, W, B[:2]), r"b has shape \(2,\), but must be \(3,\)"),
        ((H[:, :0], LABELS[:0], W, B), "batches hold no sample"),
    ],
)
def test_bad_input_is_named_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        collapse_metrics(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("unchecked")
def test_a_centre_of_another_name():
    with pytest.raises(ValueError, match="centre is 'median', but must be"):
        collapse_metrics(H, LABELS, W, B, centre="median")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches hold no sample"),
        (iter([(H, LABELS)]), "batches is a list_iterator, read only once"),
        (((H, LABELS) for _ in range(1)), "batches is a generator, read only once"),
        ([H], "a ndarray is no batch"),
        ([3], "a int is no batch"),
        ([(H, LABELS), (H[:2], LABELS)], r"batch 1: H has shape \(2, 12\)"),
        ([(H, LABELS), (H, LABELS), (H, LABELS + 9)], "batch 2: labels hold 9"),
        (iter([[(H, LABELS)], []]).__next__, "batches gave 12 samples, then 0"),
        (iter([[(H, LABELS)], [(H, altered(LABELS, 0, (LABELS[0] + 1) % 3))]]).__next__, "then 12 or other classes"),
    ],
)
def test_a_bad_stream_is_named_in_one_line(batches, message):
    with pytest.raises(ValueError, match=message) as error:
        collapse_metrics_stream(batches, W, B)
    assert "\n" not in str(error.value)
