"""The certificate of features in batches is that of certify, whatever the batches, one of them at a time."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ufm.lab.streaming import certify_stream
from ufm.measure.collapse import collapse_metrics_stream
from ufm.model.problem import balanced, imbalanced, init
from ufm.theory.atlas import coarse_etf
from ufm.theory.certificate import Verdict, certify
from ufm.theory.optimum import balanced_minimiser, balanced_value

pytestmark = pytest.mark.usefixtures("hastily")

COUNTS, EQUAL, D = (9, 1, 20, 10), (10, 10, 10, 10), 5
ORDER = 1e-12  # relative to f or to a norm: sums of some 100 terms in another order differ by 100 eps of their size
MODES = {"free": (0.0, True), "regularised": (1e-2, True), "absent": (0.0, False)}


def example(mode, counts=COUNTS):
    lam_b, use_bias = MODES[mode]
    return imbalanced(counts, D, lam_W=5e-3, lam_H=2e-3, lam_b=lam_b, use_bias=use_bias)


def batches_of(problem, x, cuts=(), seed=0):
    """The samples in random order, cut into batches."""
    labels = np.argmax(problem.Y, axis=0)
    order = np.random.default_rng(seed).permutation(labels.size)
    return [(np.asarray(x.H)[:, part], labels[part]) for part in np.split(order, sorted(cuts))]


def streamed(problem, x, batches, **options):
    lams = {name: float(getattr(problem, name)) for name in ("lam_W", "lam_H", "lam_b")}
    return certify_stream(batches, x.W, x.b if problem.use_bias else None, **lams, **options)


def assert_same(stream, problem, x):
    """As certify says; a number that is left when larger ones cancel is compared on their scale."""
    whole = certify(problem, x)
    value, penalties = float(whole.value), problem.lam_W * jnp.linalg.norm(x.W) + problem.lam_H * jnp.linalg.norm(x.H)
    scales = {"value": value, "gap": value, "threshold": 0, "dual_norm": 0, "grad_norm": float(penalties)}
    for name, scale in scales.items():
        left, right = float(getattr(stream, name)), float(getattr(whole, name))
        assert abs(left - right) <= ORDER * max(right, scale), name
    assert float(whole.rounding) <= float(stream.rounding) <= 2 * float(whole.rounding)
    assert stream.verdict == whole.verdict


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    cuts=st.sampled_from([[16, 32], [0, 8, 8, 24, 32]]),
    mode=st.sampled_from(sorted(MODES)),
    scale=st.sampled_from([1e-3, 0.3, 3.0, 1e3]),
)
def test_a_stream_gets_the_certificate_of_the_whole_however_it_is_cut(seed, cuts, mode, scale):
    problem = example(mode)
    x = init(problem, jax.random.key(seed), scale=scale)
    assert_same(streamed(problem, x, batches_of(problem, x, cuts, seed)), problem, x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shrink", "verdict"), [(0.0, Verdict.GLOBAL), (1e-6, Verdict.GLOBAL), (1e-3, Verdict.NOT_CRITICAL)]
)
def test_the_optimum_and_what_is_near_it_in_pieces_smaller_than_a_batch(monkeypatch, mode, shrink, verdict):
    problem = example(mode, EQUAL)
    x = jax.tree.map(lambda leaf: (1 - shrink) * leaf, balanced_minimiser(problem))
    monkeypatch.setattr("ufm.lab.blocks.CHUNK", 8)
    c = streamed(problem, x, batches_of(problem, x, cuts=[16]))
    assert_same(c, problem, x)
    assert c.verdict == verdict


def test_a_saddle_is_critical_and_not_more():
    problem = balanced(4, 3, 5, lam_W=5e-3, lam_H=2e-3)
    x = coarse_etf(problem, 2)
    c, whole = streamed(problem, x, batches_of(problem, x)), certify(problem, x)
    assert (c.verdict, whole.verdict) == (Verdict.UNDECIDED, Verdict.STRICT_SADDLE)
    assert float(c.gap) == pytest.approx(float(whole.gap), rel=ORDER)
    assert [leaf.shape for leaf in jax.tree.leaves(c.direction)] == [(4, 5), (5, 0), (4,)]


def test_tolerances_decide_the_verdict():
    problem = example("free")
    x = init(problem, jax.random.key(0))
    batches = batches_of(problem, x, [16, 32])
    assert streamed(problem, x, batches, tol=1.0).verdict == Verdict.GLOBAL
    assert streamed(problem, x, batches, grad_tol=1e6).verdict == Verdict.UNDECIDED


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_features_of_any_dtype_are_certified_in_the_precision_of_jax(dtype):
    problem = example("free")
    x = init(problem, jax.random.key(0))
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), x)
    exact = jax.tree.map(lambda leaf: leaf.astype(float), narrow)
    batches = [(H, labels.astype(np.uint8)) for H, labels in batches_of(problem, narrow, [16, 32])]
    assert_same(streamed(problem, narrow, batches), problem, exact)


def test_single_precision_bounds_the_optimum_too():
    problem = example("regularised", EQUAL)
    x, best = balanced_minimiser(problem), float(balanced_value(problem))
    with jax.enable_x64(False):
        c = streamed(problem, x, batches_of(problem, x, [16, 32]))
    assert c.gap.dtype == jnp.float32
    assert best - 1e-3 < float(c.value) - float(c.gap) - float(c.rounding) <= best


# What is held and how often it is read


def test_one_stream_serves_the_metrics_too_and_no_batch_is_kept():
    problem = example("absent")
    x = init(problem, jax.random.key(0))
    whole, alive, readings = batches_of(problem, x, [8, 16, 24, 32]), [], []

    def batches():
        readings.append(len(alive))
        for H, labels in whole:
            assert sum(one() is not None for one in alive) <= 1
            own = H.copy()
            alive.append(weakref.ref(own))
            yield own, labels
            del own

    assert_same(streamed(problem, x, batches), problem, x)
    assert len(readings) == 4  # to count, for f, for the dual norm, for the dual value
    collapse_metrics_stream(batches, x.W, None)


# Errors

PROBLEM = example("free")
X = init(PROBLEM, jax.random.key(0))
((H, LABELS),) = batches_of(PROBLEM, X)
GOOD = {"batches": [(H, LABELS)], "W": X.W, "b": X.b, "lam_W": 0.1, "lam_H": 0.1}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "batches hold no sample"),
        ({"batches": iter([(H, LABELS)])}, "batches is a list_iterator, read only once"),
        ({"batches": [(H, LABELS + 1)]}, "labels hold 4: number the classes of W from 0 to K−1 = 3"),
        ({"batches": [(H, LABELS), (H[1:], LABELS)]}, r"batch 1: H has shape \(4, 40\), .* d = 5"),
        ({"batches": [(H, LABELS // 2)]}, "labels have no sample of class 2, 3"),
        ({"batches": [(H * np.inf, LABELS)]}, r"H\[0, 0\] is -?inf: every entry must be finite"),
        ({"batches": iter([[(H, LABELS)], []]).__next__}, "batches gave 40 samples, then 0 or other classes"),
        ({"batches": iter([[(H, LABELS)], [(H, LABELS[::-1] * 0)]]).__next__}, "batches gave 40 samples, then 40"),
        ({"W": X.W[0]}, r"W has shape \(5,\)"),
        ({"W": X.W * np.nan}, "W must be finite"),
        ({"b": X.b[1:]}, r"b must have shape \(4,\)"),
        ({"lam_W": 0.0}, "lam_W must be positive"),
        ({"lam_H": -1.0}, "lam_H must be positive"),
        ({"lam_b": -1.0}, r"lam_b must be zero \(free bias\) or positive"),
    ],
)
def test_bad_input_is_named_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        certify_stream(**{**GOOD, **change})
    assert "\n" not in str(error.value)
