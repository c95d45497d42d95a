"""Training of the segmentation networks of a data folder."""

from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.dataset import augment
from melanoma.errors import InputError, StageError
from melanoma.training import distributed, segmentation
from melanoma.training.segmentation import SegmentationSettings, SegmentationTrainer

import numpy as np
import pytest
import toy_training
from pipeline import BACKBONE, save_rows

SIZE = 16  # pixels
SOURCE = [*range(6), 0, 1]  # the last two rows are augmented copies
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
    "keep": "best",
    "augmentation": "standard",
    "folds": 1,
    "seeds": 1,
    "pretrain": 0,
    "continued": False,
    "extra_weight": 1.0,
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
    save_rows(tmp_path, "train", SOURCE)
    store.save("images", rng.integers(0, 256, (len(SOURCE), SIZE, SIZE, 3)).astype(np.uint8), split="train")
    save_masks(tmp_path, "train", np.ones(len(SOURCE), bool))
    return tmp_path


def save_masks(folder: Path, split: str, has_mask: np.ndarray) -> None:
    """Random masks of some rows."""
    store, rng = Store(folder, contract.PREPROCESSING, {}), np.random.default_rng(1)
    masks = rng.integers(0, 2, (len(has_mask), SIZE, SIZE, 1)).astype(np.uint8)
    store.save("masks", masks * has_mask[:, None, None, None], split=split)
    store.save("has_mask", has_mask, split=split)


def rows_used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[int], list[int] | None]]:
    """The rows of train and validation of every training that follows."""
    used, fit = [], segmentation.loop.fit

    def note_rows(model: Any, train: Any, validation: Any, *others: Any) -> Any:
        used.append((set(train.rows.tolist()), validation.rows.tolist() if validation else None))
        return fit(model, train, validation, *others)

    monkeypatch.setattr(segmentation.loop, "fit", note_rows)
    return used


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
    used = rows_used(monkeypatch)
    trained = trainer(folder, folds=2).train()
    rows = [of_train for of_train, _ in used]
    assert trained.members == ["_fold1", "_fold2"] and len(trained.models) == 2
    assert rows[0] | rows[1] == set(range(6)) and not rows[0] & rows[1]
    assert trained.out_of_fold is not None
    for number, seen in enumerate(rows):
        assert set(np.flatnonzero(~trained.out_of_fold[:6, number])) == seen
    assert len(trained.report["training"]) == 2 and trained.report["design"]["network"] == "unet"
    store = Store(folder, contract.SEGNET, {})
    assert all(store.has("segnet_weights", member=member) for member in trained.members)


def test_every_fold_has_a_network_of_each_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = rows_used(monkeypatch)
    trained = trainer(folder, folds=2, seeds=2).train()
    assert trained.members == ["_fold1_seed0", "_fold1_seed1", "_fold2_seed0", "_fold2_seed1"]
    rows = [of_train for of_train, _ in used]
    assert rows[0] == rows[1] and rows[2] == rows[3] and not rows[0] & rows[2]
    assert trained.out_of_fold is not None and (trained.out_of_fold.sum(axis=1) == 2).all()
    assert not toy_training.same_weights(*trained.models[:2])


def test_networks_of_all_folds_and_seeds_differ_at_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, fit = list[bytes](), segmentation.loop.fit

    def note_weights(model: Any, *others: Any) -> Any:
        started.append(b"".join(value.tobytes() for value in model.get_weights()))
        return fit(model, *others)

    monkeypatch.setattr(segmentation.loop, "fit", note_weights)
    trainer(folder, folds=2, seeds=2).train()
    assert len(set(started)) == len(started) == 4


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
def test_added_images_are_in_every_fold_and_counted_by_their_weight(
    weight: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_rows(folder, "train", SOURCE, base=3)  # rows 3 to 5 are added
    used, fit = list[tuple[set[int], int]](), segmentation.loop.fit

    def note_batches(model: Any, train: Any, *others: Any) -> Any:
        used.append((set(train.rows.tolist()), train.length))
        return fit(model, train, *others)

    monkeypatch.setattr(segmentation.loop, "fit", note_batches)
    trained = trainer(folder, folds=3, pretrain=1, extra_weight=weight).train()
    assert used[0] == ({3, 4, 5}, 3)  # pretraining, once for all folds
    added = {3, 4, 5} if weight else set()
    assert sorted(sorted(rows) for rows, _ in used[1:]) == [sorted({*two} | added) for two in ((0, 1), (0, 2), (1, 2))]
    assert [count for _, count in used[1:]] == [round(2 + 3 * weight)] * 3
    assert trained.out_of_fold is not None
    assert trained.out_of_fold[:6].sum(axis=1).tolist() == [1, 1, 1, 3, 3, 3]  # no network is without the added images


def test_pretraining_without_added_masks_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"--pretrain: no masks were added: run .* with --extra"):
        trainer(folder, pretrain=1).train()


def test_kept_epoch_and_augmentation_are_those_of_the_flags(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, fit = [], segmentation.loop.fit

    def note_options(model: Any, train: Any, *others: Any) -> Any:
        options.append(train.options)
        return fit(model, train, *others)

    monkeypatch.setattr(segmentation.loop, "fit", note_options)
    (found,) = trainer(folder, keep="last", augmentation="strong", epochs=2).train().report["training"]
    assert (found["kept_epoch"], found["reason"]) == (2, "the last one")
    assert options[0].augmentation is augment.STRONG


@pytest.mark.parametrize("folds", [1, 2])
def test_images_without_mask_are_left_out_of_training_and_validation(
    folds: int, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    used, step1 = rows_used(monkeypatch), Store(folder, contract.PREPROCESSING, {})
    save_masks(folder, "train", np.isin(SOURCE, [0, 2, 3, 5]))
    save_rows(folder, "val", range(3))
    step1.save("images", np.array(step1.load("images", split="train")[:3]), split="val")
    save_masks(folder, "val", np.array([False, True, True]))
    trained = trainer(folder, folds=folds).train()
    assert set.union(*(of_train for of_train, _ in used)) == {0, 2, 3, 5}
    assert [validation for _, validation in used] == [[1, 2]] * folds
    assert "train: 2 of 6 images are left out: no mask" in caplog.text
    assert "val: 1 of 3 images are left out: no mask" in caplog.text
    if trained.out_of_fold is not None:  # every image is predicted by one network, and each has half of the masks
        assert (trained.out_of_fold.sum(axis=1) == 1).all()
        assert [len(of_train) for of_train, _ in used] == [2, 2]


def test_training_without_masks_names_the_script_that_reads_them(folder: Path) -> None:
    save_masks(folder, "train", np.zeros(len(SOURCE), bool))
    with pytest.raises(StageError, match=f"no masks of training images: run {contract.PREPROCESSING}"):
        trainer(folder).train()


def test_fold_that_holds_all_masks_is_refused(folder: Path) -> None:
    Store(folder, contract.PREPROCESSING, {}).save("groups", np.array(SOURCE) // 3, split="train")
    save_masks(folder, "train", np.isin(SOURCE, [0, 1, 2]))
    with pytest.raises(InputError, match=r"--folds 2: all training images with a mask are in fold \d"):
        trainer(folder, folds=2).train()


def test_process_that_does_not_lead_trains_but_writes_nothing(folder: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    trained = trainer(folder, toy_training.Follower()).train()
    assert len(trained.models) == 1 and trained.out_of_fold is None
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files
