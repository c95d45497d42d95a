"""EfficientNet-Lite: its layers, and that the weights published for other frameworks fit."""

from pathlib import Path

from melanoma.errors import InputError
from melanoma.models import backbones, efficientnet_lite

import keras
import numpy as np
import pytest

SIZE = 32
REAL_SIZE = 96  # at which a trained network has features that are not all 0
WEIGHTS = Path(__file__).parents[3] / "shared" / "weights"
COUNTS = {0: 3_413_024, 2: 4_869_168}  # of weights without the classifier, by variant


def build(variant: int, weights: str = backbones.NONE, pooling: str | None = None) -> keras.Model:
    return backbones.build(f"efficientnetlite{variant}", SIZE, weights, pooling)


@pytest.mark.parametrize("variant", COUNTS)
def test_number_of_weights_is_that_of_the_published_network(variant: int) -> None:
    assert build(variant).count_params() == COUNTS[variant]


@pytest.mark.parametrize(("variant", "blocks"), [(0, 16), (1, 21), (2, 21), (3, 24), (4, 30)])
def test_depth_of_the_first_and_the_last_stage_does_not_grow(variant: int, blocks: int) -> None:
    model = efficientnet_lite.build(variant, None, False, (SIZE, SIZE, 3), None)
    names = [layer.name for layer in model.layers]
    assert sum(name.endswith("_dw_conv") for name in names) == blocks
    assert "block0_expand_conv" not in names and "block1_expand_conv" in names
    assert "block1_add" not in names and "block2_add" in names  # a residual needs equal shapes


@pytest.mark.parametrize(
    ("filters", "width", "expected"),
    [(16, 1.0, 16), (24, 1.1, 24), (40, 1.1, 48), (80, 1.1, 88), (192, 1.2, 232), (320, 1.4, 448), (3, 1.0, 8)],
)
def test_filters_are_multiples_of_eight_at_most_a_tenth_smaller(filters: int, width: float, expected: int) -> None:
    assert efficientnet_lite.round_filters(filters, width) == expected


def test_features_are_pooled_on_request() -> None:
    assert build(0).output_shape == (None, 1, 1, 1280)
    assert build(0, pooling="avg").output_shape == (None, 1280)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet-lite4"])
def test_there_are_no_weights_to_download(name: str) -> None:
    with pytest.raises(InputError, match="no weights to download: use --weights FILE or --weights none"):
        backbones.build(backbones.backbone_name(name), SIZE, backbones.IMAGENET)


@pytest.mark.parametrize("variant", COUNTS)
def test_converted_weights_fit(variant: int) -> None:
    path = WEIGHTS / f"efficientnet_lite{variant}_imagenet_notop_f16.weights.h5"
    if not path.is_file():
        pytest.skip(f"no {path}")
    images = np.random.default_rng(0).uniform(-1, 1, (2, REAL_SIZE, REAL_SIZE, 3)).astype(np.float32)
    features = backbones.build(f"efficientnetlite{variant}", REAL_SIZE, str(path), "avg").predict_on_batch(images)
    assert features.shape == (2, 1280) and 0 <= features.min() < features.max() <= 6  # ends with ReLU6
    assert not np.allclose(features[0], features[1], atol=0.1)
