"""Step 4 of 5: train DenseNet121, or another backbone, to classify nevus, melanoma and seborrheic keratosis.

Reads   data/arrays/{train,val,test}_{ids,source,groups,origin,labels}.npy  from step 1
        data/arrays/{train,val,test}_roi.npy                from step 3
        pretrained/classifier_{backbone}{member}.weights.h5 with --pretrained
        pretrained/classifier.json                          with --pretrained
Writes  data/arrays/{train,val}_{backbone}_features.npy     float32 (N, C), features of the frozen backbone
        data/weights/{backbone}_head{member}.weights.h5     the head trained on them, for each fold and seed
        data/weights/{backbone}{member}.weights.h5          the whole classifier
        data/weights/{backbone}.json                        settings, calibration, training history
        data/arrays/{val,test}_{backbone}_probabilities.npy float32 (N, 3), calibrated
        data/arrays/train_{backbone}_probabilities.npy      with --folds: out-of-fold
        data/checkpoints/                                   states of interrupted training, until the script ends
        graphics/{backbone}_{head,full}{member}_curves.png  training curves of each phase
        graphics/{backbone}_{head,full}{member}_history.csv  their values
        graphics/{backbone}_pretrain{member}_curves.png     with --pretrain; of each seed
        graphics/{backbone}_pretrain{member}_history.csv    its values
With --pretrained, {backbone} in these names is `pretrained`, of weights `pretrained_` and the backbone; with --ensemble
it is `ensemble`, and no weights are written.

Run     python densenet_train.py
Try     python densenet_train.py --backbone mobilenet --weights none --epochs 1 --limit 30
Expect  docs/results.md; after Try an AUC near 0.5, for so little training teaches nothing
"""

import argparse
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES
from melanoma.cli import flags, hardware, run
from melanoma.dataset import augment
from melanoma.errors import InputError
from melanoma.evaluation import figures
from melanoma.inference import classify, pretrained
from melanoma.inference.ensemble import Ensemble
from melanoma.inference.predict import views_flag
from melanoma.models import backbones, classifier
from melanoma.training import checkpoints, classification, distributed, recipe
from melanoma.training.callbacks import Draw

import keras
import numpy as np

BATCH_SIZE = 16
EMA = 0.0
# Flags that have no effect with --pretrained and --ensemble.
OF_TRAINING = (
    *("weights", "scaling", "input_size", "colour_constancy", "folds", "seeds", "restart", "continued", "distribute"),
    *(field.name for field in fields(recipe.Recipe) if field.name != "batch_size"),
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = flags.base_parser(__doc__)
    flags.training_flags(parser, None, BATCH_SIZE, None, EMA, " in the last phase; default: depends on --train")
    backbones.add_flags(parser, None, f"; mobilenet is the baseline; default: {contract.MAIN}")
    classifier.add_flags(parser)
    recipe.add_flags(parser)
    parser.add_argument(
        "--folds",
        type=flags.positive_int,
        default=1,
        help="cross-validation: train one network per fold, without the images of that fold; the other splits get the "
        "mean of all networks",
    )
    parser.add_argument("--seeds", type=flags.positive_int, default=1, help="networks per fold, from --seed upwards")
    views_flag(parser)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--pretrained",
        action="store_true",
        help="use the networks in pretrained/ instead of training; with --backbone only those of one backbone",
    )
    instead.add_argument(
        "--ensemble",
        type=backbones.backbone_name,
        nargs="+",
        metavar="BACKBONE",
        help="use the mean of these classifiers, trained before in the same folder, instead of training",
    )
    return parser


# Name, saved settings and probabilities by split of a classifier.
Result = tuple[str, dict[str, Any], dict[str, np.ndarray]]


def train(arguments: argparse.Namespace, store: Store, roi: str) -> Result | None:
    """Trains the networks; None in a process of distributed training that does not lead."""
    settings = classification.ClassifierSettings.from_flags(vars(arguments))
    drawn: set[str] = set()  # start of the names of the files of curves

    def draw(phase: str, member: str) -> Draw:
        metrics = {
            "loss": f"{'focal ' * (arguments.balance == 'focal')}cross-entropy",
            "auc": "mean AUC of the three classes",
        }
        what = {"head": "head on frozen features", "full": "full training"}.get(phase, "pretraining on added images")
        title = f"{arguments.backbone}, {what}{member.replace('_', ', ')}"
        drawn.add(f"{arguments.backbone}_{phase}{member}")
        return partial(
            figures.draw_training, arguments.graphics / f"{arguments.backbone}_{phase}{member}", metrics, title
        )

    with distributed.devices(arguments.distribute) as devices:
        if arguments.restart and devices.leads:
            checkpoints.remove(store, arguments.backbone)
        devices.wait()
        classification.warn_of_seen_masks(store, settings, roi)
        trained = classification.ClassifierTrainer(store, settings, devices, draw).train()
    if not devices.leads:
        return None
    for name in ("head_weights", "classifier_weights"):
        store.keep_members(name, list(trained.members), backbone=arguments.backbone)
    figures.remove_curves(arguments.graphics, arguments.backbone, drawn)
    ensemble = Ensemble(trained.classifiers, list(trained.members), arguments.views or augment.VIEWS)
    raw = classify.predict_splits(store, ensemble, arguments.batch_size, trained.out_of_fold)
    ensemble = replace(ensemble, calibration=classify.calibrate(store, raw))
    part = {
        "backbone": arguments.backbone,
        "weights": arguments.backbone,
        **asdict(ensemble.classifiers[0].preprocessing),
        "views": ensemble.views,
        "calibration": asdict(ensemble.calibration),
        "members": trained.members,
    }
    probabilities = {split: ensemble.combine(values) for split, values in raw.items()}
    return arguments.backbone, {"classes": CLASSES, "roi": roi, "parts": [part]}, probabilities


def load_pretrained(arguments: argparse.Namespace, store: Store, roi: str) -> Result:
    """Uses the networks in pretrained/; saves their weights, and in the settings which images they have seen.

    Raises:
        InputError: they were trained on another region of interest.
    """
    size = store.load("roi", split=store.splits()[0]).shape[1]
    blend, description = pretrained.load_classifier(size, arguments.views, arguments.backbone)
    if roi != description["roi"]:
        raise InputError(
            f"--pretrained: the networks were trained with --roi {description['roi']}, not {roi}: run {contract.ROI} "
            f"with --roi {description['roi']}"
        )
    store.settings |= dict.fromkeys(OF_TRAINING) | {"weights_sha256": description["sha256"]}
    for part, ensemble in zip(description["parts"], blend.parts, strict=True):
        part["weights"] = f"{contract.PRETRAINED}_{part['backbone']}"
        for member, network in zip(ensemble.members, ensemble.classifiers, strict=True):
            store.save_weights("classifier_weights", network.model, backbone=part["weights"], member=member)
        store.keep_members("classifier_weights", list(ensemble.members), backbone=part["weights"])
    description["seen"] = pretrained.find_seen(store, description.pop("training_ids"))
    return contract.PRETRAINED, description, classify.predict_blend(store, blend, arguments.batch_size)


def combine(arguments: argparse.Namespace, store: Store, roi: str) -> Result:
    """The mean of classifiers trained before."""
    store.settings |= dict.fromkeys((*OF_TRAINING, "backbone", "weights_sha256"))
    parts, probabilities = classify.combine(store, arguments.ensemble, arguments.views, arguments.batch_size)
    return contract.ENSEMBLE, {"classes": CLASSES, "roi": roi, "parts": parts}, probabilities


def main(arguments: argparse.Namespace) -> None:
    """Trains networks, loads the pretrained ones or combines classifiers; writes the probabilities of every split."""
    hardware.check()
    hardware.log_device()
    keras.config.set_dtype_policy(arguments.precision)
    work = load_pretrained if arguments.pretrained else combine if arguments.ensemble else train
    arguments.backbone = arguments.backbone or (contract.MAIN if work is train else None)
    store = Store(arguments.data, contract.CLASSIFIER, vars(arguments) | {"keras_backend": keras.backend.backend()})
    store.settings["weights_sha256"] = backbones.weights_fingerprint(arguments.weights)
    size = store.load("roi", split=store.splits()[0]).shape[1]
    roi = classify.roi_setting(store)
    if work is load_pretrained:
        flags.refuse(vars(arguments), build_parser(), OF_TRAINING, "--pretrained trains nothing")
    elif work is combine:
        idle = () if arguments.views else ("batch_size", "precision")
        flags.refuse(vars(arguments), build_parser(), ("backbone", *OF_TRAINING, *idle), "--ensemble trains nothing")
    if (result := work(arguments, store, roi)) is None:
        return
    name, description, probabilities = result
    store.save_json("classifier_settings", description | {"size": size}, backbone=name)
    store.remove("probabilities", split="train", backbone=name)  # of an earlier run
    for split, values in probabilities.items():
        store.save("probabilities", values, split=split, backbone=name)
    if work is train:
        checkpoints.remove(store, name)


if __name__ == "__main__":
    run.run(build_parser(), main)
