"""A process of a team, for test_distribution: does what the JSON in its argument says.

Keys: out (a folder for what it leaves), images (an .npz), jobs (a list, each with the arguments of
`train_recipe`, and kill_at or term_at: the step at which it sends itself SIGKILL or SIGTERM), cpus
(logical devices), shares (whether to keep the rows that this replica trained on).
"""

import json
import os
import signal
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf

import cifarflow as cf
from cifarflow.data.splits import Dataset, Split
from cifarflow.training import distribution
from cifarflow.training.checkpoints import hash_arrays


def keep_shares(kept):
    """Has each worker keep the rows that it trains on."""
    share_of = distribution.Team.share_of

    def kept_share_of(self, values, index):
        share = share_of(self, values, index)
        if values.shape.rank != 4:
            return share
        (seen,) = tf.numpy_function(lambda rows: [kept.append(rows) or rows], [share], [tf.uint8])
        seen.set_shape(share.shape)
        return seen

    distribution.Team.share_of = kept_share_of


def signal_hooks(job):
    for name, number in (("kill_at", signal.SIGKILL), ("term_at", signal.SIGTERM)):
        at = job.pop(name, None)
        if at is not None:
            yield cf.Hook(
                cf.Every(steps=1),
                lambda state, at=at, number=number: (
                    os.kill(os.getpid(), number) if state.step == at else None
                ),
            )
        else:
            # Checkpoints of one life must fit the hooks of the next.
            yield cf.Hook(cf.Every(steps=1))


def do(job, data):
    """Runs one job; returns what is told of it, and its weights."""
    try:
        run = cf.train_recipe(
            job.pop("recipe", "lab_cnn"),
            dataset=data,
            hooks=list(signal_hooks(job)),
            checkpoint_every=cf.Every(steps=4),
            **job,
        )
    except (cf.CifarflowError, cf.TrainingInterrupted) as error:
        told = {"kind": type(error).__name__, "error": str(error)}
        return {**told, "step": getattr(error, "step", None)}, []
    told = {
        "summary": run.summary,
        "rows": run.history.rows,
        "has_workdir": run.workdir is not None,
        "weights": hash_arrays(run.model.variables),
    }
    return told, [np.asarray(v) for v in run.model.variables]


def main():
    spec = json.loads(sys.argv[1])
    cpus = spec.get("cpus", 1)
    if cpus > 1:
        device = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            device, [tf.config.LogicalDeviceConfiguration()] * cpus
        )
    with np.load(spec["images"]) as file:
        splits = [Split(file[f"{n}_images"], file[f"{n}_labels"]) for n in ("a", "b", "c")]
    data = Dataset("some", *splits, tuple("abcdefghij"), "a file")
    kept = []
    if spec.get("shares"):
        keep_shares(kept)
    out = Path(spec["out"])
    out.mkdir()
    told = []
    for place, job in enumerate(spec["jobs"]):
        what, weights = do(job, data)
        told.append(what)
        np.savez(out / f"{place}.npz", *weights)
    if kept:
        np.save(out / "shares.npy", np.stack(kept))
    (out / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
