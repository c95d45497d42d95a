"""Division of training rows for cross-validation: a photograph and its copies always stay together."""

from collections.abc import Sequence

from melanoma.augment import original

import numpy as np


def assign(ids: Sequence[str], count: int, seed: int) -> np.ndarray:
    """The fold of each row, int (N,), 0 to count - 1; folds differ by one photograph at most.

    Args:
        ids: of the rows, copies among them.
        count: how many folds.
        seed: decides who goes where.

    Raises:
        ValueError: there are fewer photographs than folds.
    """
    photographs, family = np.unique([original(name) for name in ids], return_inverse=True)
    if len(photographs) < count:
        raise ValueError(f"{len(photographs)} photographs make no {count} folds")
    return (np.random.default_rng(seed).permutation(len(photographs)) % count)[family]
