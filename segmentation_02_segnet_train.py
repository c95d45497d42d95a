"""Step 2 of 5: train a network to segment the lesion, then predict its mask in every image.

Reads   data/arrays/{train,val,test}_{ids,images,masks}.npy   from step 1
        data/arrays/{train,val,test}_{has_mask,source}.npy    from step 1
        data/arrays/{train,val,test}_{groups,labels}.npy      from step 1
        pretrained/segnet{member}.weights.h5, segnet.json     with --pretrained
Writes  data/weights/segnet{member}.weights.h5                weights of the network, of each fold and seed
        data/weights/segnet.json                              network design, threshold, training history
        data/arrays/{train,val,test}_predicted.npy            uint8 (N, S, S, 1), {0, 1}
        data/checkpoints/                                     states of interrupted training, until the script ends
        graphics/segnet{member}_curves.png                    training curves of each fold
        graphics/segnet{member}_history.csv                   their values
        graphics/segnet_overlays.png                          worst, median and best validation masks
        graphics/segnet_jaccard.png                           Jaccard index by lesion size and by class
        graphics/segmentation.json                            the challenge's metrics of the splits that have masks

Run     python segmentation_02_segnet_train.py
Try     python segmentation_02_segnet_train.py --network segnet --epochs 1 --limit 30
Expect  docs/results.md
"""

import argparse
from functools import partial
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.atomic import write_json
from melanoma.artifacts.store import Store
from melanoma.cli import flags, hardware, run
from melanoma.dataset import augment
from melanoma.evaluation import figures
from melanoma.evaluation import segmentation as evaluation
from melanoma.evaluation.report import SEGMENTATION_FILE
from melanoma.inference import pretrained, segment
from melanoma.inference.predict import views_flag
from melanoma.models import backbones, losses, segmentation
from melanoma.training import checkpoints, distributed
from melanoma.training.callbacks import KEEP, LAST, Draw
from melanoma.training.segmentation import NAME, SegmentationSettings, SegmentationTrainer, TrainedNetworks

import keras

NETWORK = "unet"
BACKBONE = "mobilenetv2"
INPUT_SIZE = 192  # pixels
EPOCHS = 14
BATCH_SIZE = 16
LEARNING_RATE = 1e-3
EMA = 0.99
LOSS = "dice_cross_entropy"
# Flags that have no effect with --pretrained.
OF_TRAINING = (
    *("network", "input_size", "backbone", "weights", "scaling", "loss", "folds"),
    *("seeds", "keep", "augmentation", "pretrain", "extra_weight"),
    *("epochs", "learning_rate", "ema", "restart", "continued", "distribute"),
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = flags.base_parser(__doc__)
    parser.add_argument(
        "--network", choices=segmentation.NETWORKS, default=NETWORK, help="architecture; segnet has no backbone"
    )
    backbones.add_flags(parser, BACKBONE, "; for unet only")
    parser.add_argument(
        "--input-size",
        type=flags.positive_int,
        default=INPUT_SIZE,
        help="side of the network's input in pixels; masks keep the size of the arrays",
    )
    parser.add_argument("--loss", choices=losses.LOSSES, default=LOSS, help="loss function, computed per image")
    flags.training_flags(parser, EPOCHS, BATCH_SIZE, LEARNING_RATE, EMA)
    parser.add_argument(
        "--folds",
        type=flags.positive_int,
        default=1,
        help="train one network per fold, without the images of that fold; train gets out-of-fold masks, the other "
        "splits the mean of all networks",
    )
    parser.add_argument("--seeds", type=flags.positive_int, default=1, help="networks per fold, from --seed upwards")
    parser.add_argument(
        "--keep",
        choices=KEEP,
        default=LAST,
        help="whose weights are kept: of the last epoch, of that with the best mean Jaccard index on validation, or of "
        "that with the lowest loss there",
    )
    parser.add_argument("--augmentation", choices=augment.RANGES, default="standard", help="random augmentation")
    flags.extra_flags(parser)
    parser.add_argument("--pretrained", action="store_true", help="use the networks in pretrained/ instead of training")
    views_flag(parser)
    parser.add_argument(
        "--clean",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep only the largest component and fill its holes",
    )
    parser.add_argument(
        "--threshold",
        type=flags.open_fraction,
        help="pixels of this probability or more are lesion; default: chosen on validation, or that of the pretrained "
        "network",
    )
    return parser


def train(arguments: argparse.Namespace, store: Store) -> TrainedNetworks | None:
    """Trains the networks; None in a process of distributed training that does not lead."""
    settings = flags.to_dataclass(SegmentationSettings, vars(arguments))
    metrics = {"loss": f"{arguments.loss.replace('_', ' ')} loss", "jaccard": "mean Jaccard index"}

    def draw(name: str) -> Draw:
        title = arguments.network + name.removeprefix(NAME).replace("_", ", ")
        return partial(figures.draw_training, arguments.graphics / name, metrics, title)

    with distributed.devices(arguments.distribute) as devices:
        if arguments.restart and devices.leads:
            checkpoints.remove(store, NAME)
        devices.wait()
        trained = SegmentationTrainer(store, settings, devices, draw).train()
    if not devices.leads:
        return None
    for removed in store.keep_members("segnet_weights", trained.members):
        figures.remove_curves(arguments.graphics, f"{NAME}{removed}")
    return trained


def load_pretrained(store: Store) -> tuple[list[keras.Model], dict[str, Any]]:
    """The networks in pretrained/, and for the report their settings and the images they were trained on."""
    models, description = pretrained.load_segnet(store.load("images", split=store.splits()[0]).shape[1])
    store.settings["weights_sha256"] = description["sha256"]
    report = {name: description[name] for name in ("design", "threshold", "views")}
    return models, report | {"seen": pretrained.find_seen(store, description["training_ids"])}


def main(arguments: argparse.Namespace) -> None:
    """Trains, or loads the pretrained networks; predicts every split and evaluates those that have masks."""
    hardware.check()
    hardware.log_device()
    keras.config.set_dtype_policy(arguments.precision)
    fingerprints = {
        "weights_sha256": backbones.weights_fingerprint(arguments.weights),
        "keras_backend": keras.backend.backend(),
    }
    store = Store(arguments.data, contract.SEGNET, vars(arguments) | fingerprints)
    store.splits()  # without images, name the first script
    out_of_fold = None
    if arguments.pretrained:
        flags.refuse(vars(arguments), build_parser(), OF_TRAINING, "--pretrained trains nothing")
        models, report = load_pretrained(store)
    else:
        trained = train(arguments, store)
        if trained is None:
            return
        models, out_of_fold, report = trained.models, trained.out_of_fold, trained.report
    views = arguments.views or report.get("views", augment.VIEWS)
    options = segment.MaskOptions(views, arguments.clean, arguments.batch_size)
    if not arguments.pretrained:
        threshold, effects = segment.choose_threshold(store, models, options)
        report |= {"threshold": threshold, **effects}
    report |= {"views": views, "clean": arguments.clean, "threshold": arguments.threshold or report["threshold"]}
    if not arguments.pretrained:
        store.save_json("segnet_settings", report)
    segment.write_masks(store, segment.Segmenter(models, report["threshold"], options), out_of_fold)
    seen = report.get("seen", {})
    report |= {
        "splits": evaluation.evaluate(store, out_of_fold is not None, seen, arguments.graphics, arguments.seed),
        "own_size": evaluation.evaluate_at_own_size(store, seen, arguments.seed),
    }
    report |= {"peak_memory_gib": hardware.peak_memory()}
    write_json(arguments.graphics / SEGMENTATION_FILE, report | store.provenance())
    store.record_graphics(arguments.graphics / SEGMENTATION_FILE)
    if not arguments.pretrained:
        checkpoints.remove(store, NAME)


if __name__ == "__main__":
    run.run(build_parser(), main)
