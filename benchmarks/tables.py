"""Tables and numbers as all benchmarks print them.

print(format_table(["way", "ms"], [["ours", format_number(2.5)], ["theirs", "1,030"]]))
"""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that reads well as text too; columns of numbers are aligned right."""
    columns = list(zip(header, *rows, strict=True))
    # A rule of Markdown needs a dash beside its colon.
    widths = [max(2, *map(len, column)) for column in columns]
    right = [_are_numbers(column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(cells, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width - 1) + (":" if is_right else "-")
        for width, is_right in zip(widths, right, strict=True)
    ]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def _are_numbers(cells: Sequence[str]) -> bool:
    filled = [cell for cell in cells if cell.strip("-")]
    return bool(filled) and all(cell.lstrip("+-.")[:1].isdigit() for cell in filled)


def format_number(value: float) -> str:
    """Three digits, or all of those before the point: 0.0123, 28.1, 1,030."""
    # What rounds to 1000 would get an exponent.
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def format_megabytes(size: float) -> str:
    """Bytes as whole MB of 10**6 bytes: 1,024."""
    return f"{size / 1e6:,.0f}"
