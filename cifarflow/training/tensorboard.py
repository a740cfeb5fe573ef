"""A run's log as TensorBoard scalars.

    history.listeners.append(tensorboard_writer(workdir / "tensorboard"))

It needs TensorFlow only; TensorBoard itself is needed to look at them.
"""

from __future__ import annotations

import contextlib
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from cifarflow.untrusted import one_line


def tensorboard_writer(directory: pathlib.Path) -> Callable[[dict[str, Any]], None]:
    """Makes a listener of a `History` that writes each row as scalars, one run a split.

    Args:
      directory: where the event files go; TensorBoard's `--logdir`.

    Returns:
      A function of a row.  If the files cannot be written it warns, once until they can again; a
      split's rows are then all written with the next one that can.
    """
    is_told = False
    writers: dict[str, Any] = {}
    written: dict[str, list[dict[str, Any]]] = {}
    # What `tf.summary.scalar` writes; that function itself needs TensorBoard to be installed,
    # which TensorFlow no longer brings.
    plugin = tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars")
    metadata = tf.compat.v1.SummaryMetadata(plugin_data=plugin, data_class="DATA_CLASS_SCALAR")

    def write(row: dict[str, Any]) -> None:
        nonlocal is_told
        try:
            write_scalars(row)
            is_told = False
        except tf.errors.OpError as error:
            # A full disk may have room again; training need not end for it.
            writer = writers.pop(row["split"], None)
            with contextlib.suppress(tf.errors.OpError):
                if writer is not None:
                    writer.close()
            if not is_told:
                warnings.warn(
                    f"cannot write TensorBoard's files in {str(directory)!r}: "
                    f"{one_line(error.message)}; trying again with each row",
                    stacklevel=2,
                )
            is_told = True

    def write_scalars(row: dict[str, Any]) -> None:
        split = row["split"]
        folder = directory / split
        rows = written.setdefault(split, [])
        rows.append(row)
        new = [row]
        # Into files that were removed TensorFlow writes on without a word.  Where the run's folder
        # cannot be made anew, the log has said so.
        if split not in writers or (not folder.is_dir() and directory.parent.is_dir()):
            writers[split] = tf.summary.create_file_writer(str(folder))
            new = rows
        for each in new:
            with writers[split].as_default(step=each["step"]):
                for key in ("loss", "accuracy", "learning_rate", "images_per_second"):
                    if each[key] is not None:
                        value = tf.constant(each[key], tf.float32)
                        tf.summary.write(key, value, metadata=metadata)
        writers[split].flush()

    return write
