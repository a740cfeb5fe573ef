"""Small images, models and data sets that train in milliseconds."""

import keras
import numpy as np

from cifarflow.data.pipeline import ArrayBatches
from cifarflow.data.splits import Dataset, Split
from cifarflow.models.cnn import cnn
from cifarflow.models.mlp import mlp

SHAPE = (8, 8, 3)
NAMES = tuple("abcdefghij")
# What makes a recipe train in a moment; the model is the mlp.
MLP = {"model": "mlp", "model_options": {"units": (8,)}, "precision": "float32"}


def split(count, seed=0):
    """Images whose brightness tells the class, in noise: there is something to learn."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 10).astype(np.int32)
    images = rng.integers(0, 60, (count, *SHAPE)) + labels[:, None, None, None] * 19
    return Split(images.astype(np.uint8), labels)


def dataset(train=64, validation=20, test=30, name="tiny"):
    return Dataset(name, split(train), split(validation, 1), split(test, 2), NAMES, "generated")


def batches(count=64, batch_size=8, **kwargs):
    data = split(count)
    return ArrayBatches(data.images, data.labels, batch_size=batch_size, **kwargs)


def tiny_mlp(**kwargs):
    return mlp(**{"image_shape": SHAPE, "units": (8,), "seed": 1, **kwargs})


def tiny_cnn(**kwargs):
    options = {"filters": (4,), "kernel_size": 3, "dense_units": 8}
    return cnn(**{"image_shape": SHAPE, **options, "seed": 1, **kwargs})


def linear(classes=3, **kwargs):
    """Raw pixels times a matrix: a model that NumPy can train as well."""
    inputs = keras.Input((2, 2, 3))
    x = keras.layers.Flatten()(inputs)
    return keras.Model(inputs, keras.layers.Dense(classes, **kwargs)(x))


def weights(model):
    return [np.asarray(variable) for variable in model.variables]
