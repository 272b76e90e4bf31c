"""Video frames that show their number, so that a test can tell which one was chosen."""

import numpy as np

SIDE = 64  # 4 x 4 blocks, each a bit of the number


def numbered_frame(number):
    """Returns u8[64, 64, 3] showing the 16 bits of a number as black and white blocks."""
    bits = np.array([(number >> k) & 1 for k in range(16)], np.uint8).reshape(4, 4)
    return np.repeat(np.kron(bits * 255, np.ones((16, 16), np.uint8))[..., None], 3, axis=2)


def frame_number(frame):
    """Returns the number a decoded frame shows."""
    blocks = np.asarray(frame)[..., 0].reshape(4, 16, 4, 16).mean((1, 3)).ravel() > 127
    return int(sum(1 << k for k, bit in enumerate(blocks) if bit))
