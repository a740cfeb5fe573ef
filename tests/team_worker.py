"""A process of a team, for test_distribution: does what the JSON in its argument says.

Keys: out (a folder for what it leaves), images (an .npz), jobs (a list, each with the arguments of
`train_recipe`, and kill_at or term_at: the step at which it sends itself SIGKILL or SIGTERM), cpus
(logical devices), shares (whether to keep the rows that this replica trained on), poisoned (whether
its team then trains on batches whose gradients are not finite).
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf
import tiny
from test_nonfinite import rough

import cifarflow as cf
from cifarflow.data.splits import Dataset, Split
from cifarflow.recipes import run as run_module
from cifarflow.training import distribution
from cifarflow.training.checkpoints import Checkpoints, hash_arrays
from cifarflow.training.nonfinite import Capsules


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


def keep_teams(kept):
    """Has each team that is opened kept."""
    open_team = run_module.open_team
    run_module.open_team = lambda *args, **kwargs: (
        kept.append(open_team(*args, **kwargs)) or kept[-1]
    )


def load_as_tfds_does(data):
    """Has the data of all runs read by TensorFlow: no cluster can be opened after that."""

    def load(recipe, *, data_dir):
        return data if tf.zeros([]) == 0 else None

    run_module.load_recipe_data = load


def train_poisoned(team, out):
    """A run that skips its step 2, and one that step 3 ends; returns what is told of them."""
    team.signal = 0
    images, labels = tiny.split(8 * 6)
    images = images.astype(np.float32)
    bad_images, bad_labels = images.copy(), labels.copy()
    bad_images[8 * 2 + 3, 1, 1, 1] = np.nan
    bad_labels[8 * 3 : 8 * 4] = 9
    (out / "capsules").mkdir()
    runs = []
    for arrays, options in (
        ((bad_images, labels), {"on_nonfinite": "skip"}),
        ((images, bad_labels), {"loss_fn": rough}),
    ):
        if team.is_chief:
            options["capsules"] = Capsules(out / "capsules")
            options["checkpoints"] = Checkpoints(out / f"checkpoints-{len(runs)}")
        model, error, skipped = tiny.tiny_mlp(), None, None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                run = cf.train(
                    model,
                    cf.SGD(0.01),
                    batches=tf.data.Dataset.from_tensor_slices(arrays).batch(8, True),
                    total_steps=6,
                    checkpoint_every=cf.Every(steps=1),
                    team=team,
                    **options,
                )
                skipped = run.summary["skipped_steps"]
            except cf.NonFiniteError as failure:
                error = str(failure)
        runs.append(
            {
                "error": error,
                "skipped": skipped,
                "said": [str(each.message) for each in said],
                "weights": hash_arrays(model.variables),
            }
        )
    return {"runs": runs, "capsules": sorted(path.name for path in (out / "capsules").iterdir())}


def do(job):
    """Runs one job; returns what is told of it, and its weights."""
    try:
        run = cf.train_recipe(
            job.pop("recipe", "lab_cnn"),
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
    kept, teams, share_of = [], [], distribution.Team.share_of
    if spec.get("shares"):
        keep_shares(kept)
    keep_teams(teams)
    load_as_tfds_does(data)
    out = Path(spec["out"])
    out.mkdir(exist_ok=True)
    told = []
    for place, job in enumerate(spec["jobs"]):
        what, weights = do(job)
        told.append(what)
        np.savez(out / f"{place}.npz", *weights)
    if kept:
        np.save(out / "shares.npy", np.stack(kept))
    distribution.Team.share_of = share_of
    if spec.get("poisoned") and teams:
        told.append(train_poisoned(teams[0], out))
    (out / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
