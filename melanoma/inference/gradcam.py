"""Grad-CAM: which parts of an image raise the probability of a class."""

from melanoma.inference.predict import predict
from melanoma.models.classifier import Classifier

import numpy as np


def class_activation(network: Classifier, images: np.ndarray, classes: np.ndarray, batch_size: int) -> np.ndarray:
    """Grad-CAM of one class for each image.

    The head sees the mean of each feature map, so the gradient of a class is the same at every position and needs no
    automatic differentiation, which would differ between Keras backends.

    Args:
        network: the classifier.
        images: uint8 (N, S, S, 3), as the classifier sees them.
        classes: int (N,), the class to explain in each image.
        batch_size: images per network call.

    Returns:
        float32 (N, H, W), scaled to [0, 1] in each image; all 0 if nothing raises the probability.

    Raises:
        InputError: the backbone does not end in average pooling.

    Source: Selvaraju et al. 2017, arXiv 1610.02391.
    """
    features = np.concatenate(list(predict([network.feature_maps], images, batch_size, "")))
    (dense, bias), (weights, _) = (network.head.get_layer(name).get_weights() for name in ("dense", "classes"))
    active = features.mean(axis=(1, 2)) @ dense + bias > 0
    gradient = (active * weights[:, classes].T) @ dense.T
    activation = np.maximum(np.einsum("nhwc,nc->nhw", features, gradient), 0)
    return activation / np.maximum(activation.max(axis=(1, 2), keepdims=True), 1e-12)
