"""benchmarks/input_pipeline.py and memory.py: what their ways do, what they say, quick runs."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmark_suite import BENCHMARKS, read

# isort: split
import harness
import input_pipeline
import input_report
import input_ways
import memory
import memory_report
import nets
import tables
import ways
import worker

from cifarflow.data.splits import Dataset, Split
from cifarflow.errors import ConfigError

COUNT, BATCH = 48, 16
PADDING = 4


@pytest.fixture(scope="module")
def images():
    """Noise: no image is another one shifted."""
    return np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3)).astype(np.uint8)


@pytest.fixture
def make_way(images, monkeypatch):
    """Makes a way of bringing batches of images whose label is their number."""
    split = Split(images, np.arange(COUNT, dtype=np.int32))
    dataset = Dataset("noise", split, split, split, tuple(map(str, range(COUNT))), "here")
    monkeypatch.setattr(ways, "load_dataset", lambda spec: dataset)
    # The process is the test's, its peak none of their business.
    monkeypatch.setattr(worker, "forget_peak", lambda: None)

    def make(name, augment="none"):
        return input_ways.WAYS[name]({"way": name, "batch_size": BATCH, "augment": augment})

    return make


def an_epoch(way):
    """The images and labels of the first epoch, batch by batch."""
    if isinstance(way, input_ways.Cifarflow):
        batches = [way.batches.batch_at(step) for step in range(COUNT // BATCH)]
    else:
        batches = [tuple(map(np.asarray, batch)) for batch in way.dataset.take(COUNT // BATCH)]
    assert all(len(part) == BATCH for batch in batches for part in batch)
    return batches


# The ways of bringing batches

SHUFFLING = [name for name in input_ways.WAYS if name not in ("copy", "keras_crop")]


@pytest.mark.parametrize("name", SHUFFLING)
def test_plain_batches_are_the_images_shuffled(name, make_way, images):
    way = make_way(name)
    drawn, labels = (np.concatenate(parts) for parts in zip(*an_epoch(way), strict=True))
    assert sorted(labels) == list(range(COUNT))
    assert list(labels) != list(range(COUNT))
    assert way.facts["delivers"] == ("float32" if name == "keras_layers" else "uint8")
    assert drawn.dtype == way.facts["delivers"]
    scale = 255 if name == "keras_layers" else 1
    np.testing.assert_allclose(drawn * scale, images[labels], atol=1e-3)
    assert way.round(5) > 0
    assert way.facts["idle_rss_bytes"] > 2**20


@pytest.mark.parametrize("name", [name for name in input_ways.WAYS if name != "copy"])
def test_augmented_batches_are_crops_and_flips_normalised(name, make_way, images):
    way = make_way(name, f"flip,crop:{PADDING}")
    assert way.round(2) > 0
    assert way.facts["delivers"] == "float32"
    sides = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
    how = {"mode": "reflect"} if name.startswith("cifarflow") else {}
    padded = np.pad(images, sides, **how)
    flips = []
    for drawn, labels in an_epoch(way):
        pixels = (drawn * np.array(nets.STD) + np.array(nets.MEAN)) * 255
        windows = [find_window(image, padded[i]) for image, i in zip(pixels, labels, strict=True)]
        flips += [flip for _, flip in windows]
        # Each image by itself, but for the layer that moves the whole batch.
        assert (len({place for place, _ in windows}) == 1) == (name == "keras_crop")
    assert set(flips) == {False, True}


def find_window(image, padded):
    """Where in the padded original, mirrored or not, an image was cut out, and which of the two."""
    found = [
        ((row, 2 * PADDING - column if flip else column), flip)
        for flip, candidate in ((False, image), (True, image[:, ::-1]))
        for row in range(2 * PADDING + 1)
        for column in range(2 * PADDING + 1)
        if np.abs(padded[row : row + 32, column : column + 32] - candidate).max() < 0.01
    ]
    assert len(found) == 1
    return found[0]


def test_flips_alone(make_way, images):
    way = make_way("keras_layers", "flip")
    for drawn, labels in an_epoch(way):
        pixels = (drawn * np.array(nets.STD) + np.array(nets.MEAN)) * 255
        originals = images[labels]
        either = [np.abs(pixels - x).max((1, 2, 3)) for x in (originals, originals[:, :, ::-1])]
        np.testing.assert_array_less(np.minimum(*either), 0.01)


def test_the_copy_is_one(make_way, images):
    way = make_way("copy")
    for steps, last in ((1, 0), (1, 1), (4, 2)):
        assert way.round(steps) > 0
        np.testing.assert_array_equal(way.batch, images[last * BATCH : (last + 1) * BATCH])


@pytest.mark.parametrize("script", ["ways", "input_ways", "memory_ways"])
def test_no_way_has_jax_in_its_memory(script, monkeypatch):
    served = []
    monkeypatch.setattr(worker, "serve", served.append)
    runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    (make_way,) = served
    # TensorFlow imports it where it is installed.
    monkeypatch.setitem(sys.modules, "jax", "jax")
    make_way.__globals__["WAYS"]["mine"] = lambda spec: sys.modules["jax"]
    assert make_way({"way": "mine"}) is None


def test_resident_memory():
    before = worker.rss_bytes()
    block = bytearray(64 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])  # a page is resident once it is written to
    assert worker.rss_bytes() - before > 60 * 2**20
    peak = worker.peak_rss_bytes()
    del block
    assert peak >= before + 60 * 2**20
    # The system counts in batches of pages.
    assert worker.peak_rss_bytes() > peak - 2**21
    if Path("/proc/self/clear_refs").exists():
        worker.forget_peak()
        assert worker.peak_rss_bytes() < peak - 60 * 2**20


# Numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (28.06, "28.1"), (999.4, "999"), (999.7, "1,000"), (1030, "1,030")],
)
def test_numbers_have_no_exponent(value, text):
    assert tables.format_number(value) == text
    assert tables.format_number(-value) == "-" + text


@pytest.mark.parametrize("augment", ["randaugment,hue,erase", "altflip,mixup,cutmix"])
def test_our_own_ways_take_any_augmentation(make_way, augment, images):
    plan = input_pipeline.make_plan(augment=augment, ways="cifarflow,cifarflow_drawn")
    assert len(plan.rows) == 4
    for name in ("cifarflow", "cifarflow_drawn"):
        way = make_way(name, augment)
        assert way.facts["delivers"] == "float32"
        way.bring(2)
        found, labels = way.batches.batch_at(1)
        assert abs(found.mean()) < 0.5
        assert labels.shape == ((BATCH, COUNT) if "mixup" in augment else (BATCH,))


# Bad input, before anything runs


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"ways": "cifarflow,foo"}, "--ways must be one of .*, not 'foo'"),
        ({"ways": ""}, "--ways must be one of .*, not ''"),
        ({"batch_sizes": "0"}, "--batch_sizes must be a whole number >= 1, not 0"),
        ({"batch_sizes": "32,x"}, "--batch_sizes must be a whole number >= 1, not 'x'"),
        ({"augment": "spin"}, "--augment must be parts of flip,crop:PIXELS.*not 'spin'"),
        ({"augment": "flip,cutout"}, "--augment must be parts .* all ways .*not 'flip,cutout'"),
        ({"augment": "cutmix", "ways": "cifarflow,copy"}, "--augment must be parts .* all ways"),
        ({"augment": "mixup:x", "ways": "cifarflow"}, "--augment mixup must be a number .* 'x'"),
        ({"augment": "cutout:33", "ways": "cifarflow"}, "--augment must cut out at most .* 32"),
        ({"augment": "crop:32"}, "--augment must crop by less than .* 32, not 'crop:32'"),
        ({"ways": "keras_crop", "augment": "flip"}, "--ways=keras_crop measures nothing with"),
        ({"seconds_a_round": 0.0}, "--seconds_a_round must be a finite number > 0, not 0.0"),
    ],
)
def test_bad_input_plans(flags, line):
    with pytest.raises(ConfigError, match=line):
        input_pipeline.make_plan(**flags)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"model": "resnet"}, "--model must be one of lab_mlp, .*, not 'resnet'"),
        ({"precision": "half"}, "--precision must be one of auto, float32, .*, not 'half'"),
        ({"epochs": 3}, "--epochs must be a whole number >= 4, not 3"),
        ({"growth_examples": 31}, "--growth_examples must be a whole number >= 32, not 31"),
        ({"growth_rounds": 0}, "--growth_rounds must be a whole number >= 1, not 0"),
    ],
)
def test_bad_memory_plans(flags, line):
    with pytest.raises(ConfigError, match=line):
        memory.make_plan(**flags)


def test_rows():
    plan = input_pipeline.make_plan(ways="cifarflow,keras_crop,copy,cifarflow")
    assert plan.rows == (
        ("cifarflow", "plain"),
        ("copy", "plain"),
        ("cifarflow", "augmented"),
        ("keras_crop", "augmented"),
    )
    specs = input_pipeline.make_specs(32, plan, harness.Settings(quick=True))
    assert specs["cifarflow", "plain"]["augment"] == "none"
    assert specs["cifarflow", "augmented"]["augment"] == "flip,crop:4"
    assert {spec["examples"] for spec in specs.values()} == {2048}
    plain = input_pipeline.make_plan(augment="none").rows
    assert {kind for _, kind in plain} == {"plain"}
    assert "keras_crop" not in {way for way, _ in plain}


# What is made of the figures


def input_row(way, kind, *seconds, batch_size=512):
    samples = harness.Samples(seconds)
    return {
        "way": way,
        "kind": kind,
        "label": input_report.LABELS[way],
        "delivers": "uint8",
        "seconds_a_batch": samples.to_json(),
        "images_per_second": samples.rate(batch_size).to_json(),
        "share_of_copy": None,
        "idle_rss_bytes": 500_000_000,
        "peak_rss_bytes": 620_000_000,
        "growth_bytes": 120_000_000,
    }


def input_result(*rows, batch_size=512, augment="flip,crop:4"):
    result = {"batch_size": batch_size, "augment": augment, "ways": list(rows)}
    result["ratios"] = list(input_report.ratios(rows))
    result["goals"] = list(input_report.goals(result))
    return result


ROWS = (
    input_row("cifarflow_drawn", "plain", 0.0004, 0.0005),
    input_row("cifarflow", "plain", 0.0006, 0.0006),
    input_row("keras_layers", "plain", 0.0008, 0.0015),
    input_row("cifarflow_drawn", "augmented", 0.004, 0.004),
    input_row("cifarflow", "augmented", 0.002, 0.001),
    input_row("keras_layers", "augmented", 0.014, 0.012),
)


def test_ratios_are_those_of_our_faster_way():
    found = {(r["kind"], r["against"]): r for r in input_report.ratios(ROWS)}
    assert {r["ours"] for r in found.values() if r["kind"] == "plain"} == {"cifarflow_drawn"}
    assert {r["ours"] for r in found.values() if r["kind"] == "augmented"} == {"cifarflow"}
    assert found["plain", "keras_layers"]["ratio"]["values"] == pytest.approx([2, 3])
    assert found["augmented", "keras_layers"]["ratio"]["values"] == pytest.approx([7, 12])
    assert list(input_report.ratios([ROWS[2]])) == []


def test_goals():
    result = input_result(*ROWS)
    goals = [(g["least"], g["value"], g["by"], g["is_reached"]) for g in result["goals"]]
    assert goals == [
        (1_000_000, pytest.approx((512 / 0.0004 + 512 / 0.0005) / 2), "cifarflow_drawn", True),
        (150_000, pytest.approx((512 / 0.002 + 512 / 0.001) / 2), "cifarflow", True),
        (10, pytest.approx(9.5), "cifarflow", False),
    ]
    text = input_report.describe(result)
    assert "plain >= 1,000,000 images/s: reached, 1,152,000 (cifarflow, drawn in the st" in text
    assert "normalise >= 10x Keras's layers: missed, 9.5 (cifarflow, tf.data)" in text
    assert "| Keras layers                 |" in text
    assert "## Batch 512, flip,crop:4 + normalise" in text
    # They are about this batch size and this augmentation only.
    assert [g["least"] for g in input_result(*ROWS, augment="flip")["goals"]] == [1_000_000]
    assert input_result(*ROWS, augment="crop:4,flip")["goals"][1:] == result["goals"][1:]
    assert input_result(*ROWS, batch_size=32)["goals"] == []


def memory_run(peak, epochs=(1, 2, 3, 4), **changes):
    run = {"alone_bytes": 600_000_000, "peak_bytes": peak, "epochs_bytes": list(epochs)}
    run |= {"test_accuracy": 0.5, "precision": "float32", "steps": 7, "seconds": 9.0}
    return run | changes


def test_memory_by_hand():
    plan = memory.make_plan(epochs=5, growth_examples=640)
    peaks = {
        "cifarflow": [memory_run(1_000_000_000), memory_run(1_200_000_000)],
        "notebook": [memory_run(2_000_000_000), memory_run(1_600_000_000)],
    }
    megabyte = 1_000_000
    growths = {
        "cifarflow": [memory_run(0, [9 * megabyte, 8 * megabyte, 5 * megabyte, 0, 5 * megabyte])],
        "notebook": [
            memory_run(0, [0, 0, 1 * megabyte, 2 * megabyte, 4 * megabyte]),
            memory_run(0, [0, 0, 1 * megabyte, 2 * megabyte, 6 * megabyte]),
        ],
    }
    result = memory.summarise(plan, peaks, growths)
    assert result["share_of_total"]["values"] == pytest.approx([0.5, 0.75])
    assert result["share_above"]["values"] == pytest.approx([4 / 14, 6 / 10])
    assert result["goal"] == {"below": 0.6, "is_reached": False}
    assert [row["growth_bytes"]["median"] for row in result["ways"]] == [0, 4 * megabyte]
    # From the end of epoch 2 of 5.
    assert [row["growth_bytes"]["second_half"] for row in result["ways"]] == [
        -3 * megabyte,
        5 * megabyte,
    ]
    text = memory_report.describe(result)
    goal = "peak, ours in float32 < 60 % of the notebook's in float32: missed, 62.5 %"
    assert goal in text
    assert "\nBoth compute in float32.\n" in text
    assert "Peak: 62.5 % (50.0 to 75.0 in 2 rounds) of the notebook's way in all" in text
    assert (
        "cifarflow: +0.0 MB from the end of epoch 3 to that of epoch 5, 20 steps each; -3.0" in text
    )
    assert "way: +4.0 MB (+3.0 to +5.0) from" in text
    assert memory.summarise(plan, peaks, growths, is_quick=True)["goal"] is None


def test_what_is_compared_is_told():
    runs = {
        "cifarflow": [memory_run(1_000_000_000, precision="mixed_bfloat16")],
        "notebook": [memory_run(2_000_000_000)],
    }
    text = memory_report.describe(memory.summarise(memory.make_plan(epochs=4), runs, runs))
    assert "\nOurs computes in bfloat16, the notebook's way in float32: a part of" in text
    assert "peak, ours in bfloat16 < 60 % of the notebook's in float32: reached, 50.0 %" in text


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ({"model": "lab_cnn"}, "auto"),
        ({"model": "lab_mlp"}, "float32"),
        ({"model": "lab_cnn", "precision": "float32"}, "float32"),
        ({"model": "lab_mlp", "precision": "mixed_bfloat16"}, "mixed_bfloat16"),
    ],
)
def test_the_precision_of_our_runs(flags, precision):
    plan = memory.make_plan(**flags)
    specs = memory.make_specs(plan, harness.Settings(), epochs=1, examples=0)
    # As `get_recipe` takes it: auto is for the run to find out.
    assert specs["cifarflow"]["precision"] == precision


def test_runs_take_turns(monkeypatch):
    started = []

    class Fake:
        facts = {"seconds_to_first_step": 2.0}  # noqa: RUF012

        def __init__(self, name, script, spec):
            started.append((Path(script).name, spec["way"]))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ask(self, call):
            return {call: len(started)}

    monkeypatch.setattr(harness, "Worker", Fake)
    specs = memory.make_specs(memory.make_plan(), harness.Settings(), epochs=1, examples=0)
    found = memory.run_in_turn(specs, rounds=2, what="peak")
    turns = ["cifarflow", "notebook", "notebook", "cifarflow"]
    assert started == [("memory_ways.py", way) for way in turns]
    assert found["notebook"] == [{"figures": 2, "seconds": 2.0}, {"figures": 3, "seconds": 2.0}]
    assert specs["notebook"]["learning_rate"] == 0.01


# The scripts


def test_a_quick_run_of_the_input_pipeline(quick_run):
    folder, done = quick_run("input")
    record = read(folder, done)
    assert (record["rounds"], record["plan"]["augment"]) == (2, "flip")
    (result,) = record["results"]
    assert result["batch_size"] == 32
    found = {(row["way"], row["kind"]): row for row in result["ways"]}
    assert list(found) == [
        ("cifarflow_drawn", "plain"),
        ("copy", "plain"),
        ("cifarflow_drawn", "augmented"),
    ]
    copy = found["copy", "plain"]["seconds_a_batch"]["values"]
    for (_, kind), row in found.items():
        seconds = row["seconds_a_batch"]["values"]
        assert len(seconds) == 2
        assert row["images_per_second"]["values"] == pytest.approx([32 / s for s in seconds])
        shares = [c / s for c, s in zip(copy, seconds, strict=True)]
        assert row["share_of_copy"]["values"] == pytest.approx(shares)
        assert row["delivers"] == ("float32" if kind == "augmented" else "uint8")
        assert row["growth_bytes"] == row["peak_rss_bytes"] - row["idle_rss_bytes"]
        assert row["idle_rss_bytes"] > 20 * 2**20
    # The copy has no TensorFlow in its process.
    idle = {key: row["idle_rss_bytes"] for key, row in found.items()}
    assert min(idle, key=idle.get) == ("copy", "plain")
    assert [(r["kind"], r["against"]) for r in result["ratios"]] == [("plain", "copy")]
    assert result["goals"] == []
    assert input_report.describe(result) in done.stdout


def test_a_quick_run_of_memory(quick_run):
    folder, done = quick_run("memory")
    record = read(folder, done)
    result = record["result"]
    assert (result["model"], result["epochs"], result["goal"]) == ("lab_mlp", 4, None)
    ours, notebook = result["ways"]
    assert (ours["way"], notebook["way"]) == ("cifarflow", "notebook")
    # Four epochs of 64 images in batches of 32.
    assert ours["steps"] == notebook["steps"] == 8
    # The recipe's own is float32.
    assert (ours["precision"], notebook["precision"]) == ("mixed_bfloat16", "float32")
    for row in (ours, notebook):
        alone, peak = row["alone_bytes"]["values"], row["peak_bytes"]["values"]
        above = row["above_bytes"]["values"]
        assert above == pytest.approx([p - a for p, a in zip(peak, alone, strict=True)])
        assert alone[0] > 100 * 2**20
        assert above[0] > 2**20
        (series,) = row["epochs_bytes"]
        assert len(series) == 4
        assert row["growth_bytes"]["values"] == [series[3] - series[2]]
        assert alone[0] / 2 < series[0]
    share = ours["peak_bytes"]["values"][0] / notebook["peak_bytes"]["values"][0]
    assert result["share_of_total"]["values"] == pytest.approx([share])
    assert memory_report.describe(result) in done.stdout
    assert "cifarflow, peak and growth: " in done.stderr


def test_bad_input_is_one_line_and_status_2(quick_run):
    folder, done = quick_run("refused")
    assert done.returncode == 2
    # Before it there is the banner of the stand-in set.
    assert done.stderr.splitlines()[-1] == (
        "error: --growth_examples must be at most the 8000 training images, not 9000"
    )
    assert "Traceback" not in done.stderr
    assert (done.stdout, list(folder.iterdir())) == ("", [])
