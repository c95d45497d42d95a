"""Step 5 of 5: evaluate melanoma against the rest, and seborrheic keratosis against the rest.

Evaluates validation and test. After a cross-validation (--folds in step 4) it also evaluates train, where each image
was predicted by networks that were not trained on it, and writes the files named below for train too.

Reads   data/arrays/{train,val,test}_{ids,source,labels}.npy  from step 1
        data/arrays/{train,val,test}_probabilities.npy      from step 4
        CSV files of predictions and metadata               with --predictions, --compare, --metadata
        data/arrays/{val,test}_{images,predicted}.npy       from steps 1 and 2, with --occlusion
        data/weights/{backbone}{member}.weights.h5          from step 4, with --occlusion
        data/weights/{backbone}.json                        from step 4, with --occlusion or pretrained networks
Writes  graphics/roc_{val,test}.png                         ROC curves with their bands and operating points
        graphics/precision_recall_{val,test}.png            precision against recall
        graphics/reliability_{val,test}.png                 observed frequency against predicted probability
        graphics/confusion_melanoma_{val,test}.png          benign (nevus and keratosis) against melanoma
        graphics/confusion_classes_{val,test}.png           the three classes
        graphics/metrics.json                               every metric with its 95 % interval
        graphics/predictions_{val,test}.csv                 one line per image, in the challenge's format
        graphics/report.html, MODEL_CARD.md                 report with all figures; model card
        graphics/occlusion_{val,test}.png                   AUCs with the lesion occluded, and with it only: --occlusion
        graphics/gradcam_{val,test}.png                     Grad-CAM of notable cases: --occlusion
        graphics/comparison.json, comparison_{val,test}.png with --compare, which writes nothing else
        data/weights/thresholds.json                        thresholds, chosen on train or validation, or pretrained

Run     python evaluate.py
Try     python evaluate.py --limit 30
Expect  docs/results.md
"""

import argparse
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.atomic import write_json
from melanoma.artifacts.store import Store
from melanoma.cli import flags, run
from melanoma.errors import InputError
from melanoma.evaluation import comparison, figures, report, scoring, subgroups, submissions, tables
from melanoma.log import log

OUTPUTS = (*figures.OF_SPLIT, submissions.FILE, report.PAGE, report.CARD)


def build_parser() -> argparse.ArgumentParser:
    """The script's command line."""
    parser = flags.base_parser(__doc__)
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


def print_metrics(results: dict[str, Any], synthetic: bool) -> None:
    """Prints the metrics of every system and split, test first."""
    if synthetic:
        log.info("\n%s", report.SYNTHETIC)
    for name, system in results.items():
        for split in scoring.report_order(system["splits"]):
            log.info("")
            for line in tables.terminal_lines(name, split, system):
                log.info("%s", line)


def main(arguments: argparse.Namespace) -> None:
    """Evaluates this pipeline's classifier and other systems on every split; or compares two systems."""
    store, graphics = Store(arguments.data, contract.EVALUATION, vars(arguments)), arguments.graphics
    images = scoring.load_images(store)
    if arguments.compare:
        systems = scoring.load_submissions(arguments.compare, images)
        compared = comparison.compare(systems, images.labels, graphics, arguments.seed)
        for line in comparison.lines(compared, images.labels):
            log.info("%s", line)
        write_json(graphics / comparison.FILE, compared | store.provenance())
        return

    metadata = subgroups.read_metadata(arguments.metadata, images.ids) if arguments.metadata else None
    systems = scoring.load_systems(store, images, arguments.predictions)
    classifier = next((system for system in systems if not system.submitted), None)
    if arguments.occlusion and not classifier:
        raise InputError(f"--occlusion needs this pipeline's classifier: run {contract.CLASSIFIER} first")
    figures.remove(graphics, OUTPUTS, keep=arguments.predictions)

    results = {system.name: scoring.evaluate_system(system, images, metadata, arguments.seed) for system in systems}
    if classifier:
        store.save_json("thresholds", classifier.thresholds)
        for split in classifier.probabilities:
            table = graphics / submissions.FILE.format(split=split)
            ids, probabilities = scoring.load_predictions(store, images, split)
            submissions.write(table, ids, probabilities)
            log.info("%d predictions in %s", len(probabilities), table)
        if arguments.occlusion and not images.labels:
            log.info("no occlusion test, because there are no labels")
        if arguments.occlusion and images.labels:
            from melanoma.evaluation import occlusion  # imports Keras

            results[classifier.name]["occlusion"] = occlusion.evaluate(
                store, classifier.name, images, graphics, arguments.seed
            )
    for split, labels in images.labels.items():
        if predicted := [system for system in systems if split in system.probabilities]:
            figures.draw_evaluation(graphics, split, labels, predicted, arguments.seed)

    metrics = {"systems": results} | store.provenance()
    print_metrics(results, report.is_synthetic(report.made_with(metrics)))
    if unlabelled := [split for split in images.rows if split not in images.labels]:
        log.info("\nno metrics, because there are no labels: %s", ", ".join(unlabelled))
    write_json(graphics / report.METRICS_FILE, metrics)
    if results:
        report.write(graphics, metrics)
        log.info("\nopen %s", graphics / report.PAGE)


if __name__ == "__main__":
    run.run(build_parser(), main)
