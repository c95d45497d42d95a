"""Systems to evaluate, their thresholds, and the metrics of each split."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import ROW_BLOCK, Store
from melanoma.classes import CLASSES, MELANOMA, SPLIT_NAMES, TASKS
from melanoma.dataset.splits import UNLABELLED, base_rows, load_labels, originals_with_mask
from melanoma.errors import InputError, StageError
from melanoma.evaluation import submissions
from melanoma.evaluation.subgroups import subgroups
from melanoma.log import log
from melanoma.metrics import bootstrap, classification, segmentation

import numpy as np
import pandas as pd

REPORT_ORDER = ("test", "val", "train")  # most meaningful first

Thresholds = dict[str, dict[str, float]]  # {class: {operating point: probability}}


@dataclass(frozen=True)
class Images:
    """Original images of each split, without augmented copies."""

    all_ids: dict[str, list[str]]  # of all originals of each split, regardless of --limit
    rows: dict[str, np.ndarray]  # int (N,), rows in the arrays of the split, and places in `all_ids`
    labels: dict[str, np.ndarray]  # int (N,), UNLABELLED where there is none; of the splits that have labels

    @property
    def ids(self) -> dict[str, list[str]]:
        """Ids of the rows of each split."""
        return {split: [self.all_ids[split][row] for row in rows] for split, rows in self.rows.items()}


@dataclass(frozen=True)
class System:
    """Predictions of one system, and the thresholds that turn them into decisions."""

    name: str
    probabilities: dict[str, np.ndarray]  # float (N, 3) of each split
    thresholds: Thresholds = field(default_factory=dict)  # {}: not chosen yet
    chosen_on: str | None = None  # split that the thresholds were chosen on; None: none of these
    epochs_chosen_on: str | None = None  # split that the epochs were chosen on; None: none of these, or unknown
    networks: Sequence[Mapping[str, Any]] = ()  # see `describe_networks`
    calibrated: bool = False  # whether on the images of `chosen_on`
    submitted: bool = False  # read from a CSV file, not a classifier of this pipeline
    seen: dict[str, list[str]] = field(default_factory=dict)  # ids that its networks were trained on, by split
    store: Store | None = None  # that has loaded what the predictions depend on

    def first_threshold(self, index: int) -> float:
        """The threshold of a class where only one is shown."""
        return next(iter(self.thresholds[CLASSES[index]].values()))

    def save_thresholds(self) -> None:
        """Saves the thresholds of a classifier."""
        if self.store and not self.submitted:
            self.store.save_json("thresholds", self.thresholds, backbone=self.name)

    def of_images(self, images: Images, kept: Images) -> "System":
        """The predictions for some of the images that it has predictions for."""
        probabilities = {
            split: values[np.isin(images.rows[split], kept.rows[split])] for split, values in self.probabilities.items()
        }
        return replace(self, probabilities=probabilities)


def report_order(splits: Iterable[str]) -> list[str]:
    """Splits in the order in which they are reported."""
    return sorted(splits, key=REPORT_ORDER.index)


# ---------------------------------------------------------------------------------------------------- what is evaluated


def load_images(store: Store) -> Images:
    """All original images of --source in the data folder, up to --limit."""
    unlimited = Store(store.data, store.script, {})  # submitted CSV files cover all images
    all_ids, rows, labels = {}, {}, {}
    for split in store.splits():
        all_rows = base_rows(unlimited, split)
        all_ids[split] = unlimited.load("ids", split=split)[all_rows].tolist()
        rows[split] = all_rows[all_rows < store.rows(split)]
        found = load_labels(store, split)[rows[split]]
        if (found != UNLABELLED).any():
            labels[split] = found
    return Images(all_ids, rows, labels)


def load_submissions(files: Sequence[Path], images: Images) -> list[System]:
    """Systems from CSV files, see `submissions.read`, named after the files; without thresholds.

    Raises:
        InputError: two files have the same name, or a file is invalid.
    """
    systems = {}
    for path in files:
        found = submissions.read(path, images.all_ids)
        probabilities = {split: values[images.rows[split]] for split, values in found.items()}
        name = printable(path.stem)
        systems[name] = System(name, probabilities, submitted=True)
    if len(systems) < len(files):
        raise InputError("two files of predictions have the same name, which is the system's name: rename one")
    return list(systems.values())


def load_classifier(store: Store, images: Images, name: str) -> System:
    """A classifier of this pipeline; only pretrained networks bring their thresholds.

    Train has predictions only after a cross-validation.

    Raises:
        StageError: its predictions are missing or stale.
    """
    own = store.branch()
    probabilities = {
        split: np.array(own.load_first("probabilities", int(rows.max(initial=-1)) + 1, split=split, backbone=name))[
            rows
        ]
        for split, rows in images.rows.items()
        if split != "train" or own.has("probabilities", split=split, backbone=name)
    }
    settings = json.loads(own.check("classifier_settings", backbone=name).read_text(encoding="utf-8"))
    seen = {split: ids for split, ids in settings.get("seen", {}).items() if split in probabilities}
    networks = describe_networks(settings["parts"])
    is_pretrained = name == contract.PRETRAINED
    same_validation = not is_pretrained or is_divided_alike(own, settings)
    epochs = same_validation and any(one["epochs"].endswith("of validation") for one in networks)
    fitted = same_validation and settings.get("chosen_on") == "val"  # only pretrained networks say that
    thresholds = settings.get("thresholds", {})
    return System(
        name,
        probabilities,
        thresholds,
        chosen_on="val" if fitted and thresholds else None,
        epochs_chosen_on="val" if epochs else None,
        networks=networks,
        calibrated=fitted or not is_pretrained,
        seen=seen,
        store=own,
    )


def describe_networks(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For the report, of each backbone: number of networks, of how many each is the mean, views, kept epochs and why.

    Args:
        parts: of the settings of a classifier, see `ensemble.load`.
    """
    described = []
    for part in parts:
        groups = part.get("averaged", {name: {name: phases} for name, phases in part["members"].items()})
        last = [list(phases.values())[-1] for group in groups.values() for phases in group.values()]
        kept = ", ".join(str(phase["kept_epoch"]) for phase in last)
        trained = ", ".join(map(str, sorted({len(phase["seconds"]) for phase in last})))
        described.append(
            {
                "backbone": part["backbone"],
                "count": len(groups),
                "averaged": len(last) // len(groups),
                "views": part["views"],
                "epochs": f"weights of epoch {kept} of {trained}, {last[0]['reason']}",
            }
        )
    return described


def is_divided_alike(store: Store, settings: Mapping[str, Any]) -> bool:
    """Whether layout and --split are those of the images on which pretrained networks were chosen.

    Args:
        store: with the images.
        settings: of the networks.
    """
    here = store.written_with("ids", split=store.splits()[0])
    there = settings.get("settings", {}).get(contract.PREPROCESSING, {})
    first, chosen = ([one["layout"] for one in used.get("sources", [])][:1] for used in (here, there))
    return first == chosen and here.get("split") == there.get("split")


def load_systems(store: Store, images: Images, files: Sequence[Path], backbone: str | None = None) -> list[System]:
    """The classifiers of this pipeline, the main one first, and after them the submitted systems.

    A classifier whose predictions are missing or stale is left out, if there is another system.

    Args:
        store: the data folder.
        images: its images.
        files: CSV files of predictions.
        backbone: name of the only classifier to load; None: all.

    Raises:
        StageError: predictions are missing or stale, of the named classifier or of all, and there is no other system.
        InputError: two systems have the same name, or a file is invalid.
    """
    submitted = [replace(system, store=store.branch()) for system in load_submissions(files, images)]
    classifiers: list[System] = []
    errors: dict[str, StageError] = {}
    for name in [backbone] if backbone else store.classifiers():
        try:
            classifiers.append(load_classifier(store, images, name))
        except StageError as problem:
            errors[name] = problem
    if errors and (backbone or not (classifiers or submitted)):
        raise next(iter(errors.values()))
    if not (classifiers or submitted):
        hint = " with --folds, because there are only training images" if set(images.rows) == {"train"} else ""
        raise StageError(f"predictions of a classifier are missing: run {contract.CLASSIFIER} first{hint}")
    for name, error in errors.items():
        log.info("the classifier %s is left out: %s", name, error)
    if same := {system.name for system in classifiers} & {system.name for system in submitted}:
        raise InputError(f"--predictions {same.pop()}.csv has the name of a classifier of this pipeline: rename it")
    return [*classifiers, *submitted]


def printable(name: str) -> str:
    """A file name as text: control characters, and bytes that are not UTF-8, become escape sequences."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in name)


# ---------------------------------------------------------------------------------------------------- images left out


def to_evaluate(images: Images, systems: Sequence[System]) -> Images:
    """The images that have a label and that no network of these systems was trained on.

    A split without labels keeps its unlabelled images; one that loses all images loses its labels.
    """
    rows, labels = {}, {}
    for split, all_rows in images.rows.items():
        kept = ~np.isin(images.ids[split], seen_ids(split, systems))
        if split in images.labels:
            kept &= images.labels[split] != UNLABELLED
            if kept.any():
                labels[split] = images.labels[split][kept]
        rows[split] = all_rows[kept]
    return Images(images.all_ids, rows, labels)


def log_unlabelled(images: Images, systems: Sequence[System]) -> None:
    """Logs how many predicted images have no label although others of their split have one."""
    for split, labels in images.labels.items():
        unlabelled = int((labels == UNLABELLED).sum())
        if unlabelled and any(split in system.probabilities for system in systems):
            log.info(
                "%s: %d of %d images are predicted, but not evaluated: no label", *(split, unlabelled, len(labels))
            )


def seen_ids(split: str, systems: Sequence[System]) -> list[str]:
    """Ids of a split that a network of these systems was trained on."""
    return sorted({name for system in systems for name in system.seen.get(split, ())})


def count_seen(images: Images, systems: Sequence[System]) -> dict[str, dict[str, int]]:
    """Numbers of images, by split: {"seen": left out because of `seen_ids`, "images": before}, where there are any."""
    counts = {split: int(np.isin(ids, seen_ids(split, systems)).sum()) for split, ids in images.ids.items()}
    return {split: {"seen": seen, "images": len(images.rows[split])} for split, seen in counts.items() if seen}


def left_out_note(split: str, counts: dict[str, int]) -> str:
    """A sentence on what `count_seen` found for a split."""
    what = "predicted, not evaluated" if counts["seen"] == counts["images"] else "left out"
    return (
        f"{counts['seen']} of {counts['images']} images of {SPLIT_NAMES[split]} were used to train the pretrained "
        f"networks: {what}"
    )


# ----------------------------------------------------------------------------------------------------------- thresholds


def choose_thresholds(system: System, labels: dict[str, np.ndarray]) -> System:
    """A system with thresholds: already chosen, or chosen on train after a cross-validation, or else on validation.

    Train is preferred because it is larger.

    Args:
        system: whose thresholds to choose.
        labels: {split: int (N,)}; without labels of the split, or if all or none of them are of a class, its threshold
            is the challenge's.
    """
    if system.thresholds:
        return system
    thresholds, split = {}, "train" if "train" in system.probabilities else "val"
    for index in TASKS:
        known = split in system.probabilities and split in labels
        truth = labels[split] == index if known else np.zeros(0, bool)
        if 0 < truth.sum() < len(truth):
            thresholds[CLASSES[index]] = classification.operating_points(truth, system.probabilities[split][:, index])
        else:
            log.info(
                "%s: no labels to choose a threshold for %s, so it is %s",
                *(system.name, CLASSES[index], classification.DEFAULT_THRESHOLD),
            )
            thresholds[CLASSES[index]] = classification.default_points()
    return replace(system, thresholds=thresholds, chosen_on=split)


def with_thresholds(system: System, images: Images) -> System:
    """A system with its own thresholds, or with thresholds chosen on all images that it has not seen in training."""
    unseen = to_evaluate(images, [system])
    chosen = choose_thresholds(system.of_images(images, unseen), unseen.labels)
    return replace(system, thresholds=chosen.thresholds, chosen_on=chosen.chosen_on)


def chosen_on(split: str, system: Mapping[str, Any]) -> list[str]:
    """What was chosen on the images of a split; arguments as of `caveat`."""
    chosen = ["epochs"] if split == system["epochs_chosen_on"] else []
    if split == system["chosen_on"]:
        chosen += ["calibration", "thresholds"] if system["calibrated"] else ["thresholds"]
    return chosen


def listed(names: Sequence[str]) -> str:
    """Names in running text."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def bias(chosen: Sequence[str]) -> str:
    """A sentence on metrics of images on which these were chosen; "" if nothing was."""
    return f"Biased upwards: {listed(chosen)} were chosen on these images." if chosen else ""


def caveat(split: str, system: Mapping[str, Any]) -> str:
    """Why the metrics of a split are biased; "" if they are not.

    Args:
        split: split of the metrics.
        system: result of `evaluate_system`; what was chosen for a submitted system, besides thresholds, is unknown.
    """
    return bias(chosen_on(split, system))


# -------------------------------------------------------------------------------------------------------------- metrics


def evaluate_system(system: System, images: Images, metadata: pd.DataFrame | None, seed: int) -> dict[str, Any]:
    """Metrics of a system on every split that has labels.

    Args:
        system: what to evaluate.
        images: labels and ids.
        metadata: result of `subgroups.read_metadata`; None: no subgroups.
        seed: seed of the bootstrap.

    Returns:
        {"submitted": ..., "calibrated": whether on the images of `chosen_on`, "inputs": manifest keys,
        "thresholds": ..., "chosen_on": ..., "epochs_chosen_on": ...,
        "networks": result of `describe_networks`,
        "splits": {split: result of `score`}, "subgroups": {split: {group: result of `score_subgroup`}}}.
    """
    splits = [split for split in system.probabilities if split in images.labels]
    result: dict[str, Any] = {
        "submitted": system.submitted,
        "calibrated": system.calibrated,
        "inputs": list(system.store.provenance()["inputs"]) if system.store else [],
        "thresholds": system.thresholds,
        "chosen_on": system.chosen_on,
        "epochs_chosen_on": system.epochs_chosen_on,
        "networks": list(system.networks),
        "splits": {},
        "subgroups": {},
    }
    for split in splits:
        labels, probabilities = images.labels[split], system.probabilities[split]
        groups = {} if metadata is None else subgroups(metadata, images.ids[split])
        threshold = system.first_threshold(MELANOMA)
        result["splits"][split] = score(labels, probabilities, system.thresholds, seed)
        result["subgroups"][split] = {
            group: score_subgroup(labels[rows], probabilities[rows], threshold, seed) for group, rows in groups.items()
        }
    return result


def score(labels: np.ndarray, probabilities: np.ndarray, thresholds: Thresholds, seed: int) -> dict[str, Any]:
    """All metrics of a split, with 95 % intervals and counts.

    Args:
        labels: int (N,), index into CLASSES.
        probabilities: float (N, 3).
        thresholds: thresholds of each task.
        seed: seed of the bootstrap.
    """
    truth, probability = labels == MELANOMA, probabilities[:, MELANOMA]
    return {
        "n": len(labels),
        "of_each_class": {name: int((labels == label).sum()) for label, name in enumerate(CLASSES)},
        "metrics": classification.all_metrics(labels, probabilities, thresholds),
        "intervals": bootstrap.classification_intervals(labels, probabilities, thresholds, seed),
        "melanoma_confusion": {
            point: classification.binary_confusion(truth, probability >= threshold).tolist()
            for point, threshold in thresholds[CLASSES[MELANOMA]].items()
        },
        "class_confusion": classification.class_confusion(labels, probabilities).tolist(),
    }


def score_aucs(labels: np.ndarray, probabilities: np.ndarray, seed: int) -> dict[str, Any]:
    """The challenge's AUCs with 95 % intervals; arguments as of `score`."""
    metrics = classification.task_aucs(labels, probabilities)
    return {"metrics": metrics, "intervals": bootstrap.auc_intervals(labels, probabilities, seed)}


def score_subgroup(labels: np.ndarray, probabilities: np.ndarray, threshold: float, seed: int) -> dict[str, Any]:
    """Melanoma metrics of a part of a split, with 95 % intervals and counts.

    Args:
        labels: int (N,), index into CLASSES.
        probabilities: float (N, 3).
        threshold: probability of melanoma from which an image counts as melanoma.
        seed: seed of the bootstrap.
    """
    metrics, intervals = bootstrap.binary_intervals(labels, MELANOMA, probabilities[:, MELANOMA], threshold, seed)
    melanomas = int((labels == MELANOMA).sum())
    return {"n": len(labels), "melanomas": melanomas, "metrics": metrics, "intervals": intervals}


def rows_with_masks(store: Store, split: str, left_out: Sequence[str] = ()) -> np.ndarray:
    """Rows of a split's original images of --source that have a lesion mask, without the ids left out, int (K,)."""
    rows = np.intersect1d(originals_with_mask(store, split), base_rows(store, split))
    return rows[~np.isin(store.load("ids", split=split)[rows], left_out)]


def score_masks(store: Store, split: str, rows: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean segmentation metrics of some images of a split, with 95 % intervals.

    Args:
        store: with predicted masks of the split, and true ones of some of its images.
        split: train, val or test.
        rows: int (K,), the images to evaluate, K > 0.
        seed: seed of the bootstrap.

    Returns:
        {"n": ..., "metrics": {name: mean}, "intervals": {name: (low, high)}}, names as of `segmentation.per_image`.
    """
    truth, predicted = store.load("masks", split=split), store.load("predicted", split=split)
    blocks = [rows[start : start + ROW_BLOCK] for start in range(0, len(rows), ROW_BLOCK)]
    parts = [segmentation.per_image(truth[block], predicted[block]) for block in blocks]
    return summarise_masks(parts, seed)


def summarise_masks(parts: Sequence[Mapping[str, np.ndarray]], seed: int) -> dict[str, Any]:
    """As `score_masks`, from results of `segmentation.per_image` of some images each."""
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {
        "n": len(values["jaccard"]),
        "metrics": {name: float(column.mean()) for name, column in values.items()},
        "intervals": bootstrap.mean_intervals(values, seed),
    }
