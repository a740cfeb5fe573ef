"""What augmentation does to images: a grid, the original on the left and a draw a step beside it.

    python examples/show_augment.py                              # every augmentation
    python examples/show_augment.py --augment=flip,crop:4,mixup:1 --out=mine.png

Each row is an augmentation; of several in --augment the last row has all of them together.  What is
drawn are the batches that training would get at its first steps; where labels are mixed, they stand
below.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np
from absl import flags

import cifarflow as cf
from cifarflow import cli
from cifarflow.data.augment import PARTS, parse_augment
from cifarflow.data.dataset import DATA_CHOICES, check_data
from cifarflow.data.pictures import check_image_size
from cifarflow.errors import ConfigError, WorkdirError, check_int, check_seed

FLAGS = flags.FLAGS
flags.DEFINE_string("augment", None, "as of a recipe (default: each part there is, by itself)")
flags.DEFINE_string(
    "data", "auto", f"{', '.join(DATA_CHOICES)}, folder (of pictures, in data_dir) or tfds:NAME"
)
flags.DEFINE_integer("image_size", 32, "the side of the images of data=folder and tfds:NAME")
flags.DEFINE_string(
    "data_dir", None, "where the data is, a file or folder (default: search, see README)"
)
flags.DEFINE_integer("seed", 0, "seed of the draws, and of which images are shown")
flags.DEFINE_integer("images", 8, "how many draws of each augmentation, one a step")
flags.DEFINE_string("out", "augmentations.png", "the picture, a new file")


def main() -> None:
    count, seed = check_int("--images", FLAGS.images), check_seed(FLAGS.seed)
    name, size = check_data(FLAGS.data), check_image_size(FLAGS.image_size)
    specs = choose(FLAGS.augment)
    out = pathlib.Path(os.path.expanduser(FLAGS.out))
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out must end in .png, not {FLAGS.out!r}")
    if out.exists():
        raise WorkdirError(f"--out must be a new file, and {FLAGS.out!r} is there: give another")
    data = cf.load_data(name, FLAGS.data_dir, image_size=size)
    originals, labels = choose_images(data, len(specs), seed)
    draws, captions = [], []
    for row, spec in enumerate(specs):
        # One step an epoch, in the same order: an image keeps its place.
        batches = cf.ArrayBatches(
            originals,
            labels,
            batch_size=len(originals),
            seed=seed,
            augment=cf.make_augment(spec),
            shuffle=False,
            num_classes=data.num_classes,
        )
        steps = [batches.batch_at(step) for step in range(count)]
        draws.append(np.stack([images[row] for images, _ in steps]).astype(np.float32))
        captions.append([caption(mixed[row], data.class_names) for _, mixed in steps])
    cf.plot_augmentations(
        originals[: len(specs)],
        np.stack(draws),
        names=[*specs[:-1], "all together"] if "," in specs[-1] else specs,
        captions=captions,
        title=f"Augmentations, {data.name}, seed {seed}",
        path=out,
    )
    print(f"picture: {out}, {len(specs)} augmentations of {data.name}, {count} draws of each")


def choose(augment: str | None) -> list[str]:
    """The augmentation of each row.

    Raises:
      ConfigError: if there is none.
    """
    if augment is None:
        return list(map(written, PARTS))
    parts = parse_augment(augment)
    if not parts:
        raise ConfigError(f"--augment must have a part to show, not {augment!r}")
    alone = [text.strip() for text in augment.split(",")]
    return [*alone, ",".join(alone)] if len(alone) > 1 else alone


def written(part: str) -> str:
    """A part with the number that it has unless told otherwise."""
    number = PARTS[part]
    if part == "randaugment":
        return f"{part}:{number[0]}x{number[1]}"
    return part if part.endswith("flip") else f"{part}:{number:g}"


def choose_images(data: cf.Dataset, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image for each row, a class after the other, and two at least, as mixing takes two."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(data.train.labels))
    by_class = [order[data.train.labels[order] == label] for label in range(data.num_classes)]
    chosen = [
        members[row // data.num_classes]
        for row in range(max(rows, 2))
        if len(members := by_class[row % data.num_classes]) > row // data.num_classes
    ]
    return data.train.images[chosen], data.train.labels[chosen]


def caption(label: np.ndarray, class_names: tuple[str, ...]) -> str:
    """What there is of which class in an image whose label is mixed; else nothing."""
    if not label.ndim:
        return ""
    parts = [int(index) for index in np.argsort(-label) if label[index] >= 0.005]
    return "\n".join(f"{class_names[index]} {label[index]:.2f}" for index in parts)


if __name__ == "__main__":
    cli.run(main)
