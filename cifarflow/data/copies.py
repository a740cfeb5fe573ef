"""Decoded copies in the project's cache, of sets whose decoding takes long.

    key = fingerprint_of(paths, "at 32 pixels")     # changes when any of the files does
    arrays = read_or_decode("flowers", key, make=decode_all, ...)

A copy stands for its files as long as each has the number, size and times that it had when they
were decoded, and the copy is as it was written.  Without room or right to write there is none, and
every load decodes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from cifarflow.data import cache, formats


def fingerprint_of(paths: Iterable[Path], *what: object) -> str:
    """Returns a word for files as they are, and for how they are read.

    Args:
      paths: the files, in the order that counts.
      *what: all else that decides what comes of them.

    Returns:
      64 hexadecimal digits.

    Raises:
      OSError: if a file is gone.
    """
    sha256 = hashlib.sha256(repr(what).encode())
    for path in paths:
        for mark in cache.fingerprint({path: ""}):
            sha256.update(repr((str(path), *mark)).encode("utf-8", "surrogateescape"))
    return sha256.hexdigest()


def read_or_decode(
    place: str,
    key: Callable[[], str],
    decode: Callable[[], formats.Arrays],
    *,
    folder: Path,
    shape: tuple[int, int, int],
    examples: tuple[int, int],
    num_classes: int,
) -> formats.Arrays:
    """Reads the copy of a set, or decodes the set and leaves one.

    Args:
      place: where the set lies and how it is read, in any words: there is one copy for each place,
        and that of changed files takes the place of the old.
      key: returns the fingerprint of the files.
      decode: makes the arrays.
      folder: the project's cache.
      shape: (H, W, C) of the images.
      examples: how many training and test images there are.
      num_classes: above every label.

    Raises:
      DataError: by `decode`.
    """
    name = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    path = folder / f"decoded-{name}.npz"
    before = key()
    with suppress(OSError):
        if cache.is_verified(folder, cache.fingerprint({path: before})):
            return formats.read_npz(
                path,
                train_examples=examples[0],
                test_examples=examples[1],
                image_shape=shape,
                num_classes=num_classes,
            )
    arrays = decode()
    with suppress(OSError):
        # What was changed meanwhile may not be what was decoded.
        if key() == before:
            formats.write_npz(path, arrays)
            cache.remember_verified(folder, cache.fingerprint({path: before}))
    return arrays
