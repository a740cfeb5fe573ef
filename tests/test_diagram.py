"""The model diagram, read back from the figure, and the summary as text."""

import itertools
import os

import keras
import pytest
from keras import layers
from matplotlib.transforms import Bbox
from PIL import Image

from cifarflow.errors import ConfigError, WorkdirError
from cifarflow.reporting.diagram import model_summary, plot_model
from cifarflow.reporting.plots import DOTS_PER_INCH


def linear_model():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3), name="image"),
            layers.Conv2D(4, 3, strides=2, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.Activation("relu", name="relu"),
            layers.MaxPooling2D(name="pool"),
            layers.Dropout(0.25, name="drop"),
            layers.Flatten(name="flat"),
            layers.Dense(10, activation="tanh", name="logits"),
        ],
        name="small",
    )


def residual_model(blocks):
    x = inputs = keras.Input((8, 8, 3))
    for number in range(blocks):
        shortcut = x
        for _ in range(2):
            x = layers.Conv2D(2 + number, 3, padding="same")(x)
            x = layers.BatchNormalization()(x)
            x = layers.Activation("relu")(x)
        if number % 2 == 0:
            shortcut = layers.Conv2D(2 + number, 1)(shortcut)
            x = layers.Add()([x, shortcut])
        else:
            x = layers.Concatenate()([x, shortcut])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x), name="residual")


def branching_model():
    """Several inputs and outputs, a shared layer, an operation, a nested model, a long skip."""
    image = keras.Input((8, 8, 3), name="image")
    extra = keras.Input((4,), name="extra")
    nested = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(4)], name="in"
    )
    shared = layers.Dense(4, name="shared")
    first = nested(image)
    second = shared(first)
    third = shared(second) + extra
    parts = [layers.Dense(4, name=f"part{number}")(third) for number in range(4)]
    joined = layers.Concatenate(name="joined")([*parts, first])
    return keras.Model(
        [image, extra], [layers.Dense(2, name="end")(joined), third], name="branches"
    )


MODELS = {
    "linear": linear_model,
    "one block": lambda: residual_model(1),
    "eight blocks": lambda: residual_model(8),
    "branches": branching_model,
    "twenty layers": lambda: keras.Sequential(
        [keras.Input((3,)), *(layers.Dense(3, name=f"dense{i}") for i in range(20))]
    ),
}


def boxes(figure):
    found = [p for p in figure.axes[0].patches if (p.get_gid() or "").startswith("layer:")]
    return {
        p.get_gid().removeprefix("layer:"): Bbox.from_bounds(
            p.get_x(), p.get_y(), p.get_width(), p.get_height()
        )
        for p in found
    }


def arrows(figure):
    """The corners of each arrow by (source, target)."""
    found = {}
    for patch in figure.axes[0].patches:
        if (patch.get_gid() or "").startswith("arrow:"):
            ends = tuple(patch.get_gid().removeprefix("arrow:").split("->"))
            assert ends not in found
            found[ends] = patch._path_original.vertices
    return found


def graph_edges(model):
    """Edges between layers by Keras's own bookkeeping of which call feeds which layers."""
    model = getattr(model, "_functional", model)
    edges = set()
    for depth in model._nodes_by_depth.values():
        for node in depth:
            for source in node.parent_nodes:
                edges.add((box_name(source), box_name(node)))
    return edges


def box_name(node):
    index = node.operation._inbound_nodes.index(node)
    return f"{node.operation.name}#{index + 1}" if index else node.operation.name


@pytest.fixture(params=list(MODELS), scope="module")
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def figure(model):
    return plot_model(model)


def test_a_box_a_call_and_an_arrow_an_edge(model, figure):
    edges = graph_edges(model)
    assert set(arrows(figure)) == edges
    assert set(boxes(figure)) == {name for edge in edges for name in edge}


def test_boxes_do_not_overlap_and_lie_inside(figure):
    width, height = figure.get_size_inches()
    found = list(boxes(figure).values())
    for first, second in itertools.combinations(found, 2):
        assert not first.overlaps(second)
    for box in found:
        assert box.x0 > 0
        assert box.x1 < width
        assert box.y0 > 0
        assert box.y1 < height


def test_arrows_touch_the_right_boxes_and_run_through_none(figure):
    found = boxes(figure)
    for (source, target), corners in arrows(figure).items():
        (start_x, start_y), (end_x, end_y) = corners[0], corners[-1]
        assert start_y == pytest.approx(found[source].y1)
        assert found[source].x0 < start_x < found[source].x1
        assert end_y == pytest.approx(found[target].y0)
        assert found[target].x0 < end_x < found[target].x1
        for box in found.values():
            inner = Bbox.from_extents(box.x0 + 1e-6, box.y0 + 1e-6, box.x1 - 1e-6, box.y1 - 1e-6)
            for (x0, y0), (x1, y1) in itertools.pairwise(corners):
                piece = Bbox.from_extents(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
                assert not piece.overlaps(inner)


def test_texts_fit_their_boxes(figure):
    ax = figure.axes[0]
    figure.draw_without_rendering()
    outlines = [box.transformed(ax.transData) for box in boxes(figure).values()]
    in_boxes = ax.texts[2:]  # after heading and sub-heading
    assert len(in_boxes) >= len(outlines)
    for text in in_boxes:
        extent = text.get_window_extent()
        assert any(
            min(box.x0, box.x1) <= extent.x0
            and extent.x1 <= max(box.x0, box.x1)
            and min(box.y0, box.y1) <= extent.y0
            and extent.y1 <= max(box.y0, box.y1)
            for box in outlines
        ), text.get_text()


def test_long_models_are_broken_into_columns():
    width, height = plot_model(residual_model(8)).get_size_inches()
    assert 0.5 < width / height < 2


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_boxes_say_type_settings_shape_and_parameters():
    assert texts(plot_model(linear_model())) == [
        "small",
        "178 parameters (8 not trainable)",
        "InputLayer",
        "8 x 8 x 3",
        "Conv2D 3x3, stride 2",
        "3 x 3 x 4; 112 parameters",
        "BatchNormalization",
        "3 x 3 x 4; 16 parameters",
        "Activation relu",
        "3 x 3 x 4",
        "MaxPooling2D 2x2",
        "1 x 1 x 4",
        "Dropout 0.25",
        "1 x 1 x 4",
        "Flatten",
        "(4)",
        "Dense tanh",
        "(10); 50 parameters",
    ]


def test_shapes_and_parameters_can_be_left_out():
    model = linear_model()
    plain = texts(plot_model(model, show_shapes=False, show_parameters=False))
    assert plain[:4] == ["small", "", "InputLayer", "Conv2D 3x3, stride 2"]
    assert not any("parameter" in text or " x " in text for text in plain)
    shapes = texts(plot_model(model, show_parameters=False))
    assert "3 x 3 x 4" in shapes
    assert not any("parameter" in text for text in shapes)
    parameters = texts(plot_model(model, show_shapes=False))
    assert "112 parameters" in parameters


def test_shared_and_nested_layers_are_named():
    found = texts(plot_model(branching_model()))
    assert "Sequential in" in found
    assert "(4); 20 parameters" in found
    assert "(4); shared weights" in found


def test_calls_outside_of_the_model_do_not_count():
    dense = layers.Dense(3, name="dense")
    dense(keras.Input((3,)))
    model = keras.Sequential(name="grown")
    model.add(keras.Input((3,)))
    model.add(dense)
    model.add(layers.Dense(2, name="end"))
    figure = plot_model(model)
    assert len(boxes(figure)) == 3
    assert ("dense", "end") in arrows(figure)
    assert "(3); 12 parameters" in texts(figure)


def test_sizes_that_are_not_fixed_are_marked():
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, layers.Conv2D(4, 3)(inputs))
    assert "? x ? x 4; 112 parameters" in texts(plot_model(model))


def test_layers_with_parameters_look_different():
    patches = {p.get_gid(): p for p in plot_model(linear_model()).axes[0].patches}
    assert patches["layer:conv"].get_facecolor() != patches["layer:relu"].get_facecolor()
    assert patches["layer:relu"].get_facecolor() == patches["layer:pool"].get_facecolor()


def test_trunk_is_one_straight_line():
    figure = plot_model(residual_model(1))
    found = boxes(figure)
    # The shortcut's convolution is the second of four; all else stands on one line.
    columns = sorted({round(box.x0, 3) for box in found.values()})
    assert [sum(round(b.x0, 3) == x for b in found.values()) for x in columns] == [
        len(found) - 1,
        1,
    ]


def test_diagram_is_saved(tmp_path):
    figure = plot_model(linear_model(), title="lab_cnn, standin", path=tmp_path / "new" / "m.png")
    with Image.open(tmp_path / "new" / "m.png") as image:
        image.load()
        for pixels, inches in zip(image.size, figure.get_size_inches(), strict=True):
            assert abs(pixels - inches * DOTS_PER_INCH) <= 1
    assert texts(figure)[0] == "lab_cnn, standin"


def test_bad_paths(tmp_path):
    with pytest.raises(ConfigError, match=r"must end in \.png, not '.*m\.svg'"):
        plot_model(linear_model(), path=tmp_path / "m.svg")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(WorkdirError, match="cannot write the picture"):
        plot_model(linear_model(), path=tmp_path / "file" / "m.png")


class OwnCall(keras.Model):
    def __init__(self):
        super().__init__(name="mine")
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


def built_own_call():
    model = OwnCall()
    model(keras.ops.zeros((1, 4)))
    return model


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: "lab_cnn", "model must be a Keras model, not str"),
        (lambda: keras.Sequential([layers.Dense(3)], name="raw"), "model 'raw' is not built"),
        (built_own_call, "model 'mine' has no graph to draw.*OwnCall"),
    ],
)
def test_models_that_cannot_be_drawn(make_model, message):
    with pytest.raises(ConfigError, match=message):
        plot_model(make_model())


# --- model_summary


@pytest.mark.parametrize("columns", ["40", "200", None])
def test_summary_is_plain_text_of_100_columns(columns, monkeypatch, capsys):
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    text = model_summary(linear_model())
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) == 100
    assert "conv (Conv2D)" in text
    assert "(None, 3, 3, 4)" in text
    assert "Total params: 178" in text
    assert "Non-trainable params: 8" in text
    assert capsys.readouterr().out == ""


def test_summary_leaves_the_environment_alone(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    model_summary(linear_model())
    assert os.environ["COLUMNS"] == "70"
    monkeypatch.delenv("COLUMNS")
    model_summary(linear_model())
    assert "COLUMNS" not in os.environ


def test_summary_of_a_model_with_its_own_call():
    assert "dense" in model_summary(built_own_call())


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: None, "model must be a Keras model, not NoneType"),
        (lambda: keras.Sequential([layers.Dense(3)], name="raw"), "model 'raw' is not built"),
    ],
)
def test_models_without_a_summary(make_model, message):
    with pytest.raises(ConfigError, match=message):
        model_summary(make_model())
