"""The few bits that near-duplicates share."""

import numpy as np
from PIL import Image as PILImage
from scipy.fft import dctn

HASH_SIDE = 16  # of the square of low frequencies that make up the hash
BITS_BYTES = HASH_SIDE**2 // 8
HASH_BYTES = BITS_BYTES + 3
FLAT = 2  # grey levels by which a wave has to stand out: the noise of an evenly coloured image does not


def perceptual_hash(image: PILImage.Image) -> np.ndarray:
    """What re-encoding, resizing and small changes leave nearly as it is: (HASH_BYTES,) uint8.

    Which of the lowest frequencies of the grey image are positive, the mean left out (after pHash: Zauner 2010,
    "Implementation and benchmarking of perceptual image hash functions"), and then the mean colour. The bits of the
    columns 0, 2, 4 ... come first: mirroring leaves these waves as they are and changes the sign of all others.
    """
    grey = np.asarray(image.convert("L").resize((4 * HASH_SIDE, 4 * HASH_SIDE), PILImage.Resampling.BOX), dtype=np.float32)
    waves = dctn(grey, norm="ortho")[:HASH_SIDE, :HASH_SIDE]
    waves[0, 0] = 0
    bits = np.packbits(np.stack([waves[:, ::2], waves[:, 1::2]]) > FLAT)
    colour = np.asarray(image.resize((1, 1), PILImage.Resampling.BOX)).ravel()
    return np.concatenate([bits, colour])
