"""A step of training is SGD on the stated objective: penalties, decay, momentum, schedule, order of images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ufm.model.losses import CrossEntropy
from ufm.model.problem import Params, Problem, objective
from ufm.nets import train as module
from ufm.nets.config import TrainConfig
from ufm.nets.data import load
from ufm.nets.train import collect, error

CONFIG = TrainConfig(
    limit=20, batch=8, epochs=4, measure_every=2, width=1, d=10, lr=0.02, regulariser="features", lam_W=5e-3
)
DECAY = dataclasses.replace(CONFIG, regulariser="decay", epochs=1)
SINGLE = 2e-5  # relative; float32 gradients through 18 layers, summed in another order


@pytest.fixture(scope="module")
def images():
    return load("digits", "train", limit=20)


@pytest.fixture(scope="module")
def batch(images):
    return images.x[:8], images.labels[:8]


@pytest.fixture(scope="module", params=[CONFIG, DECAY], ids=["features", "decay"])
def stepped(request, images):
    """A trainer after 30 steps on one batch, and their losses."""
    config = module._resolved(dataclasses.replace(request.param, epochs=100), images)
    trainer = module._Trainer(config, images)
    batch = next(trainer.batches(0))
    return trainer, [trainer.step(batch) for _ in range(30)]


def test_steps_on_one_batch_lower_its_loss(stepped):
    losses = [float(loss) for loss in stepped[1]]
    assert losses[-1] < losses[0] / 2


def test_everything_is_float32_though_x64_is_on(stepped, images):
    assert jax.config.jax_enable_x64
    trainer, losses = stepped
    assert losses[0].dtype == np.float32
    dtypes = {x.dtype for x in jax.tree.leaves(trainer.state())}
    assert {t for t in dtypes if np.issubdtype(t, np.floating)} == {np.dtype(np.float32)}
    assert not any(np.issubdtype(t, np.signedinteger) and t.itemsize > 4 for t in dtypes)
    assert collect(trainer.model, images).H.dtype == np.float32


def test_measuring_leaves_the_model_as_it_is_and_does_not_depend_on_batches(stepped, images, monkeypatch):
    trainer, _ = stepped
    before = jax.tree.map(np.array, trainer.state())
    whole = collect(trainer.model, images)
    jax.tree.map(np.testing.assert_array_equal, before, trainer.state())
    monkeypatch.setattr(module, "EVALUATION_BATCH", 7)
    np.testing.assert_allclose(collect(trainer.model, images).H, whole.H, atol=1e-5)
    assert error(whole) == pytest.approx(np.mean((whole.W @ whole.H + whole.b[:, None]).argmax(0) != images.labels))


PLAIN = dataclasses.replace(CONFIG, lr=1.0, momentum=0.0, epochs=100)  # one step subtracts the gradient


def _parameters(trainer):
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(trainer.model, nnx.Param)))


def _gradient(trainer, batch):
    """The loss at the model and its gradient, by the step of a PLAIN trainer."""
    before, loss = _parameters(trainer), trainer.step(batch)
    return loss, jax.tree.map(np.subtract, before, _parameters(trainer))


def _assert_close(found, expected, rtol=SINGLE):
    """Relative to the largest entry of all leaves; gradients before a normalisation are differences near zero."""
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rtol * largest), found, expected)


def test_the_explicit_penalty_is_that_of_the_model_on_the_batch(images):
    """Loss and gradient are f's, λ_H standing for the N/B samples that each one of the batch speaks for."""
    config, N, B = dataclasses.replace(PLAIN, lam_W=0.03, lam_H=0.02, lam_b=0.04), 20, 10
    trainer = module._Trainer(config, images)
    one_of_each = np.unique(images.labels, return_index=True)[1]
    x, labels = images.x[one_of_each], images.labels[one_of_each]

    model = trainer.model
    h = module._features(model, jnp.asarray(x))
    problem = Problem(np.eye(10)[:, labels], np.ones(B), CrossEntropy(), 0.03, 0.02 * N / B, 0.04, 10, True)
    point = Params(*(jnp.asarray(a, float) for a in (model.head.kernel[...].T, h.T, model.head.bias[...])))
    value, slope = jax.value_and_grad(lambda p: objective(problem, p))(point)
    pull_back = nnx.jit(nnx.grad(lambda model, x, weights: jnp.sum(model.features(x) * weights)))
    through_features = pull_back(model, jnp.asarray(x), jnp.asarray(slope.H.T, jnp.float32))
    expected = nnx.to_pure_dict(through_features) | {"head": {"kernel": slope.W.T, "bias": slope.b}}

    loss, gradient = _gradient(trainer, (x, labels))
    assert float(loss) == pytest.approx(float(value), rel=SINGLE)
    _assert_close(gradient, expected)


def test_the_penalty_of_the_classifier_pulls_it_to_zero_in_proportion(images, batch):
    pulls = {}
    for scale in (1.0, 2.0):
        config = dataclasses.replace(PLAIN, lam_W=0.3 * scale, lam_H=1e-30, lam_b=0.4 * scale)
        trainer = module._Trainer(config, images)
        trainer.model.head.bias[...] = jnp.arange(10, dtype=jnp.float32) / 10
        head = _parameters(trainer)["head"]
        pulls[scale] = _gradient(trainer, batch)[1]["head"]
    pull = jax.tree.map(np.subtract, pulls[2.0], pulls[1.0])
    _assert_close(pull, {"kernel": 0.3 * head["kernel"], "bias": 0.4 * head["bias"]})


def test_weight_decay_pulls_every_parameter_by_lam_W_of_itself(images, batch):
    """θ − ∇ − λθ for weights, biases and the scales of normalisation alike."""
    gradients = {}
    for lam in (1e-30, 0.5):
        trainer = module._Trainer(dataclasses.replace(PLAIN, regulariser="decay", lam_W=lam), images)
        theta = _parameters(trainer)
        gradients[lam] = _gradient(trainer, batch)[1]
    pull = jax.tree.map(np.subtract, gradients[0.5], gradients[1e-30])
    _assert_close(pull, jax.tree.map(lambda x: 0.5 * x, theta))
    assert len(jax.tree.leaves(theta)) == 3 * 21 + 2  # 17 convolutions, 4 shortcuts, a head


def test_momentum_and_decay_are_coupled_as_in_sgd(images, batch):
    """v ← μ v + (∇ + λθ), θ ← θ − lr v, two steps by hand."""
    config = dataclasses.replace(PLAIN, regulariser="decay", lam_W=0.1, lr=0.05, momentum=0.9)
    trainer = module._Trainer(config, images)
    shadow = module._Trainer(dataclasses.replace(config, lr=1.0, momentum=0.0), images)
    v = jax.tree.map(np.zeros_like, _parameters(trainer))
    for _ in range(2):
        nnx.update(shadow.model, nnx.state(trainer.model))
        theta, (_, gradient) = _parameters(trainer), _gradient(shadow, batch)
        v = jax.tree.map(lambda old, new: 0.9 * old + new, v, gradient)
        trainer.step(batch)
        _assert_close(_parameters(trainer), jax.tree.map(lambda x, dx: x - 0.05 * dx, theta, v))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 60, 100, 93800])
def test_the_learning_rate_falls_tenfold_after_each_third(steps):
    thirds = [0, steps // 3, 2 * steps // 3, steps - 1]
    step = np.unique(np.clip(np.add.outer(thirds, np.arange(-2, 3)), 0, steps - 1))
    found = jax.vmap(lambda i: module._learning_rate(0.05, steps, i))(jnp.asarray(step, jnp.int32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [0.05 / 10 ** (3 * int(i) // steps) for i in step], rtol=1e-6)


def test_the_schedule_that_sgd_follows_spans_the_whole_run(images, monkeypatch):
    seen, original = {}, optax.sgd

    def sgd(schedule, momentum):
        seen["rates"] = [float(schedule(jnp.int32(i))) for i in range(6)]
        return original(schedule, momentum)

    monkeypatch.setattr(optax, "sgd", sgd)
    module._Trainer(dataclasses.replace(CONFIG, epochs=3, lr=1.0), images)  # 2 batches of 8 from 20 images an epoch
    assert seen["rates"] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_an_epoch_visits_images_once_each_in_an_order_of_its_own(images):
    numbers = np.broadcast_to(np.arange(20, dtype=np.float32)[:, None, None, None], images.x.shape)
    trainer = module._Trainer(CONFIG, dataclasses.replace(images, x=numbers))

    def order(epoch):
        return np.concatenate([x[:, 0, 0, 0].astype(int) for x, _ in trainer.batches(epoch)]).tolist()

    for epoch in (0, 1):
        assert len(order(epoch)) == len(set(order(epoch))) == 16
        assert order(epoch) == order(epoch)
        for x, labels in trainer.batches(epoch):
            np.testing.assert_array_equal(labels, images.labels[x[:, 0, 0, 0].astype(int)])
    assert order(0) != order(1)
