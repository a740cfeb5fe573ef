"""The pieces in a loop of one's own: pipeline, model, optimiser and step, no recipe.

python examples/custom_loop.py --steps=1250
"""

from __future__ import annotations

from absl import flags

from cifarflow import cli
from cifarflow.data.dataset import load_data
from cifarflow.data.pipeline import ArrayBatches, evaluation_batches
from cifarflow.errors import check_int
from cifarflow.models.cnn import cnn
from cifarflow.optimizers.sgd import SGD
from cifarflow.training.step import Sums, make_eval_step, make_train_step

FLAGS = flags.FLAGS
flags.DEFINE_enum("data", "auto", ("auto", "cifar10", "standin"), "which data")
flags.DEFINE_integer("steps", 500, "how many steps of batch 32")


def main() -> None:
    steps = check_int("--steps", FLAGS.steps)
    data = load_data(FLAGS.data)
    batches = ArrayBatches(data.train.images, data.train.labels, batch_size=32, seed=0)
    model = cnn(seed=0)
    optimizer = SGD(0.01, momentum=0.9, nesterov=True, decay=1e-6)
    train_step = make_train_step(model, optimizer)
    eval_step = make_eval_step(model)

    sums = Sums.zero()
    for step, (images, labels) in enumerate(batches.dataset(0, steps), 1):
        sums += train_step(images, labels)
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {float(sums.loss / sums.examples):.3f}")
            sums = Sums.zero()

    for images, labels in evaluation_batches(data.validation.images, data.validation.labels):
        sums += eval_step(images, labels)
    accuracy = float(sums.correct / sums.examples)
    print(f"{data.name}: validation accuracy {accuracy:.3f} after {steps} steps")


if __name__ == "__main__":
    cli.run(main)
