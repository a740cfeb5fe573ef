"""The loop against `model.fit`: same weights, same batches, same losses."""

import keras
import numpy as np
import pytest

from cifarflow.data.pipeline import ArrayBatches
from cifarflow.models.cnn import cnn
from cifarflow.models.mlp import mlp
from cifarflow.optimizers.sgd import SGD
from cifarflow.training.hooks import Every
from cifarflow.training.loop import train

STEPS = 50
# BatchNorm as in the lab's section 4.2.  Dropout is off: its masks depend on how often a layer's
# seed was used, which differs between the two ways of tracing.
BUILDERS = {
    "mlp": lambda: mlp(seed=1),
    "cnn": lambda: cnn(seed=1),
    "batchnorm": lambda: cnn(batch_norm_momentum=0.75, seed=1),
    "l2": lambda: mlp(units=(64,), l2=1e-2, seed=1),
}


class BatchLosses(keras.callbacks.Callback):
    """Keras reports the mean over the epoch so far; this takes it apart again."""

    def __init__(self):
        super().__init__()
        self.losses = []
        self._before = 0.0

    def on_train_batch_end(self, batch, logs=None):
        total = logs["loss"] * (batch + 1)
        self.losses.append(total - self._before)
        self._before = total


# Keras's own SGD rounds differently, in the last digit.  Through BatchNorm and max pooling over
# regions of equal pixels even that much is a different run: two `fit`s whose first kernel differs
# by 1e-7 of itself are 3e-3 apart in the loss after two steps.  So there both sides use our SGD and
# Keras's own layers; that the fused ones give equal gradients is in test_fusion.
@pytest.mark.parametrize(
    ("name", "keras_optimizer"),
    [(name, False) for name in BUILDERS] + [("mlp", True), ("cnn", True), ("l2", True)],
)
def test_losses_of_the_first_steps_agree_with_fit(name, keras_optimizer, some_images):
    images, labels = some_images
    batches = ArrayBatches(images, labels, batch_size=32, seed=3)

    fitted = BUILDERS[name]()
    kwargs = {"momentum": 0.9, "nesterov": True}
    if keras_optimizer:
        schedule = keras.optimizers.schedules.InverseTimeDecay(0.01, 1, 1e-6)
        optimizer = keras.optimizers.SGD(schedule, **kwargs)
    else:
        optimizer = SGD(0.01, decay=1e-6, **kwargs)
    fitted.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    record = BatchLosses()
    fitted.fit(batches.dataset(0, STEPS), epochs=1, shuffle=False, verbose=0, callbacks=[record])

    looped = BUILDERS[name]()
    run = train(
        looped,
        SGD(0.01, decay=1e-6, **kwargs),
        batches=batches,
        fused=name != "batchnorm",
        total_steps=STEPS,
        log_every=Every(steps=1),
    )
    ours = [row["loss"] for row in run.history.rows]
    assert len(ours) == STEPS
    np.testing.assert_allclose(ours, record.losses, atol=1e-4, rtol=0)
    # The kernels must have moved, or the agreement says nothing.
    for a, b in zip(BUILDERS[name]().trainable_weights, looped.trainable_weights, strict=True):
        if a.path.endswith("kernel"):
            assert np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-3, a.path
    for a, b in zip(fitted.weights, looped.weights, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-4, err_msg=a.path)
