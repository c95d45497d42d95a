"""Whether the classifier looks at the lesion: the same network without it, and with nothing but it; Grad-CAM."""

from collections.abc import Iterator

from melanoma import images, plots, stages
from melanoma.classifier import Classifier
from melanoma.errors import InputError
from melanoma.isic import CLASSES

import keras
import numpy as np
from scipy import ndimage

MARGIN = 0.03  # of the frame's side, added to a lesion that is blanked out: its rim would give it away
AS_TRAINED, BLANKED, ALONE = "as trained", "lesion blanked out", "lesion alone"
VARIANTS = (AS_TRAINED, BLANKED, ALONE)


def variants(roi: str) -> tuple[str, ...]:
    """Those of VARIANTS that tell anything: a background that is black anyway is nothing to take away."""
    return VARIANTS[:2] if roi == "mask" else VARIANTS


def alter(image: np.ndarray, mask: np.ndarray, variant: str) -> np.ndarray:
    """A photograph with its lesion, or everything but it, in the mean colour of the skin around.

    Args:
        image: uint8 (S, S, 3).
        mask: uint8 (S, S, 1), {0, 1}; empty or full, the photograph stays as it is.
        variant: one of VARIANTS.

    Returns:
        uint8 (S, S, 3).
    """
    if variant == AS_TRAINED or not mask.any() or mask.all():
        return image
    steps = max(1, round(MARGIN * len(image)))
    wide = ndimage.binary_dilation(mask[..., 0], iterations=steps)
    skin = image[~wide].mean(axis=0) if not wide.all() else image[mask[..., 0] == 0].mean(axis=0)
    gone = wide if variant == BLANKED else mask[..., 0] == 0
    return np.where(gone[..., None], skin.round().astype(np.uint8), image)


def outlined(store: stages.Store, split: str) -> np.ndarray:
    """Rows whose predicted mask outlines something, int (K,): without one there is nothing to take away."""
    shares = [block.mean(axis=(1, 2, 3)) for block in store.blocks("predicted", split=split)]
    return np.flatnonzero((np.concatenate(shares) > 0) & (np.concatenate(shares) < 1))


def altered(store: stages.Store, split: str, variant: str, roi: str) -> Iterator[np.ndarray]:
    """Altered photographs as the classifier sees them, uint8 (B, S, S, 3), a block at a time."""
    for block, masks in zip(store.blocks("images", split=split), store.blocks("predicted", split=split), strict=True):
        pairs = zip(block, masks, strict=True)
        yield np.stack([images.region_of_interest(alter(image, mask, variant), mask, roi)[0] for image, mask in pairs])


def class_activation(network: Classifier, photographs: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Grad-CAM: where the evidence for a class lies.

    The head sees the mean of each feature map, so a class's gradient is the same at every place and is written down
    rather than asked of the backend.

    Args:
        network: the classifier.
        photographs: uint8 (N, S, S, 3), as it sees them.
        classes: int (N,), the class to explain of each.

    Returns:
        float32 (N, H, W), 0 to 1 in each image; all 0 where nothing speaks for the class.

    Raises:
        InputError: the head does not see the plain mean of feature maps.

    Source: Selvaraju et al. 2017, arXiv 1610.02391.
    """
    backbone = network.backbone
    if not isinstance(backbone.layers[-1], keras.layers.GlobalAveragePooling2D):
        raise InputError(f"--probe: no Grad-CAM of {network.name}, which does not end in average pooling")
    maps = keras.Model(backbone.input, backbone.layers[-1].input)  # before the pooling
    shown = network.preprocess(keras.ops.cast(photographs, "float32"))
    features = np.asarray(maps.predict_on_batch(shown))
    hidden, last = (network.head.get_layer(name).get_weights() for name in ("dense", "classes"))
    active = features.mean(axis=(1, 2)) @ hidden[0] + hidden[1] > 0
    gradient = (active * last[0][:, classes].T) @ hidden[0].T
    found = np.maximum(np.einsum("nhwc,nc->nhw", features, gradient), 0)
    return found / np.maximum(found.max(axis=(1, 2), keepdims=True), 1e-12)


def telling_cases(labels: np.ndarray, probabilities: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Rows worth a look: the surest that are right, the surest that are wrong, and the least sure; `count` of each."""
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    order = np.argsort(-sure, kind="stable")
    return {
        "surest right": order[right[order]][:count],
        "surest wrong": order[~right[order]][:count],
        "least sure": order[::-1][:count],
    }


def explained(
    network: Classifier,
    photographs: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    kind: str,
    rows: np.ndarray,
) -> list[plots.Tile]:
    """Photographs with the evidence for their likeliest class laid over, named by what they are and are taken for."""
    likeliest = probabilities.argmax(axis=1)
    heat = class_activation(network, photographs[rows], likeliest[rows])
    return [
        plots.Tile(
            photographs[row],
            f"{kind}: {CLASSES[labels[row]]},\ntaken for {CLASSES[likeliest[row]]} ({probabilities[row].max():.2f})",
            heat=one,
        )
        for row, one in zip(rows, heat, strict=True)
    ]
