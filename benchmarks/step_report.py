"""What `step_time.py` says of its figures: ratios, the text for a reader, the picture.

    print(describe(result))
    draw(results, pathlib.Path("step_time.png"), about="cifar10, two cores")

A result is what `step_time.measure` returns.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import harness


def label(way: str, precision: str) -> str:
    """A way and its precision as one name."""
    return f"{way} {_short(precision)}"


def _short(precision: str) -> str:
    return precision.removeprefix("mixed_")


def ratios(
    rows: Sequence[dict[str, Any]], peers: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, Any]]:
    """How many times as fast as each peer, and the best mode of each peer, our steps are.

    Args:
      rows: one for each way, as `step_time.measure` makes them.
      peers: the ways that each peer has.

    Yields:
      `ours`, `against` (labels) and `ratio`: the time of theirs over the time of ours, round by
      round.  The best of a peer, which `is` names, is of our precision ("best of torch in
      float32"), of any ("best of torch in any precision"), or of ours where it has no other ("best
      of torch").
    """
    ours = [row for row in rows if row["way"] == "cifarflow"]
    for row in ours:
        mine = _samples(row)
        for peer, modes in peers.items():
            theirs = [other for other in rows if other["way"] in modes]
            for other in theirs:
                yield _ratio(row["label"], other["label"], _samples(other).over(mine))
            for what, some in _groups(theirs, row["precision"]).items():
                best = min(some, key=lambda other: _samples(other).median)
                ratio = _samples(best).over(mine)
                yield {**_ratio(row["label"], f"best of {peer}{what}", ratio), "is": best["label"]}


def _groups(theirs: Sequence[dict[str, Any]], precision: str) -> dict[str, list[dict[str, Any]]]:
    """The ways of a peer among which there is a best, by how to speak of them; none is empty."""
    same = [row for row in theirs if row["precision"] == precision]
    groups = {f" in {_short(precision)}": same, " in any precision": list(theirs)}
    if len(same) == len(theirs):
        groups = {"": same}
    return {what: rows for what, rows in groups.items() if rows}


def start_ratios(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """How many times as fast as Keras's plain `fit` ours come to the end of their first step.

    Args:
      rows: as `ratios` has them.

    Yields:
      `ours`, `against` (labels) and `ratio`: the time of theirs over the time of ours, start by
      start.
    """
    for ours in (row for row in rows if row["way"] == "cifarflow"):
        for fit in (row for row in rows if row["way"] == "keras_fit"):
            name = "seconds_to_first_step"
            ratio = _samples(fit, name).over(_samples(ours, name))
            yield _ratio(ours["label"], fit["label"], ratio)


def _ratio(ours: str, against: str, ratio: harness.Samples) -> dict[str, Any]:
    return {"ours": ours, "against": against, "ratio": ratio.to_json()}


def _samples(row: dict[str, Any], figure: str = "seconds_a_step") -> harness.Samples:
    return harness.Samples(tuple(row[figure]["values"]))


def describe(result: dict[str, Any]) -> str:
    """One net's figures for a reader: the table, the ratios to the best, what bounds our step."""
    found = {(r["ours"], r["against"]): r["ratio"]["median"] for r in result["ratios"]}
    ours = [row["label"] for row in result["ways"] if row["way"] == "cifarflow"]
    versus = ours if len(result["ways"]) > len(ours) else []
    header = ["way", "ms/step", "spread", "images/s", "GFLOP/s", "of GEMM peak", "first step"]
    rows = []
    for row in result["ways"]:
        cells = [
            row["label"],
            harness.format_number(1000 * row["seconds_a_step"]["median"]),
            f"{100 * row['seconds_a_step']['spread']:.1f} %",
            f"{row['images_per_second']['median']:,.0f}",
            f"{row['gflops']['median']:.1f}",
            f"{100 * row['share_of_gemm_peak']['median']:.1f} %",
            f"{row['seconds_to_first_step']['median']:.1f} s",
        ]
        for name in versus:
            ratio = found.get((name, row["label"]))
            cells.append("-" if ratio is None else f"{ratio:.2f}x")
        rows.append(cells)
    peaks = ", ".join(
        f"{found['high']:.0f} GFLOP/s in {_short(precision)}"
        for precision, found in result["gemm_gflops"].items()
    )
    lines = [
        f"## {result['model']}, batch {result['batch_size']}",
        "",
        f"{result['trainable_parameters']:,} trainable parameters, "
        f"{result['training_flops_per_image'] / 1e6:,.1f} MFLOP of training an image; GEMM peak "
        f"{peaks}.",
        "",
        harness.format_table([*header, *(f"{name} is" for name in versus)], rows),
        "",
    ]
    for ratio in result["ratios"]:
        if "is" in ratio:
            share = ratio["ratio"]
            lines.append(
                f"{ratio['ours']} is {share['median']:.2f}x as fast as the {ratio['against']} "
                f"({ratio['is']}; {share['low']:.2f} to {share['high']:.2f} in {share['n']} rounds)"
            )
    for ratio in result["start_ratios"]:
        share = ratio["ratio"]
        # One start says little.
        if share["n"] > 1:
            lines.append(
                f"{ratio['ours']} starts {share['median']:.2f}x as fast as {ratio['against']} "
                f"({share['low']:.2f} to {share['high']:.2f} in {share['n']} starts)"
            )
    for row in result["ways"]:
        if "profile" in row:
            split = row["profile"]
            step, *parts = (
                harness.format_number(split[f"{part}_ms"])
                for part in ("step", "input", "host", "device")
            )
            lines.append(
                f"{row['label']}: {step} ms a step = input {parts[0]} + host {parts[1]} + device "
                f"{parts[2]} ms. {split['verdict']}"
            )
    return "\n".join([*lines, ""])


def draw(results: Sequence[dict[str, Any]], path: pathlib.Path, *, about: str) -> None:
    """Draws images/s of all ways, a group for each net and batch size."""
    # Plotting is loaded here: whoever wants no picture does not wait for it.
    from bars import Bar, draw_bars

    groups = {}
    for result in results:
        rows = sorted(result["ways"], key=lambda row: row["seconds_a_step"]["median"])
        groups[f"{result['model']}, batch {result['batch_size']}"] = [
            Bar(
                row["label"],
                harness.Samples(tuple(row["images_per_second"]["values"])),
                f"{row['images_per_second']['median']:,.0f}  "
                f"({harness.format_number(1000 * row['seconds_a_step']['median'])} ms a step)",
                row["way"] == "cifarflow",
            )
            for row in rows
        ]
    draw_bars(groups, unit="images/s", title=f"Training speed, {about}", path=path)
