"""A Keras model's forward pass by faster kernels: the same mathematics, the same variables.

    forward = fuse(model)
    outputs = forward(images)  # as model(images, training=True)

The model stays as it is: plain Keras layers, plain files.  What changes is which kernels a step of
training or of evaluation is made of, layer by layer, where the layers are known and it pays:

- Rescaling by constants of each channel: along whole rows of the image, since on a CPU TensorFlow
  spreads a few numbers over the channels far more slowly than a row's over the rows.
- BatchNormalization: one fused kernel forward and one back in place of some fifteen passes over
  the activations, and no copy of them in float32 under mixed precision.
- Dropout: a random byte an element (two where the rate asks for it) in place of a float, so a rate
  is as near as 1/65536.
- An activation followed by max pooling: pooled first, so that the activation and its gradient see
  a quarter of the elements.  For activations that never fall the two orders give equal outputs.
  A convolution's own ReLU stays, since it costs nothing at the end of the convolution's kernel;
  only its gradient changes places with that of the pool.
- A convolution followed by max pooling whose windows leave the last row and column out, as 2x2
  windows do of an odd side: those are not computed, on a CPU.
- Max pooling by windows that lie side by side, on a GPU: as a maximum over two axes of the reshaped
  images, which XLA makes one pass with what is around it, and its gradient as a comparison.
- GELU and SiLU: one pass forward and one back, compiled by XLA, in place of a dozen.
- The gradient of a convolution's filters, bfloat16 on a CPU without AMX: as a convolution of its
  own where the kernel made for it is slow, which it is on small images.  Where the activations are
  large it goes before the gradient of the images, not beside it, so that the two do not fight for
  the cache.

Anything else runs as Keras runs it, models inside models too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from cifarflow.device import has_amx, has_gpu

# max(f(x)) = f(max(x)) for these: they never fall.
_RISING = frozenset(
    keras.activations.get(name)
    for name in ("relu", "relu6", "leaky_relu", "elu", "selu", "sigmoid", "softplus", "tanh")
)


def fuse(model: Any, *, training: bool = True) -> Callable[[Any], Any]:
    """Returns the model's training or inference pass, by fused kernels where there are some.

    Args:
      model: a Keras model.  Functional and sequential ones are looked into; any other runs as
        it is.
      training: whether the model trains: dropout drops, BatchNorm takes the batch's statistics.

    Returns:
      A function of the model's inputs that returns what `model(inputs, training=training)` would,
      up to rounding and to which elements dropout draws, and updates the same variables.
    """
    graph: Any = getattr(model, "_functional", model)
    if not _is_known(model) or len(graph.inputs) != 1 or _has_side_effects(model):
        return lambda images: model(images, training=training)
    nodes_by_depth = graph._nodes_by_depth
    nodes = [
        node
        for depth in sorted(nodes_by_depth, reverse=True)
        for node in nodes_by_depth[depth]
        if not node.is_input
    ]
    kernels = _choose_kernels(nodes, graph.outputs, training)

    # Plain Python that runs once, while tracing: there is nothing in it for AutoGraph.
    @tf.autograph.experimental.do_not_convert
    def forward(images: Any) -> Any:
        (given,) = graph.inputs
        values = {id(given): tf.cast(images, given.dtype)}
        for node, kernel in zip(nodes, kernels, strict=True):
            args, kwargs = node.arguments.fill_in(values)
            # A trace knows a layer by its scope; the last slash keeps TensorFlow from numbering it.
            with tf.name_scope(f"{model.name}/{node.operation.name}/"):
                outputs = kernel(*args, **kwargs)
            values.update(
                (id(key), value)
                for key, value in zip(node.outputs, tf.nest.flatten(outputs), strict=True)
            )
        outputs = [values[id(output)] for output in graph.outputs]
        if len(outputs) == 1 and isinstance(graph._outputs_struct, (list, tuple)):
            return outputs[0]  # as Keras does
        return tf.nest.pack_sequence_as(graph._outputs_struct, outputs)

    return forward


def _is_known(model: Any) -> bool:
    """Whether calling the model is running its graph, and nothing of its author's."""
    graph = getattr(model, "_functional", None) or model
    if not hasattr(graph, "_nodes_by_depth"):
        return False
    # Keras's own, by where it was written: the class of functional models has no public name.
    author = next(cls for cls in type(model).__mro__ if "call" in vars(cls))
    return author.__module__.partition(".")[0] == "keras"


def _has_side_effects(model: Any) -> bool:
    """Whether a layer does more than return its outputs, which only Keras's own call minds.

    One is to tell the layers inside that they train, where a layer's own call does not.
    """
    return any(
        getattr(layer, "activity_regularizer", None) is not None
        or isinstance(layer, (keras.layers.Masking, keras.layers.Embedding))
        or (_has_layers_inside(layer) and not getattr(layer, "_call_has_training_arg", False))
        for layer in model._flatten_layers()
        if layer is not model
    )


def _has_layers_inside(layer: Any) -> bool:
    return bool(list(layer._flatten_layers(include_self=False)))


def _choose_kernels(
    nodes: list[Any], outputs: list[Any], training: bool
) -> list[Callable[..., Any]]:
    """A function for each node, in place of calling its operation."""
    readers = Counter(id(tensor) for node in nodes for tensor in node.input_tensors)
    readers.update(id(tensor) for tensor in outputs)
    made_by = {id(tensor): index for index, node in enumerate(nodes) for tensor in node.outputs}
    kernels: list[Callable[..., Any]] = [_kernel_of(node.operation, training) for node in nodes]
    for index, node in enumerate(nodes):
        if type(node.operation) is not keras.layers.MaxPooling2D:
            continue
        (tensor,) = node.input_tensors
        before = made_by.get(id(tensor))
        if before is None or readers[id(tensor)] != 1:
            continue
        layer = nodes[before].operation
        activation = _activation_of(layer)
        unread = _unread(node.operation, layer, tensor.shape)
        if activation in _RISING:
            kernels[before] = _without_activation(layer, unread)
            kernels[index] = _activated_after(node.operation, kernels[index], layer, activation)
        elif any(unread):
            kernels[before] = _convolution(layer, unread)
    return kernels


def _kernel_of(layer: Any, training: bool) -> Any:
    """The fastest equal of calling this layer."""
    if _is_rescaling_of_channels(layer):
        return _rescaling(layer)
    # A frozen BatchNormalization takes its running statistics in training too.
    if _is_plain_batch_norm(layer) and (layer.trainable or not training):
        return _batch_norm(layer, training)
    if training and _is_plain_dropout(layer):
        return _dropout(layer)
    if _is_plain_convolution(layer):
        return _convolution(layer)
    if _is_tiling_pool(layer) and has_gpu():
        return _tiling_pool(layer)
    if type(layer) is keras.layers.Activation and layer.activation in _XLA_ACTIVATIONS:
        activation = _XLA_ACTIVATIONS[layer.activation]
        return lambda inputs: activation(tf.cast(inputs, layer.compute_dtype))
    if isinstance(layer, keras.layers.Layer) and getattr(layer, "_call_has_training_arg", False):
        return lambda *args, **kwargs: layer(*args, **{**kwargs, "training": training})
    return layer


def _unread(pool: Any, layer: Any, shape: Any) -> tuple[int, int]:
    """How many of the last rows and columns of a convolution no window of its pool reaches.

    Args:
      pool: the pooling layer.
      layer: the layer before it, of any kind.
      shape: of what is between them.
    """
    if (
        not _is_plain_convolution(layer)
        or (layer.padding, layer.strides) != ("same", (1, 1))
        or pool.padding != "valid"
        or pool.data_format != "channels_last"
        or has_gpu()  # cuDNN pads both sides alike, and would be given a padded copy
    ):
        return 0, 0
    rows, columns = (
        (side - window) % stride if side else 0
        for side, window, stride in zip(shape[1:3], pool.pool_size, pool.strides, strict=True)
    )
    # Without the padding after the last row a kernel of 3 rows ends one row earlier.
    return min(rows, layer.kernel_size[0] // 2), min(columns, layer.kernel_size[1] // 2)


def _is_rescaling_of_channels(layer: Any) -> bool:
    return (
        type(layer) is keras.layers.Rescaling
        and max(np.ndim(layer.scale), np.ndim(layer.offset)) == 1
        and keras.config.image_data_format() == "channels_last"
    )


def _is_plain_batch_norm(layer: Any) -> bool:
    return (
        type(layer) is keras.layers.BatchNormalization
        and layer.axis in (-1, 3)
        and layer.input_spec.ndim == 4
        and not (layer.renorm or layer.synchronized)
        # What the fused kernel knows.
        and layer.variable_dtype == "float32"
        and layer.compute_dtype in ("float32", "bfloat16", "float16")
    )


def _is_plain_dropout(layer: Any) -> bool:
    return (
        type(layer) is keras.layers.Dropout
        and layer.noise_shape is None
        and 0 < layer.rate <= 1 - 2**-16
    )


def _is_plain_convolution(layer: Any) -> bool:
    return (
        type(layer) is keras.layers.Conv2D
        and layer.groups == 1
        and layer.dilation_rate == (1, 1)
        and layer.data_format == "channels_last"
        and not layer.lora_enabled
        and getattr(layer, "quantization_mode", None) is None
    )


def _is_tiling_pool(layer: Any) -> bool:
    return (
        type(layer) is keras.layers.MaxPooling2D
        and layer.strides == layer.pool_size
        and layer.padding == "valid"
        and layer.data_format == "channels_last"
    )


def _custom_gradient(function: Callable[..., Any]) -> Any:
    """As `tf.custom_gradient`; a trace knows the operations of the gradient by their scope too."""

    def scoped(*args: Any) -> tuple[Any, Callable[[Any], Any]]:
        scope = f"gradient_tape/{tf.get_current_name_scope()}".rstrip("/")
        outputs, gradient = function(*args)

        def scoped_gradient(upstream: Any) -> Any:
            with tf.name_scope(f"{scope}/"):
                return gradient(upstream)

        return outputs, scoped_gradient

    return tf.custom_gradient(scoped)


def _rescaling(layer: Any) -> Callable[[Any], Any]:
    def rescale(inputs: Any) -> Any:
        if inputs.shape.rank != 4 or not inputs.shape[1:].is_fully_defined():
            return layer(inputs)
        *_, height, width, channels = inputs.shape

        def of_a_row(constant: Any) -> Any:
            constant = keras.ops.cast(constant, layer.compute_dtype)
            return tf.tile(tf.broadcast_to(constant, [channels]), [width])

        rows = tf.reshape(tf.cast(inputs, layer.compute_dtype), [-1, height, width * channels])
        rows = rows * of_a_row(layer.scale) + of_a_row(layer.offset)
        return tf.reshape(rows, [-1, height, width, channels])

    return rescale


def _batch_norm(layer: Any, training: bool) -> Callable[[Any], Any]:
    def normalise(inputs: Any, mask: Any = None, **_: Any) -> Any:
        if mask is not None:
            return layer(inputs, training=training, mask=mask)
        inputs = tf.cast(inputs, layer.compute_dtype)
        channels = inputs.shape[-1]
        empty = tf.zeros([0])
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=layer.gamma.value if layer.scale else tf.ones([channels]),
            offset=layer.beta.value if layer.center else tf.zeros([channels]),
            mean=empty if training else layer.moving_mean.value,
            variance=empty if training else layer.moving_variance.value,
            epsilon=layer.epsilon,
            is_training=training,
        )
        if not training:
            return outputs
        # The kernel returns the unbiased variance, for which it divides by n - 1; Keras keeps
        # the biased one.
        count = tf.cast(tf.size(inputs) // channels, tf.float32)
        variance *= tf.maximum(count - 1, 1) / count
        for running, new in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
            running.assign(running * layer.momentum + new * (1 - layer.momentum))
        return outputs

    return normalise


def _dropout(layer: Any) -> Callable[[Any], Any]:
    levels = 256 if (layer.rate * 256).is_integer() else 65536
    dropped = round(layer.rate * levels)
    scale = levels / (levels - dropped)

    def drop(inputs: Any, **_: Any) -> Any:
        inputs = tf.cast(inputs, layer.compute_dtype)
        draws = _random_integers(inputs, layer.seed_generator.next(), levels)
        # In one pass by XLA this is no faster: what it saves, starting its program costs.
        kept = tf.cast(draws >= tf.cast(dropped, draws.dtype), inputs.dtype)
        return inputs * (kept * tf.cast(scale, inputs.dtype))

    return drop


def _random_integers(like: Any, seed: Any, levels: int) -> Any:
    """Integers 0..levels-1 of the shape of `like`; levels is 256 or 65536."""
    dtype = tf.uint8 if levels == 256 else tf.uint16
    a_word = 4 // dtype.size
    words = tf.random.stateless_uniform(
        [-(-tf.size(like) // a_word)],
        tf.cast(seed, tf.int64),
        minval=None,
        maxval=None,
        dtype=tf.uint32,
        alg="philox",
    )
    draws = tf.reshape(tf.bitcast(words, dtype), [-1])
    count = like.shape[1:].num_elements()
    if count is None or count % a_word:
        draws = draws[: tf.size(like)]
    return tf.reshape(draws, tf.shape(like))


def _activation_of(layer: Any) -> Any:
    """The activation that a layer ends in, if the layer can do without; None if there is none."""
    if type(layer) is keras.layers.Activation or _is_plain_convolution(layer):
        return layer.activation
    if type(layer) is keras.layers.ReLU and not (layer.negative_slope or layer.threshold):
        return keras.activations.relu if layer.max_value is None else None
    return None


def _convolution(layer: Any, unread: tuple[int, int] = (0, 0)) -> Callable[[Any], Any]:
    activation = _XLA_ACTIVATIONS.get(layer.activation, layer.activation)
    convolve = _without_activation(layer, unread)
    return lambda inputs: activation(convolve(inputs))


def _without_activation(layer: Any, unread: tuple[int, int] = (0, 0)) -> Callable[[Any], Any]:
    if type(layer) is not keras.layers.Conv2D:
        return lambda inputs: tf.cast(inputs, layer.compute_dtype)
    padding = layer.padding.upper()
    own_gradient = layer.compute_dtype == "bfloat16" and layer.strides == (1, 1) and not has_gpu()

    def convolve(inputs: Any) -> Any:
        dtype = layer.compute_dtype
        inputs, kernel = tf.cast(inputs, dtype), tf.cast(layer.kernel.value, dtype)
        has_sides = inputs.shape[1:3].is_fully_defined()
        is_own = own_gradient and has_sides and inputs.shape[0] is not None
        is_part = any(unread) and has_sides
        pads = _pads_without(kernel.shape, unread) if is_part else padding
        as_convolution = is_own and _is_slow_gradient(inputs.shape, kernel.shape, pads)
        # With AMX its own kernel is the faster one: a step of fast94 takes 0.6 of the time.
        as_convolution = as_convolution and not has_amx()
        if is_own or is_part:
            outputs = _convolve(inputs, kernel, pads, as_convolution=as_convolution)
        else:
            outputs = tf.nn.conv2d(inputs, kernel, layer.strides, padding)
        if layer.use_bias:
            # oneDNN's gradient of the filters has the bias's with it; where there is none, or it is
            # not used, that would be left to TensorFlow's.
            is_alone = is_part or as_convolution or (is_own and not layer.kernel.trainable)
            add = _add_bias if is_alone else tf.nn.bias_add
            outputs = add(outputs, tf.cast(layer.bias.value, dtype))
        return outputs

    return convolve


# Activations of so many elements do not stay in the caches of a processor's core.
_LARGE = 2**20


def _convolve(
    images: Any, kernel: Any, padding: str | list[list[int]], *, as_convolution: bool
) -> Any:
    """`tf.nn.conv2d` with stride 1, its gradients by other kernels or in another order.

    The gradient of the filter at (i, j) sums images[b, y + i, x + j, c] * upstream[b, y, x, f]
    over b, y and x.  That is a convolution of the images by the upstream gradient, with batch and
    channels changed over.

    Args:
      images: a tensor.
      kernel: a tensor.
      padding: "SAME", "VALID", or numbers as `tf.nn.conv2d` takes them.
      as_convolution: computes the gradient of the filters as said, not by the kernel for it.
    """
    by_numbers = not isinstance(padding, str)
    in_order = (images.shape.num_elements() or 0) >= _LARGE
    if not (by_numbers or as_convolution or in_order):
        return tf.nn.conv2d(images, kernel, 1, padding)

    @_custom_gradient
    def convolve(images: Any, kernel: Any) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
        def gradient(upstream: Any) -> tuple[Any, Any]:
            if as_convolution:
                of_kernel = _kernel_gradient(images, kernel, upstream, padding)
            else:
                # The forward pass alone can do with padding by numbers; oneDNN's gradients cannot.
                of_kernel = tf.raw_ops.Conv2DBackpropFilter(
                    input=tf.pad(images, padding) if by_numbers else images,
                    filter_sizes=kernel.shape,
                    out_backprop=upstream,
                    strides=[1, 1, 1, 1],
                    padding="VALID" if by_numbers else padding,
                )
            with tf.control_dependencies([of_kernel] if in_order else []):
                if isinstance(padding, str):
                    of_images = tf.nn.conv2d_transpose(upstream, kernel, images.shape, 1, padding)
                else:
                    of_images = _images_gradient(kernel, upstream, padding)
            return of_images, of_kernel

        return tf.nn.conv2d(images, kernel, 1, padding), gradient

    return convolve(images, kernel)


def _is_slow_gradient(images: Any, kernel: Any, padding: str | list[list[int]]) -> bool:
    """Whether oneDNN's own bfloat16 gradient of the filters is the slower one here.

    Measured once on two Zen 4 cores with AVX512_BF16: square images of 3 to 32 pixels, 16 to 256
    channels, batches of 32 to 512.  The smaller the images, the more its own kernel falls behind.
    """
    batch, height, width, channels = images
    _, rows, columns, _ = _pads(kernel, padding)
    side = max(height + sum(rows) - kernel[0], width + sum(columns) - kernel[1]) + 1
    return bool(channels >= 64 and (side <= 10 or side * side * (batch or math.inf) <= 8192))


def _pads(kernel: Any, padding: str | list[list[int]]) -> list[list[int]]:
    """Padding by numbers, before and after each dimension of the images."""
    if not isinstance(padding, str):
        return padding
    pads = [(side - 1 if padding == "SAME" else 0) for side in kernel[:2]]
    return [[0, 0], *([pad // 2, pad - pad // 2] for pad in pads), [0, 0]]


def _pads_without(kernel: Any, unread: tuple[int, int]) -> list[list[int]]:
    """Padding "SAME" by numbers, for outputs without their last, `unread` rows and columns."""
    pads = zip(_pads(kernel, "SAME")[1:3], unread, strict=True)
    return [[0, 0], *([before, after - spare] for (before, after), spare in pads), [0, 0]]


def _images_gradient(kernel: Any, upstream: Any, padding: list[list[int]]) -> Any:
    # Each image's pixel gets from each output that has seen it: the kernel turned round.
    around = [
        [side - 1 - before, side - 1 - after]
        for side, (before, after) in zip(kernel.shape[:2], padding[1:3], strict=True)
    ]
    turned = tf.transpose(tf.reverse(kernel, [0, 1]), [0, 1, 3, 2])
    return tf.nn.conv2d(upstream, turned, 1, [[0, 0], *around, [0, 0]])


def _kernel_gradient(
    images: Any, kernel: Any, upstream: Any, padding: str | list[list[int]]
) -> Any:
    around = _pads(kernel.shape, padding)
    as_filter = tf.transpose(upstream, [1, 2, 0, 3])
    found = tf.nn.conv2d(tf.transpose(images, [3, 1, 2, 0]), as_filter, 1, around)
    return tf.transpose(found, [1, 2, 0, 3])


@_custom_gradient
def _add_bias(outputs: Any, bias: Any) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
    """`tf.nn.bias_add`, whose gradient sums in float32.

    TensorFlow's own, on a CPU, sums bfloat16 in bfloat16, where a sum some hundred times as large
    as what is added no longer grows.
    """

    def gradient(upstream: Any) -> tuple[Any, Any]:
        rows = tf.reshape(upstream, [-1, upstream.shape[-1]])
        # A product with ones: the kernels of products add in float32, and in one pass.
        return upstream, tf.matmul(tf.ones([1, tf.shape(rows)[0]], rows.dtype), rows)[0]

    return tf.nn.bias_add(outputs, bias), gradient


def _tiling_pool(layer: Any) -> Callable[[Any], Any]:
    rows, columns = layer.pool_size

    def windows(x: Any) -> Any:
        """[B, H, W, C] -> [B, H / rows, rows, W / columns, columns, C]."""
        _, height, width, channels = x.shape
        height, width = height // rows, width // columns
        x = x[:, : height * rows, : width * columns]
        return tf.reshape(x, [-1, height, rows, width, columns, channels])

    @tf.function(jit_compile=True, autograph=False)
    def largest(x: Any) -> Any:
        return tf.reduce_max(windows(x), [2, 4])

    @tf.function(jit_compile=True, autograph=False)
    def gradients(x: Any, upstream: Any) -> Any:
        values = windows(x)
        # The place of the largest; of equals the first has it all, as by TensorFlow's own kernels.
        numbers = tf.reshape(tf.range(rows * columns), [1, 1, rows, 1, columns, 1])
        # So has a NaN, for whoever looks for where one comes from.
        is_largest = values == tf.reduce_max(values, [2, 4], keepdims=True)
        is_largest |= tf.math.is_nan(values)
        first = tf.where(is_largest, numbers, rows * columns)
        first = tf.reduce_min(first, [2, 4], keepdims=True)
        upstream = upstream[:, :, None, :, None]
        found = tf.where(numbers == first, upstream, tf.zeros([], upstream.dtype))
        _, height, width, channels = x.shape
        found = tf.reshape(found, [-1, height // rows * rows, width // columns * columns, channels])
        return tf.pad(found, [[0, 0], [0, height % rows], [0, width % columns], [0, 0]])

    @_custom_gradient
    def pool(x: Any) -> tuple[Any, Callable[[Any], Any]]:
        return largest(x), lambda upstream: gradients(x, upstream)

    def pool_images(inputs: Any) -> Any:
        if not inputs.shape[1:].is_fully_defined():
            return layer(inputs)
        return pool(tf.cast(inputs, layer.compute_dtype))

    return pool_images


def _activated_after(pool: Any, run_pool: Any, layer: Any, activation: Any) -> Callable[[Any], Any]:
    """A pool, run as `_kernel_of` chose, and then the activation that was before it."""
    is_free = activation is keras.activations.relu and type(layer) is keras.layers.Conv2D
    if is_free and run_pool is pool and pool.data_format == "channels_last":
        return lambda inputs: tf.cast(_relu_and_pool(inputs, pool, layer), pool.compute_dtype)
    return lambda inputs: activation(run_pool(inputs))


def _relu_and_pool(inputs: Any, pool: Any, convolution: Any) -> Any:
    windows = {
        "ksize": [1, *pool.pool_size, 1],
        "strides": [1, *pool.strides, 1],
        "padding": pool.padding.upper(),
    }

    @_custom_gradient
    def relu_and_pool(inputs: Any) -> tuple[Any, Callable[[Any], Any]]:
        # In the scope of the convolution, whose kernel it becomes a part of.
        model_scope = tf.get_current_name_scope().rpartition("/")[0]
        with tf.name_scope(f"{model_scope}/{convolution.name}/"):
            rectified = tf.nn.relu(inputs)
        outputs = tf.raw_ops.MaxPool(input=rectified, **windows)

        def gradient(upstream: Any) -> Any:
            # What a pool took from its window is above zero where the pool's output is.
            upstream = tf.raw_ops.ReluGrad(gradients=upstream, features=outputs)
            return tf.raw_ops.MaxPoolGrad(
                orig_input=rectified, orig_output=outputs, grad=upstream, **windows
            )

        return outputs, gradient

    return relu_and_pool(inputs)


def _by_xla(function: Callable[[Any], Any], slope: Callable[[Any], Any]) -> Any:
    """An elementwise function of one pass forward and one back, in float32 if not in float64.

    Args:
      function: of a float32 or float64 tensor.
      slope: its derivative, of the same.
    """

    @tf.function(jit_compile=True, autograph=False)
    def values(x: Any) -> Any:
        return tf.cast(function(_at_least_float32(x)), x.dtype)

    @tf.function(jit_compile=True, autograph=False)
    def gradients(x: Any, upstream: Any) -> Any:
        return tf.cast(slope(_at_least_float32(x)) * _at_least_float32(upstream), x.dtype)

    @_custom_gradient
    def activation(x: Any) -> tuple[Any, Callable[[Any], Any]]:
        return values(x), lambda upstream: gradients(x, upstream)

    return activation


def _at_least_float32(x: Any) -> Any:
    return tf.cast(x, tf.float32) if x.dtype.size < 4 else x


def _normal_cdf(x: Any) -> Any:
    # Its error stays under 1e-7, float32's own; far to the left, where the value is smaller than
    # that, only a complementary erf would do better, and it takes longer.
    return 0.5 * (1 + tf.math.erf(x * math.sqrt(0.5)))


def _gelu(x: Any) -> Any:
    return x * _normal_cdf(x)


def _gelu_slope(x: Any) -> Any:
    return _normal_cdf(x) + x * tf.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _silu(x: Any) -> Any:
    return x * tf.sigmoid(x)


def _silu_slope(x: Any) -> Any:
    share = tf.sigmoid(x)
    return share * (1 + x * (1 - share))


_XLA_ACTIVATIONS = {
    keras.activations.gelu: _by_xla(_gelu, _gelu_slope),
    keras.activations.silu: _by_xla(_silu, _silu_slope),
}
