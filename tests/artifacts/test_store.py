"""The data folder: what is saved comes back unchanged; what is damaged, stale or outside the contract is refused."""

import os
from collections.abc import Callable
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.atomic import sha256
from melanoma.artifacts.store import ROW_BLOCK, Store, WeightFile
from melanoma.errors import InputError, StageError

import numpy as np
import pipeline
import pytest

ROWS, SIZE = 5, 4


def store(folder: Path, script: str = contract.PREPROCESSING, limit: int | None = None) -> Store:
    """Opens the folder as a new run of a script does."""
    return Store(folder, script, {"limit": limit, "seed": 0})


def random(depth: int, high: int, rows: int = ROWS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (rows, SIZE, SIZE, depth), np.uint8)


def step1(folder: Path, seed: int = 0, rows: int = ROWS) -> None:
    first = store(folder)
    first.save("ids", np.array([f"ISIC_{row:07d}" for row in range(rows)]), split="train")
    first.save("images", random(3, 256, rows, seed), split="train")


def step2(folder: Path, limit: int | None = None) -> None:
    second = store(folder, contract.SEGNET, limit)
    rows = len(second.load("images", split="train"))
    second.save("predicted", random(1, 2, rows), split="train")


def step3(folder: Path) -> None:
    third = store(folder, contract.ROI)
    regions = third.load("images", split="train") * third.load("predicted", split="train")
    third.save("roi", regions, split="train")


def images_path(folder: Path) -> Path:
    return store(folder).path("images", split="train")


def test_arrays_come_back_as_saved(tmp_path: Path) -> None:
    step1(tmp_path)
    reader = store(tmp_path)
    assert np.array_equal(reader.load("images", split="train"), random(3, 256))
    assert reader.load("ids", split="train").tolist() == [f"ISIC_{row:07d}" for row in range(ROWS)]
    assert pipeline.hidden(tmp_path) == []


def test_loaded_arrays_are_memory_mapped_and_read_only(tmp_path: Path) -> None:
    step1(tmp_path)
    images = store(tmp_path).load("images", split="train")
    assert isinstance(images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_numpy_reads_the_file(tmp_path: Path) -> None:
    step1(tmp_path)
    assert np.array_equal(np.load(images_path(tmp_path), allow_pickle=False), random(3, 256))


def test_manifest_records_script_settings_inputs_and_versions(tmp_path: Path) -> None:
    step1(tmp_path)
    step2(tmp_path)
    entry = store(tmp_path).manifest["arrays/train_predicted.npy"]
    assert entry["script"] == contract.SEGNET
    assert entry["settings"] == {"limit": None, "seed": 0}
    assert entry["inputs"]["arrays/train_images.npy"] == sha256(images_path(tmp_path))
    assert (entry["dtype"], entry["shape"]) == ("uint8", [ROWS, SIZE, SIZE, 1])
    assert {"python", "keras", "numpy"} <= set(entry["versions"])


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("images", random(3, 256).astype(np.float32)),
        ("images", random(1, 256)),
        ("images", random(3, 256)[:, :2]),
        ("masks", random(1, 2) * np.uint8(255)),
        ("labels", np.array([0, 1, 3], np.int8)),
        ("labels", np.array([0, -2, 2], np.int8)),
        ("labels", np.array([0, 1, 2])),
        ("probabilities", np.array([[0.5, 0.5, 1.5]], np.float32)),
        ("probabilities", np.array([[0.5, 0.5, np.nan]], np.float32)),
        ("probabilities", np.array([[0.5, 0.5]], np.float32)),
        ("ids", np.array([1, 2])),
    ],
    ids=[
        "dtype", "depth", "not square", "mask of 255", "class 3", "class -1", "int64", "above 1", "NaN", "two classes",
        "ids of numbers",
    ],
)  # fmt: skip
def test_array_outside_the_contract_is_not_saved(tmp_path: Path, name: str, array: np.ndarray) -> None:
    with pytest.raises(InputError, match="expected"):
        store(tmp_path).save(name, array, split="train", backbone="mobilenet")
    assert not store(tmp_path).has(name, split="train", backbone="mobilenet")
    assert not store(tmp_path).path(name, split="train", backbone="mobilenet").exists()
    assert pipeline.hidden(tmp_path) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_must_be_finite(tmp_path: Path, value: float) -> None:
    array = np.array([[0, value]], np.float32)
    with pytest.raises(InputError, match="expected"):
        store(tmp_path, contract.CLASSIFIER).save("features", array, split="train", backbone="mobilenet")


def fail_on_bad_values(folder: Path) -> None:
    with store(folder).writer("masks", 2, (SIZE, SIZE, 1), split="train") as out:
        out.append(random(1, 2)[:1])
        out.append(random(1, 2)[:1] + np.uint8(7))


def fail_in_the_middle(folder: Path) -> None:
    with store(folder).writer("masks", 2, (SIZE, SIZE, 1), split="train") as out:
        out.append(random(1, 2)[:1])
        raise InputError("no such image")


def fail_with_too_few_rows(folder: Path) -> None:
    with store(folder).writer("masks", 2, (SIZE, SIZE, 1), split="train") as out:
        out.append(random(1, 2)[:1])


def fail_with_too_many_rows(folder: Path) -> None:
    with store(folder).writer("masks", 2, (SIZE, SIZE, 1), split="train") as out:
        out.append(random(1, 2)[:3])


@pytest.mark.parametrize(
    "fail", [fail_on_bad_values, fail_in_the_middle, fail_with_too_few_rows, fail_with_too_many_rows]
)
def test_previous_array_stays_when_writing_fails(tmp_path: Path, fail: Callable[[Path], None]) -> None:
    step1(tmp_path)
    store(tmp_path).save("masks", random(1, 2, seed=9), split="train")
    with pytest.raises(InputError):
        fail(tmp_path)
    assert np.array_equal(store(tmp_path).load("masks", split="train"), random(1, 2, seed=9))
    assert pipeline.hidden(tmp_path) == []


def test_message_about_a_missing_file_names_the_script_to_run(tmp_path: Path) -> None:
    step1(tmp_path)
    with pytest.raises(StageError, match=f"missing: run {contract.SEGNET}"):
        store(tmp_path).load("predicted", split="train")
    images_path(tmp_path).unlink()
    with pytest.raises(StageError, match=f"missing: run {contract.PREPROCESSING}"):
        store(tmp_path).load("images", split="train")


def test_message_about_an_empty_folder_names_the_first_script(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=contract.PREPROCESSING):
        store(tmp_path).splits()


def test_damaged_manifest_is_reported(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"arrays/tr')
    with pytest.raises(StageError, match="damaged"):
        store(tmp_path).splits()


def test_message_about_a_truncated_array_names_its_writer(tmp_path: Path) -> None:
    step1(tmp_path)
    path = images_path(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StageError, match=f"truncated or was changed.*run {contract.PREPROCESSING}"):
        store(tmp_path).load("images", split="train")


def test_one_changed_pixel_is_detected(tmp_path: Path) -> None:
    step1(tmp_path)
    path = images_path(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(StageError, match="was changed"):
        store(tmp_path).load("images", split="train")


def test_array_of_another_size_is_refused(tmp_path: Path) -> None:
    step1(tmp_path)
    np.save(images_path(tmp_path), np.zeros((ROWS, 2 * SIZE, 2 * SIZE, 3), np.uint8))
    with pytest.raises(StageError, match=f"run {contract.PREPROCESSING}"):
        store(tmp_path).load("images", split="train")


@pytest.mark.parametrize("array", [np.zeros((ROWS, SIZE, SIZE, 3)), np.zeros((ROWS, SIZE, SIZE, 1), np.uint8)])
def test_array_outside_the_contract_is_refused_although_the_manifest_agrees(tmp_path: Path, array: np.ndarray) -> None:
    step1(tmp_path)
    np.save(images_path(tmp_path), array)
    pipeline.rewrite_entry(tmp_path, images_path(tmp_path))
    with pytest.raises(StageError, match="expected uint8"):
        store(tmp_path).load("images", split="train")


def test_pickled_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    step1(tmp_path)
    path, sprung = images_path(tmp_path), tmp_path / "sprung"
    np.save(path, np.array([pipeline.Trap(sprung)], dtype=object), allow_pickle=True)
    pipeline.rewrite_entry(tmp_path, path)
    with pytest.raises(StageError, match="not a plain array"):
        store(tmp_path).load("images", split="train")
    assert not sprung.exists()


def test_touched_file_of_equal_content_is_accepted(tmp_path: Path) -> None:
    step1(tmp_path)
    os.utime(images_path(tmp_path), (1, 1))
    assert len(store(tmp_path).load("images", split="train")) == ROWS


def test_file_is_stale_after_its_input_has_changed(tmp_path: Path) -> None:
    step1(tmp_path)
    step2(tmp_path)
    step1(tmp_path, seed=1)
    with pytest.raises(StageError, match=f"stale.*run {contract.SEGNET} again"):
        store(tmp_path).load("predicted", split="train")


def test_staleness_passes_through_the_chain(tmp_path: Path) -> None:
    third, fourth = store(tmp_path, contract.ROI), store(tmp_path, contract.CLASSIFIER)
    step1(tmp_path)
    step2(tmp_path)
    third.load("predicted", split="train")
    third.save("roi", random(3, 256), split="train")  # its only input is the predicted masks
    assert len(fourth.load("roi", split="train")) == ROWS
    step1(tmp_path, seed=1)
    with pytest.raises(StageError, match=f"train_roi.npy is stale.*run {contract.SEGNET} again"):
        store(tmp_path).load("roi", split="train")


def test_rewriting_the_same_content_makes_nothing_stale(tmp_path: Path) -> None:
    step1(tmp_path)
    step2(tmp_path)
    step3(tmp_path)
    step1(tmp_path)
    assert len(store(tmp_path).load("roi", split="train")) == ROWS


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    step1(tmp_path)
    assert np.array_equal(store(tmp_path, limit=3).load("images", split="train"), random(3, 256)[:3])
    assert len(store(tmp_path, limit=99).load("images", split="train")) == ROWS


def test_array_of_a_limited_run_is_refused_without_the_limit(tmp_path: Path) -> None:
    step1(tmp_path)
    step2(tmp_path, limit=3)
    assert len(store(tmp_path, limit=2).load("predicted", split="train")) == 2
    with pytest.raises(
        StageError, match=f"3 rows, but 5 are needed: run {contract.SEGNET} without --limit, or .* --limit 3"
    ):
        store(tmp_path).load("predicted", split="train")


def test_first_rows_are_loaded_if_there_are_as_many(tmp_path: Path) -> None:
    step1(tmp_path)
    assert np.array_equal(store(tmp_path, limit=1).load_first("images", 3, split="train"), random(3, 256)[:3])
    with pytest.raises(StageError, match=f"{ROWS} rows, but {ROWS + 1} are needed"):
        store(tmp_path).load_first("images", ROWS + 1, split="train")


def test_blocks_have_the_rows_of_load(tmp_path: Path) -> None:
    rows = ROW_BLOCK + 3
    step1(tmp_path, rows=rows)
    blocks = list(store(tmp_path).blocks("images", split="train"))
    assert [len(block) for block in blocks] == [ROW_BLOCK, 3]
    assert np.array_equal(np.concatenate(blocks), store(tmp_path).load("images", split="train"))
    assert sum(len(block) for block in store(tmp_path, limit=4).blocks("images", split="train")) == 4


def test_only_an_array_made_with_the_same_settings_is_reused(tmp_path: Path) -> None:
    step1(tmp_path)
    fields = {"split": "train", "backbone": "mobilenet"}
    fourth = Store(tmp_path, contract.CLASSIFIER, {"limit": None, "seed": 0})
    fourth.load("images", split="train")
    fourth.save("features", np.zeros((ROWS, 2), np.float32), **fields)
    assert store(tmp_path).reusable("features", {"seed": 0}, ROWS, **fields)
    assert not store(tmp_path).reusable("features", {"seed": 0}, ROWS + 1, **fields)
    assert not store(tmp_path).reusable("features", {"seed": 1}, ROWS, **fields)
    step1(tmp_path, seed=1)
    assert not store(tmp_path).reusable("features", {"seed": 0}, ROWS, **fields)


def test_removed_file_disappears_from_folder_and_manifest(tmp_path: Path) -> None:
    step1(tmp_path)
    store(tmp_path).remove("images", split="train")
    assert not images_path(tmp_path).exists()
    assert not store(tmp_path).has("images", split="train")
    store(tmp_path).remove("images", split="train")


class Network:
    """Stands in for a Keras model."""

    def save_weights(self, filepath: WeightFile) -> None:
        assert str(filepath).endswith(".weights.h5")
        filepath.write(b"weights")


def test_files_of_other_members_are_deleted(tmp_path: Path) -> None:
    first = store(tmp_path, contract.CLASSIFIER)
    weights = first.path("classifier_weights", backbone="toy", member="").parent
    for member in ("", "_fold1", "_fold2_seed0"):
        first.save_weights("classifier_weights", Network(), backbone="toy", member=member)
    (weights / "toy_large.weights.h5").touch()  # of a backbone whose name begins alike
    deleted = store(tmp_path, contract.CLASSIFIER).keep_members("classifier_weights", ["_fold1"], backbone="toy")
    assert sorted(deleted) == ["", "_fold2_seed0"]
    assert sorted(path.name for path in weights.iterdir()) == ["toy_fold1.weights.h5", "toy_large.weights.h5"]
    assert [key for key in store(tmp_path).manifest if "toy" in key] == ["weights/toy_fold1.weights.h5"]


def test_provenance_lists_all_files_behind_a_result(tmp_path: Path) -> None:
    step1(tmp_path)
    step2(tmp_path)
    step3(tmp_path)
    fourth = Store(
        tmp_path, contract.CLASSIFIER, {"seed": 7, "weights": Path("file.h5"), "teacher": ("vgg16",), "limit": None}
    )
    fourth.load("roi", split="train")
    provenance = fourth.provenance()
    assert provenance["settings"] == {"seed": 7, "weights": "file.h5", "teacher": ["vgg16"], "limit": None}
    scripts = {key: entry["script"] for key, entry in provenance["inputs"].items()}
    assert scripts == {
        "arrays/train_ids.npy": contract.PREPROCESSING,
        "arrays/train_images.npy": contract.PREPROCESSING,
        "arrays/train_predicted.npy": contract.SEGNET,
        "arrays/train_roi.npy": contract.ROI,
    }
    assert provenance["inputs"]["arrays/train_images.npy"]["sha256"] == sha256(images_path(tmp_path))


def test_branch_keeps_its_inputs_to_itself(tmp_path: Path) -> None:
    step1(tmp_path)
    run = store(tmp_path, contract.CLASSIFIER, limit=3)
    run.load("ids", split="train")
    branch = run.branch()
    assert len(branch.load("images", split="train")) == 3 and branch.settings == run.settings
    assert list(run.inputs) == ["arrays/train_ids.npy"]
    assert list(branch.inputs) == ["arrays/train_ids.npy", "arrays/train_images.npy"]


def test_classifiers_are_those_with_probabilities(tmp_path: Path) -> None:
    run = store(tmp_path, contract.CLASSIFIER)
    assert run.classifiers() == []
    for split, name in (("val", "vgg16"), ("test", "mobilenet0.75"), ("val", "mobilenet0.75")):
        run.save("probabilities", np.ones((1, 3), np.float32), split=split, backbone=name)
    run.save("features", np.ones((1, 3), np.float32), split="val", backbone="xception")
    assert run.classifiers() == ["mobilenet0.75", "vgg16"]


@pytest.fixture
def figure(tmp_path: Path) -> Path:
    """A file in a graphics folder, made from the images of step 1."""
    step1(tmp_path)
    path = tmp_path / "elsewhere" / "roi.png"
    path.parent.mkdir()
    path.write_bytes(b"picture")
    run = store(tmp_path, contract.ROI)
    run.load("images", split="train")
    run.record_graphics(path)
    assert set(run.inputs) == {"arrays/train_ids.npy", "arrays/train_images.npy"}  # not the figure
    return path


def test_recorded_figure_is_current_wherever_it_lies(figure: Path, tmp_path: Path) -> None:
    store(tmp_path).check_graphics(figure)
    store(tmp_path).check_graphics(figure.rename(tmp_path / "roi.png"))


def test_figure_that_was_changed_is_missing_or_was_never_recorded_is_refused(figure: Path, tmp_path: Path) -> None:
    figure.write_bytes(b"PICTURE")
    with pytest.raises(StageError, match=r"was not made from .*, or was changed"):
        store(tmp_path).check_graphics(figure)
    with pytest.raises(StageError, match="was not made from"):
        store(tmp_path).check_graphics(figure.rename(figure.with_name("other.png")))
    with pytest.raises(StageError, match="is missing"):
        store(tmp_path).check_graphics(figure)


def test_figure_made_from_images_that_were_replaced_is_stale(figure: Path, tmp_path: Path) -> None:
    step1(tmp_path, seed=1)
    with pytest.raises(StageError, match=f"stale: arrays/train_images.npy has changed .* run {contract.ROI} again"):
        store(tmp_path).check_graphics(figure)


def test_weights_are_written_and_recorded(tmp_path: Path) -> None:
    path = store(tmp_path, contract.SEGNET).save_weights("segnet_weights", Network(), member="_fold1")
    assert path == tmp_path / "weights" / "segnet_fold1.weights.h5"
    assert path.read_bytes() == b"weights"
    assert store(tmp_path).check("segnet_weights", member="_fold1") == path
    path.write_bytes(b"WEIGHTS")
    with pytest.raises(StageError, match=f"changed after {contract.SEGNET}"):
        store(tmp_path).check("segnet_weights", member="_fold1")
