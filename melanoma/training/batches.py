"""Batches of images and targets for training: order, augmentation and weights of the rows."""

import math
import os
import sys
import threading
from dataclasses import dataclass

from melanoma.dataset import augment

import joblib
import keras
import numpy as np

THREADS = joblib.cpu_count()  # prepare batches; OpenCV releases Python's interpreter lock
NICENESS = 10  # of these threads, at least


def lower_priority() -> None:
    """Lowers the priority of the calling thread on Linux, unless it is the main thread.

    A training step on a CPU waits for its slowest thread, so augmentation must not take a core from it.
    """
    if sys.platform == "linux" and threading.current_thread() is not threading.main_thread():
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


@dataclass(frozen=True)
class BatchOptions:
    """Which rows a `Batches` gives, in which order, and how they are augmented and weighted."""

    rows: np.ndarray | None = None  # int, the rows to use; None: all
    seed: int | None = None  # of order and augmentation; None: rows in order, no augmentation
    augmentation: augment.Ranges | None = None  # how images are augmented at random; needs a seed
    mixup: float = 0.0  # parameter of the Beta distribution that mixes pairs of rows, see `Batches.mix`; 0: none
    target_is_mask: bool = False  # whether targets are masks, augmented with the same geometry
    sampling_weights: np.ndarray | None = None  # float (N,): rows are drawn with replacement; None: each row once
    loss_weights: np.ndarray | None = None  # float (N,): weight of each row's loss; None: equal weights
    length: int | None = None  # rows per epoch, with `sampling_weights`; None: as many as there are


class Batches(keras.utils.PyDataset):
    """Batches of rows and their targets, in a new random order each epoch when a seed is given.

    How a row is augmented depends on seed, epoch, row and, where rows are drawn with replacement, its place in the
    order. It does not depend on threads or batch size.
    """

    def __init__(
        self, inputs: np.ndarray, targets: np.ndarray, batch_size: int, options: BatchOptions | None = None
    ) -> None:
        """Sets up the batches.

        Args:
            inputs: (N, ...), memory-mapped or not.
            targets: (N, ...).
            batch_size: rows per batch; the last batch may be smaller.
            options: see `BatchOptions`; None: its defaults.
        """
        self.options = options or BatchOptions()
        # With one worker Keras leaves the threads to tf.data, whose tuning blocks at the end of an epoch, for seconds.
        workers = 1 if inputs.ndim == 2 else max(2, THREADS)
        super().__init__(workers=workers, use_multiprocessing=False, max_queue_size=2 * workers)
        self.inputs, self.targets, self.batch_size = inputs, targets, batch_size
        self.rows = np.arange(len(inputs)) if self.options.rows is None else self.options.rows
        self.length = self.options.length or len(self.rows)
        self.epoch = -1
        self.on_epoch_end()

    def on_epoch_end(self) -> None:
        """Draws the order of the next epoch."""
        self.epoch += 1
        self.order = self.rows.copy()
        if self.options.seed is None:
            return
        rng = np.random.default_rng([self.options.seed, self.epoch])
        if self.options.sampling_weights is None:
            rng.shuffle(self.order)
        else:
            weights = self.options.sampling_weights[self.rows]
            self.order = rng.choice(self.rows, self.length, p=weights / weights.sum())

    def skip(self, epochs: int) -> None:
        """Continues with the order and augmentation of a later epoch."""
        if epochs:
            self.epoch += epochs - 1
            self.on_epoch_end()

    def __len__(self) -> int:
        """Batches per epoch."""
        return math.ceil(self.length / self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        """One batch: inputs, targets, and loss weights where there are any."""
        first = index * self.batch_size
        return self.part(np.arange(first, min(first + self.batch_size, len(self.order))))

    def part(self, places: np.ndarray) -> tuple[np.ndarray, ...]:
        """The same for the rows at places of the epoch's order, int (N,)."""
        rows, options = self.order[places], self.options
        inputs, targets = np.array(self.inputs[rows]), np.array(self.targets[rows])
        weights = None if options.loss_weights is None else options.loss_weights[rows]
        if options.augmentation or options.mixup:
            lower_priority()
            for place, row in enumerate(rows):
                # A row drawn twice in an epoch must look different; a row that comes once, the same at any batch size.
                drawn_place = [] if options.sampling_weights is None else [places[place]]
                rng = np.random.default_rng([options.seed, self.epoch, row, *drawn_place])
                inputs[place], augmented_mask = self.augmented(inputs[place], targets[place], rng)
                if augmented_mask is not None:
                    targets[place] = augmented_mask
                if options.mixup:
                    inputs[place], targets[place] = self.mix(inputs[place], targets[place], rng)
        return (inputs, targets) if weights is None else (inputs, targets, weights)

    def augmented(self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> augment.ImageAndMask:
        """An image, augmented, with its mask if targets are masks."""
        if not self.options.augmentation:
            return image, None
        return augment.augment(image, rng, target if self.options.target_is_mask else None, self.options.augmentation)

    def mix(self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Mixup: a weighted mean with another row of the epoch, of images as of targets.

        Source: Zhang et al. 2018, arXiv 1710.09412.
        """
        other = self.order[rng.integers(len(self.order))]
        fraction = np.float32(rng.beta(self.options.mixup, self.options.mixup))
        second, _ = self.augmented(np.array(self.inputs[other]), self.targets[other], rng)
        mixed = fraction * image + (1 - fraction) * second
        return mixed.round().astype(image.dtype), fraction * target + (1 - fraction) * self.targets[other]


class PaddedBatches(keras.utils.PyDataset):
    """One process's part of each batch, with weights; a last batch that the devices cannot divide is padded.

    Padding repeats rows of the batch with weight 0. The weights of the others make up for it, because Keras divides by
    the number of all rows: in training those of each batch, so that its gradient is that of the rows without padding;
    in validation those of the epoch, so that its loss is. Only batch normalisation sees the padding: some rows of a
    padded batch count once more in its statistics.
    """

    def __init__(
        self, batches: Batches, devices: int, process: int = 0, processes: int = 1, for_training: bool = True
    ) -> None:
        """Sets up the batches.

        Args:
            batches: of all devices together; their size must be a multiple of the number of devices.
            devices: of all processes together; each gets as many rows.
            process: index of this process, from 0.
            processes: number of processes.
            for_training: whether for training or validation.
        """
        super().__init__(batches.workers, use_multiprocessing=False, max_queue_size=batches.max_queue_size)
        self.batches, self.devices, self.process, self.processes = batches, devices, process, processes
        self.for_training = for_training

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.batches)

    def on_epoch_end(self) -> None:
        """Draws the order of the next epoch."""
        self.batches.on_epoch_end()

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        """This process's part of a batch: inputs, targets, weights."""
        first = index * self.batches.batch_size
        rows = min(self.batches.batch_size, self.batches.length - first)
        padded = np.arange(rows + -rows % self.devices)
        part = np.array_split(padded, self.processes)[self.process]
        inputs, targets, *weights = self.batches.part(first + part % rows)
        counted = rows if self.for_training else self.batches.length
        weight = np.where(part < rows, 1 + -counted % self.devices / counted, 0)
        return inputs, targets, (weight * weights[0] if weights else weight).astype(np.float32)
