"""The state of a training between two epochs, in one file that is replaced whole: a kill loses what came since."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from melanoma import stages
from melanoma.errors import InputError

import numpy as np

FACTS, MADE_WITH = "facts", "made_with"  # entries of the file that hold JSON


@dataclass(frozen=True)
class State:
    """A training after some epochs."""

    history: dict[str, list[float]]  # of each quantity, its value after each epoch
    seconds: list[float]  # that each epoch took
    finished: bool = False
    variables: list[np.ndarray] = field(default_factory=list)  # of network, dropout and optimizer; none once finished
    best: list[np.ndarray] = field(default_factory=list)  # weights of the best epoch; none where the start was better


ARRAYS = ("variables", "best")
# Settings that no training depends on: where things lie, what is done with the network afterwards, and which library
# computed the features. These are no input of their own, for they follow from settings and other arrays.
OF_NO_TRAINING = ("data", "graphics", "weights", "restart", "turns", "clean", "threshold", "distribute", "inference")


class Checkpoint:
    """The file that holds the state of one training."""

    def __init__(self, path: Path, made_with: dict[str, Any]) -> None:
        """Takes the file's place and what the training depends on: settings and inputs, as JSON can hold them."""
        self.path, self.made_with = path, made_with

    def save(self, state: State) -> None:
        """Writes a state; until it is whole on disk, the one before stays."""
        facts = {name: value for name, value in vars(state).items() if name not in ARRAYS}
        entries: dict[str, Any] = {FACTS: json.dumps(facts), MADE_WITH: json.dumps(self.made_with)}
        for kind in ARRAYS:
            entries |= {f"{kind}{place:05d}": array for place, array in enumerate(getattr(state, kind))}
        with stages.whole(self.path) as stream:
            np.savez(stream, **entries)

    def load(self) -> State | None:
        """The state that was saved last; None where there is none.

        Raises:
            InputError: it is of other settings or inputs, or damaged.
        """
        try:
            with self.path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                facts, made_with = (json.loads(str(file[name])) for name in (FACTS, MADE_WITH))
                arrays = {kind: [file[name] for name in sorted(file.files) if name.startswith(kind)] for kind in ARRAYS}
            state = State(**facts, variables=arrays["variables"], best=arrays["best"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, EOFError, OSError, BadZipFile) as error:
            raise InputError(
                f"{self.path} is damaged ({error}): without that file this network is trained anew, with --restart all"
            ) from None
        names = sorted(made_with.keys() | self.made_with.keys())
        if changed := [name for name in names if made_with.get(name) != self.made_with.get(name)]:
            told = ", ".join(f"{name} {made_with.get(name)} then, {self.made_with.get(name)} now" for name in changed)
            raise InputError(
                f"an interrupted training lies in {self.path}, but it is of other settings or inputs ({told}): "
                "go on with those, or train anew with --restart"
            )
        return state


def of_training(store: stages.Store, network: str, training: str) -> Checkpoint:
    """Where the state of one training of a network lies, with the settings and arrays of this moment."""
    settings = {key: value for key, value in store.settings.items() if key not in OF_NO_TRAINING}
    arrays = {key: digest for key, digest in store.inputs.items() if key.endswith(".npy") and "_features" not in key}
    return Checkpoint(folder(store, network) / f"{training}.npz", settings | arrays)


def remove(store: stages.Store, network: str) -> None:
    """Takes the states of all trainings of a network away."""
    place = folder(store, network)
    shutil.rmtree(place, ignore_errors=True)
    if place.parent.is_dir() and not any(place.parent.iterdir()):
        place.parent.rmdir()


def folder(store: stages.Store, network: str) -> Path:
    """Where the states of the trainings of a network lie; runs with other --folds or --seeds keep theirs elsewhere."""
    counts = {name: store.settings.get(name, 1) for name in ("folds", "seeds")}
    several = "".join(f"_{count}_{name}" for name, count in counts.items() if count > 1)
    return store.data / "checkpoints" / f"{network}{several}"
