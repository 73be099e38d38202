"""Near-duplicates among images, by their perceptual hashes: which belong together, and which have one elsewhere."""

from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.data.images import HASH_BYTES

COLOUR_BYTES = 3
# Measured on 1,000 images of each demo task: the nearest two different images differ in 63 of 256 bits, and 99 of 100 images
# from every other in 75 or more. From its own original an image differs in at most 18 as a JPEG of quality 40, in 35 at other
# sizes, in 17 when 15 % brighter (its mean colour by 31), in 45 when shifted by 1 % of its width; in half of the cases in 43
# or fewer when cropped by 2 % on every side.
NEAR_BITS = 56
NEAR_COLOUR = 32
PAIRS_AT_ONCE = 2**23


def groups(hashes: np.ndarray) -> np.ndarray:
    """Number of the group (N,) of every image; near-duplicates of near-duplicates are in one. hashes: (N, HASH_BYTES)."""
    hashes, place = np.unique(hashes, axis=0, return_inverse=True)
    nodes = np.arange(len(hashes))
    first = nodes.copy()  # the first image of the group of each image, as far as is known
    for rows, near in _blocks(hashes, hashes):
        one, other = np.nonzero(near)
        ends = np.concatenate([rows[one], nodes]), np.concatenate([other, first])
        graph = coo_array((np.ones(len(ends[0]), dtype=bool), ends), shape=(len(nodes), len(nodes)))
        number = connected_components(graph, directed=False)[1]
        first = np.unique(number, return_index=True)[1][number]
    return np.unique(first, return_inverse=True)[1][place]


def have_near(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For every image (N,) whether there is a near-duplicate of it among the others. hashes: (N or M, HASH_BYTES)."""
    found = np.zeros(len(hashes), dtype=bool)
    for rows, near in _blocks(hashes, others):
        found[rows] = near.any(axis=1)
    return found


def _blocks(hashes: np.ndarray, others: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A few rows of `hashes` at a time, with which of the others each is near to: (n,), (n, M)."""
    some, all_others = _signs(hashes), _signs(others)
    colours, other_colours = (part[:, -COLOUR_BYTES:].astype(np.int16) for part in (hashes, others))
    step = max(1, PAIRS_AT_ONCE // max(1, len(others)))
    for rows in np.split(np.arange(len(hashes)), range(step, len(hashes), step)):
        near = some[rows] @ all_others.T >= some.shape[1] - 2 * NEAR_BITS
        one, other = np.nonzero(near)
        near[one, other] = (np.abs(colours[rows][one] - other_colours[other]) <= NEAR_COLOUR).all(axis=1)
        yield rows, near


def _signs(hashes: np.ndarray) -> np.ndarray:
    """The bits as -1 and 1, whose product counts those that agree less those that differ: (N, bits) float32."""
    return np.unpackbits(hashes[:, : HASH_BYTES - COLOUR_BYTES], axis=1).astype(np.float32) * 2 - 1
