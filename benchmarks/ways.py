"""The ways of training a net that are compared, each run as a process of its own.

    python benchmarks/ways.py                # a worker: see `worker.serve`; started by step_time.py

The first line on stdin says which way and what it works on: way, model (a name in `nets.NETS`),
precision, batch_size, device, data, data_dir, examples, learning_rate, jit_compile, quick (tiny
sizes: it only has to work).  All ways draw shuffled batches of the same images, and each is written
as well as its library allows: a way that is slow because it was written badly would prove nothing.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

# Everything else is imported by the way that needs it: only its own library may be in a process.
import nets
import worker


class Way:
    """One way of doing the work; made when its spec has come, ready for its first step.

    Args:
      spec: see the module.

    Attributes:
      facts: what it says of itself, as JSON has it.
      loss: the mean loss of the steps of the last round; None where nothing is trained.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.facts: dict[str, Any] = {}
        self.loss: float | None = None

    def round(self, steps: int) -> float:
        """Runs the steps to their end and returns their seconds."""
        raise NotImplementedError

    def last_loss(self) -> float | None:
        """The mean loss of the steps of the last round: not finite if that of any step was not."""
        return self.loss

    def peak_rss_bytes(self) -> int:
        """The most memory the process has had resident so far."""
        return worker.peak_rss_bytes()


def load_dataset(spec: dict[str, Any]) -> Any:
    """The images that all ways use: a `Dataset` of uint8 images and labels."""
    from cifarflow.data.dataset import load_data

    dataset = load_data(spec["data"], spec["data_dir"])
    return dataset.limit(spec["examples"]) if spec.get("examples") else dataset


def get_recipe(model: str, dataset: Any, **changes: Any) -> Any:
    """The recipe that trains a net of `nets.NETS`, every "auto" in it resolved.

    The five lab models are recipes; the others take the lab's settings.  A change to "auto" leaves
    the recipe's own setting.
    """
    from cifarflow.recipes import build, named

    changes = {name: value for name, value in changes.items() if value != "auto"}
    if model == nets.EMPTY:
        changes = {"name": model, **changes}
    elif model not in named.RECIPES:
        changes = {"name": model, "model": model, "model_options": None, **changes}
    recipe = named.get_recipe(model if model in named.RECIPES else "lab_cnn", **changes)
    return build.resolve(recipe, dataset)


def run_timed(runner: Any, steps: int) -> tuple[float, float]:
    """Runs steps of a `StepRunner`: their seconds, and their mean loss."""
    start = time.perf_counter()
    sums = runner.run(steps)
    # Reading the loss waits until the device has finished.
    loss = float(sums.loss)
    return time.perf_counter() - start, loss / float(sums.examples)


class Runs(Way):
    """Whole runs of `cifarflow.train_recipe`.

    Spec: model (a recipe's name), precision, data, data_dir, examples (0 for all).
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        import cifarflow as cf

        self._recipe = cf.get_recipe(
            spec["model"],
            precision=spec["precision"],
            data=spec["data"],
            limit_examples=spec["examples"],
        )
        self._dataset = cf.load_recipe_data(self._recipe, data_dir=spec["data_dir"])


class Cifarflow(Way):
    """The path of `cifarflow.train_recipe`: its batches, its step, its compiled loop."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        from cifarflow.data.pipeline import ArrayBatches
        from cifarflow.models.flops import count_flops
        from cifarflow.recipes import build
        from cifarflow.training.runner import StepRunner
        from cifarflow.training.step import make_train_step

        dataset = load_dataset(spec)
        recipe = get_recipe(
            spec["model"],
            dataset,
            batch_size=spec["batch_size"],
            precision=spec["precision"],
            jit_compile=spec["jit_compile"],
        )
        images, labels = dataset.train
        self._batches = ArrayBatches(images, labels, batch_size=recipe.batch_size, seed=recipe.seed)
        if spec["model"] == nets.EMPTY:
            import keras_models

            self._model = keras_models.build(nets.EMPTY)
        else:
            self._model = build.build_model(
                recipe,
                image_shape=dataset.image_shape,
                num_classes=dataset.num_classes,
                images=images,
            )
        self._optimizer = build.build_optimizer(
            recipe, steps_per_epoch=self._batches.steps_per_epoch
        )
        self._jit_compile = recipe.jit_compile == "true"
        # As `cifarflow.train` does it: one trace, many steps a call.
        step = make_train_step(self._model, self._optimizer, jit_compile=self._jit_compile)
        self._runner = StepRunner(
            step, self._batches, first_step=0, last_step=2**40, jit_compile=self._jit_compile
        )
        self.facts = {
            "parameters": sum(v.shape.num_elements() for v in self._model.trainable_variables),
            "flops_per_image": count_flops(self._model, training=True),
            "jit_compile": self._jit_compile,
        }

    def round(self, steps: int) -> float:
        """Compiled calls as long as the loop's are or longer: one, and one more a new epoch."""
        seconds, self.loss = run_timed(self._runner, steps)
        return seconds

    def profile(self, steps: int) -> dict[str, Any]:
        """Where the time of a step goes: see `cifarflow.profile`."""
        import cifarflow

        found = cifarflow.profile(
            self._model,
            self._optimizer,
            batches=self._batches,
            steps=steps,
            jit_compile=self._jit_compile,
        )
        names = ("step_ms", "input_ms", "host_ms", "device_ms", "bound", "verdict")
        return {name: getattr(found, name) for name in names}


class KerasFit(Way):
    """Keras `fit` on float32 arrays, as a user writes it.

    A round is the second of two epochs of so many steps, timed from its beginning to the end of its
    last step, when its loss is read.  The first is the warm-up, and begins with what `fit` does but
    once in so many steps: arrays become tensors, their iterator is made and shuffles.  The second
    goes on with that iterator.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        import keras
        import keras_models
        import numpy as np

        keras.config.set_dtype_policy(spec["precision"])
        split = load_dataset(spec).train
        most = len(split) // spec["batch_size"]
        # What fills no batch is left out: it would be a step of another shape.
        used = slice(most * spec["batch_size"])
        self._images, self._labels = split.images[used].astype("float32") / 255, split.labels[used]
        if spec["model"] in nets.NORMALISED:
            self._images = (self._images - np.float32(nets.MEAN)) / np.float32(nets.STD)
        # Both epochs of a round draw from one iterator, which ends with the images.
        together = self.choose_steps_per_execution(max(most // 2, 1))
        model = keras_models.build(spec["model"])
        model.compile(
            optimizer=keras_models.make_sgd(spec["learning_rate"]),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            steps_per_execution=together,
        )
        self._model, self._keras, self._traces = model, keras, [0]
        self._count_traces()
        self.facts = {
            "parameters": sum(int(np.prod(v.shape)) for v in model.trainable_variables),
            "multiple": together,
            "max_steps": most,
            "warms_up": True,
        }

    def choose_steps_per_execution(self, max_steps: int) -> int:
        """Keras's own default."""
        return 1

    def _count_traces(self) -> None:
        train_step, traces = self._model.train_step, self._traces

        def counted(data: Any) -> Any:
            traces[0] += 1
            return train_step(data)

        self._model.train_step = counted

    def round(self, steps: int) -> float:
        """Two epochs of `fit`, the second timed; one the first time, when it is the first step."""
        before, times, losses = self._traces[0], [], []

        def note(epoch: int, logs: Any = None) -> None:
            # At the end the logs hold numbers: the device has finished.
            times.append(time.perf_counter())
            losses.append((logs or {}).get("loss"))

        self._model.fit(
            self._images,
            self._labels,
            batch_size=self.spec["batch_size"],
            steps_per_epoch=steps,
            epochs=2 if before else 1,
            verbose=0,
            callbacks=[
                self._keras.callbacks.LambdaCallback(on_epoch_begin=note, on_epoch_end=note)
            ],
        )
        if before and self._traces[0] > before:
            raise RuntimeError(f"Keras traced its step again, {self._traces[0]} times in all")
        self.loss = losses[-1]
        return times[-1] - times[-2]


class KerasFitSpe(KerasFit):
    """Keras `fit` with steps_per_execution."""

    def choose_steps_per_execution(self, max_steps: int) -> int:
        """50, or on a CPU as many as hold 1,600 images: no round is shorter than one call."""
        most = 50 if self.spec["device"] == "gpu" else max(2, 1600 // self.spec["batch_size"])
        return min(50, most, max_steps)


class TorchEager(Way):
    """A PyTorch loop: data resident as uint8, channels-last, fused SGD, nothing read in between."""

    compiled = False

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        import torch
        import torch_models

        from cifarflow.errors import ConfigError

        self._torch = torch
        on_gpu = spec["device"] == "gpu"
        device = torch.device("cuda" if on_gpu else "cpu")
        if on_gpu and not torch.cuda.is_available():
            raise ConfigError("--device=gpu needs a PyTorch built for the GPU: this one is not")
        torch.set_num_threads(worker.count_cores())
        torch.set_flush_denormal(True)  # as TensorFlow does
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # as TensorFlow has it on a GPU
        split = load_dataset(spec).train
        self._images = torch.tensor(split.images, device=device)
        self._labels = torch.tensor(split.labels, dtype=torch.int64, device=device)
        model = torch_models.build(spec["model"]).to(device).train()
        if spec["model"] != "lab_mlp":
            model = model.to(memory_format=torch.channels_last)
        trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.SGD(
            trained, lr=spec["learning_rate"], momentum=0.9, nesterov=True, fused=True
        )
        dtypes = {"mixed_bfloat16": torch.bfloat16, "mixed_float16": torch.float16}
        half = dtypes.get(spec["precision"])
        self._scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)

        def loss_of(images: Any, labels: Any) -> Any:
            with torch.autocast(device.type, dtype=half, enabled=half is not None):
                return torch.nn.functional.cross_entropy(model(images), labels)

        if self.compiled:
            mode = "max-autotune" if on_gpu else "default"
            # For a quick look that it works the minute of a C++ compiler is too long.
            how: Any = {"backend": "aot_eager"} if spec.get("quick") else {"mode": mode}
            loss_of = torch.compile(loss_of, **how)
        self._loss_of, self._device = loss_of, device
        self._indices = self._draw()
        self.facts = {"parameters": torch_models.count_parameters(model)}

    def _draw(self) -> Iterator[Any]:
        """Indices of the batches: a new order every epoch."""
        size = self.spec["batch_size"]
        for _ in itertools.count():
            order = self._torch.randperm(len(self._images), device=self._device)
            yield from order[: len(order) // size * size].split(size)

    def round(self, steps: int) -> float:
        """The training loop; the loss is read once, at the end."""
        torch, optimizer = self._torch, self._optimizer
        start = time.perf_counter()
        total = torch.zeros((), device=self._device)
        for index in itertools.islice(self._indices, steps):
            images = self._images.index_select(0, index)
            loss = self._loss_of(images, self._labels.index_select(0, index))
            optimizer.zero_grad(set_to_none=True)
            self._scaler.scale(loss).backward()
            self._scaler.step(optimizer)
            self._scaler.update()
            total += loss.detach()
        loss_sum = total.item()
        seconds = time.perf_counter() - start
        self.loss = loss_sum / steps
        return seconds


class TorchCompile(TorchEager):
    """The same with the model and loss compiled, forward and backward."""

    compiled = True


class JaxJit(Way):
    """JAX: uint8 images on the device, a jitted step of pure functions, its state donated.

    The layers and the update rule are Keras's, on its JAX backend; see `jax_training.py`.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        on_gpu = spec["device"] == "gpu"
        # All of these are read once, when the libraries are imported.
        os.environ["KERAS_BACKEND"] = "jax"
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several workers share a GPU
        os.environ["PJRT_NPROC"] = str(worker.count_cores())
        os.environ.pop("JAX_PLATFORMS", None)
        if not on_gpu:
            os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        from cifarflow.errors import ConfigError

        if on_gpu and jax.default_backend() != "gpu":
            raise ConfigError("--device=gpu needs a JAX built for the GPU: this one is not")
        import jax_training
        import keras
        import keras_models
        import numpy as np

        keras.config.set_dtype_policy(spec["precision"])
        split = load_dataset(spec).train
        model = jax_training.with_block_pooling(keras_models.build(spec["model"]))
        optimizer: Any = keras_models.make_sgd(spec["learning_rate"])
        if spec["precision"] == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        # Within XLA's loops a CPU has only slow kernels for convolutions: on two cores, batch 32, a
        # step of lab_cnn takes 711 ms in a loop and 60 as a call of its own.  Without convolutions
        # the loop is the faster: 1.95 ms of lab_mlp, against 2.4.
        convolves = any(isinstance(layer, keras.layers.Conv2D) for layer in model.layers)
        in_one_loop = on_gpu or not convolves
        normalised = spec["model"] in nets.NORMALISED
        self._training = jax_training.Training(
            model,
            optimizer,
            jax.device_put(split.images),
            jax.device_put(split.labels.astype(np.int32)),
            batch_size=spec["batch_size"],
            in_one_loop=in_one_loop,
            mean=nets.MEAN if normalised else (0.0,) * 3,
            std=nets.STD if normalised else (1.0,) * 3,
        )
        self.facts = {
            "parameters": sum(int(np.prod(v.shape)) for v in model.trainable_variables),
            "in_one_loop": in_one_loop,
        }

    def round(self, steps: int) -> float:
        """The training loop; the loss is read once, at the end."""
        before = self._training.traces
        start = time.perf_counter()
        self._training.train(steps)
        loss = self._training.mean_loss()
        seconds = time.perf_counter() - start
        if before and self._training.traces > before:
            raise RuntimeError(f"JAX traced its step again, {self._training.traces} times in all")
        self.loss = loss
        return seconds


class Gemm(Way):
    """Products of large square matrices: the most that the machine computes in a precision.

    Spec: precision, device, quick.  A step is one product of the size that was fastest.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        import tensorflow as tf

        self._tf, self._size = tf, 0

        @tf.function
        def products(a: Any, b: Any, count: Any) -> Any:
            # Each product needs the one before, so that none can be left out.
            for _ in tf.range(count):
                a = tf.matmul(a, b)
            return tf.reduce_sum(tf.cast(a[0], tf.float32))

        self._products = products
        sizes = (4096, 8192, 16384) if spec["device"] == "gpu" else (1024, 2048, 4096)
        found: dict[int, float] = {}
        for size in (256,) if spec.get("quick") else sizes:
            self._set(size)
            seconds = self.round(1)
            # A large product of a precision that is emulated takes for ever.
            if seconds > 2 and found:
                break
            found[size] = 2 * size**3 / min(self.round(2) / 2 for _ in range(3))
        self._set(max(found, key=lambda size: found[size]))
        self.facts = {"flops_per_step": 2 * self._size**3, "size": self._size}

    def _set(self, size: int) -> None:
        tf, self._size = self._tf, size
        dtype = self.spec["precision"].removeprefix("mixed_")
        normal = tf.random.stateless_normal([2, size, size], [1, 2])
        # Products keep their size, so no number becomes infinite or denormal.
        self._a, self._b = tf.unstack(tf.cast(normal / size**0.5, dtype))

    def round(self, steps: int) -> float:
        """So many products, one after another."""
        start = time.perf_counter()
        float(self._products(self._a, self._b, self._tf.constant(steps)))
        return time.perf_counter() - start


WAYS: dict[str, type[Way]] = {
    "cifarflow": Cifarflow,
    "keras_fit": KerasFit,
    "keras_fit_spe": KerasFitSpe,
    "torch_eager": TorchEager,
    "torch_compile": TorchCompile,
    "jax_jit": JaxJit,
    "gemm": Gemm,
}


def make_way(spec: dict[str, Any], known: Mapping[str, type[Way]] = WAYS) -> Way:
    """The way that a spec asks for, in a process that has imported no library yet.

    Args:
      spec: see the module; `way` is its name.
      known: the ways by name, these or those of another module.
    """
    if spec["way"] != "jax_jit":
        # TensorFlow imports JAX wherever it is installed, for its converter: that would be in the
        # time to the first step and in the memory of ways that do not use it.
        sys.modules["jax"] = None  # type: ignore[assignment]
    return known[spec["way"]](spec)


if __name__ == "__main__":
    worker.serve(make_way)
