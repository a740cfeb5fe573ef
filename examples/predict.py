"""What a trained model sees in ordinary image files: the likeliest classes of each.

    python examples/predict.py MODEL IMAGE...
    python examples/predict.py runs/final holiday.jpg
    python examples/predict.py runs/final/export/model_int8.tflite *.png --top=5

MODEL is a run's folder, a folder with a SavedModel, a .keras or a .tflite file; IMAGE a PNG, JPEG,
BMP, GIF or WebP file of any size, of which the middle is taken.  If an image cannot be read the
others are shown all the same, and the exit status is 2.
"""

from __future__ import annotations

import warnings

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

import cifarflow as cf
from cifarflow import cli
from cifarflow.errors import ConfigError, DataError, check_int
from cifarflow.untrusted import one_line

FLAGS = flags.FLAGS
flags.DEFINE_integer("top", 3, "how many classes to show")
flags.DEFINE_list("class_names", None, "the classes, for a model that has no names with it")

BAR_WIDTH = 30


def main(words: list[str]) -> None:
    top = check_int("--top", FLAGS.top)
    if len(words) < 2 or not all(word.strip() for word in words):
        raise ConfigError(f"predict.py must be given MODEL IMAGE..., not {words!r}")
    model, *paths = words
    # TensorFlow's libraries talk on stderr; what Python warns of is worth reading.
    with cli.quiet_stderr(), warnings.catch_warnings(record=True) as said:
        classifier = cf.load_classifier(model, class_names=FLAGS.class_names)
    notes = [str(warning.message) for warning in said]
    if classifier.note:
        notes.append(f"this is {classifier.note}")
    if not classifier.has_names:
        notes.append("the model has no class names with it: give --class_names=A,B,...")
    console = Console(highlight=False)
    for note in notes:
        console.print(Text(one_line(note), "yellow"))
    images, refused = {}, []
    for path in dict.fromkeys(paths):
        try:
            images[path] = cf.read_image(path, image_shape=classifier.image_shape)
        except DataError as error:
            refused.append(str(error))
    if images:
        with cli.quiet_stderr():
            probabilities = classifier(np.stack(list(images.values())))
        for path, row in zip(images, probabilities, strict=True):
            show(console, path, row, class_names=classifier.class_names, top=top)
    if refused:
        more = f" (and {len(refused) - 1} more that cannot be read)" if refused[1:] else ""
        raise DataError(f"{refused[0]}{more}")


def show(
    console: Console, path: str, row: np.ndarray, *, class_names: tuple[str, ...], top: int
) -> None:
    """Prints the likeliest classes of one image, each with a bar."""
    console.print(Text(one_line(path), "bold"))
    table = Table.grid(padding=(0, 2))
    # Of one width for all images, so that the bars are below each other.
    table.add_column(width=max(len(one_line(name, length=30)) for name in class_names) + 2)
    table.add_column(justify="right", width=7)
    table.add_column(width=BAR_WIDTH)
    for place, label in enumerate(np.argsort(-row, kind="stable")[:top]):
        style = "green" if place == 0 else "dim"
        length = round(float(row[label]) * BAR_WIDTH)
        table.add_row(
            Text(f"  {one_line(class_names[label], length=30)}"),
            Text(f"{100 * row[label]:.1f} %"),
            Text("━" * length, style),
        )
    console.print(table)
    console.print()


if __name__ == "__main__":
    cli.run(main)
