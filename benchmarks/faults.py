"""What can happen to a run, tried on runs of its own: see `fault_table.py`, which prints it.

    scene = Scene(course, child_runs.run_whole(course, folder / "whole"), folder, data=None)
    for outcome in GROUPS["checkpoints"](scene):
        print(outcome.fault, outcome.happened, outcome.lost_steps, outcome.end, outcome.is_kept)

After each fault another process goes on with what is left, by the command that the first one
printed if it did, and what it comes to is compared bit for bit with a run that nothing was done to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import child_runs
import fault_places
import harness
from child_runs import Child, Course, Ended, Moment, Whole

# Between a first signal and a second: less than a compiled call takes.
_SECOND_AFTER_SECONDS = 0.01
# From a first signal to the end of the process: 2 s of work as promised, and what the end of a
# process takes, on a machine that may be busy.
_END_SECONDS = 6.0
# A run that is over before a moment comes is followed by another; this many are enough for the
# unluckiest moment.
_MOST_RUNS = 8
_WIDTH = 120
# A warning of Python's begins with the place in the code.
_TROUBLE = re.compile(
    r"(?:\S+: \w*Warning: )?((?:error: |interrupted|cannot write |checkpoint |workdir ).*)"
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one fault.

    Attributes:
      fault: what was done.
      happened: how the process ended, and what it said.
      lost_steps: how many steps were run again; None where nothing can be said.
      end: what the run came to when it went on.
      is_kept: whether the promise was kept; None if it was not tried.
      seconds: from the signal to the end of the process; None without one.
    """

    fault: str
    happened: str
    lost_steps: int | None = None
    end: str = "-"
    is_kept: bool | None = None
    seconds: float | None = None


class Scene(NamedTuple):
    """What every fault is tried on.

    Attributes:
      course: the run.
      whole: what it comes to if nothing is done to it.
      folder: for the runs' folders.
      data: the folder that CIFAR-10 was read from; None if these are the stand-in images.
      mounts: whether this process may mount.
      quick: whether a few of the faults are enough.
      signals: at how many moments SIGTERM is sent.
      seed: of moments and of places in files.
    """

    course: Course
    whole: Whole
    folder: pathlib.Path
    data: pathlib.Path | None
    mounts: bool = False
    quick: bool = False
    signals: int = 1
    seed: int = 0

    @property
    def disk_bytes(self) -> int:
        """Room for what a run keeps, and for checkpoints that are being written."""
        return 8 * self.whole.checkpoint_bytes + 4 * 2**20


# What the faults share


def go_on(
    scene: Scene, workdir: pathlib.Path, *, command: Sequence[str] | None = None
) -> tuple[Ended, int | None]:
    """Runs to the end what is in a folder.

    Args:
      scene: what the faults are tried on.
      workdir: the run's folder.
      command: to go on by; by default the course's.

    Returns:
      How the process ended, and the step that it went on from.
    """
    with Child(command or scene.course.command(workdir)) as child:
        ended = child.finish()
        return ended, child.resumed_step


def describe_result(scene: Scene, workdir: pathlib.Path, ended: Ended) -> str:
    """What a run came to at last: "identical", or what is wrong."""
    if ended.status:
        return tell(ended, workdir)
    cut = child_runs.damaged(workdir)
    parts = child_runs.differing(child_runs.fingerprint(workdir), scene.whole.fingerprint)
    return f"{', '.join(cut)} cut" if cut else child_runs.describe_end(parts)


def said(stderr: str) -> list[str]:
    """The lines of stderr that say what is wrong, without what a run says of itself."""
    return [found[1] for found in map(_TROUBLE.match, stderr.splitlines()) if found]


def reports(stderr: str) -> bool:
    """Whether a line says that something is wrong with a checkpoint."""
    return any("checkpoint" in line for line in said(stderr))


def tell(ended: Ended, workdir: pathlib.Path) -> str:
    """How a process ended and what it said, short enough for a table."""
    # Warnings are many, an error is the last word.
    lines = sorted(said(ended.stderr), key=lambda line: not line.startswith("error: "))
    is_quiet = 0 < ended.status < 128 and not lines
    if "Traceback" in ended.stderr or is_quiet:
        lines = ["UNEXPLAINED", child_runs.last_line(ended.stderr)]
    text = ": ".join([child_runs.describe_status(ended.status), *lines[:2]])
    text = text.replace(f"{workdir}/checkpoints/", "").replace(str(workdir), "RUN")
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def is_one_line_error(ended: Ended) -> bool:
    """Whether it ended as bad input does: status 2, one line with what is wrong, no traceback."""
    errors = [line for line in said(ended.stderr) if line.startswith("error: ")]
    return ended.status == 2 and len(errors) == 1 and "Traceback" not in ended.stderr


def printed_command(ended: Ended) -> list[str] | None:
    """The command to go on that a process printed, if it did."""
    found = re.search(r"^to go on: \S+ (.+)$", ended.stderr, re.MULTILINE)
    return [sys.executable, *shlex.split(found[1])] if found else None


# Signals


class Order(NamedTuple):
    """A signal to send.

    Attributes:
      number: which.
      moment: when.
      is_twice: whether a second one follows at once.
    """

    number: signal.Signals
    moment: Moment
    is_twice: bool = False

    def describe(self) -> str:
        """In words, for the table."""
        twice = " twice" if self.is_twice else ""
        where = {"training": "in training", "writing": "while a checkpoint is written"}
        where |= {"start-up": "in start-up", "end": "after the last step"}
        return f"{self.number.name}{twice} {where[self.moment.kind]}"


def try_signals(scene: Scene) -> Iterator[Outcome]:
    """SIGTERM at many moments of one run, then SIGINT, and second signals, in another."""
    moments = child_runs.draw_moments(scene.signals, seed=scene.seed)
    yield from _chain(scene, "terms", [Order(signal.SIGTERM, moment) for moment in moments])
    others = [
        Order(signal.SIGINT, Moment("training", 0.3)),
        Order(signal.SIGTERM, Moment("training", 0.5), is_twice=True),
        Order(signal.SIGINT, Moment("training", 0.7), is_twice=True),
    ]
    yield from _chain(scene, "others", others[1:2] if scene.quick else others)


def _chain(scene: Scene, name: str, orders: Sequence[Order]) -> list[Outcome]:
    """Sends signals to one run, one after the other, and goes on each time.

    Where the run is over before a moment has come, that one comes earlier in another run.
    """
    left = list(orders)
    outcomes = []
    for number in range(_MOST_RUNS):
        outcomes += _signal_run(scene, scene.folder / f"{name}{number}", left)
        if not left:
            break
        moment = left[0].moment
        left[0] = left[0]._replace(moment=moment._replace(share=moment.share / 2))
    missed = f"not tried: {_MOST_RUNS} runs were over first"
    return outcomes + [Outcome(order.describe(), missed) for order in left]


def _signal_run(scene: Scene, workdir: pathlib.Path, left: list[Order]) -> list[Outcome]:
    """Sends signals to the run in a folder until it is over.

    Args:
      scene: what the faults are tried on.
      workdir: the run's folder.
      left: the signals that are left; those that were sent are taken away.
    """
    command = scene.course.command(workdir)
    outcomes = []
    while left:
        order = left[0]
        with Child(command) as child:
            child.meet(order.moment, scene.course, scene.whole, workdir)
            at, came = child.step, time.monotonic()
            is_sent = child.signal(order.number)
            if order.is_twice:
                time.sleep(_SECOND_AFTER_SECONDS)
                child.signal(order.number)
            ended = child.finish()
            seconds = time.monotonic() - came
        if not is_sent:
            break  # it was over first
        del left[0]
        fault = f"{order.describe()}, step {at or 0}"
        lost = max(0, (child.step or 0) - child_runs.newest_step(workdir))
        happened = f"in {seconds:.2f} s {tell(ended, workdir)}"
        is_kept = _is_answered(order, ended, lost=lost, seconds=seconds)
        is_kept &= not child_runs.damaged(workdir)
        outcomes.append(
            Outcome(fault, happened, lost_steps=lost, is_kept=is_kept, seconds=round(seconds, 3))
        )
        command = printed_command(ended) or command
    if not outcomes:
        return []
    end = describe_result(scene, workdir, go_on(scene, workdir, command=command)[0])
    return [
        dataclasses.replace(each, end=end, is_kept=bool(each.is_kept) and end == "identical")
        for each in outcomes
    ]


def _is_answered(order: Order, ended: Ended, *, lost: int, seconds: float) -> bool:
    """Whether a process ended as it should after a signal, and as soon."""
    if "Traceback" in ended.stderr or seconds > _END_SECONDS:
        return False
    saved = 128 + order.number
    if order.is_twice:
        return ended.status in (saved, -order.number)
    if order.moment.kind == "start-up":
        return ended.status in (saved, -order.number) and not lost
    if order.moment.kind == "end":
        # The state is saved already; the test may be let finish.
        return ended.status in (saved, -order.number, 0) and not lost
    return ended.status == saved and not lost and printed_command(ended) is not None


# Disks and folders


def try_disk(scene: Scene) -> Iterator[Outcome]:
    """A disk that is full for a while, to the end, and to the last byte."""
    yield _fill(scene, "for a while")
    if not scene.quick:
        yield _fill(scene, "to the end")
        yield _fill(scene, "to the last byte")


def _fill(scene: Scene, how: str) -> Outcome:
    with _place(scene) as place:
        fault = f"disk full {how} ({place.full})"
        workdir, course = place.workdir, scene.course
        to_the_last = how == "to the last byte"
        with Child(course.command(workdir)) as child:
            child.wait_until(lambda: len(child_runs.checkpoints(workdir)) > 1)

            def shows() -> bool:
                # Again and again: the run itself makes room when it removes old checkpoints.
                place.fill(child.pid, to_the_last=to_the_last)
                return reports(child.stderr)

            try:
                if child.wait_until(shows) and how == "for a while":
                    place.free(child.pid)
                else:
                    child.wait_until(lambda: shows() and False)
            except fault_places.UnavailableError as missing:
                return Outcome(fault, f"not tried: {missing}")
            ended = child.finish()
        lost = max(0, (child.step or 0) - child_runs.newest_step(workdir))
        cut = child_runs.damaged(workdir)
        happened = tell(ended, workdir)
        place.free(child.pid)
        is_good = is_one_line_error(ended)
        if how == "for a while":
            is_good = ended.status == 0 and reports(ended.stderr)
        if ended.status:
            ended = go_on(scene, workdir)[0]
        end = describe_result(scene, workdir, ended)
        is_kept = is_good and not cut and end == "identical"
        return Outcome(fault, happened, lost, end, is_kept)


def try_readonly(scene: Scene) -> Iterator[Outcome]:
    """A folder that cannot be written from the beginning, or from the middle of a run on."""
    yield _lock(scene, at_start=True)
    if not scene.quick:
        yield _lock(scene, at_start=False)


def _lock(scene: Scene, *, at_start: bool) -> Outcome:
    with _place(scene) as place:
        when = "from the start" if at_start else "from the middle on"
        fault = f"workdir read-only {when} ({place.locked})"
        workdir = place.workdir
        try:
            if at_start:
                place.lock()
            with Child(scene.course.command(workdir)) as child:
                if not at_start:
                    child.wait_until(lambda: len(child_runs.checkpoints(workdir)) > 1)
                    place.lock()
                ended = child.finish()
            cut = child_runs.damaged(workdir)
            place.unlock()
        except fault_places.UnavailableError as missing:
            return Outcome(fault, f"not tried: {missing}")
        lost = max(0, (child.step or 0) - child_runs.newest_step(workdir))
        happened, is_good = tell(ended, workdir), is_one_line_error(ended)
        end = describe_result(scene, workdir, go_on(scene, workdir)[0])
        return Outcome(fault, happened, lost, end, is_good and not cut and end == "identical")


@contextlib.contextmanager
def _place(scene: Scene) -> Iterator[fault_places.Place]:
    folder = scene.folder / "place"
    with fault_places.make_place(folder, size=scene.disk_bytes, mounts=scene.mounts) as place:
        yield place
    shutil.rmtree(folder)


def try_removed(scene: Scene) -> Iterator[Outcome]:
    """Folders taken away while a run writes into them."""
    yield _remove(scene, "checkpoints")
    if not scene.quick:
        yield _remove(scene, "")
        yield _remove(scene, "", at_end=True)


def _remove(scene: Scene, name: str, *, at_end: bool = False) -> Outcome:
    """Removes a run's folder, or one in it, between two checkpoints or after the last step."""
    what = "checkpoint folder" if name else "workdir"
    fault = f"{what} removed {'after the last step' if at_end else 'in training'}"
    workdir = scene.folder / "removed"
    with Child(scene.course.command(workdir)) as child:
        is_met = child.wait_until(lambda: len(child_runs.checkpoints(workdir)) > 1)
        if at_end:
            is_met = child.wait_for_step(scene.course.steps)
        if not is_met:
            shutil.rmtree(workdir, ignore_errors=True)
            return Outcome(fault, "not tried: the run was over first")
        # In one go: what is removed file by file is written again meanwhile.
        away = scene.folder / "away"
        (workdir / name).rename(away)
        shutil.rmtree(away)
        ended = child.finish()
    happened = tell(ended, workdir)
    lost = max(0, (child.step or 0) - child_runs.newest_step(workdir))
    is_good = ended.status == 0
    if name:
        # It goes on, and says that a checkpoint was removed meanwhile.
        is_good &= any("removed" in line for line in said(ended.stderr))
    else:
        # In silence it must not go, whatever could be written again.
        is_good = bool(said(ended.stderr)) and (is_good or is_one_line_error(ended))
        # Checkpoints can be lost, if that is an error; no more than they.
        parts = child_runs.differing(child_runs.fingerprint(workdir), scene.whole.fingerprint)
        is_good &= not parts or (parts == ["state"] and ended.status > 0)
        if ended.status:
            lost = child.step or 0
            shutil.rmtree(workdir, ignore_errors=True)
    # Another process takes what is there for the finished run that it is, or goes on with it.
    ended = go_on(scene, workdir)[0]
    end = describe_result(scene, workdir, ended)
    shutil.rmtree(workdir, ignore_errors=True)
    return Outcome(fault, happened, lost, end, is_good and end == "identical")


# Files


def _killed(scene: Scene) -> pathlib.Path:
    """The folder of a run that was killed in its second half; made once.

    Raises:
      WorkerError: if it was over first.
    """
    workdir = scene.folder / "killed"
    if not workdir.exists():
        with Child(scene.course.command(workdir)) as child:
            is_met = child.meet(Moment("training", 0.6), scene.course, scene.whole, workdir)
            child.signal(signal.SIGKILL)
            child.finish()
        if not is_met or len(child_runs.checkpoints(workdir)) < 2:
            raise harness.WorkerError("the run was over before it could be killed: more --steps")
    return workdir


def cut_file(path: pathlib.Path, draw: random.Random) -> None:
    """Cuts off a part of a file."""
    os.truncate(path, draw.randrange(1, path.stat().st_size))


def empty_file(path: pathlib.Path, draw: random.Random) -> None:
    """Leaves nothing in a file."""
    os.truncate(path, 0)


def flip_byte(path: pathlib.Path, draw: random.Random) -> None:
    """Changes one bit of one byte of a file."""
    with path.open("r+b") as file:
        place = draw.randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << draw.randrange(8)]))


def delete_file(path: pathlib.Path, draw: random.Random) -> None:
    """Removes a file."""
    path.unlink()


def add_half_line(path: pathlib.Path, draw: random.Random) -> None:
    """Adds the beginning of a line, as a process does that ends while it writes."""
    line = path.read_bytes().splitlines()[-1]
    with path.open("ab") as file:
        file.write(line[: draw.randrange(1, len(line))])


Damage = Callable[[pathlib.Path, random.Random], None]


def try_checkpoints(scene: Scene) -> Iterator[Outcome]:
    """The newest checkpoint damaged or gone, or all; and a log cut short."""
    yield _damage(scene, "newest checkpoint cut", cut_file, must_report=True)
    if not scene.quick:
        for number in range(3):
            # Where nothing depends on it, it may pass unseen, and then changes nothing.
            yield _damage(scene, "newest checkpoint, one byte flipped", flip_byte, seed=number)
        yield _damage(scene, "newest checkpoint emptied", empty_file, must_report=True)
        yield _damage(scene, "newest checkpoint deleted", delete_file)
        yield _damage(scene, "all checkpoints cut", cut_file, which="all", must_report=True)
        yield _damage(scene, "log ends in half a line", add_half_line, which="log")


def _damage(
    scene: Scene,
    fault: str,
    damage: Damage,
    *,
    which: str = "newest",
    must_report: bool = False,
    seed: int = 0,
) -> Outcome:
    """Damages files of a run that was killed, and goes on with it.

    Args:
      scene: what the faults are tried on.
      fault: what is done, in words.
      damage: does it to a file.
      which: "newest" checkpoint, "all" checkpoints, or the "log".
      must_report: whether going on in silence would break a promise.
      seed: of the place in the file.
    """
    workdir = scene.folder / "hurt"
    shutil.copytree(_killed(scene), workdir)
    newest = child_runs.newest_step(workdir)
    paths = {"newest": child_runs.checkpoints(workdir)[-1:], "all": child_runs.checkpoints(workdir)}
    for path in paths.get(which, [workdir / "metrics.jsonl"]):
        damage(path, random.Random(f"{scene.seed} {seed} {path.name}"))
    ended, resumed_step = go_on(scene, workdir)
    happened = tell(ended, workdir)
    if which == "all" and ended.status:
        # There is nothing to go on from: that is said, and nothing is pretended.
        is_kept, lost, end = is_one_line_error(ended), newest, "to be started anew"
    else:
        end = describe_result(scene, workdir, ended)
        lost = newest - (resumed_step or 0)
        is_kept = end == "identical" and (reports(ended.stderr) or not must_report)
    shutil.rmtree(workdir)
    return Outcome(fault, happened, lost, end, is_kept)


def try_data(scene: Scene) -> Iterator[Outcome]:
    """A file of CIFAR-10 damaged, gone, or in the place of another, when a run is gone on with."""
    files = sorted(scene.data.glob("data_batch_[12]*")) if scene.data is not None else []
    if scene.data is None or len(files) != 2:
        yield Outcome("a batch file damaged", "not tried: needs CIFAR-10 in its own files")
        return
    first, second = (path.name for path in files)

    def damaged_by(damage: Damage) -> Callable[[pathlib.Path], None]:
        def change(folder: pathlib.Path) -> None:
            _own_copy(folder / first)
            damage(folder / first, random.Random(scene.seed))

        return change

    def swap(folder: pathlib.Path) -> None:
        for name in (first, second):
            _own_copy(folder / name)
        swap_links(folder)

    def swap_links(folder: pathlib.Path) -> None:
        (folder / first).rename(folder / "other")
        (folder / second).rename(folder / first)
        (folder / "other").rename(folder / second)

    changes: Mapping[str, Callable[[pathlib.Path], None]] = {
        "a batch file cut": damaged_by(cut_file),
        "a batch file, one byte flipped": damaged_by(flip_byte),
        "a batch file deleted": damaged_by(delete_file),
        "two batch files swapped": swap,
        "links to two batch files swapped": swap_links,
    }
    for fault, change in changes.items():
        yield _damage_data(scene, scene.data, fault, change)


def _own_copy(link: pathlib.Path) -> None:
    """Puts a file of one's own in the place of a link to one."""
    target = link.resolve()
    link.unlink()
    shutil.copyfile(target, link)


def _damage_data(
    scene: Scene, data: pathlib.Path, fault: str, change: Callable[[pathlib.Path], None]
) -> Outcome:
    """Goes on with a run from a damaged copy of its data, which must leave the run as it is."""
    folder = scene.folder / "data"
    copy = folder / data.name
    copy.mkdir(parents=True)
    for path in data.iterdir():
        (copy / path.name).symlink_to(path.resolve())
    change(copy)
    workdir = _killed(scene)
    before = _contents(workdir)
    with Child(scene.course.command(workdir, data_dir=folder)) as child:
        ended = child.finish()
    happened = tell(ended, workdir).replace(str(folder), "DATA")
    is_untouched = _contents(workdir) == before
    shutil.rmtree(folder)
    if not is_untouched:
        shutil.rmtree(workdir)  # for the next one it is made anew
    end = "the run is untouched" if is_untouched else "THE RUN HAS CHANGED"
    return Outcome(fault, happened, 0, end, is_one_line_error(ended) and is_untouched)


def _contents(folder: pathlib.Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


GROUPS: Mapping[str, Callable[[Scene], Iterator[Outcome]]] = {
    "signals": try_signals,
    "disk": try_disk,
    "readonly": try_readonly,
    "removed": try_removed,
    "checkpoints": try_checkpoints,
    "data": try_data,
}
