"""Predictions in the challenge's CSV format: `image_id,melanoma,seborrheic_keratosis`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from melanoma.artifacts.atomic import write_text
from melanoma.classes import CLASSES, NEVUS, TASKS
from melanoma.errors import InputError, list_first

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
        path: CSV file with a header, columns in any order, or without one, columns in the challenge's order. Rows in
            any order; ids with or without an extension such as .jpg.
        ids: image ids of each split.

    Returns:
        {split: float64 (N, 3)} in the order of `ids`, for each split of which the file names an image. Benign nevus is
        1 minus the other two columns and is negative if their sum exceeds 1.

    Raises:
        InputError: the file is not such a CSV, repeats an id, has an unknown id, lacks an id of a split, or has a value
            outside 0 to 1.
    """
    names, values = _parse(path)
    split_of_id = {name: split for split, members in ids.items() for name in members}
    problems: dict[str, np.ndarray] = {
        "listed more than once": names.duplicated().to_numpy(),
        "that are in no split of the data folder": ~names.isin(split_of_id).to_numpy(),
        "with a value outside 0 to 1": np.all((values >= 0) & (values <= 1), axis=1) == 0,  # true for NaN
    }
    for problem, wrong in problems.items():
        if wrong.any():
            raise InputError(f"{path} has ids {problem}: {list_first(names[wrong].unique().tolist())}")
    rows = dict(zip(names, values, strict=True))
    found = {}
    for split in dict.fromkeys(split_of_id[name] for name in names):
        if missing := [name for name in ids[split] if name not in rows]:
            raise InputError(f"{path} has no predictions for some ids of {split}: {list_first(missing)}")
        found[split] = np.empty((len(ids[split]), len(CLASSES)))
        found[split][:, list(TASKS)] = [rows[name] for name in ids[split]]
        found[split][:, NEVUS] = 1 - found[split][:, list(TASKS)].sum(axis=1)
    return found


def _parse(path: Path) -> tuple[pd.Series, np.ndarray]:
    """Image ids without extension, and values, float (N, 2), NaN where there is no number; errors as of `read`."""
    try:
        table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:  # parser errors and encoding errors of pandas are ValueErrors
        raise InputError(f"{path}: not a readable CSV file ({error})") from None
    table = table.apply(lambda column: column.str.strip())
    expected = [ID, *COLUMNS]
    header = table.iloc[0].str.lower().tolist()
    if ID in header:
        if missing := [name for name in expected if header.count(name) != 1]:
            raise InputError(f"{path} must have one column {', '.join(missing)}; it has {', '.join(header)}")
        table = table.iloc[1:].set_axis(header, axis=1)[expected]
    elif len(header) != len(expected):
        raise InputError(f"{path} has {len(header)} columns; expected {','.join(expected)}")
    if table.empty:
        raise InputError(f"{path} contains no predictions")
    names = table.iloc[:, 0].str.replace(r"\.(jpe?g|png)$", "", case=False, regex=True)
    return names, table.iloc[:, 1:].apply(pd.to_numeric, errors="coerce").to_numpy(float)
