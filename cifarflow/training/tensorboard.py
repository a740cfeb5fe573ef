"""A run's log and pictures for TensorBoard: scalars and images.

    board = TensorBoard(workdir / "tensorboard")
    history.listeners.append(board.add_row)
    board.add_images("train", "first_batch", [image_grid(images)], step=0)

It needs TensorFlow only; TensorBoard itself is needed to look at them.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from cifarflow.errors import DataError, check_int
from cifarflow.untrusted import one_line

_SCALARS = ("loss", "accuracy", "learning_rate", "images_per_second")
# Around each image of a grid, and where there is none.
_GAP, _GREY = 2, 128
# So that single pixels can be seen.
_LEAST_SIDE = 64


class TensorBoard:
    """Writes event files, one run a split.

    If they cannot be written it warns, once until they can again; all that a split has is then
    written with the next that can.

    Args:
      directory: where the event files go; TensorBoard's `--logdir`.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        self._is_told = False
        self._writers: dict[str, Any] = {}
        # Of each split the steps, and what `tf.summary.write` is given.
        self._written: dict[str, list[tuple[int, list[tuple[str, Any, Any]]]]] = {}

    def add_row(self, row: dict[str, Any]) -> None:
        """Writes the numbers of a row as scalars; to be a listener of a `History`.

        Args:
          row: as a `History` has it.
        """
        metadata = _metadata("scalars", "DATA_CLASS_SCALAR")
        values = [
            (key, tf.constant(row[key], tf.float32), metadata)
            for key in _SCALARS
            if row[key] is not None
        ]
        self._add(row["split"], row["step"], values)

    def add_images(
        self,
        split: str,
        name: str,
        images: Sequence[np.ndarray],
        *,
        step: int,
        description: str = "",
    ) -> None:
        """Writes images of one size under one name.

        Args:
          split: "train", "validation" or "test".
          name: what they are called.
          images: each [H, W, C] uint8, C 1 or 3.
          step: steps done.
          description: what is said of them, in Markdown.
        """
        height, width = images[0].shape[:2]
        pictures = [tf.io.encode_png(image).numpy() for image in images]
        value = tf.constant([str(width).encode(), str(height).encode(), *pictures])
        metadata = _metadata("images", "DATA_CLASS_BLOB_SEQUENCE", description)
        self._add(split, step, [(name, value, metadata)])

    def _add(self, split: str, step: int, values: list[tuple[str, Any, Any]]) -> None:
        try:
            self._write(split, (step, values))
            self._is_told = False
        except tf.errors.OpError as error:
            # A full disk may have room again; training need not end for it.
            writer = self._writers.pop(split, None)
            with contextlib.suppress(tf.errors.OpError):
                if writer is not None:
                    writer.close()
            if not self._is_told:
                warnings.warn(
                    f"cannot write TensorBoard's files in {str(self._directory)!r}: "
                    f"{one_line(error.message)}; trying again with each row",
                    stacklevel=3,
                )
            self._is_told = True

    def _write(self, split: str, entry: tuple[int, list[tuple[str, Any, Any]]]) -> None:
        folder = self._directory / split
        entries = self._written.setdefault(split, [])
        entries.append(entry)
        new = [entry]
        # Into files that were removed TensorFlow writes on without a word.  Where the run's folder
        # cannot be made anew, the log has said so.
        is_gone = not folder.is_dir() and self._directory.parent.is_dir()
        if split not in self._writers or is_gone:
            self._writers[split] = tf.summary.create_file_writer(str(folder))
            new = entries
        for step, values in new:
            with self._writers[split].as_default(step=step):
                for name, value, metadata in values:
                    tf.summary.write(name, value, metadata=metadata)
        self._writers[split].flush()


def _metadata(plugin: str, data_class: str, description: str = "") -> Any:
    """What `tf.summary.scalar` and `tf.summary.image` write; those need TensorBoard installed.

    TensorFlow no longer brings it.
    """
    data = tf.compat.v1.SummaryMetadata.PluginData(plugin_name=plugin)
    return tf.compat.v1.SummaryMetadata(
        plugin_data=data, data_class=data_class, summary_description=description
    )


def image_grid(images: Any, *, columns: int | None = None, most: int = 64) -> np.ndarray:
    """Puts images side by side, in rows; small ones enlarged, pixel by pixel.

    Args:
      images: [N, H, W, C], 0..255, C 1 or 3; floats are rounded.
      columns: images a row, >= 1; by default as many as rows.
      most: of more images the first so many, >= 1.

    Returns:
      [height, width, C] uint8.

    Raises:
      DataError: if they are not such images, or none.
      ConfigError: if a number is out of range.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise DataError(f"images must be [N, H, W, C] with C 1 or 3, not {list(images.shape)}")
    images = images[: check_int("most", most)]
    if images.dtype != np.uint8:
        images = np.clip(np.nan_to_num(np.rint(images.astype(np.float32))), 0, 255).astype(np.uint8)
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else check_int("columns", columns)
    times = max(1, math.ceil(_LEAST_SIDE / max(height, width)))
    images = images.repeat(times, 1).repeat(times, 2)
    rows = math.ceil(count / columns)
    cells = np.full(
        (rows * columns, times * height + _GAP, times * width + _GAP, channels), _GREY, np.uint8
    )
    cells[:count, :-_GAP, :-_GAP] = images
    grid = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    return grid.reshape(rows * cells.shape[1], columns * cells.shape[2], channels)


def confusion_pictures(
    images: np.ndarray, labels: np.ndarray, outputs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A confusion matrix in shades, and one of images: down the true class, across the predicted.

    Args:
      images: [N, H, W, C] uint8, C 1 or 3.
      labels: [N] integers.
      outputs: [N, num_classes], the model's.

    Returns:
      [height, width, 1] uint8, darker for a larger share of the row, by its root, since mistakes
      are a few percent; and [height, width, C] uint8, in each place the image of which the model
      was surest, grey where there is none.
    """
    classes, predicted = outputs.shape[-1], outputs.argmax(-1)
    shifted = np.exp(outputs - outputs.max(-1, keepdims=True))
    sureness = shifted.max(-1) / shifted.sum(-1)
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels, predicted), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shades = np.rint(255 * (1 - np.sqrt(shares))).astype(np.uint8).reshape(-1, 1, 1, 1)
    cells = np.full((classes**2, *images.shape[1:]), _GREY, np.uint8)
    # The surest last, which stays.
    order = np.argsort(sureness, kind="stable")
    cells[(labels * classes + predicted)[order]] = images[order]
    most = classes**2
    return (
        image_grid(shades.repeat(16, 1).repeat(16, 2), columns=classes, most=most),
        image_grid(cells, columns=classes, most=most),
    )
