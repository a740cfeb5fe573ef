"""Flips, crops and cutouts against plain NumPy, as pure functions of (images, seed)."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.data.augment import cutout, make_augment, parse_augment, random_crop, random_flip
from cifarflow.errors import ConfigError, DataError

SEED = (3, 17)
SPEC = "flip,crop:4,cutout:8"
FUNCTIONS = {
    "flip": random_flip,
    "crop": functools.partial(random_crop, padding=2),
    "cutout": functools.partial(cutout, size=3, fill=0),
    "all": make_augment("flip,crop:2,cutout:3"),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def numbered(count, height, width, channels=1, dtype=np.int32):
    """Images whose every value tells its own place; the images are the same, none has a 0."""
    image = np.arange(1, height * width * channels + 1).reshape(height, width, channels)
    return np.tile(image.astype(dtype), (count, 1, 1, 1))


def random_images(count, height=32, width=32, channels=3, dtype=np.uint8):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, height, width, channels)).astype(dtype)


def windows(image, padding):
    """Every crop that may come out, by its corner, row by row."""
    padded = np.pad(image, [(padding, padding), (padding, padding), (0, 0)], mode="reflect")
    height, width = image.shape[:2]
    corners = range(2 * padding + 1)
    return [padded[r : r + height, c : c + width] for r in corners for c in corners]


def which(candidates, images):
    """For each image the number of the one candidate that it equals."""
    number = {candidate.tobytes(): index for index, candidate in enumerate(candidates)}
    assert len(number) == len(candidates)
    return np.array([number[image.tobytes()] for image in images])


def paint(image, row, column, size, fill):
    """The image with a square of `size` around (row, column), as far as it lies inside."""
    result = image.copy()
    top, left = row - size // 2, column - size // 2
    for r in range(max(top, 0), min(top + size, image.shape[0])):
        for c in range(max(left, 0), min(left + size, image.shape[1])):
            result[r, c] = fill
    return result


def assert_uniform(values, kinds):
    """A chi-square test; the seeds are fixed, so it never fails by chance."""
    counts = np.bincount(values, minlength=kinds)
    assert len(counts) == kinds
    expected = len(values) / kinds
    statistic = ((counts - expected) ** 2 / expected).sum()
    # The mean is kinds - 1; five standard deviations above it is no accident.
    assert statistic < kinds - 1 + 5 * np.sqrt(2 * (kinds - 1)), counts


def test_flip_mirrors_about_half_of_the_images():
    images = random_images(2000, 4, 5)
    result = random_flip(images, SEED).numpy()
    mirrored = (result == images[:, :, ::-1]).all(axis=(1, 2, 3))
    kept = (result == images).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(mirrored, ~kept)
    assert_uniform(mirrored.astype(int), 2)


@pytest.mark.parametrize("shape", [(6, 6, 3), (5, 9, 1), (9, 5, 2)])
@pytest.mark.parametrize("padding", [1, 3])
def test_crop_takes_every_window_of_the_reflected_image_equally_often(shape, padding):
    images = numbered(4000, *shape)
    result = random_crop(images, SEED, padding=padding).numpy()
    assert_uniform(which(windows(images[0], padding), result), (2 * padding + 1) ** 2)


def test_crop_shifts_rows_and_columns_independently():
    # 5 x 5 windows, equally often (above), would also come from a walk through them.
    images = numbered(4000, 6, 6)
    corner = which(windows(images[0], 2), random_crop(images, SEED, padding=2).numpy())
    assert_uniform((corner[1:] - corner[:-1]) % 25, 25)


def test_crop_pads_by_four_unless_told_otherwise():
    images = numbered(3000, 12, 10)
    default = random_crop(images, SEED).numpy()
    np.testing.assert_array_equal(default, random_crop(images, SEED, padding=4).numpy())
    assert set(which(windows(images[0], 4), default)) == set(range(81))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_cutout_paints_one_square_around_any_pixel(size):
    height, width = 7, 5
    images = numbered(3000, height, width, 2)
    result = cutout(images, SEED, size=size, fill=0).numpy()
    centres = [(r, c) for r in range(height) for c in range(width)]
    squares = [paint(images[0], r, c, size, 0) for r, c in centres]
    # Near the edge, different centres may leave the same pixels painted.
    distinct, kind = np.unique(squares, axis=0, return_inverse=True)
    found = np.bincount(which(distinct, result), minlength=len(distinct)) / len(images)
    share = np.bincount(kind.ravel()) / len(centres)
    np.testing.assert_allclose(found, share, atol=5 * np.sqrt(share.max() / len(images)))
    assert (found > 0).all()
    if size == 1:
        assert_uniform(which(squares, result), len(centres))


def test_cutout_paints_eight_pixels_grey_unless_told_otherwise():
    images = np.zeros((500, 32, 32, 3), np.uint8)
    painted = cutout(images, SEED).numpy()
    assert set(np.unique(painted)) == {0, 128}
    area = (painted[..., 0] == 128).sum(axis=(1, 2))
    assert area.max() == 64  # wholly inside
    assert 16 <= area.min() < 64  # cut off at an edge or a corner
    np.testing.assert_array_equal(painted, cutout(images, SEED, size=8, fill=128).numpy())


def test_cutout_fills_float_images_on_their_own_scale():
    images = np.zeros((2, 4, 4, 1), np.float32)
    assert cutout(images, SEED, size=4, fill=0.25).numpy().max() == 0.25


def test_flip_crop_and_cutout_draw_independently():
    images = numbered(4000, 6, 6)
    flipped = random_flip(images, SEED).numpy()[:, 0, 0, 0] != 1
    corner = which(windows(images[0], 1), random_crop(images, SEED, padding=1).numpy())
    assert_uniform(corner * 2 + flipped, 18)
    point = which(
        [paint(images[0], r, c, 1, 0) for r in range(6) for c in range(6)],
        cutout(images, SEED, size=1, fill=0).numpy(),
    )
    # Row and column of a square image, from one draw for both, would stay on the diagonal.
    assert_uniform(point, 36)
    assert_uniform(point // 6 * 2 + flipped, 12)
    assert_uniform(point % 6 * 9 + corner, 54)


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        (SPEC, ["flip", "crop", "cutout"]),
        ("cutout:8,crop:4,flip", ["flip", "crop", "cutout"]),
        (" flip , crop ", ["flip", "crop"]),
        ("crop", ["crop"]),
        ("flip", ["flip"]),
        ("cutout", ["cutout"]),
        ("flip,cutout", ["flip", "cutout"]),
        ("crop,cutout", ["crop", "cutout"]),
    ],
)
def test_make_augment_equals_its_parts_one_after_another(spec, steps, some_images):
    parts = {"flip": random_flip, "crop": random_crop, "cutout": cutout}
    images = some_images[0][:256]
    expected = images
    for step in steps:
        expected = parts[step](expected, SEED)
    result = make_augment(spec)(images, SEED)
    np.testing.assert_array_equal(result, expected)
    assert (result.numpy() != images).any()


def test_make_augment_passes_its_numbers_on():
    images = random_images(64)
    expected = cutout(random_crop(images, SEED, padding=1), SEED, size=20)
    np.testing.assert_array_equal(make_augment("crop:1,cutout:20")(images, SEED), expected)


@pytest.mark.parametrize("spec", ["", "none", "  ", " none "])
def test_no_augmentation_is_none(spec):
    assert make_augment(spec) is None
    assert parse_augment(spec) == {}


@each_function
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(name):
    images = random_images(128, 8, 8)
    function = FUNCTIONS[name]
    first = function(images, SEED).numpy()
    np.testing.assert_array_equal(function(images, tf.constant(SEED, tf.int64)), first)
    for other in [(SEED[0] + 1, SEED[1]), (SEED[0], SEED[1] + 1), SEED[::-1]]:
        assert (function(images, other).numpy() != first).any()


@pytest.mark.parametrize("seed", [(0, 0), (2**31 - 1, 2**62)])
def test_seeds_at_the_ends_of_their_range_work(seed):
    images = numbered(2000, 5, 5)
    corner = which(windows(images[0], 1), random_crop(images, seed, padding=1).numpy())
    assert_uniform(corner, 9)


@each_function
def test_the_input_is_not_modified(name):
    images = random_images(16, 8, 8)
    before = images.copy()
    FUNCTIONS[name](images, SEED)
    np.testing.assert_array_equal(images, before)


@each_function
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, np.float32])
def test_every_dtype_is_kept_and_gets_the_same_draws(name, dtype):
    images = random_images(32, 7, 9)
    result = FUNCTIONS[name](images.astype(dtype), SEED)
    assert result.dtype == dtype
    assert result.shape == images.shape
    np.testing.assert_array_equal(result.numpy().astype(np.uint8), FUNCTIONS[name](images, SEED))


@each_function
def test_unknown_batch_size_and_a_smaller_last_batch(name):
    function = FUNCTIONS[name]
    signature = [tf.TensorSpec([None, 7, 9, 3], tf.uint8), tf.TensorSpec([2], tf.int64)]
    graph = tf.function(function, input_signature=signature)
    assert graph.get_concrete_function().structured_outputs.shape.as_list() == [None, 7, 9, 3]
    for count in (5, 2, 1, 0):
        images = random_images(count, 7, 9)
        seed = tf.constant(SEED, tf.int64)
        np.testing.assert_array_equal(graph(images, seed), function(images, seed))


@each_function
def test_xla_gives_the_same_bytes(name):
    images = tf.constant(random_images(8, 7, 9))
    seed = tf.constant(SEED, tf.int64)
    compiled = tf.function(FUNCTIONS[name], jit_compile=True)
    np.testing.assert_array_equal(compiled(images, seed), FUNCTIONS[name](images, seed))


def test_parallel_maps_are_deterministic():
    images = random_images(16, 8, 8)
    augment = FUNCTIONS["all"]
    dataset = tf.data.Dataset.range(40).map(
        lambda step: augment(tf.constant(images), tf.stack([tf.constant(7, tf.int64), step])),
        num_parallel_calls=8,
    )
    assert dataset.element_spec.shape.as_list() == [16, 8, 8, 3]
    for step, result in enumerate(dataset):
        np.testing.assert_array_equal(result, augment(images, (7, step)))


sides = st.integers(3, 10)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 4),
    sides,
    sides,
    st.integers(1, 4),
    st.integers(0, 2**31 - 1),
    st.integers(0, 2**40),
    st.data(),
)
def test_any_shape_any_number(count, height, width, channels, seed, step, data):
    shape = count, height, width, channels
    padding = data.draw(st.integers(1, min(height, width) - 1))
    size = data.draw(st.integers(1, min(height, width)))
    images = numbered(*shape)
    cropped = random_crop(images, (seed, step), padding=padding).numpy()
    for before, after in zip(images, cropped, strict=True):
        assert any((after == window).all() for window in windows(before, padding))
    painted = cutout(images, (seed, step), size=size, fill=0).numpy()
    for result in painted:
        rows, columns = np.nonzero((result == 0).all(axis=2))
        assert (result == 0).sum() == len(rows) * channels
        # One filled rectangle, at most `size` a side and at least what a corner leaves.
        tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert tall * wide == len(rows)
        assert size - size // 2 <= tall <= size
        assert size - size // 2 <= wide <= size
    fused = make_augment(f"flip,crop:{padding},cutout:{size}")(images, (seed, step))
    expected = random_crop(random_flip(images, (seed, step)), (seed, step), padding=padding)
    np.testing.assert_array_equal(fused, cutout(expected, (seed, step), size=size))
    assert fused.shape == shape


@settings(deadline=None, max_examples=100)
@given(
    st.permutations(["flip", "crop", "cutout"]),
    st.integers(0, 3),
    st.integers(1, 10**6),
    st.sampled_from(["", " ", "  "]),
)
def test_parse_reads_back_what_is_written(names, count, number, space):
    names = names[:count]
    expected = {name: 1 if name == "flip" else number for name in names}
    parts = [name if name == "flip" else f"{name}:{number}" for name in names]
    assert parse_augment(f"{space},{space}".join(parts)) == expected


def test_parse_fills_in_the_defaults():
    assert parse_augment("flip,crop,cutout") == {"flip": 1, "crop": 4, "cutout": 8}


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="flipcrotu:,0123.- ", max_size=20))
def test_parse_takes_any_text_or_raises_a_config_error(text):
    try:
        parts = parse_augment(text)
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert set(parts) <= {"flip", "crop", "cutout"}
        assert all(number >= 1 for number in parts.values())


@pytest.mark.parametrize(
    "spec",
    [
        "flop",
        "Flip",
        "flip,",
        ",",
        "flip,flip",
        "crop:4,crop:4",
        "none,flip",
        "flip:1",
        "flip;crop",
        None,
        5,
        ["flip"],
    ],
)
@pytest.mark.parametrize("function", [make_augment, parse_augment])
def test_a_bad_spec_is_quoted(function, spec):
    with pytest.raises(ConfigError, match="augment must be parts of") as caught:
        function(spec)
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize(
    "number", ["", "0", "-1", "+1", " 3", "2.5", "x", "\u0662", "\u00b2", "nan"]
)
@pytest.mark.parametrize("name", ["crop", "cutout"])
def test_a_bad_number_in_a_spec_is_quoted(name, number):
    with pytest.raises(ConfigError, match=f"augment {name} must be a whole number >= 1") as caught:
        make_augment(f"flip,{name}:{number}")
    assert repr(number) in str(caught.value)


@pytest.mark.parametrize("bad", [0, -1, 2.0, "2", None, True])
def test_padding_and_size_must_be_whole_numbers(bad):
    images = random_images(2, 8, 8)
    with pytest.raises(ConfigError, match=f"crop padding .* not {bad!r}"):
        random_crop(images, SEED, padding=bad)
    with pytest.raises(ConfigError, match=f"cutout size .* not {bad!r}"):
        cutout(images, SEED, size=bad)


def test_padding_and_size_must_fit_the_smaller_side():
    images = random_images(2, 9, 6)
    assert random_crop(images, SEED, padding=5).shape == images.shape
    assert cutout(images, SEED, size=6).shape == images.shape
    for call in (functools.partial(random_crop, padding=6), make_augment("flip,crop:6")):
        with pytest.raises(ConfigError, match="smaller than the image side 6, not 6"):
            call(images, SEED)
    for call in (functools.partial(cutout, size=7), make_augment("cutout:7")):
        with pytest.raises(ConfigError, match="at most the image side 6, not 7"):
            call(images, SEED)


@pytest.mark.parametrize("fill", [-1, 256, 0.5, float("nan")])
def test_a_fill_that_the_images_cannot_hold_is_an_error(fill):
    with pytest.raises(ConfigError, match=rf"whole number in 0\.\.255 .* not {fill!r}"):
        cutout(random_images(2), SEED, fill=fill)


@each_function
@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 8), (1, 2, 8, 8, 3)])
def test_images_must_have_four_dimensions(name, shape):
    with pytest.raises(DataError, match=r"images must be \[B, H, W, C\]"):
        FUNCTIONS[name](np.zeros(shape, np.uint8), SEED)


@each_function
@pytest.mark.parametrize("shape", [None, [2, None, 8, 3], [2, 8, 8, None]])
def test_the_sides_must_be_known(name, shape):
    images = tf.TensorSpec(shape, tf.uint8)
    with pytest.raises(DataError, match="known height, width and channels"):
        FUNCTIONS[name](images, SEED)
