"""Loss, accuracy and confusion matrix of any model, checked against NumPy and Keras."""

import keras
import numpy as np
import pytest
import tiny

from cifarflow.data.splits import Split
from cifarflow.errors import ConfigError, DataError
from cifarflow.evaluation.evaluate import evaluate_model
from cifarflow.evaluation.predict import predict, softmax

DATA = tiny.dataset().test


def anybodys(activation=None):
    """A net without a scaling layer, of integers as Keras gives them to it."""
    inputs = keras.Input(tiny.SHAPE, dtype="uint8")
    x = keras.layers.Conv2D(4, 3, kernel_initializer=keras.initializers.HeNormal(1))(inputs / 255)
    x = keras.layers.GlobalAveragePooling2D()(x)
    layer = keras.layers.Dense(10, activation, kernel_initializer=keras.initializers.HeNormal(2))
    return keras.Model(inputs, layer(x))


@pytest.mark.parametrize("make", [tiny.tiny_cnn, anybodys])
def test_what_keras_says(make):
    model = make()
    found = evaluate_model(model, DATA, num_classes=10, batch_size=7)
    logits = np.asarray(model(DATA.images))
    losses = keras.losses.sparse_categorical_crossentropy(DATA.labels, logits, from_logits=True)
    assert found.loss == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert found.accuracy == np.mean(logits.argmax(-1) == DATA.labels)
    assert np.allclose(found.probabilities, softmax(logits), atol=1e-6)
    for true in range(10):
        chosen = logits[DATA.labels == true].argmax(-1)
        assert found.confusion_matrix[true].tolist() == np.bincount(chosen, minlength=10).tolist()


def test_a_softmax_at_the_end_changes_nothing():
    for pair in (
        (tiny.tiny_cnn(), tiny.tiny_cnn(softmax=True)),
        (anybodys(), anybodys("softmax")),
    ):
        logits, probabilities = (evaluate_model(model, DATA) for model in pair)
        assert probabilities.loss == pytest.approx(logits.loss, rel=1e-5)
        assert np.array_equal(probabilities.confusion_matrix, logits.confusion_matrix)
        assert np.allclose(probabilities.probabilities, logits.probabilities, atol=1e-6)


def test_a_probability_of_nothing_is_no_infinite_loss():
    model = tiny.linear(classes=2, use_bias=True, kernel_initializer="zeros", activation="softmax")
    model.layers[-1].bias.assign([200.0, -200.0])
    images = np.zeros((2, 2, 2, 3), np.uint8)
    found = evaluate_model(model, (images, np.array([0, 1])))
    assert found.loss == pytest.approx(126 * np.log(2) / 2)
    # Logits say how small it is.
    logits = tiny.linear(classes=2, use_bias=True, kernel_initializer="zeros")
    logits.layers[-1].bias.assign([200.0, -200.0])
    assert evaluate_model(logits, (images, np.array([0, 1]))).loss == pytest.approx(200)


def test_test_time_augmentation():
    model = tiny.tiny_cnn()
    found = evaluate_model(model, DATA, tta="mirror")
    assert np.array_equal(found.probabilities, softmax(predict(model, DATA.images, tta="mirror")))
    found = evaluate_model(model, DATA, tta="mirror", tta_share=0.25)
    outputs = predict(model, DATA.images, tta="mirror", tta_share=0.25)
    assert np.array_equal(found.probabilities, softmax(outputs))
    assert not np.array_equal(outputs, predict(model, DATA.images, tta="mirror"))


def test_what_does_not_fit():
    model = tiny.tiny_mlp()
    with pytest.raises(ConfigError, match="model must have the data's 3 classes, not 10"):
        evaluate_model(model, DATA, num_classes=3)
    with pytest.raises(ConfigError, match="the label 11 among them, not 10"):
        evaluate_model(model, (DATA.images[:1], np.array([11])))
    with pytest.raises(DataError, match=r"\[N, 8, 8, 3\] uint8 for this model, not \[1, 9, 8, 3\]"):
        evaluate_model(model, (np.zeros((1, 9, 8, 3), np.uint8), np.array([0])))
    with pytest.raises(DataError, match="images must hold at least one image, not 0"):
        evaluate_model(model, Split(DATA.images[:0], DATA.labels[:0]))
    with pytest.raises(DataError, match=r"must be equally many, not \[3, 8, 8, 3\] and \[2\]"):
        evaluate_model(model, (DATA.images[:3], DATA.labels[:2]))
    with pytest.raises(DataError, match=r"labels must be in 0\.\.9, not -1"):
        evaluate_model(model, (DATA.images[:1], np.array([-1])))
    for examples in (DATA.images[:3], 7, (DATA.images,)):
        with pytest.raises(DataError, match="examples must be images and labels, not"):
            evaluate_model(model, examples)
    with pytest.raises(ConfigError, match="tta must be one of"):
        evaluate_model(model, DATA, tta="all")
    inputs, one = keras.Input(tiny.SHAPE), (DATA.images[:1], DATA.labels[:1])
    maps = keras.Model(inputs, keras.layers.Conv2D(2, 3)(inputs))
    with pytest.raises(ConfigError, match=r"must give \[B, classes\] .*, not \[1, 6, 6, 2\]"):
        evaluate_model(maps, one)
