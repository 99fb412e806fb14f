import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ufm.nets.resnet import Block, ConvNorm, ResNet18

FLOAT32_TOL = 1e-5  # about 100 float32 roundings on values of order one


def _tiny(**options):
    options = {"in_channels": 1, "width": 2} | options
    return ResNet18(3, rngs=nnx.Rngs(0), **options)


@nnx.jit
def _features(model, x):
    return model.features(x)


def _images(N, side=8, channels=1, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(N, side, side, channels)), jnp.float32)


def _parameters(**options):
    model = nnx.eval_shape(lambda: ResNet18(rngs=nnx.Rngs(0), **options))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(("d", "count"), [(512, 11_181_642), (None, 11_181_642), (10, 8_867_542)])
def test_parameter_counts_are_those_of_the_published_networks(d, count):
    assert _parameters(K=10, d=d, stem="imagenet") == count


@pytest.mark.parametrize(("K", "d", "width", "channels"), [(10, 512, 64, 3), (4, 10, 8, 1), (7, 100, 5, 2)])
def test_parameter_count_by_hand(K, d, width, channels):
    def conv(inputs, outputs, size):
        return inputs * outputs * size**2 + 2 * outputs

    w = [width * 2**stage for stage in range(4)]
    total = conv(channels, w[0], 3) + 4 * conv(w[0], w[0], 3) + d * K + K
    for before, after in itertools.pairwise(w):
        total += conv(before, after, 3) + 3 * conv(after, after, 3) + conv(before, after, 1)
    if d != w[3]:
        total += conv(w[3], d, 3) + conv(w[3], d, 1) - conv(w[3], w[3], 3)
    assert _parameters(K=K, d=d, width=width, in_channels=channels) == total


def test_network_stays_float32_though_x64_is_on():
    def outputs_and_gradient():
        model, x = _tiny(d=5), _images(4)
        gradient = nnx.grad(lambda m: m(x).sum())(model)
        return model.features(x), model(x), model(x.astype(jnp.float64)), nnx.state(model), gradient

    assert jax.config.jax_enable_x64
    leaves = jax.tree.leaves(nnx.eval_shape(outputs_and_gradient))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_features_are_nonnegative_and_unnormalised():
    model = _tiny(d=5)
    h = _features(model, _images(6))
    assert h.shape == (6, 5)
    assert (h >= 0).all()
    for layer in (model.blocks[-1].second, model.blocks[-1].shortcut):
        layer.norm.scale[...] *= 3
    np.testing.assert_allclose(_features(model, _images(6)), 3 * h, rtol=FLOAT32_TOL)


def test_logits_are_affine_in_the_features():
    model, x = _tiny(), _images(4)
    W, b = np.asarray(model.head.kernel[...]).T, np.asarray(model.head.bias[...])
    logits = nnx.jit(ResNet18.__call__)(model, x)
    np.testing.assert_allclose(logits, _features(model, x) @ W.T + b, atol=FLOAT32_TOL)


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_is_the_padded_correlation_normalised_over_the_batch(size, stride):
    layer, x = ConvNorm(2, 3, size, stride, rngs=nnx.Rngs(1)), _images(3, 6, 2)
    kernel, pad = np.asarray(layer.conv.kernel[...], np.float64), size // 2
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    z = np.array(
        [
            [np.einsum("nabc,abco->no", padded[:, i : i + size, j : j + size], kernel) for j in range(0, 6, stride)]
            for i in range(0, 6, stride)
        ]
    ).transpose(2, 0, 1, 3)
    mean, variance = z.mean((0, 1, 2)), z.var((0, 1, 2))
    np.testing.assert_allclose(layer(x), (z - mean) / np.sqrt(variance + 1e-5), atol=10 * FLOAT32_TOL)
    np.testing.assert_allclose(layer.norm.mean[...], 0.1 * mean, atol=FLOAT32_TOL)
    np.testing.assert_allclose(layer.norm.var[...], 0.9 + 0.1 * variance, rtol=FLOAT32_TOL)


def test_block_with_dead_branch_is_the_identity_on_nonnegative_input():
    block, x = Block(2, 2, 2, 1, rngs=nnx.Rngs(0)), jnp.abs(_images(2, 4, 2))
    assert block.shortcut is None
    block.second.norm.scale[...] *= 0
    np.testing.assert_array_equal(block(x), x)


@pytest.mark.parametrize(
    ("stem", "sides"), [("small", [28, 28, 14, 14, 7, 7, 4, 4]), ("imagenet", [7, 7, 4, 4, 2, 2, 1, 1])]
)
def test_resolution_halves_at_each_later_stage(stem, sides, monkeypatch):
    seen, step = [], Block.__call__

    def watched(self, x):
        y = step(self, x)
        seen.append(y.shape)
        return y

    monkeypatch.setattr(Block, "__call__", watched)
    nnx.eval_shape(lambda: _tiny(stem=stem).features(_images(2, 28)))
    assert seen == [(2, side, side, w) for side, w in zip(sides, [2, 2, 4, 4, 8, 8, 16, 16], strict=True)]


def test_initial_weights_have_he_variance_over_the_fan_out():
    kernel = np.asarray(ConvNorm(64, 64, 3, 1, rngs=nnx.Rngs(0)).conv.kernel[...], np.float64)
    sampling_error = np.sqrt(2 / kernel.size)  # of a variance, relative
    assert abs(kernel.var() * 9 * 64 / 2 - 1) < 5 * sampling_error


def test_evaluation_ignores_the_batch_and_shares_parameters():
    model, x = _tiny(), _images(6)
    batchwise = _features(model, x)
    evaluated = nnx.view(model, use_running_average=True)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    np.testing.assert_allclose(_features(evaluated, x)[:2], _features(evaluated, x[:2]), atol=FLOAT32_TOL)
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(nnx.state(model, nnx.BatchStat))))
    assert not np.allclose(batchwise[:2], _features(model, x[:2]), atol=1e-3)
    model.head.kernel[...] *= 2
    np.testing.assert_array_equal(evaluated.head.kernel[...], model.head.kernel[...])


def test_running_averages_reach_the_statistics_of_a_repeated_batch():
    model, x = _tiny(), _images(6)
    for _ in range(150):  # 0.9¹⁵⁰ of the initial averages is left: less than a float32 rounding
        batchwise = _features(model, x)
    evaluated = _features(nnx.view(model, use_running_average=True), x)
    np.testing.assert_allclose(evaluated, batchwise, rtol=10 * FLOAT32_TOL, atol=10 * FLOAT32_TOL)


def test_same_seed_same_weights():
    first, second = (jax.tree.leaves(nnx.state(_tiny(), nnx.Param)) for _ in range(2))
    assert all(map(np.array_equal, first, second))


def test_training_separates_a_handful_of_images():
    model, x, y = _tiny(width=4), _images(6), jnp.arange(6) % 3
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(m):
            return optax.softmax_cross_entropy_with_integer_labels(m(x), y).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    values = [step(model, optimizer) for _ in range(20)]
    assert values[-1] < 0.1 * values[0]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"K": 1}, "K = 1"),
        ({"width": 0}, "width = 0"),
        ({"d": 0}, "d = 0"),
        ({"in_channels": 0}, "in_channels = 0"),
        ({"stem": "large"}, "small, imagenet"),
    ],
)
def test_bad_architectures_are_refused_in_one_line(options, word):
    with pytest.raises(ValueError, match=word) as error:
        ResNet18(**({"K": 3} | options), rngs=nnx.Rngs(0))
    assert "\n" not in str(error.value)


def test_wrong_channels_are_refused():
    with pytest.raises(ValueError, match=r"give \(N, rows, columns, 1\) images"):
        _tiny().features(_images(2, 8, 3))
