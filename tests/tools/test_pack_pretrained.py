"""Packing of trained networks for `pretrained/`, and what --pretrained does with them."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import predict
from melanoma.artifacts import contract
from melanoma.deployment import results as predictions
from melanoma.errors import InputError
from melanoma.evaluation import report
from melanoma.inference import calibration, pretrained
from melanoma.inference.calibration import Calibration
from melanoma.inference.ensemble import load
from melanoma.models import classifier
from tools import pack_pretrained

import h5py
import numpy as np
import pipeline
import pytest
from pipeline import BACKBONE, array_bytes, exit_code, places, reader

pytestmark = pytest.mark.usefixtures("logging_restored")


@pytest.fixture(scope="module")
def cross_validated(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain with a cross-validation of two folds; read only."""
    folder = pipeline.copy(finished, tmp_path_factory.mktemp("cross_validated"))
    pipeline.classify(folder, "--train", "head", "--epochs", "3", "--folds", "2")
    pipeline.run(contract.EVALUATION, folder)
    return folder


@pytest.fixture
def chain(cross_validated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change; networks are packed into a temporary folder."""
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "pretrained")
    return pipeline.copy(cross_validated, tmp_path / "chain")


def pack(network: str, folder: Path, *flags: str) -> None:
    pack_pretrained.main(pack_pretrained.build_parser().parse_args([network, *places(folder), *flags]))


def description(network: str) -> dict:
    return json.loads((pretrained.FOLDER / f"{network}.json").read_text())


def test_segmentation_network_predicts_the_masks_it_predicted_before_packing(chain: Path) -> None:
    pack(pretrained.SEGNET, chain)
    before = {split: np.array(reader(chain).load("predicted", split=split)) for split in pipeline.COUNTS}
    reader(chain).path("segnet_weights", member="").unlink()
    pipeline.run(contract.SEGNET, chain, "--pretrained", "--views", "1")
    for split, masks in before.items():
        assert (masks == reader(chain).load("predicted", split=split)).mean() > 0.99
    with pytest.raises(InputError, match="does not belong to the network"):
        pack(pretrained.SEGNET, chain)


def test_classifiers_predict_the_probabilities_they_predicted_before_packing(chain: Path) -> None:
    pack(pretrained.CLASSIFIER, chain)
    before = {
        split: np.array(reader(chain).load("probabilities", split=split, backbone=BACKBONE))
        for split in ("val", "test")
    }
    thresholds = json.loads((chain / "graphics" / "metrics.json").read_text())["systems"][BACKBONE]["thresholds"]
    trained = [*(chain / "data").rglob(f"*{BACKBONE}*"), *(chain / "graphics").glob(f"{BACKBONE}*")]
    content = {path: path.read_bytes() for path in trained}
    pipeline.run(contract.CLASSIFIER, chain, "--pretrained")
    assert content and {path: path.read_bytes() for path in trained} == content  # nothing of the user's is lost
    for split, expected in before.items():
        after = reader(chain).load("probabilities", split=split, backbone=contract.PRETRAINED)
        assert after == pytest.approx(expected, abs=5e-3)
        assert abs(after - expected).max() > 0  # rounded to float16
    assert not reader(chain).has("probabilities", split="train", backbone=contract.PRETRAINED)
    pipeline.run(contract.EVALUATION, chain, "--occlusion", "--backbone", contract.PRETRAINED)
    (found,) = json.loads((chain / "graphics" / "metrics.json").read_text())["systems"].values()
    assert set(found["splits"]) == {"val", "test"}
    assert found["thresholds"] == thresholds  # of the cross-validation, not chosen again
    with pytest.raises(InputError, match="--pretrained"):
        pack(pretrained.CLASSIFIER, chain)


@pytest.fixture
def single(
    own_chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, np.ndarray], dict[str, Any]]:
    """A chain with one network of each kind, packed; the probabilities before that by split, and the evaluation."""
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "pretrained")
    monkeypatch.setattr(calibration, "fit", lambda *_: Calibration(0.2))  # makes probabilities differ between images
    pipeline.classify(own_chain, "--train", "head", "--epochs", "3")
    pipeline.run(contract.EVALUATION, own_chain)
    pack(pretrained.SEGNET, own_chain)
    pack(pretrained.CLASSIFIER, own_chain)
    stored = reader(own_chain)
    before = {
        split: np.array(stored.load("probabilities", split=split, backbone=BACKBONE)) for split in ("val", "test")
    }
    return own_chain, before, evaluated(own_chain)[BACKBONE]


def evaluated(folder: Path) -> dict[str, Any]:
    """The systems that the last run of evaluate.py evaluated."""
    return json.loads((folder / "graphics" / report.METRICS_FILE).read_text())["systems"]


def test_single_network_gives_the_probabilities_it_gave_before_packing(
    single: tuple[Path, dict[str, np.ndarray], dict[str, Any]], source: Path, tmp_path: Path
) -> None:
    chain, before, _ = single
    assert np.ptp(before["test"], axis=0).max() > 0.03
    assert [path.name for path in pretrained.FOLDER.glob("classifier*.h5")] == [f"classifier_{BACKBONE}.weights.h5"]
    pipeline.run(contract.CLASSIFIER, chain, "--pretrained")
    for split, expected in before.items():
        after = reader(chain).load("probabilities", split=split, backbone=contract.PRETRAINED)
        assert after == pytest.approx(expected, abs=5e-3)
        assert abs(after - expected).max() > 0  # rounded to float16
    images, out = source / "ISIC-2017_Test_v2_Data", tmp_path / "predictions"
    predict.main(predict.build_parser().parse_args([str(images), "--out", str(out), "--jobs", "1"]))
    with (out / predictions.TABLE).open(newline="") as stream:
        found = {
            row["image"]: [float(row[name]) for name in predictions.PROBABILITIES] for row in csv.DictReader(stream)
        }
    ids = reader(chain).load("ids", split="test").tolist()
    assert np.array([found[name] for name in ids]) == pytest.approx(before["test"], abs=5e-3)


def test_description_of_a_single_network_says_that_its_metrics_of_validation_are_biased(
    single: tuple[Path, dict[str, np.ndarray], dict[str, Any]],
) -> None:
    chain, _, system = single
    found = description("classifier")
    assert found["chosen_on"] == "val" and found["thresholds"] == system["thresholds"]
    assert found["data"].endswith("; calibration and thresholds chosen on validation")
    caveat = "Biased upwards: calibration and thresholds were chosen on these images."
    assert measured("classifier") == {"val": ("validation", caveat), "test": ("test", "")}
    caveat = "Biased upwards: thresholds were chosen on these images."
    assert measured("segnet") == {"val": ("validation", caveat), "test": ("test", "")}
    pipeline.run(contract.CLASSIFIER, chain, "--pretrained")
    pipeline.run(contract.EVALUATION, chain, "--backbone", contract.PRETRAINED)
    after = evaluated(chain)[contract.PRETRAINED]
    assert after["thresholds"] == system["thresholds"] and after["chosen_on"] == "val" and after["calibrated"]
    card = (chain / "graphics" / report.CARD).read_text(encoding="utf-8")
    assert "calibration and thresholds were chosen on these images" in card and "cross-validation" not in card


def measured(network: str) -> dict[str, tuple[str, str]]:
    """How the metrics of each split in a description were measured."""
    metrics = description(network)["metrics_before_packing"]
    return {split: (scores["measured_on"], scores["caveat"]) for split, scores in metrics.items()}


def test_classifier_without_labels_to_choose_thresholds_on_is_not_packed(chain: Path) -> None:
    path = chain / "graphics" / report.METRICS_FILE
    metrics = json.loads(path.read_text())
    system = metrics["systems"][BACKBONE]
    metrics["systems"][BACKBONE] = system | {"chosen_on": "val", "splits": {"test": system["splits"]["test"]}}
    path.write_text(json.dumps(metrics))
    with pytest.raises(InputError, match="neither --folds nor labels of validation"):
        pack(pretrained.CLASSIFIER, chain)


def test_only_kernels_are_packed_as_float16(chain: Path) -> None:
    pack(pretrained.SEGNET, chain)
    dtypes: dict[bool, set[str]] = {True: set(), False: set()}

    def visit(_: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            dtypes[item.ndim > 1].add(str(item.dtype))

    packed = pretrained.FOLDER / "segnet.weights.h5"
    with h5py.File(packed) as file:
        file.visititems(visit)
    assert dtypes[True] == {"float16"} and "float16" not in dtypes[False]
    assert packed.stat().st_size < reader(chain).path("segnet_weights", member="").stat().st_size


def test_value_outside_the_range_of_float16_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["kernel"] = np.full((2, 2), 1e6, np.float32)
    with pytest.raises(InputError, match="kernel has values outside the range of float16"):
        pack_pretrained.to_float16([tmp_path / "a.h5"], tmp_path / "b.h5")


def test_descriptions_have_data_settings_metrics_machine_and_versions(chain: Path) -> None:
    pack(pretrained.SEGNET, chain)
    pack(pretrained.CLASSIFIER, chain)
    shared = {"sha256", "data", "training_ids", "settings", "metrics_before_packing", "packed_on", "versions"}
    assert description("segnet").keys() >= shared | {"design", "threshold"}
    found = description("classifier")
    assert found.keys() >= shared | {"parts", "thresholds"}
    assert found["roi"] == "crop" and [part["backbone"] for part in found["parts"]] == [BACKBONE]
    assert found["metrics_before_packing"]["train"]["n"] == pipeline.COUNTS["train"]
    assert found["settings"][contract.CLASSIFIER]["folds"] == 2
    assert found["chosen_on"] == "train" and measured("classifier")["val"] == ("validation", "")
    on_train = ("cross-validation", "Biased upwards: calibration and thresholds were chosen on these images.")
    assert measured("classifier")["train"] == on_train
    hashes = sorted(map(pretrained.hash_id, originals(chain, "train")))
    assert found["training_ids"] == description("segnet")["training_ids"] == hashes
    assert len(hashes) == pipeline.COUNTS["train"]
    assert set(found["sha256"]) == {path.name for path in pretrained.FOLDER.glob("classifier*.h5")}
    assert str(chain) not in json.dumps([found, description("segnet")])


def test_mean_of_weight_files_is_packed(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 6.0)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["layer/kernel"] = np.full((2, 2), value, np.float32)
            file["layer/bias"] = np.full(2, -value, np.float32)
    pack_pretrained.to_float16([tmp_path / f"{name}.h5" for name in "abc"], tmp_path / "mean.h5")
    with h5py.File(tmp_path / "mean.h5") as file:
        assert file["layer/kernel"].dtype == np.float16 and (file["layer/kernel"][()] == 3).all()
        assert file["layer/bias"].dtype == np.float32 and (file["layer/bias"][()] == -3).all()


@pytest.mark.parametrize(
    ("count", "groups"),
    [
        (None, [["a"], ["b"], ["c"], ["d"]]),
        (1, [["a", "b", "c", "d"]]),
        (2, [["a", "b"], ["c", "d"]]),
        (4, [["a"], ["b"], ["c"], ["d"]]),
    ],
)
def test_neighbouring_networks_are_grouped(count: int | None, groups: list[list[str]]) -> None:
    assert pack_pretrained.grouped(list("abcd"), count) == {group[0]: group for group in groups}


@pytest.mark.parametrize(("members", "count"), [("abcd", 3), ("abcd", 5), (["_fold1_seed0", "_fold1_seed1"], 1)])
def test_networks_that_cannot_be_averaged_in_equal_groups_of_one_seed_are_refused(
    members: list[str], count: int
) -> None:
    with pytest.raises(InputError, match=f"--networks {count}"):
        pack_pretrained.grouped(list(members), count)


def test_number_of_networks_is_of_all_backbones_or_of_each() -> None:
    found = [pack_pretrained.per_backbone(networks, 3) for networks in ((), (2,), (1, 2, 3))]
    assert found == [[None, None, None], [2, 2, 2], [1, 2, 3]]
    with pytest.raises(InputError, match="there are 3 backbones"):
        pack_pretrained.per_backbone((1, 2), 3)


def test_classifiers_of_all_folds_are_averaged_into_one(chain: Path) -> None:
    pack(pretrained.CLASSIFIER, chain, "--networks", "1")
    (part,) = description("classifier")["parts"]
    assert list(part["members"]) == ["_fold1"] and {
        first: list(notes) for first, notes in part["averaged"].items()
    } == {"_fold1": ["_fold1", "_fold2"]}
    assert [path.name for path in pretrained.FOLDER.glob("*.h5")] == [pretrained.weight_file(BACKBONE, "_fold1")]
    pipeline.run(contract.CLASSIFIER, chain, "--pretrained", "--views", "2")
    blend, settings = load(reader(chain), contract.PRETRAINED)
    assert settings["parts"][0]["views"] == 2
    folds = [
        load_weights(reader(chain).path("classifier_weights", backbone=BACKBONE, member=f"_fold{fold}"))
        for fold in (1, 2)
    ]
    found = blend.parts[0].classifiers[0].model.get_weights()
    for value, expected in zip(found, (np.mean(pair, axis=0) for pair in zip(*folds, strict=True)), strict=True):
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-3)


def load_weights(path: Path) -> list[np.ndarray]:
    model = classifier.build(BACKBONE, pipeline.SIZE, "none").model
    model.load_weights(path)
    return model.get_weights()


def test_segmentation_networks_of_two_folds_are_packed(chain: Path) -> None:
    pipeline.segment(chain, "--folds", "2")
    pack(pretrained.SEGNET, chain)
    assert list(description("segnet")["sha256"]) == [f"segnet_fold{fold}.weights.h5" for fold in (1, 2)]
    before = {split: np.array(reader(chain).load("predicted", split=split)) for split in ("val", "test")}
    pipeline.run(contract.SEGNET, chain, "--pretrained")
    for split, masks in before.items():
        assert (masks == reader(chain).load("predicted", split=split)).mean() > 0.99


def test_segmentation_networks_are_not_averaged(chain: Path) -> None:
    with pytest.raises(InputError, match="for classifiers"):
        pack(pretrained.SEGNET, chain, "--networks", "1")


def test_network_of_some_of_the_images_is_not_packed(chain: Path) -> None:
    pipeline.segment(chain, "--limit", "9")
    with pytest.raises(InputError, match="--limit"):
        pack(pretrained.SEGNET, chain)


def test_inference_engine_of_the_last_masks_does_not_matter(chain: Path) -> None:
    path = chain / "graphics" / "segmentation.json"
    metrics = json.loads(path.read_text())
    metrics["settings"]["inference"] = "another engine"
    path.write_text(json.dumps(metrics))
    pack(pretrained.SEGNET, chain)
    assert (pretrained.FOLDER / "segnet.json").is_file()


def test_metrics_of_another_classifier_are_not_packed(chain: Path) -> None:
    pipeline.classify(chain, "--train", "head")
    with pytest.raises(InputError, match="does not belong to the classifier"):
        pack(pretrained.CLASSIFIER, chain)


def test_metrics_of_some_of_the_images_are_not_packed(chain: Path) -> None:
    pipeline.run(contract.EVALUATION, chain, "--limit", "9")
    with pytest.raises(InputError, match="--limit"):
        pack(pretrained.CLASSIFIER, chain)


def test_damaged_network_is_refused_and_the_arrays_stay(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(pretrained.SEGNET, chain)
    path = pretrained.FOLDER / "segnet.weights.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = array_bytes(chain)
    assert exit_code(monkeypatch, contract.SEGNET, *places(chain), "--pretrained") == 2
    assert "SHA-256" in capsys.readouterr().err
    assert array_bytes(chain) == before


@pytest.mark.parametrize(
    ("script", "flags", "useless"),
    [
        (contract.SEGNET, ("--network", "segnet", "--epochs", "3"), "--network, --epochs"),
        (contract.CLASSIFIER, ("--input-size", "32", "--folds", "3"), "--input-size, --folds"),
    ],
)
def test_flags_of_training_are_refused_with_pretrained(
    script: str,
    flags: tuple[str, ...],
    useless: str,
    chain: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code(monkeypatch, script, *places(chain), "--pretrained", *flags) == 2
    assert f"leave out {useless}" in capsys.readouterr().err


def test_pretrained_classifiers_need_their_region_of_interest(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(pretrained.CLASSIFIER, chain)
    pipeline.run(contract.ROI, chain, "--roi", "mask")
    assert exit_code(monkeypatch, contract.CLASSIFIER, *places(chain), "--pretrained") == 2
    assert "trained with --roi crop" in capsys.readouterr().err


def originals(folder: Path, split: str) -> list[str]:
    """Ids of a split's images without augmented copies."""
    return pretrained.original_ids(reader(folder), split)


def segmentation_results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "graphics" / "segmentation.json").read_text())


def test_images_that_the_pretrained_networks_were_trained_on_are_left_out_of_the_evaluation(
    chain: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack(pretrained.SEGNET, chain)
    pack(pretrained.CLASSIFIER, chain)
    trained_on = originals(chain, "train")
    pipeline.preprocess(source, chain, "--split", "2018")
    seen = {split: [name for name in originals(chain, split) if name in trained_on] for split in ("val", "test")}
    assert all(seen.values())
    caplog.set_level("INFO")
    pipeline.run(contract.SEGNET, chain, "--pretrained", "--views", "1")
    results = segmentation_results(chain)
    assert results["seen"] == seen
    for split, ids in seen.items():
        assert results["splits"][split]["n"] == len(originals(chain, split)) - len(ids)
    pipeline.run(contract.ROI, chain)
    pipeline.run(contract.CLASSIFIER, chain, "--pretrained")
    settings = json.loads(reader(chain).path("classifier_settings", backbone=contract.PRETRAINED).read_text())
    assert settings["seen"] == seen and "training_ids" not in settings
    expected = (
        f"{len(seen['val'])} of {len(originals(chain, 'val'))} images of validation were used to train the pretrained "
        "networks: predicted, left out of the evaluation"
    )
    assert caplog.messages.count(expected) == 2  # of both networks


def test_masks_of_a_split_of_training_images_only_are_predicted_and_not_evaluated(chain: Path, source: Path) -> None:
    pack(pretrained.SEGNET, chain)
    moved = chain / "moved"  # the train images as test images
    for folder in ("Data", "Part1_GroundTruth"):
        copied = moved / f"ISIC-2017_Test_v2_{folder}"
        shutil.copytree(source / f"ISIC-2017_Training_{folder}", copied)
    pipeline.preprocess(moved, chain)
    pipeline.run(contract.SEGNET, chain, "--pretrained", "--views", "1")
    results = segmentation_results(chain)
    assert results["splits"] == {} and len(results["seen"]["test"]) == pipeline.COUNTS["train"]
    assert len(reader(chain).load("predicted", split="test")) == pipeline.COUNTS["train"]
    assert not (chain / "graphics" / "segnet_overlays.png").exists()
