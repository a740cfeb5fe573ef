"""Downloads through TensorFlow Datasets, with an end in every case.

    download_archive(path, remote=CIFAR10.remote, title="CIFAR-10")  # DownloadError if it cannot be

First the host is asked whether it answers at all, so that a machine without a network knows
within `timeout_seconds`.  Then TFDS's download manager fetches the archive and checks its
sha256, in a child process: TFDS has no time-out of its own, and a child whose file has stopped
growing can be ended.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cifarflow.untrusted import one_line

# A child that imports TFDS on a slow machine writes nothing for this long.
_STALL_SECONDS = 30.0
_POLL_SECONDS = 0.25

# Run by the child. It only fetches: TFDS would next spend a minute on writing each image as a PNG,
# where `formats` decodes the archive in two seconds. It imports nothing of this package, which
# the child need not be able to find.
_CHILD = """
import sys
import tensorflow_datasets as tfds
url, size, sha256, folder = sys.argv[1:]
info = tfds.download.checksums.UrlInfo(size=int(size), checksum=sha256, filename="archive.tar.gz")
manager = tfds.download.DownloadManager(
    download_dir=folder, url_infos={url: info}, force_checksums_validation=True
)
print(manager.download(url))
"""


# Run by another child: first to say what will be fetched, then to prepare it.
_PREPARING_CHILD = """
import json
import sys
import tensorflow_datasets as tfds
act, name, folder = sys.argv[1:]
try:
    builder = tfds.builder(name, data_dir=folder)
except Exception as error:
    lines = str(error).strip().splitlines() or [""]
    sys.exit(f"{type(error).__name__}: {lines[0]}")
if act == "say":
    infos = builder.url_infos or {}
    print(json.dumps([[url, int(info.size or 0)] for url, info in infos.items()]))
else:
    tfds.disable_progress_bar()
    builder.download_and_prepare()
"""
# Not to fill the disk by the name of a set.
_PREPARED_BYTES_LIMIT = 20_000_000_000


class Remote(NamedTuple):
    """A file to download.

    Attributes:
      url: where it is.
      size: its bytes.
      sha256: its checksum.
    """

    url: str
    size: int
    sha256: str


class DownloadError(Exception):
    """The archive could not be downloaded; the message says why."""


def download_archive(
    path: Path,
    *,
    remote: Remote,
    title: str,
    timeout_seconds: float = 10.0,
    stall_seconds: float = _STALL_SECONDS,
) -> None:
    """Downloads the archive to `path`; nothing is left behind if that fails.

    Args:
      path: the file to make.
      remote: what to download.
      title: what to call it while it comes.
      timeout_seconds: how long the host may take to answer at all.
      stall_seconds: how long the download may stand still.

    Raises:
      DownloadError: if there is no network, the host refuses, the download stands still, the
        checksum is wrong, or the disk is full or not writable.
    """
    _probe(remote.url, timeout_seconds)
    print(
        f"cifarflow: downloading {title} ({remote.size / 1e6:.0f} MB) from {remote.url}",
        file=sys.stderr,
        flush=True,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download.", dir=path.parent) as folder:
            os.replace(_run_child(remote, Path(folder), stall_seconds), path)
    except OSError as error:
        raise DownloadError(f"{path} cannot be written: {error.strerror or error}") from error


def prepare(
    name: str,
    folder: Path,
    *,
    timeout_seconds: float = 10.0,
    stall_seconds: float = _STALL_SECONDS,
) -> None:
    """Has TFDS download and prepare a set of its own, in a child process.

    Args:
      name: what TFDS calls it.
      folder: TFDS's folder; made if need be.
      timeout_seconds: how long the host may take to answer at all.
      stall_seconds: how long it may stand still.

    Raises:
      DownloadError: if TFDS knows no such set, there is no network, or preparing fails or stands
        still.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside what is there, whose files say nothing of how far this has come.
        with tempfile.TemporaryDirectory(prefix=".download.", dir=folder) as scratch:
            words = (name, scratch)
            said = _run((_PREPARING_CHILD, "say", *words), Path(scratch), name, 0, stall_seconds)
            urls = json.loads(said.splitlines()[-1])
            if urls:
                _probe(urls[0][0], timeout_seconds)
            size = sum(size for _, size in urls)
            print(f"cifarflow: TFDS prepares {name} ({size / 1e6:.0f} MB)", file=sys.stderr)
            # What was fetched is unpacked and shuffled before more is written.
            _run((_PREPARING_CHILD, "do", *words), Path(scratch), name, 0, 10 * stall_seconds)
            for info in list(Path(scratch, name).rglob("dataset_info.json")):
                target = folder / info.parent.relative_to(scratch)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(info.parent, target)
    except OSError as error:
        raise DownloadError(f"{folder} cannot be written: {error.strerror or error}") from error
    except (ValueError, IndexError, TypeError) as error:
        raise DownloadError(f"TFDS did not say what {name} needs") from error


def _probe(url: str, timeout_seconds: float) -> None:
    """Asks for the head of `url`, honouring the usual proxy variables."""
    outcome: list[str] = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=timeout_seconds).close()
            outcome.append("")
        except Exception as error:  # whatever it is, it is the reason to give
            reason = getattr(error, "reason", error)
            # Some Pythons ship no root certificates; TFDS brings its own, so the host is there.
            certificate = isinstance(reason, ssl.SSLCertVerificationError)
            outcome.append("" if certificate else f"{type(error).__name__}: {error}")

    # In a thread because looking up a name has no time-out of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if not outcome:
        raise DownloadError(f"{url} did not answer within {timeout_seconds:g} s")
    if outcome[0]:
        raise DownloadError(f"{url} cannot be reached ({outcome[0]})")


def _run_child(remote: Remote, folder: Path, stall_seconds: float) -> Path:
    """Runs TFDS's download manager in a child process and returns the file it made."""
    words = (_CHILD, remote.url, str(remote.size), remote.sha256, str(folder))
    lines = _run(words, folder, remote.url, remote.size, stall_seconds).split()
    if lines and Path(lines[-1]).is_file():
        return Path(lines[-1])
    raise DownloadError(f"TFDS could not download {remote.url}: no word")


def _run(words: tuple[str, ...], folder: Path, what: str, size: int, stall_seconds: float) -> str:
    """Runs a program in a child process that writes into `folder`, and returns what it prints."""
    log = folder / "log.txt"
    with log.open("wb") as log_file:
        child = subprocess.Popen(
            [sys.executable, "-c", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
        )
        try:
            _watch(child, folder, size, stall_seconds)
            output, _ = child.communicate()
        finally:
            child.kill()  # nothing if it has ended; Ctrl-C must not leave it behind
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
    if child.returncode == 0:
        return output
    said = log.read_text(errors="replace").strip().splitlines()
    word = one_line(said[-1]) if said else "no word"
    raise DownloadError(f"TFDS could not download {what}: {word}")


def _watch(
    child: subprocess.Popen[str], folder: Path, expected_size: int, stall_seconds: float
) -> None:
    """Waits for the child, and gives up when no file has grown for `stall_seconds`.

    An expected size of 0 is one that is not known.
    """
    most = 2 * expected_size or _PREPARED_BYTES_LIMIT
    size, grown_at, shown = -1, time.monotonic(), -1
    while child.poll() is None:
        now = _folder_size(folder)
        # TFDS looks at the sum when all is there; a host that sends on and on fills the disk.
        if now > most:
            raise DownloadError(f"the host sends more than {most} bytes")
        if now != size:
            size, grown_at = now, time.monotonic()
        elif time.monotonic() - grown_at > stall_seconds:
            raise DownloadError(f"the download stood still for {stall_seconds:g} s at {size} bytes")
        percent = min(100, 200 * size // most)
        if expected_size and sys.stderr.isatty() and percent != shown:
            shown = percent
            print(f"\rcifarflow: {percent} %", end="", file=sys.stderr, flush=True)
        time.sleep(_POLL_SECONDS)
    if shown >= 0:
        print(file=sys.stderr)


def _folder_size(folder: Path) -> int:
    total = 0
    for root, _folders, files in os.walk(folder):
        for name in files:
            if name != "log.txt":  # retries that only complain are no progress
                with suppress(OSError):  # renamed meanwhile
                    total += os.path.getsize(os.path.join(root, name))
    return total
