"""Real images of the challenge and ImageNet weights, where they are stored beside the repository."""

import json
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.classes import KERATOSIS, MELANOMA
from melanoma.dataset import decode, duplicates, masks
from melanoma.dataset.cache import Cache
from melanoma.dataset.splits import interleave
from melanoma.dataset.workers import Workers
from melanoma.metrics import bootstrap
from melanoma.models import classifier
from melanoma.sources import reader as source_reader
from melanoma.sources.layouts import challenge_2017

import numpy as np
import pandas as pd
import pipeline
import pytest
from PIL import Image
from pipeline import reader

SHARED = pipeline.ROOT.parent / "shared"
SOURCE = SHARED / "isic2017"
FULL_SIZE = SHARED / "isic2017_fullres"
WEIGHTS = SHARED / "weights" / "mobilenet_v2_imagenet_notop.weights.h5"

COLUMNS = {MELANOMA: "melanoma", KERATOSIS: "seborrheic_keratosis"}
DRAWS = 1000
DUPLICATES = {  # found by eye; the first four pairs are of train and validation
    *("0012970/0012127", "0000157/0014946", "0000171/0015124", "0000215/0015313"),
    *("0000164/0014795", "0000165/0014788", "0000204/0014748", "0000205/0014742", "0000206/0014739", "0000222/0014846"),
    *("0000224/0014791", "0000225/0014778", "0000229/0014771", "0012290/0013594", "0012672/0012673", "0012756/0013184"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCE.is_dir(), reason="the images of the challenge are absent"),
]
needs_full_size = pytest.mark.skipif(not FULL_SIZE.is_dir(), reason="the full-size images are absent")
needs_weights = pytest.mark.skipif(not WEIGHTS.is_file(), reason="the ImageNet weights are absent")


@pytest.fixture(autouse=True)
def many_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests need no precise intervals."""
    monkeypatch.setattr(bootstrap, "DRAWS", DRAWS)


def metrics(folder: Path, split: str) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics of the only classifier in a finished chain, and their intervals."""
    (system,) = json.loads((folder / "graphics" / "metrics.json").read_text())["systems"].values()
    found = system["splits"][split]
    return found["metrics"], found["intervals"]


def test_official_splits_have_their_class_counts() -> None:
    records = source_reader.read(SOURCE).splits
    counts = {split: np.bincount([record.label or 0 for record in found]).tolist() for split, found in records.items()}
    assert counts["train"] == [1372, 374, 254]
    assert counts["val"] == [78, 30, 42]
    assert all(record.mask is not None and record.label is not None for found in records.values() for record in found)


def test_arrays_of_real_images_are_plausible(tmp_path: Path) -> None:
    flags = ("--source", str(SOURCE), "--limit", "6", "--size", "64", "--copies", "1")
    pipeline.run(contract.PREPROCESSING, tmp_path, *flags)
    store = reader(tmp_path)
    assert {"train", "val"} <= set(store.splits())
    for split in ("train", "val"):
        images, masks = store.load("images", split=split), store.load("masks", split=split)
        assert images.shape == (6, 64, 64, 3)
        assert store.load("labels", split=split).tolist() == [0, 1, 2, 0, 1, 2]
        area = masks.mean(axis=(1, 2, 3))
        assert ((area > 0.005) & (area < 0.95)).all()
        inside = masks[..., 0].astype(bool)
        assert images[inside].mean() < images[~inside].mean()  # lesions are darker than skin


@needs_weights
def test_features_with_imagenet_weights_differ_between_images() -> None:
    records = pipeline.records(SOURCE, "val")[:2]
    images = np.stack([decode.read_pair(record.image, None, 96).image for record in records])
    network = classifier.build("mobilenetv2", 96, str(WEIGHTS))
    features = network.extractor().predict_on_batch(images)
    assert features.shape == (2, 1280) and np.isfinite(features).all()
    assert features.min() >= 0 and 0.1 < features.mean() < 3  # after ReLU6
    assert abs(features[0] - features[1]).mean() > 0.05


@needs_full_size
@pytest.mark.parametrize("size", [256, 384])
def test_scaled_decoding_is_close_to_full_decoding(size: int) -> None:
    records = pipeline.records(FULL_SIZE, "val")
    assert len(records) == 11
    for record in records:
        assert record.mask
        decoded = decode.read_pair(record.image, record.mask, size)
        with Image.open(record.image) as image, Image.open(record.mask) as mask:
            full = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
            area = (np.asarray(mask.resize((size, size), Image.Resampling.BILINEAR)) > masks.THRESHOLD).mean()
        assert abs(full - decoded.image).mean() <= 2
        assert decoded.mask is not None and decoded.mask.mean() == pytest.approx(area, rel=0.005)


def test_duplicates_of_the_challenge_are_found_and_nothing_else(tmp_path: Path) -> None:
    source = source_reader.read(SOURCE).splits
    records = source["train"] + source["val"]
    cache = Cache(tmp_path, 64)
    with Workers(None) as workers:
        cache.read(records, workers)
        matches = duplicates.find(lambda position: cache.thumbnail(records[position]), len(records), workers)
    pairs = {frozenset(records[position].id for position in (match.first, match.second)) for match in matches}
    assert pairs == {frozenset(f"ISIC_{number}" for number in pair.split("/")) for pair in DUPLICATES}


def write_train_source(source: Path, count: int, shuffled: bool) -> None:
    """Writes a source of the first train images, of all classes; their labels are shuffled on request.

    The images are chosen first. `--limit` on shuffled labels would take rare classes from higher ids than frequent
    ones, and ids tell where images were made.
    """
    records = interleave(pipeline.records(SOURCE, "train"))[:count]
    images, masks = challenge_2017.image_folder(source, "train"), challenge_2017.mask_folder(source, "train")
    for folder in (images, masks):
        folder.mkdir(parents=True)
    for record in records:
        assert record.mask
        (images / record.image.name).symlink_to(record.image)
        (masks / record.mask.name).symlink_to(record.mask)
    labels = np.array([record.label for record in records])
    if shuffled:
        labels = np.random.default_rng(0).permutation(labels)
    truth = {column: (labels == label).astype(float) for label, column in COLUMNS.items()}
    pd.DataFrame({"image_id": [record.id for record in records]} | truth).to_csv(
        challenge_2017.label_file(source, "train"), index=False
    )


@needs_weights
@pytest.mark.parametrize("shuffled", [False, True])
def test_cross_validation_predicts_true_labels_but_not_shuffled_ones(tmp_path: Path, shuffled: bool) -> None:
    """With augmented copies of evaluated images among the training images, the AUC of shuffled labels is 0.76."""
    write_train_source(tmp_path / "source", 200, shuffled)
    flags = ("--source", str(tmp_path / "source"), "--size", "64", "--copies", "4")
    pipeline.run(contract.PREPROCESSING, tmp_path, *flags)
    pipeline.use_true_masks(tmp_path)
    pipeline.run(contract.ROI, tmp_path)
    network = (
        "--backbone",
        "mobilenetv2",
        "--weights",
        str(WEIGHTS),
        "--train",
        "head",
        "--views",
        "1",
        "--folds",
        "3",
    )
    training = ("--epochs", "20", "--learning-rate", "3e-3", "--batch-size", "64")
    pipeline.run(contract.CLASSIFIER, tmp_path, *network, *training)
    pipeline.run(contract.EVALUATION, tmp_path)
    _, intervals = metrics(tmp_path, "train")
    for name in ("melanoma auc", "seborrheic keratosis auc", "mean auc"):
        low, high = intervals[name]
        assert low < 0.5 < high if shuffled else low > 0.55


def test_pretrained_networks_work_on_real_images(tmp_path: Path) -> None:
    pipeline.run(contract.PREPROCESSING, tmp_path, "--source", str(SOURCE), "--limit", "30", "--copies", "1")
    pipeline.run(contract.SEGNET, tmp_path, "--pretrained", "--views", "1")
    pipeline.run(contract.ROI, tmp_path)
    pipeline.run(contract.CLASSIFIER, tmp_path, "--pretrained")
    pipeline.run(contract.EVALUATION, tmp_path)
    masks = json.loads((tmp_path / "graphics" / "segmentation.json").read_text())["splits"]["val"]
    assert masks["n"] == 30 and masks["metrics"]["jaccard"] > 0.7
    found, _ = metrics(tmp_path, "val")
    assert found["mean auc"] > 0.8


def test_train_images_in_another_split_are_not_evaluated(tmp_path: Path) -> None:
    """As in a folder of ISIC 2018, which has the images of 2017; validation was not trained on."""
    pipeline.run(contract.PREPROCESSING, tmp_path, "--source", str(SOURCE), "--split", "2018", "--limit", "9")
    pipeline.run(contract.SEGNET, tmp_path, "--pretrained", "--views", "1")
    results = json.loads((tmp_path / "graphics" / "segmentation.json").read_text())
    official = {record.id for record in pipeline.records(SOURCE, "val")}
    for split in ("val", "test"):
        ids = reader(tmp_path).load("ids", split=split).tolist()
        assert set(results["seen"][split]) == set(ids) - official
        assert results["splits"].get(split, {"n": 0})["n"] == len(set(ids) & official)
