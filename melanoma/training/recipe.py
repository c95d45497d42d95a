"""How a classifier is trained, apart from its data and its network: the flags, and the same as settings."""

import argparse
from dataclasses import dataclass

from melanoma.classes import CLASSES
from melanoma.cli import flags
from melanoma.dataset import augment
from melanoma.models import backbones
from melanoma.training.callbacks import KEEP, LAST

PHASES = ("head", "full")  # the head on frozen features; then the whole network
EPOCHS = {"head": 60, "full": 15}
WARM_UP_EPOCHS = 10  # of the head, before full training
LEARNING_RATE = {"head": 1e-3, "full": 1e-4}
BALANCES = ("copies", "weights", "focal", "sampling", "none")  # how rare classes are balanced
BATCHNORM = {"auto": None, "frozen": False, "trained": True}


@dataclass(frozen=True)
class Recipe:
    """Settings of the training of a classifier, by the names of the flags."""

    train: str  # of PHASES: the last phase
    balance: str  # of BALANCES
    epochs: int | None  # of the last phase; None: EPOCHS
    learning_rate: float | None  # of the last phase; None: LEARNING_RATE
    first_rate: float  # see `loop.LayerwiseAdam`
    batch_size: int
    batchnorm: str  # of BATCHNORM
    ema: float
    keep: str  # of KEEP
    augmentation: str  # of augment.RANGES
    mixup: float  # see `batches.Batches.mix`
    label_smoothing: float
    pretrain: int  # epochs on the images of --extra alone, before the training of the folds
    extra_weight: float  # of the images of --extra in the training of the folds
    extra_classes: list[str]  # of CLASSES: whose images of --extra are used after --pretrain
    teacher: tuple[str, ...]  # names of classifiers whose probabilities are learnt, see `teacher.soft_labels`
    teacher_weight: float  # of these probabilities in the targets, the rest is the label


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Recipe` to a parser, but for those of `flags.training_flags`."""
    parser.add_argument(
        "--train",
        choices=PHASES,
        default="full",
        help="head: only the head, on a frozen backbone, as in 2018; full: first the head, then all weights with "
        "augmentation",
    )
    parser.add_argument(
        "--balance",
        choices=BALANCES,
        default=BALANCES[0],
        help="copies: train on the augmented copies of step 1 too; without them, weights: class weights in the loss; "
        "focal: focal loss; sampling: sample all classes equally often; none: do not balance the classes",
    )
    parser.add_argument(
        "--keep",
        choices=KEEP,
        default=LAST,
        help="whose weights are kept: of the last epoch, of that with the best mean AUC on validation, or of that with "
        "the lowest loss there",
    )
    parser.add_argument(
        "--first-rate",
        type=flags.positive_float,
        default=1.0,
        help="full training: learning rate of the first layer relative to that of the last",
    )
    parser.add_argument(
        "--batchnorm",
        choices=BATCHNORM,
        default="auto",
        help="full training: batch normalisation of the backbone; auto: trained if its initial weights are random",
    )
    parser.add_argument(
        "--augmentation", choices=augment.RANGES, default="standard", help="full training: random augmentation"
    )
    parser.add_argument(
        "--mixup",
        type=flags.not_negative,
        default=0.0,
        help="full training: mix pairs of images with weights from a Beta distribution of this parameter; 0: do not",
    )
    parser.add_argument(
        "--label-smoothing", type=flags.fraction, default=0.0, help="part of each target that all classes share equally"
    )
    flags.extra_flags(parser)
    parser.add_argument(
        "--extra-classes",
        choices=CLASSES,
        nargs="+",
        default=list(CLASSES),
        metavar="CLASS",
        help="after --pretrain, use only these classes of the images that step 1 added with --extra: "
        + ", ".join(CLASSES),
    )
    parser.add_argument(
        "--teacher",
        type=backbones.backbone_name,
        nargs="+",
        default=(),
        metavar="BACKBONE",
        help="knowledge distillation: learn the mean probabilities of these classifiers, trained before in the same "
        "folder with the same --folds",
    )
    parser.add_argument(
        "--teacher-weight",
        type=flags.fraction_or_one,
        default=1.0,
        help="weight of the teachers' probabilities in the targets; the rest is the label",
    )
