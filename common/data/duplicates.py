"""Near-duplicates among images, by their perceptual hashes: which belong together, and which have one elsewhere."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.data.hashes import BITS_BYTES
from common.data.threads import CORES, in_order

# Measured on 2,200 photos (aerial views, flowers, waste, weather), at most 160 pixels wide: two that show different things
# differ in 60 bits or more, half of them from every other in 101 or more; the only pair below is one picture and its mirror
# image (10). Of 360 brain scans, all of one kind, 6 % have a near one: other slices, and other patients too.
# Copies of 2,880 real images that are found: all as a JPEG of quality 20 or with 30 % more contrast, 15 % brighter or
# mirrored, 99.9 % at half or one and a half times the size or shifted by 1 % of the width, 98 % shifted by 2 %, 99 % cropped
# by 2 % on every side, mirrored or not, 92 % turned by 2 degrees.
# Missed are most copies that are cropped by 5 % (6 % are found), shifted by 4 % (1 %) or 30 % brighter (55 %, by their
# colour), and frames of a film in which everything moves: of a recording of one scene 45 % of the frames have a near
# one, of scrolling games 10 % or none.
NEAR_BITS = 56
NEAR_COLOUR = 32
ODD_BITS = 4 * BITS_BYTES  # the second half of the bits, which mirroring changes into their opposite
ROWS_AT_ONCE, OTHERS_AT_ONCE = 16, 8192  # pairs that are compared together: what stays in a core's cache
PAIRS_AT_ONCE = 2**22  # near pairs that are kept until groups are joined by them


def groups(hashes: np.ndarray) -> np.ndarray:
    """Number of the group (N,) of every image; near-duplicates of near-duplicates are in one. hashes: (N, HASH_BYTES)."""
    hashes, place = np.unique(hashes, axis=0, return_inverse=True)
    first = np.arange(len(hashes))  # the first image of the group of each image, as far as is known
    waiting, count = [], 0
    for pairs in _near_pairs(hashes, hashes):
        pairs = pairs[:, first[pairs[0]] != first[pairs[1]]]
        waiting.append(pairs)
        count += pairs.shape[1]
        if count > PAIRS_AT_ONCE:
            first, waiting, count = _joined(first, waiting), [], 0
    return np.unique(_joined(first, waiting), return_inverse=True)[1][place]


def have_near(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For every image (N,) whether there is a near-duplicate of it among the others. hashes: (N or M, HASH_BYTES)."""
    found = np.zeros(len(hashes), dtype=bool)
    for rows, _ in _near_pairs(hashes, others):
        found[rows] = True
    return found


def _joined(first: np.ndarray, pairs: list[np.ndarray]) -> np.ndarray:
    """The first image of every image's group (N,), once the groups of both images of each pair (2, P) are one."""
    ends = np.concatenate([np.stack([np.arange(len(first)), first]), *pairs], axis=1)
    graph = coo_array((np.ones(ends.shape[1], dtype=bool), ends), shape=(len(first), len(first)))
    number = connected_components(graph, directed=False)[1]
    return np.unique(number, return_index=True)[1][number]


def _near_pairs(hashes: np.ndarray, others: np.ndarray) -> Iterator[np.ndarray]:
    """Which rows of `hashes` are near to which of `others`: (2, P), some at a time. Within one array, each pair once.

    Both are sorted by the first channel of their mean colours, so that only those are compared which may be near by it.
    """
    some, all_others = _Sorted(hashes), _Sorted(others)

    def near(rows: slice) -> np.ndarray:
        channel = some.colours[rows, 0]
        begin = rows.start if others is hashes else np.searchsorted(all_others.colours[:, 0], channel[0] - NEAR_COLOUR)
        end = np.searchsorted(all_others.colours[:, 0], channel[-1] + NEAR_COLOUR, "right")
        found = [np.empty((2, 0), dtype=np.int64)]
        for start in range(begin, end, OTHERS_AT_ONCE):
            columns = slice(start, min(start + OTHERS_AT_ONCE, end))
            one, other = np.nonzero(_differing(some.words[:, rows], all_others.words[:, columns]) <= NEAR_BITS)
            found.append(np.stack([one + rows.start, other + start]))
        one, other = np.concatenate(found, axis=1)
        alike = (np.abs(some.colours[one] - all_others.colours[other]) <= NEAR_COLOUR).all(axis=1)
        return np.stack([some.order[one[alike]], all_others.order[other[alike]]])

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
