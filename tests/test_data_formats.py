"""Every format gives the same bytes, and hostile files give one DataError and nothing else."""

import contextlib
import dataclasses
import gzip
import io
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.data import formats
from cifarflow.data.layouts import CIFAR10
from cifarflow.errors import DataError


@pytest.fixture(scope="session")
def real(cifar10_dir):
    """The real arrays, decoded by the smallest possible other way: plain pickle and numpy."""
    parts = []
    for name in CIFAR10.python:
        batch = pickle.loads(  # the project's own verified files
            (cifar10_dir / "cifar-10-batches-py" / name).read_bytes(), encoding="bytes"
        )
        images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts.append((images, np.array(batch[b"labels"], np.int32)))
    images = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    return formats.Arrays(images[:50000], labels[:50000], images[50000:], labels[50000:])


@pytest.fixture(scope="session")
def binary_dir(real, tmp_path_factory):
    folder = tmp_path_factory.mktemp("binary") / "cifar-10-batches-bin"
    folder.mkdir()
    images = np.concatenate([real.train_images, real.test_images])
    labels = np.concatenate([real.train_labels, real.test_labels])
    for index, name in enumerate(CIFAR10.binary):
        rows = slice(index * 10000, (index + 1) * 10000)
        formats.as_records(images[rows], labels[rows], CIFAR10).tofile(folder / name)
    (folder / "batches.meta.txt").write_text("airplane\n")
    return folder


def assert_same(arrays, expected):
    for array, other in zip(arrays, expected, strict=True):
        assert array.dtype == other.dtype
        assert array.shape == other.shape
        assert np.array_equal(array, other)


def make_tar(path, folder, names):
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        for name in names:
            tar.add(folder / name, f"{folder.name}/{name}")
    return path


# --- the same bytes from every format -----------------------------------------------------


@pytest.mark.real_data
def test_python_folder(cifar10_dir, real):
    found = formats.locate(cifar10_dir)
    assert found == formats.locate(cifar10_dir / "cifar-10-batches-py")
    assert found.kind == "python"
    arrays = formats.read(found)
    assert_same(arrays, real)
    assert formats.digest(arrays) == CIFAR10.arrays_sha256


@pytest.mark.real_data
def test_binary_folder(binary_dir, real):
    found = formats.locate(binary_dir)
    assert found.kind == "binary"
    # The md5 sums in the table are the published ones; so our records are the official files.
    assert_same(formats.read(found), real)


@pytest.mark.real_data
def test_python_archive_is_read_without_unpacking(cifar10_dir, real, tmp_path):
    folder = cifar10_dir / "cifar-10-batches-py"
    names = sorted(os.listdir(folder), reverse=True)  # any order will do
    path = make_tar(tmp_path / "cifar-10-python.tar.gz", folder, names)
    with mock.patch.object(tarfile.TarFile, "extractall", side_effect=AssertionError):
        assert_same(formats.read(formats.locate(path)), real)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.real_data
def test_binary_archive_under_any_name(binary_dir, real, tmp_path):
    path = make_tar(tmp_path / "archive", binary_dir, os.listdir(binary_dir))
    assert_same(formats.read(formats.locate(path)), real)


@pytest.mark.real_data
def test_npz(real, tmp_path):
    path = tmp_path / "cifar10.npz"
    formats.write_npz(path, real)
    assert_same(formats.read(formats.locate(tmp_path)), real)
    assert os.listdir(tmp_path) == ["cifar10.npz"]

    # As Keras users save it: labels [N, 1] uint8; and with one pixel changed.
    train_images = real.train_images.copy()
    train_images[7, 3, 3, 0] ^= 1
    np.savez(
        path,
        x_train=train_images,
        y_train=real.train_labels.astype(np.uint8)[:, None],
        x_test=real.test_images,
        y_test=real.test_labels.astype(np.uint8)[:, None],
    )
    with pytest.raises(DataError, match=f"sha256.* expected {CIFAR10.arrays_sha256}"):
        formats.read(formats.locate(path))
    arrays = formats.read(formats.locate(path), verify=False)
    assert_same(arrays, real._replace(train_images=train_images))


TFDS_TRAIN, TFDS_TEST = 700, 200


@pytest.fixture(scope="session")
def tfds_dir(real, tmp_path_factory):
    """A directory that TFDS itself prepared, from the first of the real images."""
    import tensorflow_datasets as tfds

    data_dir = tmp_path_factory.mktemp("tfds")
    source = data_dir / "source"
    source.mkdir()
    formats.as_records(
        real.train_images[:TFDS_TRAIN], real.train_labels[:TFDS_TRAIN], CIFAR10
    ).tofile(source / "train.bin")
    formats.as_records(real.test_images[:TFDS_TEST], real.test_labels[:TFDS_TEST], CIFAR10).tofile(
        source / "test.bin"
    )

    class Cifar10(tfds.image_classification.Cifar10, skip_registration=True):
        """TFDS's own builder, but for where its source files come from."""

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples("train_", [source / "train.bin"]),
                "test": self._generate_examples("test_", [source / "test.bin"]),
            }

    builder = Cifar10(data_dir=data_dir)
    config = tfds.download.DownloadConfig(num_shards=2, try_download_gcs=False)
    tfds.disable_progress_bar()
    builder.download_and_prepare(download_config=config)
    return data_dir


SMALL_TFDS = dataclasses.replace(CIFAR10, train_examples=TFDS_TRAIN, test_examples=TFDS_TEST)


@pytest.mark.real_data
@pytest.mark.parametrize("place", ["", "cifar10", "cifar10/3.0.2"])
def test_tfds(tfds_dir, real, place):
    found = formats.locate(tfds_dir / place, SMALL_TFDS)
    assert found.kind == "tfds"
    assert len(found.files) == 4
    expected = formats.Arrays(
        real.train_images[:TFDS_TRAIN],
        real.train_labels[:TFDS_TRAIN],
        real.test_images[:TFDS_TEST],
        real.test_labels[:TFDS_TEST],
    )
    assert_same(formats.read(found, verify=False), expected)
    if not place:
        with pytest.raises(DataError, match="sha256"):
            formats.read(found, verify=True)


def copy_tfds(tfds_dir, target):
    folder = target / "3.0.2"
    folder.mkdir()
    for path in (tfds_dir / "cifar10" / "3.0.2").glob("*.tfrecord*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.real_data
def test_tfds_damaged(tfds_dir, tmp_path):
    folder = copy_tfds(tfds_dir, tmp_path)
    shard = folder / "cifar10-train.tfrecord-00001-of-00002"
    whole = shard.read_bytes()

    def assert_refused(content, match):
        shard.write_bytes(content)
        with pytest.raises(DataError, match=match):
            formats.read(formats.locate(folder, SMALL_TFDS), verify=False)

    assert_refused(whole[:-10], "cut short")
    assert_refused(struct.pack("<Q", 10**10) + whole[8:], "claims 10000000000 bytes")
    assert_refused(b"", "train records, expected 700")
    assert_refused(whole.replace(b"train_0", b"taint_0"), "has the id")
    assert_refused(whole.replace(b"IHDR\0\0\0\x20", b"IHDR\0\1\0\x20"), "no 32x32 RGB PNG")
    assert_refused(whole.replace(b"IDAT", b"XDAT"), "cannot be read")
    first = folder / "cifar10-train.tfrecord-00000-of-00002"
    shard.unlink()
    with pytest.raises(DataError, match=r"lacks cifar10-train\.tfrecord-00001-of-00002"):
        formats.locate(folder)
    first.unlink()
    with pytest.raises(DataError, match="lacks the train tfrecord files"):
        formats.locate(folder)


def test_tfds_ids_must_be_unique():
    good = np.array([b"test_00001", b"test_00000"], object)
    assert formats._places(Path("x"), "test", good).tolist() == [1, 0]
    for bad in ([b"test_00001"] * 2, [b"test_00000", b"test_00002"]):
        with pytest.raises(DataError, match="exactly once"):
            formats._places(Path("x"), "test", np.array(bad, object))


def test_locate_knows_what_is_nothing(tmp_path):
    assert formats.locate(tmp_path / "missing") is None
    assert formats.locate(tmp_path) is None
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert formats.locate(tmp_path) is None
    file = tmp_path / "cifar.txt"
    file.write_text("no data")
    with pytest.raises(DataError, match=r"neither a \.tar\.gz archive nor an \.npz"):
        formats.locate(file)


def test_missing_batch_is_named(tmp_path):
    for name in CIFAR10.python:
        (tmp_path / name).touch()
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(DataError, match="lacks data_batch_3; a complete folder holds data_batch_1"):
        formats.locate(tmp_path)


# --- pickles ------------------------------------------------------------------------------


def pickled(protocol=4, **changes):
    pixels = np.zeros((10000, 3072), np.uint8)
    batch = {b"data": pixels, b"labels": [1] * 10000, b"batch_label": b"x"}
    batch.update({key.encode(): value for key, value in changes.items()})
    return pickle.dumps(batch, protocol)


def test_pickle_of_today_is_read():
    pixels = np.random.default_rng(0).integers(0, 256, (10000, 3072), np.uint8)
    found, labels = formats.decode_python_batch(pickled(data=pixels), "batch")
    assert np.array_equal(found, pixels)
    assert labels.dtype == np.int32


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_hostile_pickle_runs_nothing(tmp_path, protocol):
    target = tmp_path / "was run"
    for function, argument in ((os.system, f"touch '{target}'"), (eval, f"open({str(target)!r})")):
        data = pickled(protocol, filenames=Evil(function, argument))
        with pytest.raises(DataError, match=r"^batch is refused: the pickle "):
            formats.decode_python_batch(data, "batch")
        assert not target.exists()


def test_hostile_pickle_names_what_it_asked_for():
    data = pickled(filenames=Evil(os.system, "true"))
    with pytest.raises(DataError, match=r"asks for (posix|nt)\.system; only numpy arrays"):
        formats.decode_python_batch(data, "batch")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"labels": [1] * 9999}, "no list of 10000 labels"),
        ({"labels": [1] * 9999 + [10]}, "the label 10, expected 0 to 9"),
        ({"labels": [1] * 9999 + [-1]}, "the label -1, expected 0 to 9"),
        ({"labels": [1] * 9999 + [None]}, "the label None"),
        ({"labels": [1] * 9999 + [True]}, "the label True"),
        ({"data": b"x"}, "no array under the key b'data'"),
        ({"data": np.zeros((10000, 3071), np.uint8)}, r"shape \(10000, 3071\)"),
        ({"data": np.zeros((9999, 3072), np.uint8)}, "holds 9999 images, expected 10000"),
        ({"data": np.zeros((10000, 3072), np.int8)}, "dtype 'i1', expected uint8"),
        ({"data": np.zeros((10000, 3072), np.uint8, order="F")}, "refused"),
        ({"data": np.array([None])}, "dtype 'O8', expected uint8"),
    ],
)
def test_wrong_content_of_a_pickle(changes, match):
    with pytest.raises(DataError, match=match):
        formats.decode_python_batch(pickled(**changes), "batch")


def test_pickle_that_is_no_dictionary():
    with pytest.raises(DataError, match="pickled list, expected a dictionary"):
        formats.decode_python_batch(pickle.dumps([]), "batch")


GLOBAL_RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"


@pytest.mark.parametrize(
    ("data", "match"),
    [
        # numpy's own _reconstruct would allocate the claimed shape at once.
        (
            b"\x80\x02" + GLOBAL_RECONSTRUCT + b"cnumpy\nndarray\nJ\0\xe4\x0b\x54\x85U\x01b\x87R.",
            "expected a dictionary",
        ),
        (b"\x80\x02B\xff\xff\xff\x7f.", "cannot be read"),  # a 2 GB string
        (b"\x80\x04\x8e\0\xe4\x0b\x54\x02\0\0\0.", "cannot be read|BINBYTES8"),  # 10 GB
        (b"\x80\x02Nr\xff\xff\xff\xff.", "4294967295 memo slots"),
        (b"\x80\x02" + b")" + b"q\0" + b"h\0h\0\x86q\0" * 60 + b".", "60 tuples"),
        (b"\x80\x02}(c__main__\nx\nN", "cannot be read|asks for"),
        (b"(" * 5000, "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_claims_of_a_pickle(data, match):
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=match):
            formats.decode_python_batch(data, "batch")
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


# --- files of wrong size ------------------------------------------------------------------


def test_too_large_file_is_not_read(tmp_path):
    for name in CIFAR10.python:
        (tmp_path / name).touch()
    with (tmp_path / "data_batch_1").open("wb") as file:
        file.truncate(10**10)  # sparse: takes no room on disk
    with pytest.raises(DataError, match="data_batch_1 has 10000000000 bytes, expected at most"):
        formats.read(formats.locate(tmp_path), verify=False)


def test_binary_batch_of_wrong_size_or_label():
    good = bytes(10000 * 3073)
    pixels, labels = formats.decode_binary_batch(good, "batch")
    assert pixels.shape == (10000, 3072)
    assert labels.dtype == np.int32
    with pytest.raises(DataError, match="batch has 30729999 bytes, expected 30730000"):
        formats.decode_binary_batch(good[:-1], "batch")
    with pytest.raises(DataError, match="labels from 0 to 10, expected 0 to 9"):
        formats.decode_binary_batch(b"\x0a" + good[1:], "batch")


# --- archives -----------------------------------------------------------------------------


def tar_of(path, *members):
    """Writes a .tar.gz of (name, content or TarInfo) pairs."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                for key, value in content.items():
                    setattr(info, key, value)
                tar.addfile(info)
    return path


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("../data_batch_1", b"x")], "unsafe name '../data_batch_1'"),
        ([("/etc/data_batch_1", b"x")], "unsafe name '/etc/data_batch_1'"),
        ([("a/../../data_batch_1", b"x")], "unsafe name"),
        ([("data_batch_1", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})], "no ordinary"),
        ([("data_batch_1", {"type": tarfile.FIFOTYPE})], "no ordinary file"),
        ([("readme.html", b"x")], "lacks data_batch_1, data_batch_2"),
        ([("data_batch_1.bin", b"x")], "data_batch_1.bin in .* has 1 bytes"),
        ([("data_batch_1", b"x")], "data_batch_1 in .* cannot be read"),
        (
            [("data_batch_1.bin", bytes(30730000)), ("x/data_batch_1.bin", bytes(30730000))],
            "holds data_batch_1.bin twice",
        ),
        ([("data_batch_1.bin", bytes(30730000))], "lacks data_batch_2.bin"),
        ([("data_batch_1.bin", bytes(32000001))], "claims 32000001 bytes"),
        (
            [("data_batch_1.bin", bytes(30730000)), ("data_batch_1", pickled())],
            "mixes the python and the binary version",
        ),
    ],
)
def test_hostile_archive(tmp_path, members, match):
    path = tar_of(tmp_path / "x.tar.gz", *members)
    with pytest.raises(DataError, match=match):
        formats.read(formats.locate(path), verify=False)
    assert os.listdir(tmp_path) == ["x.tar.gz"]


def test_archive_whose_header_claims_ten_gigabytes(tmp_path):
    info = tarfile.TarInfo("data_batch_1")
    info.size = 10**10
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(info.tobuf() + b"little"))
    with pytest.raises(DataError, match=r"data_batch_1 in .* claims 10000000000 bytes"):
        formats.read(formats.locate(path), verify=False)


def test_gzip_bomb_is_bounded(tmp_path):
    # Of an extended header not even as much as that is read.
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.XHDTYPE, 10**10
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1_000_000), 1))
    with pytest.raises(DataError, match="an extended header that claims 10000000000 bytes"):
        formats.read(formats.locate(path), verify=False)
    info = tarfile.TarInfo("readme.html")
    info.size = 5_000_000
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(5):
            file.write(info.tobuf() + bytes(5_000_192))
    with (
        mock.patch.object(formats, "_ARCHIVE_BYTES_LIMIT", 20_000_000),
        pytest.raises(DataError, match="unpacks to more than 20000000 bytes"),
    ):
        formats.read(formats.locate(path), verify=False)
    with gzip.open(path) as stream:
        reader = formats._BoundedReader(stream, 100)
        assert len(reader.read(40)) == 40
        with (
            mock.patch.object(stream, "read", wraps=stream.read) as read,
            pytest.raises(DataError, match="more than 100 bytes"),
        ):
            reader.read(10**10)
        read.assert_called_once_with(61)  # what is asked for is never more than what is left


def test_cut_archive_names_both_checksums(tmp_path):
    whole = tar_of(tmp_path / "x.tar.gz", ("data_batch_1.bin", os.urandom(100_000))).read_bytes()
    path = tmp_path / "cut.tar.gz"
    path.write_bytes(whole[:50_000])
    with pytest.raises(DataError) as caught:
        formats.read(formats.locate(path))
    assert CIFAR10.python_archive_md5 in str(caught.value)
    assert "cut.tar.gz" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- npz ----------------------------------------------------------------------------------


def small(**changes):
    arrays = {
        "x_train": np.zeros((3, 32, 32, 3), np.uint8),
        "y_train": np.array([0, 9, 5]),
        "x_test": np.zeros((2, 32, 32, 3), np.uint8),
        "y_test": np.array([1, 2]),
    }
    arrays.update(changes)
    return {key: value for key, value in arrays.items() if value is not None}


def read_small(path):
    return formats.read_npz(path, train_examples=3, test_examples=2)


def test_npz_compressed_or_not(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **small())
        arrays = read_small(tmp_path / "x.npz")
        assert arrays.train_labels.tolist() == [0, 9, 5]
        assert arrays.train_labels.dtype == np.int32


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x_test": None, "y_test": None}, "lacks the arrays x_test, y_test"),
        ({"x_train": np.zeros((3, 32, 32, 3), np.float32)}, "x_train in .* is float32 of shape"),
        ({"x_train": np.zeros((3, 3, 32, 32), np.uint8)}, r"is uint8 of shape \(3, 3, 32, 32\)"),
        ({"x_train": np.zeros((4, 32, 32, 3), np.uint8)}, r"shape \(4, 32, 32, 3\), expected"),
        ({"x_train": np.zeros((3, 32, 32, 3), np.uint8, order="F")}, "in Fortran order"),
        ({"y_train": np.array([0.0, 1.0, 2.0])}, "y_train in .* is float64"),
        ({"y_train": np.array([0, 1, None])}, "y_train in .* is object"),
        ({"x_train": np.array([None, [1]], object)}, "x_train in .* is object"),
        ({"y_train": np.array([0, 1, 10])}, "labels from 0 to 10, expected 0 to 9"),
        ({"y_train": np.array([0, 1, -1])}, "labels from -1 to 1, expected 0 to 9"),
        ({"y_train": np.array([0, 1, 2**63], np.uint64)}, "expected 0 to 9"),
    ],
)
def test_wrong_npz(tmp_path, changes, match):
    np.savez(tmp_path / "x.npz", **small(**changes))
    with pytest.raises(DataError, match=match):
        read_small(tmp_path / "x.npz")


def npy(shape, dtype="|u1", content=b""):
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + content


def test_npz_claims(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **small())
    with zipfile.ZipFile(path) as archive:
        whole = {name: archive.read(name) for name in archive.namelist()}

    def refuse(match, **members):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in {**whole, **members}.items():
                archive.writestr(name, content)
        tracemalloc.start()
        with pytest.raises(DataError, match=match):
            read_small(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()

    refuse(r"shape \(10000000000,", **{"x_train.npy": npy((10**10, 32, 32, 3))})
    refuse("ends after 5 of 9216", **{"x_train.npy": npy((3, 32, 32, 3), content=b"12345")})
    refuse("goes on after", **{"x_train.npy": npy((3, 32, 32, 3), content=bytes(10**8))})
    refuse("npy version", **{"x_train.npy": b"\x93NUMPY\3\0" + bytes(100)})
    refuse("cannot be read", **{"x_train.npy": b"PK"})


def test_write_npz_leaves_nothing_behind(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"as it was")
    arrays = formats.Arrays(**dict(zip(formats.Arrays._fields, small().values(), strict=True)))
    with (
        mock.patch.object(formats.np, "savez", side_effect=OSError(28, "No space left on device")),
        pytest.raises(OSError, match="No space left"),
    ):
        formats.write_npz(path, arrays)
    assert path.read_bytes() == b"as it was"
    assert os.listdir(tmp_path) == ["x.npz"]
    formats.write_npz(path, arrays)
    assert_same(read_small(path), [a.astype(np.int32) if a.ndim == 1 else a for a in arrays])


# --- random bytes: DataError or nothing ---------------------------------------------------

fuzz = settings(max_examples=60, deadline=None, database=None)


def only_data_errors(function, *arguments, **options):
    with contextlib.suppress(DataError):
        function(*arguments, **options)


@fuzz
@given(st.binary(max_size=300))
def test_fuzz_pickle_bytes(data):
    only_data_errors(formats.decode_python_batch, b"\x80\x02" + data, "batch")


TWO = dataclasses.replace(CIFAR10, train_examples=10)


@fuzz
@given(st.data())
def test_fuzz_pickle_mutations(data):
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2]}
    whole = bytearray(pickle.dumps(batch, data.draw(st.sampled_from([3, 4]))))
    formats.decode_python_batch(bytes(whole), "batch", TWO)
    # Not among the pixels, where every change is lawful.
    places = [i for i in range(len(whole)) if i < 200 or i > len(whole) - 60]
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.sampled_from(places))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(whole)))
    only_data_errors(formats.decode_python_batch, bytes(whole), "batch", TWO)
    only_data_errors(formats.decode_python_batch, bytes(whole[:end]), "batch", TWO)


@fuzz
@given(st.binary(max_size=300))
def test_fuzz_binary(data):
    with pytest.raises(DataError):
        formats.decode_binary_batch(data, "batch")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file"


@fuzz
@given(st.data())
def test_fuzz_npz(scratch, data):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **small())
    whole = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    scratch.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    only_data_errors(read_small, scratch)
    scratch.write_bytes(whole)
    only_data_errors(read_small, scratch)


@fuzz
@given(st.data())
def test_fuzz_archive(scratch, data):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("cifar-10-batches-py/data_batch_1", "é" * 120):
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(bytes(600)))
    whole = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 4000))] = data.draw(st.integers(0, 255))
    scratch.write_bytes(gzip.compress(whole[: data.draw(st.integers(0, len(whole)))], 1))
    found = formats.Found("archive", scratch, (scratch,))
    with mock.patch.object(formats, "_empty_arrays"), pytest.raises(DataError):
        formats.read(found, verify=False)


@fuzz
@given(st.binary(max_size=100))
def test_fuzz_tfrecords(scratch, data):
    scratch.write_bytes(data)
    only_data_errors(lambda: list(formats.read_records(scratch)))
