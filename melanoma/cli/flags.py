"""Flags that several scripts share, and argparse types."""

import argparse
import dataclasses
import math
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from melanoma.errors import InputError

T = TypeVar("T")
Number = TypeVar("Number", int, float)

# Flags that name local folders, or say how to run and not what.
NOT_RECORDED = {"help", "data", "graphics", "source", "jobs", "cluster", "check", "restart"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the script's docstring as written, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, []) else action.help


class RecordingParser(argparse.ArgumentParser):
    """A parser that records in the setting `flags` what differs from the defaults, as words of a command to copy."""

    def parse_known_args(  # type: ignore[override]  # typeshed has overloads
        self, args: Any = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As the base class."""
        parsed, rest = super().parse_known_args(args, namespace)
        words = [word for action in self._actions for word in _words(action, vars(parsed))]
        parsed.flags = shlex.join(words)
        return parsed, rest


def _words(action: argparse.Action, settings: Mapping[str, Any]) -> list[str]:
    value = settings.get(action.dest, action.default)
    if action.dest in NOT_RECORDED or value == action.default:
        return []
    if isinstance(value, bool):
        return [action.option_strings[0 if value else -1]]
    values = value if isinstance(value, list | tuple) else [value]
    is_path = action.dest == "weights"
    return [
        action.option_strings[0],
        *(Path(one).name if is_path or isinstance(one, Path) else str(one) for one in values),
    ]


def positive_int(text: str) -> int:
    """Argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def seed(text: str) -> int:
    """Argparse type: an integer that NumPy and Keras accept as a seed."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is outside 0 to 2**32 - 1")
    return value


def _check(value: Number, holds: bool, expected: str) -> Number:
    if not holds:
        raise argparse.ArgumentTypeError(f"{value} is not {expected}")
    return value


def positive_float(text: str) -> float:
    """Argparse type: a finite number above 0."""
    value = float(text)
    return _check(value, 0 < value < math.inf, "a finite number above 0")


def fraction(text: str) -> float:
    """Argparse type: a number in [0, 1)."""
    value = float(text)
    return _check(value, 0 <= value < 1, "at least 0 and below 1")


def open_fraction(text: str) -> float:
    """Argparse type: a number in (0, 1)."""
    value = float(text)
    return _check(value, 0 < value < 1, "above 0 and below 1")


def fraction_or_one(text: str) -> float:
    """Argparse type: a number in [0, 1]."""
    value = float(text)
    return _check(value, 0 <= value <= 1, "between 0 and 1")


def not_negative(text: str) -> float:
    """Argparse type: a finite number of at least 0."""
    value = float(text)
    return _check(value, 0 <= value < math.inf, "a finite number of at least 0")


def not_negative_int(text: str) -> int:
    """Argparse type: an integer of at least 0."""
    value = int(text)
    return _check(value, value >= 0, "an integer of at least 0")


def at_least_one(text: str) -> float:
    """Argparse type: a finite number of at least 1."""
    value = float(text)
    return _check(value, 1 <= value < math.inf, "a finite number of at least 1")


def base_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of every script, --data, --graphics, --seed and --limit; flags cannot be abbreviated."""
    parser = RecordingParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of arrays and weights")
    parser.add_argument("--graphics", type=Path, default=Path("graphics"), help="folder of figures and reports")
    parser.add_argument("--seed", type=seed, default=0, help="random seed")
    parser.add_argument(
        "--limit",
        type=positive_int,
        metavar="N",
        help="only the first N images of each split, from all classes, for a quick try",
    )
    return parser


def training_flags(
    parser: argparse.ArgumentParser,
    epochs: int | None,
    batch_size: int,
    learning_rate: float | None,
    ema: float,
    note: str = "",
) -> None:
    """Adds the flags of training.

    Args:
        parser: the script's command line.
        epochs: default of --epochs.
        batch_size: default of --batch-size.
        learning_rate: default of --learning-rate.
        ema: default of --ema.
        note: explains a default of None in the help of --epochs and --learning-rate.
    """
    parser.add_argument("--epochs", type=positive_int, default=epochs, help="maximum number of epochs" + note)
    parser.add_argument(
        "--batch-size", type=positive_int, default=batch_size, help="images per step, on all devices together"
    )
    parser.add_argument(
        "--learning-rate",
        type=positive_float,
        default=learning_rate,
        help="maximum of the learning rate schedule" + note,
    )
    parser.add_argument("--ema", type=fraction, default=ema, help="momentum of the weight EMA; 0 turns it off")
    parser.add_argument(
        "--precision",
        choices=("float32", "mixed_bfloat16", "mixed_float16"),
        default="float32",
        help="precision of the computation; weights and results stay float32",
    )
    parser.add_argument("--restart", action="store_true", help="start over instead of resuming interrupted training")
    parser.add_argument(
        "--continue",
        dest="continued",
        action="store_true",
        help="start from the weights of the finished training in the data folder and train --epochs more",
    )
    parser.add_argument(
        "--distribute",
        action="store_true",
        help="train on all GPUs of this machine or of several machines (docs/distributed.md)",
    )


def extra_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how the images of --extra are used in training."""
    parser.add_argument(
        "--pretrain",
        type=not_negative_int,
        default=0,
        metavar="EPOCHS",
        help="first train this long on the images that step 1 added with --extra",
    )
    parser.add_argument(
        "--extra-weight",
        type=not_negative,
        default=1.0,
        help="weight of the images that step 1 added with --extra, after --pretrain; 0: leave them out",
    )


def refuse(settings: Mapping[str, Any], parser: argparse.ArgumentParser, useless: Iterable[str], reason: str) -> None:
    """Refuses flags that would have no effect.

    Args:
        settings: the parsed command line, value by name.
        parser: the script's command line, for the defaults.
        useless: names of the settings that would have no effect.
        reason: why, for the message.

    Raises:
        InputError: one of them differs from its default.
    """
    if names := [name for name in useless if settings[name] != parser.get_default(name)]:
        raise InputError(f"{reason}: leave out {', '.join('--' + name.replace('_', '-') for name in names)}")


def to_dataclass(kind: type[T], settings: Mapping[str, Any]) -> T:
    """A dataclass whose fields have the values of the settings of the same names, e.g. of vars(arguments)."""
    return kind(**{field.name: settings[field.name] for field in dataclasses.fields(kind)})  # type: ignore[arg-type]
