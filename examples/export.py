"""Exports a run's model for others, checks every file, and prints how good each is.

    python examples/export.py --workdir=runs/final
    python examples/export.py --workdir=runs/final --formats=keras,tflite_int8 --split=test
    python examples/export.py --workdir=runs/final --which=best --out=models/final

Each file is loaded again and compared with the model, on the images that the run held out of the
training set; on training images if it held none out, and on the test set only with --split=test.
"""

from __future__ import annotations

import pathlib

from absl import flags

import cifarflow as cf
from cifarflow import cli
from cifarflow.errors import ConfigError, check_choice, check_float, check_int
from cifarflow.export import DEFAULT_FORMATS, FILES
from cifarflow.recipes.trained import WHICH

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "the run's folder")
flags.DEFINE_enum("which", "last", WHICH, "the weights of its newest or of its best checkpoint")
flags.DEFINE_string("out", None, "the folder to make (default: WORKDIR/export)")
flags.DEFINE_list("formats", list(DEFAULT_FORMATS), f"which of {', '.join(FILES)}")
flags.DEFINE_string(
    "data_dir", None, "where the data is, a file or folder (default: search, see README)"
)
flags.DEFINE_enum(
    "split", None, ("train", "validation", "test"), "what to check on (default: see above)"
)
flags.DEFINE_integer("examples", 10_000, "check on so many of these images at most")
flags.DEFINE_float(
    "max_accuracy_loss", 0.01, "refuse an export whose accuracy is less than the model's by more"
)


def main() -> None:
    formats = [check_choice("--formats", name, FILES) for name in FLAGS.formats]
    check_int("--examples", FLAGS.examples)
    check_float("--max_accuracy_loss", FLAGS.max_accuracy_loss, maximum=1.0)
    for flag in ("workdir", "out"):
        path = FLAGS[flag].value
        if (flag == "workdir" and path is None) or (path is not None and not path.strip()):
            raise ConfigError(f"--{flag} must be a folder, not {path!r}")
    trained = cf.load_trained(FLAGS.workdir, which=FLAGS.which)
    data = cf.load_recipe_data(trained.recipe, data_dir=FLAGS.data_dir)
    split = FLAGS.split or ("validation" if len(data.validation) else "train")
    images, labels = (part[: FLAGS.examples] for part in getattr(data, split))
    out = pathlib.Path(FLAGS.out) if FLAGS.out else pathlib.Path(FLAGS.workdir) / "export"
    print(f"{trained.describe()}; each file is checked on {len(labels):,} {split} images")
    if trained.recipe.tta != "none":
        print(f"one view of each image: tta={trained.recipe.tta} is no part of an export")
    # The converters talk on stderr.
    with cli.quiet_stderr():
        exported = cf.export_model(
            trained.model,
            out,
            class_names=trained.class_names,
            examples=(images, labels),
            representative=data.train.images,
            formats=formats,
            max_accuracy_loss=FLAGS.max_accuracy_loss,
            progress=lambda line: print(line, flush=True),
        )
    print(f"\n{exported.table()}\n")
    print(
        "ms an image: calls of one image; .tflite files on one thread, the others as TensorFlow "
        f"is set up\nall files are in {exported.directory}"
    )


if __name__ == "__main__":
    cli.run(main)
