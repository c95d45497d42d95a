"""The challenge's own photographs and ImageNet weights, where they lie beside the repository."""

import json
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.dataset import decode, duplicates
from melanoma.dataset.cache import Cache
from melanoma.dataset.workers import Workers
from melanoma.models import classifier
from melanoma.sources import isic

import numpy as np
import pandas as pd
import pipeline
import pytest
from PIL import Image

SHARED = pipeline.ROOT.parent / "shared"
PHOTOGRAPHS = SHARED / "isic2017"
WEIGHTS = SHARED / "weights" / "mobilenet_v2_imagenet_notop.weights.h5"

SAME_PICTURES = {  # to the eye; the first four pairs are of train and validation
    *("0012970/0012127", "0000157/0014946", "0000171/0015124", "0000215/0015313"),
    *("0000164/0014795", "0000165/0014788", "0000204/0014748", "0000205/0014742", "0000206/0014739", "0000222/0014846"),
    *("0000224/0014791", "0000225/0014778", "0000229/0014771", "0012290/0013594", "0012672/0012673", "0012756/0013184"),
}
FULL_SIZE = SHARED / "isic2017_fullres"

needs_full_size = pytest.mark.skipif(not FULL_SIZE.is_dir(), reason=f"{FULL_SIZE} is absent")
needs_photographs = pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"{PHOTOGRAPHS} is absent")
needs_weights = pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"{WEIGHTS} is absent")


@needs_photographs
def test_official_splits_have_their_numbers() -> None:
    splits = isic.read_source(PHOTOGRAPHS).records
    counts = {split: np.bincount([record.label or 0 for record in records]) for split, records in splits.items()}
    assert counts["train"].tolist() == [1372, 374, 254]
    assert counts["val"].tolist() == [78, 30, 42]
    assert all(record.mask is not None and record.label is not None for split in splits.values() for record in split)


@needs_photographs
def test_preprocessing_of_photographs(tmp_path: Path) -> None:
    flags = ("--source", str(PHOTOGRAPHS), "--limit", "6", "--size", "64", "--copies", "1")
    pipeline.run(contract.PREPROCESSING, tmp_path, *flags)
    store = Store(tmp_path / "data", contract.SEGNET, {})
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
    photographs = np.stack([decode.read_pair(record.image, None, 96).image for record in records])
    network = classifier.build("mobilenetv2", 96, str(WEIGHTS))
    features = network.extractor().predict_on_batch(photographs)
    assert features.shape == (2, 1280) and np.isfinite(features).all()
    assert features.min() >= 0 and 0.1 < features.mean() < 3  # ReLU6, and alive
    assert abs(features[0] - features[1]).mean() > 0.05


@needs_full_size
@pytest.mark.parametrize("size", [256, 384])
def test_fast_decoding_stays_near_full_decoding(size: int) -> None:
    records = isic.read_split(FULL_SIZE, "val")
    assert len(records) == 11
    for record in records:
        assert record.mask
        pair = decode.read_pair(record.image, record.mask, size)
        with Image.open(record.image) as picture, Image.open(record.mask) as outline:
            full = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
            area = (np.asarray(outline.resize((size, size), Image.Resampling.BILINEAR)) > 127).mean()
        assert abs(full - pair.image).mean() <= 2
        assert pair.mask is not None and pair.mask.mean() == pytest.approx(area, rel=0.005)


@needs_photographs
def test_duplicates_of_the_challenge_are_found(tmp_path: Path) -> None:
    splits = isic.read_source(PHOTOGRAPHS).records
    records = splits["train"] + splits["val"]
    with Workers(None) as workers, Cache(tmp_path, 64) as cache:
        cache.read(records, workers)
        found = duplicates.find(lambda place: cache.thumbnail(records[place]), len(records), workers)
    pairs = {frozenset(records[place].id for place in (match.first, match.second)) for match in found}
    assert pairs == {frozenset(f"ISIC_{number}" for number in pair.split("/")) for pair in SAME_PICTURES}


@needs_photographs
@needs_weights
@pytest.mark.parametrize("shuffled", [False, True])
def test_shuffled_labels_are_not_learnt(tmp_path: Path, shuffled: bool) -> None:
    """Were copies of a judged photograph learnt from, a cross-validation would know even labels that mean nothing."""
    source = tmp_path / "source"
    source.mkdir()
    for path in PHOTOGRAPHS.iterdir():
        if path.is_dir():
            (source / path.name).symlink_to(path)
        elif path.name.endswith("Part3_GroundTruth.csv"):
            table = pd.read_csv(path)
            if shuffled:
                rows = np.random.default_rng(0).permutation(len(table))
                table[table.columns[1:]] = table[table.columns[1:]].to_numpy()[rows]
            table.to_csv(source / path.name, index=False)
    flags = ("--source", str(source), "--limit", "300", "--size", "64", "--copies", "2")
    pipeline.run(contract.PREPROCESSING, tmp_path, *flags)
    pipeline.stand_in_for_segnet(tmp_path)
    pipeline.run(contract.ROI, tmp_path)
    choices = ("--backbone", "mobilenetv2", "--weights", str(WEIGHTS), "--train", "head", "--no-tta")
    pipeline.run(contract.CLASSIFIER, tmp_path, *choices, "--folds", "3", "--epochs", "20", "--batch-size", "64")
    pipeline.run(contract.EVALUATION, tmp_path)
    judged = json.loads((tmp_path / "graphics" / "metrics.json").read_text())["systems"]["mobilenetv2"]["splits"]
    for name in ("melanoma auc", "seborrheic keratosis auc", "mean auc"):
        low, high = judged["train"]["intervals"][name]
        assert low < 0.5 < high if shuffled else low > 0.55


@needs_photographs
def test_pretrained_networks_on_photographs(tmp_path: Path) -> None:
    pipeline.run(contract.PREPROCESSING, tmp_path, "--source", str(PHOTOGRAPHS), "--limit", "30", "--copies", "1")
    pipeline.run(contract.SEGNET, tmp_path, "--pretrained", "--no-tta")
    pipeline.run(contract.ROI, tmp_path)
    pipeline.run(contract.CLASSIFIER, tmp_path, "--pretrained")
    pipeline.run(contract.EVALUATION, tmp_path)
    masks, classes = (
        json.loads((tmp_path / "graphics" / f"{name}.json").read_text()) for name in ("segmentation", "metrics")
    )
    assert masks["splits"]["val"]["metrics"]["jaccard"] > 0.7
    assert classes["systems"]["mobilenetv2"]["splits"]["val"]["metrics"]["mean auc"] > 0.8
