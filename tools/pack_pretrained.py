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

from melanoma.artifacts import contract
from melanoma.artifacts.atomic import atomic_write, sha256, write_json
from melanoma.artifacts.store import Store
from melanoma.cli import flags, run
from melanoma.errors import InputError
from melanoma.evaluation import report
from melanoma.inference import pretrained
from melanoma.log import log

import h5py
import joblib
import numpy as np

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
    with atomic_write(target) as stream:
        stream.write(packed.getbuffer())


def processor() -> str:
    """Model name of the processor, as the operating system knows it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(network: str, weights: Sequence[Path], facts: dict[str, Any]) -> None:
    """Packs weight files, which keep their {member} alone, and notes facts."""
    pretrained.FOLDER.mkdir(exist_ok=True)
    digests = {}
    for path, member in zip(weights, facts.get("members", ("",)), strict=True):
        target = pretrained.FOLDER / f"{network}{member}.weights.h5"
        halve(path, target)
        digests[target.name] = sha256(target)
        log.info("%s, %.1f MB", target, target.stat().st_size / 1e6)
    for old in set(pretrained.FOLDER.glob(f"{network}*.weights.h5")) - {pretrained.FOLDER / name for name in digests}:
        old.unlink()
    machine = f"{processor()}, {joblib.cpu_count()} cores, {platform.system()} {platform.machine()}"
    write_json(pretrained.FOLDER / f"{network}.json", {"sha256": digests} | facts | {"machine": machine})


def pack_segnet(store: Store, graphics: Path) -> None:
    """Packs the network of the last training of the second script."""
    settings = json.loads(store.check("segnet_settings").read_text(encoding="utf-8"))
    used, figures = store.written_with("segnet_settings"), graphics / "segmentation.json"
    told = json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else {}
    # What computed predictions differs: the settings of the weights are noted before the last of them.
    if not told or told["settings"] | {"inference": None} != used | {"inference": None}:
        raise InputError(f"{figures} is not of the network in {store.data}: run {contract.SEGNET} again")
    if used["folds"] > 1 or used["limit"]:
        raise InputError(f"the last training had --folds or --limit: run {contract.SEGNET} without")
    facts = {
        "design": settings["design"],
        "threshold": settings["threshold"],
        "metrics_before_float16": told["splits"],
        "data": "ISIC 2017 challenge, its train split; best epoch and threshold chosen on its validation split",
        "training": settings["training"],
        "settings": {name: Path(value).name if name in PATHS else value for name, value in used.items()},
        "versions": told["versions"],
    }
    write(pretrained.SEGNET, [store.check("segnet_weights", member="")], facts)


def pack_classifier(store: Store, graphics: Path) -> None:
    """Packs the networks that `graphics`/metrics.json tells of."""
    figures = graphics / report.METRICS_FILE
    told = json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else {"systems": {}}
    backbone = next(iter(told["systems"]), "")
    key = contract.FILES["classifier_settings"].path.format(backbone=backbone)
    path = store.check("classifier_settings", backbone=backbone)
    if told.get("inputs", {}).get(key, {}).get("sha256") != sha256(path):
        raise InputError(f"{figures} is not of the classifier in {store.data}: run {contract.EVALUATION} again")
    used = store.written_with("classifier_settings", backbone=backbone)
    cut = any(one["settings"].get("limit") for one in (told, *told["inputs"].values()))
    if cut or used["pretrained"] or used["folds"] == 1:
        raise InputError(
            "the last run had --limit or --pretrained, or no --folds to choose thresholds and calibration by: run "
            f"{contract.CLASSIFIER} and {contract.EVALUATION} anew"
        )
    settings = json.loads(path.read_text(encoding="utf-8"))
    facts = settings | {
        "thresholds": told["systems"][backbone]["thresholds"],
        "metrics_before_float16": {
            split: {"n": one["n"], "metrics": one["metrics"], "intervals": one["intervals"]}
            for split, one in told["systems"][backbone]["splits"].items()
        },
        "data": "ISIC 2017 challenge, its train split; best epochs chosen on its validation split",
        "settings": report.made_with(told),
        "versions": told["versions"],
    }
    weights = [store.check("classifier_weights", backbone=backbone, member=member) for member in settings["members"]]
    write(pretrained.CLASSIFIER, weights, facts)


PACKERS = {pretrained.SEGNET: pack_segnet, pretrained.CLASSIFIER: pack_classifier}


def main(arguments: argparse.Namespace) -> None:
    """Packs what was trained last.

    Raises:
        InputError: that saw a part of the images, cannot be packed, or is not what the figures are of.
        StageError: there is nothing to pack.
    """
    PACKERS[arguments.network](Store(arguments.data, contract.EVALUATION, {}), arguments.graphics)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("network", choices=PACKERS, help="what to pack")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of arrays and weights")
    parser.add_argument("--graphics", type=Path, default=Path("graphics"), help="folder of figures")
    return parser


if __name__ == "__main__":
    run.run(build_parser(), main, writes=())
