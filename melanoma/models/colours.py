"""Colour constancy: the colours that an image would have in white light."""

import keras

POWER = 6  # of the mean over the pixels: 1 takes the mean colour for that of the light, infinity the brightest one


def shades_of_grey(images: keras.KerasTensor) -> keras.KerasTensor:
    """Divides the colour channels by the colour of the light, which bright pixels show most.

    Black pixels, as around the lesion in a masked image, do not change the colour of the light.
    Source: Finlayson and Trezzi 2004, Shades of gray and colour constancy.

    Args:
        images: RGB (N, H, W, 3) in [0, 255].

    Returns:
        Same shape and range. Brightness is kept, values above the range are cut.
    """
    scaled = keras.ops.cast(images, "float32") / 255
    light = keras.ops.mean(scaled**POWER, axis=(1, 2), keepdims=True) ** (1 / POWER)
    brightness = keras.ops.sqrt(keras.ops.mean(light**2, axis=-1, keepdims=True))
    return keras.ops.clip(scaled * brightness / keras.ops.maximum(light, 1e-3), 0, 1) * 255
