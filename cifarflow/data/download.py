"""The download of CIFAR-10 through TensorFlow Datasets, with an end in every case.

    archive = download_archive(folder, timeout_seconds=10.0)  # DownloadError if it cannot be had

First the host is asked whether it answers at all, so that a machine without a network knows
within `timeout_seconds`.  Then TFDS's download manager fetches the archive and checks its
sha256, in a child process: TFDS has no time-out of its own, and a child whose file has stopped
growing can be ended.
"""

from __future__ import annotations

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


# What TFDS's own `cifar10` downloads, with TFDS's checksum.
ARCHIVE = Remote(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)


class DownloadError(Exception):
    """The archive could not be downloaded; the message says why."""


def download_archive(
    path: Path,
    *,
    timeout_seconds: float = 10.0,
    stall_seconds: float = _STALL_SECONDS,
    remote: Remote = ARCHIVE,
) -> None:
    """Downloads the archive to `path`; nothing is left behind if that fails.

    Args:
      path: the file to make.
      timeout_seconds: how long the host may take to answer at all.
      stall_seconds: how long the download may stand still.
      remote: what to download.

    Raises:
      DownloadError: if there is no network, the host refuses, the download stands still, the
        checksum is wrong, or the disk is full or not writable.
    """
    _probe(remote.url, timeout_seconds)
    print(
        f"cifarflow: downloading CIFAR-10 ({remote.size / 1e6:.0f} MB) from {remote.url}",
        file=sys.stderr,
        flush=True,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download.", dir=path.parent) as folder:
            os.replace(_run_child(remote, Path(folder), stall_seconds), path)
    except OSError as error:
        raise DownloadError(f"{path} cannot be written: {error.strerror or error}") from error


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
    log = folder / "log.txt"
    with log.open("wb") as log_file:
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, remote.url, str(remote.size), remote.sha256, folder],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
        )
        try:
            _watch(child, folder, remote.size, stall_seconds)
            output, _ = child.communicate()
        finally:
            child.kill()  # nothing if it has ended; Ctrl-C must not leave it behind
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
    lines = output.split()
    if child.returncode == 0 and lines and Path(lines[-1]).is_file():
        return Path(lines[-1])
    said = log.read_text(errors="replace").strip().splitlines()
    word = one_line(said[-1]) if said else "no word"
    raise DownloadError(f"TFDS could not download {remote.url}: {word}")


def _watch(
    child: subprocess.Popen[str], folder: Path, expected_size: int, stall_seconds: float
) -> None:
    """Waits for the child, and gives up when no file has grown for `stall_seconds`."""
    size, grown_at, shown = -1, time.monotonic(), -1
    while child.poll() is None:
        now = _folder_size(folder)
        # TFDS looks at the sum when all is there; a host that sends on and on fills the disk.
        if now > 2 * expected_size:
            raise DownloadError(f"the host sends more than the {expected_size} bytes it should")
        if now != size:
            size, grown_at = now, time.monotonic()
        elif time.monotonic() - grown_at > stall_seconds:
            raise DownloadError(f"the download stood still for {stall_seconds:g} s at {size} bytes")
        percent = min(100, 100 * size // expected_size)
        if sys.stderr.isatty() and percent != shown:
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
