"""Several networks in place of one: which photographs each leaves out, and the seed that it starts from."""

from collections.abc import Sequence
from dataclasses import dataclass

from melanoma.augment import original
from melanoma.errors import InputError

import numpy as np


@dataclass(frozen=True)
class Member:
    """One of the networks that answer together."""

    name: str  # what tells its files apart, e.g. _fold1_seed2; nothing where it is alone
    fold: int  # which it does not train on; -1: it trains on all
    seed: int


def members(folds: int, seeds: int, seed: int) -> list[Member]:
    """The networks of a cross-validation: `seeds` of them for each of the folds, from `seed` up."""
    return [
        Member(
            (f"_fold{fold + 1}" if folds > 1 else "") + (f"_seed{number}" if seeds > 1 else ""),
            fold if folds > 1 else -1,
            number,
        )
        for fold in range(folds)
        for number in range(seed, seed + seeds)
    ]


def photograph_of(ids: Sequence[str]) -> np.ndarray:
    """The row of the photograph that each row shows, int (N,)."""
    place = {name: row for row, name in enumerate(ids)}
    return np.array([place[original(name)] for name in ids])


def is_photograph(row_id: str) -> bool:
    """Whether a row is a photograph, and no augmented copy of one."""
    return original(row_id) == row_id


def photographs(ids: Sequence[str]) -> np.ndarray:
    """`is_photograph` of each row, bool (N,)."""
    return np.array([is_photograph(name) for name in ids], bool)


def own(members: Sequence[Member], fold_of_row: np.ndarray) -> np.ndarray | None:
    """Which networks have not seen each row, bool (N, number of networks); None where all have seen all."""
    left_out = np.array([member.fold for member in members])
    return fold_of_row[:, None] == left_out if (left_out >= 0).all() else None


def assign(ids: Sequence[str], count: int, seed: int) -> np.ndarray:
    """The fold of each row, int (N,), 0 to count - 1; a photograph and its copies stay together.

    Args:
        ids: of the rows, copies among them.
        count: how many folds; they differ by one photograph at most.
        seed: decides who goes where.

    Raises:
        InputError: there are fewer photographs than folds.
    """
    photographs, family = np.unique([original(name) for name in ids], return_inverse=True)
    if len(photographs) < count:
        raise InputError(f"--folds: {len(photographs)} photographs make no {count} folds")
    return (np.random.default_rng(seed).permutation(len(photographs)) % count)[family]
