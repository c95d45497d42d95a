"""Step 5 of 5: melanoma against the rest, seborrheic keratosis against the rest, on validation and test.

Reads   data/arrays/{val,test}_{ids,labels}.npy             from step 1
        data/arrays/{val,test}_probabilities.npy            from step 4
        any system's predictions                            with --predictions or --compare
        data/arrays/{val,test}_{images,predicted}.npy       from steps 1 and 2, with --probe
        data/weights/{backbone}.{json,weights.h5}           from step 4, with --probe
Writes  graphics/roc_{val,test}.png                         ROC curves, areas, operating points
        graphics/precision_recall_{val,test}.png            precision against recall
        graphics/reliability_{val,test}.png                 probabilities against what comes true
        graphics/confusion_melanoma_{val,test}.png          benign (nevus and keratosis) against melanoma
        graphics/confusion_classes_{val,test}.png           the three classes
        graphics/metrics.json                               every figure with its 95 % interval
        graphics/predictions_{val,test}.csv                 a line per image, in the challenge's form
        graphics/probe_{val,test}.png                       without the lesion, and with it alone: with --probe
        graphics/gradcam_{val,test}.png                     where the evidence lies in telling cases: with --probe
        graphics/comparison.json, comparison_{val,test}.png with --compare, which does nothing else
        data/weights/thresholds.json                        the thresholds chosen on validation

Run     python evaluate.py
Try     python evaluate.py --limit 30
Expect  README, "Results"
"""

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from melanoma import command, isic, metrics, plots, predictions, stages
from melanoma.command import log
from melanoma.errors import InputError

import numpy as np

ROC, PRECISION_RECALL = "roc_{split}.png", "precision_recall_{split}.png"
RELIABILITY = "reliability_{split}.png"
BINARY, CLASSES = "confusion_melanoma_{split}.png", "confusion_classes_{split}.png"
PROBE, GRADCAM = "probe_{split}.png", "gradcam_{split}.png"
TABLE, COMPARISON = "predictions_{split}.csv", "comparison_{split}.png"
FIGURES = (ROC, PRECISION_RECALL, RELIABILITY, BINARY, CLASSES, PROBE, GRADCAM, TABLE)
CASES = 4  # of each kind in the Grad-CAM pictures
BATCH_SIZE = 16
DEFAULT_THRESHOLD = 0.5  # the challenge's own; where no validation labels choose a better one
RATES = ("1 - specificity", "sensitivity")

System = dict[str, np.ndarray]  # probabilities, float (N, 3), by split
Thresholds = dict[str, dict[str, float]]  # by class and operating point


def parser() -> argparse.ArgumentParser:
    """The script's command line."""
    flags = command.parser(__doc__)
    flags.add_argument(
        "--predictions",
        type=Path,
        nargs="+",
        default=[],
        metavar="CSV",
        help="of other systems, image_id,melanoma,seborrheic_keratosis: judged and drawn too, or alone",
    )
    flags.add_argument(
        "--compare", type=Path, nargs=2, metavar="CSV", help="two systems' predictions: tells their difference alone"
    )
    flags.add_argument(
        "--probe", action="store_true", help="what the classifier says without the lesion, and where it looks"
    )
    return flags


def about(split: str, labels: np.ndarray) -> str:
    """Which images a picture is of."""
    return f"{isic.OFFICIAL_NAMES[split].removesuffix('_v2').lower()}, n = {len(labels)}"


def choose_thresholds(name: str, system: System, labels: System) -> Thresholds:
    """For each task, the thresholds of the operating points on validation, or the challenge's where it cannot tell."""
    thresholds = {
        isic.CLASSES[index]: dict.fromkeys((metrics.YOUDEN, metrics.SENSITIVE), DEFAULT_THRESHOLD)
        for index in isic.RANKED
    }
    if "val" not in system or "val" not in labels:
        log.info("%s: no labelled predictions of validation: thresholds stay at %.2f", name, DEFAULT_THRESHOLD)
        return thresholds
    for index in isic.RANKED:
        truth = labels["val"] == index
        if 0 < truth.sum() < len(truth):
            thresholds[isic.CLASSES[index]] = metrics.operating_points(truth, system["val"][:, index])
        else:
            log.info("validation has one side only of %s: threshold %.2f", isic.CLASSES[index], DEFAULT_THRESHOLD)
    return thresholds


def curves(
    split: str, labels: np.ndarray, systems: dict[str, np.ndarray], thresholds: Thresholds, seed: int
) -> tuple[list[plots.Curve], list[plots.Curve]]:
    """ROC and precision-recall curves of both tasks; the first system's with band and operating points."""
    roc, precision_recall = [], []
    for colour, index in enumerate(isic.RANKED):
        name, truth = isic.CLASSES[index], labels == index
        if not 0 < truth.sum() < len(truth):
            log.info("%s: only one side of %s occurs: no curves", split, name)
            continue
        for style, (system, probabilities) in enumerate(systems.items()):
            score = probabilities[:, index]
            label = f"{name}, {system}" if len(systems) > 1 else name
            area, precision = metrics.auc(truth, score), metrics.average_precision(truth, score)
            line: dict[str, Any] = {"colour": colour, "style": style}
            points: list[dict[str, Any]] = [{}, {}]
            if style == 0:
                found = [metrics.at_threshold(truth, score >= value) for value in thresholds.get(name, {}).values()]
                points[0]["points"] = [(1 - one["specificity"], one["sensitivity"]) for one in found]
                points[0]["band"] = metrics.roc_band(truth, score, seed)
                points[1]["points"] = [(one["sensitivity"], one["precision"]) for one in found if one["precision"]]
            x_y = metrics.roc_curve(truth, score)
            roc.append(plots.Curve(f"{label}: AUC {area:.3f}", *x_y, **line, **points[0]))
            x_y = metrics.precision_recall_curve(truth, score)
            precision_recall.append(plots.Curve(f"{label}: AP {precision:.3f}", *x_y, **line, **points[1]))
    return roc, precision_recall


def draw(
    split: str,
    labels: np.ndarray,
    systems: dict[str, np.ndarray],
    thresholds: Thresholds,
    arguments: argparse.Namespace,
) -> None:
    """Draws a split's pictures of the first system, with the curves of the others beside."""
    folder, images = arguments.graphics, about(split, labels)
    roc, precision_recall = curves(split, labels, systems, thresholds, arguments.seed)
    if roc:
        title, points = f"Each class against the rest, {images}", f"thresholds: {metrics.YOUDEN}, {metrics.SENSITIVE}"
        plots.unit_square(folder / ROC.format(split=split), roc, title, RATES, "chance", points)
        axes = ("recall (sensitivity)", "precision")
        plots.unit_square(folder / PRECISION_RECALL.format(split=split), precision_recall, title, axes, points=points)
    probabilities = next(iter(systems.values()))
    bins = {isic.CLASSES[index]: metrics.calibration(labels == index, probabilities[:, index]) for index in isic.RANKED}
    plots.reliability(folder / RELIABILITY.format(split=split), bins, f"Calibration, {images}")
    melanoma, threshold = isic.CLASSES[isic.MELANOMA], thresholds[isic.CLASSES[isic.MELANOMA]][metrics.YOUDEN]
    binary = metrics.binary_confusion(labels == isic.MELANOMA, probabilities[:, isic.MELANOMA] >= threshold)
    title = f"Melanoma at probability {threshold:.3f}, {images}"
    plots.confusion(folder / BINARY.format(split=split), binary, ("benign", melanoma), title)
    matrix = metrics.class_confusion(labels, probabilities)
    plots.confusion(folder / CLASSES.format(split=split), matrix, isic.CLASSES, f"Likeliest class, {images}")


def score(labels: np.ndarray, probabilities: np.ndarray, thresholds: Thresholds, seed: int) -> dict[str, Any]:
    """Every figure of a split, with intervals and counts."""

    def compute(rows: np.ndarray) -> dict[str, float | None]:
        return metrics.figures(labels[rows], probabilities[rows], thresholds)

    truth, probability = labels == isic.MELANOMA, probabilities[:, isic.MELANOMA]
    return {
        "n": len(labels),
        "of_each_class": {name: int((labels == label).sum()) for label, name in enumerate(isic.CLASSES)},
        "figures": compute(np.arange(len(labels))),
        "intervals": metrics.intervals(compute, labels, seed),
        "melanoma_confusion": {
            point: metrics.binary_confusion(truth, probability >= threshold).tolist()
            for point, threshold in thresholds[isic.CLASSES[isic.MELANOMA]].items()
        },
        "class_confusion": metrics.class_confusion(labels, probabilities).tolist(),
    }


def judge(name: str, system: System, labels: System, thresholds: Thresholds, seed: int) -> dict[str, Any]:
    """Scores the splits of a system that have labels, and prints the figures."""
    scored = {}
    for split in [split for split in system if split in labels]:
        one = scored[split] = score(labels[split], system[split], thresholds, seed)
        note = "; thresholds chosen on these very images" if split == "val" else ""
        log.info("\n%s, %s, n = %d, with 95 %% bootstrap intervals%s", name, split, one["n"], note)
        for line in command.table(one["figures"], one["intervals"]):
            log.info("%s", line)
    return {"thresholds": thresholds, "splits": scored}


def compare(systems: dict[str, System], labels: System, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the second of two systems has over the first, on each split that both have."""
    (first, one), (second, other) = systems.items()
    splits = [split for split in one if split in other and split in labels]
    if not splits:
        raise InputError(f"--compare: {first} and {second} have no labelled split in common")
    report = {}
    for split in splits:
        truth = labels[split]
        found = metrics.compare(truth, one[split], other[split], arguments.seed)
        report[split] = {figure: asdict(value) for figure, value in found.items()}
        log.info("\n%s, n = %d: %s less %s, with its 95 %% interval", split, len(truth), second, first)
        for figure, value in found.items():
            low, high = value.interval
            log.info(
                "  %-28s%.3f - %.3f = %+.3f  (%+.3f to %+.3f), p = %.4f",
                *(figure, value.second, value.first, value.difference, low, high, value.p_value),
            )
        lines, _ = curves(split, truth, {first: one[split], second: other[split]}, {}, arguments.seed)
        path = arguments.graphics / COMPARISON.format(split=split)
        plots.unit_square(path, lines, f"{first} and {second}, {about(split, truth)}", RATES, "chance")
    return {"first": first, "second": second, "splits": report}


def areas_of(labels: np.ndarray, probabilities: np.ndarray, rows: np.ndarray) -> dict[str, float | None]:
    """`metrics.areas` of some rows."""
    return metrics.areas(labels[rows], probabilities[rows])


def probe(store: stages.Store, name: str, labels: System, arguments: argparse.Namespace) -> dict[str, Any]:
    """Judges the classifier on photographs without their lesion and with nothing else; draws where it looks."""
    from melanoma import classifier, probe, training  # Keras takes seconds to import, and nothing else here needs it

    network = classifier.load(store, name)
    settings = json.loads(store.path("classifier_settings", backbone=name).read_text(encoding="utf-8"))
    report: dict[str, Any] = {}
    for split, truth in labels.items():
        report[split] = {}
        seen = {}
        for variant in probe.VARIANTS:
            shown = np.concatenate(list(probe.altered(store, split, variant, settings["roi"])))
            batches = training.predict(network.model, shown, BATCH_SIZE, f"{split}, {variant}")
            seen[variant] = shown, np.concatenate(list(batches))
            found = seen[variant][1]
            compute = partial(areas_of, truth, found)
            bounds = metrics.intervals(compute, truth, arguments.seed)
            report[split][variant] = {"figures": metrics.areas(truth, found), "intervals": bounds}
        known = [figure for figure, value in report[split][probe.AS_TRAINED]["figures"].items() if value is not None]
        groups = {
            figure.removesuffix(" auc"): {
                variant: (one["figures"][figure], one["intervals"][figure]) for variant, one in report[split].items()
            }
            for figure in known
        }
        title = f"What the classifier needs the lesion for, {about(split, truth)}"
        plots.estimates(arguments.graphics / PROBE.format(split=split), groups, "AUC", 0.5, title)
        shown, found = seen[probe.AS_TRAINED]
        tiles = []
        for kind, rows in probe.telling_cases(truth, found, CASES).items():
            heat = probe.class_activation(network, shown[rows], found[rows].argmax(axis=1))
            tiles.append(
                [
                    plots.Tile(
                        shown[row],
                        f"{kind}: {isic.CLASSES[truth[row]]},\n"
                        f"taken for {isic.CLASSES[found[row].argmax()]} ({found[row].max():.2f})",
                        heat=one,
                    )
                    for row, one in zip(rows, heat, strict=True)
                ]
            )
        title = f"Evidence for the likeliest class (Grad-CAM), {about(split, truth)}"
        plots.sheet(arguments.graphics / GRADCAM.format(split=split), [row for row in tiles if row], title)
    return report


def main(arguments: argparse.Namespace) -> None:
    """Chooses thresholds on validation and judges every split but train; or compares two systems."""
    store = stages.Store(arguments.data, stages.EVALUATION, vars(arguments))
    splits = [split for split in store.splits() if split != "train"]
    ids = {split: store.load("ids", split=split).tolist() for split in splits}
    labels = {
        split: np.array(store.load("labels", split=split)) for split in splits if store.has("labels", split=split)
    }
    files = arguments.compare or arguments.predictions
    systems = {path.stem: predictions.read(path, ids) for path in files}
    if len(systems) < len(files):
        raise InputError("two files of predictions have the same name: rename one, for it names its system")
    if arguments.compare:
        report = compare(systems, labels, arguments)
        stages.write_json(arguments.graphics / "comparison.json", report | store.provenance())
        return
    for figure in FIGURES:
        for split in isic.SPLITS:  # none of an earlier run may stay beside other numbers
            (arguments.graphics / figure.format(split=split)).unlink(missing_ok=True)
    own: System = {}
    if splits and (not systems or any(store.has("probabilities", split=split) for split in splits)):
        own = {split: np.array(store.load("probabilities", split=split)) for split in splits}
        name = store.written_with("probabilities", split=splits[0])["backbone"]
        if name in systems:
            raise InputError(f"--predictions {name}.csv has the name of the own network: rename it")
        systems = {name: own} | systems
        for split, probabilities in own.items():
            predictions.write(arguments.graphics / TABLE.format(split=split), ids[split], probabilities)
    thresholds = {name: choose_thresholds(name, system, labels) for name, system in systems.items()}
    if own:
        chosen_on = "val" if "val" in own and "val" in labels else None
        store.save_json("thresholds", {"chosen_on": chosen_on, "thresholds": thresholds[next(iter(systems))]})
    for split in splits:
        having = {name: system[split] for name, system in systems.items() if split in system}
        if split not in labels:
            log.info("\n%s has no labels: predictions only, in predictions_%s.csv", split, split)
        elif having:
            draw(split, labels[split], having, thresholds[next(iter(having))], arguments)
    report = {name: judge(name, system, labels, thresholds[name], arguments.seed) for name, system in systems.items()}
    if arguments.probe and own:
        report[next(iter(systems))]["probe"] = probe(store, next(iter(systems)), labels, arguments)
    if not labels:
        log.info("\nnothing to judge: neither validation nor test has labels")
    stages.write_json(arguments.graphics / "metrics.json", {"systems": report} | store.provenance())
    log.info("\nfigures in %s", arguments.graphics / "metrics.json")


if __name__ == "__main__":
    command.run(parser(), main)
