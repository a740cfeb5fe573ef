"""The contract of a training step: what holds passes, and each fault is named."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

from cifarflow.errors import CifarflowError, ConfigError, DataError
from cifarflow.optimizers.muon import Muon
from cifarflow.optimizers.precision import scale_for
from cifarflow.optimizers.schedules import Cosine
from cifarflow.optimizers.sgd import SGD
from cifarflow.recipes.build import assemble
from cifarflow.recipes.named import get_recipe
from cifarflow.training.contract import ContractError, check_step
from cifarflow.training.step import Sums, cross_entropy, make_train_step

L = keras.layers
SHAPE = tiny.SHAPE


@pytest.fixture
def eagerly():
    """Runs compiled functions as plain Python: of tiny models, tracing them is all that takes time.

    What is looked for is the same, and the recipes, XLA and a fault of each kind run compiled.
    """
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def some_batches():
    # Without functions to trace.
    return tf.data.Dataset.from_tensor_slices(tuple(tiny.split(64))).batch(8)


def faults(model, optimizer=None, **kwargs):
    """The message of a check that fails."""
    with pytest.raises(ContractError) as caught:
        check_step(model, optimizer or SGD(0.05), **{"batches": some_batches(), **kwargs})
    assert isinstance(caught.value, CifarflowError)
    text = str(caught.value)
    assert "\n" not in text
    start = f"the training step of {model.name!r} fails: "
    assert text.startswith(start)
    return text.removeprefix(start).split("; ")


def passes(model, optimizer=None, **kwargs):
    check_step(model, optimizer or SGD(0.05), **{"batches": some_batches(), **kwargs})


def small(*layers, classes=10):
    """A model of some layers between the pixels and the logits."""
    inputs = keras.Input(SHAPE)
    x = L.Flatten()(L.Rescaling(1 / 255)(inputs))
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, L.Dense(classes, name="logits")(x), name="small")


def bits(variables):
    return [np.asarray(variable).tobytes() for variable in variables]


# One of each kind; the others differ in sizes and rates.
@pytest.mark.parametrize(
    ("name", "precision", "changes"),
    [
        (
            "lab_batchnorm",
            "mixed_bfloat16",
            {"model_options": {"filters": (4,), "kernel_size": 3, "dropout": 0.25}},
        ),
        ("fast75", "float32", {"model_options": {"widths": (4,)}}),
        ("fast96", "mixed_float16", {"model_options": {"widths": (4,)}, "augment": "altflip"}),
    ],
)
def test_the_named_recipes_hold_it(name, precision, changes):
    recipe = get_recipe(name, precision=precision, batch_size=16, **changes)
    pieces = assemble(recipe, tiny.dataset(train=64))
    variables = [*pieces.model.variables, *pieces.optimizer.variables]
    before = bits(variables)
    check_step(
        pieces.model,
        pieces.optimizer,
        batches=pieces.batches,
        loss_fn=pieces.loss_fn,
        freeze=pieces.freeze,
    )
    assert bits(variables) == before


def test_all_is_put_back_after_a_fault_too():
    model = tiny.tiny_cnn(batch_norm_momentum=0.8, dropout=0.3)
    optimizer = Forgetful(0.05, momentum=0.9, weight_decay=0.1)
    train_step = make_train_step(model, optimizer)
    for images, labels in tiny.batches().dataset(0, 3):
        train_step(images, labels)
    variables = [*model.variables, *optimizer.variables]
    before = bits(variables)
    found = faults(model, optimizer)
    assert [text.partition(" does")[0] for text in found] == ["weight_decay=0.1"]
    assert bits(variables) == before
    assert (optimizer.weight_decay, optimizer.l2) == (0.1, 0.0)


class Forgetful(SGD):
    """An optimiser that takes a weight decay and does nothing with it."""

    def _apply_weight_decay(self, variables):
        pass


class Unscaled(keras.optimizers.LossScaleOptimizer):
    """A loss-scaling optimiser that does not scale the loss, and unscales the gradients."""

    def scale_loss(self, loss):
        return loss


class Deaf(L.Layer):
    """Weights behind a stopped gradient, and some that nobody uses."""

    def build(self, shape):
        self.used = self.add_weight(shape=(shape[-1],), name="used")
        self.unused = self.add_weight(
            shape=(shape[-1],), name="unused", regularizer=keras.regularizers.L2(0.1)
        )

    def call(self, x):
        return x * (1 + tf.stop_gradient(self.used))


class Cut(L.Layer):
    """Passes values on, and no gradient back."""

    def call(self, x):
        return tf.stop_gradient(x)


def test_a_variable_without_a_gradient():
    found = faults(small(L.Dense(4, name="dead"), Cut(), Deaf(name="deaf")))
    assert found == [
        "only its own regulariser gives a gradient to 'deaf/unused'",
        "no gradient reaches 'dead/kernel', 'dead/bias', 'deaf/used'",
    ]


@pytest.mark.usefixtures("eagerly")
def test_a_gradient_of_zeros():
    # No input of the rectifier is above 0, so that nothing comes through from either side.
    dying = L.Dense(4, name="dying", bias_initializer=keras.initializers.Constant(-1e6))
    found = faults(small(dying, L.ReLU(), L.Dense(4, name="after")))
    assert found == ["the gradient of 'dying/kernel', 'dying/bias', 'after/kernel' is 0"]


@pytest.mark.usefixtures("eagerly")
def test_nothing_to_train_by_and_nothing_finite():
    inputs = keras.Input(SHAPE)
    model = keras.Model(inputs, Cut()(L.Dense(10)(L.Flatten()(inputs))), name="small")
    assert faults(model) == ["no gradient reaches any variable"]
    model = small()
    model.layers[-1].bias.assign(np.full(10, np.nan))
    assert faults(model) == ["the loss of the first images is nan"]

    def rough(labels, outputs):
        return cross_entropy()(labels, outputs) + tf.sqrt(tf.reduce_sum(0 * outputs, -1))

    found = faults(small(), loss_fn=rough)
    assert found == ["the gradient of 'logits/kernel', 'logits/bias' is not finite"]


@pytest.mark.usefixtures("eagerly")
def test_zeros_at_first_are_no_fault():
    # The last layer lets no gradient through before its own first update, nor that one before the
    # learning rate has risen from 0.
    model = small(L.Dense(8, activation="tanh"))
    model.layers[-1].kernel.assign(np.zeros((8, 10)))
    passes(model, SGD(Cosine(0.1, 2000, warmup_steps=500), momentum=0.9))


@pytest.mark.usefixtures("eagerly")
def test_what_does_not_move():
    model = small()
    assert faults(model, keras.optimizers.SGD(0.0)) == [
        "the learning rate is 0 from the first step to the millionth"
    ]
    still = SGD(0.1, learning_rate_scales={"bias": 0.0})
    assert faults(model, still) == ["no step moves 'logits/bias', though there is a gradient"]
    passes(model, SGD(0.1, learning_rate_scales={"bias": 0.0}), at_rest=["logits/bias"])
    passes(model, SGD(0.1), freeze={"bias": 0})


@pytest.mark.usefixtures("eagerly")
def test_batch_norm_that_rests_in_training():
    frozen = L.BatchNormalization(name="frozen")
    model = small(L.Dense(4), L.BatchNormalization(momentum=1.0, name="slow"), frozen)
    frozen.trainable = False
    named = ", ".join(
        f"'{layer}/moving_{name}'" for layer in ("slow", "frozen") for name in ("mean", "variance")
    )
    assert faults(model) == [f"BatchNormalization's statistics {named} rest in training"]
    passes(model, at_rest=["slow", "frozen"])


def own_step(model, optimizer, *, training=True, penalties=True, scaled=True):
    """A training step as people write it."""

    @tf.function
    def train_step(images, labels):
        with tf.GradientTape() as tape:
            outputs = model(images, training=training)
            losses = cross_entropy()(labels, outputs)
            loss = tf.reduce_mean(losses)
            if penalties:
                loss += tf.add_n(model.losses)
            target = optimizer.scale_loss(loss) if scaled else loss
        gradients = tape.gradient(target, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        count = tf.cast(tf.shape(images)[0], tf.float32)
        return Sums(loss * count, tf.zeros([]), count)

    return train_step


def own_eval_step(model):
    return tf.function(lambda images, labels: model(images, training=True))


@pytest.mark.usefixtures("eagerly")
def test_a_step_of_ones_own():
    model = tiny.tiny_mlp(l2=1e-3)
    optimizer = SGD(0.05)
    passes(model, optimizer, train_step=own_step(model, optimizer))
    [fault] = faults(model, optimizer, train_step=own_step(model, optimizer, penalties=False))
    assert re.fullmatch(
        r"regularisation does not reach the loss: it is [\d.]+, and [\d.]+ is due", fault
    )
    with pytest.raises(ConfigError, match="train_step must return the Sums of its batch, not None"):
        check_step(model, optimizer, batches=some_batches(), train_step=lambda *batch: None)


@pytest.mark.usefixtures("eagerly")
def test_a_step_in_the_wrong_mode():
    model = small(L.Dense(4, kernel_regularizer="l2"), L.BatchNormalization(name="norm"))
    optimizer = SGD(0.05)
    # Its loss is another one, with the penalties in it.
    found = faults(model, optimizer, train_step=own_step(model, optimizer, training=False))
    assert found == [
        "BatchNormalization's statistics 'norm/moving_mean', 'norm/moving_variance' rest in "
        "training"
    ]


def test_all_that_fails_is_named():
    model = small(
        L.Dense(4, name="dead"),
        Cut(),
        L.Dense(4, name="penalised", kernel_regularizer="l2"),
        L.BatchNormalization(name="still", momentum=1.0, center=False, scale=False),
        L.BatchNormalization(name="norm", center=False, scale=False),
    )
    optimizer = Forgetful(0.05, weight_decay=0.1, no_decay=["dead", "logits"])
    train_step = own_step(model, optimizer, penalties=False)
    found = faults(model, optimizer, train_step=train_step, eval_step=own_eval_step(model))
    assert found[0].startswith("regularisation does not reach the loss: it is ")
    assert found[1:] == [
        "no gradient reaches 'dead/kernel', 'dead/bias'",
        "BatchNormalization's statistics 'still/moving_mean', 'still/moving_variance' rest in "
        "training",
        "evaluation changes 'norm/moving_mean', 'norm/moving_variance'",
        "weight_decay=0.1 does not reach 'penalised/kernel', 'penalised/bias'",
    ]


@pytest.mark.usefixtures("eagerly")
def test_a_model_that_hides_its_losses():
    class Hiding(keras.Model):
        @property
        def losses(self):
            return []

    inputs = keras.Input(SHAPE)
    outputs = L.Dense(10, kernel_regularizer="l2")(L.Flatten()(L.Rescaling(1 / 255)(inputs)))
    [fault] = faults(Hiding(inputs, outputs))
    assert fault.startswith("regularisation does not reach the loss")


@pytest.mark.usefixtures("eagerly")
def test_losses_that_layers_add_are_due_too():
    model = small(L.Dense(4, activity_regularizer="l2"))
    passes(model)
    optimizer = SGD(0.05)
    [fault] = faults(model, optimizer, train_step=own_step(model, optimizer, penalties=False))
    assert fault.startswith("regularisation does not reach the loss")


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize(
    ("optimizer", "fault"),
    [
        (lambda: SGD(0.01, momentum=0.9, weight_decay=5e-4), ""),
        (lambda: SGD(0.01, l2=5e-4, weight_decay=5e-4, no_decay=["bias"]), ""),
        (lambda: keras.optimizers.AdamW(1e-3), ""),
        (lambda: SGD(0.01, momentum=0.9, gradient_accumulation_steps=2, l2=0.1), ""),
        (
            lambda: Forgetful(0.01, l2=5e-4, weight_decay=5e-4, no_decay=["bias"]),
            "weight_decay=0.0005 does not reach 'logits/kernel'",
        ),
        (
            lambda: SGD(0.01, l2=0.1, no_decay=["bias", "kernel"]),
            "l2=0.1 is for no variable that is trained",
        ),
    ],
    ids=["both", "two decays", "adamw", "accumulated", "forgetful", "for none"],
)
def test_weight_decay(optimizer, fault):
    model = small()
    if fault:
        assert faults(model, optimizer()) == [fault]
    else:
        passes(model, optimizer())


@pytest.mark.usefixtures("eagerly")
def test_muon_leaves_its_kernels_alone_on_purpose():
    model = tiny.tiny_cnn()
    passes(model, Muon(0.1, l2=0.01, weight_decay=0.01))


def half(**kwargs):
    return tiny.tiny_mlp(dtype_policy="mixed_float16", **kwargs)


def test_a_loss_that_is_not_scaled():
    [fault] = faults(half(), Unscaled(SGD(0.05)))
    # 2**-15
    assert fault == (
        "loss scaling does not reach the update: weights move 3.1e-05 times as far as they should"
    )


@pytest.mark.usefixtures("eagerly")
def test_loss_scaling():
    # Too high at first, as it may be: the steps that overflow are no fault.
    high = keras.optimizers.LossScaleOptimizer(SGD(0.05), initial_scale=2.0**30)
    passes(half(), high)
    assert float(high.dynamic_scale) == 2.0**30
    model, optimizer = half(l2=1e-3), scale_for("mixed_float16", SGD(0.05))
    [fault] = faults(model, optimizer, train_step=own_step(model, optimizer, scaled=False))
    assert fault.startswith("loss scaling does not reach the update")
    passes(tiny.tiny_mlp(), SGD(0.05, loss_scale_factor=256.0))


def test_under_xla_and_layer_by_layer():
    passes(small(), SGD(0.05, weight_decay=0.1), jit_compile=True)
    passes(small(L.BatchNormalization()), fused=False)


@pytest.mark.parametrize("value", ["bias", [""], [3], ["("], None])
def test_bad_patterns(value):
    with pytest.raises(ConfigError, match="at_rest must be a list") as caught:
        check_step(small(), SGD(0.1), batches=tiny.batches(), at_rest=value)
    assert repr(value) in str(caught.value)


def test_batches_that_do_not_fit():
    model = small(classes=5)
    with pytest.raises(DataError, match="labels must be from 0 to 4"):
        check_step(model, SGD(0.1), batches=tiny.batches())
    with pytest.raises(DataError, match="images must be"):
        check_step(tiny.linear(), SGD(0.1), batches=tiny.batches())
    with pytest.raises(ConfigError, match="freeze must match"):
        check_step(small(), SGD(0.1), batches=tiny.batches(), freeze={"nothing": 0})
