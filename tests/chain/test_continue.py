"""--continue: training goes on from the weights of the finished training."""

from collections.abc import Callable
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store

import h5py
import numpy as np
import pipeline
import pytest
from pipeline import BACKBONE, exit_code, places, reader

STILL = ("--learning-rate", "1e-12", "--ema", "0")  # training that changes no kernel


def kernels(folder: Path, name: str) -> list[np.ndarray]:
    """Kernels of the convolutions; running statistics of the batch normalisation move whatever the learning rate."""
    fields = {"backbone": BACKBONE} if name == "classifier_weights" else {}
    found: list[np.ndarray] = []

    def collect(_: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim == 4:
            found.append(item[()])

    with h5py.File(reader(folder).path(name, member="", **fields)) as file:
        file.visititems(collect)
    return found


def largest_difference(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(before, after, strict=True))


def segment(folder: Path, *flags: str) -> None:
    pipeline.segment(folder, *STILL, *flags)


def classify(folder: Path, *flags: str) -> None:
    pipeline.classify(folder, "--train", "full", "--batchnorm", "frozen", *STILL, *flags)


@pytest.mark.parametrize(("train", "name"), [(segment, "segnet_weights"), (classify, "classifier_weights")])
def test_continued_training_starts_from_the_trained_weights(
    own_chain: Path, train: Callable[..., None], name: str
) -> None:
    before = kernels(own_chain, name)
    train(own_chain, "--continue")
    assert largest_difference(before, kernels(own_chain, name)) < 1e-6
    train(own_chain)
    assert largest_difference(before, kernels(own_chain, name)) > 1e-4


def test_training_that_begins_anew_says_so(own_chain: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        pipeline.segment(own_chain)
    assert "this one begins anew; --continue would go on" in caplog.text


def test_nothing_to_continue_is_an_error(
    own_chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Store(own_chain / "data", contract.CLASSIFIER, {}).remove("classifier_weights", backbone=BACKBONE, member="")
    flags = ("--backbone", BACKBONE, "--weights", "none", "--epochs", "1", "--continue")
    assert exit_code(monkeypatch, contract.CLASSIFIER, *flags, *places(own_chain)) == 3
    assert "is missing" in capsys.readouterr().err
