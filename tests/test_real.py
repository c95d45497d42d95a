"""The challenge's own photographs and ImageNet weights, where they lie beside the repository."""

from pathlib import Path

from melanoma import classifier, images, isic, stages

import numpy as np
import pipeline
import pytest

SHARED = pipeline.ROOT.parent / "shared"
PHOTOGRAPHS = SHARED / "isic2017"
WEIGHTS = SHARED / "weights" / "mobilenet_v2_imagenet_notop.weights.h5"

needs_photographs = pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"{PHOTOGRAPHS} is absent")
needs_weights = pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"{WEIGHTS} is absent")


@needs_photographs
def test_official_splits_have_their_numbers() -> None:
    splits = isic.read_source(PHOTOGRAPHS)
    counts = {split: np.bincount([record.label or 0 for record in records]) for split, records in splits.items()}
    assert counts["train"].tolist() == [1372, 374, 254]
    assert counts["val"].tolist() == [78, 30, 42]
    assert all(record.mask is not None and record.label is not None for split in splits.values() for record in split)


@needs_photographs
def test_preprocessing_of_photographs(tmp_path: Path) -> None:
    flags = ("--source", str(PHOTOGRAPHS), "--limit", "6", "--size", "64", "--copies", "1")
    pipeline.run(stages.PREPROCESSING, tmp_path, *flags)
    store = stages.Store(tmp_path / "data", stages.SEGNET, {})
    assert {"train", "val"} <= set(store.splits())
    for split in ("train", "val"):
        images, masks = store.load("images", split=split), store.load("masks", split=split)
        assert images.shape == (6, 64, 64, 3)
        assert store.load("labels", split=split).tolist() == [0, 1, 2, 0, 1, 2]
        share = masks.mean(axis=(1, 2, 3))
        assert ((share > 0.005) & (share < 0.95)).all()
        inside = masks[..., 0].astype(bool)
        assert images[inside].mean() < images[~inside].mean()  # lesions are darker than skin


@needs_photographs
@needs_weights
def test_imagenet_weights_give_features_that_tell_photographs_apart() -> None:
    records = isic.read_split(PHOTOGRAPHS, "val")[:2]
    photographs = np.stack([images.read_pair(record.image, None, 96).image for record in records])
    backbone = classifier.build_backbone("mobilenetv2", 96, str(WEIGHTS))
    features = classifier.extractor("mobilenetv2", backbone).predict_on_batch(photographs)
    assert features.shape == (2, 1280) and np.isfinite(features).all()
    assert features.min() >= 0 and 0.1 < features.mean() < 3  # ReLU6, and alive
    assert abs(features[0] - features[1]).mean() > 0.05
