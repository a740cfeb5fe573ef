"""Real exports of two trained models: what is in the files, and what is no export at all.

Conversions take a second each: the files are made once, and all tests read them.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from tensorflow.core.protobuf import saved_model_pb2

from cifarflow import classifier as classifier_module
from cifarflow import export as export_module
from cifarflow.classifier import load_classifier, open_interpreter
from cifarflow.data.pipeline import ArrayBatches
from cifarflow.errors import ConfigError, DataError, WorkdirError
from cifarflow.evaluation.model_files import load_model_file
from cifarflow.evaluation.predict import predict, softmax
from cifarflow.export import DEFAULT_FORMATS, FILES, ExportError, as_float32, export_model
from cifarflow.models.speednet import set_whitening, speednet
from cifarflow.optimizers.sgd import SGD
from cifarflow.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
DATA = tiny.dataset(train=400, validation=200)
IMAGES = DATA.validation.images


def trained(model, rate):
    batches = ArrayBatches(DATA.train.images, DATA.train.labels, batch_size=20)
    train(model, SGD(rate, momentum=0.9), batches=batches, epochs=12)
    return model


def export(model, folder, **options):
    arguments = {"class_names": tiny.NAMES, "examples": DATA.validation}
    return export_model(model, folder, **{**arguments, **options})


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """By kind of model: the model, and what all its files came to."""
    folder = tmp_path_factory.mktemp("exports")
    fast = speednet(
        image_shape=tiny.SHAPE,
        widths=(8,),
        activation="gelu",
        dropout=0.1,
        dtype_policy="mixed_bfloat16",
        seed=0,
    )
    set_whitening(fast, DATA.train.images)
    lab = tiny.tiny_cnn(softmax=True, batch_norm_momentum=0.9, activation="silu")
    made = {}
    for name, model, formats in (
        ("speednet", trained(fast, 0.2), DEFAULT_FORMATS),
        ("cnn", trained(lab, 0.02), list(FILES)),
    ):
        said = []
        done = export(
            model,
            folder / name,
            representative=DATA.train.images,
            formats=formats,
            progress=said.append,
        )
        made[name] = (model, done, said)
    return made


@pytest.fixture(scope="module")
def cnn(exports):
    return exports["cnn"]


@pytest.mark.parametrize("name", ["speednet", "cnn"])
def test_every_file_is_as_good_as_the_model(exports, name):
    model, done, said = exports[name]
    formats = list(FILES) if name == "cnn" else list(DEFAULT_FORMATS)
    names = {path.name for path in done.directory.iterdir()}
    assert names == {*(FILES[kind] for kind in formats), "export.json"}
    assert [row.name for row in done.rows] == ["model", *formats]
    outputs = predict(model, IMAGES)
    expected = softmax(outputs) if name == "speednet" else outputs
    right = expected.argmax(-1) == DATA.validation.labels
    # It has learned something, or the rest would say little.
    assert right.mean() > 0.5
    for row in done.rows:
        found = expected
        if row.path is not None:
            assert row.path == done.directory / FILES[row.name]
            found = load_classifier(row.path)(IMAGES)
        assert row.accuracy == np.mean(found.argmax(-1) == DATA.validation.labels)
        assert row.agreement == np.mean(found.argmax(-1) == expected.argmax(-1))
        assert row.largest_difference == pytest.approx(np.abs(found - expected).max(), abs=1e-7)
        assert np.allclose(found.sum(-1), 1, atol=0.02)
        assert row.milliseconds > 0
    by_name = {row.name: row for row in done.rows}
    assert by_name["keras"].largest_difference == 0
    assert by_name["tflite_int8"].accuracy >= right.mean() - 0.015
    assert by_name["tflite_int8"].agreement >= 0.93
    exactly = 1e-5 if name == "cnn" else 0.03
    for kind in ("saved_model", "tflite"):
        assert by_name[kind].largest_difference < exactly
    assert said == [
        f"{row.name}: {row.megabytes:.2f} MB, accuracy {row.accuracy:.4f}" for row in done.rows[1:]
    ]
    lines = done.table().splitlines()
    assert "accuracy (200 images)" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["model", *formats]
    assert f"| {by_name['keras'].accuracy:.4f} | 1.0000 | 0.0000 |" in lines[3]
    written = json.loads((done.directory / "export.json").read_text())
    assert written["class_names"] == list(tiny.NAMES)
    assert written["image_shape"] == list(tiny.SHAPE)
    assert [row["accuracy"] for row in written["formats"]] == [row.accuracy for row in done.rows]


@pytest.mark.parametrize("name", ["speednet", "cnn"])
def test_a_keras_file_is_the_model_to_the_bit(exports, name):
    model, done, _ = exports[name]
    path = done.directory / "model.keras"
    for loaded in (keras.saving.load_model(path), load_model_file(path)):
        assert np.array_equal(predict(loaded, IMAGES), predict(model, IMAGES))
        assert not loaded.compiled


FRESH = """
import sys
sys.modules["cifarflow"] = sys.modules["keras"] = None  # whoever imports them fails
import numpy as np, tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
images = np.load(sys.argv[2])
found = loaded.signatures["serving_default"](images=tf.constant(images))
large = loaded.signatures["any_size"](images=tf.constant(images.repeat(3, 1).repeat(3, 2)))
arrays = {name: np.array(value.numpy().tolist()) for name, value in found.items()}
np.savez(sys.argv[3], large=large["probabilities"], **arrays)
"""


def test_a_saved_model_needs_nothing_of_ours(exports, tmp_path):
    _, done, _ = exports["speednet"]
    np.save(tmp_path / "images.npy", IMAGES)
    words = [done.directory / "saved_model", tmp_path / "images.npy", tmp_path / "out.npz"]
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, words)],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    expected = load_classifier(done.directory / "saved_model")(IMAGES)
    with np.load(tmp_path / "out.npz") as found:
        assert np.allclose(found["probabilities"], expected, atol=1e-6)
        assert found["label"].tolist() == expected.argmax(-1).tolist()
        names = [name.decode() for name in found["class"].tolist()]
        assert names == [tiny.NAMES[label] for label in expected.argmax(-1)]
        # Pixels made three times as large, and small again, are about the same.
        assert np.mean(found["large"].argmax(-1) == found["label"]) > 0.7


def test_int8_takes_pixels_as_they_are(cnn):
    _, done, _ = cnn
    path = done.directory / "model_int8.tflite"
    interpreter = open_interpreter(path.read_bytes())
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert (given["dtype"], given["quantization"]) == (np.uint8, (1.0, 0))
    assert (result["dtype"], result["quantization"]) == (np.uint8, (1 / 256, 0))
    kinds = {tensor["dtype"] for tensor in interpreter.get_tensor_details()}
    assert np.float32 not in kinds
    assert np.int8 in kinds
    half = open_interpreter((done.directory / "model_float16.tflite").read_bytes())
    assert np.float16 in {tensor["dtype"] for tensor in half.get_tensor_details()}
    # Nor does it matter how many there are at once.
    one_by_one = load_classifier(path, batch_size=1)(IMAGES[:9])
    assert np.array_equal(one_by_one, load_classifier(path, batch_size=4)(IMAGES[:9]))


def test_the_names_go_with_each_file(cnn, tmp_path):
    _, done, _ = cnn
    for name, file in FILES.items():
        copy = (shutil.copytree if name == "saved_model" else shutil.copy)(
            done.directory / file, tmp_path / file
        )
        classifier = load_classifier(copy)
        assert classifier.class_names == tiny.NAMES
        assert classifier.has_names
        assert classifier.image_shape == tiny.SHAPE
        assert classifier.kind == ("tflite" if file.endswith("tflite") else name)
    with zipfile.ZipFile(tmp_path / "model.tflite") as archive:
        assert archive.read("labels.txt").decode().split() == list(tiny.NAMES)


def test_a_model_in_float32_is_left_alone(exports):
    fast, lab = exports["speednet"][0], exports["cnn"][0]
    assert as_float32(lab) is lab
    exact = as_float32(fast)
    assert {layer.dtype_policy.name for layer in exact.layers} == {"float32"}
    assert all(np.array_equal(a, b) for a, b in zip(exact.weights, fast.weights, strict=True))
    outside = keras.Sequential([keras.Input((8, 8, 3)), fast])
    assert as_float32(outside).compute_dtype == "float32"
    assert np.allclose(predict(as_float32(outside), IMAGES), predict(exact, IMAGES), atol=1e-4)


# --- what is refused ------------------------------------------------------------------------


def test_nothing_is_overwritten(cnn, tmp_path):
    model, _, _ = cnn
    (tmp_path / "a file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path, tmp_path / "a file", tmp_path / "link"):
        with pytest.raises(WorkdirError, match="is there already: give a folder that is not"):
            export(model, path, formats=["keras"])
    with pytest.raises(WorkdirError, match=r"cannot write .*: Not a directory"):
        export(model, tmp_path / "a file" / "below", formats=["keras"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a file", "link"]


def test_bad_arguments(cnn, tmp_path):
    model, _, _ = cnn
    target = tmp_path / "out"
    dense = tiny.linear(10)
    for options, kind, match in (
        ({"formats": ["onnx"]}, ConfigError, "formats must be one of .*, not 'onnx'"),
        ({"formats": []}, ConfigError, r"formats must be one or more of .*, not \[\]"),
        ({"formats": ["keras"] * 2}, ConfigError, "formats must be one or more of"),
        ({"max_accuracy_loss": 2}, ConfigError, "max_accuracy_loss must be"),
        ({"class_names": ["a", "b"]}, ConfigError, "as many as the model's 10 classes, not 2"),
        ({"class_names": [1] * 10}, DataError, "class_names must be two printable names"),
        ({"examples": (IMAGES[:0], np.zeros(0, int))}, DataError, "examples must be images .*N >="),
        ({"examples": (IMAGES, np.full(200, 10))}, DataError, "labels must be from 0 to 9, not 10"),
        ({"examples": (IMAGES[:, :4], DATA.validation.labels)}, DataError, "examples must be"),
        ({"representative": IMAGES[:, :4]}, DataError, "representative must be images"),
        ({"representative": IMAGES / 255}, DataError, "images must be uint8"),
        ({"formats": ["tflite_int8"]}, ConfigError, "representative must be training images"),
        ({"model": keras.Sequential([dense.layers[1]])}, DataError, "must be a model from images"),
        ({"model": any_size()}, DataError, r"one size, not \[None, None, 3\]"),
    ):
        arguments = {"model": model, "formats": ["tflite_int8"], **options}
        with pytest.raises(kind, match=match):
            export(arguments.pop("model"), target, **arguments)
    assert list(tmp_path.iterdir()) == []


def any_size():
    inputs = keras.Input((None, None, 3))
    return keras.Model(inputs, keras.layers.Dense(10)(keras.layers.GlobalMaxPooling2D()(inputs)))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("keras", "keras gives other outputs, by up to"),
        ("saved_model", "saved_model gives other probabilities than the model in float32"),
        ("tflite_int8", "tflite_int8 has an accuracy of 0.0.* less"),
    ],
)
def test_a_file_that_is_off_does_not_stay(cnn, tmp_path, monkeypatch, name, match):
    model, done, _ = cnn
    sound = load_classifier(done.directory / "saved_model")

    def other(path):
        return type(sound)(
            **{**vars(sound), "function": lambda images: np.roll(sound(images), 1, -1)}
        )

    monkeypatch.setattr(export_module, "load_classifier", other)
    # What is written does not matter here.
    for write in ("_write_keras", "_write_saved_model", "_write_tflite"):
        monkeypatch.setattr(
            export_module._Writer, write, lambda self, path, *_: path.write_text("")
        )
    with pytest.raises(ExportError, match=match):
        export(model, tmp_path / "out", formats=[name], representative=IMAGES)
    assert list(tmp_path.iterdir()) == []
    # The names belong to it.
    sound = load_classifier(done.directory / "saved_model", class_names=tiny.NAMES[::-1])
    with pytest.raises(ExportError, match="has other class names than the model"):
        export(model, tmp_path / "out", formats=[name], representative=IMAGES)


def test_a_model_that_cannot_be_built_again(tmp_path):
    inputs = keras.Input(tiny.SHAPE)
    x = keras.layers.Lambda(lambda x: x, output_shape=tiny.SHAPE, dtype="mixed_bfloat16")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(x)))
    with pytest.raises(ExportError, match=r"the model cannot be converted: .*ambda") as caught:
        export(model, tmp_path / "out", formats=["tflite"])
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


# --- loading --------------------------------------------------------------------------------


def test_what_is_no_model(tmp_path, cnn):
    _, done, _ = cnn
    (tmp_path / "x.tflite").write_bytes(b"no model")
    (tmp_path / "cut.tflite").write_bytes((done.directory / "model.tflite").read_bytes()[:3000])
    (tmp_path / "x.pb").write_bytes(b"")
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "saved_model.pb").write_bytes(b"\x0a\xff")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "saved_model.pb").write_bytes(b"")
    for name, match in (
        ("nothing", "there is no model"),
        ("nothing.tflite", "there is no model"),
        ("nothing.keras", "there is no model file"),
        (".", "model must be a run's folder, a folder with a SavedModel, a .keras or a .tflite"),
        ("x.pb", "model must be a run's folder"),
        ("x.tflite", "it is no .tflite file"),
        ("cut.tflite", "cannot be loaded: "),
        ("graph", "cannot be loaded: "),
        ("empty", "cannot be loaded: it is none of TensorFlow 2"),
    ):
        with pytest.raises(DataError, match=match) as caught:
            load_classifier(tmp_path / name)
        assert str(caught.value).isprintable()
    with pytest.raises(DataError, match=r"not .*: did you mean '.*/model.keras'\?"):
        load_classifier(done.directory)
    with pytest.raises(ConfigError, match="class_names must be as many as the model's 10 classes"):
        load_classifier(done.directory / "model.tflite", class_names=["a", "b"])
    with pytest.raises(ConfigError, match="batch_size must be"):
        load_classifier(done.directory / "model.tflite", batch_size=0)
    classifier = load_classifier(done.directory / "model.tflite")
    for images in (IMAGES[:, :4], IMAGES / 255, IMAGES[:0]):
        with pytest.raises(DataError, match=r"images must be \[N, 8, 8, 3\] uint8, N >= 1"):
            classifier(images)


def test_models_without_names(tmp_path):
    model = tiny.tiny_mlp()
    model.save(tmp_path / "x.keras")
    classifier = load_classifier(tmp_path / "x.keras")
    assert classifier.class_names[:2] == ("class 0", "class 1")
    assert not classifier.has_names
    assert np.allclose(classifier(IMAGES), softmax(predict(model, IMAGES)))
    named = load_classifier(tmp_path / "x.keras", class_names=tiny.NAMES)
    assert (named.class_names, named.has_names) == (tiny.NAMES, True)
    any_size().save(tmp_path / "any.keras")
    with pytest.raises(DataError, match="must take images of one size, not"):
        load_classifier(tmp_path / "any.keras")


def save_module(path, function, **parts):
    module = tf.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    spec = tf.TensorSpec([None, 8, 8, 3], tf.float32, "pictures")
    signature = tf.function(function).get_concrete_function(spec)
    tf.saved_model.save(module, path, signatures={"serving_default": signature})


def test_saved_models_of_others(tmp_path):
    kernel = tf.Variable(np.random.default_rng(0).normal(0, 0.001, (192, 3)).astype(np.float32))

    def logits(pictures):
        return {"logits": tf.reshape(pictures, [-1, 192]) @ kernel}

    save_module(tmp_path / "x", logits, kernel=kernel)
    classifier = load_classifier(tmp_path / "x")
    expected = softmax(IMAGES.reshape(-1, 192).astype(np.float32) @ kernel.numpy())
    assert np.allclose(classifier(IMAGES), expected, atol=1e-5)
    assert classifier.class_names == ("class 0", "class 1", "class 2")
    # Weights that are not there.
    path = tmp_path / "x" / "saved_model.pb"
    parsed = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    for node in parsed.meta_graphs[0].object_graph_def.nodes:
        if node.HasField("variable"):
            node.variable.shape.dim[0].size = 10**12
    path.write_bytes(parsed.SerializeToString())
    with pytest.raises(DataError, match="it claims 12000000000000 bytes of weights, it has"):
        load_classifier(tmp_path / "x")


def test_saved_models_that_do_something_else(tmp_path):
    secret = str(tmp_path / "secret")

    def reads(pictures):
        return tf.zeros([tf.shape(pictures)[0], 3]) + tf.cast(
            tf.strings.length(tf.io.read_file(secret)), tf.float32
        )

    def writes(pictures):
        with tf.control_dependencies([tf.io.write_file(secret, "x")]):
            return tf.zeros([tf.shape(pictures)[0], 3])

    def saves(pictures):
        tf.raw_ops.SaveV2(prefix=secret, tensor_names=["x"], shape_and_slices=[""], tensors=[1.0])
        return tf.zeros([tf.shape(pictures)[0], 3])

    def shapes(pictures):
        return tf.reduce_sum(pictures)

    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer([1], [2]), default_value=0
    )
    for number, (function, match) in enumerate(
        (
            (lambda p: {"y": reads(p)}, "it does more than arithmetic, by 'ReadFile'"),
            (lambda p: {"y": writes(p)}, "it does more than arithmetic, by 'WriteFile'"),
            (lambda p: {"y": saves(p)}, "it does more than arithmetic, by 'SaveV2'"),
            (lambda p: {"y": shapes(p)}, r"from images \[B, H, W, C\] of one size to"),
        )
    ):
        path = tmp_path / str(number)
        save_module(path, function)
        with pytest.raises(DataError, match=match):
            load_classifier(path)
    save_module(tmp_path / "table", lambda p: {"y": p[:, 0, 0]}, table=table)
    with pytest.raises(DataError, match=r"it holds a table, which is filled as it is"):
        load_classifier(tmp_path / "table")
    # What keeps the variables may not be called by anything else.
    path = tmp_path / "3" / "saved_model.pb"
    parsed = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    library = parsed.meta_graphs[0].graph_def.library.function
    keeping = next(f.signature.name for f in library if "traced_save" in f.signature.name)
    other = next(f for f in library if "traced" not in f.signature.name)
    other.node_def.add(name="hidden", op="StatefulPartitionedCall").attr["f"].func.name = keeping
    path.write_bytes(parsed.SerializeToString())
    with pytest.raises(DataError, match="does more than arithmetic, by 'SaveV2'"):
        load_classifier(tmp_path / "3")
    assert not Path(secret).exists()
    tf.saved_model.save(tf.Module(), tmp_path / "none")
    with pytest.raises(DataError, match="it has no signature 'serving_default'"):
        load_classifier(tmp_path / "none")


def change_program(folder, change):
    path = folder / "saved_model.pb"
    parsed = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    change(parsed.meta_graphs[0])
    path.write_bytes(parsed.SerializeToString())


def rename(library, old, new):
    """Gives a function another name, and does so wherever it is called."""
    for function in library.function:
        if function.signature.name == old:
            function.signature.name = new
        for node in function.node_def:
            for value in node.attr.values():
                for call in (value.func, *value.list.func):
                    if call.name == old:
                        call.name = new


@pytest.fixture
def attack(tmp_path):
    """A SavedModel that writes a file, by a branch; the name of the branch, and the file."""
    written = tmp_path / "written"

    @tf.function(autograph=False)
    def writing():
        tf.raw_ops.WriteFile(filename=str(written), contents="x")
        return tf.constant(0.0)

    @tf.function(autograph=False)
    def nothing():
        return tf.constant(0.0)

    branches = [function.get_concrete_function() for function in (writing, nothing)]

    def classify(pictures):
        for branch in branches:
            branch.add_to_graph()
        (zero,) = tf.raw_ops.StatelessCase(
            branch_index=tf.cast(tf.reduce_sum(pictures) * 0, tf.int32),
            input=[],
            Tout=[tf.float32],
            branches=branches,
            output_shapes=[[]],
        )
        return {"y": tf.zeros([tf.shape(pictures)[0], 3]) + zero}

    save_module(tmp_path / "x", classify)
    return tmp_path / "x", branches[0].name.decode(), written


# Of what keeps the variables nothing is known but the name; by this the attack got through.
@pytest.mark.parametrize("name", ["__inference__traced_save_1", "__inference__traced_restore_1"])
def test_a_branch_that_writes_a_file(attack, name):
    folder, branch, written = attack
    change_program(folder, lambda graph: rename(graph.graph_def.library, branch, name))
    # It does so, if nobody looks.
    signature = tf.saved_model.load(folder).signatures["serving_default"]
    signature(pictures=tf.zeros([1, 8, 8, 3]))
    assert written.read_text() == "x"
    written.unlink()
    with pytest.raises(DataError, match="it does more than arithmetic, by 'WriteFile'"):
        load_classifier(folder)
    assert not written.exists()


@pytest.mark.parametrize(
    "op", ["SaveV2", "RestoreV2", "MergeV2Checkpoints", "AssignVariableOp", "DisableCopyOnRead"]
)
def test_a_branch_that_does_what_keeps_the_variables(attack, op):
    folder, _, _ = attack

    def change(graph):
        for function in graph.graph_def.library.function:
            for node in function.node_def:
                node.op = op if node.op == "WriteFile" else node.op

    change_program(folder, change)
    with pytest.raises(DataError, match=f"it does more than arithmetic, by '{op}'"):
        load_classifier(folder)


def test_what_keeps_the_variables_is_for_nobody(tmp_path):
    kernel = tf.Variable(tf.ones([192, 3]))
    path = tmp_path / "x" / "saved_model.pb"

    def logits(pictures):
        return {"y": tf.reshape(pictures, [-1, 192]) @ kernel}

    save_module(tmp_path / "x", logits, kernel=kernel)
    load_classifier(tmp_path / "x")
    whole = path.read_bytes()
    functions = saved_model_pb2.SavedModel.FromString(whole).meta_graphs[0].graph_def.library
    names = [function.signature.name for function in functions.function]
    (keeping,) = (name for name in names if "traced_save" in name)
    # TensorFlow is not even given it.
    program = classifier_module._checked_program(tmp_path / "x")
    given = saved_model_pb2.SavedModel.FromString(program).meta_graphs[0].graph_def.library
    left = [function.signature.name for function in given.function]
    assert left == [name for name in names if "traced" not in name]

    def from_the_objects(graph):
        graph.object_graph_def.nodes.add().bare_concrete_function.concrete_function_name = keeping

    def from_a_function(graph):
        graph.object_graph_def.nodes.add().function.concrete_functions.append(keeping)

    def from_a_saver(graph):
        graph.object_graph_def.concrete_functions[keeping].bound_inputs.append(0)

    def from_a_gradient(graph):
        graph.graph_def.library.gradient.add(function_name="f", gradient_func=keeping)

    def from_a_registered_gradient(graph):
        graph.graph_def.library.registered_gradients.add(
            registered_op_type="f", gradient_func=keeping
        )

    def from_a_nested_attribute(graph):
        other = next(
            f for f in graph.graph_def.library.function if "traced" not in f.signature.name
        )
        outer = other.node_def[0].attr["f"].func
        outer.attr["g"].list.func.add(name=keeping)

    for change in (
        from_the_objects,
        from_a_function,
        from_a_saver,
        from_a_gradient,
        from_a_registered_gradient,
        from_a_nested_attribute,
    ):
        path.write_bytes(whole)
        change_program(tmp_path / "x", change)
        with pytest.raises(DataError, match="it does more than arithmetic, by 'DisableCopyOnRead'"):
            load_classifier(tmp_path / "x")


# TensorFlow says of each that it has no state.
@pytest.mark.parametrize(
    "op",
    [
        *("ReadFile", "MatchingFiles", "ImmutableConst", "DebugIdentity", "DecodeProtoV2"),
        *("PyFuncStateless", "CacheDataset", "DatasetToGraphV2", "TPUPartitionedCall", "Abort"),
    ],
)
def test_operations_that_are_more_than_arithmetic(attack, op):
    folder, branch, _ = attack

    def change(graph):
        for function in graph.graph_def.library.function:
            # A function of that name makes it none of the program's own.
            if function.signature.name == branch:
                function.node_def[0].op = op
        graph.graph_def.library.function.add().signature.name = op

    change_program(folder, change)
    with pytest.raises(DataError, match=f"it does more than arithmetic, by '{op}'"):
        load_classifier(folder)


def test_loops_and_branches_are_arithmetic(tmp_path):
    def classify(pictures):
        rows = tf.map_fn(lambda one: tf.reduce_mean(one, [0, 1]), pictures)
        return {"y": tf.nn.softmax(tf.cond(tf.shape(rows)[0] > 1, lambda: rows, lambda: rows * 1))}

    save_module(tmp_path / "x", classify)
    expected = softmax(IMAGES.mean((1, 2)))
    assert np.allclose(load_classifier(tmp_path / "x")(IMAGES), expected, atol=1e-4)


def test_what_was_looked_through_is_what_is_loaded(tmp_path, monkeypatch):
    save_module(tmp_path / "x", lambda p: {"y": tf.nn.softmax(p[:, 0, 0])})
    real = tf.saved_model.load

    def load(folder):
        (tmp_path / "x" / "saved_model.pb").write_bytes(b"another by now")
        return real(folder)

    monkeypatch.setattr(tf.saved_model, "load", load)
    assert load_classifier(tmp_path / "x").image_shape == (8, 8, 3)


def test_a_tflite_file_that_claims_what_is_not_there(cnn, monkeypatch):
    path = cnn[1].directory / "model.tflite"
    monkeypatch.setattr("cifarflow.classifier._MOST_ELEMENTS", 100)
    with pytest.raises(DataError, match=r"its tensors hold .* numbers, expected at most 100"):
        load_classifier(path)
