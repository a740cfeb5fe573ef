"""The search for CIFAR-10: which source wins, what is remembered, what is an error."""

import dataclasses
import functools
import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from cifarflow.data import cache, download, formats, layouts, sources
from cifarflow.data.cifar10 import load_cifar10
from cifarflow.errors import ConfigError, DataError, DataNotFoundError

real_data = pytest.mark.real_data


def change_layout(monkeypatch, **changes):
    """Makes other files count as the official ones."""
    layout = dataclasses.replace(layouts.CIFAR10, **changes)
    monkeypatch.setitem(layouts.LAYOUTS, "cifar10", layout)


@pytest.fixture
def small_scale(monkeypatch):
    """Makes a data set of 30 + 20 images count as whole, so that a test takes no time."""
    sha256 = formats.digest(small_arrays())
    change_layout(monkeypatch, train_examples=30, test_examples=20, arrays_sha256=sha256)


def small_arrays(mark=0):
    labels = np.arange(30, dtype=np.int32) % 10
    images = np.full((30, 32, 32, 3), mark, np.uint8)
    return formats.Arrays(images, labels, images[:20], labels[:20])


def put(path, mark=0):
    formats.write_npz(Path(path), small_arrays(mark))
    return path


@pytest.fixture
def small_batches(monkeypatch, tmp_path):
    """A folder of binary batches of ten images each, which count as the official ones.

    As from an archive, all are of one size and one time.
    """
    store = tmp_path / "store"
    store.mkdir()
    sums = {}
    for number, name in enumerate(layouts.CIFAR10.binary):
        content = b"".join(bytes([label]) + bytes([number]) * 3072 for label in range(10))
        (store / name).write_bytes(content)
        os.utime(store / name, ns=(10**18, 10**18))
        sums[name] = hashlib.md5(content).hexdigest()
    change_layout(monkeypatch, train_examples=50, test_examples=10, binary=sums)
    return store


def copy_batches(cifar10_dir, target, *copied):
    """A folder of links to the real files, but for the `copied` ones, which may be damaged."""
    folder = target / "cifar-10-batches-py"
    folder.mkdir()
    for path in (cifar10_dir / "cifar-10-batches-py").iterdir():
        if path.name in copied:
            shutil.copyfile(path, folder / path.name)
        else:
            (folder / path.name).symlink_to(path)
    return folder


# --- the order of the sources -------------------------------------------------------------


def test_each_source_wins_over_the_next(small_scale, tmp_path, monkeypatch):
    places = {
        "argument": put(tmp_path / "argument" / "cifar10.npz"),
        "variable": put(tmp_path / "variable" / "cifar10.npz"),
        "cache": put(tmp_path / "cache" / "cifar10.npz"),
        "keras": put(tmp_path / "keras" / "datasets" / "cifar10.npz"),
        "tfds": put(tmp_path / "tfds" / "cifar10.npz"),
    }
    monkeypatch.setenv("CIFARFLOW_DATA", str(tmp_path / "variable"))
    found = [load_cifar10(tmp_path / "argument").source, load_cifar10().source]
    monkeypatch.delenv("CIFARFLOW_DATA")
    for name in ("cache", "keras", "tfds"):
        found.append(load_cifar10().source)
        places[name].unlink()
    assert found == [str(tmp_path / path) for path in places.values()]

    downloaded = tmp_path / "cache" / "cifar-10-binary.tar.gz"
    with (
        mock.patch.object(download, "download_archive") as fetch,
        pytest.raises(FileNotFoundError),  # the patched download leaves no file to read
    ):
        load_cifar10()
    assert fetch.call_args.args == (downloaded,)


def test_default_places(monkeypatch):
    for name in ("CIFARFLOW_CACHE", "KERAS_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.cache_folder() == Path("/xdg/cifarflow")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path("/home/someone/.cache/cifarflow")
    monkeypatch.setenv("CIFARFLOW_CACHE", "~/mine")
    assert cache.cache_folder() == Path("/home/someone/mine")
    assert cache.cache_folder("~/given") == Path("/home/someone/given")
    assert [str(place.path) for place in sources.places(None, Path("/c"))] == [
        "/c",
        "/home/someone/.keras/datasets",
        "/home/someone/tensorflow_datasets",
    ]


@real_data
@pytest.mark.parametrize(
    "place", ["cifar-10-batches-py", "cifar-10-batches-py-target/cifar-10-batches-py"]
)
def test_keras_cache_folders(cifar10_dir, tmp_path, place):
    link = tmp_path / "keras" / "datasets" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(cifar10_dir / "cifar-10-batches-py")
    assert load_cifar10().source == str(link)


@real_data
def test_real_data_set(cifar10_dir):
    dataset = load_cifar10(cifar10_dir)
    assert dataset.name == "cifar10"
    assert not dataset.is_standin
    assert dataset.train.images.shape == (40000, 32, 32, 3)
    assert dataset.validation.images.shape == (10000, 32, 32, 3)
    assert dataset.test.images.shape == (10000, 32, 32, 3)
    assert dataset.test.labels.dtype == np.int32
    names = [dataset.class_names[label] for label in dataset.train.labels[:4]]
    assert names == ["frog", "truck", "truck", "deer"]
    assert dataset.source == str(cifar10_dir / "cifar-10-batches-py")


@real_data
def test_options_of_the_split(cifar10_dir):
    whole = load_cifar10(cifar10_dir, validation_fraction=0.0)
    assert len(whole.train) == 50000
    assert len(whole.validation) == 0
    options = {"validation_fraction": 0.1, "validation_split": "stratified"}
    first = load_cifar10(cifar10_dir, **options, seed=1)
    assert np.bincount(first.validation.labels).tolist() == [500] * 10
    second = load_cifar10(cifar10_dir, **options, seed=2)
    assert not np.array_equal(first.validation.images, second.validation.images)


@real_data
def test_folder_is_read_fast_and_without_tfds(cifar10_dir):
    code = (
        "import sys, time; from cifarflow.data.cifar10 import load_cifar10; load_cifar10();"
        "start = time.process_time(); load_cifar10(); print(time.process_time() - start);"
        "print(any(name in sys.modules for name in ('tensorflow_datasets', 'tensorflow')))"
    )
    environment = {**os.environ, "CIFARFLOW_DATA": str(cifar10_dir)}
    root = Path(__file__).resolve().parents[1]
    output = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert float(output[0]) < 2.0  # processor time of both threads; 0.5 s of wall time
    assert output[1] == "False"


# --- what is remembered -------------------------------------------------------------------


@real_data
def test_verification_is_remembered(cifar10_dir, tmp_path):
    folder = copy_batches(cifar10_dir, tmp_path, "test_batch")
    with mock.patch.object(formats, "_check_md5", wraps=formats._check_md5) as check:
        load_cifar10(folder)
        assert check.call_count == 7
        load_cifar10(folder)
        load_cifar10(tmp_path)
        assert check.call_count == 7
        os.utime(folder / "test_batch", ns=(1, 1))
        load_cifar10(folder)
        assert check.call_count == 14
        load_cifar10(folder, cache_dir=tmp_path / "another")
        assert check.call_count == 21
        load_cifar10(folder, cache_dir=tmp_path / "third", verify=False)
        assert check.call_count == 21
    assert not (tmp_path / "third").exists()
    (tmp_path / "another" / "verified.json").write_text("[1, 2")
    load_cifar10(folder, cache_dir=tmp_path / "another")
    assert len(json.loads((tmp_path / "another" / "verified.json").read_text())["files"]) == 7


ONE, TWO = "data_batch_1.bin", "data_batch_2.bin"


def swap_names(folder, *_):
    (folder / ONE).rename(folder / "other")
    (folder / TWO).rename(folder / ONE)
    (folder / "other").rename(folder / TWO)


def link_one_twice(folder, store, link):
    (folder / TWO).unlink()
    link(store / ONE, folder / TWO)


def replace_by_one_of_that_size_and_time(folder, store, link):
    path = folder / ONE
    other = folder / "other"
    other.write_bytes(bytes(path.stat().st_size))
    os.utime(other, ns=(10**18, 10**18))
    other.replace(path)


def alter_and_set_the_time_back(folder, store, link):
    # The clock of a file system may have moved on by some milliseconds only.
    time.sleep(0.05)
    with (folder / ONE).open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    os.utime(folder / ONE, ns=(10**18, 10**18))


LINKS = {
    "symbolic links": lambda target, path: path.symlink_to(target),
    "hard links": lambda target, path: path.hardlink_to(target),
    "files": shutil.copy2,
}


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (swap_names, ONE),
        (link_one_twice, TWO),
        (replace_by_one_of_that_size_and_time, ONE),
        (alter_and_set_the_time_back, ONE),
    ],
)
def test_what_was_verified_is_not_taken_for_another(small_batches, tmp_path, kind, change, wrong):
    folder, link = tmp_path / "cifar-10-batches-bin", LINKS[kind]
    folder.mkdir()
    for path in small_batches.iterdir():
        link(path, folder / path.name)
    with mock.patch.object(formats, "_check_md5", wraps=formats._check_md5) as check:
        load_cifar10(folder)
        dataset = load_cifar10(folder)
        assert check.call_count == 6
        # By its number a file is known wherever it is.
        other = folder.rename(tmp_path / "moved")
        load_cifar10(other)
        assert check.call_count == 6
    assert dataset.train.images[::10, 0, 0, 0].tolist() == [0, 1, 2, 3]
    other.rename(folder)
    sizes = {path: path.stat() for path in folder.iterdir()}
    change(folder, small_batches, link)
    # What a look at sizes and times of change would go by is as it was.
    for path, before in sizes.items():
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, 10**18)
    for _ in range(2):  # nothing of it is remembered
        with pytest.raises(DataError, match=f"{wrong} is damaged, cut short or altered"):
            load_cifar10(folder)


@real_data
def test_links_to_real_batches_swapped(cifar10_dir, tmp_path):
    folder = copy_batches(cifar10_dir, tmp_path)
    load_cifar10(folder)
    (folder / "data_batch_1").rename(folder / "other")
    (folder / "data_batch_2").rename(folder / "data_batch_1")
    (folder / "other").rename(folder / "data_batch_2")
    with pytest.raises(DataError, match="data_batch_1 is damaged, cut short or altered"):
        load_cifar10(folder)


def test_links_swapped_while_they_are_read(small_batches, tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for path in small_batches.iterdir():
        (folder / path.name).symlink_to(path)
    read = formats.read

    def swapping():
        todo = [swap_names]

        def swap_and_read(found, **options):
            while todo:
                todo.pop()(folder)
            return read(found, **options)

        return mock.patch.object(formats, "read", swap_and_read)

    load_cifar10(folder)
    with swapping(), pytest.raises(DataError, match=f"{ONE} is damaged"):
        load_cifar10(folder)
    # Seen wrong before and right while it was read: what was seen is not what was verified.
    with swapping():
        load_cifar10(folder, cache_dir=tmp_path / "another")
    swap_names(folder)
    with pytest.raises(DataError, match=f"{ONE} is damaged"):
        load_cifar10(folder, cache_dir=tmp_path / "another")


def test_shards_are_known_by_their_names(tmp_path):
    names = [f"cifar10-{split}.tfrecord-00000-of-00001" for split in ("train", "test")]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    expected = formats.expected_of(formats.locate(tmp_path))
    assert list(expected) == [tmp_path / name for name in names]
    assert len(set(expected.values())) == 2


def test_what_an_older_version_remembered_is_checked_again(small_batches, tmp_path):
    files = {
        str(path): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in small_batches.iterdir()
    }
    (tmp_path / "cache").mkdir()
    text = json.dumps({"version": 1, "files": files})
    (tmp_path / "cache" / "verified.json").write_text(text)
    (small_batches / ONE).write_bytes(bytes(30730))
    os.utime(small_batches / ONE, ns=(10**18, 10**18))
    with pytest.raises(DataError, match=f"{ONE} is damaged"):
        load_cifar10(small_batches)


def test_cache_that_cannot_be_written_is_no_error(small_scale, tmp_path):
    put(tmp_path / "data" / "cifar10.npz")
    (tmp_path / "file").write_text("not a folder")
    dataset = load_cifar10(tmp_path / "data", cache_dir=tmp_path / "file" / "cache")
    assert len(dataset.test) == 20
    assert (tmp_path / "file").read_text() == "not a folder"


def test_remembered_list_stays_short(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_MOST_ENTRIES", 3)
    marks = [cache.Mark(1, index, 3, 4, 5, "x") for index in range(5)]
    for mark in marks:
        cache.remember_verified(tmp_path, [mark])
    assert not cache.is_verified(tmp_path, [marks[1]])
    assert cache.is_verified(tmp_path, [marks[4], marks[2]])
    for field in cache.Mark._fields:
        other = marks[4]._replace(**{field: "y" if field == "expected" else 9})
        assert not cache.is_verified(tmp_path, [marks[2], other])
    assert not cache.is_verified(tmp_path, [])
    # Of a file only the newest is kept.
    cache.remember_verified(tmp_path, [marks[4]._replace(size=9)])
    assert not cache.is_verified(tmp_path, [marks[4]])
    assert cache.is_verified(tmp_path, [marks[3]])


@pytest.mark.parametrize("content", ["", "null", "{}", '{"version": 2, "files": 3}', "[" * 99999])
def test_damaged_memory_is_ignored(tmp_path, content):
    (tmp_path / "verified.json").write_text(content)
    mark = cache.Mark(1, 2, 3, 4, 5, "x")
    assert not cache.is_verified(tmp_path, [mark])
    cache.remember_verified(tmp_path, [mark])
    assert cache.is_verified(tmp_path, [mark])


@real_data
def test_archive_leaves_a_decoded_copy(cifar10_dir, tmp_path):
    path = tmp_path / "keras" / "datasets" / "cifar-10-batches-py-target_archive"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        tar.add(cifar10_dir / "cifar-10-batches-py", "cifar-10-batches-py")
    copy = tmp_path / "cache" / "cifar10.npz"
    with mock.patch.object(formats, "_read_archive", wraps=formats._read_archive) as decode:
        first = load_cifar10(path)
        assert decode.call_count == 1
        assert copy.is_file()
        second = load_cifar10(path)  # from the copy
        assert decode.call_count == 1
        assert second.source == str(path)
        assert np.array_equal(first.train.images, second.train.images)
        load_cifar10()  # the copy is in the project's cache, which is searched first
        assert decode.call_count == 1
        copy.write_bytes(b"PK damaged")
        load_cifar10(path)  # made anew
        assert decode.call_count == 2
        assert copy.stat().st_size > 180e6


def test_damaged_copy_is_an_error_by_itself(small_scale, tmp_path):
    path = put(tmp_path / "cache" / "cifar10.npz", mark=1)
    with pytest.raises(DataError, match="the sha256 of its decoded arrays is"):
        load_cifar10()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be read"):
        load_cifar10()


# --- damaged and missing ------------------------------------------------------------------


@real_data
def test_altered_and_truncated_batch(cifar10_dir, tmp_path):
    folder = copy_batches(cifar10_dir, tmp_path, "data_batch_3", "batches.meta")
    path = folder / "data_batch_3"
    whole = path.read_bytes()
    expected = layouts.CIFAR10.python["data_batch_3"]

    altered = bytearray(whole)
    altered[15_000_000] ^= 1
    for content in (bytes(altered), whole[:20_000_000]):
        path.write_bytes(content)
        found = hashlib.md5(content).hexdigest()
        with pytest.raises(DataError) as caught:
            load_cifar10(folder)
        message = str(caught.value)
        assert f"{path} is damaged" in message
        assert f"its md5 is {found}, expected {expected}" in message
        assert "\n" not in message
    with pytest.raises(DataError, match="data_batch_3 cannot be read"):
        load_cifar10(folder, verify=False)
    path.unlink()
    with pytest.raises(DataError, match="lacks data_batch_3"):
        load_cifar10(folder)
    assert not (tmp_path / "cache").exists()  # nothing of this was remembered

    path.write_bytes(whole)
    (folder / "batches.meta").write_bytes(b"altered")
    with pytest.raises(DataError, match=r"batches\.meta is damaged"):
        load_cifar10(folder)
    (folder / "batches.meta").unlink()  # nothing in it is needed
    load_cifar10(folder)


def test_named_source_without_data(tmp_path, monkeypatch):
    with pytest.raises(DataNotFoundError, match=r"data_dir='.*nowhere' holds no CIFAR-10; it sh"):
        load_cifar10(str(tmp_path / "nowhere"))
    put(tmp_path / "cache" / "cifar10.npz")  # would be found, if one went on searching
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("CIFARFLOW_DATA", str(tmp_path / "empty"))
    with pytest.raises(DataNotFoundError, match=r"CIFARFLOW_DATA='.*empty' holds no CIFAR-10"):
        load_cifar10()


def test_nothing_found_says_what_to_do(tmp_path):
    with pytest.raises(DataNotFoundError) as caught:
        load_cifar10(download=False)
    message = str(caught.value)
    for part in (
        "--data_dir=PATH or CIFARFLOW_DATA=PATH",
        "put cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
        f"into {tmp_path}",
        "run again where there is a network",
        "no download was allowed",
        "--data=standin",
    ):
        assert part in message
    assert "\n" not in message
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction must be .* < 1, not 1.0"),
        ({"validation_fraction": float("nan")}, "validation_fraction must be .*, not nan"),
        ({"validation_split": "first"}, "one of last, stratified, not 'first'"),
        ({"seed": -1}, "seed must be a whole number >= 0, not -1"),
        ({"download_timeout_seconds": 0}, "download_timeout_seconds must be .* > 0, not 0"),
        ({"data_dir": 3}, "data_dir must be the path of a file or folder, not 3"),
        ({"data_dir": ""}, "data_dir must be the path of a file or folder, not ''"),
        ({"cache_dir": 3}, "cache_dir must be the path of a file or folder, not 3"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ConfigError, match=match):
        load_cifar10(**options)


# --- the download -------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path):
    """A web server on the loopback device: (its folder, its address)."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    folder = tmp_path / "web"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def remote_of(path, url):
    content = path.read_bytes()
    return download.Remote(f"{url}/{path.name}", len(content), hashlib.sha256(content).hexdigest())


def test_what_is_downloaded_is_what_tfds_would_download():
    import tensorflow_datasets as tfds

    infos = tfds.download.checksums.get_all_url_infos()
    for layout in layouts.LAYOUTS.values():
        info = infos[layout.remote.url]
        assert (info.size, info.checksum) == layout.remote[1:]


def test_no_network_fails_soon(monkeypatch):
    with socket.socket() as closed:  # bound but not listening: refuses at once
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x.tar.gz"
        change_layout(monkeypatch, remote=download.Remote(url, 1, ""))
        start = time.monotonic()
        with pytest.raises(DataNotFoundError, match=r"the download failed: http.* cannot be reach"):
            load_cifar10()
        assert time.monotonic() - start < 5


def test_silent_host_fails_within_the_timeout(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.tar.gz"
        change_layout(monkeypatch, remote=download.Remote(url, 1, ""))
        start = time.monotonic()
        with pytest.raises(
            DataNotFoundError, match=r"the download failed: .*(within 0\.5|timed out)"
        ):
            load_cifar10(download_timeout_seconds=0.5)
        assert time.monotonic() - start < 5


def test_download_works_and_is_checked(web, tmp_path, capsys):
    folder, url = web
    (folder / "x.tar.gz").write_bytes(os.urandom(50_000))
    remote = remote_of(folder / "x.tar.gz", url)
    target = tmp_path / "made" / "archive.tar.gz"
    download.download_archive(target, remote=remote, title="CIFAR-10")
    assert target.read_bytes() == (folder / "x.tar.gz").read_bytes()
    assert os.listdir(target.parent) == ["archive.tar.gz"]
    assert "downloading CIFAR-10" in capsys.readouterr().err

    with pytest.raises(download.DownloadError, match="could not download"):
        download.download_archive(
            tmp_path / "b" / "x", remote=remote._replace(sha256="0" * 64), title="x"
        )
    with pytest.raises(download.DownloadError, match="404"):
        download.download_archive(
            tmp_path / "b" / "x", remote=remote._replace(url=f"{url}/y"), title="x"
        )
    with pytest.raises(download.DownloadError, match="cannot be written"):
        download.download_archive(target / "x", remote=remote, title="x")
    assert not os.listdir(tmp_path / "b")


def test_stalled_download_is_ended(web, tmp_path):
    folder, url = web
    (folder / "x.tar.gz").write_bytes(b"x")
    remote = remote_of(folder / "x.tar.gz", url)
    start = time.monotonic()
    with (
        mock.patch.object(download, "_CHILD", "import time; time.sleep(60)"),
        pytest.raises(download.DownloadError, match=r"stood still for 0\.5 s at 0 bytes"),
    ):
        download.download_archive(tmp_path / "b" / "x", remote=remote, title="x", stall_seconds=0.5)
    assert time.monotonic() - start < 20
    assert not os.listdir(tmp_path / "b")


@real_data
def test_load_through_a_download(web, cifar10_dir, tmp_path, monkeypatch):
    folder, url = web
    path = folder / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        tar.add(cifar10_dir / "cifar-10-batches-py", "cifar-10-batches-py")
    change_layout(monkeypatch, remote=remote_of(path, url))
    dataset = load_cifar10()
    assert len(dataset.train) == 40000
    assert dataset.source == str(tmp_path / "cache" / "cifar-10-binary.tar.gz")
    monkeypatch.setattr(download, "download_archive", None)  # not called again
    again = load_cifar10(download=True)
    assert np.array_equal(again.train.images, dataset.train.images)
