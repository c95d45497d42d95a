"""The contract between the scripts: what is saved comes back whole, and what does not fit is refused."""

import os
from collections.abc import Callable
from pathlib import Path

from melanoma import stages
from melanoma.errors import InputError, StageError

import numpy as np
import pipeline
import pytest

ROWS, SIZE = 5, 4


def store(folder: Path, script: str = stages.PREPROCESSING, limit: int | None = None) -> stages.Store:
    """The folder as a new run of a script sees it."""
    return stages.Store(folder, script, {"limit": limit, "seed": 0})


def random(depth: int, high: int, rows: int = ROWS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (rows, SIZE, SIZE, depth), np.uint8)


def step1(folder: Path, seed: int = 0, rows: int = ROWS) -> None:
    first = store(folder)
    first.save("ids", np.array([f"ISIC_{row:07d}" for row in range(rows)]), split="train")
    first.save("images", random(3, 256, rows, seed), split="train")


def step2(folder: Path, limit: int | None = None) -> None:
    second = store(folder, stages.SEGNET, limit)
    rows = len(second.load("images", split="train"))
    second.save("predicted", random(1, 2, rows), split="train")


def step3(folder: Path) -> None:
    third = store(folder, stages.MASKING)
    masked = third.load("images", split="train") * third.load("predicted", split="train")
    third.save("masked", masked, split="train")


def images_path(folder: Path) -> Path:
    return store(folder).path("images", split="train")


def test_arrays_come_back_as_saved(tmp_path: Path) -> None:
    step1(tmp_path)
    back = store(tmp_path)
    assert np.array_equal(back.load("images", split="train"), random(3, 256))
    assert back.load("ids", split="train").tolist() == [f"ISIC_{row:07d}" for row in range(ROWS)]
    assert pipeline.hidden(tmp_path) == []


def test_loaded_arrays_are_memory_mapped_and_read_only(tmp_path: Path) -> None:
    step1(tmp_path)
    images = store(tmp_path).load("images", split="train")
    assert isinstance(images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_file_is_one_that_numpy_reads(tmp_path: Path) -> None:
    step1(tmp_path)
    assert np.array_equal(np.load(images_path(tmp_path), allow_pickle=False), random(3, 256))


def test_manifest_says_who_wrote_what_from_what(tmp_path: Path) -> None:
    step1(tmp_path)
    step2(tmp_path)
    entry = store(tmp_path).manifest["arrays/train_predicted.npy"]
    assert entry["script"] == stages.SEGNET
    assert entry["settings"] == {"limit": None, "seed": 0}
    assert entry["inputs"]["arrays/train_images.npy"] == stages.sha256(images_path(tmp_path))
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
        ("labels", np.array([0, -1, 2], np.int8)),
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
def test_what_breaks_the_contract_is_not_saved(tmp_path: Path, name: str, array: np.ndarray) -> None:
    with pytest.raises(InputError, match="expected"):
        store(tmp_path).save(name, array, split="train")
    assert not store(tmp_path).has(name, split="train")
    assert not store(tmp_path).path(name, split="train").exists()
    assert pipeline.hidden(tmp_path) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_must_be_finite(tmp_path: Path, value: float) -> None:
    array = np.array([[0, value]], np.float32)
    with pytest.raises(InputError, match="expected"):
        store(tmp_path, stages.CLASSIFIER).save("features", array, split="train", backbone="mobilenet")


def fail_on_bad_values(folder: Path) -> None:
    with store(folder).writer("masks", 2, (SIZE, SIZE, 1), split="train") as out:
        out.append(random(1, 2)[:1])
        out.append(random(1, 2)[:1] + np.uint8(7))


def fail_in_the_middle(folder: Path) -> None:
    with store(folder).writer("masks", 2, (SIZE, SIZE, 1), split="train") as out:
        out.append(random(1, 2)[:1])
        raise InputError("expected: a photograph, found: none")


def fail_with_too_few_rows(folder: Path) -> None:
    with store(folder).writer("masks", 2, (SIZE, SIZE, 1), split="train") as out:
        out.append(random(1, 2)[:1])


def fail_with_too_many_rows(folder: Path) -> None:
    with store(folder).writer("masks", 2, (SIZE, SIZE, 1), split="train") as out:
        out.append(random(1, 2)[:3])


@pytest.mark.parametrize(
    "fail", [fail_on_bad_values, fail_in_the_middle, fail_with_too_few_rows, fail_with_too_many_rows]
)
def test_old_array_stays_whole_when_writing_fails(tmp_path: Path, fail: Callable[[Path], None]) -> None:
    step1(tmp_path)
    store(tmp_path).save("masks", random(1, 2, seed=9), split="train")
    with pytest.raises(InputError):
        fail(tmp_path)
    assert np.array_equal(store(tmp_path).load("masks", split="train"), random(1, 2, seed=9))
    assert pipeline.hidden(tmp_path) == []


def test_missing_file_names_the_script_to_run(tmp_path: Path) -> None:
    step1(tmp_path)
    with pytest.raises(StageError, match=f"missing: run {stages.SEGNET}"):
        store(tmp_path).load("predicted", split="train")
    images_path(tmp_path).unlink()
    with pytest.raises(StageError, match=f"missing: run {stages.PREPROCESSING}"):
        store(tmp_path).load("images", split="train")


def test_empty_folder_names_the_first_script(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=stages.PREPROCESSING):
        store(tmp_path).splits()


def test_damaged_manifest_is_told(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"arrays/tr')
    with pytest.raises(StageError, match="damaged"):
        store(tmp_path).splits()


def test_cut_off_array_names_its_writer(tmp_path: Path) -> None:
    step1(tmp_path)
    path = images_path(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StageError, match=f"cut off or changed.*run {stages.PREPROCESSING}"):
        store(tmp_path).load("images", split="train")


def test_one_changed_pixel_is_noticed(tmp_path: Path) -> None:
    step1(tmp_path)
    path = images_path(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(StageError, match="changed"):
        store(tmp_path).load("images", split="train")


def test_array_of_another_size_is_refused(tmp_path: Path) -> None:
    step1(tmp_path)
    np.save(images_path(tmp_path), np.zeros((ROWS, 2 * SIZE, 2 * SIZE, 3), np.uint8))
    with pytest.raises(StageError, match=f"run {stages.PREPROCESSING}"):
        store(tmp_path).load("images", split="train")


@pytest.mark.parametrize("array", [np.zeros((ROWS, SIZE, SIZE, 3)), np.zeros((ROWS, SIZE, SIZE, 1), np.uint8)])
def test_contract_holds_on_load_even_where_the_manifest_agrees(tmp_path: Path, array: np.ndarray) -> None:
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
    with pytest.raises(StageError, match="no plain array"):
        store(tmp_path).load("images", split="train")
    assert not sprung.exists()


def test_touched_file_of_equal_content_is_accepted(tmp_path: Path) -> None:
    step1(tmp_path)
    os.utime(images_path(tmp_path), (1, 1))
    assert len(store(tmp_path).load("images", split="train")) == ROWS


def test_rewritten_input_makes_what_depends_on_it_stale(tmp_path: Path) -> None:
    step1(tmp_path)
    step2(tmp_path)
    step1(tmp_path, seed=1)
    with pytest.raises(StageError, match=f"stale.*run {stages.SEGNET} again"):
        store(tmp_path).load("predicted", split="train")


def test_staleness_reaches_through_the_chain(tmp_path: Path) -> None:
    third, fourth = store(tmp_path, stages.MASKING), store(tmp_path, stages.CLASSIFIER)
    step1(tmp_path)
    step2(tmp_path)
    third.load("predicted", split="train")
    third.save("masked", random(3, 256), split="train")  # made from predicted alone
    assert len(fourth.load("masked", split="train")) == ROWS
    step1(tmp_path, seed=1)
    with pytest.raises(StageError, match=f"masked.npy is stale.*run {stages.SEGNET} again"):
        store(tmp_path).load("masked", split="train")


def test_rewriting_the_same_content_makes_nothing_stale(tmp_path: Path) -> None:
    step1(tmp_path)
    step2(tmp_path)
    step3(tmp_path)
    step1(tmp_path)
    assert len(store(tmp_path).load("masked", split="train")) == ROWS


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    step1(tmp_path)
    assert np.array_equal(store(tmp_path, limit=3).load("images", split="train"), random(3, 256)[:3])
    assert len(store(tmp_path, limit=99).load("images", split="train")) == ROWS


def test_array_of_a_limited_run_is_refused_without_the_limit(tmp_path: Path) -> None:
    step1(tmp_path)
    step2(tmp_path, limit=3)
    assert len(store(tmp_path, limit=2).load("predicted", split="train")) == 2
    with pytest.raises(StageError, match=f"3 rows of 5: run {stages.SEGNET} without --limit, or .* --limit 3"):
        store(tmp_path).load("predicted", split="train")


def test_blocks_give_what_load_gives(tmp_path: Path) -> None:
    rows = stages.ROW_BLOCK + 3
    step1(tmp_path, rows=rows)
    blocks = list(store(tmp_path).blocks("images", split="train"))
    assert [len(block) for block in blocks] == [stages.ROW_BLOCK, 3]
    assert np.array_equal(np.concatenate(blocks), store(tmp_path).load("images", split="train"))
    assert sum(len(block) for block in store(tmp_path, limit=4).blocks("images", split="train")) == 4


def test_only_what_was_made_with_the_same_settings_is_reused(tmp_path: Path) -> None:
    step1(tmp_path)
    fields = {"split": "train", "backbone": "mobilenet"}
    fourth = stages.Store(tmp_path, stages.CLASSIFIER, {"limit": None, "seed": 0})
    fourth.load("images", split="train")
    fourth.save("features", np.zeros((ROWS, 2), np.float32), **fields)
    assert store(tmp_path).reusable("features", {"seed": 0}, **fields)
    assert not store(tmp_path).reusable("features", {"seed": 1}, **fields)
    step1(tmp_path, seed=1)
    assert not store(tmp_path).reusable("features", {"seed": 0}, **fields)


def test_removed_file_is_gone_from_folder_and_manifest(tmp_path: Path) -> None:
    step1(tmp_path)
    store(tmp_path).remove("images", split="train")
    assert not images_path(tmp_path).exists()
    assert not store(tmp_path).has("images", split="train")
    store(tmp_path).remove("images", split="train")


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    stages.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        stages.write_json(path, {"a": 2, "b": object()})
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert pipeline.hidden(tmp_path) == []
