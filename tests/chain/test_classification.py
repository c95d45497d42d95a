"""The fourth script: who learns from what, several networks together, cross-validation, the pretrained ones."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import MELANOMA
from melanoma.dataset.batches import Batches
from melanoma.dataset.splits import COPY_SUFFIX, Member, are_original, assign_folds, list_members, original_id
from melanoma.errors import InputError, StageError
from melanoma.evaluation import occlusion
from melanoma.inference import openvino, pretrained
from melanoma.inference.ensemble import load
from melanoma.inference.predict import mean_output
from melanoma.metrics import classification
from melanoma.models import backbones
from melanoma.sources import isic
from melanoma.training import checkpoints, loop
from tools import pack_pretrained

import keras
import numpy as np
import pipeline
import pytest
from pipeline import BACKBONE, exit_code, places, reader


def told(folder: Path) -> dict[str, Any]:
    """What evaluate.py wrote of the own network."""
    return json.loads((folder / "graphics" / "metrics.json").read_text())["systems"][BACKBONE]


def probabilities(folder: Path, split: str) -> np.ndarray:
    return np.array(reader(folder).load("probabilities", split=split))


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Batches, str]]:
    """The training batches and the loss of every call of `training.fit` from now on."""
    seen, fit = [], loop.fit

    def watched(model: keras.Model, train: Batches, *rest: Any, **more: Any) -> loop.TrainingResult:
        seen.append((train, more["loss"]))
        return fit(model, train, *rest, **more)

    monkeypatch.setattr(training, "fit", watched)
    return seen


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A weight file of the backbone."""
    keras.utils.set_random_seed(0)
    backbone = backbones.build(BACKBONE, pipeline.SIZE, "none", pooling="avg")
    pipeline.enliven(backbone)
    path = tmp_path_factory.mktemp("weights") / "backbone.weights.h5"
    backbone.save_weights(path)
    return str(path)


@pytest.fixture(scope="module")
def crossed(finished: Path, weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain with a cross-validation of two folds and two seeds; read only."""
    folder = pipeline.copy(finished, tmp_path_factory.mktemp("crossed"))
    pipeline.classify(folder, "--train", "head", "--weights", weights, "--folds", "2", "--seeds", "2")
    pipeline.run(contract.EVALUATION, folder)
    return folder


def test_each_photograph_is_judged_by_the_networks_that_have_not_seen_it(crossed: Path) -> None:
    store = reader(crossed)
    ids = store.load("ids", split="train").tolist()
    ensemble, settings = load(store, BACKBONE)
    assert list(settings["members"]) == ["_fold1_seed0", "_fold1_seed1", "_fold2_seed0", "_fold2_seed1"]
    masked = store.load("roi", split="train")
    each = [mean_output([one.model], masked, tta=True) for one in ensemble.classifiers]
    assert abs(each[0] - each[1]).max() > 1e-4  # another seed, another network
    of_row = assign_folds(ids, 2, 0)
    own = np.where(of_row[:, None] == 0, (each[0] + each[1]) / 2, (each[2] + each[3]) / 2)
    for row, name in enumerate(ids):
        expected = ensemble.calibration.apply(own[None, ids.index(original_id(name))])[0]
        assert probabilities(crossed, "train")[row] == pytest.approx(expected, abs=1e-4)
    everyone = ensemble.calibration.apply(
        np.mean(
            [mean_output([one.model], store.load("roi", split="val"), True) for one in ensemble.classifiers],
            axis=0,
        )
    )
    assert probabilities(crossed, "val") == pytest.approx(everyone, abs=1e-4)


def test_cross_validation_is_judged_on_photographs_alone_and_chooses_thresholds(crossed: Path) -> None:
    store, found = reader(crossed), told(crossed)
    rows = are_original(store.load("ids", split="train").tolist())
    labels, own = store.load("labels", split="train")[rows], probabilities(crossed, "train")[rows]
    scored = found["splits"]["train"]
    assert scored["n"] == pipeline.COUNTS["train"]
    assert scored["metrics"]["melanoma auc"] == pytest.approx(classification.auc(labels == MELANOMA, own[:, MELANOMA]))
    youden = classification.operating_points(labels == MELANOMA, own[:, MELANOMA])
    assert found["thresholds"]["melanoma"] == pytest.approx(youden)
    lines = (crossed / "graphics" / "predictions_train.csv").read_text().splitlines()
    assert len(lines) == 1 + pipeline.COUNTS["train"] and COPY_SUFFIX not in "".join(lines)
    for file in ("report.html", "MODEL_CARD.md"):
        text = (crossed / "graphics" / file).read_text()
        assert "Cross-validation" in text and "had not learnt from it" in text
    assert "4 such networks answer together" in text


def test_two_cross_validations_are_compared(crossed: Path, tmp_path: Path) -> None:
    folder = pipeline.copy(crossed, tmp_path / "chain")
    ours = folder / "graphics" / "predictions_train.csv"
    theirs = ours.rename(ours.with_name("a.csv"))
    shuffled = theirs.with_name("b.csv")
    head, *lines = theirs.read_text().splitlines()
    ids, values = zip(*(line.split(",", 1) for line in lines), strict=True)
    shuffled.write_text("\n".join([head, *map(",".join, zip(ids, reversed(values), strict=True))]))
    pipeline.run(contract.EVALUATION, folder, "--compare", str(theirs), str(shuffled))
    compared = json.loads((folder / "graphics" / "comparison.json").read_text())["splits"]
    assert list(compared) == ["train"]
    expected = told(folder)["splits"]["train"]["metrics"]["mean auc"]
    assert compared["train"]["mean auc"]["first"] == pytest.approx(expected)
    assert compared["train"]["mean auc"]["second"] != pytest.approx(expected)


def test_probe_asks_all_networks_together(crossed: Path, tmp_path: Path) -> None:
    folder = pipeline.copy(crossed, tmp_path / "chain")
    pipeline.run(contract.EVALUATION, folder, "--occlusion")
    found = told(folder)
    assert set(found["occlusion"]) == {"val", "test"}
    for split, variants in found["occlusion"].items():
        rows = occlusion.rows_with_lesion(reader(folder), split)
        expected = classification.task_aucs(
            reader(folder).load("labels", split=split)[rows], probabilities(folder, split)[rows]
        )
        assert variants[occlusion.AS_TRAINED]["metrics"] == pytest.approx(expected, abs=0.05)


def test_files_of_more_networks_go_with_the_next_training(crossed: Path, tmp_path: Path) -> None:
    folder = pipeline.copy(crossed, tmp_path / "chain")
    (folder / "graphics" / f"{BACKBONE}_full_curves.png").write_bytes(b"")
    states = folder / "data" / "checkpoints" / f"{BACKBONE}_3_folds"
    states.mkdir(parents=True)  # of a run that was interrupted
    stranger = folder / "data" / "weights" / f"{BACKBONE}v2.weights.h5"
    stranger.write_bytes(b"")
    pipeline.classify(folder, "--train", "head")
    weights = {path.name for path in stranger.parent.glob("mobilenet*.h5")}
    assert weights == {f"{BACKBONE}.weights.h5", f"{BACKBONE}_head.weights.h5", stranger.name}
    curves = {path.name for path in (folder / "graphics").glob(f"{BACKBONE}*_curves.png")}
    assert curves == {f"{BACKBONE}_head_curves.png"} and states.is_dir()
    assert not reader(folder).has("probabilities", split="train")
    pipeline.run(contract.EVALUATION, folder)
    assert set(told(folder)["splits"]) == {"val", "test"}
    assert not list((folder / "graphics").glob("*_train.*"))


@pytest.mark.parametrize("balance", ["copies", "weights", "focal", "sampling", "none"])
def test_classes_are_balanced_as_asked(own_chain: Path, balance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    pipeline.classify(own_chain, "--train", "head", "--balance", balance, "--folds", "2", "--epochs", "2")
    ids = reader(own_chain).load("ids", split="train").tolist()
    labels = reader(own_chain).load("labels", split="train")
    of_row = assign_folds(ids, 2, 0)
    assert len(seen) == 2
    for fold, (batches, loss) in enumerate(seen):
        assert ("focal" in loss) == (balance == "focal")
        rows = np.flatnonzero((of_row != fold) & (are_original(ids) | (balance == "copies")))
        assert batches.rows.tolist() == rows.tolist()
        for weights, name in ((batches.chances, "sampling"), (batches.loss_weights, "weights")):
            assert (weights is not None) == (balance == name)
            if weights is not None:
                of_class = np.bincount(labels[rows], weights[rows])
                assert of_class == pytest.approx(np.full(3, len(rows) / 3))


def test_class_that_is_missing_outside_a_fold_is_told(own_chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = reader(own_chain).load("labels", split="train")
    monkeypatch.setattr(folds, "assign", lambda *_: (labels != MELANOMA).astype(int))
    with pytest.raises(InputError, match=r"no melanoma among \d+ training images"):
        pipeline.classify(own_chain, "--folds", "2")


def test_backbone_works_at_the_size_asked(own_chain: Path) -> None:
    pipeline.classify(own_chain, "--train", "head", "--input-size", "64")
    ensemble, settings = load(reader(own_chain), BACKBONE)
    assert settings["input_size"] == 64 and settings["size"] == pipeline.SIZE
    (network,) = ensemble.classifiers
    assert network.backbone.input_shape[1] == 64 and network.model.input_shape[1] == pipeline.SIZE
    masked = reader(own_chain).load("roi", split="val")
    assert probabilities(own_chain, "val") == pytest.approx(ensemble.probabilities(masked, 16, "val")[0], abs=1e-4)


def test_features_of_another_size_are_computed_anew(own_chain: Path, weights: str) -> None:
    pipeline.classify(own_chain, "--train", "head", "--weights", weights)
    before = np.array(reader(own_chain).load("features", split="val", backbone=BACKBONE))
    pipeline.classify(own_chain, "--train", "head", "--weights", weights, "--input-size", "64")
    assert not np.allclose(before, reader(own_chain).load("features", split="val", backbone=BACKBONE))


# ------------------------------------------------------------------------------------------------------- pretrained


@pytest.fixture
def packed(crossed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A chain whose classifiers are packed as the pretrained ones."""
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "pretrained")
    folder = pipeline.copy(crossed, tmp_path / "chain")
    pack_pretrained.main(pack_pretrained.parser().parse_args([pretrained.CLASSIFIER, *places(folder)]))
    return folder


def test_pretrained_classifiers_answer_as_they_did_when_they_were_packed(packed: Path) -> None:
    before = {split: probabilities(packed, split) for split in ("val", "test")}
    thresholds = told(packed)["thresholds"]
    for path in (packed / "data" / "weights").glob(f"{BACKBONE}*"):
        path.unlink()
    pipeline.run(contract.CLASSIFIER, packed, "--pretrained")
    for split, expected in before.items():
        assert probabilities(packed, split) == pytest.approx(expected, abs=5e-3)
        assert abs(probabilities(packed, split) - expected).max() > 0  # rounded to float16
    assert not reader(packed).has("probabilities", split="train")
    pipeline.run(contract.EVALUATION, packed, "--occlusion")
    assert set(told(packed)["splits"]) == {"val", "test"}
    assert told(packed)["thresholds"] == thresholds  # of the cross-validation, not chosen anew
    with pytest.raises(InputError, match="--limit or --pretrained"):
        pack_pretrained.main(pack_pretrained.parser().parse_args([pretrained.CLASSIFIER, *places(packed)]))
    card = (packed / "graphics" / "MODEL_CARD.md").read_text()
    assert "4 such networks answer together" in card
    assert "Best epochs were chosen on these very images" in card and "thresholds were chosen" not in card


def test_pretrained_facts_tell_what_they_are_of(packed: Path) -> None:
    facts = json.loads((pretrained.FOLDER / "classifier.json").read_text())
    assert facts["roi"] == "crop" and facts["backbone"] == BACKBONE
    assert facts["metrics_before_float16"]["train"]["n"] == pipeline.COUNTS["train"]
    assert facts["settings"][contract.CLASSIFIER]["folds"] == 2
    assert {"machine", "versions", "data", "calibration"} <= facts.keys()
    assert set(facts["sha256"]) == {path.name for path in pretrained.FOLDER.glob("*.h5")}
    assert str(packed) not in json.dumps(facts)


def test_pretrained_classifiers_want_their_region_of_interest(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    pipeline.run(contract.ROI, packed, "--roi", "mask")
    assert exit_code(monkeypatch, contract.CLASSIFIER, *places(packed), "--pretrained") == 2
    assert "know --roi crop" in capsys.readouterr().err


def test_flags_of_training_go_not_with_the_pretrained_classifiers(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    flags = ("--pretrained", "--backbone", "mobilenet", "--folds", "3")
    assert exit_code(monkeypatch, contract.CLASSIFIER, *places(packed), *flags) == 2
    assert "leave out --backbone, --folds" in capsys.readouterr().err


def test_photographs_that_the_pretrained_networks_may_know_are_not_judged(
    packed: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    logging_restored: None,
) -> None:
    pipeline.preprocess(source, packed, "--split", "2018")
    assert exit_code(monkeypatch, contract.SEGNET, *places(packed), "--pretrained") == 2
    pipeline.stand_in_for_segnet(packed)
    pipeline.run(contract.ROI, packed)
    assert exit_code(monkeypatch, contract.CLASSIFIER, *places(packed), "--pretrained") == 2
    assert capsys.readouterr().err.count("--split 2018 judges some of them") == 2


def test_figures_of_a_part_of_the_images_are_not_packed(packed: Path) -> None:
    pipeline.run(contract.EVALUATION, packed, "--limit", "9")
    with pytest.raises(InputError, match="--limit"):
        pack_pretrained.main(pack_pretrained.parser().parse_args([pretrained.CLASSIFIER, *places(packed)]))


@pytest.mark.parametrize("mask_folds", [1, 2])
def test_masks_by_a_network_that_has_seen_them_are_told(
    mask_folds: int, own_chain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outlining = Store(own_chain / "data", contract.SEGNET, {"folds": mask_folds})
    for split in pipeline.COUNTS:
        outlining.save("predicted", np.array(outlining.load("predicted", split=split)), split=split)
    pipeline.run(contract.ROI, own_chain)
    pipeline.classify(own_chain, "--train", "head", "--folds", "2")
    assert ("by a network that has seen them" in caplog.text) == (mask_folds == 1)


def test_training_without_train_photographs_names_what_is_missing(own_source: Path, tmp_path: Path) -> None:
    shutil.rmtree(isic.image_folder(own_source, "train"))
    pipeline.preprocess(own_source, tmp_path)
    pipeline.stand_in_for_segnet(tmp_path)
    pipeline.run(contract.ROI, tmp_path)
    with pytest.raises(StageError, match="no labelled training images"):
        pipeline.classify(tmp_path)


def test_regions_of_interest_are_not_mixed(own_chain: Path) -> None:
    masking = Store(own_chain / "data", contract.ROI, {"roi": "mask"})
    masking.save("roi", np.array(masking.load("roi", split="val")), split="val")
    with pytest.raises(StageError, match=r"differ in --roi \(crop, mask\)"):
        pipeline.classify(own_chain)


def test_figures_of_another_classifier_are_not_packed(packed: Path) -> None:
    pipeline.classify(packed, "--train", "head")
    with pytest.raises(InputError, match="is not of the classifier"):
        pack_pretrained.main(pack_pretrained.parser().parse_args([pretrained.CLASSIFIER, *places(packed)]))


def test_names_of_members_are_what_the_contract_expects() -> None:
    for counts in itertools.product((1, 3), (1, 2)):
        members = list_members(*counts, 5)
        assert len({member.name for member in members}) == counts[0] * counts[1]
        assert all(contract.MEMBER_NAME.fullmatch(member.name) for member in members)
    assert list_members(1, 1, 5) == [Member("", -1, 5)]


def test_random_weights_are_the_only_ones_whose_features_depend_on_the_seed(
    own_chain: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.classify(own_chain, "--train", "head")
    before = reader(own_chain).manifest["arrays/val_mobilenet_features.npy"]["sha256"]
    pipeline.classify(own_chain, "--train", "head", "--seed", "1")
    after = reader(own_chain).manifest["arrays/val_mobilenet_features.npy"]["sha256"]
    assert before != after
    moments = []
    for seed, least_views in (("0", 0), ("1", openvino.LEAST_VIEWS)):
        monkeypatch.setattr(inference, "LEAST_VIEWS", least_views)  # another library, perhaps
        pipeline.classify(own_chain, "--weights", weights, "--train", "head", "--seed", seed)
        moments.append(reader(own_chain).path("features", split="val", backbone=BACKBONE).stat().st_mtime_ns)
    assert moments[0] == moments[1]


def test_state_of_a_training_rests_on_the_images_not_on_their_features(finished: Path) -> None:
    store = Store(finished / "data", contract.CLASSIFIER, {"inference": "keras float32", "seed": 0})
    store.load("features", split="train", backbone=BACKBONE)
    store.load("roi", split="train")
    made_with = checkpoints.for_training(store, BACKBONE, "head").made_with
    assert made_with.keys() == {"seed", "arrays/train_roi.npy", "arrays/train_ids.npy"}
