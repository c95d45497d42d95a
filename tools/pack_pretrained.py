"""Packs the networks of the last training run into `pretrained/`, from where `--pretrained` loads them.

    python -m tools.pack_pretrained {segnet,classifier} [--networks N ...] [--data data] [--graphics graphics]

packs the networks of segmentation_02_segnet_train.py, or those of densenet_train.py and evaluate.py. Writes
pretrained/segnet{member}.weights.h5 or pretrained/classifier_{backbone}{member}.weights.h5, kernels as float16, and
segnet.json or classifier.json: checksums, what is needed to use the networks, metrics and how they were measured, data,
hashes of the ids of the training images, settings, versions, and the machine that packed them.

With --networks fewer files of classifiers are written: networks of neighbouring folds are replaced by one with the
mean of their weights, named after the first of them. That works for networks trained from common weights, e.g. with
--pretrain. Source: Wortsman et al. 2022, arXiv 2203.05482. Metrics, calibration and thresholds are those of the
networks before that.
"""

import argparse
import contextlib
import io
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.atomic import atomic_write, sha256, write_json
from melanoma.artifacts.store import Store
from melanoma.classes import SPLIT_NAMES
from melanoma.cli import flags, run
from melanoma.dataset.splits import list_members
from melanoma.errors import InputError
from melanoma.evaluation import report, scoring
from melanoma.inference import pretrained
from melanoma.log import log

import h5py
import joblib
import numpy as np

PATHS = ("data", "graphics", "weights")  # settings of which only the last part is published


def to_float16(sources: Sequence[Path], target: Path) -> None:
    """Writes the mean of weight files: arrays of two and more dimensions (kernels) as float16, others in their dtype.

    Raises:
        InputError: a weight is outside the range of float16; an existing target stays as it is.
    """
    packed = io.BytesIO()  # see `store.WeightFile`
    with contextlib.ExitStack() as stack, h5py.File(packed, "w") as new:
        old, *others = [stack.enter_context(h5py.File(source)) for source in sources]

        def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Group):
                place = new.require_group(name)
            else:
                content = np.mean([item[()], *(other[name][()] for other in others)], axis=0, dtype=item.dtype)
                if content.ndim > 1:
                    with np.errstate(over="ignore"):  # checked below
                        content = content.astype(np.float16)
                if not np.isfinite(content).all():
                    raise InputError(f"{sources[0]}: {name} has values outside the range of float16: train again")
                place = new.create_dataset(name, data=content)
            place.attrs.update(item.attrs)

        old.visititems(copy)
        new.attrs.update(old.attrs)
    with atomic_write(target) as stream:
        stream.write(packed.getbuffer())


def processor() -> str:
    """Model name of the processor according to the operating system."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def per_backbone(networks: Sequence[int], backbones: int) -> list[int | None]:
    """--networks of each backbone; None: as many as were trained.

    Raises:
        InputError: there are several numbers, but not one of each backbone.
    """
    if len(networks) > 1 and len(networks) != backbones:
        raise InputError(f"--networks: there are {backbones} backbones: give one number for all, or one of each")
    return [*networks] if len(networks) > 1 else [networks[0] if networks else None] * backbones


def grouped(members: Sequence[str], count: int | None) -> dict[str, list[str]]:
    """Divides the names of networks into `count` groups of neighbours, by the first name of each; None: one each.

    Raises:
        InputError: the groups would not be equal, or would mix seeds, which have no initial weights in common.
    """
    if count and (len(members) % count or (count < len(members) and "_seed" in members[0])):
        raise InputError(
            f"--networks {count}: {len(members)} networks cannot be averaged in {count} equal groups of one seed each"
        )
    size = len(members) // (count or len(members))
    return {members[first]: list(members[first : first + size]) for first in range(0, len(members), size)}


def write(network: str, weights: Mapping[str, Sequence[Path]], description: dict[str, Any]) -> None:
    """Packs weight files and writes their description; removes the weight files of earlier networks.

    Args:
        network: pretrained.SEGNET or pretrained.CLASSIFIER.
        weights: weight files whose mean is packed, by the name of the packed file.
        description: content of the JSON file, without checksums and machine.
    """
    pretrained.FOLDER.mkdir(exist_ok=True)
    checksums = {}
    for name, paths in weights.items():
        target = pretrained.FOLDER / name
        to_float16(paths, target)
        checksums[name] = sha256(target)
        log.info("%s, %.1f MB", target, target.stat().st_size / 1e6)
    for old in pretrained.FOLDER.glob(f"{network}*.weights.h5"):
        if old.name not in checksums:
            old.unlink()
    machine = f"{processor()}, {joblib.cpu_count()} cores, {platform.system()} {platform.machine()}"
    write_json(pretrained.FOLDER / f"{network}.json", {"sha256": checksums} | description | {"packed_on": machine})


def how_measured(split: str, chosen: Sequence[str]) -> dict[str, str]:
    """Where the metrics of a split come from, and why they are biased if these were chosen on its images."""
    return {"measured_on": SPLIT_NAMES[split], "caveat": scoring.bias(chosen)}


def describe_data(store: Store, chosen: Sequence[str]) -> str:
    """The data sets of the last training run, their licences, and what was chosen on validation."""
    settings = store.written_with("ids", split="train")
    sources = [f"{one['layout']} ({one['images']} images; {one['credit']})" for one in settings["sources"]]
    added = f", with {', '.join(sources[1:])} added to train" if sources[1:] else ""
    by_validation = f"; {scoring.listed(chosen)} chosen on validation" if chosen else ""
    return f"{sources[0]}, --split {settings['split']}{added}{by_validation}"


def pack_segnet(store: Store, graphics: Path, networks: Sequence[int]) -> None:
    """Packs the networks of the last training run of the second script."""
    settings = json.loads(store.check("segnet_settings").read_text(encoding="utf-8"))
    used, path = store.written_with("segnet_settings"), graphics / report.SEGMENTATION_FILE
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # The inference engine may differ: the weights are saved before the last predictions.
    if not results or results["settings"] | {"inference": None} != used | {"inference": None}:
        raise InputError(f"{path} does not belong to the network in {store.data}: run {contract.SEGNET} again")
    if used["limit"]:
        raise InputError(f"the last training run used --limit: run {contract.SEGNET} without it")
    if networks:
        raise InputError("--networks is for classifiers: leave it out")
    chosen = ["epochs"] if settings["training"][0]["reason"].endswith("of validation") else []
    chosen += [] if used["threshold"] else ["thresholds"]
    description = {
        "design": settings["design"],
        "threshold": settings["threshold"],
        "views": settings["views"],
        "metrics_before_packing": {
            split: how_measured(split, chosen if split == "val" else []) | scores
            for split, scores in results["splits"].items()
        },
        "data": describe_data(store, chosen),
        "training_ids": pretrained.hash_training_ids(store, extra=False)
        + pretrained.hash_training_ids(store, extra=True),
        "training": settings["training"],
        "settings": {name: Path(value).name if name in PATHS else value for name, value in used.items()},
        "versions": results["versions"],
    }
    weights = {
        f"{pretrained.SEGNET}{member.name}.weights.h5": [store.check("segnet_weights", member=member.name)]
        for member in list_members(used["folds"], used.get("seeds", 1), used["seed"])
    }
    write(pretrained.SEGNET, weights, description)


def pack_classifier(store: Store, graphics: Path, networks: Sequence[int]) -> None:
    """Packs the classifiers that the last run of evaluate.py evaluated, see `grouped`."""
    path = graphics / report.METRICS_FILE
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"systems": {}, "inputs": {}}
    backbone = next(iter(results["systems"]), "")
    key = contract.FILES["classifier_settings"].path.format(backbone=backbone)
    settings_path = store.check("classifier_settings", backbone=backbone)
    if results["inputs"].get(key, {}).get("sha256") != sha256(settings_path):
        raise InputError(f"{path} does not belong to the classifier in {store.data}: run {contract.EVALUATION} again")
    settings, system = json.loads(settings_path.read_text(encoding="utf-8")), results["systems"][backbone]
    limited = any(entry["settings"].get("limit") for entry in (results, *results["inputs"].values()))
    if limited or backbone == contract.PRETRAINED or system["chosen_on"] not in system["splits"]:
        raise InputError(
            "the last run used --limit or --pretrained, or neither --folds nor labels of validation, which thresholds "
            f"and calibration need: run {contract.CLASSIFIER} and {contract.EVALUATION} again"
        )
    parts, weights = [], dict[str, list[Path]]()
    for part, count in zip(settings["parts"], per_backbone(networks, len(settings["parts"])), strict=True):
        name, members = part["weights"], grouped(list(part["members"]), count)
        used = report.shown(store.written_with("classifier_settings", backbone=name))
        parts.append(
            part
            | {
                "members": {first: part["members"][first] for first in members},
                "averaged": {first: {one: part["members"][one] for one in group} for first, group in members.items()},
                "extra": bool(used.get("pretrain") or used.get("extra_weight", 1.0)),
                "settings": used,
            }
        )
        weights |= {
            pretrained.weight_file(part["backbone"], first): [
                store.check("classifier_weights", backbone=name, member=one) for one in group
            ]
            for first, group in members.items()
        }
    description = settings | {
        "parts": parts,
        "thresholds": system["thresholds"],
        "chosen_on": system["chosen_on"],  # split on which thresholds and calibration were chosen
        "metrics_before_packing": {
            split: how_measured(split, scoring.chosen_on(split, system))
            | {name: scores[name] for name in ("n", "metrics", "intervals")}
            for split, scores in system["splits"].items()
        },
        "data": describe_data(store, scoring.chosen_on("val", system)),
        "training_ids": pretrained.hash_training_ids(store, extra=False),
        "extra_training_ids": pretrained.hash_training_ids(store, extra=True),
        "settings": report.made_with(results, backbone),
        "versions": results["versions"],
    }
    write(pretrained.CLASSIFIER, weights, description)


PACKERS = {pretrained.SEGNET: pack_segnet, pretrained.CLASSIFIER: pack_classifier}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("network", choices=PACKERS, help="what to pack")
    parser.add_argument(
        "--networks",
        type=flags.positive_int,
        nargs="+",
        default=[],
        metavar="N",
        help="networks to write, of all backbones or of each; default: as many as were trained",
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of arrays and weights")
    parser.add_argument("--graphics", type=Path, default=Path("graphics"), help="folder of metrics")
    return parser


def main(arguments: argparse.Namespace) -> None:
    """Packs what was trained last.

    Raises:
        InputError: it was trained on part of the images, a weight is outside the range of float16, or the metrics
            belong to another network.
        StageError: there is nothing to pack.
    """
    PACKERS[arguments.network](Store(arguments.data, contract.EVALUATION, {}), arguments.graphics, arguments.networks)


if __name__ == "__main__":
    run.run(build_parser(), main, writes=())
