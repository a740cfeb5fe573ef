"""Reads the traces of TensorFlow's profiler: which operation ran when, and who waited for what.

    lines = read_trace(path)                        # an .xplane.pb file of tf.profiler
    write_chrome_trace(path.with_name("trace.json.gz"), lines)
    split = split_time(lines, mark="profiled_steps")
    print(split.total, split.input, split.device, split.host)

The profiler notes for each thread what it did from when to when.  Its operations are found by
their names, as the executor writes them: `scope/name:Type`.
"""

from __future__ import annotations

import bisect
import gzip
import json
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from cifarflow.errors import ConfigError
from cifarflow.files import replacing

_GPU = "/device:GPU"
# As the executor names an operation; the runtime's own parts have `::` or a space.
_OPERATION = re.compile(r"([^\s:]+):([A-Za-z_]\w*)")
# Operations that only hold others, or only wait.
_NO_COMPUTE = re.compile(
    r"(Stateless)?(While|If|Case)|(Stateful)?PartitionedCall|IteratorGetNext\w*|_?(Host)?(Send|Recv)"
    r"|_ListToArray|_ArrayToList"
)
# Beside the name of an operation compiled by XLA: it has ended.
_XLA_END = "end: "
_WAIT = re.compile(r"IteratorGetNext\w*::\w+")
# The thread pool's notes to itself, for the profiler's own use; they outnumber all the rest.
_NOTES = "ThreadpoolListener::"


class Span(NamedTuple):
    """Something that a thread or a GPU stream did.

    Attributes:
      name: what.
      start: microseconds since the trace began.
      end: likewise.
      stats: what the profiler says of it.
    """

    name: str
    start: float
    end: float
    stats: Mapping[str, Any]


class Line(NamedTuple):
    """What one thread or stream did.

    Attributes:
      plane: whose it is: "/host:CPU", or "/device:GPU:0".
      name: its name.
      spans: by their start.
    """

    plane: str
    name: str
    spans: Sequence[Span]


class Split(NamedTuple):
    """Where the time of the marked part of a trace went.

    Attributes:
      total: microseconds of it.
      input: in which nothing computed and the loop waited for a batch.
      device: in which something computed.
      operations: (name, type) of each operation -> microseconds of `device` and number of times;
        where several computed at once each has its equal share, so that they sum to `device`.
        An operation compiled by XLA, and a GPU's kernel that no operation is known of, has
        the type "".
      data: type of each operation of the input pipeline -> microseconds, run beside the loop.
      stages: each stage of the input pipeline -> microseconds in it and not in a stage before it.
    """

    total: float
    input: float
    device: float
    operations: Mapping[tuple[str, str], tuple[float, int]]
    data: Mapping[str, float]
    stages: Mapping[str, float]

    @property
    def host(self) -> float:
        """Microseconds in which nothing computed, and not for want of a batch."""
        return max(0.0, self.total - self.input - self.device)


def check_readable() -> None:
    """Checks that traces can be read at all.

    Raises:
      ConfigError: if this TensorFlow has no description of their format.
    """
    _proto()


def _proto() -> Any:
    try:
        from tensorflow.tsl.profiler.protobuf import xplane_pb2
    except ImportError:
        raise ConfigError(
            f"TensorFlow {tf.__version__} has no tensorflow.tsl.profiler.protobuf.xplane_pb2, "
            "which reading a trace needs: profile with 2.21"
        ) from None
    return xplane_pb2


def read_trace(path: pathlib.Path) -> list[Line]:
    """Reads an .xplane.pb file.

    Raises:
      ConfigError: if this TensorFlow has no description of the format.
    """
    space = _proto().XSpace()
    space.ParseFromString(path.read_bytes())
    lines = []
    for plane in space.planes:
        names = {key: metadata.name for key, metadata in plane.event_metadata.items()}
        stat_names = {key: metadata.name for key, metadata in plane.stat_metadata.items()}

        def value(stat: Any, stat_names: Mapping[int, str] = stat_names) -> Any:
            kind = stat.WhichOneof("value")
            found: Any = getattr(stat, kind) if kind else None
            return stat_names.get(found) if kind == "ref_value" else found

        for line in plane.lines:
            spans = []
            for event in line.events:
                name = names.get(event.metadata_id, "")
                if name.startswith(_NOTES):
                    continue
                start = line.timestamp_ns / 1e3 + event.offset_ps / 1e6
                stats = {stat_names.get(s.metadata_id, ""): value(s) for s in event.stats}
                spans.append(Span(name, start, start + event.duration_ps / 1e6, stats))
            # A longer span of the same start has the others inside.
            spans.sort(key=lambda span: (span.start, -span.end))
            lines.append(Line(plane.name, line.display_name or line.name, spans))
    return lines


def write_chrome_trace(path: pathlib.Path, lines: Iterable[Line]) -> None:
    """Writes a trace in Chrome's format, which Perfetto and chrome://tracing open.

    Args:
      path: the file, gzipped JSON.
      lines: the trace.

    Raises:
      WorkdirError: if it cannot be written.

    Source: "Trace Event Format", Google (2016): complete events, times in microseconds.
    """
    names: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    processes: dict[str, int] = {}
    for thread, line in enumerate((line for line in lines if line.spans), 1):
        if line.plane not in processes:
            processes[line.plane] = len(processes) + 1
            names.append(_metadata("process_name", line.plane, pid=processes[line.plane], tid=0))
        where = {"pid": processes[line.plane], "tid": thread}
        names.append(_metadata("thread_name", line.name, **where))
        for span in line.spans:
            event = {"ph": "X", **where, "name": span.name}
            event["ts"] = round(span.start, 3)
            event["dur"] = round(max(0.0, span.end - span.start), 3)
            stats = {key: entry for key, entry in span.stats.items() if not key.startswith("_")}
            if stats:
                event["args"] = {key: _as_json(entry) for key, entry in stats.items()}
            events.append(event)
    events.sort(key=lambda event: event["ts"])
    trace = {"displayTimeUnit": "ms", "traceEvents": names + events}
    text = json.dumps(trace, separators=(",", ":")).encode()
    with replacing(path, what="trace") as file, gzip.GzipFile("", "wb", 6, file, 0) as packed:
        packed.write(text)


def _metadata(what: str, name: str, **where: int) -> dict[str, Any]:
    return {"ph": "M", **where, "name": what, "args": {"name": name}}


def _as_json(value: Any) -> Any:
    # Identifiers of 64 bits lose digits as JavaScript's numbers.
    if isinstance(value, int) and abs(value) >= 2**53:
        return str(value)
    return repr(value) if isinstance(value, bytes) else value


def split_time(lines: Sequence[Line], *, mark: str, on_gpu: bool = False) -> Split:
    """Says where the time of the marked part went.

    Args:
      lines: a trace of compiled steps.
      mark: name of the `tf.profiler.experimental.Trace` around them; only the first counts, and
        of it what is in the runtime, without Python's share of the call.
      on_gpu: whether the steps ran on a GPU: then its kernels are what computes, else the
        operations that the processor's threads ran for the loop.  Copies to and from a GPU and
        what the input pipeline ran beside the loop are neither.

    Raises:
      ConfigError: if the mark is not in the trace, or nothing computed in it.
    """
    marked = next(((line, s) for line in lines for s in line.spans if s.name == mark), None)
    if marked is None:
        raise ConfigError(f"the trace must have a part marked {mark!r}, and has none")
    start, end = _window(*marked)
    data_runs, ends = set(), defaultdict(list)
    for line in lines:
        for span in line.spans:
            if span.name.startswith("InstantiatedCapturedFunction::Run"):
                data_runs.add(span.stats.get("id"))
            elif span.name.startswith(_XLA_END):
                ends[span.name.removeprefix(_XLA_END)].append(span.start)
    for times in ends.values():
        times.sort()
    computed = [
        each._replace(line=number)
        for number, line in enumerate(lines)
        for each in _computed(line, data_runs, ends, on_gpu)
    ]
    if on_gpu:
        # The last kernels end after the call has returned.
        end = max([end, *(c.end for c in computed if start <= c.start < marked[1].end)])
    data: defaultdict[str, float] = defaultdict(float)
    for each in computed:
        if each.is_data:
            data[each.operation[1]] += max(0.0, min(each.end, end) - max(each.start, start))
    waits = [s for line in lines for s in line.spans if _WAIT.fullmatch(s.name)]
    device, waited, operations = _sweep(
        [each for each in computed if not each.is_data], waits, start, end
    )
    if not operations:
        missing = "kernel of the GPU: is CUPTI there and allowed?" if on_gpu else "operation"
        raise ConfigError(f"the trace must show what computes, and has no {missing}")
    return Split(end - start, waited, device, operations, data, _stages(lines, start, end))


def _window(line: Line, marked: Span) -> tuple[float, float]:
    """From when to when the runtime ran what is marked."""
    inside = [
        span
        for span in line.spans
        if span.name == "KernelAndDeviceFunc::Run"
        and span.start >= marked.start
        and span.end <= marked.end
    ]
    longest = max(inside, key=lambda span: span.end - span.start, default=marked)
    return longest.start, longest.end


class _Computed(NamedTuple):
    """An operation that ran: (name, type), when, for the input pipeline or not, on which line."""

    operation: tuple[str, str]
    start: float
    end: float
    is_data: bool = False
    line: int = 0


def _computed(
    line: Line, data_runs: set[Any], ends: Mapping[str, Sequence[float]], on_gpu: bool
) -> Iterator[_Computed]:
    """The operations or kernels of a line."""
    if line.plane.startswith(_GPU):
        # Lines that are no streams hold sums over the streams.
        if on_gpu and line.name.startswith("Stream"):
            for span in line.spans:
                if not span.name.lower().startswith(("memcpy", "memset")):
                    yield _Computed(_kernel(span), span.start, span.end)
        return
    if not line.plane.startswith("/host:CPU"):
        return
    is_data_line = line.name.startswith("tf_data")
    runs: list[tuple[float, Any]] = []
    for span in line.spans:
        while runs and runs[-1][0] <= span.start:
            runs.pop()
        if span.name == "ExecutorState::Process":
            runs.append((span.end, span.stats.get("id")))
            continue
        is_data = is_data_line or bool(runs and runs[-1][1] in data_runs)
        # Beside a GPU the processor's operations only start its kernels.
        if on_gpu and not is_data:
            continue
        found = _OPERATION.fullmatch(span.name)
        if found is not None:
            if not _NO_COMPUTE.fullmatch(found[2]):
                yield _Computed((found[1], found[2]), span.start, span.end, is_data)
        elif "hlo_op" in span.stats and not span.name.startswith(_XLA_END):
            # What XLA hands to other threads ends later than the call that starts it.
            times = ends.get(span.name, ())
            after = bisect.bisect_left(times, span.start)
            end = max(span.end, times[after]) if after < len(times) else span.end
            yield _Computed((str(span.stats["hlo_op"]), ""), span.start, end, is_data)


def _kernel(span: Span) -> tuple[str, str]:
    """The operation that started a kernel, if the profiler knows it; else the kernel's name."""
    found = _OPERATION.fullmatch(str(span.stats.get("tf_op", "")))
    if found is not None:
        return found[1], found[2]
    return str(span.stats.get("hlo_op", span.name)), ""


def _sweep(
    computed: Sequence[_Computed], waits: Sequence[Span], start: float, end: float
) -> tuple[float, float, dict[tuple[str, str], tuple[float, int]]]:
    """Goes through the time from one beginning or end to the next.

    Returns:
      Microseconds in which anything computes; those in which nothing does and something waits for
      a batch; each operation's share of the first, and how many times it ran.
    """
    everything: list[tuple[float, float, _Computed | None]]
    # When, whether it begins (1; ends, 0, go first), which and what; None is a wait.
    changes: list[tuple[float, int, int, _Computed | None]] = []
    times: defaultdict[tuple[str, str], float] = defaultdict(float)
    counts: defaultdict[tuple[str, str], int] = defaultdict(int)
    everything = [(each.start, each.end, each) for each in computed]
    everything += [(wait.start, wait.end, None) for wait in waits]
    for number, (first, last, what) in enumerate(everything):
        first, last = max(first, start), min(last, end)
        if last <= first:
            continue
        changes += [(first, 1, number, what), (last, 0, number, what)]
        if what is not None:
            counts[what.operation] += 1
    changes.sort(key=lambda change: change[:3])
    device = waited = 0.0
    waiting = 0
    before = start
    # What runs on each line; of those inside one another the innermost, which began last, counts.
    running: defaultdict[int, dict[int, _Computed]] = defaultdict(dict)
    for now, is_beginning, number, what in changes:
        if running:
            device += now - before
            share = (now - before) / len(running)
            for each_line in running.values():
                times[next(reversed(each_line.values())).operation] += share
        elif waiting:
            waited += now - before
        before = now
        if what is None:
            waiting += 1 if is_beginning else -1
        elif is_beginning:
            running[what.line][number] = what
        else:
            del running[what.line][number]
            if not running[what.line]:
                del running[what.line]
    return device, waited, {key: (times[key], counts[key]) for key in counts}


def _stages(lines: Sequence[Line], start: float, end: float) -> dict[str, float]:
    """Time in each stage of the input pipeline, without that in the stages that it asked."""
    found: defaultdict[str, float] = defaultdict(float)
    for line in lines:
        asking: list[Span] = []
        for span in line.spans:
            if not span.name.startswith("Iterator::"):
                continue
            while asking and asking[-1].end <= span.start:
                asking.pop()
            overlap = max(0.0, min(span.end, end) - max(span.start, start))
            found[_stage(span)] += overlap
            if asking:
                found[_stage(asking[-1])] -= overlap
            asking.append(span)
    return dict(found)


def _stage(span: Span) -> str:
    """The last part of a name such as `Iterator::Root::Prefetch::ParallelMapV2`."""
    return re.sub(r"\[\d+\]|V\d+$", "", span.name.rpartition("::")[2])
