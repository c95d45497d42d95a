"""Predictions in the challenge's CSV format: `image_id,melanoma,seborrheic_keratosis`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from melanoma.artifacts.atomic import write_text
from melanoma.classes import CLASSES, NEVUS, TASKS
from melanoma.errors import InputError, list_first
from melanoma.sources import csv_table

import numpy as np
import pandas as pd

FILE, FILE_OF_OTHER = "predictions_{split}.csv", "predictions_{split}_{name}.csv"
ID = "image_id"
COLUMNS = tuple(CLASSES[index].replace(" ", "_") for index in TASKS)
DIGITS = 9  # enough to distinguish any two float32 values


def write(path: Path, ids: Sequence[str], probabilities: np.ndarray) -> None:
    """Writes probabilities, float (N, 3), with a header; benign nevus is 1 minus the other two and has no column."""
    table = pd.DataFrame(probabilities[:, list(TASKS)], columns=COLUMNS)
    table.insert(0, ID, list(ids))
    write_text(path, table.to_csv(index=False, float_format=f"%.{DIGITS}g"))


def read(path: Path, ids: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """Reads a system's probabilities for every split that its file covers.

    Args:
        path: CSV file with a header, columns in any order, or without one, columns in the challenge's order; in the
            dialects of `csv_table.read`. Rows in any order; ids in any case, with or without an extension such as .jpg.
            Equal rows of an id count once.
        ids: image ids of each split.

    Returns:
        {split: float64 (N, 3)} in the order of `ids`, for each split of which the file names an image. Benign nevus is
        1 minus the other two columns and is negative if their sum exceeds 1.

    Raises:
        InputError: the file is not such a CSV, has two different rows of an id, has an unknown id, lacks an id of a
            split, or has a value outside 0 to 1.
    """
    table = csv_table.name_columns(csv_table.read(path), (ID, *COLUMNS))
    table = csv_table.select(table, {ID: csv_table.ID_COLUMNS, **{name: (name,) for name in COLUMNS}})
    if table.columns.empty:
        raise InputError(f"{path} contains no predictions")
    table = csv_table.drop_equal_rows(table, ID)
    csv_table.log_assumptions(table)
    names = csv_table.ids(table, ID)
    values = np.stack([csv_table.numbers(table, name, strict=True) for name in COLUMNS], axis=1)
    split_of_id = {name.casefold(): split for split, members in ids.items() for name in members}
    keys = names.str.casefold()
    problems: dict[str, np.ndarray] = {
        "that are in no split of the data folder": ~keys.isin(split_of_id).to_numpy(),
        "with a value outside 0 to 1": np.all((values >= 0) & (values <= 1), axis=1) == 0,  # true for NaN
    }
    for problem, wrong in problems.items():
        if wrong.any():
            raise InputError(f"{path} has ids {problem}: {list_first(names[wrong].unique().tolist())}")
    rows = dict(zip(keys, values, strict=True))
    found = {}
    for split in dict.fromkeys(split_of_id[key] for key in keys):
        if missing := [name for name in ids[split] if name.casefold() not in rows]:
            raise InputError(f"{path} has no predictions for some ids of {split}: {list_first(missing)}")
        found[split] = np.empty((len(ids[split]), len(CLASSES)))
        found[split][:, list(TASKS)] = [rows[name.casefold()] for name in ids[split]]
        found[split][:, NEVUS] = 1 - found[split][:, list(TASKS)].sum(axis=1)
    return found
