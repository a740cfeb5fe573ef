"""Any trained model as one function: a run, a `.keras` file, a SavedModel or a `.tflite` file.

    classifier = load_classifier("runs/first")          # or model.keras, saved_model, model.tflite
    classifier.image_shape, classifier.class_names
    probabilities = classifier(images)                  # [N, H, W, C] uint8 -> [N, C] float32

All but a run's folder are what `export_model` writes; files of others do as well, as long as they
take images and give probabilities or logits.  A SavedModel is a program: one that does anything but
arithmetic is refused, and nothing of it is run before that is known.  TensorFlow is given what was
looked through, without the functions that keep the variables; it restores them without these.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework import op_def_registry

from cifarflow.errors import ConfigError, DataError, check_int
from cifarflow.evaluation.model_files import (
    LABELS_BYTES_LIMIT,
    LABELS_NAME,
    check_classifier,
    load_model_file,
    parse_labels,
    read_class_names,
)
from cifarflow.evaluation.predict import Predictor, are_probabilities, softmax
from cifarflow.models.layers import check_image_shape
from cifarflow.recipes.trained import check_class_names, load_trained
from cifarflow.untrusted import read_bytes, reading

SIGNATURE = "serving_default"
_FILE_BYTES_LIMIT = 1 << 31
# Of the tensors of one image.
_MOST_ELEMENTS = 1 << 28
# What a net's functions may hold beside pure arithmetic.
_HARMLESS = {
    *("VarHandleOp", "ReadVariableOp", "ResourceGather"),
    *("StatefulPartitionedCall", "PartitionedCall", "Placeholder"),
}
# TensorFlow does not count these as doing anything: they read files, write them, call Python or end
# the process, or they are for other machines or for training, and no net needs them.
_HARMFUL = {
    *("ReadFile", "MatchingFiles", "ImmutableConst", "GenerateVocabRemapping"),
    *("DecodeProtoV2", "EncodeProto", "PyFuncStateless", "Abort", "SdcaOptimizer"),
    *("Copy", "CopyHost", "SymbolicGradient", "MapDefun", "BatchFunction", "CheckPinned"),
}
_HARMFUL_KINDS = ("Debug", "TPU", "Xla", "Restore")
# Besides plain tensors: of a loop over an axis.  All else of a hidden content may do anything as it
# is read, as a Dataset does.
_LISTS = ("TensorList", "EmptyTensorList")
_HIDDEN = {types_pb2.DT_RESOURCE, types_pb2.DT_VARIANT}
# What the functions hold that keep and restore the variables, beside what is harmless.
_KEEPING = {"SaveV2", "RestoreV2", "MergeV2Checkpoints", "AssignVariableOp", "DisableCopyOnRead"}


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A trained model, however it was kept.

    Attributes:
      kind: "run", "keras", "saved_model" or "tflite".
      image_shape: (H, W, C) of the images it takes.
      class_names: the classes, by label.
      has_names: whether the names are the model's own; else they are "class 0", "class 1", ...
      note: what there is to say about it, such as that its run is not finished; mostly nothing.
      function: images [N, H, W, C] uint8 -> probabilities [N, num_classes] float32.
    """

    kind: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    has_names: bool
    note: str
    function: Callable[[np.ndarray], np.ndarray]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Returns the probabilities of images.

        Args:
          images: [N, H, W, C] uint8, N >= 1.

        Returns:
          [N, num_classes] float32.

        Raises:
          DataError: if the images are not of the shape and dtype that the model takes.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape or not len(images):
            wanted = ", ".join(map(str, self.image_shape))
            raise DataError(
                f"images must be [N, {wanted}] uint8, N >= 1, for this model, "
                f"not {list(images.shape)} {images.dtype}"
            )
        return self.function(images)


def load_classifier(
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    batch_size: int = 500,
) -> Classifier:
    """Loads a trained model, whichever way it was kept.

    Args:
      path: a run's folder, a folder with a SavedModel, a `.keras` or a `.tflite` file.
      class_names: the classes by label, in place of the model's own.
      batch_size: images a call at most; changes time and memory only.

    Raises:
      ConfigError: if batch_size is not a whole number >= 1, or the number of class_names is not
        that of the model's classes.
      DataError: if there is nothing of that kind, it is damaged, or it is no classifier of images
        of one size; or class_names are no names.
      WorkdirError, CheckpointError: see `load_trained`.
    """
    check_int("batch_size", batch_size)
    # By os.path and not by pathlib, which raises an error for a name that is too long.
    file = pathlib.Path(os.path.expanduser(path))
    note = ""
    if os.path.isfile(file / "recipe.json"):
        trained = load_trained(file)
        if not trained.is_finished:
            note = trained.describe()
        kind, shape = "run", trained.image_shape
        own: Sequence[str] | None = trained.class_names
        count, function = len(trained.class_names), _keras_function(trained.model, shape)
    elif os.path.isfile(file / "saved_model.pb"):
        kind, own = "saved_model", _saved_model_names(file)
        shape, count, function = _open_saved_model(file)
    elif file.suffix == ".tflite" and os.path.isfile(file):
        kind = "tflite"
        # Not a byte is looked at twice: what is checked is what is run.
        with reading(f"model file {str(file)!r}"):
            content = read_bytes(file, limit=_FILE_BYTES_LIMIT)
        shape, count, function = _open_tflite(content, f"model file {str(file)!r}")
        own = read_class_names(file)
    elif file.suffix == ".keras":
        model = load_model_file(file)
        (*shape_found,), count = check_classifier(model)
        if None in shape_found:
            raise DataError(
                f"model file {str(file)!r} must take images of one size, not {shape_found}"
            )
        kind, shape, own = "keras", check_image_shape(shape_found), read_class_names(file)
        function = _keras_function(model, shape)
    else:
        raise DataError(_no_model(file))
    names = check_class_names(class_names) if class_names is not None else own
    if names is not None and len(names) != count:
        raise ConfigError(
            f"class_names must be as many as the model's {count} classes, not {len(names)}"
        )

    def in_batches(images: np.ndarray) -> np.ndarray:
        parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
        return np.concatenate([function(part) for part in parts]).astype(np.float32)

    has_names = names is not None
    names = tuple(names or (f"class {label}" for label in range(count)))
    return Classifier(kind, shape, names, has_names, note, in_batches)


def _no_model(file: pathlib.Path) -> str:
    """What is wrong with a path that is no model."""
    if not os.path.exists(file):
        return f"there is no model {str(file)!r}"
    wanted = "a run's folder, a folder with a SavedModel, a .keras or a .tflite file"
    inside = [name for name in ("model.keras", "model.tflite") if os.path.isfile(file / name)]
    hint = f": did you mean {str(file / inside[0])!r}?" if inside else ""
    return f"model must be {wanted}, not {str(file)!r}{hint}"


# --- Keras --------------------------------------------------------------------------------


def _keras_function(model: Any, shape: tuple[int, int, int]) -> Callable[[np.ndarray], np.ndarray]:
    predictor = Predictor(model)
    return _normalised(predictor, shape)


def ends_in_probabilities(
    function: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int, int]
) -> bool:
    """Whether a model's outputs are probabilities, as seen from those for some noise.

    Args:
      function: images [N, H, W, C] uint8 -> outputs [N, num_classes].
      shape: (H, W, C).
    """
    noise = np.random.default_rng(0).integers(0, 256, (8, *shape))
    return are_probabilities(function(noise.astype(np.uint8)))


# --- SavedModel ---------------------------------------------------------------------------


def _open_saved_model(folder: pathlib.Path) -> tuple[tuple[int, int, int], int, Any]:
    name = f"SavedModel {str(folder)!r}"
    with reading(name, failing="cannot be loaded"), tempfile.TemporaryDirectory() as held:
        program = _checked_program(folder)
        # Not the folder itself, in which there may be another program by now.
        copy = pathlib.Path(held)
        (copy / "saved_model.pb").write_bytes(program)
        for part in ("variables", "assets"):
            if (folder / part).is_dir():
                (copy / part).symlink_to((folder / part).resolve())
        loaded = tf.saved_model.load(copy)
        if SIGNATURE not in loaded.signatures:
            raise ValueError(f"it has no signature {SIGNATURE!r}")
        signature = loaded.signatures[SIGNATURE]
        (given,) = signature.structured_input_signature[1].values()
        outputs = signature.structured_outputs
        key = "probabilities" if "probabilities" in outputs else next(iter(sorted(outputs)))
        shape, count = _check_signature(given.shape.as_list(), outputs[key].shape.as_list())

    def run(images: np.ndarray) -> np.ndarray:
        # `loaded` is named so that it lives as long: the signature does not keep its variables.
        assert loaded is not None
        batch = tf.cast(tf.constant(images), given.dtype)
        return np.asarray(signature(**{given.name: batch})[key], np.float32)

    return shape, count, _normalised(run, shape)


def _check_signature(given: list[Any], result: list[Any]) -> tuple[tuple[int, int, int], int]:
    """The (H, W, C) and the number of classes of a model from images to a row for each."""
    if len(given) != 4 or None in given[1:] or len(result) != 2 or (result[1] or 0) < 2:
        raise ValueError(
            "it must be a model from images [B, H, W, C] of one size to [B, classes], "
            f"not {given} to {result}"
        )
    return check_image_shape(given[1:]), int(result[1])


def _normalised(run: Any, shape: tuple[int, int, int]) -> Callable[[np.ndarray], np.ndarray]:
    """The function with a softmax after it, if it gives logits."""
    if ends_in_probabilities(run, shape):
        return run
    return lambda images: softmax(run(images))


def _saved_model_names(folder: pathlib.Path) -> tuple[str, ...] | None:
    path = folder / "assets" / LABELS_NAME
    with reading(f"{str(path)!r}", failing="has no readable class names"):
        try:
            return parse_labels(read_bytes(path, limit=LABELS_BYTES_LIMIT))
        except FileNotFoundError:
            return None


def _checked_program(folder: pathlib.Path) -> bytes:
    """Returns a SavedModel's program without the functions that keep its variables.

    Raises:
      ValueError: if it does more than arithmetic, or claims weights that it has not.
    """
    parsed = saved_model_pb2.SavedModel()
    parsed.ParseFromString(read_bytes(folder / "saved_model.pb", limit=_FILE_BYTES_LIMIT))
    if len(parsed.meta_graphs) != 1 or not parsed.meta_graphs[0].HasField("object_graph_def"):
        raise ValueError("it is none of TensorFlow 2")
    (graph,) = parsed.meta_graphs
    objects = graph.object_graph_def
    if any(entry.HasField("resource") for entry in objects.nodes):
        raise ValueError("it holds a table, which is filled as it is loaded")
    _remove_keeping(graph.graph_def.library, objects)
    claimed = 0
    for entry in objects.nodes:
        if entry.HasField("variable"):
            sides = [side.size for side in entry.variable.shape.dim]
            claimed += math.prod(sides) * tf.as_dtype(entry.variable.dtype).size
    stored = sum(path.stat().st_size for path in (folder / "variables").glob("variables.data-*"))
    if claimed > stored:
        raise ValueError(f"it claims {claimed} bytes of weights, it has {stored}")
    return parsed.SerializeToString()


def _remove_keeping(library: Any, objects: Any) -> None:
    """Removes the functions that keep variables; then there is nothing but arithmetic.

    Args:
      library: the program's functions, a FunctionDefLibrary.
      objects: what is to be had of them, a SavedObjectGraph.

    Raises:
      ValueError: if another function does more than arithmetic, or one of these is made use of.
    """
    functions = {function.signature.name for function in library.function}
    keeping = {}
    for function in library.function:
        harmful = [node.op for node in function.node_def if not _is_harmless(node.op, functions)]
        if set(harmful) - _KEEPING:
            op = next(op for op in harmful if op not in _KEEPING)
            raise ValueError(f"it does more than arithmetic, by {op!r}")
        if harmful:
            keeping[function.signature.name] = harmful[0]
    kept = [function for function in library.function if function.signature.name not in keeping]
    del library.function[:]
    library.function.extend(kept)
    # In whichever place a name can stand: an attribute, a list of them, a gradient, a signature.
    used = (library.SerializeToString(), objects.SerializeToString())
    for name, op in keeping.items():
        if any(name.encode() in part for part in used):
            raise ValueError(f"it does more than arithmetic, by {op!r}")


def _is_harmless(op: str, functions: set[str]) -> bool:
    known = op_def_registry.get(op)
    # In this order: a function may have the name of an operation that is not harmless.
    if known is None or op in _HARMLESS:
        return known is not None or op in functions
    if known.is_stateful or op in _HARMFUL or op.startswith(_HARMFUL_KINDS):
        return False
    sides = (*known.input_arg, *known.output_arg)
    return op.startswith(_LISTS) or not any(side.type in _HIDDEN or side.is_ref for side in sides)


# --- LiteRT -------------------------------------------------------------------------------


@contextmanager
def no_deprecation() -> Iterator[None]:
    """Keeps TensorFlow from saying that `tf.lite` will move into a package of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*Warning: tf\.lite\.Interpreter is deprecated")
        yield


def open_interpreter(content: bytes) -> Any:
    """A `tf.lite.Interpreter` of one thread, for a model that claims no more than it may.

    Args:
      content: of a `.tflite` file.

    Raises:
      ValueError: if it is none, or its tensors are too large.
      RuntimeError: if it needs kernels that are not there.
    """
    with no_deprecation():
        interpreter = tf.lite.Interpreter(model_content=content, num_threads=1)
    claimed = sum(
        math.prod(max(1, int(side)) for side in tensor["shape"])
        for tensor in interpreter.get_tensor_details()
    )
    if claimed > _MOST_ELEMENTS:
        raise ValueError(f"its tensors hold {claimed} numbers, expected at most {_MOST_ELEMENTS}")
    return interpreter


def _open_tflite(content: bytes, name: str) -> tuple[tuple[int, int, int], int, Any]:
    with reading(name, failing="cannot be loaded"):
        if content[4:8] != b"TFL3":
            raise ValueError("it is no .tflite file")
        interpreter = open_interpreter(content)
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        if len(inputs) != 1 or len(outputs) != 1:
            raise ValueError(f"it has {len(inputs)} inputs and {len(outputs)} outputs, expected 1")
        (given,), (result,) = inputs, outputs
        shape, count = _check_signature(
            [int(side) for side in given["shape"]], [int(side) for side in result["shape"]]
        )

    def run(images: np.ndarray) -> np.ndarray:
        if list(interpreter.get_input_details()[0]["shape"]) != list(images.shape):
            interpreter.resize_tensor_input(given["index"], images.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], _quantised(images, given))
        interpreter.invoke()
        found = interpreter.get_tensor(result["index"]).astype(np.float32)
        scale, zero = result["quantization"]
        return (found - zero) * np.float32(scale) if scale else found

    with reading(name, failing="cannot be run"):
        return shape, count, _normalised(run, shape)


def _quantised(images: np.ndarray, given: Any) -> np.ndarray:
    """Pixels as a model's input wants them, which may be integers of another scale."""
    scale, zero = given["quantization"]
    if not scale or (scale, zero, given["dtype"]) == (1.0, 0, np.uint8):
        return images.astype(given["dtype"])
    bounds = np.iinfo(given["dtype"])
    numbers = np.round(images / np.float32(scale)) + zero
    return numbers.clip(bounds.min, bounds.max).astype(given["dtype"])
