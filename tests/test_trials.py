"""Trials: one compiled step for many seeds, each bit for bit the run that `train_recipe` makes."""

import dataclasses

import numpy as np
import pytest
import tiny

from cifarflow.data.splits import Dataset, Split
from cifarflow.errors import ConfigError, DataError, NonFiniteError
from cifarflow.evaluation.predict import _make_forward
from cifarflow.recipes.build import build_model
from cifarflow.recipes.named import get_recipe
from cifarflow.recipes.recipe import Recipe
from cifarflow.recipes.run import train_recipe
from cifarflow.training.checkpoints import hash_arrays
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
    freeze={"whitening/bias": 0.5},
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


@pytest.mark.parametrize("tta", ["none", "mirror"])
def test_a_trial_in_parts(dataset, tta):
    recipe = dataclasses.replace(SPEEDNET, tta=tta)
    trials = Trials(recipe, dataset)
    trained = trials.train(2)
    plain, augmented = trials.outputs()
    run = train_recipe(dataclasses.replace(recipe, seed=2), dataset=dataset)
    np.testing.assert_array_equal(augmented, run.test_outputs)
    assert np.array_equal(plain, augmented) == (tta == "none")
    assert hash_arrays(trials.model.variables) == run.summary["weights_sha256"]
    assert (trained.steps, trained.curve) == (trials.total_steps, ())
    assert 0 < trained.train_seconds < trained.seconds


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


def test_test_images_are_first_read_when_a_run_ends(dataset):
    class Closed:
        def __len__(self):
            return 30

        @property
        def images(self):
            raise AssertionError("the images were read")

        @property
        def labels(self):
            raise AssertionError("the labels were read")

    closed = dataclasses.replace(dataset)
    object.__setattr__(closed, "test", Closed())
    # Not even to compile their evaluation.
    trials = Trials(dataclasses.replace(MLP, tta="multicrop"), closed)
    with pytest.raises(AssertionError, match="the images were read"):
        trials.run(0)


@pytest.mark.parametrize("read", ["test", "validation"])
def test_the_evaluation_is_traced_once(dataset, read, monkeypatch):
    traced = []

    def make_forward(model, shape, **options):
        traced.append(shape)
        return _make_forward(model, shape, **options)

    monkeypatch.setattr("cifarflow.evaluation.predict._make_forward", make_forward)
    trials = Trials(dataclasses.replace(MLP, tta="mirror", tta_share=0.3), dataset, read=read)
    assert traced == [tiny.SHAPE]
    for seed in range(2):
        trials.run(seed)
    assert traced == [tiny.SHAPE]


def test_a_trial_takes_as_many_images_as_the_recipe_says(dataset):
    recipe = dataclasses.replace(MLP, limit_examples=24)
    trials = Trials(recipe, dataset)
    trial = trials.run(5, curve_epochs=2.0)
    run = train_recipe(dataclasses.replace(recipe, seed=5), dataset=dataset)
    assert trials.steps_per_epoch == 3
    assert run.summary["examples"] == {"train": 24, "validation": 7, "test": 11}
    assert trial.steps == run.summary["steps"] == 6
    assert trial.weights_sha256 == run.summary["weights_sha256"]
    assert trial.accuracy == run.summary["test_accuracy"]
    assert trial.loss == pytest.approx(run.summary["test_loss"], abs=1e-6)
    assert trial.curve[-1][2] * 7 == pytest.approx(round(trial.curve[-1][2] * 7))
    # A set that was limited before is not limited again.
    assert Trials(recipe, dataset.limit(24)).run(5).accuracy == trial.accuracy
    with pytest.raises(ConfigError, match=r"limit_examples must be at most the 64 .*, not 65"):
        Trials(dataclasses.replace(recipe, limit_examples=65), dataset)


def test_too_few_images_to_whiten_by():
    # Patches of 12 values, of which a single image of 3 x 4 pixels has six.
    rng = np.random.default_rng(0)
    one = Split(rng.integers(0, 256, (1, 3, 4, 3)).astype(np.uint8), np.zeros(1, np.int32))
    recipe = dataclasses.replace(SPEEDNET, batch_size=1, augment="none", tta="none")
    with pytest.raises(DataError, match="at least 12 patches of 2x2 pixels to whiten by, not 6"):
        Trials(recipe, Dataset("one", one, one, one, tiny.NAMES, "generated"))


def test_bad_input(dataset):
    with pytest.raises(ConfigError, match=r"read must be .*, not 'train'"):
        Trials(MLP, dataset, read="train")
    bare = tiny.dataset(validation=0)
    with pytest.raises(DataError, match="must have validation images, not 0"):
        Trials(MLP, bare, read="validation")
    with pytest.raises(ConfigError, match=r"patience_epochs must be 0 for trials, .* not 3$"):
        Trials(dataclasses.replace(MLP, patience_epochs=3), dataset)
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


def test_a_curve_is_of_the_averages(dataset):
    recipe = dataclasses.replace(MLP, averaging="ema", epochs=1.0)
    trial = Trials(recipe, dataset, read="validation").run(0, curve_epochs=1.0)
    assert trial.curve[-1][2] == trial.accuracy


def test_the_last_step_may_be_the_one_that_breaks(dataset, monkeypatch):
    trials = Trials(MLP, dataset)
    monkeypatch.setattr(trials, "_predict", lambda images: np.full((len(images), 10), np.nan))
    with pytest.raises(NonFiniteError, match="the outputs of seed 2 are not finite"):
        trials.run(2)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_a_trial_is_the_run_in_half_precision_too(dataset, precision):
    recipe = dataclasses.replace(MLP, precision=precision, averaging="ema")
    trials = Trials(recipe, dataset)
    trials.run(0)
    run = train_recipe(dataclasses.replace(recipe, seed=4), dataset=dataset)
    assert trials.run(4).weights_sha256 == run.summary["weights_sha256"]


def images_of(count):
    rng = np.random.default_rng(count)
    return Split(
        rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8),
        np.arange(count, dtype=np.int32) % 10,
    )


@pytest.mark.parametrize("name", ["fast75", "fast94", "fast95", "fast96"])
def test_the_fast_recipes_run(name):
    dataset = Dataset("random", images_of(64), images_of(0), images_of(20), tiny.NAMES, "generated")
    widths = {"widths": (8, 8, 8)}
    recipe = get_recipe(name, batch_size=16, epochs=1.5, model_options=widths)
    assert not recipe.validation_fraction
    trial = Trials(recipe, dataset).run(0)
    assert trial.steps == 6
    assert np.isfinite(trial.loss)


@pytest.mark.parametrize("name", ["fast94", "fast96"])
def test_the_whitening_bias_comes_to_rest(name):
    dataset = Dataset("random", images_of(64), images_of(0), images_of(20), tiny.NAMES, "generated")
    freeze = {"whitening/bias": 0.5}
    options = {"batch_size": 16, "freeze": freeze, "precision": "float32"}
    options["model_options"] = {"widths": (8, 8, 8)}
    start = build_model(
        get_recipe(name, **options), image_shape=(32, 32, 3), num_classes=10
    ).get_layer("whitening")
    biases = []
    for epochs in (0.5, 6.0, 8.0):
        # At a constant rate: schedules of runs of different lengths differ.
        recipe = get_recipe(name, epochs=epochs, schedule="constant", averaging="none", **options)
        model = train_recipe(recipe, dataset=dataset).model
        biases.append(model.get_layer("whitening").bias.numpy())
    assert np.abs(biases[0] - start.bias.numpy()).max() > 0
    np.testing.assert_array_equal(biases[1], biases[0])
    np.testing.assert_array_equal(biases[2], biases[0])
