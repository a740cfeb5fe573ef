"""Who trains together: the cluster that TF_CONFIG names, and how its processes meet.

    cluster = read_cluster(os.environ.get("TF_CONFIG"))
    meet(cluster, timeout_seconds=60)

Nothing here needs TensorFlow, so what is wrong with TF_CONFIG is said before it loads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from typing import NamedTuple

from cifarflow.errors import CifarflowError, ConfigError
from cifarflow.untrusted import one_line, parse_json, shown

# Who trains: one device, all GPUs of a machine, the processes of a cluster.
STRATEGIES = ("none", "mirrored", "multiworker")
_TASKS = ("chief", "worker")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
# For one answer of a worker that is up: it need only be asked again.
ANSWER_SECONDS = 2.0


class WorkerError(CifarflowError, ConnectionError):
    """A worker of the cluster has not come up, was lost, or runs something else."""


class Cluster(NamedTuple):
    """The workers of a run.

    Attributes:
      addresses: "host:port" of each, the chief's first.
      place: this process's among them.
      task: its type and index as TensorFlow counts them.
      has_chief: whether the first is of type chief, not worker 0.
    """

    addresses: tuple[str, ...]
    place: int
    task: tuple[str, int]
    has_chief: bool

    def name(self, index: int) -> str:
        """A worker in words, by its address."""
        which = "the chief" if index == 0 else f"worker {index - self.has_chief}"
        return f"{which} at {self.addresses[index]}"


def read_cluster(text: str | None) -> Cluster:
    """Reads TF_CONFIG.

    Args:
      text: such as `{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, "task": {"type":
        "worker", "index": 0}}`; None where it is not set.  A task of type chief may be beside the
        workers.

    Raises:
      ConfigError: if it is anything else.
    """
    if text is None or not text.strip():
        raise ConfigError(
            "strategy=multiworker needs TF_CONFIG in the environment, such as "
            '{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, '
            '"task": {"type": "worker", "index": 0}}'
        )
    try:
        config = parse_json(text.encode())
    except ValueError as error:
        raise ConfigError(
            f"TF_CONFIG must be JSON, not {shown(text, length=100)}: {one_line(str(error))}"
        ) from None
    cluster = config.get("cluster") if isinstance(config, dict) else None
    task = config.get("task") if isinstance(config, dict) else None
    if not isinstance(cluster, dict) or not cluster:
        raise ConfigError(
            f"TF_CONFIG must hold a cluster, the addresses of its workers, not {shown(cluster)}"
        )
    if not isinstance(task, dict):
        raise ConfigError(f"TF_CONFIG must hold a task, its type and index, not {shown(task)}")
    for kind in [*cluster, task.get("type")]:
        if kind not in _TASKS:
            raise ConfigError(
                f"TF_CONFIG's tasks must be of type chief or worker, not {shown(kind)}: parameter "
                "servers and evaluators have nothing to do in strategy=multiworker"
            )
    addresses: list[str] = []
    for kind in _TASKS:
        found = cluster.get(kind, [])
        if not isinstance(found, list) or (kind in cluster and not found):
            raise ConfigError(f"TF_CONFIG's {kind} must be a list of addresses, not {shown(found)}")
        for address in found:
            match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
            if match is None or not 0 < int(match[2]) < 2**16:
                raise ConfigError(f"TF_CONFIG's addresses must be host:port, not {shown(address)}")
            if address in addresses:
                raise ConfigError(
                    f"TF_CONFIG must name each address once, not {shown(address)} twice"
                )
            addresses.append(address)
    chiefs, kind, index = len(cluster.get("chief", [])), task["type"], task.get("index")
    if chiefs > 1:
        raise ConfigError(f"TF_CONFIG must have one chief, not {chiefs}")
    count = len(cluster.get(kind, []))
    if type(index) is not int or not 0 <= index < count:
        raise ConfigError(
            f"TF_CONFIG's task index must be from 0 up to but not {count}, the number of its "
            f"{kind}s, not {shown(index)}"
        )
    place = index if kind == "chief" else chiefs + index
    return Cluster(tuple(addresses), place, (kind, index), bool(chiefs))


def meet(cluster: Cluster, *, timeout_seconds: float) -> None:
    """Returns when all workers of the cluster are there, each of which calls this.

    TensorFlow would wait for ever for one that is not, deaf to signals.

    Args:
      cluster: all of them.
      timeout_seconds: how long to wait.

    Raises:
      WorkerError: if one has not come by then; it names its address.
      ConfigError: if another program listens at this worker's own address.
    """
    digest = hashlib.sha256(json.dumps(cluster.addresses).encode()).hexdigest()[:16]
    others = [index for index in range(len(cluster.addresses)) if index != cluster.place]
    answered: dict[int, bool] = {}
    greeted: set[int] = set()
    done = threading.Event()

    def line(index: int) -> bytes:
        return f"cifarflow {digest} {index:08d}\n".encode()

    def answer(listener: socket.socket) -> None:
        while not done.is_set():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(ANSWER_SECONDS)
                    said = _read_line(connection, len(line(0)))
                    connection.sendall(line(cluster.place))
                    greeted.update(index for index in others if said == line(index))

    deadline = time.monotonic() + timeout_seconds
    with _listen(cluster) as listener:
        thread = threading.Thread(target=answer, args=[listener], daemon=True)
        thread.start()
        try:
            while True:
                for index in others:
                    if not answered.get(index):
                        with contextlib.suppress(OSError):
                            answered[index] = _ask(
                                cluster.addresses[index], line(cluster.place), line(index)
                            )
                # Whoever has not greeted yet still needs an answer.
                if greeted.issuperset(others) and all(map(answered.get, others)):
                    return
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
        finally:
            done.set()
            thread.join()
    missing = []
    for index in others:
        if not answered.get(index):
            how = ", where something else answers" if index in answered else ""
            missing.append(cluster.name(index) + how)
        elif index not in greeted:
            missing.append(
                f"{cluster.name(index)}, which cannot reach {cluster.name(cluster.place)}"
            )
    raise WorkerError(
        f"after {timeout_seconds:g} s {len(missing)} of {len(cluster.addresses)} workers have not "
        f"come up: {'; '.join(missing)}: start all of them, with the same cluster in TF_CONFIG"
    )


def _listen(cluster: Cluster) -> socket.socket:
    address = cluster.addresses[cluster.place]
    try:
        listener = socket.create_server(("", split_address(address)[1]))
    except OSError as error:
        raise ConfigError(
            f"TF_CONFIG gives this worker the address {address!r}, where it cannot listen: "
            f"{error.strerror}"
        ) from None
    listener.settimeout(0.1)
    return listener


def split_address(address: str) -> tuple[str, int]:
    """Host and port of an address that `read_cluster` has taken."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _ask(address: str, greeting: bytes, wanted: bytes) -> bool:
    """Whether the worker that is meant answers there; OSError if nobody does."""
    with socket.create_connection(split_address(address), timeout=ANSWER_SECONDS) as connection:
        connection.settimeout(ANSWER_SECONDS)
        connection.sendall(greeting)
        return _read_line(connection, len(wanted)) == wanted


def _read_line(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length and (part := connection.recv(length - len(data))):
        data += part
    return data
