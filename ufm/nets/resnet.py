"""The residual network whose penultimate features the theory is held against: ResNet18, width and d free."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

STEMS = {"small": (3, 1), "imagenet": (7, 2)}  # side and stride of the first convolution
_HE_NORMAL = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class ConvNorm(nnx.Module):
    """x ↦ γ (conv(x) − μ)/√(σ² + 1e-5) + β channel by channel, the convolution without bias.

    μ and σ² are the batch's own in training, their running averages (memory 0.9) in evaluation.
    """

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (size, size),
            strides=stride,
            padding=size // 2,
            use_bias=False,
            kernel_init=_HE_NORMAL,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(
            outputs, momentum=0.9, epsilon=1e-5, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, x: Float[Array, "N rows columns inputs"]) -> Float32[Array, "N _ _ outputs"]:
        """The normalised convolution of x."""
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """x ↦ ReLU(S(x) + C₂(ReLU(C₁(x)))), S the identity, or a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        self.first = ConvNorm(inputs, hidden, 3, stride, rngs=rngs)
        self.second = ConvNorm(hidden, outputs, 3, 1, rngs=rngs)
        reshapes = stride != 1 or inputs != outputs
        self.shortcut = ConvNorm(inputs, outputs, 1, stride, rngs=rngs) if reshapes else None

    def __call__(self, x: Float[Array, "N rows columns inputs"]) -> Float32[Array, "N _ _ outputs"]:
        """The residual step from x."""
        skip = x if self.shortcut is None else self.shortcut(x)
        return nnx.relu(skip + self.second(nnx.relu(self.first(x))))


class ResNet18(nnx.Module):
    """x ↦ W h(x) + b, h ≥ 0 the channel means at the end of 17 residual convolutions, never normalised.

    Float32 throughout, whatever `jax_enable_x64` says. A new network trains: it normalises by the batch and
    updates the running averages. `nnx.view(model, use_running_average=True)` evaluates: the same parameters,
    normalised by the running averages.

    Args:
        K: number of classes.
        rngs: source of the initial weights (He normal over the fan-out for convolutions).
        in_channels: channels of an image.
        width: channels w of the first stage; the four stages have w, 2w, 4w, 8w.
        d: feature dimension, 8w unless given; any other d makes the last block end in d channels.
        stem: "small" is a 3×3 convolution; "imagenet" a 7×7 of stride 2, then a 3×3 maximum of stride 2.

    Raises:
        ValueError: K < 2, width < 1, d < 1, in_channels < 1 or an unknown stem.

    Source: THEORY 1.7 (zhu2021's released code, its reduced feature dimension d = K included).
    """

    def __init__(
        self,
        K: int,
        *,
        rngs: nnx.Rngs,
        in_channels: int = 3,
        width: int = 64,
        d: int | None = None,
        stem: str = "small",
    ):
        d = 8 * width if d is None else d
        for name, value, least in (
            ("K", K, 2),
            ("in_channels", in_channels, 1),
            ("width", width, 1),
            ("d", d, 1),
        ):
            if value < least:
                raise ValueError(f"{name} = {value}: give an integer of at least {least}")
        if stem not in STEMS:
            raise ValueError(f"stem = {stem!r}: give one of {', '.join(STEMS)}")
        self.in_channels, self.pools = in_channels, stem == "imagenet"
        size, stride = STEMS[stem]
        self.stem = ConvNorm(in_channels, width, size, stride, rngs=rngs)
        self.blocks = nnx.List(_blocks(width, d, rngs))
        self.head = nnx.Linear(d, K, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)

    def features(self, x: Float[Array, "N rows columns channels"]) -> Float32[Array, "N d"]:
        """h(x): the average over positions of the last block's output, as ReLU leaves it.

        Args:
            x: images, channels last.

        Raises:
            ValueError: x does not have the channels the network was made for.
        """
        if x.ndim != 4 or x.shape[-1] != self.in_channels:
            raise ValueError(f"x has shape {x.shape}: give (N, rows, columns, {self.in_channels}) images")
        x = nnx.relu(self.stem(x))
        if self.pools:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return x.mean((1, 2))

    def __call__(self, x: Float[Array, "N rows columns channels"]) -> Float32[Array, "N K"]:
        """Logits W h(x) + b, one row per image."""
        return self.head(self.features(x))


def _blocks(width: int, d: int, rngs: nnx.Rngs) -> list[Block]:
    """Four stages of two blocks, each later stage of half the side and twice the channels, the last to d."""
    w = [width * 2**stage for stage in range(4)]
    hidden = [channels for channels in w for _ in range(2)]
    outputs = [*hidden[:-1], d]
    strides = [1, 1, 2, 1, 2, 1, 2, 1]
    shapes = zip([width, *outputs], hidden, outputs, strides, strict=False)
    return [Block(*shape, rngs=rngs) for shape in shapes]
