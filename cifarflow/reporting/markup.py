"""HTML that cannot be broken by what it shows.

    row = tag("tr", tag("th", name, scope="row"), tag("td", "<b>", class_="mark"))
    path.write_text(document("lab_cnn", row))

`tag` escapes whatever is no markup already, so that a text is markup only if this module made it.
`document` is a whole page in one file: it loads nothing, runs nothing, and its policy tells the
browser to refuse both.
"""

from __future__ import annotations

import base64
import hashlib
import html
import struct
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from cifarflow.reporting.style import STYLE

# By which a page is known as one of ours, in its first bytes.
MARK = b"<!doctype html>\n<!-- a report by cifarflow -->\n"
_VOID = {"meta", "img"}
# A file's string may be endless.
_MOST_SIGNS = 1_000
# A cell of more words must not become a column of single ones.
_SENTENCE = 60


class Markup(str):
    """Text that is HTML, and is not escaped again."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Escapes a value for use between tags or in an attribute; markup stays as it is.

    Signs that would not be seen, or change how others are, such as those that turn the direction
    of writing, are written as Python writes them.
    """
    if isinstance(value, Markup):
        return value
    signs = str(value)
    if len(signs) > _MOST_SIGNS:
        signs = f"{signs[:_MOST_SIGNS]} ..."
    shown = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in signs)
    return Markup(html.escape(shown))


def join(parts: Iterable[object]) -> Markup:
    """Puts parts one after another."""
    return Markup("".join(map(text, parts)))


def tag(name: str, /, *content: object, **attributes: object) -> Markup:
    """Makes an element.

    Args:
      name: of the element, HTML's or SVG's.
      *content: what is in it: markup, or anything that is shown as text; None is nothing.
      **attributes: `class_` is written class, `text_anchor` text-anchor.  None leaves it out.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{pairs}>")
    inner = join(part for part in content if part is not None)
    return Markup(f"<{name}{pairs}>{inner}</{name}>")


def table(
    caption: object,
    columns: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    words: Iterable[int] = (),
    marked: Iterable[tuple[int, int]] = (),
) -> Markup:
    """Makes a table that scrolls by itself where the page is too narrow.

    Args:
      caption: what it shows.
      columns: the heads, the first of which is that of the heads of the rows.
      rows: each a head and its cells, which are numbers, set to the right.
      words: the columns that are words; column 0, the heads, always is.
      marked: cells that stand out, as (row, column), both from 0.
    """
    left, stand_out = {0, *words}, set(marked)

    def kind(row: int, column: int, cell: object = "") -> str | None:
        holds = {
            "number": column not in left,
            "mark": (row, column) in stand_out,
            "sentence": isinstance(cell, str) and len(cell) > _SENTENCE and column in left,
        }
        return " ".join(name for name in holds if holds[name]) or None

    heads = [tag("th", head, scope="col", class_=kind(-1, i)) for i, head in enumerate(columns)]
    lines = [
        tag(
            "tr",
            tag("th", head, scope="row", class_=kind(place, 0)),
            *(tag("td", cell, class_=kind(place, i, cell)) for i, cell in enumerate(cells, 1)),
        )
        for place, (head, *cells) in enumerate(rows)
    ]
    body = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *heads)),
        tag("tbody", *lines),
    )
    return scrolling(body, label=caption)


def scrolling(content: Markup, *, label: object) -> Markup:
    """Something wide that scrolls by itself, by keyboard too."""
    return tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=label)


def picture(image: np.ndarray, *, alt: object, class_: str) -> Markup:
    """Makes an image that is within the page.

    Args:
      image: [H, W, C] uint8; C 1 (grey), 3 (RGB) or 4 (RGB and opacity).
      alt: what it shows, for who does not see it.
      class_: its style.
    """
    source = f"data:image/png;base64,{base64.b64encode(_png(image)).decode()}"
    height, width, _ = image.shape
    # Ours from the first sign to the last, and longer than a text may be.
    return tag("img", src=Markup(source), alt=alt, width=width, height=height, class_=class_)


def _png(image: np.ndarray) -> bytes:
    """Packs an image, without the libraries that take seconds to load.

    Source: PNG Specification, third edition (W3C, 2025), sections 5 and 11.
    """
    height, width, channels = image.shape
    kind = {1: 0, 3: 2, 4: 6}[channels]
    # Each row begins with its filter: none.
    rows = np.pad(image.reshape(height, -1), ((0, 0), (1, 0)))
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0),
        b"IDAT": zlib.compress(rows.tobytes(), 9),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


def document(title: object, *content: object) -> bytes:
    """Makes the file of a page.

    Args:
      title: in the browser's bar.
      *content: of its body.
    """
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        # The quotes within it are the policy's own.
        tag("meta", http_equiv="Content-Security-Policy", content=Markup(policy)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("meta", name="generator", content="cifarflow"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    page = tag("html", "", head, tag("body", *content), lang="en")
    return MARK + page.encode() + b"\n"
