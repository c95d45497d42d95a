"""The state of a training run between two epochs, in one file that is replaced atomically."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from melanoma.artifacts.atomic import atomic_write
from melanoma.artifacts.store import Store
from melanoma.errors import InputError
from melanoma.log import log

import numpy as np

METADATA, MADE_WITH = "metadata", "made_with"  # entries of the file that hold JSON


@dataclass(frozen=True)
class State:
    """A training run after some epochs."""

    history: dict[str, list[float]]  # values after each epoch by metric
    seconds: list[float]  # duration of each epoch
    finished: bool = False
    variables: list[np.ndarray] = field(default_factory=list)  # network, random generators, optimizer; [] if finished
    kept: list[np.ndarray] = field(default_factory=list)  # weights of the epoch that is selected so far


ARRAYS = ("variables", "kept")
# Settings that do not affect training: places, what is done with the network afterwards, and what computes features.
NOT_OF_TRAINING = (
    *("data", "graphics", "flags", "weights", "restart", "views", "clean", "threshold", "distribute", "inference"),
)


class Checkpoint:
    """The file that holds the state of one training run."""

    def __init__(self, path: Path, made_with: dict[str, Any]) -> None:
        """Sets the path, and what the training run depends on: settings and inputs, as JSON values."""
        self.path, self.made_with = path, made_with

    def save(self, state: State) -> None:
        """Writes a state; the previous one stays until the new one is complete on disk."""
        metadata = {name: value for name, value in vars(state).items() if name not in ARRAYS}
        entries: dict[str, Any] = {METADATA: json.dumps(metadata), MADE_WITH: json.dumps(self.made_with)}
        for kind in ARRAYS:
            entries |= {f"{kind}{place:05d}": array for place, array in enumerate(getattr(state, kind))}
        with atomic_write(self.path) as stream:
            np.savez(stream, **entries)

    def load(self) -> State | None:
        """The last saved state; None if there is none.

        Raises:
            InputError: the file is damaged, or belongs to other settings or inputs.
        """
        try:
            with self.path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                metadata, made_with = (json.loads(str(file[name])) for name in (METADATA, MADE_WITH))
                arrays = {kind: [file[name] for name in sorted(file.files) if name.startswith(kind)] for kind in ARRAYS}
            state = State(**metadata, variables=arrays["variables"], kept=arrays["kept"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, EOFError, OSError, BadZipFile) as error:
            raise InputError(
                f"{self.path} is damaged ({error}): delete it to train this network again, or use --restart to train "
                "all of them again"
            ) from None
        names = sorted(made_with.keys() | self.made_with.keys())
        if changed := [name for name in names if made_with.get(name) != self.made_with.get(name)]:
            listed = ", ".join(
                f"{name}: {made_with.get(name)} then, {self.made_with.get(name)} now" for name in changed
            )
            raise InputError(
                f"{self.path} belongs to interrupted training with other settings or inputs ({listed}): use those "
                "to resume it, or --restart to start over"
            )
        return state


def for_training(store: Store, network: str, training: str) -> Checkpoint:
    """The checkpoint of one training run of a network, with the current settings and input arrays."""
    settings = {key: value for key, value in store.settings.items() if key not in NOT_OF_TRAINING}
    arrays = {key: digest for key, digest in store.inputs.items() if key.endswith(".npy")}
    return Checkpoint(folder(store, network) / f"{training}.npz", settings | arrays)


def note_finished(store: Store, name: str, continued: bool, **fields: str) -> None:
    """Logs that a finished training is replaced by one that begins anew, unless it is continued.

    Args:
        store: data folder.
        name: key of contract.FILES of the settings that are saved with the weights.
        continued: whether --continue is set.
        fields: see `Store.path`.
    """
    if not continued and store.has(name, **fields) and not folder(store, fields.get("backbone", "segnet")).exists():
        log.info(
            "the finished training in %s is replaced: this one begins anew; --continue would go on from its weights",
            store.data,
        )


def remove(store: Store, network: str) -> None:
    """Deletes the states of all training runs of a network."""
    place = folder(store, network)
    shutil.rmtree(place, ignore_errors=True)
    if place.parent.is_dir() and not any(place.parent.iterdir()):
        place.parent.rmdir()


def folder(store: Store, network: str) -> Path:
    """Folder of the states of a network; every combination of --folds and --seeds has its own."""
    counts = {name: store.settings.get(name, 1) for name in ("folds", "seeds")}
    suffix = "".join(f"_{count}_{name}" for name, count in counts.items() if count > 1)
    return store.data / "checkpoints" / f"{network}{suffix}"
