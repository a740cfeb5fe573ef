"""Places for a run's folder whose disk can be filled and which can be made read-only, and back.

    mounts = own_mounts()
    with make_place(folder, size=10_000_000, mounts=mounts) as place:
        ...  # a run in place.workdir
        place.fill(pid)       # to be called until it shows: what is written meanwhile makes room
        place.free(pid)
        place.lock()
        place.unlock()

Where mounting is allowed (Linux, root) it is a small file system in memory of its own, which is
really full and really read-only.  Elsewhere a limit on the size of the process's files stands for a
full disk, and permissions for a read-only one; these do not hold for root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import subprocess
import sys
import time

_NEW_MOUNT_NAMESPACE = 0x00020000
# Left free, so that what is small can still be written: the log, a summary.
_KEPT_BYTES = 32 * 1024
_LOCK_SECONDS = 10.0


class UnavailableError(Exception):
    """This place cannot do that here; the message says what it would need."""


def own_mounts() -> bool:
    """Gives this process mounts of its own, which end with it; returns whether it may mount.

    To be called in the main thread, before the children are started.
    """
    if not sys.platform.startswith("linux"):
        return False
    if ctypes.CDLL(None).unshare(_NEW_MOUNT_NAMESPACE) != 0:
        return False
    return _run("mount", "--make-rprivate", "/") == ""


def _run(*words: str) -> str:
    """Runs a command; returns "" or what it complained of."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or "it failed"


class Mounted:
    """A file system in memory.

    Args:
      folder: where to mount it; made if need be.
      size: in bytes.

    Attributes:
      workdir: for the run.
      full: how the disk is full, in words.
      locked: how it is read-only, in words.
    """

    def __init__(self, folder: pathlib.Path, *, size: int) -> None:
        self._folder, self._size = folder, size
        self.workdir = folder / "run"
        self._filler = folder / "filler"
        self.full = f"a tmpfs of {size / 1e6:.1f} MB"
        self.locked = "a tmpfs mounted read-only"

    def __enter__(self) -> Mounted:
        """Mounts it.

        Raises:
          UnavailableError: if that is not allowed.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        options = f"size={self._size}"
        trouble = _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self._folder))
        if trouble:
            raise UnavailableError(f"cannot mount: {trouble}")
        return self

    def __exit__(self, *_: object) -> None:
        """Takes it away, with all that is in it."""
        _run("umount", "--lazy", str(self._folder))

    def fill(self, pid: int, *, to_the_last: bool = False) -> None:
        """Fills what is free at this moment.

        Args:
          pid: of the run.
          to_the_last: whether nothing is left for small files.
        """
        keep = 0 if to_the_last else _KEPT_BYTES
        state = os.statvfs(self._folder)
        room = state.f_bavail * state.f_frsize - keep
        if room <= 0:
            return
        with self._filler.open("ab") as file:
            size = file.tell()
            # The run writes too: what was free a moment ago may be gone.
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), size, room)

    def free(self, pid: int) -> None:
        """Makes room again."""
        self._filler.unlink(missing_ok=True)

    def lock(self) -> None:
        """Makes it read-only.

        Raises:
          UnavailableError: if that is not possible.
        """
        over = time.monotonic() + _LOCK_SECONDS
        # Not while a file is open for writing.
        while trouble := _run("mount", "-o", "remount,ro", str(self._folder)):
            if time.monotonic() > over:
                raise UnavailableError(f"cannot be made read-only: {trouble}")

    def unlock(self) -> None:
        """Makes it writable again.

        Raises:
          UnavailableError: if that is not possible.
        """
        trouble = _run("mount", "-o", "remount,rw", str(self._folder))
        if trouble:
            raise UnavailableError(f"cannot be made writable again: {trouble}")


class Limited:
    """A folder, with limits on whoever writes into it; arguments and attributes as `Mounted`.

    Args:
      size: room for several checkpoints; no file may be larger than a fraction of that when full.
    """

    def __init__(self, folder: pathlib.Path, *, size: int) -> None:
        self._folder, self._limit = folder, max(size // 64, _KEPT_BYTES)
        self.workdir = folder / "run"
        self.full = f"RLIMIT_FSIZE of {self._limit / 1e6:.2f} MB"
        self.locked = "permissions"

    def __enter__(self) -> Limited:
        """Makes the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the permissions back, so that it can be removed."""
        self.unlock()

    def fill(self, pid: int, *, to_the_last: bool = False) -> None:
        """Limits the process's files.

        Raises:
          UnavailableError: if the system cannot do that, or nothing is to be left at all.
        """
        if to_the_last:
            raise UnavailableError("needs a file system of its own: root on Linux")
        self._limit_files(pid, self._limit)

    def free(self, pid: int) -> None:
        """Lets it write again."""
        self._limit_files(pid, None)

    def _limit_files(self, pid: int, limit: int | None) -> None:
        import resource

        set_limit = getattr(resource, "prlimit", None)
        if set_limit is None:
            raise UnavailableError("needs prlimit: Linux")
        # The process may be over.
        with contextlib.suppress(ProcessLookupError):
            _, hard = set_limit(pid, resource.RLIMIT_FSIZE)
            set_limit(pid, resource.RLIMIT_FSIZE, (hard if limit is None else limit, hard))

    def lock(self) -> None:
        """Takes the permission to write.

        Raises:
          UnavailableError: if this process is root's, for whom permissions do not hold.
        """
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            raise UnavailableError("needs mounts, or a user other than root")
        self._set_modes(folders=0o555, files=0o444)

    def unlock(self) -> None:
        """Gives it back."""
        self._set_modes(folders=0o755, files=0o644)

    def _set_modes(self, *, folders: int, files: int) -> None:
        # From above, where it is given back: what is in a closed folder cannot be listed.
        for path in [self._folder, *sorted(self._folder.rglob("*"))]:
            # The run writes too: a file may be gone.
            with contextlib.suppress(FileNotFoundError):
                path.chmod(folders if path.is_dir() else files)


Place = Mounted | Limited


def make_place(folder: pathlib.Path, *, size: int, mounts: bool) -> Place:
    """A place for a run's folder.

    Args:
      folder: where.
      size: in bytes: room for several checkpoints.
      mounts: whether this process may mount, see `own_mounts`.
    """
    return Mounted(folder, size=size) if mounts else Limited(folder, size=size)
