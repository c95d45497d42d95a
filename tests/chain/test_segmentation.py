"""The second script beyond one plain run: folds, switches, and the network that comes with the scripts."""

import json
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.dataset.batches import Batches
from melanoma.dataset.splits import COPY_SUFFIX, assign_folds
from melanoma.errors import InputError
from melanoma.inference import postprocess, pretrained
from melanoma.inference.predict import mean_output
from melanoma.metrics import segmentation
from melanoma.models import segmentation
from melanoma.training import loop
from tools import pack_pretrained

import h5py
import keras
import numpy as np
import pipeline
import pytest
from pipeline import array_bytes, exit_code, places, reader


def network(folder: Path, fold: str = "") -> keras.Model:
    """The network of a finished run."""
    store = reader(folder)
    settings = json.loads(store.path("segnet_settings").read_text())
    model = segmentation.build(segmentation.Design(**settings["design"]), pipeline.SIZE)
    model.load_weights(store.path("segnet_weights", member=fold))
    return model


def settings(folder: Path) -> dict:
    return json.loads(reader(folder).path("segnet_settings").read_text())


def report(folder: Path) -> dict:
    return json.loads((folder / "graphics" / "segmentation.json").read_text())


def weights() -> Path:
    return pretrained.FOLDER / "segnet.weights.h5"


def pack(folder: Path) -> None:
    pack_pretrained.main(pack_pretrained.parser().parse_args([pretrained.SEGNET, *places(folder)]))


@pytest.fixture
def shipped(own_chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A chain whose network is packed as the pretrained one."""
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "pretrained")
    pack(own_chain)
    return own_chain


def test_masks_of_train_come_from_the_network_that_has_not_seen_them(own_chain: Path) -> None:
    pipeline.outline(own_chain, "--folds", "2", "--no-clean", "--threshold", "0.5")
    store = reader(own_chain)
    assigned = assign_folds(store.load("ids", split="train").tolist(), 2, seed=0)
    models = [network(own_chain, fold) for fold in ("_fold1", "_fold2")]
    for split, own in (("train", assigned), ("val", None)):
        images = store.load("images", split=split)
        found = [mean_output([model], images, False) for model in models]
        expected = np.mean(found, axis=0) if own is None else np.stack([found[k][row] for row, k in enumerate(own)])
        agreement = (postprocess.segment(expected, 0.5, False) == store.load("predicted", split=split)).mean()
        assert agreement > 0.999, split
        other = np.stack([found[1 - k][row] for row, k in enumerate(assigned)]) if own is not None else found[0]
        assert (postprocess.segment(other, 0.5, False) == store.load("predicted", split=split)).mean() < 0.99
    assert len(settings(own_chain)["training"]) == 2
    photographs = np.array([COPY_SUFFIX not in name for name in store.load("ids", split="train").tolist()])
    truth, predicted = (store.load(name, split="train")[photographs] for name in ("masks", "predicted"))
    scored = report(own_chain)["splits"]["train"]
    assert scored["n"] == pipeline.COUNTS["train"]
    assert scored["metrics"]["jaccard"] == pytest.approx(segmentation.mean_jaccard(truth, predicted))


def test_masks_of_photographs_that_the_network_learnt_from_are_not_scored(finished: Path) -> None:
    assert set(report(finished)["splits"]) == {"val", "test"}


def test_networks_of_folds_are_trained_without_the_photographs_of_their_fold(
    own_chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, fit = [], loop.fit

    def watch(model: keras.Model, train: Batches, *rest: Any, **more: Any) -> loop.TrainingResult:
        seen.append(train.rows.tolist())
        return fit(model, train, *rest, **more)

    monkeypatch.setattr(training, "fit", watch)
    pipeline.outline(own_chain, "--folds", "2")
    ids = reader(own_chain).load("ids", split="train").tolist()
    assigned = assign_folds(ids, 2, seed=0)
    photographs = [row for row, name in enumerate(ids) if COPY_SUFFIX not in name]
    assert seen == [[row for row in photographs if assigned[row] != fold] for fold in (0, 1)]
    weights = reader(own_chain).path("segnet_weights", member="").parent
    assert {path.name for path in weights.glob("segnet*.h5")} == {f"segnet_fold{k}.weights.h5" for k in (1, 2)}


@pytest.mark.parametrize(("precision", "scales"), [("mixed_bfloat16", 0), ("mixed_float16", 3)])
def test_half_precision_in_computation_leaves_results_of_full_precision(
    precision: str, scales: int, own_chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = []  # of float16, whose gradients would vanish: lesions, head, everything
    scale = keras.optimizers.LossScaleOptimizer.scale_loss

    def counting(optimizer: keras.optimizers.LossScaleOptimizer, loss: keras.KerasTensor) -> keras.KerasTensor:
        scaled.append(optimizer)
        return scale(optimizer, loss)

    monkeypatch.setattr(keras.optimizers.LossScaleOptimizer, "scale_loss", counting)
    flags = ("--precision", precision, "--ema", "0.9")
    try:
        pipeline.outline(own_chain, *flags)
        pipeline.run(contract.ROI, own_chain)
        pipeline.classify(own_chain, *flags)
    finally:
        keras.config.set_dtype_policy("float32")
    assert len({id(optimizer) for optimizer in scaled}) == scales
    store = reader(own_chain)
    probabilities = store.load("probabilities", split="val")
    assert probabilities.dtype == np.float32 and np.isfinite(probabilities).all()
    settings = [store.path("segnet_settings"), store.path("classifier_settings", backbone=pipeline.BACKBONE)]
    trainings = [json.loads(settings[0].read_text())["training"][0]]
    trainings += json.loads(settings[1].read_text())["members"][""].values()
    assert len(trainings) == 3
    assert all(np.isfinite(values).all() for training in trainings for values in training["history"].values())


def test_network_is_packed_whatever_computed_its_last_masks(own_chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = report(own_chain)
    figures["settings"]["inference"] = "another library"
    (own_chain / "graphics" / "segmentation.json").write_text(json.dumps(figures))
    packed: list[str] = []
    monkeypatch.setattr(pretrained, "write", lambda network, *_: packed.append(network))
    pack(own_chain)
    assert packed == [pretrained.SEGNET]


def test_figures_of_another_run_are_not_packed(shipped: Path) -> None:
    pipeline.run(contract.SEGNET, shipped, "--pretrained", "--no-tta")
    with pytest.raises(InputError, match="is not of the network"):
        pack(shipped)


def test_more_folds_than_photographs_are_bad_usage(
    own_chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    assert exit_code(monkeypatch, contract.SEGNET, *places(own_chain), "--network", "segnet", "--folds", "99") == 2
    assert "--folds: 24 photographs make no 99 folds" in capsys.readouterr().err


def test_threshold_is_chosen_on_validation_saved_and_used(finished: Path) -> None:
    store = reader(finished)
    probability = mean_output([network(finished)], store.load("images", split="val"), False)
    truth = np.array(store.load("masks", split="val"))
    chosen = settings(finished)["threshold"]
    assert chosen == pytest.approx(postprocess.choose_threshold(truth, probability, True))
    expected = postprocess.segment(probability, chosen, True)
    assert (expected == store.load("predicted", split="val")).mean() > 0.999


def test_threshold_given_is_used(own_chain: Path) -> None:
    pipeline.outline(own_chain, "--threshold", "0.99", "--no-clean")
    store = reader(own_chain)
    probability = mean_output([network(own_chain)], store.load("images", split="val"), False)
    assert (postprocess.segment(probability, 0.99, False) == store.load("predicted", split="val")).mean() > 0.999
    assert settings(own_chain)["threshold"] == 0.99


def test_report_tells_effects_and_costs(finished: Path) -> None:
    found = report(finished)
    assert len(found["effects_on_validation"]) == 8
    assert found["cost"]["weights"] == network(finished).count_params()
    assert found["cost"]["seconds_per_epoch"] > 0 and found["images_per_second"] > 0


def test_pretrained_network_gives_the_masks_that_it_gave_when_it_was_packed(shipped: Path) -> None:
    before = {split: np.array(reader(shipped).load("predicted", split=split)) for split in pipeline.COUNTS}
    reader(shipped).path("segnet_weights", member="").unlink()
    pipeline.run(contract.SEGNET, shipped, "--pretrained", "--no-tta")
    for split, masks_before in before.items():
        assert (masks_before == reader(shipped).load("predicted", split=split)).mean() > 0.99
    assert report(shipped)["splits"]["val"]["n"] == pipeline.COUNTS["val"]


def test_packed_kernels_are_of_half_precision_and_the_rest_is_not(shipped: Path) -> None:
    kinds: dict[bool, set[str]] = {True: set(), False: set()}

    def look(_: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            kinds[item.ndim > 1].add(str(item.dtype))

    with h5py.File(weights()) as file:
        file.visititems(look)
    assert kinds[True] == {"float16"} and "float16" not in kinds[False]
    assert weights().stat().st_size < reader(shipped).path("segnet_weights", member="").stat().st_size
    facts = json.loads((pretrained.FOLDER / "segnet.json").read_text())
    assert {"design", "threshold", "data", "machine", "versions", "settings"} <= facts.keys()


def test_value_beyond_half_precision_is_not_packed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["kernel"] = np.full((2, 2), 1e6, np.float32)
    with pytest.raises(InputError, match="kernel has values beyond float16"):
        pack_pretrained.halve(tmp_path / "a.h5", tmp_path / "b.h5")


@pytest.mark.parametrize(("spoil", "message"), [("missing", "is needed"), ("changed", "SHA-256")])
def test_pretrained_network_that_is_not_whole_is_refused(
    spoil: str,
    message: str,
    shipped: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    logging_restored: None,
) -> None:
    before = array_bytes(shipped)
    if spoil == "missing":
        weights().unlink()
    else:
        content = bytearray(weights().read_bytes())
        content[len(content) // 2] ^= 1
        weights().write_bytes(content)
    assert exit_code(monkeypatch, contract.SEGNET, *places(shipped), "--pretrained") == 2
    assert message in capsys.readouterr().err
    assert array_bytes(shipped) == before


def test_flags_of_training_go_not_with_the_pretrained_network(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    flags = ("--pretrained", "--network", "segnet", "--epochs", "3")
    assert exit_code(monkeypatch, contract.SEGNET, *places(shipped), *flags) == 2
    assert "leave out --network, --epochs" in capsys.readouterr().err


def test_several_networks_are_not_packed(shipped: Path) -> None:
    pipeline.outline(shipped, "--folds", "2")
    with pytest.raises(InputError, match="--folds or --limit"):
        pack(shipped)
