"""The commands of report and model card: they parse, and give the recorded settings again."""

import shlex
from typing import Any

from melanoma.artifacts import contract
from melanoma.evaluation import commands

import pipeline
import pytest

# Flags that name local files and folders, or affect only speed, or end before anything is recorded.
NOT_REPEATED = {
    *("help", "data", "graphics", "source", "jobs", "cluster", "check", "restart", "compare"),
}


def defaults(script: str) -> dict[str, Any]:
    return vars(pipeline.parser(script).parse_args([]))


@pytest.mark.parametrize("script", contract.SCRIPTS)
def test_defaults_are_those_of_the_parsers(script: str) -> None:
    found = {name: value for name, value in defaults(script).items() if name not in NOT_REPEATED}
    assert commands.DEFAULTS[script] == found


@pytest.mark.parametrize("script", contract.SCRIPTS)
def test_run_with_defaults_needs_no_flags(script: str) -> None:
    assert commands.command(script, defaults(script)) == f"python {script}"


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (contract.PREPROCESSING, "--limit 30 --split 2018 --copies 1.0 --skip-bad"),
        (contract.SEGNET, "--epochs 3 --learning-rate 0.01 --no-tta --folds 4 --no-clean --threshold 0.4"),
        (contract.SEGNET, "--pretrained --threshold 0.0"),
        (contract.SEGNET, "--network segnet --input-size 64"),
        (contract.ROI, "--roi mask"),
        (contract.CLASSIFIER, "--seed 7 --epochs 6 --folds 4 --backbone mobilenet --input-size 128 --seeds 2"),
        (contract.EVALUATION, "--predictions a.csv 'b c.csv' --occlusion"),
    ],
)
def test_flags_of_a_run_are_repeated(script: str, flags: str) -> None:
    settings = vars(pipeline.parser(script).parse_args(shlex.split(flags)))
    settings = {name: list(map(str, value)) if isinstance(value, list) else value for name, value in settings.items()}
    words = shlex.split(commands.command(script, settings))
    assert words[:2] == ["python", script]
    again = vars(pipeline.parser(script).parse_args(words[2:]))
    again = {name: list(map(str, value)) if isinstance(value, list) else value for name, value in again.items()}
    assert again == settings


def test_recorded_settings_that_are_no_flags_are_left_out() -> None:
    settings = defaults(contract.PREPROCESSING) | {"synthetic": True, "source_fingerprint": "0f"}
    assert commands.command(contract.PREPROCESSING, settings) == f"python {contract.PREPROCESSING}"


def test_weight_files_are_shown_without_their_folder() -> None:
    settings = defaults(contract.CLASSIFIER) | {"weights": "/home/me/weights.h5"}
    assert commands.command(contract.CLASSIFIER, settings) == f"python {contract.CLASSIFIER} --weights weights.h5"


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("segnet", "--network segnet"),
        ("segnet_vgg16", "--weights none --scaling torch --network segnet_vgg16"),
        ("unet", "--weights none --scaling torch --backbone densenet121"),
    ],
)
def test_flags_that_a_network_ignores_are_left_out(network: str, expected: str) -> None:
    given = {"network": network, "backbone": "densenet121", "weights": "none", "scaling": "torch"}
    shown = commands.command(contract.SEGNET, defaults(contract.SEGNET) | given)
    assert sorted(shown.split()) == sorted(f"python {contract.SEGNET} {expected}".split())


def test_pretrained_classifier_is_not_shown_with_the_flags_of_its_training() -> None:
    given = {"pretrained": True, "backbone": "mobilenetv2", "folds": 4, "tta": False, "epochs": 6, "batch_size": 8}
    shown = commands.command(contract.CLASSIFIER, defaults(contract.CLASSIFIER) | given)
    assert sorted(shown.split()) == sorted(f"python {contract.CLASSIFIER} --batch-size 8 --pretrained".split())
