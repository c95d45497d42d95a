"""The weights that come with the scripts, so that photographs can be segmented and classified without any training.

    python -m melanoma.pretrained {segnet,classifier} [--data data] [--graphics graphics]

makes them from the last run of segmentation_02_segnet_train.py, or of densenet_train.py and evaluate.py:
pretrained/segnet.weights.h5 or classifier{member}.weights.h5, kernels as float16, and segnet.json or classifier.json
with what is needed to use them, figures, data, settings and seed, machine and versions.
"""

import argparse
import io
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from melanoma import backbones, classifier, command, isic, report, segnet, stages
from melanoma.errors import InputError

import h5py
import joblib
import keras
import numpy as np

FOLDER = Path(__file__).parent.parent / "pretrained"
SEGNET, CLASSIFIER = "segnet", "classifier"
WITHOUT = "it comes with the scripts: fetch it from there again, or train, without --pretrained"
PATHS = ("data", "graphics", "weights")  # settings of which only the last part is anybody else's business


def halve(source: Path, target: Path) -> None:
    """Copies a weight file with kernels, arrays of two dimensions and more, as float16; the rest stays as it is.

    Raises:
        InputError: a weight is beyond float16; what was at the target stays.
    """
    packed = io.BytesIO()  # see `stages.WeightFile`
    with h5py.File(source) as old, h5py.File(packed, "w") as new:

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
    with stages.whole(target) as stream:
        stream.write(packed.getbuffer())


def read(network: str) -> tuple[dict[str, Any], list[Path]]:
    """What is noted of a network that comes with the scripts, and its weight files.

    Raises:
        InputError: files are missing, or are not the ones that belong together.
    """
    noted = FOLDER / f"{network}.json"
    if not noted.is_file():
        raise InputError(f"--pretrained: {noted} is needed; {WITHOUT}")
    settings = json.loads(noted.read_text(encoding="utf-8"))
    for name, expected in settings["sha256"].items():
        path = FOLDER / name
        if not path.is_file():
            raise InputError(f"--pretrained: {path} is needed; {WITHOUT}")
        if (found := stages.sha256(path)) != expected:
            raise InputError(f"--pretrained: {path} has SHA-256 {found}, expected {expected}; {WITHOUT}")
    return settings, [FOLDER / name for name in settings["sha256"]]


def refuse_other_split(store: stages.Store, split: str) -> None:
    """Sees to it that nothing is judged that the networks have learnt from.

    Raises:
        InputError: the photographs are not divided as the challenge did.
    """
    if (division := store.written_with("ids", split=split)["split"]) != isic.OFFICIAL:
        raise InputError(
            f"--pretrained: the networks have learnt from train photographs of the {isic.OFFICIAL} split, and --split "
            f"{division} judges some of them: run {stages.PREPROCESSING} with --split {isic.OFFICIAL}"
        )


def load_segnet(size: int) -> tuple[keras.Model, dict[str, Any]]:
    """The network that outlines lesions, for photographs of a side in pixels, and what is noted of it; see `read`."""
    settings, (weights,) = read(SEGNET)
    model = segnet.build(segnet.Design(**settings["design"]), size)
    backbones.load_weights(model, weights)
    return model, settings


def load_classifier(size: int) -> tuple[classifier.Ensemble, dict[str, Any]]:
    """The classifiers, for photographs of a side in pixels, and what is noted of them; see `read`."""
    settings, weights = read(CLASSIFIER)
    return classifier.restore(settings | {"size": size}, weights), settings


def processor() -> str:
    """Model name of the processor, as the operating system knows it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(network: str, weights: Sequence[Path], facts: dict[str, Any]) -> None:
    """Packs weight files, which keep their {member} alone, and notes facts."""
    FOLDER.mkdir(exist_ok=True)
    digests = {}
    for path, member in zip(weights, facts.get("members", ("",)), strict=True):
        target = FOLDER / f"{network}{member}.weights.h5"
        halve(path, target)
        digests[target.name] = stages.sha256(target)
        command.log.info("%s, %.1f MB", target, target.stat().st_size / 1e6)
    for old in set(FOLDER.glob(f"{network}*.weights.h5")) - {FOLDER / name for name in digests}:
        old.unlink()
    machine = f"{processor()}, {joblib.cpu_count()} cores, {platform.system()} {platform.machine()}"
    stages.write_json(FOLDER / f"{network}.json", {"sha256": digests} | facts | {"machine": machine})


def pack_segnet(store: stages.Store, graphics: Path) -> None:
    """Packs the network of the last training of the second script."""
    settings = json.loads(store.check("segnet_settings").read_text(encoding="utf-8"))
    used, figures = store.written_with("segnet_settings"), graphics / "segmentation.json"
    told = json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else {}
    # What computed predictions differs: the settings of the weights are noted before the last of them.
    if not told or told["settings"] | {"inference": None} != used | {"inference": None}:
        raise InputError(f"{figures} is not of the network in {store.data}: run {stages.SEGNET} again")
    if used["folds"] > 1 or used["limit"]:
        raise InputError(f"the last training had --folds or --limit: run {stages.SEGNET} without")
    facts = {
        "design": settings["design"],
        "threshold": settings["threshold"],
        "figures_before_rounding_to_float16": told["splits"],
        "data": "ISIC 2017 challenge, its train split; best epoch and threshold chosen on its validation split",
        "training": settings["training"],
        "settings": {name: Path(value).name if name in PATHS else value for name, value in used.items()},
        "versions": told["versions"],
    }
    write(SEGNET, [store.check("segnet_weights", member="")], facts)


def pack_classifier(store: stages.Store, graphics: Path) -> None:
    """Packs the networks that `graphics`/metrics.json tells of."""
    figures = graphics / report.FIGURES
    told = json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else {"systems": {}}
    backbone = next(iter(told["systems"]), "")
    key = stages.FILES["classifier_settings"].path.format(backbone=backbone)
    path = store.check("classifier_settings", backbone=backbone)
    if told.get("inputs", {}).get(key, {}).get("sha256") != stages.sha256(path):
        raise InputError(f"{figures} is not of the classifier in {store.data}: run {stages.EVALUATION} again")
    used = store.written_with("classifier_settings", backbone=backbone)
    cut = any(one["settings"].get("limit") for one in (told, *told["inputs"].values()))
    if cut or used["pretrained"] or used["folds"] == 1:
        raise InputError(
            "the last run had --limit or --pretrained, or no --folds to choose thresholds and calibration by: run "
            f"{stages.CLASSIFIER} and {stages.EVALUATION} anew"
        )
    settings = json.loads(path.read_text(encoding="utf-8"))
    facts = settings | {
        "thresholds": told["systems"][backbone]["thresholds"],
        "figures_before_rounding_to_float16": {
            split: {"n": one["n"], "figures": one["figures"], "intervals": one["intervals"]}
            for split, one in told["systems"][backbone]["splits"].items()
        },
        "data": "ISIC 2017 challenge, its train split; best epochs chosen on its validation split",
        "settings": report.made_with(told),
        "versions": told["versions"],
    }
    weights = [store.check("classifier_weights", backbone=backbone, member=member) for member in settings["members"]]
    write(CLASSIFIER, weights, facts)


PACKERS = {SEGNET: pack_segnet, CLASSIFIER: pack_classifier}


def main(arguments: argparse.Namespace) -> None:
    """Packs what was trained last.

    Raises:
        InputError: that saw a part of the images, cannot be packed, or is not what the figures are of.
        StageError: there is nothing to pack.
    """
    PACKERS[arguments.network](stages.Store(arguments.data, stages.EVALUATION, {}), arguments.graphics)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=command.HelpFormatter, allow_abbrev=False)
    flags.add_argument("network", choices=PACKERS, help="what to pack")
    flags.add_argument("--data", type=Path, default=Path("data"), help="folder of arrays and weights")
    flags.add_argument("--graphics", type=Path, default=Path("graphics"), help="folder of figures")
    return flags


if __name__ == "__main__":
    command.run(parser(), main, writes=())
