"""Training of the classifiers of a data folder."""

import shutil
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES
from melanoma.dataset.splits import UNLABELLED
from melanoma.errors import InputError, StageError
from melanoma.training import classification, distributed, loop
from melanoma.training.classification import ClassifierSettings, ClassifierTrainer

import numpy as np
import pytest
import toy_training
from pipeline import BACKBONE, save_rows

SIZE = 16  # pixels
SOURCE = {"train": [*range(9), 1, 4], "val": [*range(6)]}  # the last two rows of train are augmented copies
SETTINGS: dict[str, Any] = {
    "backbone": BACKBONE,
    "weights": "none",
    "scaling": None,
    "input_size": None,
    "train": "head",
    "balance": "copies",
    "epochs": 2,
    "learning_rate": None,
    "batch_size": 8,
    "ema": 0.0,
    "folds": 1,
    "seeds": 1,
    "seed": 0,
}
OTHER_SETTINGS = {"weights_sha256": "none", "precision": "float32", "keras_backend": "tensorflow"}


def trainer(folder: Path, devices: distributed.Devices = distributed.ONE, **changes: Any) -> ClassifierTrainer:
    settings = SETTINGS | changes
    store = Store(folder, contract.CLASSIFIER, settings | OTHER_SETTINGS)
    return ClassifierTrainer(
        store, ClassifierSettings(**settings), devices, lambda phase, member: toy_training.draw_nothing
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Regions of interest of train, with two augmented copies, and of validation."""
    rng = np.random.default_rng(0)
    for split, source in SOURCE.items():
        step1, step3 = (Store(tmp_path, script, {}) for script in (contract.PREPROCESSING, contract.ROI))
        labels = np.array(source, np.int8) % 3
        save_rows(tmp_path, split, source)
        step1.save("labels", labels, split=split)
        brightness = 60 * labels[:, None, None, None] + rng.integers(0, 60, (len(source), SIZE, SIZE, 3))
        step3.save("roi", brightness.astype(np.uint8), split=split)
    return tmp_path


def test_weights_of_rare_classes_are_inverse_to_their_number_among_the_rows() -> None:
    labels, rows = np.array([0, 0, 0, 1, 2, 2, 1]), np.arange(6)
    weights = classification.class_weights(labels, rows)
    assert weights.dtype == np.float32
    assert weights == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2, 1, 1, 2])
    assert weights[rows].mean() == pytest.approx(1)


def test_class_without_training_images_is_named() -> None:
    with pytest.raises(InputError, match=f"no {CLASSES[1]} and no {CLASSES[2]} among 2 training images"):
        classification.class_weights(np.array([0, 0, 1, 2]), np.array([0, 1]))


def test_unlabelled_rows_weigh_nothing_and_have_no_class() -> None:
    labels = np.array([0, UNLABELLED, 1, 2])
    assert classification.class_weights(labels, np.array([0, 2, 3])).tolist() == [1, 0, 1, 1]
    assert classification.one_hot(labels).tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]


def unlabel(folder: Path, split: str, rows: list[int]) -> None:
    """Removes the labels of some rows."""
    store = Store(folder, contract.PREPROCESSING, {})
    labels = np.array(store.load("labels", split=split))
    labels[rows] = UNLABELLED
    store.save("labels", labels, split=split)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[int], list[int]]]:
    """The rows of train and validation of every training that follows; nothing is learned."""
    rows = []

    def note_rows(network: Any, train: Any, validation: Any, *_: Any) -> loop.TrainingResult:
        rows.append((set(train.rows.tolist()), validation.rows.tolist()))
        return loop.TrainingResult({}, 1, 0.5, [0.0])

    features = {split: np.zeros((len(source), 8), np.float32) for split, source in SOURCE.items()}
    monkeypatch.setattr(ClassifierTrainer, "_features", lambda *_: features)
    monkeypatch.setattr(classification.loop, "fit", note_rows)
    return rows


@pytest.mark.parametrize("balance", ["copies", "sampling"])
def test_images_without_label_are_left_out_of_training_and_validation(
    balance: str, used: list[tuple[set[int], list[int]]], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    unlabel(folder, "train", [2, 6])
    unlabel(folder, "val", [0])
    trained = trainer(folder, balance=balance, folds=2).train()
    assert trained.out_of_fold is not None and (trained.out_of_fold.sum(axis=1) == 1).all()  # all rows are predicted
    copies = {9, 10} if balance == "copies" else set()
    assert set.union(*(rows for rows, _ in used)) == {0, 1, 3, 4, 5, 7, 8} | copies
    assert [rows for _, rows in used] == [[1, 2, 3, 4, 5]] * 2
    assert "train: 2 of 9 images are left out: no label" in caplog.text
    assert "val: 1 of 6 images are left out: no label" in caplog.text


def test_split_without_any_label_left_is_no_labelled_split(folder: Path) -> None:
    unlabel(folder, "val", list(range(6)))
    assert classification.load_labels(trainer(folder).store).keys() == {"train"}
    unlabel(folder, "train", list(range(11)))
    with pytest.raises(StageError, match="no labelled training images"):
        classification.load_labels(trainer(folder).store)


@pytest.mark.usefixtures("used")
def test_images_of_a_group_are_in_one_fold(folder: Path) -> None:
    Store(folder, contract.PREPROCESSING, {}).save("groups", np.array(SOURCE["train"]) // 3, split="train")
    trained = trainer(folder, folds=3).train()
    assert trained.out_of_fold is not None
    fold = trained.out_of_fold.argmax(axis=1)
    assert all(len(set(fold[start : start + 3])) == 1 for start in (0, 3, 6)) and len(set(fold)) == 3
    assert fold[9:].tolist() == fold[[1, 4]].tolist()


def test_training_without_labels_names_the_script_that_reads_them(folder: Path) -> None:
    store = trainer(folder).store
    assert classification.load_labels(store).keys() == {"train", "val"}
    store.remove("labels", split="val")
    assert classification.load_labels(store).keys() == {"train"}
    store.remove("labels", split="train")
    with pytest.raises(StageError, match=contract.PREPROCESSING):
        classification.load_labels(store)


@pytest.mark.parametrize(
    ("balance", "rows"), [("copies", 11), ("weights", 9), ("focal", 9), ("sampling", 9), ("none", 9)]
)
def test_classes_are_balanced_by_one_method(
    balance: str, rows: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the copies, the weights of the loss or of the sampling, or the loss itself differ."""

    def stop(network: Any, train: Any, validation: Any, objective: Any, *_: Any) -> None:
        assert len(train.rows) == rows
        assert (train.options.loss_weights is not None) == (balance == "weights")
        assert (train.options.sampling_weights is not None) == (balance == "sampling")
        assert ("focal" in objective.loss) == (balance == "focal")
        raise KeyboardInterrupt

    features = {split: np.zeros((len(source), 8), np.float32) for split, source in SOURCE.items()}
    monkeypatch.setattr(ClassifierTrainer, "_features", lambda *_: features)
    monkeypatch.setattr(classification.loop, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, balance=balance).train()


def test_flags_apply_to_the_last_phase_and_full_training_must_beat_the_head(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, fit = [], classification.loop.fit

    def note(network: Any, train: Any, validation: Any, objective: Any, hyperparameters: Any, run: Any) -> Any:
        calls.append((hyperparameters, run.initial_best, train.options.augment))
        return fit(network, train, validation, objective, hyperparameters, run)

    monkeypatch.setattr(classification.loop, "fit", note)
    monkeypatch.setitem(classification.EPOCHS, "head", 3)
    trained = trainer(folder, train="full", epochs=1, learning_rate=0.5).train()
    (head, head_bar, head_augments), (full, full_bar, full_augments) = calls
    assert (head.epochs, head.learning_rate) == (3, classification.LEARNING_RATE["head"])
    assert (full.epochs, full.learning_rate) == (1, 0.5)
    assert (head_augments, full_augments) == (False, True)
    phases = trained.members[""]
    assert phases.keys() == {"head", "full"}
    assert head_bar == -np.inf and full_bar == max(phases["head"]["history"]["val_auc"])
    store = Store(folder, contract.CLASSIFIER, {})
    for name in ("head_weights", "classifier_weights"):
        assert store.has(name, backbone=BACKBONE, member="")


def test_features_are_reused_only_with_the_same_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def time_written(**changes: Any) -> int:
        with pytest.raises(KeyboardInterrupt):
            trainer(folder, **changes).train()
        store = Store(folder, contract.CLASSIFIER, {})
        assert store.written_with("features", split="val", backbone=BACKBONE)["inference"] == "keras float32"
        return store.path("features", split="val", backbone=BACKBONE).stat().st_mtime_ns

    monkeypatch.setattr(classification.loop, "fit", stop)
    first = time_written()
    assert time_written(epochs=1) == first
    assert time_written(seed=1) != first  # other random weights of the backbone


def test_process_that_does_not_lead_trains_the_same_head_but_writes_nothing(folder: Path) -> None:
    leader = trainer(folder).train()
    shutil.rmtree(folder / "checkpoints")  # otherwise the follower would resume the finished training
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    follower = trainer(folder, toy_training.Follower()).train()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files
    assert toy_training.same_weights(leader.classifiers[0].head, follower.classifiers[0].head)


@pytest.mark.parametrize(
    ("folds", "mask_folds", "roi", "warned"),
    [(2, 1, "crop", True), (2, 2, "crop", False), (2, 1, "full", False), (1, 1, "crop", False)],
)
def test_cross_validation_with_masks_of_a_network_that_saw_the_images_is_warned_of(
    folds: int, mask_folds: int, roi: str, warned: bool, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masks = np.zeros((len(SOURCE["train"]), SIZE, SIZE, 1), np.uint8)
    Store(folder, contract.SEGNET, {"folds": mask_folds}).save("predicted", masks, split="train")
    some = trainer(folder, folds=folds)
    classification.warn_of_seen_masks(some.store, some.settings, roi)
    assert ("come from a network trained on these images" in caplog.text) == warned
