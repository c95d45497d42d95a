"""Copies of one photograph, found by what they show: resized, re-encoded, recoloured, turned or mirrored ones too.

Two steps. Every pair of thumbnails is compared by fine structure, brightness and contrast taken out; what looks alike
is then compared patch by patch, each free to move a little, for copies are often cut or scaled slightly differently.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from melanoma.augment import TURNS, turned
from melanoma.images import THUMBNAIL
from melanoma.parallel import Workers

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy import ndimage, sparse

# Read off the 2150 photographs of ISIC 2017 train and validation: 16 pairs that are the same picture to the eye score
# 0.79 and more, the best of the others 0.58 (one lesion photographed twice), the best of two different lesions 0.55.
SAME = 0.65
ALIKE = 0.30  # correlation of the first step from which a pair is compared patch by patch; the 16 have 0.36 and more

COARSE = 64  # pixels: side of the first step's pictures
EDGE = 8  # pixels of those left out on each side: dark corners and rulers look alike everywhere
DETAIL = 2.0  # pixels of those: structure coarser than this is taken out
STEPS = 40  # of the 8 bits in which a deviation by one local standard deviation is kept
FLAT = 2.0  # grey values: weaker structure than this counts as noise
PATCH, REACH, STRIDE = 20, 6, 15  # pixels of the thumbnail: a patch's side, how far it may move, from one to the next
BLOCK = 256  # pictures compared with as many at a time


@dataclass(frozen=True)
class Match:
    """Two pictures that are one."""

    first: int  # their places in the sequence given
    second: int
    score: float  # median correlation of the patches, up to 1


def structure(picture: np.ndarray, detail: float) -> np.ndarray:
    """Fine structure of a grey picture, in units of the local standard deviation; float32 of its shape."""
    grey = picture.astype(np.float32)
    fine = grey - ndimage.gaussian_filter(grey, detail, mode="nearest")
    return fine / (np.sqrt(ndimage.gaussian_filter(fine**2, 2 * detail, mode="nearest")) + FLAT)


def descriptor(thumbnail: np.ndarray) -> np.ndarray:
    """What the first step compares.

    Args:
        thumbnail: uint8 (THUMBNAIL, THUMBNAIL), grey.

    Returns:
        int8 (COARSE - 2 EDGE, COARSE - 2 EDGE): small, for there are as many as photographs.
    """
    factor = THUMBNAIL // COARSE
    coarse = thumbnail.reshape(COARSE, factor, COARSE, factor).mean(axis=(1, 3))
    fine = structure(coarse, DETAIL)[EDGE:-EDGE, EDGE:-EDGE]
    return np.clip(np.round(STEPS * (fine - fine.mean())), -127, 127).astype(np.int8)


def unit(descriptors: np.ndarray) -> np.ndarray:
    """Rows of float32 and of length 1, or 0 where there is no structure at all."""
    rows = descriptors.reshape(len(descriptors), -1).astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1)


def alike(descriptors: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Pairs of ALIKE correlation: first, second, and the variant of the second that resembles the first most."""
    starts = range(0, len(descriptors), BLOCK)
    for top in starts:
        rows = unit(descriptors[top : top + BLOCK])
        for left in range(top, len(descriptors), BLOCK):
            block = descriptors[left : left + BLOCK]
            correlation = np.stack([rows @ unit(turned(block, variant)).T for variant in range(TURNS)])
            best = correlation.max(axis=0)
            if left == top:
                best = np.triu(best, 1)
            for first, second in np.argwhere(best >= ALIKE):
                yield top + int(first), left + int(second), int(correlation[:, first, second].argmax())


def score(first: np.ndarray, second: np.ndarray) -> float:
    """How much two thumbnails show the same: the median, over patches of the first, of the best correlation nearby.

    Args:
        first: uint8 (THUMBNAIL, THUMBNAIL), grey.
        second: the same; turned as the first.

    Returns:
        -1 to 1; 1 for a picture and itself.
    """
    one, other = (structure(picture, 1.5 * DETAIL) for picture in (first, second))
    windows = sliding_window_view(other, (PATCH, PATCH))
    inner = slice(PATCH // 2, PATCH // 2 + len(windows))  # the filter's centres, for windows by their corners
    mean, square = (ndimage.uniform_filter(values, PATCH)[inner, inner] for values in (other, other**2))
    spread = np.sqrt(np.maximum(square - mean**2, 1e-6))
    found = []
    starts = range(EDGE + REACH, THUMBNAIL - EDGE - REACH - PATCH, STRIDE)
    for top, left in itertools.product(starts, starts):
        patch = one[top : top + PATCH, left : left + PATCH]
        near = slice(top - REACH, top + REACH + 1), slice(left - REACH, left + REACH + 1)
        products = np.tensordot(windows[near], (patch - patch.mean()) / max(patch.std(), 1e-3))
        found.append((products / PATCH**2 / spread[near]).max())
    return float(np.median(found))


def compare(pair: tuple[np.ndarray, np.ndarray]) -> float:
    """`score` of a pair in one argument, for workers."""
    return score(*pair)


def find(thumbnail: Callable[[int], np.ndarray], count: int, workers: Workers) -> list[Match]:
    """The pairs of pictures that are one.

    Args:
        thumbnail: gives the uint8 (THUMBNAIL, THUMBNAIL) of a place, 0 to count - 1; they are not kept.
        count: how many pictures there are. Time grows with its square, memory by 2 kB each.
        workers: who compares what looks alike.

    Returns:
        In order of their places; of pictures with equal thumbnails, each with the first of them only.
    """
    firsts: dict[bytes, int] = {}
    matches, places, descriptors = [], [], []
    for place in range(count):
        picture = thumbnail(place)
        first = firsts.setdefault(hashlib.sha256(picture.tobytes()).digest(), place)
        if first != place:
            matches.append(Match(first, place, 1.0))
        else:
            places.append(place)
            descriptors.append(descriptor(picture))
    pairs = list(alike(np.array(descriptors))) if descriptors else []
    pictures = (
        (thumbnail(places[first]), turned(thumbnail(places[second]), variant)) for first, second, variant in pairs
    )
    for (first, second, _), value in zip(pairs, workers.map(compare, pictures), strict=True):
        if value >= SAME:
            matches.append(Match(places[first], places[second], value))
    return sorted(matches, key=lambda match: (match.first, match.second))


def families(matches: list[Match], count: int) -> list[list[int]]:
    """Places that show the same picture, directly or through others; of `count` in all. Only those with company."""
    links = np.array([(match.first, match.second) for match in matches], dtype=int).reshape(-1, 2).T
    graph = sparse.coo_array((np.ones(links.shape[1]), tuple(links)), shape=(count, count))
    _, family = sparse.csgraph.connected_components(graph, directed=False)
    order = np.argsort(family, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(family[order])) + 1)
    return [group.tolist() for group in groups if len(group) > 1]
