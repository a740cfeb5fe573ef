"""Training on several GPUs or machines: the same run, of the same recipe, in less time.

    team = open_team("multiworker", worker_timeout_seconds=60)  # the cluster is in TF_CONFIG
    run = train(model, optimizer, batches=batches, epochs=5, team=team)

`train_recipe(strategy="multiworker")`, or a runner's `--strategy`, does all of this.

Each replica computes the gradients of its share of the batch: replica r of R has the rows from
r * B / R on of the very batch of B examples that a single process would have, drawn as there from
(seed, step), augmentation included.  Gradients, sums of the log and changes of the statistics of
BatchNorm are then averaged in one reduction a step, and what comes after works on the averages:
clipping, loss scaling, skipping, the optimiser, averages of the weights.  So weights and log are
those of one process, but for the order in which floats are added; and two things that a replica has
for itself: BatchNorm normalises by the statistics of the share, and dropout draws other masks.
Regularisation counts once.  Evaluation is of all examples, on the chief and on each other worker.

mirrored: the GPUs of one machine, in one process.  Each has a copy of the model, which takes the
weights from the first before each step; the optimiser is on the first alone.

multiworker: a process a replica, each with one GPU or none, on any machines.  The chief (worker 0,
or the task "chief") alone has a workdir; it tells the others at the start which step and which
values to go on from.  So nothing need be shared but the network and the recipe, and each worker has
a copy of the data.  Time is the chief's, and a signal to any worker ends all at the same step.

The network must be trusted: neither TensorFlow's servers nor the greeting before them ask who is
there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from cifarflow.errors import ConfigError, check_choice, check_float
from cifarflow.training.cluster import (
    ANSWER_SECONDS,
    STRATEGIES,
    Cluster,
    WorkerError,
    meet,
    read_cluster,
    split_address,
)
from cifarflow.training.step import Look, Sums, is_float
from cifarflow.untrusted import one_line, shown

# What a collective operation ends in when a worker is gone.
_LOSSES = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
    tf.errors.UnknownError,
)


def open_team(strategy: str, *, worker_timeout_seconds: float = 60.0) -> Team | None:
    """Prepares a run on several devices.

    To be called before TensorFlow's first operation, with strategy multiworker.

    Args:
      strategy: "none", "mirrored" or "multiworker", see the module.
      worker_timeout_seconds: how long workers wait for each other at the start.

    Returns:
      The team, for `train`; None where one device trains alone.

    Raises:
      ConfigError: if strategy is unknown, the time is no number > 0, TF_CONFIG is not as
        `read_cluster` says, this process sees several GPUs with strategy multiworker, or
        TensorFlow has begun to compute.
      WorkerError: if a worker does not come up in time.
    """
    check_choice("strategy", strategy, STRATEGIES)
    check_float("worker_timeout_seconds", worker_timeout_seconds, above_minimum=True)
    if strategy != "none":
        # Lines for each strategy and each reduction that is traced.
        tf.get_logger().setLevel("WARNING")
    if strategy == "multiworker":
        return Workers(
            read_cluster(os.environ.get("TF_CONFIG")), timeout_seconds=worker_timeout_seconds
        )
    if strategy == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        if len(devices) > 1:
            return Mirrored([device.name for device in devices])
    return None


class Team:
    """The replicas that train one model; see `open_team`.

    Attributes:
      strategy: "mirrored" or "multiworker", as `open_team` was asked.
      replicas: how many.
      index: which of them this process has; with strategy mirrored it has all, and this is 0.
      signal: number of the signal that has come to any worker, as of the last `agree`; 0 for none.
      now: the chief's clock as of then, in seconds.
    """

    strategy = "none"
    replicas = 1
    index = 0
    signal = 0

    def __init__(self) -> None:
        self._now = 0.0

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files and says what happens."""
        return self.index == 0

    def now(self) -> float:
        """The time in seconds, the same on all workers."""
        return time.monotonic()

    def describe(self) -> str:
        """The team in words."""
        raise NotImplementedError

    def check_batch_size(self, batch_size: int | None, *, accumulate_steps: int = 1) -> None:
        """Refuses batches that cannot be shared out, or shares that cannot be cut.

        Args:
          batch_size: of all replicas together; None: not known.
          accumulate_steps: micro-batches that each replica cuts its share into.

        Raises:
          ConfigError: if batch_size is not a multiple of the replicas, or None; or its share not
            one of accumulate_steps.
        """
        if batch_size is None or batch_size % self.replicas:
            raise ConfigError(
                f"batch_size must be a multiple of the {self.replicas} replicas, which share each "
                f"batch, not {batch_size}"
            )
        share = batch_size // self.replicas
        if share % accumulate_steps:
            raise ConfigError(
                f"accumulate_steps must divide the {share} examples that each of the "
                f"{self.replicas} replicas has of a batch of {batch_size}, not {accumulate_steps}"
            )

    def spread(self, make_look: Callable[[Any], Look], model: Any) -> Look:
        """Makes of what one replica does with a batch what all do with it together.

        Args:
          make_look: function of a model that returns a function of (images, labels, variables),
            see `make_train_step`.
          model: the model in training.

        Returns:
          Such a function, of the whole batch.
        """
        raise NotImplementedError

    def share_of(self, values: Any, index: int) -> Any:
        """A replica's rows of a batch."""
        self.check_batch_size(values.shape[0])
        size = values.shape[0] // self.replicas
        return values[index * size : (index + 1) * size]

    def agree(self, count: int, *, signal_number: int = 0) -> int:
        """What all workers do next; all call it at the same step.

        Args:
          count: how many steps this one would run, 0 for none.
          signal_number: of the signal that has come to it; 0 for none.

        Returns:
          How many steps all run.  Sets `signal` and `now`.
        """
        self.signal = self.signal or signal_number
        return count

    def tell(self, value: Any) -> Any:
        """Returns the chief's value, whatever the others' is.

        Args:
          value: what JSON has.
        """
        return value

    def hand_out(self, variables: Sequence[Any]) -> None:
        """Gives all workers the chief's values of the variables, bit for bit."""

    def check_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Refuses a worker that has other values than the chief.

        Raises:
          WorkerError: by that worker.
        """

    def begin(self, model: Any) -> None:
        """Begins to train, all at the same step; dropout draws other masks on each replica."""

    @contextlib.contextmanager
    def noticing(self) -> Iterator[None]:
        """Says in one line that a worker is lost, in place of what TensorFlow says.

        Raises:
          WorkerError: that line.
        """
        yield


class Mirrored(Team):
    """The devices of this process, see the module.

    Args:
      devices: their names, two or more.
    """

    strategy = "mirrored"

    def __init__(self, devices: Sequence[str]) -> None:
        super().__init__()
        self.replicas = len(devices)
        self._devices = list(devices)
        # Copies and sums, on the device that updates: right for any devices.
        self._distribute = tf.distribute.MirroredStrategy(
            self._devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
        )

    def describe(self) -> str:
        """See `Team.describe`."""
        return f"{self.replicas} replicas in one process"

    def spread(self, make_look: Callable[[Any], Look], model: Any) -> Look:
        """See `Team.spread`.

        Raises:
          ConfigError: if Keras cannot copy the model.
        """
        models = [model]
        for device in self._devices[1:]:
            with tf.device(device):
                try:
                    models.append(keras.models.clone_model(model))
                except (ValueError, TypeError, NotImplementedError) as error:
                    reason = str(error).partition("\n")[0]
                    raise ConfigError(
                        f"model {model.name!r} cannot be copied for strategy=mirrored: {reason}"
                    ) from None
        looks = [make_look(each) for each in models]

        def look(images: Any, labels: Any, variables: Sequence[Any]) -> tuple[Any, Sums, list[Any]]:
            places = {id(v): place for place, v in enumerate(model.trainable_variables)}
            wanted = [places[id(v)] for v in variables]
            before = [tf.identity(v.value) for v in _statistics_of(model)]
            values = [tf.identity(v.value) for v in model.variables]
            packer = _Packer()

            def of_one() -> list[Any]:
                context = tf.distribute.get_replica_context()
                index = int(tf.get_static_value(context.replica_id_in_sync_group))
                own = models[index]
                if index:
                    for variable, value in zip(own.variables, values, strict=True):
                        variable.value.assign(_for_replica(variable, value, index))
                loss, sums, gradients = looks[index](
                    self.share_of(images, index),
                    self.share_of(labels, index),
                    [own.trainable_variables[place] for place in wanted],
                )
                return packer.pack(own, loss, sums, gradients, before)

            packed = self._distribute.run(of_one)
            total = [self._distribute.reduce("SUM", part, axis=None) for part in packed]
            return packer.unpack(model, total, before, replicas=self.replicas)

        return look


class Workers(Team):
    """The processes of a cluster, of which this is one; see the module.

    Args:
      cluster: all of them.
      timeout_seconds: how long to wait for them.

    Raises:
      ConfigError, WorkerError: see `open_team`.
    """

    strategy = "multiworker"

    def __init__(self, cluster: Cluster, *, timeout_seconds: float) -> None:
        super().__init__()
        gpus = tf.config.get_visible_devices("GPU")
        if len(gpus) > 1:
            raise ConfigError(
                f"strategy=multiworker takes one GPU a worker, and this one sees {len(gpus)}: "
                "start a worker a GPU, each with one in CUDA_VISIBLE_DEVICES"
            )
        self._cluster = cluster
        self.replicas, self.index = len(cluster.addresses), cluster.place
        meet(cluster, timeout_seconds=timeout_seconds)
        chief = list(cluster.addresses[: cluster.has_chief])
        jobs = {"chief": chief, "worker": list(cluster.addresses[cluster.has_chief :])}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            self._distribute = tf.distribute.MultiWorkerMirroredStrategy(
                tf.distribute.cluster_resolver.SimpleClusterResolver(
                    tf.train.ClusterSpec({job: some for job, some in jobs.items() if some}),
                    task_type=cluster.task[0],
                    task_id=cluster.task[1],
                    rpc_layer="grpc",
                )
            )
        except RuntimeError as error:
            raise ConfigError(
                "strategy=multiworker must come before TensorFlow's first operation: "
                f"{one_line(str(error))}"
            ) from None
        if threading.current_thread() is threading.main_thread():
            # TensorFlow has taken SIGTERM for itself.
            signal.signal(signal.SIGTERM, handler)
        self._sum = tf.function(self._all_reduce, reduce_retracing=True)

    def describe(self) -> str:
        """See `Team.describe`."""
        return f"{self.replicas} workers, of which this is {self._cluster.name(self.index)}"

    def now(self) -> float:
        """See `Team.now`."""
        return self._now

    def _all_reduce(self, values: Any) -> Any:
        """The sum over all workers; the one place where they wait for each other."""

        def add() -> Any:
            context = tf.distribute.get_replica_context()
            # A value of the device: a captured one has none that TensorFlow would see.
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(values))

        return self._distribute.run(add)

    def spread(self, make_look: Callable[[Any], Look], model: Any) -> Look:
        """See `Team.spread`."""
        own_look = make_look(model)

        def look(images: Any, labels: Any, variables: Sequence[Any]) -> tuple[Any, Sums, list[Any]]:
            before = [tf.identity(v.value) for v in _statistics_of(model)]
            packer = _Packer()
            images, labels = (self.share_of(values, self.index) for values in (images, labels))
            found = own_look(images, labels, variables)
            packed = packer.pack(model, *found, before)
            total = [self._all_reduce(part) for part in packed]
            return packer.unpack(model, total, before, replicas=self.replicas)

        return look

    def agree(self, count: int, *, signal_number: int = 0) -> int:
        """See `Team.agree`: as many as the one that would run the fewest.

        Raises:
          WorkerError: if a worker is lost.
        """
        rows = self._gather([count, signal_number, time.monotonic_ns()])
        self._now = rows[0][2] / 1e9
        self.signal = next((row[1] for row in rows if row[1]), self.signal)
        return min(row[0] for row in rows)

    def _gather(self, values: Sequence[int]) -> list[list[int]]:
        """What each worker gives, in their order."""
        table = np.zeros([self.replicas, len(values)], np.int64)
        table[self.index] = values
        with self.noticing():
            gathered = self._sum(tf.constant(table)).numpy().tolist()
        return [[int(value) for value in row] for row in gathered]

    def tell(self, value: Any) -> Any:
        """See `Team.tell`.

        Raises:
          WorkerError: if a worker is lost.
        """
        data = json.dumps(value).encode() if self.is_chief else b""
        return json.loads(self._tell_bytes(data))

    def _tell_bytes(self, data: bytes) -> bytes:
        length = self._gather([len(data)])[0][0]
        # As whole numbers, to which 0 can be added without changing a bit.
        words = np.zeros([-(-length // 8)], np.int64)
        words.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
        with self.noticing():
            total = self._sum(tf.constant(words)).numpy()
        return bytes(total.tobytes()[:length])

    def hand_out(self, variables: Sequence[Any]) -> None:
        """See `Team.hand_out`.

        Raises:
          WorkerError: if a worker is lost.
        """
        arrays = [np.asarray(variable) for variable in variables]
        data = b"".join(array.tobytes() for array in arrays) if self.is_chief else b""
        told = self._tell_bytes(data)
        if self.is_chief:
            return
        for variable, array in zip(variables, arrays, strict=True):
            own, told = told[: array.nbytes], told[array.nbytes :]
            variable.assign(np.frombuffer(own, array.dtype).reshape(array.shape))

    def check_same(self, what: str, values: Mapping[str, Any]) -> None:
        """See `Team.check_same`."""
        theirs = self.tell(values)
        ours = json.loads(json.dumps(values))
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key):
                raise WorkerError(
                    f"{self._cluster.name(self.index)} has {what} with {key}="
                    f"{shown(ours.get(key))}, the chief {shown(theirs.get(key))}: start all "
                    "workers with the same"
                )

    def begin(self, model: Any) -> None:
        """See `Team.begin`."""
        # For the time.
        self.agree(0)
        for variable in model.variables:
            value = tf.convert_to_tensor(variable.value)
            variable.value.assign(_for_replica(variable, value, self.index))

    @contextlib.contextmanager
    def noticing(self) -> Iterator[None]:
        """See `Team.noticing`."""
        try:
            yield
        except _LOSSES as error:
            raise WorkerError(self._describe_loss(str(error))) from None

    def _describe_loss(self, text: str) -> str:
        """Which workers are lost: those where nobody listens, or that TensorFlow has missed."""
        lost = set()
        for index, address in enumerate(self._cluster.addresses):
            if index != self.index:
                try:
                    socket.create_connection(split_address(address), timeout=ANSWER_SECONDS).close()
                except OSError:
                    lost.add(index)
        if not lost and "heartbeat" in text:
            for kind, task in re.findall(r"/job:(chief|worker)/(?:replica:0/)?task:(\d+)", text):
                lost.add(int(task) + (self._cluster.has_chief and kind == "worker"))
        names = ", ".join(map(self._cluster.name, sorted(lost - {self.index})))
        return (
            f"{names or 'another worker'} was lost: to go on from the chief's newest checkpoint "
            "start all workers again with --resume"
        )


def _statistics_of(model: Any) -> list[Any]:
    """What a forward pass may change: the statistics of BatchNorm."""
    return [v for v in model.non_trainable_variables if is_float(v)]


def _for_replica(variable: Any, value: Any, index: int) -> Any:
    """The chief's value, as a replica has it: of a random generator's state another seed."""
    if index == 0 or not variable.path.endswith("seed_generator_state"):
        return value
    # By an odd number of 32 bits, so that the seeds of any two layers stay apart.
    other = tf.constant([index * 0x9E3779B1 % 2**32, 0], tf.uint32)
    return tf.cast(value, tf.uint32) + other


class _Packer:
    """Packs what a replica has found into one vector a dtype, so that one reduction is enough."""

    def pack(
        self, model: Any, loss: Any, sums: Sums, gradients: Sequence[Any], before: Sequence[Any]
    ) -> list[Any]:
        """Returns the vectors.

        Args:
          model: the replica's.
          loss: its mean loss.
          sums: of its share.
          gradients: of its mean loss; None where there is none.
          before: the statistics that all replicas had before.
        """
        changes = [
            tf.convert_to_tensor(variable.value) - tf.cast(old, variable.dtype)
            for variable, old in zip(_statistics_of(model), before, strict=True)
        ]
        self._are_there = [gradient is not None for gradient in gradients]
        given = [tf.convert_to_tensor(g) for g in gradients if g is not None]
        tensors = [tf.convert_to_tensor(t) for t in (loss, *sums, *given, *changes)]
        self._specs = [(t.dtype, t.shape) for t in tensors]
        self._dtypes = list(dict.fromkeys(t.dtype for t in tensors))
        return [
            tf.concat([tf.reshape(t, [-1]) for t in tensors if t.dtype == dtype], 0)
            for dtype in self._dtypes
        ]

    def unpack(
        self, model: Any, vectors: Sequence[Any], before: Sequence[Any], *, replicas: int
    ) -> tuple[Any, Sums, list[Any]]:
        """Returns means of loss and gradients, and total sums; sets the model's statistics.

        Args:
          model: the one that is updated.
          vectors: sums of those that `pack` returned.
          before: the statistics that all replicas had before.
          replicas: how many.
        """
        parts = {}
        for dtype, vector in zip(self._dtypes, vectors, strict=True):
            shapes = [shape for each, shape in self._specs if each == dtype]
            split = tf.split(vector, [shape.num_elements() for shape in shapes])
            parts[dtype] = iter(
                [tf.reshape(part, shape) for part, shape in zip(split, shapes, strict=True)]
            )
        loss, *rest = [next(parts[dtype]) for dtype, _ in self._specs]
        count = len(Sums._fields)
        sums, rest = Sums(*rest[:count]), rest[count:]
        given = iter(rest[: sum(self._are_there)])
        gradients = [next(given) / replicas if is_there else None for is_there in self._are_there]
        changes = rest[sum(self._are_there) :]
        # What has not changed keeps its every bit.
        for variable, old, change in zip(_statistics_of(model), before, changes, strict=True):
            variable.value.assign(old + change / replicas)
        return loss / replicas, sums, gradients
