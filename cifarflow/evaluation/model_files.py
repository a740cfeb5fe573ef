"""Models from `.keras` files that anybody may have written.

    model = load_model_file("some/model.keras")     # images [B, H, W, C] in, [B, classes] out
    read_class_names("some/model.keras")            # ("cat", "dog"), or None if it has none

Nothing in a file is run: Keras's safe mode refuses lambdas, the weights must be plain arrays within
the file, and what the configuration claims of them is compared with what is there before anything
of that size is made.
"""

from __future__ import annotations

import io
import math
import os
import pathlib
import zipfile
from typing import Any

import h5py
import keras
import tensorflow as tf
from keras.src.backend.common import global_state

from cifarflow.errors import DataError
from cifarflow.untrusted import open_npz, parse_json, reading, shown

# Where an exported file keeps its class names, one a line.
LABELS_NAME = "labels.txt"
LABELS_BYTES_LIMIT = 1_000_000
_MEMBERS = {"metadata.json", "config.json", "model.weights.h5"}
# The configuration of a net of 300 layers takes 0.3 MB.
_CONFIG_BYTES_LIMIT = 10_000_000
_FILE_BYTES_LIMIT = 1 << 31
_MOST_ARRAYS = 20_000
# What one image may become in one layer: 1 GB of float32.
_MOST_ELEMENTS = 1 << 28
_BLOCK_BYTES = 1 << 20
# Where Keras keeps variables that it has not initialised yet; it has no other name for it.
_PENDING = "uninitialized_variables"


def load_model_file(path: str | os.PathLike[str]) -> Any:
    """Loads a model from a `.keras` file, without trusting it.

    All layers of this library's models are Keras's own; layers of your own must be registered
    (`keras.saving.register_keras_serializable`) before.  A model comes without its optimiser.

    Args:
      path: the file.

    Returns:
      The Keras model: images [B, H, W, C] -> outputs [B, classes].

    Raises:
      DataError: if there is no such file, it is damaged, too large, no `.keras` file, holds code or
        layers that are not known, claims what it does not hold, or is no classifier of images.
    """
    file = pathlib.Path(os.path.expanduser(path))
    name = f"model file {str(file)!r}"
    if file.suffix != ".keras":
        raise DataError(f"{name} must be a .keras file")
    with reading(name, failing="cannot be loaded"):
        try:
            size = file.stat().st_size
            if size > _FILE_BYTES_LIMIT:
                raise ValueError(f"it has {size} bytes, expected at most {_FILE_BYTES_LIMIT}")
            # Keras packs nothing, so what the members claim is there.
            with open_npz(file, packed=False) as archive:
                config, stored_bytes = _check_members(archive)
        except FileNotFoundError:
            raise DataError(f"there is no {name}") from None
        except zipfile.BadZipFile as error:
            raise ValueError(f"it is no .keras file, or cut short: {error}") from error
        _check_size(config, stored_bytes)
        model = keras.saving.load_model(file, compile=False, safe_mode=True)
    check_classifier(model, name=name)
    return model


def check_classifier(model: Any, *, name: str = "model") -> tuple[tuple[Any, ...], int]:
    """Checks that a model takes one array of images and gives one row of numbers for each.

    Args:
      model: a Keras model.
      name: for the message.

    Returns:
      Its images' (H, W, C), None for a side that may be any, and its number of classes.

    Raises:
      DataError: if it does not.
    """
    try:
        given, result = tuple(model.input_shape), tuple(model.output_shape)
    except (AttributeError, TypeError, ValueError):
        given = result = ()
    if len(given) != 4 or len(result) != 2 or not isinstance(result[1], int) or result[1] < 2:
        found = f"{list(given)} to {list(result)}" if given and result else "something else"
        raise DataError(
            f"{name} must be a model from images [B, H, W, C] to outputs [B, classes], not {found}"
        )
    return given[1:], result[1]


def read_class_names(path: str | os.PathLike[str]) -> tuple[str, ...] | None:
    """Reads the class names that `export_model` has put into a `.keras` or `.tflite` file.

    Args:
      path: the file.

    Returns:
      The names, by label; None if the file has none.

    Raises:
      DataError: if it is damaged, or they are no names.
    """
    with reading(f"model file {str(path)!r}", failing="has no readable class names"):
        try:
            with open_npz(pathlib.Path(path), packed=False) as archive:
                if LABELS_NAME not in archive.namelist():
                    return None
                return parse_labels(_read_member(archive, LABELS_NAME, LABELS_BYTES_LIMIT))
        except zipfile.BadZipFile:
            # A .tflite file of somebody else's has no archive at its end.
            return None


def parse_labels(data: bytes) -> tuple[str, ...]:
    """Class names from a text of one a line.

    Raises:
      ValueError: if they are not two printable names or more.
    """
    names = tuple(data.decode().splitlines())
    if len(names) < 2 or not all(name and name.isprintable() for name in names):
        raise ValueError("its class names are not two printable lines or more")
    return names


def _check_members(archive: zipfile.ZipFile) -> tuple[Any, int]:
    """Checks what is in the archive; returns the configuration and the bytes of all weights."""
    names = set(archive.namelist())
    missing = sorted(_MEMBERS - {"metadata.json"} - names)
    unknown = sorted(names - _MEMBERS - {LABELS_NAME})
    if missing:
        raise ValueError(f"it is no .keras file: it has no {missing[0]}")
    if unknown:
        raise ValueError(f"it has a member {unknown[0]!r}, which no classifier of images needs")
    config = parse_json(_read_member(archive, "config.json", _CONFIG_BYTES_LIMIT), finite=False)
    weights = _read_member(archive, "model.weights.h5", _FILE_BYTES_LIMIT)
    with h5py.File(io.BytesIO(weights), "r") as file:
        return config, _check_arrays(file, len(weights))


def _read_member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    size = archive.getinfo(name).file_size
    if size > limit:
        raise ValueError(f"its {name} has {size} bytes, expected at most {limit}")
    with archive.open(name) as member:
        return b"".join(iter(lambda: member.read(_BLOCK_BYTES), b""))


def _check_arrays(file: Any, size: int) -> int:
    """Checks that all arrays of an HDF5 file are plain, and within it; returns their bytes."""
    total = count = 0
    groups = [file]
    while groups:
        group = groups.pop()
        for name in group:
            count += 1
            if count > _MOST_ARRAYS:
                raise ValueError(f"it holds more than {_MOST_ARRAYS} arrays")
            # Others lead out of the file, or round in circles.
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"its weights have a link {name!r}")
            entry = group[name]
            if isinstance(entry, h5py.Group):
                groups.append(entry)
                continue
            if entry.external or entry.is_virtual or entry.dtype.hasobject:
                raise ValueError(f"its array {entry.name!r} is not within the file")
            claimed = math.prod(entry.shape or ()) * entry.dtype.itemsize
            if claimed > entry.id.get_storage_size():
                raise ValueError(f"its array {entry.name!r} claims {claimed} bytes it has not")
            total += claimed
    if total > size:
        raise ValueError(f"its arrays claim {total} bytes, it has {size}")
    return total


def _check_classes(config: Any) -> None:
    """Refuses classes that are neither Keras's nor registered, before anything looks for them."""
    nodes = [config]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            nodes += node.values()
            package = str(node.get("module") or "keras").partition(".")[0]
            is_known = package in ("keras", "builtins") or (
                keras.saving.get_registered_object(str(node.get("registered_name"))) is not None
            )
            if "class_name" in node and not is_known:
                raise ValueError(
                    f"its class {shown(node['class_name'])} is not known: register it, by "
                    "keras.saving.register_keras_serializable, before"
                )
        elif isinstance(node, list):
            nodes += node


def _check_size(config: Any, stored_bytes: int) -> None:
    """Builds the model without any memory for its weights, and compares these with the file's."""
    _check_classes(config)
    pending = global_state.get_global_attribute(_PENDING, [])
    try:
        # Here variables have a shape and no value.
        with keras.StatelessScope(initialize_variables=False):
            model = keras.saving.deserialize_keras_object(
                {key: value for key, value in config.items() if key != "compile_config"},
                safe_mode=True,
            )
    finally:
        global_state.set_global_attribute(_PENDING, pending)
    # Without the state of random generators, which no file has.
    variables = getattr(model, "weights", None)
    if variables is None:
        raise ValueError("what it holds is no model")
    claimed = sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables)
    if claimed > stored_bytes:
        raise ValueError(f"its layers claim {claimed} bytes of weights, it has {stored_bytes}")
    for layer in getattr(model, "layers", ()):
        tensors = [tensor for node in layer._inbound_nodes for tensor in node.outputs]
        largest = max(
            (math.prod(side or 1 for side in tensor.shape) for tensor in tensors), default=0
        )
        if largest > _MOST_ELEMENTS:
            raise ValueError(
                f"its layer {layer.name!r} makes {largest} numbers of an image, "
                f"expected at most {_MOST_ELEMENTS}"
            )
