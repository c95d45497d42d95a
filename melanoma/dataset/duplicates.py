"""Finds duplicate images by content: resized, re-encoded, recoloured, rotated and mirrored ones too.

First, coarse thumbnails are compared by fine structure, with brightness and contrast removed: all pairs, or of many
images each with its nearest neighbours. Then similar pairs are compared patch by patch; each patch may shift a little,
because duplicates are often cropped or scaled slightly differently.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from melanoma.dataset import augment, decode
from melanoma.dataset.workers import Workers
from melanoma.log import log, progress

import cv2
import numpy as np
from scipy import sparse

# On the 2150 images of ISIC 2017 train and validation, the 16 pairs that are the same picture to the eye score 0.79 or
# more; the best other pair scores 0.58 (one lesion, imaged twice), the best pair of different lesions 0.55.
DUPLICATE_SCORE = 0.65
SIMILAR_CORRELATION = 0.30  # of coarse thumbnails; pairs from here on are compared by patches. Those 16: 0.36 or more

COARSE_SIDE = 64  # pixels: side of the coarse thumbnails
MARGIN = 8  # pixels ignored on each side: dark corners and rulers look alike in all images
DETAIL = 2.0  # pixels: standard deviation of the Gaussian that separates fine from coarse structure
STEPS = 40  # int8 steps per local standard deviation in a descriptor
NOISE = 2.0  # grey values: structure weaker than this counts as noise
PATCH = 20  # pixels: side of a patch
MAX_SHIFT = 6  # pixels a patch may shift in each direction
MIN_DEVIATION = 1e-3  # standard deviation of a patch; a uniform patch matches nothing
STRIDE = 15  # pixels from one patch to the next
BLOCK = 256  # descriptors compared with as many others at a time; limits the memory
# Of the search for neighbours. Values from the images of ISIC 2017 and HAM10000, see docs/results.md.
ALL_PAIRS = 20_000  # images up to which all pairs are compared, which takes minutes
COMPONENTS = 128  # principal components of the descriptors
NEIGHBOURS = 10  # of each image, in each of its flips and quarter turns
SAMPLE = 20_000  # descriptors to which the components are fitted
PER_LIST = 64  # descriptors for each list of the index to which it is fitted
PROBES = 32  # lists that are searched


@dataclass(frozen=True)
class Match:
    """Two images that show the same picture."""

    first: int  # positions in the sequence of images
    second: int
    score: float  # see `score`; 1 for equal thumbnails


def structure(image: np.ndarray, detail: float) -> np.ndarray:
    """Fine structure of a grey image in units of the local standard deviation.

    Args:
        image: uint8 or float (H, W).
        detail: standard deviation in pixels of the Gaussian that removes coarse structure.

    Returns:
        float32 (H, W).
    """
    grey = image.astype(np.float32)
    fine = grey - blur(grey, detail)
    return fine / (np.sqrt(blur(fine**2, 2 * detail)) + NOISE)


def blur(image: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian of a standard deviation in pixels, cut at four of them."""
    side = 2 * round(4 * deviation) + 1
    return cv2.GaussianBlur(image, (side, side), deviation, borderType=cv2.BORDER_REPLICATE)


def descriptor(thumbnail: np.ndarray) -> np.ndarray:
    """What the first step compares: fine structure of the coarse thumbnail, without its margin.

    Args:
        thumbnail: uint8 (THUMBNAIL, THUMBNAIL), grey.

    Returns:
        int8 (COARSE_SIDE - 2 MARGIN, COARSE_SIDE - 2 MARGIN); int8 because all images' descriptors are in memory.
    """
    factor = decode.THUMBNAIL // COARSE_SIDE
    coarse = thumbnail.reshape(COARSE_SIDE, factor, COARSE_SIDE, factor).mean(axis=(1, 3))
    fine = structure(coarse, DETAIL)[MARGIN:-MARGIN, MARGIN:-MARGIN]
    return np.clip(np.round(STEPS * (fine - fine.mean())), -127, 127).astype(np.int8)


def normalize(descriptors: np.ndarray) -> np.ndarray:
    """Descriptors as rows of length 1, float32 (N, pixels); rows without any structure stay 0."""
    rows = descriptors.reshape(len(descriptors), -1).astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1)


def similar_pairs(descriptors: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Pairs of descriptors with at least SIMILAR_CORRELATION in one of the flips and quarter turns.

    Args:
        descriptors: int8 (N, side, side).

    Yields:
        Positions of first and second, first < second, and the view (see `augment.flip_rotate`) of the second that is
        most similar to the first.
    """
    for top in range(0, len(descriptors), BLOCK):
        rows = normalize(descriptors[top : top + BLOCK])
        for left in range(top, len(descriptors), BLOCK):
            block = descriptors[left : left + BLOCK]
            correlation = np.stack(
                [rows @ normalize(augment.flip_rotate(block, view)).T for view in range(augment.VIEWS)]
            )
            best = correlation.max(axis=0)
            if left == top:
                best = np.triu(best, 1)
            for first, second in np.argwhere(best >= SIMILAR_CORRELATION):
                yield top + int(first), left + int(second), int(correlation[:, first, second].argmax())


def nearby_pairs(descriptors: np.ndarray) -> list[tuple[int, int, int]]:
    """As `similar_pairs`, of each descriptor and its nearest neighbours only; needs faiss.

    The neighbours are found in an inverted file: descriptors are divided into lists by k-means, 4 sqrt(N) of them, and
    PROBES lists are searched.
    """
    import faiss
    from sklearn.decomposition import PCA

    count, rng = len(descriptors), np.random.default_rng(0)
    components = PCA(COMPONENTS, whiten=True, svd_solver="covariance_eigh")
    components.fit(normalize(descriptors[np.sort(rng.permutation(count)[:SAMPLE])]))

    def compact(part: np.ndarray) -> np.ndarray:
        rows = components.transform(normalize(part)).astype(np.float32)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), MIN_DEVIATION)

    lists = round(4 * math.sqrt(count))
    index: Any = faiss.index_factory(COMPONENTS, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(compact(descriptors[np.sort(rng.permutation(count)[: PER_LIST * lists])]))
    for top in range(0, count, BLOCK):
        index.add(compact(descriptors[top : top + BLOCK]))
    index.nprobe = PROBES
    found = []  # first, second, view of the second, correlation
    for top in progress(range(0, count, BLOCK), "looking for duplicates", math.ceil(count / BLOCK)):
        part = descriptors[top : top + BLOCK]
        for view in range(augment.VIEWS):
            turned = augment.flip_rotate(part, view)
            neighbours = index.search(compact(turned), NEIGHBOURS + 1)[1]  # one of them may be the image itself
            rows, columns = np.nonzero((neighbours >= 0) & (neighbours != top + np.arange(len(part))[:, None]))
            ones, others = top + rows, neighbours[rows, columns]
            correlation = (normalize(turned)[rows] * normalize(descriptors[others])).sum(axis=1)
            views = np.where(ones > others, view, view if view >= 4 else -view % 4)  # `undo_flip_rotate` as a view
            table = np.stack([np.minimum(ones, others), np.maximum(ones, others), views, correlation], axis=1)
            found.append(table[correlation >= SIMILAR_CORRELATION])
    pairs = np.concatenate(found)
    pairs = pairs[np.lexsort([-pairs[:, 3], pairs[:, 1], pairs[:, 0]])]  # the best view of each pair first
    _, first_rows = np.unique(pairs[:, :2], axis=0, return_index=True)
    return [(int(first), int(second), int(view)) for first, second, view, _ in pairs[first_rows]]


def find_pairs(descriptors: np.ndarray) -> list[tuple[int, int, int]]:
    """As `similar_pairs`: among all pairs, or of more than ALL_PAIRS descriptors among nearest neighbours."""
    if len(descriptors) > ALL_PAIRS:
        try:
            return nearby_pairs(descriptors)
        except ImportError:
            log.warning(
                "warning: the search for duplicates among %d images takes long without faiss: pip install -r "
                "requirements/many.txt",
                len(descriptors),
            )
    return list(similar_pairs(descriptors))


def score(first: np.ndarray, second: np.ndarray) -> float:
    """Similarity of two thumbnails: median over the first one's patches of the best correlation nearby in the second.

    Args:
        first: uint8 (THUMBNAIL, THUMBNAIL), grey.
        second: the same, in the orientation of the first.

    Returns:
        -1 to 1; 1 for identical thumbnails.
    """
    one, other = (structure(image, 1.5 * DETAIL) for image in (first, second))
    correlations = []
    starts = range(MARGIN + MAX_SHIFT, decode.THUMBNAIL - MARGIN - MAX_SHIFT - PATCH, STRIDE)
    for top, left in itertools.product(starts, starts):
        patch = one[top : top + PATCH, left : left + PATCH]
        rows, columns = (slice(start - MAX_SHIFT, start + PATCH + MAX_SHIFT) for start in (top, left))
        nearby = cv2.matchTemplate(other[rows, columns], patch, cv2.TM_CCOEFF_NORMED)
        correlations.append(nearby.max() if patch.std() > MIN_DEVIATION else 0)  # OpenCV returns 1 if uniform
    return float(np.median(correlations))


def score_pair(pair: tuple[np.ndarray, np.ndarray]) -> float:
    """`score` with one argument, for workers."""
    return score(*pair)


def find(thumbnail: Callable[[int], np.ndarray], count: int, workers: Workers) -> list[Match]:
    """Finds the pairs of images that show the same picture.

    Args:
        thumbnail: returns the grey thumbnail, uint8 (THUMBNAIL, THUMBNAIL), of an image from 0 to count - 1. It is
            called again for similar pairs, because thumbnails are not kept in memory.
        count: number of images. Memory grows by 3 kB per image; time see docs/data.md.
        workers: processes that compare similar pairs.

    Returns:
        Matches sorted by position. Among images with equal thumbnails, each is matched with the first only.
    """
    first_by_digest: dict[bytes, int] = {}
    matches, distinct, descriptors = [], [], []
    for position in range(count):
        image = thumbnail(position)
        first = first_by_digest.setdefault(hashlib.sha256(image.tobytes()).digest(), position)
        if first != position:
            matches.append(Match(first, position, 1.0))
        else:
            distinct.append(position)
            descriptors.append(descriptor(image))
    pairs = find_pairs(np.array(descriptors))
    thumbnails = (
        (thumbnail(distinct[first]), augment.flip_rotate(thumbnail(distinct[second]), view))
        for first, second, view in pairs
    )
    for (first, second, _), similarity in zip(pairs, workers.map(score_pair, thumbnails), strict=True):
        if similarity >= DUPLICATE_SCORE:
            matches.append(Match(distinct[first], distinct[second], similarity))
    return sorted(matches, key=lambda match: (match.first, match.second))


def components(links: Sequence[tuple[int, int]], count: int) -> np.ndarray:
    """Numbers the groups of images that are linked directly or through others.

    Args:
        links: pairs of images 0 to count - 1.
        count: number of images.

    Returns:
        int (count,): equal for images of one group.
    """
    ends = np.array(links, dtype=int).reshape(-1, 2).T
    graph = sparse.coo_array((np.ones(ends.shape[1]), tuple(ends)), shape=(count, count))
    return sparse.csgraph.connected_components(graph, directed=False)[1]
