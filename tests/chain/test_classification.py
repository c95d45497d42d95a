"""The fourth script: cross-validation, seeds, input size, and what an earlier run leaves behind."""

import json
import shutil
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import MELANOMA
from melanoma.dataset.splits import assign_folds, base_rows
from melanoma.errors import InputError, StageError
from melanoma.evaluation import occlusion
from melanoma.inference import openvino
from melanoma.inference.ensemble import load
from melanoma.inference.predict import mean_output
from melanoma.metrics import classification
from melanoma.models import backbones
from melanoma.sources import synthetic
from melanoma.sources.layouts import challenge_2017
from melanoma.training import checkpoints

import numpy as np
import pipeline
import pytest
from pipeline import BACKBONE, reader

MEMBERS = ["_fold1_seed0", "_fold1_seed1", "_fold2_seed0", "_fold2_seed1"]


def evaluated(folder: Path) -> dict[str, Any]:
    """The metrics of the classifier that was trained in a folder."""
    return json.loads((folder / "graphics" / "metrics.json").read_text())["systems"][BACKBONE]


def probabilities(folder: Path, split: str) -> np.ndarray:
    """Of the images of --source."""
    store = reader(folder)
    return np.array(store.load_first("probabilities", len(base_rows(store, split)), split=split, backbone=BACKBONE))


@pytest.fixture(scope="module")
def crossed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain with a cross-validation of two folds and two seeds; read only."""
    folder = pipeline.copy(finished, tmp_path_factory.mktemp("crossed"))
    pipeline.classify(folder, "--train", "head", "--epochs", "3", "--folds", "2", "--seeds", "2")
    pipeline.run(contract.EVALUATION, folder)
    return folder


def test_probabilities_are_out_of_fold_on_train_and_the_mean_of_the_calibrated_folds_elsewhere(crossed: Path) -> None:
    store = reader(crossed)
    source, groups, labels = (store.load(name, split="train") for name in ("source", "groups", "labels"))
    (ensemble,) = load(store, BACKBONE)[0].parts
    assert ensemble.members == MEMBERS
    models = [one.model for one in ensemble.classifiers]
    each = np.stack([mean_output([model], store.load("roi", split="train"), views=8) for model in models])
    assert abs(each[0] - each[1]).max() > 1e-4  # another seed, another network
    first_fold = (assign_folds(source, groups, labels, 2, seed=0) == 0)[:, None]
    out_of_fold = np.where(first_fold, each[:2].mean(axis=0), each[2:].mean(axis=0))
    expected = ensemble.calibration.apply(out_of_fold[: pipeline.COUNTS["train"]])
    assert probabilities(crossed, "train") == pytest.approx(expected, abs=1e-4)
    folds = [mean_output(some, store.load("roi", split="val"), views=8) for some in (models[:2], models[2:])]
    expected = np.mean([ensemble.calibration.apply(fold) for fold in folds], axis=0)
    assert probabilities(crossed, "val") == pytest.approx(expected, abs=1e-4)


def test_cross_validation_is_evaluated_on_originals_and_chooses_the_thresholds(crossed: Path) -> None:
    store, found = reader(crossed), evaluated(crossed)
    rows = base_rows(store, "train")
    melanoma = store.load("labels", split="train")[rows] == MELANOMA
    score = probabilities(crossed, "train")[:, MELANOMA]
    scored = found["splits"]["train"]
    assert scored["n"] == pipeline.COUNTS["train"]
    assert scored["metrics"]["melanoma auc"] == pytest.approx(classification.auc(melanoma, score))
    assert found["thresholds"]["melanoma"] == pytest.approx(classification.operating_points(melanoma, score))
    lines = (crossed / "graphics" / "predictions_train.csv").read_text().splitlines()
    assert len(set(lines)) == len(lines) == 1 + pipeline.COUNTS["train"]
    for file in ("report.html", "MODEL_CARD.md"):
        assert "Cross-validation" in (crossed / "graphics" / file).read_text()


def test_occlusion_test_uses_the_whole_ensemble(crossed: Path, tmp_path: Path) -> None:
    folder = pipeline.copy(crossed, tmp_path / "chain")
    pipeline.run(contract.EVALUATION, folder, "--occlusion")
    found = evaluated(folder)["occlusion"]
    assert set(found) == {"val", "test"}
    for split, variants in found.items():
        rows = occlusion.rows_with_lesion(reader(folder), split)
        labels = reader(folder).load("labels", split=split)[rows]
        expected = classification.task_aucs(labels, probabilities(folder, split)[rows])
        assert variants[occlusion.AS_TRAINED]["metrics"] == pytest.approx(expected, abs=0.05)


def test_files_of_an_earlier_cross_validation_are_removed(crossed: Path, tmp_path: Path) -> None:
    folder = pipeline.copy(crossed, tmp_path / "chain")
    (folder / "graphics" / f"{BACKBONE}_full_curves.png").write_bytes(b"")
    interrupted = folder / "data" / "checkpoints" / f"{BACKBONE}_3_folds"  # of another cross-validation
    interrupted.mkdir(parents=True)
    other_backbone = folder / "data" / "weights" / f"{BACKBONE}v2.weights.h5"
    other_backbone.write_bytes(b"")
    pipeline.classify(folder, "--train", "head")
    weights = {path.name for path in other_backbone.parent.glob(f"{BACKBONE}*.h5")}
    assert weights == {f"{BACKBONE}.weights.h5", f"{BACKBONE}_head.weights.h5", other_backbone.name}
    curves = {path.name for path in (folder / "graphics").glob(f"{BACKBONE}*_curves.png")}
    assert curves == {f"{BACKBONE}_head_curves.png"} and interrupted.is_dir()
    assert not reader(folder).has("probabilities", split="train", backbone=BACKBONE)
    pipeline.run(contract.EVALUATION, folder)
    assert set(evaluated(folder)["splits"]) == {"val", "test"}
    assert not list((folder / "graphics").glob("*_train.*"))


def test_class_that_is_absent_from_the_training_folds_is_named(
    own_chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = reader(own_chain).load("labels", split="train")
    monkeypatch.setattr("melanoma.training.classification.load_folds", lambda *_: (labels != MELANOMA).astype(int))
    with pytest.raises(InputError, match=r"no melanoma among \d+ training images"):
        pipeline.classify(own_chain, "--folds", "2")


def test_backbone_works_at_the_given_input_size(own_chain: Path) -> None:
    pipeline.classify(own_chain, "--train", "head", "--input-size", "64")
    (ensemble,) = load(reader(own_chain), BACKBONE)[0].parts
    (network,) = ensemble.classifiers
    assert network.backbone.input_shape[1] == 64 and network.model.input_shape[1] == pipeline.SIZE
    images = reader(own_chain).load("roi", split="val")
    assert probabilities(own_chain, "val") == pytest.approx(ensemble.probabilities(images, 16, "val")[0], abs=1e-4)


def test_training_without_train_images_is_refused(own_source: Path, tmp_path: Path) -> None:
    shutil.rmtree(challenge_2017.image_folder(own_source, "train"))
    pipeline.preprocess(own_source, tmp_path)
    pipeline.use_true_masks(tmp_path)
    pipeline.run(contract.ROI, tmp_path)
    with pytest.raises(StageError, match="no labelled training images"):
        pipeline.classify(tmp_path)


def test_checkpoint_depends_on_the_images_and_not_on_their_features(
    own_chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "remove", lambda *_: None)
    pipeline.classify(own_chain, "--train", "head")
    with np.load(own_chain / "data" / "checkpoints" / BACKBONE / f"{BACKBONE}_head.npz") as file:
        made_with = json.loads(str(file["made_with"]))
    assert {"seed", "arrays/train_roi.npy", "arrays/train_ids.npy"} <= made_with.keys()
    assert not any("_features" in key for key in made_with)


def test_checkpoint_is_kept_until_the_probabilities_are_saved(own_chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(store: Store, name: str, *_: Any, **fields: str) -> None:
        raise OSError(f"disk full: {name}")

    checkpoint = own_chain / "data" / "checkpoints" / BACKBONE / f"{BACKBONE}_head.npz"
    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", fail)
        with pytest.raises(OSError, match="disk full: probabilities"):
            pipeline.classify(own_chain, "--train", "head", "--restart")
    assert checkpoint.is_file()
    pipeline.classify(own_chain, "--train", "head")
    assert not checkpoint.exists()


def test_features_of_given_weights_are_reused_with_another_seed_and_engine(
    own_chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "backbone.weights.h5"
    backbones.build(BACKBONE, pipeline.SIZE, backbones.NONE, pooling="avg").save_weights(weights)
    written = []
    for seed, min_views in (("0", 0), ("1", openvino.MIN_VIEWS)):
        monkeypatch.setattr(openvino, "MIN_VIEWS", min_views)
        pipeline.classify(own_chain, "--weights", str(weights), "--train", "head", "--seed", seed)
        written.append(reader(own_chain).path("features", split="val", backbone=BACKBONE).stat().st_mtime_ns)
    assert written[0] == written[1]


# --------------------------------------------------------------------------------------------------------- added images


@pytest.fixture(scope="module")
def with_extra(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain with added images, on which the networks of a cross-validation were pretrained; read only."""
    folder, added = (tmp_path_factory.mktemp(name) for name in ("with_extra", "added"))
    synthetic.write_sample(added, {"train": 12, "val": 6}, seed=1, size=(66, 88))
    pipeline.preprocess(source, folder, "--extra", str(added))
    pipeline.use_true_masks(folder)
    pipeline.run(contract.ROI, folder)
    training = ("--folds", "2", "--pretrain", "1", "--extra-weight", "0.5", "--keep", "last", "--mixup", "0.2")
    pipeline.classify(folder, *training, "--first-rate", "0.1", "--augmentation", "strong", "--label-smoothing", "0.1")
    pipeline.run(contract.EVALUATION, folder)
    return folder


def test_added_images_are_trained_on_but_neither_predicted_nor_evaluated(with_extra: Path) -> None:
    store, count = reader(with_extra), pipeline.COUNTS["train"]
    origin, source = store.load("origin", split="train"), store.load("source", split="train")
    assert origin[: count + 18].tolist() == [0] * count + [1] * 18 and set(origin[count + 18 :]) == {0, 1}
    assert origin.tolist() == origin[source].tolist()
    path = store.path("probabilities", split="train", backbone=BACKBONE)
    assert np.load(path).shape == (count, 3)
    lines = (with_extra / "graphics" / "predictions_train.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == store.load("ids", split="train")[:count].tolist()
    assert evaluated(with_extra)["splits"]["train"]["n"] == count


def test_pretraining_is_recorded_with_the_first_network(with_extra: Path) -> None:
    (part,) = load(reader(with_extra), BACKBONE)[1]["parts"]
    phases = {name: list(phases) for name, phases in part["members"].items()}
    assert phases == {"_fold1": ["pretrain", "head", "full"], "_fold2": ["head", "full"]}
    reasons = {phase["reason"] for phases in part["members"].values() for phase in phases.values()}
    assert reasons == {"the last one"}
    curves = {path.name for path in (with_extra / "graphics").glob(f"{BACKBONE}*_curves.png")}
    assert curves == {f"{BACKBONE}_pretrain_curves.png"} | {
        f"{BACKBONE}_{phase}_fold{fold}_curves.png" for phase in ("head", "full") for fold in (1, 2)
    }


def test_networks_can_be_trained_on_added_images_only(source: Path, tmp_path: Path) -> None:
    """The images of --source are all for test."""
    added = tmp_path / "added"
    synthetic.write_sample(added, {"train": 12}, seed=1, size=(66, 88))
    pipeline.preprocess(source, tmp_path, "--split", "test", "--extra", str(added))
    pipeline.use_true_masks(tmp_path)
    pipeline.run(contract.ROI, tmp_path)
    pipeline.classify(tmp_path, "--train", "head")
    pipeline.run(contract.EVALUATION, tmp_path)
    assert {split: one["n"] for split, one in evaluated(tmp_path)["splits"].items()} == {
        "test": sum(pipeline.COUNTS.values())
    }


# ------------------------------------------------------------------------------------------------------------- teachers


def test_network_is_trained_by_another_and_evaluated_beside_it(crossed: Path, tmp_path: Path) -> None:
    folder, student = pipeline.copy(crossed, tmp_path / "chain"), "mobilenet0.75"
    flags = ("--backbone", student, "--train", "head", "--folds", "2", "--teacher", BACKBONE, "--views", "1")
    pipeline.classify(folder, *flags, "--teacher-weight", "0.5")
    pipeline.run(contract.EVALUATION, folder)
    systems = json.loads((folder / "graphics" / "metrics.json").read_text())["systems"]
    assert set(systems) == {BACKBONE, student}
    settings = reader(folder).written_with("classifier_settings", backbone=student)
    assert settings["teacher"] == [BACKBONE] and settings["teacher_weight"] == 0.5
    pipeline.classify(folder, "--train", "head", "--folds", "2")
    with pytest.raises(StageError, match="stale"):
        pipeline.run(contract.EVALUATION, folder, "--backbone", student)
