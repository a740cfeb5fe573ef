"""Files that anybody may have written: what is read, and that all else is refused in one line."""

import ast
import dataclasses
import gzip
import io
import json
import math
import os
import pickle
import tarfile
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from cifarflow.data import cache, formats
from cifarflow.data.layouts import CIFAR10
from cifarflow.errors import CheckpointError, ConfigError, DataError, WorkdirError
from cifarflow.training.history import History
from cifarflow.training.workdir import Workdir
from cifarflow.untrusted import (
    one_line,
    open_file,
    open_npz,
    parse_json,
    read_array,
    read_array_header,
    read_bytes,
    reading,
    shown,
)

ROOT = Path(__file__).resolve().parents[1]


# --- messages -----------------------------------------------------------------------------


class OddError(Exception):
    pass


def test_whatever_goes_wrong_is_one_error_of_ours():
    with pytest.raises(DataError, match=r"^file cannot be read: no$") as caught, reading("file"):
        raise OddError("no")
    assert isinstance(caught.value.__cause__, OddError)
    for cause, text in ((MemoryError(), "MemoryError"), (ValueError("a\n b\x1b"), r"a b\x1b")):
        with pytest.raises(DataError) as caught, reading("file"):
            raise cause
        assert str(caught.value) == f"file cannot be read: {text}"
    with (
        pytest.raises(CheckpointError, match=r"^it is damaged: x$"),
        reading("it", failing="is damaged", error=CheckpointError),
    ):
        raise RecursionError("x")
    ours = ConfigError("as it came")
    with pytest.raises(ConfigError) as caught, reading("file"):
        raise ours
    assert caught.value is ours


@settings(deadline=None)
@given(st.text() | st.text("\n\x1b\u202e\ud800 ab"), st.integers(10, 400))
def test_one_line_is_one_short_line(text, length):
    line = one_line(text, length=length)
    assert line.isprintable()
    # An escape has at most 10 signs.
    assert len(line) <= 10 * length
    if text.isprintable() and text.isascii() and len(text) <= length and "  " not in text:
        assert line == text.strip()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
)


@settings(deadline=None)
@given(VALUES)
def test_shown_is_one_short_line(value):
    assert shown(value).isprintable()
    assert len(shown(value, length=60)) <= 600


def test_shown_is_repr_where_that_is_short():
    for value in ({"units": [8]}, "text", b"\x80", 1.5, None, (10000, 3071), {"a": {"b": [1, 2]}}):
        assert shown(value) == repr(value)


def test_shown_ends():
    shared = []
    for _ in range(200):
        shared = [shared, shared]
    endless = []
    endless.append(endless)
    for value in (shared, endless, {"a": shared}, b"x" * 10**7, "x" * 10**7, list(range(10**6))):
        assert len(shown(value)) <= 300


# --- files --------------------------------------------------------------------------------


def test_only_ordinary_files_are_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, limit=5) == b"12345"
    with pytest.raises(ValueError, match="it has 5 bytes, expected at most 4"):
        read_bytes(path, limit=4)
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", Path("/dev/zero")):
        # `open` would wait here for ever.
        with pytest.raises(ValueError, match="no ordinary file"):
            open_file(special)
    for wrong in (tmp_path, tmp_path / "none"):
        with pytest.raises(OSError, match="directory"):
            open_file(wrong)


TESTED = ("test_outputs.npy", "test_labels.npy", "mistakes.npz")


def test_a_pipe_in_place_of_a_file_is_refused(tmp_path):
    for name in ("recipe.json", "summary.json", "metrics.jsonl", *TESTED):
        os.mkfifo(tmp_path / name)
    os.mkfifo(tmp_path / "verified.json")
    workdir = Workdir(tmp_path)
    for read in (
        lambda: workdir.open({}),
        lambda: workdir.read_summary([]),
        workdir.read_test_outputs,
        workdir.read_test_labels,
        workdir.read_mistakes,
        lambda: History.load(workdir.metrics),
        lambda: formats.read_npz(tmp_path / "recipe.json"),
    ):
        with pytest.raises(DataError, match="it is no ordinary file"):
            read()
    assert not cache.is_verified(tmp_path, [cache.Mark(1, 2, 3, 4, 5, "a")])


# --- JSON ---------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(deadline=None)
@given(JSON)
def test_json_comes_back(value):
    assert parse_json(json.dumps(value).encode()) == value


def nested(depth):
    return b"[" * depth + b"]" * depth


def test_json_that_is_too_much():
    assert parse_json(nested(50))
    assert parse_json(b'{"a":' * 25 + nested(25) + b"}" * 25)
    # Brackets in a text are no depth, and none of them hides any.
    assert parse_json(b'["' + b"[" * 1000 + b'"]')
    for depth in (51, 400, 100_000):
        for text in (nested(depth), b'{"a":' * depth + b"0" + b"}" * depth, b"[" * depth):
            with pytest.raises(ValueError, match=r"nested|Expecting"):
                parse_json(text)
    with pytest.raises(ValueError, match="nested"):
        parse_json(b'["' + b"]" * 1000 + b'", ' + nested(60) + b"]")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_json_has_no_such_number(number):
    text = f'{{"a": [1.5, {number}]}}'.encode()
    with pytest.raises(ValueError, match=r"which JSON has not|too large"):
        parse_json(text)
    found = parse_json(text, finite=False)["a"][1]
    assert math.isnan(found) or math.isinf(found)


@pytest.mark.parametrize("data", [b"", b"\xff", b"{", b"9" * 5000, b"\0", b"\xef\xbb\xbf{}"])
def test_what_is_no_json(data):
    with pytest.raises(ValueError):  # noqa: PT011 - of many kinds
        parse_json(data)


# --- arrays -------------------------------------------------------------------------------


def read_one(data, name="x"):
    file = io.BytesIO(data)
    return read_array(file, read_array_header(file), size=len(data))


def saved(array, **options):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


DTYPES = st.sampled_from(["u1", "i8", ">i4", "f2", "f8", "?", "c16", "U3", "S2", "V2"])


@settings(deadline=None)
@given(st.data(), st.sampled_from([(1, 0), (2, 0)]))
def test_arrays_come_back_as_numpy_reads_them(data, version):
    shape = data.draw(arrays_of.array_shapes(min_dims=0, min_side=0, max_side=4))
    dtype = np.dtype(data.draw(DTYPES))
    content = data.draw(st.binary(min_size=200, max_size=300))
    count = math.prod(shape)
    array = np.frombuffer((content * 50)[: count * dtype.itemsize], dtype).reshape(shape)
    found = read_one(saved(array, version=version))
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()
    assert found.flags.writeable


def test_bytes_that_numpy_has_no_name_for():
    import ml_dtypes

    array = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = read_one(saved(array))
    assert np.array_equal(found.view(ml_dtypes.bfloat16), array)


def header(shape="(2,)", description="'|u1'", fortran="False", end=", }\n"):
    text = f"{{'descr': {description}, 'fortran_order': {fortran}, 'shape': {shape}{end}"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "it begins b''"),
        (b"PK\3\4" + bytes(9), "it begins"),
        (b"\x93NUMPY\3\0" + bytes(100), r"npy version \(3, 0\), expected"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff", "its header claims 4294967295 bytes"),
        (b"\x93NUMPY\1\0\x11\x27", "its header claims 10001 bytes"),
        (header("(10000000000,)") + b"12", "it ends after 2 of 10000000000 bytes"),
        (header("(4294967296, 4294967296)", "'<f8'"), "it ends after 0 of"),
        (header("(2,)") + b"123", "it goes on after its 2 bytes"),
        (header("(0, 10000000000)") + b"1", "it goes on after its 0 bytes"),
        (header(description="'|O'") + bytes(16), "it is object, expected plain"),
        (header(fortran="True") + b"12", "in Fortran order, expected"),
        (header(description="'|V0'"), r"expected plain"),
        (header(description="'|Z2'"), "'|Z2', which is no type"),
        (header(description="[('a', 'u1'), ('b', 'O')]"), "its header is"),
        (header(description="'(1000000000,)u1'"), "its header is"),
        (header("(-1,)"), "its header is"),
        (header("(1 2)"), "its header is"),
        (header("(,)"), "its header is"),
        (header("(" + "1," * 9 + ")"), "its header is"),
        (header("(1" + "0" * 30 + ",)"), "its header is"),
        (header(end=", 'x': __import__('os').abort()}"), "its header is"),
        (header("(" * 3000), "its header is"),
        (header(fortran="-" * 9000 + "1"), "its header is"),
    ],
)
def test_arrays_that_claim_what_is_not_there(data, match):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match) as caught:
            read_one(data)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 200


def test_an_npz_of_numpy(tmp_path):
    path = tmp_path / "x.npz"
    array = np.arange(300_000, dtype=np.int64)
    for save in (np.savez, np.savez_compressed):
        save(path, a=array)
        with open_npz(path) as archive, archive.open("a.npy") as file:
            size = archive.getinfo("a.npy").file_size
            assert np.array_equal(read_array(file, read_array_header(file), size=size), array)
    with (
        pytest.raises(ValueError, match="a member is compressed"),
        open_npz(path, packed=False),
    ):
        pass


def test_zip_files_that_claim_what_is_not_there(tmp_path):
    path = tmp_path / "x.npz"

    def refuse(match, **options):
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=match), open_npz(path, **options):
                pass
            assert tracemalloc.get_traced_memory()[1] < 30e6
        finally:
            tracemalloc.stop()

    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("a.npy", bytes(1000))
        refuse(f"packed by method {method}")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", bytes(1_000_000))
    whole = path.read_bytes()
    start = int.from_bytes(whole[-6:-2], "little")
    directory = whole[start:-22]
    # The same megabyte under many names, each of which fits.
    many = directory * 3000
    end = whole[-22:-10] + len(many).to_bytes(4, "little") + whole[-6:]
    path.write_bytes(whole[:start] + many + end)
    refuse("its members claim 3000000000 bytes", packed=False)
    with open_npz(path) as archive:
        assert len(archive.infolist()) == 3000
    # A directory of 4 MB, and one that says it has 4 GB.
    many = directory * 60_000
    path.write_bytes(
        whole[:start] + many + whole[-22:-10] + len(many).to_bytes(4, "little") + end[-6:]
    )
    refuse("a directory of more than")
    path.write_bytes(whole[:-10] + b"\xff\xff\xff\xf0" + whole[-6:])
    with pytest.raises(zipfile.BadZipFile), open_npz(path):
        pass


# --- what the readers make of it ------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.text("aé/.b-_ü", min_size=1, max_size=180).filter(
                lambda name: name.strip("/") and not name.startswith("/")
            ),
            st.binary(max_size=1200),
            st.booleans(),
        ),
        max_size=6,
    ),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.floats(0, 2e9),
)
def test_archives_are_read_as_tarfile_reads_them(members, form, mtime):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content, is_folder in members:
            info = tarfile.TarInfo(name)
            info.mtime = mtime if form == tarfile.PAX_FORMAT else int(mtime)
            info.type = tarfile.DIRTYPE if is_folder else tarfile.REGTYPE
            info.size = 0 if is_folder else len(content)
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:  # this format has no place for such a name
                return
    buffer.seek(0)
    expected = []
    with tarfile.open(fileobj=buffer) as tar:
        for info in tar:
            if info.isfile():
                expected.append((info.name.rstrip("/"), tar.extractfile(info).read()))
    buffer.seek(0)
    unsafe = [name for name, _, _ in members if ".." in Path(name).parts]
    if unsafe:
        with pytest.raises(DataError, match="unsafe name"):
            list(formats._tar_files(buffer, Path("x")))
    else:
        found = list(formats._tar_files(buffer, Path("x")))
        assert [(name.rstrip("/"), data) for name, data in found] == expected


def test_an_archive_of_any_number_of_members_is_refused(tmp_path):
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for number in range(101):
            tar.addfile(tarfile.TarInfo(f"file_{number}"))
    with pytest.raises(DataError, match="holds more than 100 members"):
        formats.read(formats.locate(path), verify=False)


def test_a_packed_file_is_one_member_of_any_header(tmp_path):
    path = tmp_path / "x"
    packed = gzip.compress(b"1234567890" * 1000)
    # A flag, and what it announces: a name.
    named = packed[:3] + b"\x08" + packed[4:10] + b"a name\0" + packed[10:]
    for content in (packed, named):
        path.write_bytes(content)
        with path.open("rb") as file:
            stream = formats._Gunzip(file)
            parts = [stream.read(size) for size in (0, 1, 5000, 10_000, 5)]
        assert [len(part) for part in parts] == [0, 1, 5000, 4999, 0]
        assert b"".join(parts) == b"1234567890" * 1000
    path.write_bytes(packed[:40])
    with path.open("rb") as file, pytest.raises(EOFError, match="cut short"):
        formats._Gunzip(file).read(20_000)


def test_a_label_without_an_end_is_refused():
    one = dataclasses.replace(CIFAR10, train_examples=5)
    label = []
    for _ in range(60):
        label = [label, label]
    batch = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [label]}
    with pytest.raises(DataError, match=r"batch has the label \[\[\[") as caught:
        formats.decode_python_batch(pickle.dumps(batch, 4), "batch", one)
    assert len(str(caught.value)) < 200


def row(**changes):
    values = {"step": 1, "epoch": 1.0, "split": "train", "loss": 1.5, "accuracy": None}
    return json.dumps({**values, **changes})


BAD_ROWS = [
    *(row(loss=value) for value in (math.nan, math.inf, "1", [1], {}, True, "")),
    *(row(step=value) for value in (1.0, True, "1", None, [1])),
    *(row(epoch=value) for value in (None, "1", math.nan, 10**400)),
    *(row(split=value) for value in (None, 1, ["train"])),
    *(row(dataset=value) for value in ([1], {"a": 1}, math.nan)),
    row().replace("1.5", "1e999"),
    '{"step": 1, "a": ' + "[" * 3000 + "]" * 3000 + "}",
    row(note="x" * 20_000),
]


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_row_that_is_none(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{row()}\n{bad}\n{row()}\n")
    with pytest.raises(DataError, match=r"line 2 of .* is not a row of a run's log") as caught:
        History.load(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_log_of_one_endless_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.write(b'{"step": 1, "loss": "')
        file.truncate(10**10)  # sparse: takes no room on disk
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"line 1 of .* is not a row"):
            History.load(path)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_a_log_of_too_many_rows(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{row()}\n" * 5)
    monkeypatch.setattr("cifarflow.training.history._MOST_ROWS", 4)
    with pytest.raises(DataError, match="has more than 4 lines"):
        History.load(path)


@pytest.mark.parametrize("name", ["recipe.json", "summary.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', '{"a": ' + "9" * 5000 + "}"])
def test_json_of_a_run_that_is_none(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}' is not readable JSON: ") as caught:
        Workdir(tmp_path).read_json(name)
    assert len(str(caught.value)) < 500


def test_json_of_a_run_that_is_too_large(tmp_path):
    with (tmp_path / "summary.json").open("wb") as file:
        file.truncate(10**10)
    with pytest.raises(DataError, match="it has 10000000000 bytes, expected at most"):
        Workdir(tmp_path).read_summary([])


SUMMARY = {
    "recipe": "mine",
    "seed": 1,
    "test_accuracy": 0.5,
    "examples": {"train": 2, "validation": 0, "test": 2},
    "confusion_matrix": [[1, 0], [0, 1]],
    "others": ["as", {"they": "like"}],
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recipe", 3),
        ("seed", "1"),
        ("seed", True),
        ("test_accuracy", None),
        ("test_accuracy", [0.5]),
        ("test_accuracy", 10**400),
        ("examples", [1, 2, 3]),
        ("examples", {"train": 2, "test": 2}),
        ("confusion_matrix", [[1, 0], [0]]),
        ("confusion_matrix", [[1, "0"], [0, 1]]),
        ("confusion_matrix", [1, 2]),
        ("confusion_matrix", 3),
    ],
)
def test_a_summary_that_cannot_be_shown(tmp_path, key, value):
    workdir = Workdir(tmp_path)
    workdir.write_json("summary.json", SUMMARY)
    assert workdir.read_summary(SUMMARY) == SUMMARY
    workdir.write_json("summary.json", {**SUMMARY, key: value})
    with pytest.raises(DataError, match=rf"no summary of a run, its '{key}' is .*: remove it"):
        workdir.read_summary(SUMMARY)


def test_a_recipe_that_cannot_be_quoted(tmp_path):
    (tmp_path / "recipe.json").write_text('{"\\u001b[31m": "' + "x" * 10**5 + '"}')
    with pytest.raises(WorkdirError, match="holds a run with") as caught:
        Workdir(tmp_path).open({"name": "mine"}, resume=True)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2), (), (0, 2)])
@pytest.mark.parametrize("dtype", ["int32", "float32", "complex64"])
def test_outputs_that_are_none(tmp_path, shape, dtype):
    np.save(tmp_path / "test_outputs.npy", np.ones(shape, dtype))
    workdir = Workdir(tmp_path)
    if len(shape) == 2 and dtype == "float32":
        assert workdir.read_test_outputs().shape == shape
    else:
        with pytest.raises(DataError, match=r"test_outputs.npy' is damaged: it is .*, expected"):
            workdir.read_test_outputs()


@pytest.mark.parametrize(
    "files",
    [
        *([1], ["a"], [[1, 2, 3, 4, "a"]], [[1, 2, 3, 4, 5.0, "a"]], [[True, 2, 3, 4, 5, "a"]]),
        *([[1, 2, 3, 4, 5, 6]], [[1, 2, 3, 4, 5, "a" * 201]], [[1, 2, 3, 4, 5, "\n"]]),
        *([[1, 2, 3, 4, 5, "\u00e9"]], [[1 << 128, 2, 3, 4, 5, "a"]], [[[[[1]]], 2]]),
        *({"a": [1, 2, 3, 4, 5, "a"]}, "x", None),
    ],
)
def test_a_cache_that_says_anything(tmp_path, files):
    (tmp_path / "verified.json").write_text(json.dumps({"version": 2, "files": files}))
    assert not cache.is_verified(tmp_path, [cache.Mark(1, 2, 3, 4, 5, "a")])
    new = cache.Mark(6, 7, 8, 9, -10, "b")
    cache.remember_verified(tmp_path, [new])
    assert cache.is_verified(tmp_path, [new])
    kept = json.loads((tmp_path / "verified.json").read_text())
    assert kept == {"version": 2, "files": [[6, 7, 8, 9, -10, "b"]]}


# --- the sources ----------------------------------------------------------------------------

# What runs what a file says, or writes where it says.
FORBIDDEN = {"eval", "exec", "extract", "extractall", "unpack_archive", "literal_eval"}


@pytest.mark.parametrize("folder", ["cifarflow", "examples", "benchmarks"])
def test_nothing_in_the_sources_trusts_a_file(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            where = f"{path}:{node.lineno}"
            assert name not in FORBIDDEN, where
            text = ast.unparse(node.func)
            assert not text.startswith("pickle.load"), where
            # Everywhere else these are as safe as they can be, if nobody says otherwise.
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant):
                    said = (keyword.arg, keyword.value.value)
                    assert said not in (("allow_pickle", True), ("safe_mode", False)), where
            assert name != "enable_unsafe_deserialization", where
