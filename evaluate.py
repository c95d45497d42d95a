"""Step 5 of 5: melanoma against the rest, seborrheic keratosis against the rest, on validation and test.

After a cross-validation (--folds of step 4) also on train, each photograph by the networks that have not seen it; the
files named below are then there for train too.

Reads   data/arrays/{train,val,test}_{ids,labels}.npy       from step 1
        data/arrays/{train,val,test}_probabilities.npy      from step 4
        any system's predictions, metadata                  with --predictions, --compare, --metadata
        data/arrays/{val,test}_{images,predicted}.npy       from steps 1 and 2, with --probe
        data/weights/{backbone}{member}.weights.h5          from step 4, with --probe
        data/weights/{backbone}.json                        from step 4, with --probe or pretrained networks
Writes  graphics/roc_{val,test}.png                         ROC curves, areas, operating points
        graphics/precision_recall_{val,test}.png            precision against recall
        graphics/reliability_{val,test}.png                 probabilities against what comes true
        graphics/confusion_melanoma_{val,test}.png          benign (nevus and keratosis) against melanoma
        graphics/confusion_classes_{val,test}.png           the three classes
        graphics/metrics.json                               every figure with its 95 % interval
        graphics/predictions_{val,test}.csv                 a line per image, in the challenge's form
        graphics/report.html, MODEL_CARD.md                 the page that shows all this; what the model is for
        graphics/probe_{val,test}.png                       without the lesion, and with it alone: with --probe
        graphics/gradcam_{val,test}.png                     where the evidence lies in telling cases: with --probe
        graphics/comparison.json, comparison_{val,test}.png with --compare, which does nothing else
        data/weights/thresholds.json                        the thresholds, chosen on train or validation, or pretrained

Run     python evaluate.py
Try     python evaluate.py --limit 30
Expect  README, "Results"
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from melanoma import command, evaluation, folds, hardware, isic, metrics, plots, predictions, report, stages
from melanoma.command import log
from melanoma.errors import InputError, StageError
from melanoma.evaluation import System, Thresholds

import numpy as np

ROC, PRECISION_RECALL = "roc_{split}.png", "precision_recall_{split}.png"
RELIABILITY = "reliability_{split}.png"
BINARY, CLASSES = "confusion_melanoma_{split}.png", "confusion_classes_{split}.png"
PROBE, GRADCAM = "probe_{split}.png", "gradcam_{split}.png"
TABLE, COMPARISON = "predictions_{split}.csv", "comparison_{split}.png"
COMPARED = "comparison.json"
FIGURES = (ROC, PRECISION_RECALL, RELIABILITY, BINARY, CLASSES, PROBE, GRADCAM, TABLE, report.PAGE, report.CARD)
CASES = 4  # of each kind in the Grad-CAM pictures
BATCH_SIZE = 16
RATES = ("1 - specificity", "sensitivity")


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
        "--metadata",
        type=Path,
        nargs="+",
        default=[],
        metavar="CSV",
        help="image_id,age_approximate,sex, as the challenge has it: melanoma's figures by sex and age too",
    )
    flags.add_argument(
        "--probe", action="store_true", help="what the classifier says without the lesion, and where it looks"
    )
    return flags


def about(split: str, labels: np.ndarray) -> str:
    """Which images a picture is of."""
    return f"{evaluation.SPOKEN[split]}, n = {len(labels)}"


def draw(
    split: str,
    labels: np.ndarray,
    systems: dict[str, np.ndarray],
    thresholds: Thresholds,
    arguments: argparse.Namespace,
) -> None:
    """Draws a split's pictures of the first system, with the curves of the others beside."""
    folder, images = arguments.graphics, about(split, labels)
    roc, precision_recall = evaluation.curves(split, labels, systems, thresholds, arguments.seed)
    if roc:
        title = f"Each class against the rest, {images}"
        points = "thresholds: " + ", ".join(dict.fromkeys(point for one in thresholds.values() for point in one))
        plots.unit_square(folder / ROC.format(split=split), roc, title, RATES, "chance", points)
        axes = ("recall (sensitivity)", "precision")
        plots.unit_square(folder / PRECISION_RECALL.format(split=split), precision_recall, title, axes, points=points)
    probabilities = next(iter(systems.values()))
    bins = {isic.CLASSES[index]: metrics.calibration(labels == index, probabilities[:, index]) for index in isic.RANKED}
    plots.reliability(folder / RELIABILITY.format(split=split), bins, f"Calibration, {images}")
    melanoma, threshold = isic.CLASSES[isic.MELANOMA], evaluation.first_threshold(thresholds, isic.MELANOMA)
    binary = metrics.binary_confusion(labels == isic.MELANOMA, probabilities[:, isic.MELANOMA] >= threshold)
    title = f"Melanoma at probability {threshold:.3f}, {images}"
    plots.confusion(folder / BINARY.format(split=split), binary, ("benign", melanoma), title)
    matrix = metrics.class_confusion(labels, probabilities)
    plots.confusion(folder / CLASSES.format(split=split), matrix, isic.CLASSES, f"Likeliest class, {images}")


def judge(
    name: str, system: System, labels: System, thresholds: Thresholds, chosen_on: str | None, seed: int
) -> dict[str, Any]:
    """Scores the splits of a system that have labels, and prints the figures."""
    scored = {}
    for split in [split for split in system if split in labels]:
        one = scored[split] = evaluation.score(labels[split], system[split], thresholds, seed)
        note = "; thresholds chosen on these very images, where any were" if split == chosen_on else ""
        images = about(split, labels[split])
        log.info("\n%s, %s, with 95 %% bootstrap intervals%s", name, images, note)
        for line in command.table(one["figures"], one["intervals"]):
            log.info("%s", line)
    return {"thresholds": thresholds, "chosen_on": chosen_on, "splits": scored, "subgroups": {}}


def compare(systems: dict[str, System], labels: System, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the second of two systems has over the first, on each split that both have."""
    (first, one), (second, other) = systems.items()
    splits = [split for split in one if split in other and split in labels]
    if not splits:
        raise InputError(f"--compare: {first} and {second} have no labelled split in common")
    judged = {}
    for split in splits:
        truth = labels[split]
        found = metrics.compare(truth, one[split], other[split], arguments.seed)
        judged[split] = {figure: asdict(value) for figure, value in found.items()}
        log.info("\n%s, n = %d: %s less %s, with its 95 %% interval", split, len(truth), second, first)
        for figure, value in found.items():
            low, high = value.interval
            log.info(
                "  %-28s%.3f - %.3f = %+.3f  (%+.3f to %+.3f), p = %.4f",
                *(figure, value.second, value.first, value.difference, low, high, value.p_value),
            )
        lines, _ = evaluation.curves(split, truth, {first: one[split], second: other[split]}, {}, arguments.seed)
        path = arguments.graphics / COMPARISON.format(split=split)
        plots.unit_square(path, lines, f"{first} and {second}, {about(split, truth)}", RATES, "chance")
    return {"first": first, "second": second, "splits": judged}


def judge_probe(store: stages.Store, name: str, labels: System, arguments: argparse.Namespace) -> dict[str, Any]:
    """Judges the classifier on photographs without their lesion and with nothing else; draws where it looks."""
    from melanoma import classifier, probe  # with Keras, which nothing else here needs

    hardware.check()
    (network, settings), judged, ways = classifier.load(store, name), {}, set()
    for split, labelled in labels.items():
        if split == "train":
            continue  # each photograph is known to all networks but one
        rows = probe.outlined(store, split)
        truth = labelled[rows]
        shown, found = {}, {}
        for variant in probe.variants(settings["roi"]):
            shown[variant] = np.concatenate(list(probe.altered(store, split, variant, settings["roi"])))[rows]
            found[variant], way = network.probabilities(shown[variant], BATCH_SIZE, f"{split}, {variant}")
            ways.add(way)
        judged[split] = {
            variant: evaluation.with_intervals(partial(evaluation.areas, truth, one), truth, arguments.seed)
            for variant, one in found.items()
        }
        groups = {
            figure.removesuffix(" auc"): {
                variant: (one["figures"][figure], one["intervals"][figure]) for variant, one in judged[split].items()
            }
            for figure, value in judged[split][probe.AS_TRAINED]["figures"].items()
            if value is not None
        }
        if groups:
            title = f"What the classifier needs the lesion for, {about(split, truth)}"
            plots.estimates(arguments.graphics / PROBE.format(split=split), groups, "AUC", 0.5, title)
        photographs, answers = shown[probe.AS_TRAINED], found[probe.AS_TRAINED]
        cases = probe.telling_cases(truth, answers, CASES)
        explain = partial(probe.explained, network.classifiers[0], photographs, truth, answers)
        tiles = [explain(kind, which) for kind, which in cases.items() if len(which)]
        title = f"Evidence for the likeliest class (Grad-CAM), {about(split, truth)}"
        plots.sheet(arguments.graphics / GRADCAM.format(split=split), tiles, title)
    store.settings["inference"] = ", ".join(sorted(ways))
    return judged


def clear(graphics: Path, names: Sequence[str], keep: Sequence[Path] = ()) -> None:
    """Takes an earlier run's files away, so that none stays beside other numbers.

    Raises:
        InputError: one is among the files to read, `keep`.
    """
    paths = {(graphics / name.format(split=split)).resolve() for name in names for split in isic.SPLITS}
    if read := [str(path) for path in keep if path.resolve() in paths]:
        raise InputError(f"{read[0]} is a file that this run writes itself: give a copy of another name")
    for path in paths:
        path.unlink(missing_ok=True)


def own_system(store: stages.Store, photographs: dict[str, np.ndarray]) -> dict[str, System]:
    """The probabilities that the fourth script gives these rows, under the name of its backbone; nothing without rows.

    Train has some after a cross-validation alone.
    """
    own = {
        split: np.array(store.load("probabilities", split=split))[rows]
        for split, rows in photographs.items()
        if split != "train" or store.has("probabilities", split=split)
    }
    return {store.written_with("probabilities", split=next(iter(own)))["backbone"]: own} if own else {}


def pretrained_thresholds(store: stages.Store, own: dict[str, System]) -> dict[str, Thresholds]:
    """The thresholds that came with the own network, where it is the pretrained one."""
    return {
        name: json.loads(store.check("classifier_settings", backbone=name).read_text(encoding="utf-8"))["thresholds"]
        for name, system in own.items()
        if store.written_with("probabilities", split=next(iter(system)))["pretrained"]
    }


def main(arguments: argparse.Namespace) -> None:
    """Chooses thresholds and judges every split; or compares two systems."""
    store, graphics = stages.Store(arguments.data, stages.EVALUATION, vars(arguments)), arguments.graphics
    splits = store.splits()
    whole = stages.Store(arguments.data, stages.EVALUATION, {})  # without --limit: files are of all images
    names = {split: whole.load("ids", split=split).tolist() for split in splits}
    photographs = {split: np.flatnonzero(folds.photographs(names[split][: store.rows(split)])) for split in splits}
    all_ids = {split: [name for name in names[split] if folds.is_photograph(name)] for split in splits}
    ids = {split: all_ids[split][: len(rows)] for split, rows in photographs.items()}
    labels = {
        split: np.array(store.load("labels", split=split))[rows]
        for split, rows in photographs.items()
        if store.has("labels", split=split)
    }
    files = arguments.compare or arguments.predictions
    others = {
        path.stem: {split: one[: len(ids[split])] for split, one in predictions.read(path, all_ids).items()}
        for path in files
    }
    if len(others) < len(files):
        raise InputError("two files of predictions have the same name: rename one, for it names its system")
    if arguments.compare:
        clear(graphics, (COMPARISON, COMPARED))
        found = compare(others, labels, arguments)
        stages.write_json(graphics / COMPARED, found | store.provenance())
        return
    known = isic.read_metadata(arguments.metadata) if arguments.metadata else None
    if known is not None and not known.index.isin([name for split in splits for name in ids[split]]).any():
        raise InputError("--metadata: knows none of these images; ids come without .jpg there")
    own: dict[str, System] = {}
    if not others or any(store.has("probabilities", split=split) for split in splits):
        try:
            own = own_system(store, photographs)
        except StageError as error:
            if not others:
                raise
            log.info("the own network is left out: %s", error)
    if double := own.keys() & others.keys():
        raise InputError(f"--predictions {double.pop()}.csv has the name of the own network: rename it")
    if arguments.probe and not own:
        raise InputError(f"--probe needs the own network: run {stages.CLASSIFIER} first")
    clear(graphics, FIGURES, keep=files)
    systems = own | others
    given = pretrained_thresholds(store, own)
    thresholds = given | {
        name: evaluation.choose_thresholds(name, system, labels)
        for name, system in systems.items()
        if name not in given
    }
    judged: dict[str, Any] = {}
    for name, system in systems.items():
        chosen_on = None if name in given else evaluation.chooser(system)
        judged[name] = judge(name, system, labels, thresholds[name], chosen_on, arguments.seed)
        for split in sorted(labels.keys() & system.keys()):
            groups = isic.subgroups(known, ids[split]) if known is not None else {}
            cut = evaluation.first_threshold(thresholds[name], isic.MELANOMA)
            judged[name]["subgroups"][split] = {
                group: evaluation.subgroup(labels[split][rows], system[split][rows], cut, arguments.seed)
                for group, rows in groups.items()
            }
    for name, system in own.items():
        for split, probabilities in system.items():
            predictions.write(graphics / TABLE.format(split=split), ids[split], probabilities)
        store.save_json("thresholds", thresholds[name])
        if arguments.probe:
            judged[name]["probe"] = judge_probe(store, name, labels, arguments)
    for split in splits:
        having = {name: system[split] for name, system in systems.items() if split in system}
        if split not in labels:
            log.info("\n%s has no labels: nothing to judge there", split)
        elif having:
            draw(split, labels[split], having, thresholds[next(iter(having))], arguments)
    told = {"systems": judged} | store.provenance()
    stages.write_json(graphics / report.FIGURES, told)
    if judged:
        masks = graphics / "segmentation.json"
        segmentation = json.loads(masks.read_text(encoding="utf-8")) if masks.is_file() else None
        report.write(graphics, told, segmentation, own=bool(own))
    log.info("\nfigures in %s, the page to read is %s", graphics / report.FIGURES, graphics / report.PAGE)


if __name__ == "__main__":
    command.run(parser(), main)
