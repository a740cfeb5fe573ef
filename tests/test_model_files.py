"""`.keras` files that anybody may have written: models, and all else refused in one line."""

import io
import json
import tracemalloc
import zipfile

import h5py
import keras
import numpy as np
import pytest
import tiny

from cifarflow.errors import DataError
from cifarflow.evaluation.evaluate import evaluate_model
from cifarflow.evaluation.model_files import load_model_file, read_class_names
from cifarflow.evaluation.predict import predict
from cifarflow.models.resnet import resnet

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
DATA = tiny.dataset().test


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A sound file, and the model that is in it."""
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    model = tiny.tiny_cnn(dtype_policy="mixed_bfloat16", dropout=0.1, l2=1e-4)
    model.compile("sgd", "mse")
    model.save(path)
    return path, model


@pytest.fixture
def rewritten(saved, tmp_path):
    """A function that writes the file again with other members; None leaves one out."""

    def write(method=zipfile.ZIP_STORED, **changes):
        path = tmp_path / "other.keras"
        with zipfile.ZipFile(saved[0]) as whole, zipfile.ZipFile(path, "w", method) as archive:
            members = {name: whole.read(name) for name in whole.namelist()}
            names = {"config": "config.json", "weights": "model.weights.h5"}
            members.update({names.get(name, name): data for name, data in changes.items()})
            for name, data in members.items():
                if data is not None:
                    archive.writestr(name, data)
        return path

    return write


def config_of(path):
    with zipfile.ZipFile(path) as archive:
        return archive.read("config.json").decode()


def refused(path, match):
    """The line, once it is known to be one and that nothing large was allocated."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=match) as caught:
            load_model_file(path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 700
    assert repr(str(path)) in line
    return line


def test_it_is_the_same_model(saved):
    path, model = saved
    loaded = load_model_file(str(path))
    assert np.array_equal(predict(loaded, DATA.images), predict(model, DATA.images))
    assert evaluate_model(loaded, DATA).loss == evaluate_model(model, DATA).loss
    assert not loaded.compiled
    assert read_class_names(path) is None
    # What was looked at beforehand is not initialised when somebody else is done.
    with keras.StatelessScope():
        pass


@keras.saving.register_keras_serializable(package="tests")
class Doubled(keras.layers.Layer):
    def call(self, x):
        return 2 * x


def test_models_of_others(tmp_path):
    inputs = keras.Input((8, 8, 3), dtype="uint8")
    x = keras.layers.Flatten()(Doubled()(keras.layers.Rescaling(1 / 255)(inputs)))
    inner = resnet(image_shape=(8, 8, 3), depth=6, widths=(4, 8))
    for number, model in enumerate(
        (
            keras.Model(inputs, keras.layers.Dense(10, "softmax")(x)),
            keras.Sequential(
                [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(10)]
            ),
            # A model within.
            keras.Sequential([keras.Input((8, 8, 3)), inner]),
        )
    ):
        path = tmp_path / f"{number}.keras"
        model.save(path)
        assert np.array_equal(
            predict(load_model_file(path), DATA.images), predict(model, DATA.images)
        )


def test_files_that_are_none(tmp_path, saved):
    refused(tmp_path / "nowhere.keras", "there is no model file")
    (tmp_path / "folder.keras").mkdir()
    refused(tmp_path / "folder.keras", "cannot be loaded: .*directory")
    (tmp_path / "x.h5").write_bytes(b"")
    refused(tmp_path / "x.h5", "must be a .keras file")
    for data in (b"", b"no zip", b"PK\3\4" + bytes(100), saved[0].read_bytes()[:-100]):
        (tmp_path / "x.keras").write_bytes(data)
        refused(tmp_path / "x.keras", "it is no .keras file, or cut short: ")
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    (tmp_path / "x.npz").rename(tmp_path / "x.keras")
    refused(tmp_path / "x.keras", "it is no .keras file: it has no config.json")
    with (tmp_path / "x.keras").open("wb") as file:
        file.truncate(10**10)  # sparse: takes no room on disk
    refused(tmp_path / "x.keras", "it has 10000000000 bytes, expected at most")


def test_archives_that_claim_or_hide(rewritten, saved):
    refused(rewritten(zipfile.ZIP_DEFLATED, bomb=bytes(10**6)), "a member is compressed")
    refused(rewritten(**{"assets/x.txt": b"x"}), "a member 'assets/x.txt', which no classifier")
    refused(rewritten(**{"../x": b"x"}), "a member '../x', which")
    refused(rewritten(weights=None), "it has no model.weights.h5")
    refused(rewritten(weights=b"none"), "cannot be loaded: ")
    refused(rewritten(config=b"{"), "cannot be loaded: ")
    refused(rewritten(config=b"[]"), "what it holds is no model|cannot be loaded")
    refused(rewritten(config=b'{"a": ' * 60 + b"1" + b"}" * 60), "nested more than 50 deep")
    refused(rewritten(config=b" " * 10_000_001), "its config.json has 10000001 bytes")
    damaged = bytearray(saved[0].read_bytes())
    with zipfile.ZipFile(saved[0]) as archive:
        place = archive.getinfo("model.weights.h5").header_offset
    damaged[place + 3000] ^= 1
    path = rewritten()
    path.write_bytes(damaged)
    refused(path, "Bad CRC-32|cut short")


def hdf5(**options):
    data = io.BytesIO()
    with h5py.File(data, "w") as file:
        for name, make in options.items():
            make(file, name)
    return data.getvalue()


def test_weights_that_are_not_there(rewritten, tmp_path):
    def bomb(file, name):
        file.create_dataset(name, (10**5, 10**5), "f4", chunks=(10**4, 10**4), compression="gzip")

    def late(file, name):
        file.create_dataset(name, (10**5, 10**5), "f4")

    def outside(file, name):
        (tmp_path / "secret").write_bytes(bytes(100))
        file.create_dataset(name, (10,), "f4", external=[(str(tmp_path / "secret"), 0, 40)])

    def elsewhere(file, name):
        file[name] = h5py.ExternalLink("other.h5", "/x")

    def texts(file, name):
        file.create_dataset(name, (2,), h5py.string_dtype())

    for make, match in (
        (bomb, "'/x' claims 40000000000 bytes it has not"),
        (late, "'/x' claims 40000000000 bytes it has not"),
        (outside, "'/x' is not within the file"),
        (elsewhere, "its weights have a link 'x'"),
        (texts, "'/x' is not within the file"),
    ):
        refused(rewritten(weights=hdf5(x=make)), match)


def test_more_arrays_than_any_net_and_a_loop(rewritten, monkeypatch):
    def loop(file, name):
        group = file.create_group(name)
        group[name] = group

    monkeypatch.setattr("cifarflow.evaluation.model_files._MOST_ARRAYS", 3)
    refused(rewritten(), "it holds more than 3 arrays")
    refused(rewritten(weights=hdf5(x=loop)), "it holds more than 3 arrays")


def test_layers_that_claim_what_is_not_there(rewritten, saved):
    config = config_of(saved[0])
    assert '"units": 10' in config
    huge = config.replace('"units": 10', '"units": 1000000000')
    refused(rewritten(config=huge.encode()), r"its layers claim \d{11} bytes of weights, it has")
    inputs = keras.Input((8, 8, 3))
    large = keras.layers.UpSampling2D(20_000)(inputs)
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(large))
    text = json.dumps(keras.saving.serialize_keras_object(keras.Model(inputs, outputs)))
    refused(rewritten(config=text.encode()), "makes 76800000000 numbers of an image")


def test_code_and_unknown_layers(rewritten, saved, tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Lambda(lambda x: x[:, 0, 0])])
    model.save(tmp_path / "code.keras")
    assert "ambda" in refused(tmp_path / "code.keras", "cannot be loaded: ")
    config = config_of(saved[0])
    flatten = '"module": "keras.layers", "class_name": "Flatten"'
    unknown = config.replace(flatten, '"module": "mine", "class_name": "Nothing"')
    assert unknown != config
    refused(rewritten(config=unknown.encode()), "its class 'Nothing' is not known: register it, by")
    other = json.dumps(keras.saving.serialize_keras_object(keras.losses.MeanSquaredError()))
    refused(rewritten(config=other.encode()), "what it holds is no model")
    # Weights of another model.
    thinner = config.replace('"filters": 4', '"filters": 3')
    assert thinner != config
    refused(rewritten(config=thinner.encode()), "cannot be loaded: ")


def test_models_of_something_else(tmp_path):
    given = keras.Input((5,))
    image = keras.Input((8, 8, 3))
    flat = keras.layers.Flatten()(image)
    for model, match in (
        (keras.Model(given, keras.layers.Dense(3)(given)), r"not \[None, 5\] to \[None, 3\]"),
        (keras.Model(image, keras.layers.Conv2D(2, 1)(image)), r"to \[None, 8, 8, 2\]"),
        (keras.Model(image, keras.layers.Dense(1)(flat)), r"to \[None, 1\]"),
        (keras.Model([image, given], keras.layers.Dense(3)(flat)), "must be a model from images"),
    ):
        model.save(tmp_path / "x.keras")
        refused(tmp_path / "x.keras", match)
        (tmp_path / "x.keras").unlink()


@pytest.mark.parametrize("text", [b"", b"one\n", b"a\nb\x1b[31m\n", b"\xff\n\xff\n", b"a\n\nb\n"])
def test_class_names_that_are_none(rewritten, text):
    with pytest.raises(DataError, match="has no readable class names: "):
        read_class_names(rewritten(**{"labels.txt": text}))


def test_class_names(rewritten, tmp_path):
    path = rewritten(**{"labels.txt": "cat\nde\u0300ja\n".encode()})
    assert read_class_names(path) == ("cat", "de\u0300ja")
    load_model_file(path)
    (tmp_path / "x").write_bytes(b"x" * 100)
    assert read_class_names(tmp_path / "x") is None
    with pytest.raises(DataError, match=r"class names: its labels\.txt has 1000001"):
        read_class_names(rewritten(**{"labels.txt": bytes(1_000_001)}))
