"""The benchmark of the rules which epoch's weights to keep."""

import sys
from pathlib import Path

from benchmarks import selection
from benchmarks.selection import AVERAGE, VETO, Epochs
from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.dataset.splits import UNLABELLED, assign_folds
from melanoma.models import classifier
from melanoma.training.callbacks import BEST, LAST, LOWEST_LOSS

import keras
import numpy as np
import pipeline
import pytest
from pipeline import BACKBONE

SIZE = 16  # pixels


def epochs(auc: list[float], loss: list[float], first: float) -> Epochs:
    """Probabilities are `first` plus the number of the epoch, from 1; those by the weight EMA are 100 more."""
    values = [np.array([[first + number]]) for number in range(1, 1 + len(auc))]
    return Epochs(auc, loss, values, [value + 100 for value in values])


FULL = epochs([0.6, 0.8, 0.8, 0.7], [0.5, 0.6, 0.4, 0.7], 0)


@pytest.mark.parametrize(
    ("rule", "head_auc", "value", "epoch"),
    [
        (LAST, [0.9], 4, 4),
        (AVERAGE, [0.9], 104, 4),
        (LOWEST_LOSS, [0.9], 3, 3),
        (BEST, [0.9], 2, 2),  # the first of equal values
        (VETO, [0.7, 0.8], 2, 2),
        (VETO, [0.7, 0.9, 0.8], 12, 0),
    ],
)
def test_rule_chooses_an_epoch(rule: str, head_auc: list[float], value: float, epoch: int) -> None:
    found = selection.choose(rule, epochs(head_auc, [0.0] * len(head_auc), 10), FULL)
    assert (found[0].item(), found[1]) == (value, epoch)


def test_every_rule_is_tried() -> None:
    assert len(set(selection.RULES)) == len(selection.RULES) == 5


def test_epochs_are_recorded_by_the_weights_and_by_their_average() -> None:
    inputs = keras.Input((1,))
    model = keras.Model(inputs, keras.layers.Dense(1, use_bias=False)(inputs))
    found = Epochs()
    callback = selection.EpochsCallback(np.ones((3, 1), np.float32), found)
    callback.set_model(model)
    model.set_weights([np.array([[2.0]], np.float32)])
    callback.on_train_begin()
    for weight in (3.0, 4.0):
        model.set_weights([np.array([[weight]], np.float32)])
        callback.on_train_batch_end(0)
    callback.on_epoch_end(0, {"val_auc": 0.5, "val_loss": 0.25, "auc": 0.0, "loss": 0.0})
    average = 2 + 0.01 * (3 - 2)
    average += 0.01 * (4 - average)
    assert (found.auc, found.loss) == ([0.5], [0.25])
    assert found.probabilities[0] == pytest.approx(np.full((3, 1), 4.0))
    assert found.average[0] == pytest.approx(np.full((3, 1), average))
    assert model.get_weights()[0] == 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Regions of interest of train, of which row 3 has no label and the last row is a copy, and of validation."""
    rng = np.random.default_rng(0)
    for split, source in {"train": [*range(10), 1], "val": [*range(6)]}.items():
        labels = np.array(source, np.int8) % 3
        pipeline.save_rows(tmp_path, split, source)
        labels[3 if split == "train" else []] = UNLABELLED
        Store(tmp_path, contract.PREPROCESSING, {}).save("labels", labels, split=split)
        images = rng.integers(0, 256, (len(source), SIZE, SIZE, 3)).astype(np.uint8)
        Store(tmp_path, contract.ROI, {}).save("roi", images, split=split)
    return tmp_path


def test_labelled_images_are_predicted_by_the_network_that_was_trained_without_them(folder: Path) -> None:
    flags = ("--backbone", BACKBONE, "--weights", "none", "--folds", "2", "--epochs", "2", "--keep", "last")
    arguments = pipeline.parser(contract.CLASSIFIER).parse_args(["--data", str(folder), *flags])
    truth, chosen = selection.train(arguments)
    rows = np.array([0, 1, 2, *range(4, 10)])
    assert truth.tolist() == (rows % 3).tolist() and set(chosen) == set(selection.RULES)
    found, kept = chosen[LAST]
    assert kept == [2, 2]
    store, networks = Store(folder, contract.CLASSIFIER, {}), []
    for member in ("_fold1", "_fold2"):
        networks.append(classifier.build(BACKBONE, SIZE, "none").model)
        networks[-1].load_weights(store.check("classifier_weights", backbone=BACKBONE, member=member))
    each = np.stack([one.predict_on_batch(store.load("roi", split="train")[rows]) for one in networks])
    source, groups, labels = (store.load(name, split="train") for name in ("source", "groups", "labels"))
    fold = assign_folds(source, groups, labels, 2, arguments.seed)[rows]
    assert found == pytest.approx(each[fold, np.arange(len(rows))], abs=1e-5)
    assert abs(each[0] - each[1]).max() > 1e-3
    with np.load(folder / selection.FILE) as saved:
        assert saved["full_0_probabilities"].shape == (2, (fold == 0).sum(), 3)


@pytest.mark.parametrize("flags", [(), ("--folds", "2", "--pretrained"), ("--folds", "2", "--ensemble", "mobilenet")])
def test_without_a_cross_validation_there_is_nothing_to_compare(
    flags: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["selection", "--data", str(folder), *flags])
    with pytest.raises(SystemExit) as stop:
        selection.main()
    assert stop.value.code == 2 and "use --folds 2 or more" in capsys.readouterr().err
