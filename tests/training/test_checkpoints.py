"""The file that holds the state of a training."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.errors import InputError
from melanoma.training import checkpoints
from melanoma.training.checkpoints import Checkpoint, State

import numpy as np
import pytest
import toy_training
from toy_training import dense, regression

ROOT = Path(__file__).parents[2]


def test_saved_state_is_loaded_unchanged(tmp_path: Path) -> None:
    variables: list[np.ndarray] = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(7, np.int64)]
    saved = State({"loss": [0.5, 0.25]}, [1.0, 2.0], variables=variables, kept=[np.ones(11) * n for n in range(11)])
    checkpoint = Checkpoint(tmp_path / "new" / "state.npz", {"seed": 0})
    assert checkpoint.load() is None
    checkpoint.save(saved)
    loaded = checkpoint.load()
    assert loaded
    assert (loaded.history, loaded.seconds, loaded.finished) == (saved.history, saved.seconds, False)
    for kind in checkpoints.ARRAYS:
        for one, other in zip(getattr(loaded, kind), getattr(saved, kind), strict=True):
            assert np.array_equal(one, other) and one.dtype == other.dtype


@pytest.mark.parametrize("end", [0, -200])
def test_truncated_file_is_reported_as_damaged(end: int, tmp_path: Path) -> None:
    checkpoint = toy_training.checkpoint(tmp_path)
    checkpoint.save(State({}, [], variables=[np.zeros(1000)]))
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:end])
    with pytest.raises(InputError, match=r"damaged.*--restart"):
        checkpoint.load()


def test_state_with_unknown_entries_is_refused(tmp_path: Path) -> None:
    state = State({}, [])
    object.__setattr__(state, "momentum", 0.5)
    toy_training.checkpoint(tmp_path).save(state)
    with pytest.raises(InputError, match=r"momentum.*--restart"):
        toy_training.checkpoint(tmp_path).load()


def test_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    toy_training.checkpoint(tmp_path, epochs=3).save(State({}, []))
    with pytest.raises(InputError, match=r"epochs: 3 then, 4 now.*--restart"):
        toy_training.fit(dense(), regression(4), tmp_path, epochs=4)


def test_state_with_another_number_of_variables_is_refused(tmp_path: Path) -> None:
    state = State({"loss": [1.0], "negative_mse": [0.0]}, [1.0], variables=[np.zeros(3)])
    toy_training.checkpoint(tmp_path, epochs=3).save(state)
    with pytest.raises(InputError, match=r"does not fit.*--restart"):
        toy_training.fit(dense(), regression(4), tmp_path)


# ---------------------------------------------------------------------------------------------------- of a data folder


def store(folder: Path, **settings: Any) -> Store:
    return Store(folder, contract.CLASSIFIER, settings)


def test_checkpoint_depends_on_images_and_training_settings(tmp_path: Path) -> None:
    used = store(tmp_path, seed=0, epochs=3, restart=True, views=1, inference="keras float32")
    used.save("ids", np.array(["a", "b"]), split="train")
    used.save("roi", np.zeros((2, 4, 4, 3), np.uint8), split="train")
    used.save_json("classifier_settings", {}, backbone="toy")
    made_with = checkpoints.for_training(used, "toy", "toy_head").made_with
    assert made_with.keys() == {"seed", "epochs", "arrays/train_roi.npy", "arrays/train_ids.npy"}


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({}, "toy"),
        ({"folds": 1, "seeds": 1}, "toy"),
        ({"folds": 3, "seeds": 1}, "toy_3_folds"),
        ({"folds": 3, "seeds": 2}, "toy_3_folds_2_seeds"),
    ],
)
def test_every_number_of_folds_and_seeds_has_its_own_folder(
    settings: dict[str, int], folder: str, tmp_path: Path
) -> None:
    path = checkpoints.for_training(store(tmp_path, **settings), "toy", "toy_full").path
    assert path == tmp_path / "checkpoints" / folder / "toy_full.npz"


def test_states_of_one_network_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    networks = ("segnet", "toy")
    for network in networks:
        checkpoints.for_training(store(tmp_path), network, network).save(State({}, []))
    checkpoints.remove(store(tmp_path), "toy")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["segnet"]
    checkpoints.remove(store(tmp_path), "segnet")
    assert not (tmp_path / "checkpoints").exists()


# ---------------------------------------------------------------------------------------------------------------- kills

SAVE_REPEATEDLY = """
import sys
from pathlib import Path
import numpy as np
from melanoma.training.checkpoints import Checkpoint, State
checkpoint = Checkpoint(Path(sys.argv[1]), {"seed": 0})
for count in range(int(sys.argv[2]), 10**9):
    checkpoint.save(State({"loss": [0.0]}, [float(count)], variables=[np.full((300, 300), count)] * 5))
    print(count, flush=True)
"""


@pytest.mark.slow
def test_kill_during_saving_leaves_the_old_or_the_new_state(tmp_path: Path) -> None:
    path, rng = tmp_path / "state.npz", np.random.default_rng(0)
    kills, count = 50, 0
    for _ in range(kills):
        command = [sys.executable, "-c", SAVE_REPEATEDLY, str(path), str(count)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            printed = [count, *map(int, process.stdout.read().split())]
        state = Checkpoint(path, {"seed": 0}).load()
        assert state and {int(value) for array in state.variables for value in np.unique(array)} == {state.seconds[0]}
        count = int(state.seconds[0])
        assert max(printed) <= count <= max(printed) + 1
    assert count > kills
