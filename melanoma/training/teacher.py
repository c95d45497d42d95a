"""Soft labels for knowledge distillation: a network learns from the probabilities of networks trained before.

Source: Hinton et al. 2015, arXiv 1503.02531.
"""

from collections.abc import Sequence

from melanoma.artifacts.store import Store
from melanoma.dataset.splits import Member, fold_name
from melanoma.errors import InputError
from melanoma.inference import ensemble
from melanoma.inference.predict import predict

import numpy as np


def check(store: Store, teachers: Sequence[str], folds: int, seed: int, student: str) -> None:
    """Refuses teachers that have seen the images on which the student is evaluated.

    Args:
        store: data folder with the teachers' weights.
        teachers: names of classifiers.
        folds: of the student's cross-validation.
        seed: of the student's folds.
        student: its name.

    Raises:
        InputError: a teacher has other folds, or the name of the student.
        StageError: a teacher is missing or stale.
    """
    for name in teachers:
        if name == student:
            raise InputError(f"--teacher {name}: a network cannot be its own teacher")
        store.check("classifier_settings", backbone=name)
        used = store.written_with("classifier_settings", backbone=name)
        found = {"folds": used["folds"], "seed": used["seed"]}
        if folds > 1 and found != {"folds": folds, "seed": seed}:
            raise InputError(
                f"--teacher {name} was trained with --folds {found['folds']} --seed {found['seed']}: use the same, so "
                "that it has not seen the images that are held out here"
            )


def soft_labels(store: Store, teachers: Sequence[str], member: Member, rows: int, batch_size: int) -> np.ndarray:
    """Mean calibrated probabilities of the teachers' networks for the first rows of train.

    Args:
        store: data folder.
        teachers: names of classifiers, see `check`.
        member: whose soft labels; with cross-validation only networks that were trained without its fold are asked.
        rows: number of rows N.
        batch_size: images per network call.

    Returns:
        float32 (N, 3), rows sum to 1.
    """
    images, means = store.load("roi", split="train")[:rows], []
    for name in teachers:
        (teacher,) = ensemble.load(store, name)[0].parts
        for fold, models in teacher.folds().items():
            if member.fold < 0 or fold == fold_name(member.fold):
                blocks = predict(models, images, batch_size, f"soft labels by {name}{fold.replace('_', ', ')}")
                means.append(teacher.calibration.apply(np.concatenate(list(blocks))))
    return np.mean(means, axis=0)
