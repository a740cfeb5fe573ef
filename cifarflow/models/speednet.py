"""The net of the CIFAR-10 speed records: frozen whitening, then three blocks of convolutions.

    model = speednet(seed=0)                        # 1,973,944 parameters
    set_whitening(model, training_images)           # the first 5,000 of them decide the first layer

    model = speednet(widths=(32, 128, 128), activation="relu")   # a third of the work
    model = speednet(widths=(128, 384, 512), convs_per_block=3, residual=True)  # deeper

`train_recipe` sets the whitening itself, from the images that it trains on.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from cifarflow.errors import ConfigError, DataError, check_float, check_int
from cifarflow.models.layers import (
    LayerFactory,
    channel_statistics,
    check_image_shape,
    check_sizes,
)

_WHITENING = "whitening"
# That of the source.  Keras's 1e-3 would count once the activations have become small; statistics
# are float32 in every precision, so that nothing asks for more.
_BATCH_NORM_EPSILON = 1e-12
# Images whose patches are in memory at once: 25 of CIFAR-10's come to 2.3 MB, which stay in the
# caches of a processor.
_IMAGES_AT_ONCE = 25


def speednet(
    *,
    image_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
    widths: tuple[int, ...] = (64, 256, 256),
    convs_per_block: int = 2,
    residual: bool = False,
    whitening_size: int = 2,
    activation: Any = "gelu",
    batch_norm_momentum: float = 0.6,
    logit_scale: float = 1 / 9,
    logit_stddev: float | None = None,
    dropout: float = 0.0,
    l2: float = 0.0,
    softmax: bool = False,
    dtype_policy: str = "float32",
    seed: int | None = None,
    name: str = "speednet",
) -> Any:
    """Builds whitening -> activation -> a block for each width -> max pool -> dense -> scale.

    A block is conv -> 2x2 max pool -> BatchNorm -> activation, then conv -> BatchNorm ->
    activation once or more, with 3x3 convolutions without bias.  The image's side goes 32, 31, 15,
    7, 3, 1.  Each 3x3 convolution starts as the identity on its first channels, the rest of its
    filters uniform in +-1/sqrt(fan_in), as are the dense layer and the whitening's bias: with no
    bias a filter and its negative would bend at the same place.  BatchNorm shifts and does not
    scale.  The blocks' layers are named from `block1_1_conv` and `block1_1_norm` on.

    The whitening layer, a convolution of 2 * C * whitening_size^2 filters, has a kernel that is
    not trained, and a bias that is.  A builder has no images to compute the kernel from: it starts
    with random orthogonal filters, which keep the length of a patch and whiten nothing, until
    `set_whitening` sets it.  In a model loaded from a `.keras` file the bias is frozen too, as such
    a file says of layers, not of their parts, whether they are trained; so Keras cannot give a
    compiled one its optimiser's velocities back.  Checkpoints of `train` hold everything.

    Args:
      image_shape: (H, W, C) of the images.
      num_classes: outputs, at least 2.
      widths: filters of each block; each block halves the image.
      convs_per_block: convolutions of each block, at least 1.
      residual: whether what the block's first activation gives is added before its last one;
        needs at least two convolutions a block.
      whitening_size: side of the whitening layer's patches, pixels.
      activation: name of a Keras activation, or a callable.
      batch_norm_momentum: weight of BatchNorm's running statistics, in [0, 1).
      logit_scale: constant that the logits are multiplied by, above 0.
      logit_stddev: if given, the dense layer starts uniform with this standard deviation, above 0.
      dropout: rate in [0, 1) before the classifier.
      l2: coefficient of the L2 penalty on every trained kernel.
      softmax: whether the model ends in probabilities instead of logits.
      dtype_policy: Keras dtype policy of every layer.
      seed: seed of initial weights and dropout; None takes Keras's own.
      name: the model's name.

    Returns:
      A functional `keras.Model`: images [B, H, W, C], 0..255 -> logits [B, num_classes].

    Raises:
      ConfigError: if an argument is out of range, or the image too small for the blocks.
      DataError: if image_shape is not three sizes.

    Source: K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024): airbench94;
    with three convolutions and the residual airbench96, with logit_stddev airbench94_muon.
    Different here: the last pool takes all that is left of the image, which for 32x32 pixels is
    the source's 3x3; so that images of other sizes will do.  The whitening's bias starts at random
    as in airbench94_muon; in the other two it starts at 0.
    """
    sizes = check_sizes("widths", widths)
    channels = check_image_shape(image_shape)[-1]
    check_int("whitening_size", whitening_size)
    momentum = check_float(
        "batch_norm_momentum", batch_norm_momentum, maximum=1.0, below_maximum=True
    )
    check_float("logit_scale", logit_scale, above_minimum=True)
    if logit_stddev is not None:
        check_float("logit_stddev", logit_stddev, above_minimum=True)
    convs = check_int("convs_per_block", convs_per_block)
    if not isinstance(residual, bool) or (residual and convs < 2):
        raise ConfigError(
            "residual must be False, or True with convs_per_block >= 2, "
            f"not {residual!r} with {convs}"
        )
    check_float("dropout", dropout, maximum=1.0, below_maximum=True)
    parts = LayerFactory(dtype_policy=dtype_policy, activation=activation, l2=l2, seed=seed)

    def uniform(stddev: float | None = None) -> Any:
        """Draws from +-1/sqrt(fan_in), or with the given standard deviation."""
        if stddev is not None:
            half = 3**0.5 * stddev
            return keras.initializers.RandomUniform(-half, half, seed=parts.next_seed())
        return keras.initializers.VarianceScaling(
            1 / 3, mode="fan_in", distribution="uniform", seed=parts.next_seed()
        )

    # With names of their own, so that rates and freezing can tell the blocks apart.
    def conv(x: Any, width: int, name: str) -> Any:
        return parts.conv(
            x,
            width,
            3,
            padding="same",
            use_bias=False,
            kernel_initializer=uniform(),
            name=f"{name}_conv",
        )

    def normalise(x: Any, name: str) -> Any:
        return parts.batch_norm(
            x, momentum, scale=False, epsilon=_BATCH_NORM_EPSILON, name=f"{name}_norm"
        )

    mean, std = channel_statistics(channels)
    # In float32 whatever the policy: where patches hardly differ the filters enlarge a difference
    # forty times, and with it the rounding of bfloat16.
    exact = LayerFactory(dtype_policy="float32", activation=activation, seed=seed)
    inputs, x = exact.image_input(image_shape, mean=mean, std=std)
    limit = (channels * whitening_size**2) ** -0.5
    x = exact.conv(
        x,
        2 * channels * whitening_size**2,
        whitening_size,
        kernel_initializer=keras.initializers.Orthogonal(seed=parts.next_seed()),
        bias_initializer=keras.initializers.RandomUniform(-limit, limit, seed=parts.next_seed()),
        trainable=False,
        name=_WHITENING,
    )
    x = parts.activate(x)
    for block, width in enumerate(sizes, 1):
        x = conv(x, width, f"block{block}_1")
        if min(x.shape[1:3]) < 2:
            raise ConfigError(
                f"the image is {x.shape[1]}x{x.shape[2]} pixels before a 2x2 pool: "
                "give fewer blocks, or a larger image"
            )
        x = keras.layers.MaxPooling2D(2, dtype=parts.policy)(x)
        x = normalise(x, f"block{block}_1")
        first = x = parts.activate(x)
        for number in range(2, convs + 1):
            x = normalise(conv(x, width, f"block{block}_{number}"), f"block{block}_{number}")
            if residual and number == convs:
                x = keras.layers.Add(dtype=parts.policy)([x, first])
            x = parts.activate(x)
    x = keras.layers.MaxPooling2D(x.shape[1:3], dtype=parts.policy)(x)
    x = parts.dropout(parts.to_vector(x, "flatten"), dropout)
    outputs = parts.classifier(
        x,
        num_classes,
        softmax=softmax,
        use_bias=False,
        kernel_initializer=uniform(logit_stddev),
        scale=logit_scale,
    )
    model = keras.Model(inputs, outputs, name=name)
    # Keras freezes whole layers; what is trained is decided variable by variable all the same.
    model.get_layer(_WHITENING).bias.trainable = True
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D) and layer.name != _WHITENING:
            layer.kernel.assign(_with_identity(layer.kernel.numpy()))
    return model


def _with_identity(kernel: np.ndarray) -> np.ndarray:
    """Makes the first filters of a kernel [K, K, C_in, C_out], K odd, pass one channel each."""
    kernel_size, _, channels, filters = kernel.shape
    count, centre = min(channels, filters), kernel_size // 2
    kernel[..., :count] = 0
    kernel[centre, centre, range(count), range(count)] = 1
    return kernel


def whitening_kernel(
    images: np.ndarray,
    *,
    kernel_size: int = 2,
    num_images: int = 5_000,
    epsilon: float = 5e-4,
) -> np.ndarray:
    """Computes filters whose outputs, over the patches of images, are uncorrelated and of size 1.

    With P the [n, D] matrix of all D = kernel_size^2 * C values of n patches, normalised as
    `speednet` does, the filters are the eigenvectors of P'P / n, each divided by
    sqrt(its eigenvalue + epsilon), by falling eigenvalue, and then their negatives: an activation
    that cuts off one side keeps the other in the second half.

    Args:
      images: [N, H, W, C] uint8, the training images.
      kernel_size: side of the patches, pixels.
      num_images: how many images to use, the first ones; fewer if there are fewer.
      epsilon: added to the eigenvalues, above 0, so that directions in which the patches hardly
        differ are not blown up.

    Returns:
      [kernel_size, kernel_size, C, 2 * D] float32.

    Raises:
      ConfigError: if an argument is out of range.
      DataError: if the images are not [N, H, W, C] uint8, or hold fewer than D patches.

    Source: airbench94's init_whitening_conv.  Different here: the largest entry of each of the
    first D filters is positive, so that the same images give the same filters on every machine.
    """
    size = check_int("kernel_size", kernel_size)
    count = check_int("num_images", num_images)
    epsilon = check_float("epsilon", epsilon, above_minimum=True)
    is_array = isinstance(images, np.ndarray)
    if not is_array or images.dtype != np.uint8 or images.ndim != 4 or not images.shape[3]:
        what = f"{images.dtype} {images.shape}" if is_array else f"{type(images).__name__}"
        raise DataError(f"images must be a uint8 array [N, height, width, channels], not {what}")
    images = images[:count]
    # Of the places in an image where a patch can begin.
    rows, columns = (max(0, side - size + 1) for side in images.shape[1:3])
    channels = images.shape[3]
    length, patch_count = channels * size**2, len(images) * rows * columns
    if patch_count < length:
        raise DataError(
            f"images must hold at least {length} patches of {size}x{size} pixels to whiten by, "
            f"not {patch_count} (their shape is {images.shape})"
        )
    mean, std = channel_statistics(channels)
    places = [(row, column) for row in range(size) for column in range(size)]
    # In 64 bits: the smallest eigenvalues are a ten-thousandth of the largest.
    covariance = np.zeros((length, length))
    factor, offset = 1 / (255 * np.array(std)), np.array(mean) / np.array(std)
    for start in range(0, len(images), _IMAGES_AT_ONCE):
        # Channel by channel, so that what is copied are rows of an image and not single pixels.
        some = images[start : start + _IMAGES_AT_ONCE]
        planes = np.ascontiguousarray(np.moveaxis(some, -1, 0))
        planes = planes * factor[:, None, None, None] - offset[:, None, None, None]
        patches = np.concatenate(
            [planes[..., row : row + rows, column : column + columns] for row, column in places]
        ).reshape(length, -1)
        covariance += patches @ patches.T
    eigenvalues, eigenvectors = np.linalg.eigh(covariance / patch_count)
    # Rounding can leave an eigenvalue of 0 a little below it.
    filters = eigenvectors / np.sqrt(np.maximum(eigenvalues, 0) + epsilon)
    filters = filters[:, ::-1].astype(np.float32)
    filters *= np.sign(filters[np.abs(filters).argmax(0), np.arange(length)])
    kernel = np.concatenate([filters, -filters], axis=1)
    return kernel.reshape(size, size, channels, 2 * length)


def set_whitening(
    model: Any, images: np.ndarray, *, num_images: int = 5_000, epsilon: float = 5e-4
) -> None:
    """Sets the frozen first layer of a `speednet` from training images.

    Call it before training.  All else in the model stays as it is.

    Args:
      model: as `speednet` builds it.
      images: [N, H, W, C] uint8, the training images; C as the model has it.
      num_images: as in `whitening_kernel`.
      epsilon: as in `whitening_kernel`.

    Raises:
      ConfigError: if the model has no whitening layer, or an argument is out of range.
      DataError: if the images are not such, too few, of 0 and 1 alone, or have another number of
        channels.
    """
    layers = [layer for layer in getattr(model, "layers", ()) if layer.name == _WHITENING]
    if not layers:
        raise ConfigError(
            f"model must be a speednet, with a layer {_WHITENING!r}, "
            f"not {getattr(model, 'name', model)!r}"
        )
    [layer] = layers
    kernel = whitening_kernel(
        images, kernel_size=layer.kernel_size[0], num_images=num_images, epsilon=epsilon
    )
    if kernel.shape != tuple(layer.kernel.shape):
        raise DataError(
            f"images must have the {layer.kernel.shape[2]} channels of model {model.name!r}, "
            f"not the shape {images.shape}"
        )
    if images[:num_images].max() == 1:
        raise DataError("images must be pixels of 0..255 to whiten by, and the largest here is 1")
    layer.kernel.assign(kernel)
