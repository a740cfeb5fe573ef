"""Trials: one compiled step for many seeds, each bit for bit the run that `train_recipe` makes."""

import dataclasses

import numpy as np
import pytest
import tiny

from cifarflow.data.splits import Dataset
from cifarflow.errors import ConfigError, DataError, NonFiniteError
from cifarflow.recipes import Recipe, get_recipe, train_recipe
from cifarflow.trials import Trials

MLP = Recipe("tiny", **tiny.MLP, batch_size=8, epochs=2.0, eval_batch_size=16, augment="altflip")
# All that a speed recipe has: whitening, Muon, rates of their own, averages, views.
SPEEDNET = Recipe(
    "tiny speednet",
    model="speednet",
    model_options={"widths": (8,), "logit_scale": 1 / 64, "logit_stddev": 1.0, "dropout": 0.2},
    batch_size=8,
    epochs=1.5,
    eval_batch_size=16,
    optimizer="muon",
    learning_rate=0.2,
    learning_rate_scales={"beta": 4.0, "classifier/kernel": 30.0},
    scaled_velocity=False,
    whitening_bias_epochs=0.5,
    schedule="one_cycle",
    averaging="lookahead",
    augment="altflip,crop:2,brightness:0.1",
    tta="multicrop",
    tta_share=0.3,
    precision="float32",
)


class Lines:
    """Keeps what a progress view is told."""

    def __init__(self):
        self.steps = []

    def update(self, step, *, loss, accuracy, images_per_second):
        assert np.isfinite([loss, accuracy, images_per_second]).all()
        self.steps.append(step)

    def line(self, text):
        raise AssertionError(text)


@pytest.fixture(scope="module")
def dataset():
    return tiny.dataset()


@pytest.mark.parametrize("recipe", [MLP, SPEEDNET], ids=lambda recipe: recipe.name)
def test_a_trial_is_the_run_of_its_seed(dataset, recipe):
    trials = Trials(recipe, dataset)
    for seed in (3, 0, 3):
        trial = trials.run(seed)
        run = train_recipe(dataclasses.replace(recipe, seed=seed), dataset=dataset)
        assert trial.weights_sha256 == run.summary["weights_sha256"]
        assert trial.accuracy == run.summary["test_accuracy"]
        assert trial.loss == pytest.approx(run.summary["test_loss"], abs=1e-6)
        assert trial.steps == run.summary["steps"] == trials.total_steps
        assert trial.seed == seed
        assert trial.read == "test"
        assert trial.curve == ()
        assert 0 < trial.train_seconds < trial.seconds
    assert trials.traces == 1


def test_seeds_differ(dataset):
    trials = Trials(MLP, dataset)
    assert trials.run(0).weights_sha256 != trials.run(1).weights_sha256


def test_a_curve_is_of_validation_and_changes_nothing(dataset):
    trials, view = Trials(MLP, dataset), Lines()
    trial = trials.run(0, curve_epochs=0.75, progress=view)
    assert [epochs for _, epochs, _ in trial.curve] == [0.75, 1.5, 2.0]
    seconds = [second for second, _, _ in trial.curve]
    assert seconds == sorted(seconds)
    assert seconds[-1] == pytest.approx(trial.train_seconds)
    assert view.steps[-1] == trials.total_steps
    assert trial.weights_sha256 == trials.run(0).weights_sha256
    last = Trials(MLP, dataset, read="validation").run(0)
    assert last.read == "validation"
    assert last.accuracy == trial.curve[-1][2]


def test_the_test_set_is_left_alone_when_tuning(dataset):
    class Closed:
        def __len__(self):
            return 30

        @property
        def images(self):
            raise AssertionError("the test set was read")

    without = Dataset(
        "tiny", dataset.train, dataset.validation, dataset.test, tiny.NAMES, "generated"
    )
    object.__setattr__(without, "test", Closed())
    assert Trials(MLP, without, read="validation").run(0).read == "validation"


def test_bad_input(dataset):
    with pytest.raises(ConfigError, match=r"read must be .*, not 'train'"):
        Trials(MLP, dataset, read="train")
    bare = tiny.dataset(validation=0)
    with pytest.raises(DataError, match="must have validation images, not 0"):
        Trials(MLP, bare, read="validation")
    trials = Trials(MLP, bare)
    with pytest.raises(ConfigError, match=r"curve_epochs must be 0 without validation .* not 0.5"):
        trials.run(0, curve_epochs=0.5)
    with pytest.raises(ConfigError, match=r"curve_epochs must be .*, not -1"):
        trials.run(0, curve_epochs=-1.0)
    with pytest.raises(ConfigError, match=r"seed must be .*, not -1"):
        trials.run(-1)


def test_images_that_do_not_stay_resident(dataset, monkeypatch):
    monkeypatch.setattr("cifarflow.data.pipeline._MOST_RESIDENT_BYTES", 100)
    with pytest.raises(ConfigError, match="images must take at most 4 GiB"):
        Trials(MLP, dataset)


def test_a_loss_that_is_not_finite(dataset):
    recipe = dataclasses.replace(
        MLP, learning_rate=1e30, model_options={"units": (8,), "activation": "relu"}
    )
    with pytest.raises(NonFiniteError, match="of seed 5: try a smaller learning_rate than 1e"):
        Trials(recipe, dataset).run(5)


def test_the_fast_recipes_fit_together():
    for name in ("fast75", "fast94", "fast95", "fast96"):
        recipe = get_recipe(name)
        assert recipe.model == "speednet"
        assert not recipe.validation_fraction
