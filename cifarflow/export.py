"""A trained model as files for others: Keras, SavedModel and LiteRT, each checked when written.

    trained = load_trained("runs/first")
    exported = export_model(
        trained.model,
        "runs/first/export",
        class_names=trained.class_names,
        examples=data.validation,             # what each file is checked on
        representative=data.train.images,     # what int8 takes its ranges from
    )
    print(exported.table())

In the folder are then, each with the class names in it,

    model.keras             the model itself: opened by `keras.saving.load_model`, to the same bits
    saved_model/            a graph of TensorFlow's, in float32; needs neither Keras nor cifarflow
    model.tflite            for LiteRT, in float32
    model_float16.tflite    weights in float16, if asked for: half the size
    model_int8.tflite       weights and arithmetic in int8: a quarter of the size
    export.json             what came out of the checks

All take pixels of 0..255 and scale them themselves: `.keras` files in any dtype, the others uint8
[N, H, W, C].  A SavedModel's `serving_default` gives "probabilities", "label" and "class"; its
signature `any_size` takes images of any one size and resizes them.  A LiteRT file gives
probabilities: float32, or uint8 in 256ths if it is int8.

    probabilities = tf.saved_model.load("saved_model").signatures["serving_default"](images=images)

`.keras` files need no registration: all layers of this library's models are Keras's own.  An
optimiser, which is left out here, would need `import cifarflow.optimizers.sgd` (or muon).  LiteRT
files are read by `tf.lite.Interpreter` and by its successor, the package `ai-edge-litert`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import secrets
import shutil
import statistics
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from cifarflow.classifier import (
    SIGNATURE,
    Classifier,
    ends_in_probabilities,
    load_classifier,
)
from cifarflow.data.splits import check_images_and_labels
from cifarflow.errors import (
    CifarflowError,
    ConfigError,
    DataError,
    WorkdirError,
    check_choice,
    check_float,
)
from cifarflow.evaluation.model_files import LABELS_NAME, check_classifier
from cifarflow.evaluation.predict import Predictor, softmax
from cifarflow.recipes.trained import check_class_names
from cifarflow.untrusted import one_line

# By format, the name in the folder.
FILES = {
    "keras": "model.keras",
    "saved_model": "saved_model",
    "tflite": "model.tflite",
    "tflite_float16": "model_float16.tflite",
    "tflite_int8": "model_int8.tflite",
}
DEFAULT_FORMATS = ("keras", "saved_model", "tflite", "tflite_int8")
# By how much a probability may differ from the model's in float32: other kernels sum in another
# order, and weights in float16 have eleven bits.
_MOST_DIFFERENCE = {"saved_model": 1e-3, "tflite": 1e-3, "tflite_float16": 0.05}
# More do not change the ranges, and each is run alone.
_MOST_REPRESENTATIVE = 300
_TIMED_CALLS = 20


class ExportError(CifarflowError, RuntimeError):
    """A model cannot be exported, or a file does not do what the model does."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """One file, or the folder of a SavedModel, and what it came to on the examples.

    Attributes:
      name: the format; "model" for the model itself.
      path: the file; of the model itself None.
      megabytes: its size in 1,000,000 bytes; of the model itself that of its weights.
      accuracy: share of the examples predicted right, 0..1.
      agreement: share of the examples for which it predicts what the model predicts.
      largest_difference: of any probability from the model's.
      milliseconds: median time of a call with one image, on this machine.
    """

    name: str
    path: pathlib.Path | None
    megabytes: float
    accuracy: float
    agreement: float
    largest_difference: float
    milliseconds: float


@dataclasses.dataclass(frozen=True)
class Export:
    """What `export_model` has written.

    Attributes:
      directory: the folder.
      rows: the model itself, then each format in order.
      num_examples: how many images each was checked on.
    """

    directory: pathlib.Path
    rows: tuple[Exported, ...]
    num_examples: int

    def table(self) -> str:
        """The rows as a Markdown table."""
        lines = [
            f"| format | file | MB | accuracy ({self.num_examples:,} images) | agreement | "
            "largest difference | ms an image |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        for row in self.rows:
            lines.append(
                f"| {row.name} | {row.path.name if row.path else '-'} | {row.megabytes:.2f} "
                f"| {row.accuracy:.4f} | {row.agreement:.4f} | {row.largest_difference:.4f} "
                f"| {row.milliseconds:.2f} |"
            )
        return "\n".join(lines)


def export_model(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    class_names: Sequence[str],
    examples: Iterable[np.ndarray],
    representative: np.ndarray | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    max_accuracy_loss: float = 0.01,
    progress: Callable[[str], object] | None = None,
) -> Export:
    """Writes a model in several formats, loads each again and compares it with the model.

    The folder appears when all went well, and not before.  A model in mixed precision is kept as it
    is in the `.keras` file and is in float32, with the same weights, in all others; so these may
    differ from it by the rounding of bfloat16.

    Args:
      model: a Keras model, images [B, H, W, C], 0..255 -> logits or probabilities [B, classes].
      directory: the folder to make; there must be nothing of that name.
      class_names: the classes, by label.
      examples: images [N, H, W, C] uint8, N >= 1, and labels [N] to check on; a `Split` is such.
        Best those of validation.
      representative: [N, H, W, C] uint8, training images, from the first 300 of which int8 takes
        the ranges of the activations; needed for "tflite_int8".
      formats: which to write: "keras", "saved_model", "tflite", "tflite_float16", "tflite_int8".
      max_accuracy_loss: by how much a file's accuracy may be less than that of the model in the
        precision of the file, 0..1; one image is always forgiven.
      progress: told in a line what was written, such as `print`.

    Returns:
      What was written and how good it is; the same is in export.json.

    Raises:
      ConfigError: if a format is unknown or given twice, there is none, max_accuracy_loss is out
        of range, or the number of class_names is not that of the model's classes; or if int8 is
        asked for and representative is not given.
      DataError: if the model, the examples or the representative images are not such.
      ExportError: if a model cannot be converted, or a file is not as good as the model.
      WorkdirError: if there is something of that name already, or it cannot be written.
    """
    formats = list(formats)
    for name in formats:
        check_choice("formats", name, FILES)
    if not formats or len(set(formats)) != len(formats):
        raise ConfigError(f"formats must be one or more of {', '.join(FILES)}, not {formats!r}")
    check_float("max_accuracy_loss", max_accuracy_loss, maximum=1.0)
    shape, num_classes = check_classifier(model)
    if None in shape:
        raise DataError(f"model must take images of one size, not {list(shape)}")
    names = check_class_names(class_names)
    if len(names) != num_classes:
        raise ConfigError(
            f"class_names must be as many as the model's {num_classes} classes, not {len(names)}"
        )
    images, labels = examples
    check_images_and_labels(images, labels, num_classes=num_classes)
    for what, array in (("examples", images), ("representative", representative)):
        if array is not None and (array.shape[1:] != shape or not len(array)):
            raise DataError(
                f"{what} must be images {[len(array) or 'N >= 1', *shape]} for this model, "
                f"not {list(array.shape)}"
            )
    if "tflite_int8" in formats:
        if representative is None:
            raise ConfigError("representative must be training images for tflite_int8, not None")
        check_images_and_labels(representative, np.zeros(len(representative), np.int32))
    target = pathlib.Path(os.path.expanduser(directory))
    if os.path.lexists(target):
        raise WorkdirError(f"{str(target)!r} is there already: give a folder that is not")
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        partial.mkdir(parents=True)
        writer = _Writer(model, partial, shape, names, images, labels, representative)
        rows = [writer.row("model", None, writer.classifier, max_accuracy_loss)]
        for name in formats:
            rows.append(writer.write(name, max_accuracy_loss))
            if progress is not None:
                row = rows[-1]
                progress(f"{name}: {row.megabytes:.2f} MB, accuracy {row.accuracy:.4f}")
        placed = [
            dataclasses.replace(row, path=row.path and target / row.path.name) for row in rows
        ]
        exported = Export(target, tuple(placed), len(labels))
        (partial / "export.json").write_text(json.dumps(_as_json(exported, names, shape), indent=2))
        partial.rename(target)
    except OSError as error:
        if isinstance(error, CifarflowError):
            raise
        raise WorkdirError(f"cannot write {str(target)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return exported


def _as_json(export: Export, names: Sequence[str], shape: Sequence[int]) -> dict[str, Any]:
    rows = [{**dataclasses.asdict(row), "path": row.path and row.path.name} for row in export.rows]
    return {
        "class_names": list(names),
        "image_shape": list(shape),
        "num_examples": export.num_examples,
        "formats": rows,
        "versions": {"tensorflow": tf.__version__, "keras": keras.__version__},
    }


class _Writer:
    """Writes one model's files and compares each with it."""

    def __init__(
        self,
        model: Any,
        folder: pathlib.Path,
        shape: tuple[int, int, int],
        names: tuple[str, ...],
        images: np.ndarray,
        labels: np.ndarray,
        representative: np.ndarray | None,
    ) -> None:
        self._model, self._folder, self._shape, self._names = model, folder, shape, names
        self._images, self._labels, self._representative = images, labels, representative
        predictor = Predictor(model)
        self._ends_in_probabilities = ends_in_probabilities(predictor, shape)

        self.classifier = self._as_classifier(predictor)
        self._expected = self.classifier(images)
        self._exact = as_float32(model)
        # What the files in float32 are measured by; of a model in float32 it is the model.
        self._exact_expected = self._expected
        if self._exact is not model:
            self._exact_expected = self._as_classifier(Predictor(self._exact))(images)

    def _as_classifier(self, predictor: Predictor) -> Classifier:
        def function(images: np.ndarray) -> np.ndarray:
            outputs = predictor(images)
            return outputs if self._ends_in_probabilities else softmax(outputs)

        return Classifier("keras", self._shape, self._names, True, "", function)

    def write(self, name: str, max_accuracy_loss: float) -> Exported:
        """Writes one format, loads it and compares it."""
        path = self._folder / FILES[name]
        with _converting(name):
            if name == "keras":
                self._write_keras(path)
            elif name == "saved_model":
                self._write_saved_model(path)
            else:
                self._write_tflite(path, name)
        return self.row(name, path, load_classifier(path), max_accuracy_loss)

    def row(
        self,
        name: str,
        path: pathlib.Path | None,
        classifier: Classifier,
        max_accuracy_loss: float,
    ) -> Exported:
        """Compares a file with the model.

        Raises:
          ExportError: if it is not as good.
        """
        found = classifier(self._images)
        if path is not None and classifier.class_names != self._names:
            raise ExportError(f"{name} has other class names than the model")
        right, expected_right = (
            int(np.sum(some.argmax(-1) == self._labels))
            for some in (found, self._expected if name == "keras" else self._exact_expected)
        )
        difference = float(np.abs(found - self._expected).max())
        if name == "keras" and not np.array_equal(found, self._expected):
            raise ExportError(f"keras gives other outputs, by up to {difference:.2g}")
        most = _MOST_DIFFERENCE.get(name)
        off = float(np.abs(found - self._exact_expected).max())
        if most is not None and off > most:
            raise ExportError(
                f"{name} gives other probabilities than the model in float32, by up to {off:.2g}; "
                f"expected at most {most:g}"
            )
        count = len(self._labels)
        if path is not None and expected_right - right > max(1, max_accuracy_loss * count):
            raise ExportError(
                f"{name} has an accuracy of {right / count:.4f} on {count:,} images, the model "
                f"{expected_right / count:.4f}: more than {max_accuracy_loss:g} less"
            )
        return Exported(
            name=name,
            path=path,
            megabytes=self._bytes_of(path) / 1e6,
            accuracy=right / count,
            agreement=float(np.mean(found.argmax(-1) == self._expected.argmax(-1))),
            largest_difference=difference,
            milliseconds=_milliseconds(classifier, self._images[:1]),
        )

    def _bytes_of(self, path: pathlib.Path | None) -> int:
        if path is None:
            return sum(
                tf.as_dtype(v.dtype).size * int(np.prod(v.shape)) for v in self._model.weights
            )
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files)

    @property
    def _labels_text(self) -> bytes:
        return "".join(f"{name}\n" for name in self._names).encode()

    def _write_keras(self, path: pathlib.Path) -> None:
        # A copy: saving a compiled model would put its optimiser into the file.
        _rebuilt(self._model, lambda config: config).save(path)
        self._add_labels(path)

    def _add_labels(self, path: pathlib.Path) -> None:
        """Adds the class names to the archive that a file is, or that is put at its end.

        The readers of either format leave it alone; any unpacker of zip files finds it.
        """
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(LABELS_NAME, self._labels_text)

    def _probabilities(self, images: Any) -> Any:
        outputs = tf.cast(self._exact(images, training=False), tf.float32)
        return outputs if self._ends_in_probabilities else tf.nn.softmax(outputs)

    def _tracked(self) -> Any:
        module = tf.Module()
        module.weights = [variable.value for variable in self._exact.variables]
        return module

    def _write_saved_model(self, path: pathlib.Path) -> None:
        height, width, channels = self._shape
        module = self._tracked()
        names = tf.constant(self._names)

        @tf.function(input_signature=[tf.TensorSpec([None, *self._shape], tf.uint8, "images")])
        def classify(images: Any) -> dict[str, Any]:
            return answer(tf.cast(images, tf.float32))

        any_size = [tf.TensorSpec([None, None, None, channels], tf.uint8, "images")]

        @tf.function(input_signature=any_size)
        def classify_any_size(images: Any) -> dict[str, Any]:
            resized = tf.image.resize(images, [height, width], "bicubic", antialias=True)
            return answer(tf.clip_by_value(tf.round(resized), 0.0, 255.0))

        def answer(pixels: Any) -> dict[str, Any]:
            probabilities = self._probabilities(pixels)
            label = tf.argmax(probabilities, -1, output_type=tf.int32)
            return {
                "probabilities": probabilities,
                "label": label,
                "class": tf.gather(names, label),
            }

        labels = self._folder / LABELS_NAME
        labels.write_bytes(self._labels_text)
        module.labels = tf.saved_model.Asset(str(labels))
        signatures = {SIGNATURE: classify, "any_size": classify_any_size}
        tf.saved_model.save(module, path, signatures=signatures)
        labels.unlink()

    def _write_tflite(self, path: pathlib.Path, name: str) -> None:
        is_int8 = name == "tflite_int8"
        # The quantiser makes the input uint8 itself, and leaves a cast of it alone.
        dtype = tf.float32 if is_int8 else tf.uint8

        @tf.function(input_signature=[tf.TensorSpec([None, *self._shape], dtype, "images")])
        def classify(images: Any) -> dict[str, Any]:
            return {"probabilities": self._probabilities(tf.cast(images, tf.float32))}

        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            [classify.get_concrete_function()], self._tracked()
        )
        if name != "tflite":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if name == "tflite_float16":
            converter.target_spec.supported_types = [tf.float16]
        if is_int8:
            converter.representative_dataset = self._representative_dataset
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = tf.uint8
            converter.inference_output_type = tf.uint8
        path.write_bytes(converter.convert())
        self._add_labels(path)

    def _representative_dataset(self) -> Any:
        assert self._representative is not None
        images = self._representative[:_MOST_REPRESENTATIVE].astype(np.float32)
        # So that the range is 0..255 and pixels are quantised to themselves, whatever the images.
        images[0, 0, 0, 0], images[0, -1, -1, -1] = 0, 255
        for image in images:
            yield [image[None]]


def as_float32(model: Any) -> Any:
    """The model in float32 throughout: itself if it is, else another with the same weights.

    Args:
      model: a Keras model.

    Raises:
      ExportError: if it cannot be built again from its configuration.
    """
    if all(layer.dtype_policy.name == "float32" for layer in model._flatten_layers()):
        return model

    def in_float32(config: Any) -> Any:
        if isinstance(config, dict):
            if str(config.get("class_name")).endswith("DTypePolicy"):
                return "float32"
            return {
                key: "float32" if key == "dtype" and isinstance(value, str) else in_float32(value)
                for key, value in config.items()
            }
        return [in_float32(part) for part in config] if isinstance(config, list) else config

    return _rebuilt(model, in_float32)


def _rebuilt(model: Any, change: Callable[[Any], Any]) -> Any:
    """Builds a model again from its configuration, with the same weights and no optimiser."""
    with _converting("the model"):
        config = json.loads(json.dumps(keras.saving.serialize_keras_object(model)))
        config["compile_config"] = None
        built = keras.saving.deserialize_keras_object(change(config), safe_mode=True)
        for ours, theirs in zip(built.variables, model.variables, strict=True):
            ours.assign(keras.ops.cast(theirs, ours.dtype))
    return built


class _converting:  # noqa: N801 - reads as a statement
    """Turns what Keras and the converters raise, which is of any kind, into one line."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, (CifarflowError, OSError)):
            raise ExportError(
                f"{self._what} cannot be converted: {one_line(str(error)) or type(error).__name__}"
            ) from error


def _milliseconds(classifier: Classifier, image: np.ndarray) -> float:
    run = functools.partial(classifier, image)
    run()
    seconds = []
    for _ in range(_TIMED_CALLS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1000
