"""Pixels of an encoder's patches as it was trained on them."""

import jax.numpy as jnp

HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
CLIP = dict(
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def normalise(pixels, mean, std):
    """Returns f32[..., C*p*p]: (pixels / 255 - mean) / std of raw u8, floating ones as they are.

    Args:
      pixels: [..., C*p*p], channel-major rows.
      mean, std: one number for each channel, of pixels between 0 and 1.
    """
    if jnp.issubdtype(pixels.dtype, jnp.floating):
        return pixels.astype(jnp.float32)
    area = pixels.shape[-1] // len(mean)
    scale, shift = (
        jnp.repeat(jnp.asarray(x, jnp.float32), area, total_repeat_length=pixels.shape[-1])
        for x in ([255 * s for s in std], [m / s for m, s in zip(mean, std, strict=True)])
    )
    return pixels.astype(jnp.float32) / scale - shift
