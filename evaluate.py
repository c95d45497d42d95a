"""Step 5 of 5: evaluate melanoma against the rest, and seborrheic keratosis against the rest.

Evaluates every classifier of the data folder on validation and test: the main one (the ensemble, otherwise DenseNet121,
if there is one) in detail, the others beside it. After a cross-validation (--folds in step 4) it also evaluates train,
where each image was predicted by networks that were not trained on it, and writes the files named below for train too.

Reads   data/arrays/{train,val,test}_{ids,source,origin,labels}.npy  from step 1
        data/arrays/{train,val,test}_{backbone}_probabilities.npy   from step 4
        CSV files of predictions and metadata               with --predictions, --compare, --metadata
        data/arrays/{val,test}_{images,predicted,roi}.npy   from steps 1 to 3, with --occlusion
        data/weights/{backbone}{member}.weights.h5          from step 4, with --occlusion
        data/weights/{backbone}.json                        from step 4
Writes  graphics/roc_{val,test}.png                         ROC curves of all systems, with bands and operating points
        graphics/precision_recall_{val,test}.png            precision against recall
        graphics/reliability_{val,test}.png                 observed frequency against predicted probability
        graphics/confusion_melanoma_{val,test}.png          benign (nevus and keratosis) against melanoma
        graphics/confusion_classes_{val,test}.png           the three classes
        graphics/metrics.json                               every metric with its 95 % interval
        graphics/predictions_{val,test}.csv                 one line per image, in the challenge's format
        graphics/predictions_{val,test}_{backbone}.csv      those of the classifiers beside the main one
        graphics/report.html, MODEL_CARD.md                 report with all figures; model card
        graphics/occlusion_{val,test}.png                   AUCs with the lesion occluded, and with it only: --occlusion
        graphics/gradcam_{val,test}.png                     Grad-CAM of notable cases: --occlusion
        graphics/comparison.json, comparison_{val,test}.png with --compare, which writes nothing else
        data/weights/{backbone}_thresholds.json             thresholds, chosen on train or validation, or pretrained

Run     python evaluate.py
Try     python evaluate.py --limit 30
Expect  docs/results.md
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.atomic import write_json
from melanoma.artifacts.store import Store
from melanoma.cli import flags, run
from melanoma.errors import InputError
from melanoma.evaluation import comparison, figures, report, scoring, subgroups, submissions, tables
from melanoma.log import log

import numpy as np

OUTPUTS = (*figures.OF_SPLIT, submissions.FILE, report.PAGE, report.CARD)


def classifier_name(text: str) -> str:
    """Argparse type: a backbone's name, or that of the ensemble or the pretrained networks."""
    from melanoma.models import backbones  # imports Keras

    return text if text in (contract.PRETRAINED, contract.ENSEMBLE) else backbones.backbone_name(text)


def build_parser() -> argparse.ArgumentParser:
    """The script's command line."""
    parser = flags.base_parser(__doc__)
    parser.add_argument(
        "--backbone",
        type=classifier_name,
        metavar="NAME",
        help=f"evaluate only the classifier with this backbone, {contract.ENSEMBLE} or {contract.PRETRAINED}; default: "
        f"all, first {contract.ENSEMBLE}, then {contract.MAIN}",
    )
    parser.add_argument(
        "--predictions",
        type=Path,
        nargs="+",
        default=[],
        metavar="CSV",
        help="predictions of other systems to evaluate too, with columns image_id,melanoma,seborrheic_keratosis",
    )
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar="CSV", help="predictions of two systems: only compare them"
    )
    parser.add_argument(
        "--metadata",
        type=Path,
        nargs="+",
        default=[],
        metavar="CSV",
        help="adds melanoma metrics by sex and age; with columns image_id,age_approximate,sex, as published with the "
        "challenge",
    )
    parser.add_argument(
        "--occlusion",
        action="store_true",
        help="test whether the classifier needs the lesion, and show which regions it uses (Grad-CAM)",
    )
    return parser


def print_metrics(metrics: dict[str, Any]) -> None:
    """Prints the metrics of the main system and the comparison with the others for every split, test first."""
    results, main = metrics["systems"], next(iter(metrics["systems"]))
    if report.is_synthetic(report.made_with(metrics, main)):
        log.info("\n%s", report.SYNTHETIC)
    for split in scoring.report_order({split for system in results.values() for split in system["splits"]}):
        blocks = [tables.compared_lines(results, split)]
        if split in results[main]["splits"]:
            blocks.insert(0, tables.terminal_lines(main, split, results[main]))
        for other, found in metrics["differences"].get(split, {}).items():
            blocks.append(comparison.difference_lines(main, other, found))
        for block in map(list, blocks):
            for line in ["", *block] if block else []:
                log.info("%s", line)


def write_predictions(graphics: Path, images: scoring.Images, systems: Sequence[scoring.System]) -> None:
    """Writes the probabilities of every classifier, of all images, as CSV files."""
    for number, system in enumerate(system for system in systems if not system.submitted):
        pattern = submissions.FILE_OF_OTHER if number else submissions.FILE
        for split, probabilities in system.probabilities.items():
            table = graphics / pattern.format(split=split, name=system.name)
            submissions.write(table, images.ids[split], probabilities)
            log.info("%d predictions of %s in %s", len(probabilities), system.name, table)


def compare_with_main(
    systems: Sequence[scoring.System], labels: dict[str, np.ndarray], seed: int
) -> dict[str, dict[str, Any]]:
    """Differences of the other systems from the first one: {split: {system: differences}}."""
    main, *others = systems
    return {
        split: {
            other.name: comparison.differences(main, other, split, labels[split], seed)
            for other in others
            if split in other.probabilities
        }
        for split in main.probabilities
        if split in labels
    }


def main(arguments: argparse.Namespace) -> None:
    """Evaluates the classifiers of this pipeline and other systems on every split; or compares two systems."""
    store, graphics = Store(arguments.data, contract.EVALUATION, vars(arguments)), arguments.graphics
    all_images = scoring.load_images(store)
    if arguments.compare:
        complete = scoring.load_submissions(arguments.compare, all_images)
        images = scoring.to_evaluate(all_images, complete)
        systems = [system.of_images(all_images, images) for system in complete]
        compared = comparison.compare(systems, images.labels, graphics, arguments.seed)
        for line in comparison.lines(compared, images.labels):
            log.info("%s", line)
        write_json(graphics / comparison.FILE, compared | store.provenance())
        return

    complete = scoring.load_systems(store, all_images, arguments.predictions, arguments.backbone)
    if arguments.occlusion and complete[0].submitted:
        raise InputError(f"--occlusion needs this pipeline's classifier: run {contract.CLASSIFIER} first")
    metadata = subgroups.read_metadata(arguments.metadata, all_images.ids) if arguments.metadata else None
    others = [submissions.FILE_OF_OTHER.format(split="{split}", name=name) for name in store.classifiers()]
    figures.remove(graphics, [*OUTPUTS, *others], keep=arguments.predictions)
    write_predictions(graphics, all_images, complete)

    scoring.log_unlabelled(all_images, complete)
    images = scoring.to_evaluate(all_images, complete)
    left_out = scoring.count_seen(all_images, complete)
    for split, counts in left_out.items():
        log.info("%s", scoring.left_out_note(split, counts))
    systems = [scoring.with_thresholds(one, all_images).of_images(all_images, images) for one in complete]
    results = {system.name: scoring.evaluate_system(system, images, metadata, arguments.seed) for system in systems}
    for system in systems:
        system.save_thresholds()
        store.inputs |= system.store.inputs if system.store else {}
    if arguments.occlusion and not images.labels:
        log.info("no occlusion test, because there are no labels")
    if arguments.occlusion and images.labels:
        from melanoma.evaluation import occlusion  # imports Keras

        name = systems[0].name
        results[name]["occlusion"] = occlusion.evaluate(store, name, images, graphics, arguments.seed)
    for split, labels in images.labels.items():
        figures.draw_evaluation(graphics, split, labels, systems, arguments.seed)

    differences = compare_with_main(systems, images.labels, arguments.seed)
    metrics = {"systems": results, "differences": differences, "left_out": left_out} | store.provenance()
    print_metrics(metrics)
    if unlabelled := [split for split in all_images.rows if split not in all_images.labels]:
        log.info("\nno metrics, because there are no labels: %s", ", ".join(unlabelled))
    write_json(graphics / report.METRICS_FILE, metrics)
    report.write(graphics, metrics, report.current_files(store, graphics))
    log.info("\nopen %s", graphics / report.PAGE)


if __name__ == "__main__":
    run.run(build_parser(), main)
