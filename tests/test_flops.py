"""Operations counted against sums done by hand."""

import keras
import pytest
import tiny

from cifarflow.errors import ConfigError
from cifarflow.models.cnn import cnn
from cifarflow.models.flops import count_flops
from cifarflow.models.mlp import mlp
from cifarflow.models.resnet import resnet
from cifarflow.models.speednet import speednet

# Multiply-adds of each weighted layer, by hand, the first one first.
MLP = [3072 * 512, 512 * 256, 256 * 10]
CNN = [28 * 28 * 96 * 5 * 5 * 3, 10 * 10 * 80 * 5 * 5 * 96, 5 * 5 * 80 * 256, 256 * 10]
# Stem, two convolutions at each of 32, 16 and 8 pixels, the 1x1 shortcuts, the classifier.
RESNET = [
    32 * 32 * 16 * 9 * 3,
    2 * 32 * 32 * 16 * 9 * 16,
    16 * 16 * 32 * 9 * (16 + 32) + 16 * 16 * 32 * 16,
    8 * 8 * 64 * 9 * (32 + 64) + 8 * 8 * 64 * 32,
    64 * 10,
]
# The whitening layer's kernel is frozen, but not its bias: the next layer needs its input's
# gradient.
WHITENING = 31 * 31 * 24 * 4 * 3
SPEEDNET = [
    31 * 31 * 64 * 9 * 24 + 15 * 15 * 64 * 9 * 64,
    15 * 15 * 256 * 9 * 64 + 7 * 7 * 256 * 9 * 256,
    7 * 7 * 256 * 9 * 256 + 3 * 3 * 256 * 9 * 256,
    256 * 10,
]


@pytest.mark.parametrize(
    ("model", "layers"),
    [(mlp, MLP), (cnn, CNN), (lambda: resnet(depth=8, widths=(16, 32, 64)), RESNET)],
    ids=["mlp", "cnn", "resnet"],
)
def test_by_hand(model, layers):
    model = model()
    forward = 2 * sum(layers)
    assert count_flops(model) == forward
    assert isinstance(count_flops(model), float)
    # The images need no gradient.
    assert count_flops(model, training=True) == 3 * forward - 2 * layers[0]


def test_speednet_by_hand():
    model = speednet()
    assert count_flops(model) == 2 * (WHITENING + sum(SPEEDNET))
    assert count_flops(model, training=True) == 2 * (WHITENING + 3 * sum(SPEEDNET))


def test_the_labs_cnn_is_four_and_a_half_gflop_a_step():
    assert 32 * count_flops(cnn(), training=True) == pytest.approx(4.5e9, rel=0.01)


def test_what_is_frozen_needs_no_gradient_nor_does_what_is_before():
    model = mlp()
    first, second, last = (layer for layer in model.layers if layer.weights)
    first.trainable = False
    assert count_flops(model, training=True) == 2 * (MLP[0] + 2 * MLP[1] + 3 * MLP[2])
    first.trainable, second.trainable = True, False
    assert count_flops(model, training=True) == 2 * (2 * MLP[0] + 2 * MLP[1] + 3 * MLP[2])
    model.trainable = False
    assert count_flops(model, training=True) == count_flops(model)
    last.trainable = True
    assert count_flops(model, training=True) == 2 * (MLP[0] + MLP[1] + 2 * MLP[2])


def test_a_trained_layer_without_products_counts_as_trained():
    inputs = keras.Input((4, 4, 3))
    x = keras.layers.BatchNormalization()(inputs)
    model = keras.Model(inputs, keras.layers.Conv2D(2, 3)(x))
    assert count_flops(model, training=True) == 3 * 2 * (2 * 2 * 2 * 9 * 3)


def test_groups_strides_padding_and_channels_first():
    inputs = keras.Input((9, 9, 4))
    x = keras.layers.Conv2D(6, 3, strides=2, padding="same", groups=2)(inputs)
    assert count_flops(keras.Model(inputs, x)) == 2 * 5 * 5 * 6 * 9 * 2
    inputs = keras.Input((4, 9, 8))
    x = keras.layers.Conv2D(6, (3, 1), data_format="channels_first")(inputs)
    assert count_flops(keras.Model(inputs, x)) == 2 * 7 * 8 * 6 * 3 * 4
    inputs = keras.Input((7, 3))
    assert count_flops(keras.Model(inputs, keras.layers.Dense(5)(inputs))) == 2 * 7 * 3 * 5


def test_shared_layers_nested_models_and_sequential_ones():
    dense = keras.layers.Dense(4)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, dense(dense(inputs)))
    assert count_flops(model, training=True) == 2 * 16 * (2 + 3)

    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(2)])
    assert count_flops(inner, training=True) == 2 * (2 * 16 + 3 * 8)
    outer = keras.Model(inputs, inner(keras.layers.Dense(4)(inputs)))
    assert count_flops(outer, training=True) == 2 * (2 * 16 + 3 * 16 + 3 * 8)
    inner.trainable = False
    # Gradients go through the frozen model to the layer before it.
    assert count_flops(outer, training=True) == 2 * (2 * 16 + 2 * 16 + 2 * 8)
    after = keras.Model(inputs, keras.layers.Dense(3)(inner(inputs)))
    assert count_flops(after, training=True) == 2 * (16 + 8 + 2 * 6)


def test_branches():
    inputs = keras.Input((4,))
    frozen = keras.layers.Dense(4, trainable=False)(inputs)
    trained = keras.layers.Dense(4)(inputs)
    outputs = keras.layers.Dense(2)(keras.layers.Add()([frozen, trained]))
    assert count_flops(keras.Model(inputs, outputs), training=True) == 2 * (16 + 2 * 16 + 3 * 8)


def test_counting_leaves_the_model_alone():
    model = tiny.tiny_cnn()
    before, nodes = model.get_weights(), [len(layer._inbound_nodes) for layer in model.layers]
    count_flops(model, training=True)
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))
    assert nodes == [len(layer._inbound_nodes) for layer in model.layers]


class Own(keras.Model):
    def call(self, inputs):
        return inputs


class Block(keras.layers.Layer):
    def __init__(self):
        super().__init__(name="block")
        self.dense = keras.layers.Dense(3, name="hidden")

    def call(self, inputs):
        return self.dense(inputs)


def unknown_size():
    inputs = keras.Input((None, None, 3))
    return keras.Model(inputs, keras.layers.Conv2D(2, 3, name="conv")(inputs))


def with_block():
    inputs = keras.Input((4,))
    return keras.Model(inputs, Block()(inputs))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: Own(name="mine"),
            "must be a functional or built Sequential .*, not <Own name=min",
        ),
        (lambda: keras.Sequential([keras.layers.Dense(3)]), "functional or built Sequential"),
        (lambda: 3, "to count its operations, not 3$"),
        (unknown_size, r"layer 'conv' must have an output of known size .*, not \(None, None, N"),
        (with_block, "layer 'block' has 'hidden' inside, whose calls cannot be counted"),
    ],
)
def test_what_cannot_be_counted(model, message):
    with pytest.raises(ConfigError, match=message) as caught:
        count_flops(model())
    assert "\n" not in str(caught.value)
