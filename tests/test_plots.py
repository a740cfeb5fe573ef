"""What the pictures say, read back from the figures and from the saved files."""

import itertools
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from cifarflow.errors import ConfigError, DataError, WorkdirError
from cifarflow.evaluation.confidence import calibration
from cifarflow.reporting.plots import (
    BLUE,
    DOTS_PER_INCH,
    GREEN,
    INK,
    MUTED,
    VERMILION,
    figure_style,
    plot_augmentations,
    plot_comparison,
    plot_confusion_matrix,
    plot_ensemble,
    plot_history,
    plot_learning_rates,
    plot_mistakes,
    plot_model_eval,
    plot_predictions,
    plot_random_from_each_class,
    plot_reliability,
)
from cifarflow.training.lr_finder import LearningRates

NAMES = ["cat", "dog", "ship"]


class Curves:
    """A history of which the plots need one method."""

    def __init__(self, **series):
        self._series = series

    def series(self, split, key):
        return self._series.get(f"{split}_{key}", ([], []))


@pytest.fixture
def history():
    return Curves(
        train_loss=([0.5, 1.0, 1.5, 2.0], [2.0, 1.5, 1.2, 1.0]),
        train_accuracy=([0.5, 1.0, 1.5, 2.0], [0.2, 0.4, 0.5, 0.6]),
        validation_loss=([1.0, 2.0], [1.4, 1.6]),
        validation_accuracy=([1.0, 2.0], [0.41, 0.52]),
    )


@pytest.fixture
def examples():
    """30 images of three classes; image i is filled with the value i."""
    images = np.broadcast_to(np.arange(30, dtype=np.uint8)[:, None, None, None], (30, 8, 8, 3))
    return images.copy(), np.arange(30) % 3


@pytest.fixture
def probabilities(examples):
    """Every image is taken for a dog with 80 %."""
    return np.tile([0.1, 0.8, 0.1], (len(examples[0]), 1))


RATES = LearningRates(
    (0.001, 0.01, 0.1, 1.0), (2.0, 1.9, 1.0, 9.0), (2.0, 1.9, 1.2, 3.0), False, 0.03, 0.01
)
MATRIX = np.array([[3, 1, 0], [0, 2, 2], [0, 0, 0]])


def texts(figure):
    """Every text that is drawn in a figure and its subfigures."""
    found = [figure.get_suptitle()]
    for ax in figure.axes:
        found += [ax.get_title(loc) for loc in ("left", "center", "right")]
        found += [ax.get_xlabel(), ax.get_ylabel(), *(text.get_text() for text in ax.texts)]
        found += [label.get_text() for label in (*ax.get_xticklabels(), *ax.get_yticklabels())]
        if ax.get_legend():
            found += [text.get_text() for text in ax.get_legend().get_texts()]
    return [text for text in found if text]


def images_shown(figure):
    """The fill value of each image drawn, in order of the axes."""
    return [int(np.asarray(ax.images[0].get_array()).flat[0]) for ax in figure.axes if ax.images]


# --- plot_augmentations

DRAWN = {
    "originals": np.full((3, 8, 8, 3), 7, np.uint8),
    # Beyond the scale at both of its ends.
    "draws": np.broadcast_to(
        np.array([-9.0, 100.4, 300.0])[None, :, None, None, None], (3, 3, 8, 8, 3)
    ),
    "names": ["flip", "randaugment:2x9", "all together"],
}


def test_a_row_has_the_original_and_its_draws():
    captions = [["", "", ""], ["", "", ""], ["cat 0.52\ndog 0.48", "cat 1.00", "a"]]
    figure = plot_augmentations(**DRAWN, captions=captions, title="lab, seed 3")
    assert images_shown(figure) == [7, 0, 100, 255] * 3
    assert [ax.get_ylabel() for ax in figure.axes[::4]] == DRAWN["names"]
    assert [ax.get_title("center") for ax in figure.axes[:4]] == [
        *("original", "step 0", "step 1", "step 2")
    ]
    assert [ax.get_xlabel() for ax in figure.axes[8:]] == ["", *captions[2]]
    assert figure.get_suptitle() == "lab, seed 3"
    plain = plot_augmentations(**DRAWN)
    assert not any(ax.get_xlabel() for ax in plain.axes)
    assert plain.get_size_inches()[1] < figure.get_size_inches()[1]


def test_no_text_of_augmentations_is_cut_off_or_runs_into_another(tmp_path):
    wide = [["automobile 0.52\nairplane 0.48"] * 3] * 3
    title = "cifar10, seed 2147483647"
    figure = plot_augmentations(**DRAWN, captions=wide, title=title, path=tmp_path / "some.png")
    shown = [figure._suptitle, *(ax.title for ax in figure.axes)]
    shown += [label for ax in figure.axes for label in (ax.xaxis.label, ax.yaxis.label)]
    boxes = [text.get_window_extent() for text in shown if text.get_text()]
    assert len(boxes) == 1 + 4 + 9 + 3
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0  # noqa: PT018
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1  # noqa: PT018
    for first, second in itertools.combinations(boxes, 2):
        assert not first.overlaps(second)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"originals": np.zeros((3, 8, 8, 3))}, r"originals must be .* uint8 .*float64"),
        ({"originals": np.zeros((3, 8, 8, 2), np.uint8)}, "originals must be .* C 1 or 3"),
        ({"originals": np.zeros((0, 8, 8, 3), np.uint8)}, "originals must be "),
        ({"draws": np.zeros((3, 8, 8, 3))}, r"draws must be \[3, N, 8, 8, 3\]"),
        ({"draws": np.zeros((2, 3, 8, 8, 3))}, r"draws must be \[3, N, .* not \[2, 3, 8, 8, 3\]"),
        ({"draws": np.zeros((3, 0, 8, 8, 3))}, "draws must be "),
        ({"draws": np.full((3, 1, 8, 8, 3), np.nan)}, "draws must be finite numbers"),
        ({"names": ["a"]}, "names must be 3, one a row, not 1"),
        ({"captions": [["a"]] * 3}, r"captions must be 3 rows of 3, not of \[1, 1, 1\]"),
    ],
)
def test_augmentations_that_do_not_fit_together(change, line):
    with pytest.raises(DataError, match=line):
        plot_augmentations(**{**DRAWN, **change})


# --- plot_random_from_each_class


def test_each_column_shows_its_class(examples):
    images, labels = examples
    figure = plot_random_from_each_class(
        images, labels, examples_per_class=4, class_names=NAMES, seed=0, title="lab, standin"
    )
    shown = np.array(images_shown(figure)).reshape(4, 3)
    assert (labels[shown] == [0, 1, 2]).all()
    assert len(set(shown.flat)) == 12  # without repeats
    assert [ax.get_title() for ax in figure.axes[:3]] == NAMES
    assert figure.get_suptitle() == "lab, standin"


def test_the_seed_chooses_the_images(examples):
    def shown(seed):
        return images_shown(plot_random_from_each_class(*examples, class_names=NAMES, seed=seed))

    assert shown(1) == shown(1)
    assert shown(1) != shown(2)
    assert len(shown(None)) == 9


def test_a_class_with_few_images_shows_those(examples):
    images, labels = examples[0][:5], np.array([0, 0, 0, 0, 1])
    figure = plot_random_from_each_class(images, labels, class_names=NAMES, seed=0)
    assert sorted(images_shown(figure)) in ([0, 1, 2, 4], [0, 1, 3, 4], [0, 2, 3, 4], [1, 2, 3, 4])
    assert len(figure.axes) == 9


def test_grey_images_are_shown_as_they_are(examples):
    images, labels = examples
    figure = plot_random_from_each_class(images[..., :1], labels, class_names=NAMES, seed=0)
    image = figure.axes[0].images[0]
    assert image.get_array().shape == (8, 8)
    assert image.get_clim() == (0, 255)


def test_examples_per_class_must_be_positive(examples):
    with pytest.raises(ConfigError, match="examples_per_class must be a whole number >= 1, not 0"):
        plot_random_from_each_class(*examples, class_names=NAMES, examples_per_class=0)


# --- plot_history


def test_history_lines_are_the_series(history):
    figure = plot_history(history, title="lab_cnn, standin")
    assert [ax.get_title("left") for ax in figure.axes] == ["Loss", "Accuracy"]
    for ax, key in zip(figure.axes, ("loss", "accuracy"), strict=True):
        assert ax.get_xlabel() == "epoch"
        for line, split in zip(ax.lines, ("train", "validation"), strict=True):
            epochs, values = history.series(split, key)
            assert line.get_xdata().tolist() == epochs
            assert line.get_ydata().tolist() == values
    assert figure.get_suptitle() == "lab_cnn, standin"


def test_history_names_the_best_of_each_curve(history):
    legends = [
        [text.get_text() for text in ax.get_legend().get_texts()]
        for ax in plot_history(history).axes
    ]
    assert legends == [
        ["train, best 1.000 at epoch 2", "validation, best 1.400 at epoch 1"],
        ["train, best 0.600 at epoch 2", "validation, best 0.520 at epoch 2"],
    ]


def test_train_and_validation_differ_by_more_than_colour(history):
    train, validation = plot_history(history).axes[0].lines
    assert train.get_linestyle() != validation.get_linestyle()
    assert train.get_marker() != validation.get_marker()


def test_long_curves_have_no_markers():
    steps = list(np.linspace(0, 5, 200))
    figure = plot_history(Curves(train_loss=(steps, steps)))
    assert figure.axes[0].lines[0].get_marker() in ("None", None, "")


def test_empty_history_says_so(tmp_path):
    figure = plot_history(Curves(), path=tmp_path / "empty.png")
    assert [ax.texts[0].get_text() for ax in figure.axes] == ["nothing logged", "nothing logged"]


def test_losses_that_are_not_finite_leave_a_gap(tmp_path):
    curves = Curves(
        train_loss=([1.0, 2.0, 3.0], [2.0, float("nan"), float("inf")]),
        validation_loss=([1.0], [float("nan")]),
    )
    figure = plot_history(curves, path=tmp_path / "nan.png")
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["train, best 2.000 at epoch 1", "validation"]


# --- plot_confusion_matrix


def test_cells_say_count_and_share_of_the_row():
    ax = plot_confusion_matrix(MATRIX, class_names=NAMES, title="lab_mlp").axes[0]
    found = {}
    for text in ax.texts:
        x, y = text.get_position()
        found.setdefault((round(y), round(x)), []).append(text.get_text())
    assert found[0, 0] == ["3", "75.0%"]
    assert found[0, 1] == ["1", "25.0%"]
    assert found[1, 2] == ["2", "50.0%"]
    assert found[0, 2] == ["0", "0.0%"]
    assert found[2, 0] == ["0", "-"]  # a row without examples has no shares
    assert found[0, 3] == ["75.0%"]
    assert found[1, 3] == ["50.0%"]
    assert found[2, 3] == ["no examples"]
    assert ax.get_title("left") == "Confusion matrix: 62.5% of 8 right"
    assert [label.get_text() for label in ax.get_yticklabels()] == NAMES
    assert [label.get_text() for label in ax.get_xticklabels()] == NAMES
    assert ax.get_ylabel() == "true class"
    assert ax.get_xlabel() == "predicted class"


def test_matrix_colours_are_the_row_shares():
    image = plot_confusion_matrix(MATRIX, class_names=NAMES).axes[0].images[0]
    assert np.allclose(image.get_array(), [[0.75, 0.25, 0], [0, 0.5, 0.5], [0, 0, 0]])
    assert image.get_clim() == (0, 1)


def test_matrix_without_examples(tmp_path):
    figure = plot_confusion_matrix(
        np.zeros((2, 2), int), class_names=["a", "b"], path=tmp_path / "m.png"
    )
    assert "Confusion matrix: no examples" in texts(figure)


def luminance(colour):
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(first, second):
    darker, lighter = sorted([luminance(first), luminance(second)])
    return (lighter + 0.05) / (darker + 0.05)


def test_every_cell_can_be_read():
    shares = np.array([0, 5, 20, 30, 40, 46, 47, 48, 50, 60, 80, 100])
    matrix = np.zeros((len(shares), len(shares)), int)
    matrix[:, 0] = shares
    matrix[:, 1] = 100 - shares
    ax = plot_confusion_matrix(matrix, class_names=[str(share) for share in shares]).axes[0]
    image = ax.images[0]
    for text in ax.texts:
        x, y = text.get_position()
        if round(x) == 0 and 0 <= round(y) < len(shares):
            cell = image.cmap(image.norm(matrix[round(y), 0] / 100))
            assert contrast(cell[:3], text.get_color()) > 4


def test_line_and_text_colours_stand_out_from_white():
    assert all(contrast("white", colour) > 3.5 for colour in (BLUE, VERMILION))
    assert all(contrast("white", colour) > 4.5 for colour in (GREEN, INK, MUTED))


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_no_texts_of_the_matrix_overlap(num_classes):
    matrix = np.full((num_classes, num_classes), 10_000)
    names = [f"automobile{number}" for number in range(num_classes)]
    figure = plot_confusion_matrix(matrix, class_names=names, title="lab_cnn, standin")
    figure.draw_without_rendering()
    ax = figure.axes[0]
    heading = next(t for t in ax.findobj(Text) if t.get_text().startswith("Confusion"))
    boxes = [text.get_window_extent() for text in (heading, *ax.texts)]
    for first, second in itertools.combinations(boxes, 2):
        assert not first.overlaps(second)


# --- plot_predictions


def test_right_and_wrong_predictions(examples, probabilities):
    images, labels = examples
    figure = plot_predictions(
        images, labels, probabilities, class_names=NAMES, count=30, seed=0, title="lab_cnn"
    )
    shown = images_shown(figure)
    assert sorted(shown) == list(range(30))
    for ax, index in zip(figure.axes, shown, strict=True):
        frame = ax.spines["left"]
        if labels[index] == 1:
            assert ax.get_title() == "✓ dog 80%"
            assert ax.get_xlabel() == ""
            assert frame.get_linestyle() == "-"
        else:
            assert ax.get_title() == "✗ dog 80%"
            assert ax.get_xlabel() == f"is: {NAMES[labels[index]]}"
            assert frame.get_linestyle() != "-"
        assert frame.get_visible()
    assert figure.get_suptitle() == "lab_cnn"


def test_as_many_predictions_as_asked_for(examples, probabilities):
    def shown(**options):
        return images_shown(
            plot_predictions(*examples, probabilities, class_names=NAMES, **options)
        )

    assert len(shown()) == 12
    assert len(shown(count=99)) == 30
    assert shown(seed=3, count=7) == shown(seed=3, count=7)
    assert shown(seed=3, count=7) != shown(seed=4, count=7)


def test_one_prediction(examples, probabilities, tmp_path):
    plot_predictions(
        *examples, probabilities, class_names=NAMES, count=1, path=tmp_path / "one.png"
    )


def test_count_must_be_positive(examples, probabilities):
    with pytest.raises(ConfigError, match="count must be a whole number >= 1, not 0"):
        plot_predictions(*examples, probabilities, class_names=NAMES, count=0)


def test_half_precision_probabilities_are_taken(examples, probabilities):
    plot_predictions(*examples, probabilities.astype(np.float16), class_names=NAMES)


# --- plot_model_eval


def test_model_eval_is_made_of_the_three(history, examples, probabilities, tmp_path):
    images, labels = examples
    figure = plot_model_eval(
        history,
        MATRIX,
        images,
        labels,
        probabilities,
        class_names=NAMES,
        seed=5,
        title="lab_cnn, standin",
        path=tmp_path / "eval.png",
    )
    found = texts(figure)
    assert found[0] == "lab_cnn, standin"
    for part in (
        plot_history(history),
        plot_confusion_matrix(MATRIX, class_names=NAMES),
        plot_predictions(images, labels, probabilities, class_names=NAMES, seed=5, count=12),
    ):
        expected = texts(part)
        for text in set(expected):
            if not text.replace(".", "").isdigit():  # ticks depend on the size of the axes
                assert found.count(text) >= expected.count(text)


def test_no_text_of_model_eval_is_cut_off(history, examples, probabilities, tmp_path):
    figure = plot_model_eval(
        history,
        MATRIX,
        *examples,
        probabilities,
        class_names=["airplane", "automobile", "bird"],
        title="lab_cnn",
        path=tmp_path / "eval.png",
    )
    inside = figure.bbox.padded(1)
    for ax in figure.axes:
        box = ax.get_tightbbox()
        assert inside.x0 <= box.x0
        assert inside.y0 <= box.y0
        assert box.x1 <= inside.x1
        assert box.y1 <= inside.y1


# --- many classes


def hundred():
    """A matrix of 100 classes with names as long as those of CIFAR-100."""
    names = [f"large_man-made_thing_{number}" for number in range(100)]
    matrix = np.random.default_rng(0).integers(0, 9, (100, 100)) + 50 * np.eye(100, dtype=int)
    return matrix, names


def test_a_matrix_of_many_classes_has_no_numbers_in_its_cells(tmp_path):
    matrix, names = hundred()
    figure = plot_confusion_matrix(matrix, class_names=names, path=tmp_path / "matrix.png")
    ax, bar = figure.axes
    # The accuracy of each class, and nothing in any cell.
    inside = [text for text in ax.texts if text.get_position()[0] < 99.5]
    assert not inside
    assert len(ax.texts) == 100
    assert ax.texts[3].get_text() == f"{matrix[3, 3] / matrix[3].sum():.0%}"
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(labels) == 100
    assert labels[7] == "large_man-made_thin…"
    assert bar.get_ylabel().startswith("share of the true class")
    assert max(figure.get_size_inches()) < 16
    # Names do not meet.
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    for upper, lower in itertools.pairwise(boxes):
        assert lower.y1 <= upper.y0 + 1
    assert "accuracy" not in {text.get_text() for text in ax.texts}
    assert ax.get_title(loc="left").startswith("Confusion matrix: ")


def test_of_very_many_classes_some_are_named():
    matrix = np.eye(400, dtype=int)
    figure = plot_confusion_matrix(matrix, class_names=[str(i) for i in range(400)])
    assert max(figure.get_size_inches()) < 16
    assert len(figure.axes[0].get_yticklabels()) == 100
    assert len(figure.axes[0].texts) == 100


def test_of_many_classes_twenty_are_shown():
    _, names = hundred()
    images = np.zeros((200, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(200) % 100
    labels = np.arange(200) % 100
    options = {"class_names": names, "examples_per_class": 2}
    figure = plot_random_from_each_class(images, labels, **options, seed=1)
    assert len(figure.axes) == 40
    columns = images_shown(figure)[:20]
    assert columns == sorted(set(columns))
    titles = [ax.get_title() for ax in figure.axes[:20]]
    assert all(len(title) <= 14 for title in titles)
    other = plot_random_from_each_class(images, labels, **options, seed=2)
    assert images_shown(other)[:20] != columns


def test_model_eval_of_many_classes_fits(history, tmp_path):
    matrix, names = hundred()
    images, labels = np.zeros((100, 4, 4, 3), np.uint8), np.arange(100)
    chances = np.full((100, 100), 0.01)
    figure = plot_model_eval(history, matrix, images, labels, chances, class_names=names)
    assert max(figure.get_size_inches()) < 23


# --- plot_learning_rates


def test_learning_rates_are_drawn_and_marked():
    figure = plot_learning_rates(RATES, current=0.2, title="lab_cnn, standin")
    (ax,) = figure.axes
    raw, smoothed = ax.lines[:2]
    np.testing.assert_array_equal(raw.get_xydata(), np.transpose([RATES.rates, RATES.losses]))
    np.testing.assert_array_equal(
        smoothed.get_xydata(), np.transpose([RATES.rates, RATES.smoothed])
    )
    assert ax.get_xscale() == "log"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "loss of a batch",
        "smoothed",
        "steepest slope: 0.03",
        "a tenth of the minimum's: 0.01",
        "the present one: 0.2",
    ]
    # What is said by colour is said by marker and line too.
    marks = [line for line in ax.lines if line.get_marker() not in ("", "None", None)]
    assert len({(line.get_marker(), line.get_linestyle()) for line in marks}) == 3
    np.testing.assert_allclose(marks[1].get_xydata(), [[0.01, 1.9]], rtol=1e-6)
    low, high = ax.get_ylim()
    assert low < 1.2
    assert high < 3  # the rise at the end is left out
    figure.canvas.draw()
    ticks = [label.get_text() for label in ax.get_xticklabels()]
    assert "0.01" in ticks
    assert not any("$" in tick for tick in ticks)


def test_learning_rates_without_a_suggestion():
    flat = LearningRates((0.1, 1.0), (2.0, 2.0), (2.0, 2.0), True, None, None)
    (legend,) = plot_learning_rates(flat).legends
    assert len(legend.get_texts()) == 2
    with pytest.raises(ConfigError, match="current must be a finite number > 0, not -1"):
        plot_learning_rates(RATES, current=-1)


# --- plot_comparison


def test_comparison_shows_runs_means_and_references():
    figure = plot_comparison(
        ["lab_mlp", "lab_cnn", "lab_final"],
        [[0.48, 0.50], [0.66], []],
        reference=[0.485, None, 0.758],
        reference_name="notebook",
        metric="accuracy on the test set",
        title="The lab",
    )
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "lab_mlp",
        "lab_cnn",
        "lab_final",
    ]
    drawn = {}
    for line in ax.lines:
        drawn.setdefault(line.get_label(), []).append(list(np.ravel(line.get_xdata())))
    assert drawn["one run"] == [[0.48, 0.50], [0.66]]
    assert np.allclose(drawn["mean"], [[0.49, 0.49], [0.66, 0.66]])
    assert drawn["notebook"] == [[0.485], [0.758]]
    assert [text.get_text() for text in ax.texts] == [
        "0.490 ± 0.014  (2 runs)",
        "notebook 0.485",
        "0.660",
        "notebook 0.758",
    ]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(legend) == ["mean", "notebook", "one run"]
    assert ax.get_xlabel() == "accuracy on the test set"
    assert figure.get_suptitle() == "The lab"
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first recipe is on top


def test_comparison_without_references():
    figure = plot_comparison(["a"], [[0.5]])
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.500"]


@pytest.mark.parametrize(
    ("measured", "reference", "message"),
    [
        ([[0.5]], None, "measured must hold 2 entries, as names, not 1"),
        ([[0.5], []], [0.4], "reference must hold 2 entries, as names, not 1"),
        ([[], []], [None, None], "nothing to compare"),
        ([[0.5], [float("nan")]], None, "values to compare must be finite, not nan"),
    ],
)
def test_comparison_quotes_bad_input(measured, reference, message):
    with pytest.raises(DataError, match=message):
        plot_comparison(["a", "b"], measured, reference=reference)


# --- bad arrays


def good_arguments():
    images = np.zeros((4, 8, 8, 3), np.uint8)
    return {
        "images": images,
        "labels": np.array([0, 1, 2, 0]),
        "probabilities": np.full((4, 3), 1 / 3),
        "class_names": NAMES,
    }


BAD_EXAMPLES = [
    ({"images": np.zeros((4, 8, 8), np.uint8)}, r"not \[4, 8, 8\] uint8"),
    ({"images": np.zeros((4, 8, 8, 3))}, r"not \[4, 8, 8, 3\] float64"),
    ({"images": np.zeros((4, 8, 8, 2), np.uint8)}, r"with C 1 or 3, not \[4, 8, 8, 2\]"),
    ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "at least one image"),
    ({"labels": np.zeros((4, 1), int)}, r"labels must be \[N\] integers, not \[4, 1\] int64"),
    ({"labels": np.zeros(4)}, r"labels must be \[N\] integers, not \[4\] float64"),
    ({"labels": np.array([0, 1])}, "must be a label an image, not 2 for 4"),
    ({"labels": np.array([0, 1, 2, 3])}, r"labels must be in 0\.\.2, .*, not 3"),
    ({"labels": np.array([0, 1, 2, -1])}, r"labels must be in 0\.\.2, .*, not -1"),
    ({"class_names": ["cat", "dog"]}, "as there are 2 class_names, not 2"),
]
BAD_PROBABILITIES = [
    ({"probabilities": np.full((4, 2), 0.5)}, r"must be \[4, 3\], .* not \[4, 2\]"),
    ({"probabilities": np.full((3, 3), 1 / 3)}, r"must be \[4, 3\], .* not \[3, 3\]"),
    ({"probabilities": np.tile([-3.0, 1.0, 3.0], (4, 1))}, r"apply softmax.*not -3\.\.3"),
    ({"probabilities": np.ones((4, 3))}, "add up to 1"),
    ({"probabilities": np.full((4, 3), np.nan)}, "not nan"),
]


@pytest.mark.parametrize(("change", "message"), BAD_EXAMPLES)
def test_random_images_quote_bad_arrays(change, message):
    arguments = good_arguments() | change
    del arguments["probabilities"]
    with pytest.raises(DataError, match=message):
        plot_random_from_each_class(**arguments)


@pytest.mark.parametrize(("change", "message"), BAD_EXAMPLES + BAD_PROBABILITIES)
def test_mistakes_quote_bad_arrays(change, message):
    with pytest.raises(DataError, match=message):
        plot_mistakes(**good_arguments() | change)


@pytest.mark.parametrize(("change", "message"), BAD_EXAMPLES + BAD_PROBABILITIES)
def test_predictions_quote_bad_arrays(change, message):
    with pytest.raises(DataError, match=message):
        plot_predictions(**good_arguments() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((4, 8, 8))}, "images must be"),
        ({"probabilities": np.ones((4, 3))}, "add up to 1"),
        ({"matrix": np.ones((2, 2), int)}, "class_names must hold 2 names"),
    ],
)
def test_model_eval_quotes_bad_arrays(history, change, message):
    arguments = {"history": history, "matrix": MATRIX} | good_arguments() | change
    with pytest.raises(DataError, match=message):
        plot_model_eval(**arguments)


@pytest.mark.parametrize(
    ("matrix", "names", "message"),
    [
        (np.ones((2, 3), int), NAMES, r"must be of shape \[C, C\], not \[2, 3\]"),
        (np.ones((2, 2)), NAMES, "must hold whole numbers, not float64"),
        (MATRIX, NAMES[:2], "class_names must hold 3 names, one a row of the matrix, not 2"),
    ],
)
def test_confusion_matrix_quotes_bad_input(matrix, names, message):
    with pytest.raises(DataError, match=message):
        plot_confusion_matrix(matrix, class_names=names)


# --- plot_mistakes, plot_reliability, plot_ensemble


def test_the_worst_mistake_is_shown_first(examples, probabilities):
    images, labels = examples
    probabilities[4] = [0.02, 0.97, 0.01]  # right
    probabilities[5] = [0.01, 0.96, 0.03]
    probabilities[9] = [0.05, 0.9, 0.05]
    figure = plot_mistakes(
        images, labels, probabilities, class_names=NAMES, count=8, title="lab, standin"
    )
    assert images_shown(figure) == [5, 9, 0, 2, 3, 6, 8, 11]
    assert [ax.get_title("center") for ax in figure.axes[:2]] == ["dog 96.0%", "dog 90.0%"]
    assert [ax.get_xlabel() for ax in figure.axes[:2]] == ["is: ship 3.0%", "is: cat 5.0%"]
    assert figure.get_suptitle() == "lab, standin"
    # All there are, where that is less than asked for.
    assert len(images_shown(plot_mistakes(images, labels, probabilities, class_names=NAMES))) == 20


def test_no_mistakes_are_said_to_be_none(examples):
    images, labels = examples
    figure = plot_mistakes(images, labels, np.eye(3)[labels], class_names=NAMES)
    assert images_shown(figure) == []
    assert "no mistakes" in texts(figure)


def test_count_of_mistakes_must_be_positive(examples, probabilities):
    with pytest.raises(ConfigError, match="count must be a whole number >= 1, not 0"):
        plot_mistakes(*examples, probabilities, class_names=NAMES, count=0)


def test_bars_are_the_bins(examples, probabilities):
    found = calibration(examples[1], probabilities, bins=5)
    figure = plot_reliability(found.bins, title="lab, standin")
    upper, lower = figure.axes
    # All are taken for a dog with 80 %, which a third is.
    bars = upper.containers[0]
    assert [bar.get_height() for bar in bars] == pytest.approx([0, 0, 0, 1 / 3, 0])
    assert [bar.get_x() for bar in bars] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert [bar.get_height() for bar in lower.containers[0]] == [0, 0, 0, 1, 0]
    assert upper.get_title("left") == f"Expected calibration error {found.error:.3f}"
    assert found.error == pytest.approx(0.8 - 1 / 3)
    points = next(line for line in upper.lines if line.get_label() == "mean confidence")
    np.testing.assert_allclose(points.get_xydata(), [[0.8, 1 / 3]])
    assert (lower.get_xlabel(), upper.get_ylabel()) == ("confidence", "accuracy")
    assert figure.get_suptitle() == "lab, standin"


def test_bins_of_no_examples():
    figure = plot_reliability([[None, None, 0]] * 3)
    assert figure.axes[0].get_title("left") == "No examples"


@pytest.mark.parametrize(
    ("bins", "message"),
    [
        ([], "bins must hold at least one, not 0"),
        ([(0.5, 0.5)], r"must be \(mean confidence, accuracy, count\), .* not \(0\.5, 0\.5\)"),
        ([(None, 0.5, 1)], r"not \(None, 0\.5, 1\)"),
        ([(0.5, 1.5, 1)], r"not \(0\.5, 1\.5, 1\)"),
        ([(0.5, 0.5, -1)], r"not \(0\.5, 0\.5, -1\)"),
        ([(0.5, 0.5, 1.5)], r"not \(0\.5, 0\.5, 1\.5\)"),
        ([(0.5, np.nan, 1)], r"not \(0\.5, nan, 1\)"),
        ([(0.5, 0.5, np.inf)], r"not \(0\.5, 0\.5, inf\)"),
        ([("a", 0.5, 1)], r"not \('a', 0\.5, 1\)"),
    ],
)
def test_reliability_quotes_bad_bins(bins, message):
    with pytest.raises(DataError, match=message):
        plot_reliability(bins)


def test_ensembles_are_drawn_by_their_size():
    figure = plot_ensemble([0.7, 0.8], [0.7, 0.9], [0.7, 0.85], metric="test accuracy", title="two")
    (ax,) = figure.axes
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == [
        "mean of one 0.7500",
        "each one alone",
        "together by average, all 0.9000",
        "together by vote, all 0.8500",
    ]
    np.testing.assert_array_equal(
        lines["together by average, all 0.9000"].get_xydata(), [[1, 0.7], [2, 0.9]]
    )
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("members", "test accuracy")
    assert figure.get_suptitle() == "two"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (([], [], []), "members must hold a value for each of one or more members, not 0 for 0"),
        (([0.5], [0.5, 0.6], [0.5]), "average must hold a value for each .* not 2 for 1"),
        (([0.5], [0.5], []), "vote must hold a value for each .* not 0 for 1"),
        (([np.nan], [0.5], [0.5]), "members must be finite, not nan"),
    ],
)
def test_ensembles_quote_bad_values(values, message):
    with pytest.raises(DataError, match=message):
        plot_ensemble(*values)


# --- saving and style


def drawers():
    arguments = good_arguments()
    examples = {key: arguments[key] for key in ("images", "labels")}
    predictions = examples | {"probabilities": arguments["probabilities"]}
    return {
        "random": lambda **o: plot_random_from_each_class(**examples, class_names=NAMES, **o),
        "history": lambda **o: plot_history(Curves(train_loss=([1.0, 2.0], [2.0, 1.0])), **o),
        "matrix": lambda **o: plot_confusion_matrix(MATRIX, class_names=NAMES, **o),
        "predictions": lambda **o: plot_predictions(**predictions, class_names=NAMES, **o),
        "eval": lambda **o: plot_model_eval(
            Curves(), MATRIX, **predictions, class_names=NAMES, **o
        ),
        "augmentations": lambda **o: plot_augmentations(**DRAWN, **o),
        "learning_rates": lambda **o: plot_learning_rates(RATES, **o),
        "comparison": lambda **o: plot_comparison(["a"], [[0.5]], **o),
        "mistakes": lambda **o: plot_mistakes(**predictions, class_names=NAMES, **o),
        "reliability": lambda **o: plot_reliability([(0.4, 0.3, 5), (0.8, 0.9, 7)], **o),
        "ensemble": lambda **o: plot_ensemble([0.5, 0.6], [0.5, 0.7], [0.5, 0.6], **o),
    }


@pytest.mark.parametrize("kind", list(drawers()))
def test_saved_png_has_the_size_of_the_figure(kind, tmp_path):
    path = tmp_path / "new" / "folder" / f"{kind}.png"
    figure = drawers()[kind](title="lab_cnn, standin", path=path)
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        expected = np.floor(figure.get_size_inches() * DOTS_PER_INCH + 1e-6)
        assert np.abs(np.array(image.size) - expected).max() <= 1
        assert len(np.unique(np.asarray(image.convert("L")))) > 10  # something is drawn
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", list(drawers()))
def test_path_without_png_is_refused(kind, tmp_path):
    with pytest.raises(ConfigError, match=r"must end in \.png, not '.*picture\.jpg'"):
        drawers()[kind](path=tmp_path / "picture.jpg")


@pytest.mark.parametrize("kind", list(drawers()))
def test_path_that_cannot_be_written(kind, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(WorkdirError, match=r"cannot write the picture '.*x\.png': \w+") as error:
        drawers()[kind](path=tmp_path / "file" / "x.png")
    assert "\n" not in str(error.value)


def test_names_are_no_formulas(tmp_path):
    names = [r"a $\nosuch$", "$", r"\$x_1$"]
    figure = plot_confusion_matrix(
        np.eye(3, dtype=int), class_names=names, title=names[0], path=tmp_path / "matrix.png"
    )
    assert figure.get_suptitle() == names[0]
    assert not any(text.get_parse_math() for text in figure.findobj(Text) if text.get_text())


def test_failure_leaves_the_old_picture_alone(tmp_path, monkeypatch):
    path = tmp_path / "history.png"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cifarflow.reporting.plots.os.replace", fail)
    with pytest.raises(WorkdirError, match="No space left on device"):
        plot_history(Curves(), path=path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_style_is_the_same_whatever_the_caller_has_set_and_leaves_it_alone(tmp_path):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    drawers()["matrix"](path=first)
    with matplotlib.rc_context({"font.size": 30, "figure.facecolor": "black", "axes.grid": False}):
        drawers()["matrix"](path=second)
        assert matplotlib.rcParams["font.size"] == 30
    assert first.read_bytes() == second.read_bytes()
    with figure_style():
        assert matplotlib.rcParams["font.size"] == 10


def test_pyplot_is_not_loaded_and_no_display_is_needed():
    script = (
        "import sys; from cifarflow.reporting.plots import plot_comparison; "
        "plot_comparison(['a'], [[0.5]]).canvas.draw(); "
        "assert 'matplotlib.pyplot' not in sys.modules; "
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
