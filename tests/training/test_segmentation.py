"""Training of the segmentation networks of a data folder."""

from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.dataset.splits import COPY_SUFFIX
from melanoma.training import distributed, segmentation
from melanoma.training.segmentation import SegmentationSettings, SegmentationTrainer

import numpy as np
import pytest
import toy_training
from pipeline import BACKBONE

SIZE = 16  # pixels
IDS = [*(f"image{number}" for number in range(6)), f"image0{COPY_SUFFIX}1", f"image1{COPY_SUFFIX}1"]
SETTINGS: dict[str, Any] = {
    "network": "unet",
    "input_size": SIZE,
    "backbone": BACKBONE,
    "weights": "none",
    "scaling": None,
    "loss": "dice",
    "epochs": 1,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "ema": 0.0,
    "folds": 1,
    "seed": 0,
}


def trainer(folder: Path, devices: distributed.Devices = distributed.ONE, **changes: Any) -> SegmentationTrainer:
    settings = SETTINGS | changes
    store = Store(folder, contract.SEGNET, settings)
    return SegmentationTrainer(store, SegmentationSettings(**settings), devices, lambda _: toy_training.draw_nothing)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Train images with masks; the last two rows are augmented copies."""
    rng, store = np.random.default_rng(0), Store(tmp_path, contract.PREPROCESSING, {})
    store.save("ids", np.array(IDS), split="train")
    store.save("images", rng.integers(0, 256, (len(IDS), SIZE, SIZE, 3)).astype(np.uint8), split="train")
    store.save("masks", rng.integers(0, 2, (len(IDS), SIZE, SIZE, 1)).astype(np.uint8), split="train")
    return tmp_path


def test_colour_statistics_are_those_of_all_pixels_of_train(folder: Path) -> None:
    mean, std = segmentation.colour_statistics(trainer(folder).store)
    pixels = trainer(folder).store.load("images", split="train").reshape(-1, 3).astype(float)
    assert mean == pytest.approx(pixels.mean(axis=0)) and std == pytest.approx(pixels.std(axis=0))


@pytest.mark.parametrize(
    ("network", "backbone", "standardised"),
    [("segnet", "", True), ("segnet_vgg16", "vgg16", False), ("unet", BACKBONE, False)],
)
def test_only_segnet_is_designed_with_colour_statistics(
    network: str, backbone: str, standardised: bool, folder: Path
) -> None:
    some = trainer(folder, network=network)
    design = segmentation.design_network(some.store, some.settings)
    assert (design.network, design.input_size, design.backbone) == (network, SIZE, backbone)
    assert (design.mean is not None) == (design.std is not None) == standardised


def test_every_fold_is_trained_without_its_images_and_without_augmented_copies(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, fit = [], segmentation.loop.fit

    def note_rows(model: Any, train: Any, *arguments: Any) -> Any:
        rows.append(set(train.rows.tolist()))
        return fit(model, train, *arguments)

    monkeypatch.setattr(segmentation.loop, "fit", note_rows)
    trained = trainer(folder, folds=2).train()
    assert trained.members == ["_fold1", "_fold2"] and len(trained.models) == 2
    assert rows[0] | rows[1] == set(range(6)) and not rows[0] & rows[1]
    assert trained.out_of_fold is not None
    for number, seen in enumerate(rows):
        assert set(np.flatnonzero(~trained.out_of_fold[:6, number])) == seen
    assert len(trained.report["training"]) == 2 and trained.report["design"]["network"] == "unet"
    store = Store(folder, contract.SEGNET, {})
    assert all(store.has("segnet_weights", member=member) for member in trained.members)


def test_process_that_does_not_lead_trains_but_writes_nothing(folder: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    trained = trainer(folder, toy_training.Follower()).train()
    assert len(trained.models) == 1 and trained.out_of_fold is None
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files
