"""What was run, as commands to copy: the recorded settings of each script, written as flags."""

import shlex
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract

# Each script's flags that change its results, with their defaults. Importing the scripts to ask their parsers would
# import Keras; the tests compare this table with the parsers.
SHARED = {"seed": 0, "limit": None}
TRAINING = {
    "weights": "imagenet",
    "scaling": None,
    "pretrained": False,
    "folds": 1,
    "epochs": None,
    "batch_size": 16,
    "learning_rate": None,
    "ema": 0.0,
    "precision": "float32",
    "distribute": False,
    "tta": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    contract.PREPROCESSING: {
        "split": "official",
        "size": 256,
        "copies": 3.5,
        "skip_bad": False,
        "keep_duplicates": False,
        "strict": False,
        **SHARED,
    },
    contract.SEGNET: {
        "network": "unet",
        "backbone": "mobilenetv2",
        "input_size": 192,
        **TRAINING,
        "loss": "dice_cross_entropy",
        "epochs": 14,
        "learning_rate": 1e-3,
        "ema": 0.99,
        "clean": True,
        "threshold": None,
        **SHARED,
    },
    contract.ROI: {"roi": "crop", **SHARED},
    contract.CLASSIFIER: {
        "backbone": "densenet121",
        "input_size": None,
        **TRAINING,
        "seeds": 1,
        "train": "full",
        "balance": "copies",
        **SHARED,
    },
    contract.EVALUATION: {"predictions": [], "metadata": [], "occlusion": False, **SHARED},
}
PATHS = ("weights", "predictions", "metadata")  # shown without their folders


def unused(script: str, settings: dict[str, Any]) -> set[str]:
    """Flags that a run ignored, or refuses, because of its other settings."""
    if settings.get("pretrained"):  # the recorded settings are those of the pretrained network
        used = {"seed", "limit", "pretrained", "batch_size", "precision", "clean", "threshold"}
        return DEFAULTS[script].keys() - (used | {"tta"} if script == contract.SEGNET else used)
    network = settings.get("network")
    if network == "segnet":
        return {"backbone", "weights", "scaling"}
    return {"backbone"} if network == "segnet_vgg16" else set()


def as_flag(name: str, value: Any) -> list[str]:
    """One setting as words of a command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{flag}", *(Path(one).name if name in PATHS else str(one) for one in values)]


def command(script: str, settings: dict[str, Any]) -> str:
    """The command line of a run, with the flags that differ from the defaults and without local folders.

    Args:
        script: file name, a key of DEFAULTS.
        settings: recorded settings; other settings than flags are ignored.
    """
    ignored = unused(script, settings)
    words = ["python", script]
    for name, default in DEFAULTS[script].items():
        value = settings.get(name)
        if name not in ignored and value is not None and value != default:
            words += as_flag(name, value)
    return shlex.join(words)
