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
    r"|_ListToArray|_ArrayToList|__inference_\w+"
)
# Likewise, as XLA names them.
_XLA_NO_COMPUTE = re.compile(r"(while|call|conditional)[.\d]*")
# Beside the name of an operation compiled by XLA: it has ended.
_XLA_END = "end: "
# Where the trace has the programs that XLA made.
_XLA_PLANE, _XLA_PROGRAM = "/host:metadata", "Hlo Proto"
# What `read_trace` adds to an operation of XLA: the scope that it comes from.
_XLA_SCOPE = "scope"
_WAIT = re.compile(r"IteratorGetNext\w*::\w+")
# The runtime runs a compiled function.
_CALL = "EagerLocalExecute: __inference_"
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
      input: in which nothing computed, and the loop waited for a batch or drew one.
      device: in which something computed.
      operations: (name, type) of each operation -> microseconds of `device` and number of times;
        where several computed at once each has its equal share, so that they sum to `device`.
        An operation compiled by XLA, and a GPU's kernel that no operation is known of, has
        the type "".
      data: (name, type) of each operation that prepared batches -> microseconds, most of them
        beside others.
      stages: each stage of the input pipeline -> microseconds in it and not in a stage before it.
    """

    total: float
    input: float
    device: float
    operations: Mapping[tuple[str, str], tuple[float, int]]
    data: Mapping[tuple[str, str], float]
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
    scopes = _xla_scopes(space)
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
                scope = scopes.get((stats.get("program_id"), stats.get("hlo_op")))
                if scope:
                    stats[_XLA_SCOPE] = scope
                spans.append(Span(name, start, start + event.duration_ps / 1e6, stats))
            # A longer span of the same start has the others inside.
            spans.sort(key=lambda span: (span.start, -span.end))
            lines.append(Line(plane.name, line.display_name or line.name, spans))
    return lines


def _xla_scopes(space: Any) -> dict[tuple[Any, Any], str]:
    """(program, operation of XLA) -> scope of the TensorFlow operation that it comes from."""
    try:
        from tensorflow.compiler.xla.service import hlo_pb2
    except ImportError:
        # The times are right without.
        return {}
    scopes = {}
    for plane in space.planes:
        if plane.name != _XLA_PLANE:
            continue
        stat_names = {key: metadata.name for key, metadata in plane.stat_metadata.items()}
        for program, metadata in plane.event_metadata.items():
            for stat in metadata.stats:
                if stat_names.get(stat.metadata_id) != _XLA_PROGRAM:
                    continue
                module = hlo_pb2.HloProto.FromString(stat.bytes_value).hlo_module
                for computation in module.computations:
                    for each in computation.instructions:
                        scopes[program, each.name] = each.metadata.op_name.rpartition("/")[0]
    return scopes


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


def split_time(
    lines: Sequence[Line], *, mark: str, input_scope: str = "", on_gpu: bool = False
) -> Split:
    """Says where the time of the marked part went.

    Args:
      lines: a trace of compiled steps.
      mark: name of the `tf.profiler.experimental.Trace` around them; only the first counts, and
        of it what is in the runtime, without Python's share of the calls.
      input_scope: name scope of the operations that draw a batch within the loop; "" means that
        the input pipeline draws them all.
      on_gpu: whether the steps ran on a GPU: then its kernels are what computes, else the
        operations that the processor's threads ran for the loop.  Copies to and from a GPU and
        what prepares batches do not compute.

    Raises:
      ConfigError: if the mark is not in the trace, or nothing computed in it.
    """
    marked = next(((line, s) for line in lines for s in line.spans if s.name == mark), None)
    if marked is None:
        raise ConfigError(f"the trace must have a part marked {mark!r}, and has none")
    windows = _windows(*marked)
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
    # Drawing in the loop is as waiting for a batch that others draw.
    drawing = []
    for index, each in enumerate(computed):
        if not each.is_data and input_scope and input_scope in each.operation[0].split("/"):
            computed[index] = each._replace(is_data=True)
            drawing.append((each.start, each.end))
    if on_gpu:
        windows = _until_done(windows, computed, marked[1].end)
    waits = [(s.start, s.end) for line in lines for s in line.spans if _WAIT.fullmatch(s.name)]
    data: defaultdict[tuple[str, str], float] = defaultdict(float)
    for each in computed:
        if each.is_data:
            data[each.operation] += _overlap(each, windows)
    device, waited, operations = _sweep(
        [each for each in computed if not each.is_data], [*waits, *drawing], windows
    )
    if not operations:
        missing = "kernel of the GPU: is CUPTI there and allowed?" if on_gpu else "operation"
        raise ConfigError(f"the trace must show what computes, and has no {missing}")
    total = sum(end - start for start, end in windows)
    return Split(total, waited, device, operations, data, _stages(lines, windows))


# From when to when, one after another.
_Windows = Sequence[tuple[float, float]]


def _windows(line: Line, marked: Span) -> _Windows:
    """When the runtime ran the compiled functions called in what is marked; all of it if none."""
    calls = [
        (span.start, span.end)
        for span in line.spans
        if span.name.startswith(_CALL) and span.start >= marked.start and span.end <= marked.end
    ]
    return calls or [(marked.start, marked.end)]


def _until_done(windows: _Windows, computed: Sequence[_Computed], end: float) -> _Windows:
    """The windows until their last kernels have ended, which may be after the call returned."""
    longer = []
    for index, (start, returned) in enumerate(windows):
        is_last = index + 1 == len(windows)
        following = end if is_last else windows[index + 1][0]
        ended = max((c.end for c in computed if start <= c.start < following), default=returned)
        # What still runs when the next call begins is in that one's window.
        ended = ended if is_last else min(ended, following)
        longer.append((start, max(returned, ended)))
    return longer


def _overlap(what: Span | _Computed, windows: _Windows) -> float:
    return sum(max(0.0, min(what.end, end) - max(what.start, start)) for start, end in windows)


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
            if _XLA_NO_COMPUTE.fullmatch(str(span.stats["hlo_op"])):
                continue
            # What XLA hands to other threads ends later than the call that starts it.
            times = ends.get(span.name, ())
            after = bisect.bisect_left(times, span.start)
            end = max(span.end, times[after]) if after < len(times) else span.end
            yield _Computed(_xla_operation(span), span.start, end, is_data)


def _kernel(span: Span) -> tuple[str, str]:
    """The operation that started a kernel, if the profiler knows it; else the kernel's name."""
    found = _OPERATION.fullmatch(str(span.stats.get("tf_op", "")))
    if found is not None:
        return found[1], found[2]
    return _xla_operation(span)


def _xla_operation(span: Span) -> tuple[str, str]:
    """XLA's own name after the scope that the operation comes from, if that is known."""
    name, scope = str(span.stats.get("hlo_op", span.name)), span.stats.get(_XLA_SCOPE)
    return (f"{scope}/{name}" if scope else name), ""


def _sweep(
    computed: Sequence[_Computed], waits: Sequence[tuple[float, float]], windows: _Windows
) -> tuple[float, float, dict[tuple[str, str], tuple[float, int]]]:
    """Goes through the windows from one beginning or end to the next.

    Returns:
      Microseconds in which anything computes; those in which nothing does and something waits for
      a batch or draws it; each operation's share of the first, and how many times it ran.
    """
    everything: list[tuple[float, float, _Computed | None]]
    # When, whether it begins (1; ends, 0, go first), which and what; None is a wait.
    changes: list[tuple[float, int, int, _Computed | None]] = []
    times: defaultdict[tuple[str, str], float] = defaultdict(float)
    counts: defaultdict[tuple[str, str], int] = defaultdict(int)
    everything = [(each.start, each.end, each) for each in computed]
    everything += [(*wait, None) for wait in waits]
    for number, (began, ended, what) in enumerate(everything):
        inside = [(max(began, start), min(ended, end)) for start, end in windows]
        inside = [(first, last) for first, last in inside if first < last]
        for first, last in inside:
            changes += [(first, 1, number, what), (last, 0, number, what)]
        if inside and what is not None:
            counts[what.operation] += 1
    changes.sort(key=lambda change: change[:3])
    device = waited = 0.0
    waiting = 0
    before = 0.0
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


def _stages(lines: Sequence[Line], windows: _Windows) -> dict[str, float]:
    """Time in each stage of the input pipeline, without that in the stages that it asked."""
    found: defaultdict[str, float] = defaultdict(float)
    for line in lines:
        asking: list[Span] = []
        for span in line.spans:
            if not span.name.startswith("Iterator::"):
                continue
            while asking and asking[-1].end <= span.start:
                asking.pop()
            overlap = _overlap(span, windows)
            found[_stage(span)] += overlap
            if asking:
                found[_stage(asking[-1])] -= overlap
            asking.append(span)
    return dict(found)


def _stage(span: Span) -> str:
    """The last part of a name such as `Iterator::Root::Prefetch::ParallelMapV2`."""
    return re.sub(r"\[\d+\]|V\d+$", "", span.name.rpartition("::")[2])
