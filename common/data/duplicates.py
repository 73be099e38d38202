"""Perceptual hashes of images, and the near-duplicates that they tell: which belong together, and which have one elsewhere."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image as PILImage
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.data.threads import CORES, in_order

HASH_SIDE = 16  # of the square of low frequencies that make up the hash
BITS_BYTES = HASH_SIDE**2 // 8
HASH_BYTES = BITS_BYTES + 3
FLAT = 2  # grey levels by which a wave has to stand out: the noise of an evenly coloured image does not

# Measured on 2,200 photos: two that show different things differ in 60 bits or more. Of copies, nearly all are found that
# are encoded or scaled anew, mirrored, 15 % brighter, or shifted, cropped or turned by 2 %; few that are cropped by 5 %.
NEAR_BITS = 56
NEAR_COLOUR = 32
ODD_BITS = 4 * BITS_BYTES  # the second half of the bits, which mirroring changes into their opposite
ROWS_AT_ONCE, OTHERS_AT_ONCE = 16, 8192  # pairs that are compared together: what stays in a core's cache
PAIRS_AT_ONCE = 2**22  # near pairs that are kept until groups are joined by them


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


def groups(hashes: np.ndarray) -> np.ndarray:
    """Number of the group (N,) of every image; near-duplicates of near-duplicates are in one. hashes: (N, HASH_BYTES)."""
    hashes, inverse = np.unique(hashes, axis=0, return_inverse=True)
    group, waiting, count = np.arange(len(hashes)), [], 0
    for pairs in _near_pairs(hashes, hashes):
        waiting.append(pairs[:, group[pairs[0]] != group[pairs[1]]])
        count += waiting[-1].shape[1]
        if count > PAIRS_AT_ONCE:
            group, waiting, count = _merged(group, waiting), [], 0
    return (_merged(group, waiting) if waiting else group)[inverse]


def have_near(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For every image (N,) whether there is a near-duplicate of it among the others. hashes: (N or M, HASH_BYTES)."""
    found = np.zeros(len(hashes), dtype=bool)
    for rows, _ in _near_pairs(hashes, others):
        found[rows] = True
    return found


def _merged(group: np.ndarray, pairs: list[np.ndarray]) -> np.ndarray:
    """The number of every image's group (N,), once the groups of both images of each pair (2, P) are one."""
    ends = group[np.concatenate(pairs, axis=1)]
    graph = coo_array((np.ones(ends.shape[1], dtype=bool), ends), shape=(group.max() + 1,) * 2)
    return connected_components(graph, directed=False)[1][group]


def _near_pairs(hashes: np.ndarray, others: np.ndarray) -> Iterator[np.ndarray]:
    """Which rows of `hashes` are near to which of `others`: (2, P), some at a time. Within one array, each pair once.

    Both are sorted by the first channel of their mean colours, so that only those are compared which may be near by it.
    """
    ordered, ordered_others = _Sorted(hashes), _Sorted(others)

    def near(rows: slice) -> np.ndarray:
        channel = ordered.colours[rows, 0]
        begin = rows.start if others is hashes else np.searchsorted(ordered_others.colours[:, 0], channel[0] - NEAR_COLOUR)
        end = np.searchsorted(ordered_others.colours[:, 0], channel[-1] + NEAR_COLOUR, "right")
        found = [np.empty((2, 0), dtype=np.int64)]
        for start in range(begin, end, OTHERS_AT_ONCE):
            columns = slice(start, min(start + OTHERS_AT_ONCE, end))
            one, other = np.nonzero(_differing(ordered.words[:, rows], ordered_others.words[:, columns]) <= NEAR_BITS)
            found.append(np.stack([one + rows.start, other + start]))
        one, other = np.concatenate(found, axis=1)
        alike = (np.abs(ordered.colours[one] - ordered_others.colours[other]) <= NEAR_COLOUR).all(axis=1)
        return np.stack([ordered.order[one[alike]], ordered_others.order[other[alike]]])

    with ThreadPoolExecutor(CORES) as pool:
        yield from in_order(pool, near, (slice(start, start + ROWS_AT_ONCE) for start in range(0, len(hashes), ROWS_AT_ONCE)))


class _Sorted:
    """Hashes in the order of their first channel. order: their rows (N,); words: bits (4, N) uint64; colours: (N, 3)."""

    def __init__(self, hashes: np.ndarray):
        self.order = np.argsort(hashes[:, BITS_BYTES], kind="stable")
        hashes = hashes[self.order]
        self.words = np.ascontiguousarray(np.ascontiguousarray(hashes[:, :BITS_BYTES]).view(np.uint64).T)
        self.colours = hashes[:, BITS_BYTES:].astype(np.int16)


def _differing(words: np.ndarray, others: np.ndarray) -> np.ndarray:
    """In how many bits each of some images differs from each of others, or from its mirror image if these are fewer.

    words, others: (4, n or M) uint64. Returns (n, M) uint8.
    """
    differ = np.bitwise_count(words[:, :, None] ^ others[:, None])
    even, odd = differ[0] + differ[1], differ[2] + differ[3]
    return even + np.minimum(odd, ODD_BITS - odd)
