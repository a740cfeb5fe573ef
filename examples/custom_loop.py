"""The pieces in a loop of one's own: pipeline, model, optimiser and step, no recipe.

    python examples/custom_loop.py --steps=1250

The loop itself is in `main`; the steps are compiled, everything between them is plain Python.
"""

from __future__ import annotations

from absl import flags

import cifarflow as cf
from cifarflow import cli
from cifarflow.data.dataset import DATA_CHOICES, check_data
from cifarflow.data.pictures import check_image_size
from cifarflow.errors import check_int
from cifarflow.training.contract import CHECKED

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "data", "auto", f"{', '.join(DATA_CHOICES)}, folder (of pictures, in data_dir) or tfds:NAME"
)
flags.DEFINE_integer("image_size", 32, "the side of the images of data=folder and tfds:NAME")
flags.DEFINE_string(
    "data_dir", None, "where the data is, a file or folder (default: search, see README)"
)
cli.define_check_flag()
flags.DEFINE_integer("steps", 500, "how many steps of batch 32")


def main() -> None:
    steps = check_int("--steps", FLAGS.steps)
    name, size = check_data(FLAGS.data), check_image_size(FLAGS.image_size)
    data = cf.load_data(name, FLAGS.data_dir, image_size=size)
    batches = cf.ArrayBatches(data.train.images, data.train.labels, batch_size=32, seed=0)
    model = cf.cnn(image_shape=data.image_shape, num_classes=data.num_classes, seed=0)
    optimizer = cf.SGD(0.01, momentum=0.9, nesterov=True, decay=1e-6)
    # A batch of another shape would have the step compiled anew: then this says which.
    train_step = cf.RetraceGuard(cf.make_train_step(model, optimizer))
    eval_step = cf.make_eval_step(model)
    if FLAGS.check:
        cf.check_step(model, optimizer, batches=batches, train_step=train_step)
        print(CHECKED)

    sums = cf.Sums.zero()
    for step, (images, labels) in enumerate(batches.dataset(0, steps), 1):
        sums += train_step(images, labels)
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {float(sums.loss / sums.examples):.3f}")
            sums = cf.Sums.zero()

    for images, labels in cf.evaluation_batches(data.validation.images, data.validation.labels):
        sums += eval_step(images, labels)
    accuracy = float(sums.correct / sums.examples)
    print(f"{data.name}: validation accuracy {accuracy:.3f} after {steps} steps")


if __name__ == "__main__":
    cli.run(main)
