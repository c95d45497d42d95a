"""Which epoch's weights to keep: mean AUC of a cross-validation for each rule, from the same training runs.

Takes the flags of the fourth script, with --folds; --train, --keep, --ema and --seeds do not count here. Predicts the
held-out images of each fold after every epoch, without test-time augmentation, by the weights and by their EMA.

Reads   --data, a folder in which steps 1 to 3 have run
Writes  --data/selection.npz    probabilities of all epochs
        features and weights        as step 4 does: use a copy of --data to keep those of a trained classifier
Prints  mean AUC of each rule, and its paired difference from the last epoch

Run     python -m benchmarks.selection --data data --folds 3 --backbone mobilenet_v2
Try     python -m benchmarks.selection --data data --folds 2 --epochs 2 --limit 30 --backbone mobilenet --weights none
"""

import argparse
from dataclasses import dataclass, field

import densenet_train
from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.cli import hardware
from melanoma.dataset.splits import UNLABELLED, Member, base_rows, load_labels
from melanoma.metrics import bootstrap
from melanoma.models import backbones
from melanoma.training import checkpoints, distributed, recipe
from melanoma.training.callbacks import BEST, LAST, LOWEST_LOSS
from melanoma.training.classification import ClassifierSettings, ClassifierTrainer, TrainingData

import keras
import numpy as np

EMA = 0.99
FILE = "selection.npz"
VETO = "best, or the head if its AUC is higher"
AVERAGE = f"last, weight EMA {EMA}"
RULES = (LAST, AVERAGE, LOWEST_LOSS, BEST, VETO)


@dataclass
class Epochs:
    """What is known of every epoch of a training run."""

    auc: list[float] = field(default_factory=list)  # on validation
    loss: list[float] = field(default_factory=list)  # on validation
    probabilities: list[np.ndarray] = field(default_factory=list)  # of held-out images, each (N, 3)
    average: list[np.ndarray] = field(default_factory=list)  # the same by the weight EMA


class EpochsCallback(keras.callbacks.Callback):
    """Records `Epochs` of held-out images."""

    def __init__(self, held_out: np.ndarray, epochs: Epochs) -> None:
        """Sets the inputs of the held-out images, (N, ...), and what to append to."""
        super().__init__()
        self.held_out, self.epochs = held_out, epochs

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Starts the EMA."""
        self.average = self.model.get_weights()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Updates the EMA."""
        for old, new in zip(self.average, self.model.get_weights(), strict=True):
            old += (1 - EMA) * (new - old)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Predicts the held-out images."""
        assert logs is not None
        self.epochs.auc.append(float(logs["val_auc"]))
        self.epochs.loss.append(float(logs["val_loss"]))
        self.epochs.probabilities.append(self._predict())
        weights = self.model.get_weights()
        self.model.set_weights(self.average)
        self.epochs.average.append(self._predict())
        self.model.set_weights(weights)

    def _predict(self) -> np.ndarray:
        size = 64
        parts = np.array_split(self.held_out, max(1, len(self.held_out) // size))
        return np.concatenate([np.asarray(self.model.predict_on_batch(part)) for part in parts])


def choose(rule: str, head: Epochs, full: Epochs) -> tuple[np.ndarray, int]:
    """Probabilities by the weights that a rule keeps, and their epoch; 0: the head's."""
    last = len(full.auc) - 1
    if rule in (LAST, AVERAGE):
        return (full.average if rule == AVERAGE else full.probabilities)[last], last + 1
    best = int(np.argmin(full.loss) if rule == LOWEST_LOSS else np.argmax(full.auc))
    if rule == VETO and max(head.auc) > full.auc[best]:
        return head.probabilities[int(np.argmax(head.auc))], 0
    return full.probabilities[best], best + 1


def train(arguments: argparse.Namespace) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, list[int]]]]:
    """Labels of the labelled images, int (N,); of each rule their probabilities, (N, 3), and the folds' epochs."""
    fingerprints = {"weights_sha256": backbones.weights_fingerprint(arguments.weights)}
    store = Store(
        arguments.data, contract.CLASSIFIER, vars(arguments) | fingerprints | {"keras_backend": keras.backend.backend()}
    )
    settings = ClassifierSettings.from_flags(vars(arguments))
    rows, labels = base_rows(store, "train"), load_labels(store, "train")
    rows = rows[labels[rows] != UNLABELLED]
    found: dict[tuple[str, int], Epochs] = {}
    held_out: dict[int, np.ndarray] = {}

    def watch(phase: str, member: Member, network: keras.Model, data: TrainingData) -> list[keras.callbacks.Callback]:
        if member.fold < 0:
            return []
        held_out[member.fold] = np.setdiff1d(rows, data.rows)
        epochs = found[phase, member.fold] = Epochs()
        return [EpochsCallback(data.inputs["train"][held_out[member.fold]], epochs)]

    checkpoints.remove(store, arguments.backbone)  # the epochs of a finished run are not watched
    trainer = ClassifierTrainer(store, settings, distributed.ONE, lambda phase, member: lambda *_: None, watch)
    trainer.train()
    chosen: dict[str, tuple[np.ndarray, list[int]]] = {}
    for rule in RULES:
        probabilities, kept = np.zeros((len(labels), 3), np.float32), []
        for fold, places in held_out.items():
            probabilities[places], epoch = choose(rule, found["head", fold], found["full", fold])
            kept.append(epoch)
        chosen[rule] = probabilities[rows], kept
    everything = {
        f"{phase}_{fold}_{name}": values for (phase, fold), one in found.items() for name, values in vars(one).items()
    }
    np.savez(
        arguments.data / FILE,
        allow_pickle=False,
        **everything | {f"held_out_{fold}": one for fold, one in held_out.items()},
    )
    return labels[rows], chosen


def main() -> None:
    """Trains once, then compares the rules."""
    parser = densenet_train.build_parser()
    parser.set_defaults(backbone=contract.MAIN)
    arguments = parser.parse_args()
    if arguments.folds == 1 or arguments.pretrained or arguments.ensemble:
        parser.error("this benchmark trains a cross-validation: use --folds 2 or more")
    arguments.train, arguments.keep, arguments.ema, arguments.seeds = recipe.PHASES[-1], LAST, 0.0, 1
    hardware.log_device()
    labels, chosen = train(arguments)
    reference = chosen[LAST][0]
    for rule, (probabilities, kept) in chosen.items():
        print(f"{rule}; epochs {', '.join(map(str, kept))}")
        for name, one in bootstrap.paired_differences(labels, reference, probabilities, arguments.seed).items():
            low, high = one.interval
            print(
                f"  {name:26}{one.second:.3f}, minus the last {one.difference:+.3f} ({low:+.3f} to {high:+.3f}), "
                f"p = {one.p_value:.3f}"
            )


if __name__ == "__main__":
    main()
