"""Training of the classifiers of a data folder."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES
from melanoma.cli import flags
from melanoma.dataset import augment
from melanoma.dataset.splits import UNLABELLED, Member
from melanoma.errors import InputError, StageError
from melanoma.models import classifier
from melanoma.training import classification, distributed, loop, recipe
from melanoma.training.batches import Batches
from melanoma.training.classification import ClassifierSettings, ClassifierTrainer
from melanoma.training.recipe import Recipe

import keras
import numpy as np
import pipeline
import pytest
import toy_training
from pipeline import BACKBONE, save_rows

SIZE = 16  # pixels
SOURCE = {"train": [*range(9), 1, 4], "val": [*range(6)]}  # the last two rows of train are augmented copies
FLAGS = ("--backbone", BACKBONE, "--weights", "none", "--train", "head", "--epochs", "2", "--batch-size", "8")
OTHER_SETTINGS = {"weights_sha256": "none", "keras_backend": "tensorflow"}


def make_recipe(**changes: Any) -> Recipe:
    """The settings of FLAGS, with changes."""
    return flags.to_dataclass(Recipe, vars(pipeline.parser(contract.CLASSIFIER).parse_args(FLAGS)) | changes)


def trainer(folder: Path, devices: distributed.Devices = distributed.ONE, **changes: Any) -> ClassifierTrainer:
    used = vars(pipeline.parser(contract.CLASSIFIER).parse_args(FLAGS)) | changes
    settings = ClassifierSettings.from_flags(used)
    store = Store(folder, contract.CLASSIFIER, used | OTHER_SETTINGS)
    return ClassifierTrainer(store, settings, devices, lambda phase, member: toy_training.draw_nothing)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Regions of interest of train, with two augmented copies, and of validation."""
    return make_folder(tmp_path)


@pytest.fixture
def with_extra(tmp_path: Path) -> Path:
    """Rows 5 to 8 and the copy in the last row are of --extra; row 8 is in a group with row 0."""
    source = SOURCE | {"train": [*range(9), 1, 7]}
    folder = make_folder(tmp_path, source, base=5)
    Store(folder, contract.PREPROCESSING, {}).save("groups", np.array([*range(8), 0, 1, 7]), split="train")
    return folder


def make_folder(tmp_path: Path, sources: dict[str, list[int]] = SOURCE, base: int | None = None) -> Path:
    rng = np.random.default_rng(0)
    for split, source in sources.items():
        step1, step3 = (Store(tmp_path, script, {}) for script in (contract.PREPROCESSING, contract.ROI))
        labels = np.array(source, np.int8) % 3
        save_rows(tmp_path, split, source, base if split == "train" else None)
        step1.save("labels", labels, split=split)
        brightness = 60 * labels[:, None, None, None] + rng.integers(0, 60, (len(source), SIZE, SIZE, 3))
        step3.save("roi", brightness.astype(np.uint8), split=split)
    return tmp_path


def test_weights_of_rare_classes_are_inverse_to_their_number_among_the_rows() -> None:
    labels, rows = np.array([0, 0, 0, 1, 2, 2, 1]), np.arange(6)
    weights = classification.row_weights(labels, rows, np.ones(7))
    assert weights.dtype == np.float32
    assert weights == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2, 1, 1, 2])
    assert weights[rows].mean() == pytest.approx(1)


def test_class_without_training_images_is_named() -> None:
    with pytest.raises(InputError, match=f"no {CLASSES[1]} and no {CLASSES[2]} among 2 training images"):
        classification.row_weights(np.array([0, 0, 1, 2]), np.array([0, 1]), np.ones(4))


def test_unlabelled_rows_weigh_nothing_and_have_no_class() -> None:
    labels = np.array([0, UNLABELLED, 1, 2])
    assert classification.row_weights(labels, np.array([0, 2, 3]), np.ones(4)).tolist() == [1, 0, 1, 1]
    assert classification.one_hot(labels).tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_weights_within_a_class_are_in_the_given_proportion_and_its_total_stays() -> None:
    labels, each = np.array([0, 0, 0, 1, 2, 2]), np.array([1, 1, 0.5, 1, 1, 0])
    weights = classification.row_weights(labels, np.arange(6), each)
    assert weights == pytest.approx([0.8, 0.8, 0.4, 2, 2, 0])
    assert weights.mean() == pytest.approx(1)


def test_class_whose_images_all_weigh_nothing_is_absent() -> None:
    with pytest.raises(InputError, match=f"no {CLASSES[2]} among 3 training images"):
        classification.row_weights(np.arange(3), np.arange(3), np.array([1, 1, 0.0]))


@pytest.mark.parametrize(
    ("balance", "extra_weight", "expected"),
    [
        ("copies", 1.0, None),
        ("none", 0.5, [1, 1, 0.5]),
        ("focal", 0.5, [1, 1, 0.5]),
        ("weights", 1.0, [3, 3, 3]),
        ("weights", 0.5, [3, 3, 3]),  # they contain it
        ("sampling", 0.5, None),  # they are drawn less often
    ],
)
def test_loss_weights_are_those_of_the_classes_and_of_added_images(
    balance: str, extra_weight: float, expected: list[float] | None
) -> None:
    balanced, each = np.full(3, 3, np.float32), np.array([1, 1, extra_weight])
    found = classification.loss_weights(make_recipe(balance=balance), balanced, each)
    assert (None if found is None else found.tolist()) == expected


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
        return loop.TrainingResult({}, 1, "the last one", [0.0])

    features = {split: np.zeros((len(source), 8), np.float32) for split, source in SOURCE.items()}
    monkeypatch.setattr(ClassifierTrainer, "_features", lambda *_: features)
    monkeypatch.setattr(classification.loop, "fit", note_rows)
    return rows


def test_targets_are_labels_mixed_with_the_probabilities_of_the_teachers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classification.teacher, "soft_labels", lambda *_: np.full((3, 3), 1 / 3, np.float32))
    labels, member = classification.one_hot(np.array([0, 1, 2, 1])), Member("", -1, 0)
    found = trainer(folder, teacher=("a",), teacher_weight=0.6)._targets(labels, member, 3)
    assert found[:3] == pytest.approx(0.2 + 0.4 * labels[:3]) and np.array_equal(found[3], labels[3])
    assert trainer(folder)._targets(labels, member, 3) is labels


def test_auc_takes_the_largest_target_as_the_class() -> None:
    aucs = [classification.ClassAUC(multi_label=True, num_labels=3), keras.metrics.AUC(multi_label=True, num_labels=3)]
    labels = np.arange(9) % 3
    predicted = np.random.default_rng(0).dirichlet((1, 1, 1), 9).astype(np.float32)
    aucs[0].update_state(0.2 + 0.4 * classification.one_hot(labels), predicted)
    aucs[1].update_state(classification.one_hot(labels), predicted)
    assert float(aucs[0].result()) == pytest.approx(float(aucs[1].result()))


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


def test_no_training_image_left_is_refused(with_extra: Path) -> None:
    unlabel(with_extra, "train", [0, 1, 2, 3, 4, 9])
    with pytest.raises(InputError, match="among 0 training images"):
        trainer(with_extra, extra_weight=0.0).train()


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
        assert ("focal" in objective.loss.name) == (balance == "focal")
        raise KeyboardInterrupt

    features = {split: np.zeros((len(source), 8), np.float32) for split, source in SOURCE.items()}
    monkeypatch.setattr(ClassifierTrainer, "_features", lambda *_: features)
    monkeypatch.setattr(classification.loop, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, balance=balance).train()


Calls = list[tuple[loop.Hyperparameters, Batches, loop.Objective]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the trainings that follow are called with."""
    found, fit = [], classification.loop.fit

    def note(network: Any, train: Any, validation: Any, objective: Any, hyperparameters: Any, run: Any) -> Any:
        found.append((hyperparameters, train, objective))
        return fit(network, train, validation, objective, hyperparameters, run)

    monkeypatch.setattr(classification.loop, "fit", note)
    return found


def test_flags_apply_to_the_last_phase(folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classification, "WARM_UP_EPOCHS", 3)
    of_images: dict[str, Any] = {"ema": 0.5, "first_rate": 0.1, "mixup": 0.2, "augmentation": "strong"}
    trained = trainer(
        folder, train="full", epochs=1, learning_rate=0.5, keep="lowest-loss", label_smoothing=0.1, **of_images
    ).train()
    (head, head_batches, head_objective), (full, full_batches, full_objective) = calls
    assert head == loop.Hyperparameters(3, recipe.LEARNING_RATE["head"], 0.0, classification.PATIENCE, "lowest-loss")
    assert full == loop.Hyperparameters(1, 0.5, 0.5, classification.PATIENCE, "lowest-loss", 0.1)
    assert (head_batches.options.augmentation, head_batches.options.mixup) == (None, 0)
    assert (full_batches.options.augmentation, full_batches.options.mixup) == (augment.STRONG, 0.2)
    assert [objective.loss.get_config()["label_smoothing"] for objective in (head_objective, full_objective)] == [
        0.1
    ] * 2
    phases = trained.members[""]
    assert phases.keys() == {"head", "full"}
    assert [phase["reason"] for phase in phases.values()] == ["lowest loss of validation"] * 2
    store = Store(folder, contract.CLASSIFIER, {})
    for name in ("head_weights", "classifier_weights"):
        assert store.has(name, backbone=BACKBONE, member="")


def test_callbacks_watch_every_phase_of_every_network(folder: Path) -> None:
    seen, epochs = list[tuple[str, str, int]](), list[int]()

    def watch(phase: str, member: Member, network: keras.Model, data: Any) -> list[keras.callbacks.Callback]:
        seen.append((phase, member.name, data.inputs["train"].ndim))
        assert data.rows.max() < len(data.targets)
        return [keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))]

    watched = dataclasses.replace(trainer(folder, train="full", folds=2, epochs=1), watch=watch)
    watched.train()
    assert seen == [
        *(("head", "_fold1", 2), ("full", "_fold1", 4)),
        *(("head", "_fold2", 2), ("full", "_fold2", 4)),
    ]
    assert epochs == [*range(classification.WARM_UP_EPOCHS), 0] * 2


def test_full_training_is_kept_even_if_it_is_worse_than_the_head(folder: Path) -> None:
    """A learning rate this high destroys what the head has learnt."""
    trained = trainer(folder, train="full", epochs=1, learning_rate=100.0).train()
    head, full = (trained.members[""][phase]["history"]["val_auc"] for phase in ("head", "full"))
    assert max(full) < max(head)
    network, store = trained.classifiers[0], Store(folder, contract.CLASSIFIER, {})
    of_head = classifier.build_head(network.head.input_shape[-1])
    of_head.load_weights(store.path("head_weights", backbone=BACKBONE, member=""))
    assert not toy_training.same_weights(network.head, of_head)


@pytest.mark.parametrize(
    ("extra_weight", "folds", "expected"),
    [
        (1.0, 1, [set(range(11))]),
        (0.0, 1, [{0, 1, 2, 3, 4, 9}]),
        (1.0, 2, None),
    ],
)
def test_added_images_are_trained_on_in_every_fold_unless_they_weigh_nothing(
    extra_weight: float,
    folds: int,
    expected: list[set[int]] | None,
    used: list[tuple[set[int], list[int]]],
    with_extra: Path,
) -> None:
    trained = trainer(with_extra, extra_weight=extra_weight, folds=folds).train()
    rows = [of_train for of_train, _ in used]
    if expected:
        assert rows == expected and trained.out_of_fold is None
        return
    assert trained.out_of_fold is not None
    assert rows[0] & rows[1] >= {5, 6, 7, 10}  # 10 is a copy of 7
    assert all((8 in of_train) == (0 in of_train) and (9 in of_train) == (1 in of_train) for of_train in rows)
    assert rows[0] | rows[1] == set(range(11)) and not rows[0] & rows[1] & set(range(5))
    assert (trained.out_of_fold.sum(axis=1) == [1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0]).all()


def test_added_images_of_other_than_the_wanted_classes_are_left_out(
    used: list[tuple[set[int], list[int]]], with_extra: Path
) -> None:
    labels = Store(with_extra, contract.CLASSIFIER, {}).load("labels", split="train")
    trainer(with_extra, extra_classes=["melanoma"]).train()
    ((rows, _),) = used
    added = {5, 6, 7, 8, 10}
    assert rows == set(range(11)) - {row for row in added if labels[row] != CLASSES.index("melanoma")}


@pytest.mark.parametrize(("balance", "length"), [("sampling", 7), ("none", 9)])
def test_added_images_weigh_less_in_the_sampling_or_in_the_loss(
    balance: str, length: int, with_extra: Path, calls: Calls
) -> None:
    trainer(with_extra, balance=balance, extra_weight=0.5).train()
    ((_, batches, _),) = calls
    weights = batches.options.sampling_weights if balance == "sampling" else batches.options.loss_weights
    assert weights is not None and weights[6] == pytest.approx(weights[3] / 2)  # of one class
    assert batches.length == length  # 5 images, and 4 that weigh half


def test_pretraining_uses_only_added_images_and_once_per_seed(with_extra: Path, calls: Calls) -> None:
    trained = trainer(with_extra, pretrain=1, folds=2, seeds=2, epochs=1).train()
    (first, batches, _), *_ = calls
    assert (first.epochs, first.learning_rate, first.keep) == (1, recipe.LEARNING_RATE["full"], "last")
    assert batches.rows.tolist() == [5, 6, 7, 10] and batches.options.augmentation is augment.STANDARD
    assert batches.options.loss_weights is None
    assert {name: list(phases) for name, phases in trained.members.items()} == {
        "_fold1_seed0": ["pretrain", "head"],
        "_fold1_seed1": ["pretrain", "head"],
        "_fold2_seed0": ["head"],
        "_fold2_seed1": ["head"],
    }
    backbones = [one.backbone for one in trained.classifiers]
    assert toy_training.same_weights(backbones[0], backbones[2])  # that of the head's training stays frozen
    assert not toy_training.same_weights(backbones[0], backbones[1])
    keras.utils.set_random_seed(0)
    member = Member("", -1, 0)
    assert not toy_training.same_weights(trainer(with_extra)._build(member).backbone, backbones[0])


def test_pretraining_without_added_images_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"--pretrain: no labelled images were added: run .* with --extra"):
        trainer(folder, pretrain=1).train()


def test_interrupted_training_after_pretraining_ends_with_the_same_weights(
    with_extra: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"pretrain": 1, "folds": 2}
    uninterrupted = trainer(with_extra, **settings).train()
    shutil.rmtree(with_extra / "checkpoints")
    fit, trained = classification.loop.fit, list[str]()

    def interrupt(network: Any, *others: Any) -> Any:
        trained.append(network.name)
        if len(trained) == 3:  # pretraining, the heads of both folds
            raise KeyboardInterrupt
        return fit(network, *others)

    with monkeypatch.context() as patch:
        patch.setattr(classification.loop, "fit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trainer(with_extra, **settings).train()
    resumed = trainer(with_extra, **settings).train()
    for one, other in zip(uninterrupted.classifiers, resumed.classifiers, strict=True):
        assert toy_training.same_weights(one.model, other.model)


# ------------------------------------------------------------------------------------------------------------- features


def test_features_are_computed_up_to_the_last_row_used_and_reused(folder: Path) -> None:
    files = []
    for _ in range(2):
        trainer(folder, balance="sampling").train()
        store = Store(folder, contract.CLASSIFIER, {})
        assert len(store.load_first("features", 9, split="train", backbone=BACKBONE)) == 9
        files.append(store.path("features", split="train", backbone=BACKBONE).stat().st_mtime_ns)
        assert (
            not {"rows", "backbone_sha256"}
            & store.written_with("classifier_weights", backbone=BACKBONE, member="").keys()
        )
    assert files[0] == files[1]


def test_features_are_computed_once_for_all_folds(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The last row is in one fold only."""
    caplog.set_level("INFO")
    trainer(folder, folds=2).train()
    assert (
        len(Store(folder, contract.CLASSIFIER, {}).load_first("features", 11, split="train", backbone=BACKBONE)) == 11
    )
    assert [line for line in caplog.messages if "features" in line and "reusing" in line] == [
        "reusing the features of train",
        "reusing the features of val",
    ]


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
