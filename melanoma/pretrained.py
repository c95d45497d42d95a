"""The weights that come with the scripts, so that photographs can be segmented without any training.

    python -m melanoma.pretrained [--data data] [--graphics graphics]

makes them from the last run of segmentation_02_segnet_train.py: pretrained/segnet.weights.h5, kernels as float16, and
pretrained/segnet.json with design, threshold, figures, data, settings and seed, machine and versions.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from melanoma import backbones, command, segnet, stages
from melanoma.errors import InputError

import h5py
import joblib
import keras
import numpy as np

FOLDER = Path(__file__).parent.parent / "pretrained"
PATHS = ("data", "graphics", "weights")  # settings of which only the last part is anybody else's business
WEIGHTS, SETTINGS = FOLDER / "segnet.weights.h5", FOLDER / "segnet.json"


def halve(source: Path, target: Path) -> None:
    """Copies a weight file with kernels, arrays of two dimensions and more, as float16; the rest stays as it is.

    Raises:
        InputError: a weight is beyond float16; what was at the target stays.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with h5py.File(source) as old, h5py.File(temporary, "w") as new:

            def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
                if isinstance(item, h5py.Group):
                    place = new.require_group(name)
                else:
                    content = item[()]
                    if content.ndim > 1:
                        with np.errstate(over="ignore"):  # judged below
                            content = content.astype(np.float16)
                    if not np.isfinite(content).all():
                        raise InputError(f"{source}: {name} has values beyond float16")
                    place = new.create_dataset(name, data=content)
                place.attrs.update(item.attrs)

            old.visititems(copy)
            new.attrs.update(old.attrs)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def load_segnet(size: int) -> tuple[keras.Model, dict[str, Any]]:
    """The network that outlines lesions.

    Args:
        size: side of the photographs in pixels.

    Returns:
        The model (see `segnet.build`) and the content of pretrained/segnet.json.

    Raises:
        InputError: files are missing, or are not the ones that belong together.
    """
    if not (WEIGHTS.is_file() and SETTINGS.is_file()):
        raise InputError(f"--pretrained: {WEIGHTS} and {SETTINGS} are needed; they come with the scripts")
    settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
    if (found := stages.sha256(WEIGHTS)) != settings["sha256"]:
        raise InputError(f"--pretrained: {WEIGHTS} has SHA-256 {found}, expected {settings['sha256']}")
    model = segnet.build(segnet.Design(**settings["design"]), size)
    backbones.load_weights(model, WEIGHTS)
    return model, settings


def processor() -> str:
    """Model name of the processor, as the operating system knows it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main(arguments: argparse.Namespace) -> None:
    """Packs the network of the last training.

    Raises:
        InputError: that made several networks, or saw a part of the images, or is not what the figures are of.
    """
    store = stages.Store(arguments.data, stages.SEGNET, {})
    settings = json.loads(store.check("segnet_settings").read_text(encoding="utf-8"))
    used, figures = store.written_with("segnet_settings"), arguments.graphics / "segmentation.json"
    report = json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else {}
    if report.get("settings") != used:
        raise InputError(f"{figures} is not of the network in {arguments.data}: run {stages.SEGNET} again")
    if used["folds"] > 1 or used["limit"]:
        raise InputError(f"the last training had --folds or --limit: run {stages.SEGNET} without")
    FOLDER.mkdir(exist_ok=True)
    halve(store.check("segnet_weights", fold=""), WEIGHTS)
    facts = {
        "sha256": stages.sha256(WEIGHTS),
        "design": settings["design"],
        "threshold": settings["threshold"],
        "figures_before_rounding_to_float16": report["splits"],
        "data": "ISIC 2017 challenge, its train split; best epoch and threshold chosen on its validation split",
        "training": settings["training"],
        "settings": {name: Path(value).name if name in PATHS else value for name, value in used.items()},
        "machine": f"{processor()}, {joblib.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "versions": report["versions"],
    }
    stages.write_json(SETTINGS, facts)
    command.log.info("%s, %.1f MB", WEIGHTS, WEIGHTS.stat().st_size / 1e6)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=command.HelpFormatter, allow_abbrev=False)
    flags.add_argument("--data", type=Path, default=Path("data"), help="folder of arrays and weights")
    flags.add_argument("--graphics", type=Path, default=Path("graphics"), help="folder of figures")
    return flags


if __name__ == "__main__":
    command.run(parser(), main)
