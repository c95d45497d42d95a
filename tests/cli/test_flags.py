"""Argparse types and the flags that several scripts share."""

import argparse
from collections.abc import Callable
from pathlib import Path

from melanoma.cli import flags
from melanoma.errors import InputError

import pytest


def parser() -> argparse.ArgumentParser:
    parser = flags.base_parser("What the script does.\n\nRun     python script.py")
    flags.training_flags(parser, epochs=None, batch_size=16, learning_rate=1e-3, ema=0.99, note=": depends on --train")
    return parser


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (flags.positive_int, "1", 1),
        (flags.seed, "0", 0),
        (flags.seed, str(2**32 - 1), 2**32 - 1),
        (flags.positive_float, "1e-9", 1e-9),
        (flags.fraction, "0", 0),
        (flags.fraction, "0.999", 0.999),
        (flags.fraction_or_one, "1", 1),
        (flags.not_negative, "0", 0),
        (flags.not_negative, "2.5", 2.5),
        (flags.not_negative_int, "0", 0),
        (flags.at_least_one, "1", 1),
        (flags.at_least_one, "3.5", 3.5),
    ],
)
def test_value_in_range_is_accepted(kind: Callable[[str], float], text: str, value: float) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (flags.positive_int, "0"),
        (flags.seed, "-1"),
        (flags.seed, str(2**32)),
        (flags.positive_float, "0"),
        (flags.positive_float, "nan"),
        (flags.positive_float, "inf"),
        (flags.fraction, "-0.1"),
        (flags.fraction, "1"),
        (flags.fraction, "nan"),
        (flags.fraction_or_one, "1.1"),
        (flags.fraction_or_one, "nan"),
        (flags.not_negative, "-1e-9"),
        (flags.not_negative, "nan"),
        (flags.not_negative, "inf"),
        (flags.not_negative_int, "-1"),
        (flags.at_least_one, "0.99"),
        (flags.at_least_one, "nan"),
        (flags.at_least_one, "inf"),
    ],
)
def test_value_out_of_range_is_refused(kind: Callable[[str], float], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"\d|nan|inf"):
        kind(text)


@pytest.mark.parametrize("kind", [flags.positive_int, flags.seed, flags.fraction])
def test_text_that_is_not_a_number_is_refused(kind: Callable[[str], float]) -> None:
    with pytest.raises(ValueError, match="x"):
        kind("x")


@pytest.mark.parametrize("words", [["--no-such-flag"], ["--lim", "3"], ["--limit", "0"], ["--limit", "x"], ["extra"]])
def test_wrong_command_line_ends_with_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(words)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_defaults_of_the_common_flags() -> None:
    arguments = vars(parser().parse_args([]))
    assert arguments == {
        "data": Path("data"), "graphics": Path("graphics"), "seed": 0, "limit": None,
        "epochs": None, "batch_size": 16, "learning_rate": 1e-3, "ema": 0.99,
        "precision": "float32", "restart": False, "continued": False, "distribute": False, "flags": "",
    }  # fmt: skip


def test_help_shows_docstring_notes_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "What the script does.\n\nRun     python script.py\n" in shown
    words = " ".join(shown.split())
    assert "number of epochs: depends on --train" in words and "(default: 0.99)" in words


def test_flags_without_effect_are_named() -> None:
    settings = vars(parser().parse_args(["--batch-size", "4", "--ema", "0.5", "--seed", "1"]))
    with pytest.raises(InputError, match=r"^nothing is trained: leave out --batch-size, --ema$"):
        flags.refuse(settings, parser(), ("batch_size", "ema", "restart"), "nothing is trained")


def test_defaults_without_effect_are_accepted() -> None:
    flags.refuse(vars(parser().parse_args([])), parser(), ("batch_size", "ema"), "nothing is trained")


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ("", ""),
        ("--seed 0 --epochs 3", "--epochs 3"),
        ("--data here --graphics there --restart --limit 4", "--limit 4"),
        ("--learning-rate 0.01 --distribute", "--learning-rate 0.01 --distribute"),
        ("--no-clean --weights /a/folder/net.h5", "--no-clean --weights net.h5"),
        ("--predictions a.csv /b/c.csv", "--predictions a.csv c.csv"),
    ],
)
def test_flags_that_differ_from_their_defaults_are_recorded_without_local_folders(given: str, recorded: str) -> None:
    command_line = parser()
    command_line.add_argument("--clean", action=argparse.BooleanOptionalAction, default=True)
    command_line.add_argument("--weights", default="imagenet")
    command_line.add_argument("--predictions", type=Path, nargs="+", default=[])
    settings = command_line.parse_args(given.split())
    assert settings.flags == recorded
    repeated = command_line.parse_args(settings.flags.split())
    assert repeated.flags == settings.flags
