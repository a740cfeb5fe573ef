"""Finds the largest batch that fits into memory, and the smallest that is about as fast as any.

    python examples/find_batch_size.py --recipe=lab_cnn
    python examples/find_batch_size.py --recipe=fast94 --memory_limit_gib=4 --accumulate_steps=8

Any field of the recipe is a flag.  Batches double until memory is exhausted, or --memory_limit_gib;
each is trained for a second in a process of its own, so that running out of memory ends nothing
else.
"""

from __future__ import annotations

from absl import flags

import cifarflow as cf
from cifarflow import cli
from cifarflow.errors import check_float, check_int

FLAGS = flags.FLAGS
cli.define_recipe_flags("lab_cnn")
flags.DEFINE_string(
    "data_dir", None, "where the data is, a file or folder (default: search, see README)"
)
flags.DEFINE_float(
    "memory_limit_gib",
    None,
    "what a process may take, of the GPU's memory where there is one (default: nine tenths of what "
    "is free; of a GPU's all)",
)
flags.DEFINE_integer("multiple", 32, "batch sizes are multiples of this")
flags.DEFINE_integer("largest", None, "no larger one is tried (default: all training images)")
flags.DEFINE_float("seconds", 1.0, "how long each is timed")


def main() -> None:
    recipe = cli.recipe_from_flags()
    # All of them before the data is read.
    multiple = check_int("--multiple", FLAGS.multiple)
    if FLAGS.largest is not None:
        check_int("--largest", FLAGS.largest, minimum=multiple)
    if FLAGS.memory_limit_gib is not None:
        check_float("--memory_limit_gib", FLAGS.memory_limit_gib, above_minimum=True)
    check_float("--seconds", FLAGS.seconds, above_minimum=True)
    dataset = cf.load_recipe_data(recipe, data_dir=FLAGS.data_dir)
    print(cf.BatchSizes((), None).table(), flush=True)
    found = cf.find_batch_size(
        recipe,
        dataset=dataset,
        memory_limit_gib=FLAGS.memory_limit_gib,
        multiple=multiple,
        largest=FLAGS.largest,
        seconds=FLAGS.seconds,
        report=lambda trial: print(trial.describe(), flush=True),
    )
    limit = found.memory_limit_bytes
    held = "" if limit is None else f" into {limit / 2**30:.3g} GiB"
    # Where none was too large, there may be more to it.
    tried = "" if found.is_bounded else " of those tried"
    print(f"{recipe.name}: the largest batch{tried} that fits{held} is {found.largest}")
    print(f"the smallest within 5 % of the best throughput is {found.efficient}")


if __name__ == "__main__":
    cli.run(main)
