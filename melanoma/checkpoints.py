"""The state of a training between two epochs, in one file that is replaced whole: a kill loses what came since."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with temporary.open("wb") as stream:
                np.savez(stream, **entries)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self) -> State | None:
        """The state that was saved last; None where there is none.

        Raises:
            InputError: it is of other settings or inputs, or damaged.
        """
        try:
            with self.path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                facts, made_with = (json.loads(str(file[name])) for name in (FACTS, MADE_WITH))
                arrays = {kind: [file[name] for name in sorted(file.files) if name.startswith(kind)] for kind in ARRAYS}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, OSError, BadZipFile) as error:
            raise InputError(f"{self.path} is damaged ({error}): --restart trains anew") from None
        names = sorted(made_with.keys() | self.made_with.keys())
        if changed := [name for name in names if made_with.get(name) != self.made_with.get(name)]:
            told = ", ".join(f"{name} {made_with.get(name)} then, {self.made_with.get(name)} now" for name in changed)
            raise InputError(
                f"an interrupted training lies in {self.path}, but it is of other settings or inputs ({told}): "
                "go on with those, or train anew with --restart"
            )
        return State(**facts, variables=arrays["variables"], best=arrays["best"])
