"""Predictions of any system as the challenge has them: a CSV of `image_id,melanoma,seborrheic_keratosis`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from melanoma import isic, stages
from melanoma.errors import InputError

import numpy as np
import pandas as pd

ID = "image_id"
COLUMNS = tuple(isic.CLASSES[index].replace(" ", "_") for index in isic.RANKED)
DIGITS = 9  # that tell any two float32 apart


def write(path: Path, ids: Sequence[str], probabilities: np.ndarray) -> None:
    """Writes probabilities, float (N, 3), with a header; what a line leaves to 1 is benign nevus."""
    table = pd.DataFrame(probabilities[:, list(isic.RANKED)], columns=COLUMNS)
    table.insert(0, ID, list(ids))
    stages.write_text(path, table.to_csv(index=False, float_format=f"%.{DIGITS}g"))


def read(path: Path, ids: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """The probabilities that a system gives for the splits that its file is about.

    Args:
        path: CSV, with a header, whose order of columns then counts, or without; ids with or without a suffix such as
            .jpg; in any order.
        ids: of the images of each split.

    Returns:
        For each split of which the file names an image, float64 (N, 3) in the order of `ids`. Benign nevus has what
        the other two leave to 1; less than nothing where both are high.

    Raises:
        InputError: it is no such CSV, names an id twice or an unknown one, lacks one of a split, or gives a value that
            is not from 0 to 1.
    """
    try:
        table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:  # pandas' parser errors and bad encodings are ValueErrors
        raise InputError(f"{path}: no readable CSV ({error})") from None
    table = table.apply(lambda column: column.str.strip())
    expected = [ID, *COLUMNS]
    header = table.iloc[0].str.lower().tolist()
    if ID in header:
        if missing := [name for name in expected if header.count(name) != 1]:
            raise InputError(f"{path}: no single column {', '.join(missing)}; it has {', '.join(header)}")
        table = table.iloc[1:].set_axis(header, axis=1)[expected]
    elif len(header) != len(expected):
        raise InputError(f"{path} has {len(header)} columns; expected {','.join(expected)}")
    if table.empty:
        raise InputError(f"{path} names no image")
    names = table.iloc[:, 0].str.replace(r"\.(jpe?g|png)$", "", case=False, regex=True)
    values = table.iloc[:, 1:].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    known = {name: split for split, members in ids.items() for name in members}
    for problem, wrong in (
        ("more than once", names.duplicated().to_numpy()),
        ("but are in no split here", ~names.isin(known).to_numpy()),
        ("with a value that is not from 0 to 1", ~((values >= 0) & (values <= 1)).all(axis=1)),
    ):
        if wrong.any():
            raise InputError(f"{path} has ids {problem}: {isic.first_ids(names[wrong].unique().tolist())}")
    rows = dict(zip(names, values, strict=True))
    found = {}
    for split in dict.fromkeys(known[name] for name in names):
        if lacking := [name for name in ids[split] if name not in rows]:
            raise InputError(f"{path} lacks ids of {split}: {isic.first_ids(lacking)}")
        found[split] = np.empty((len(ids[split]), len(isic.CLASSES)))
        found[split][:, list(isic.RANKED)] = [rows[name] for name in ids[split]]
        found[split][:, isic.NEVUS] = 1 - found[split][:, list(isic.RANKED)].sum(axis=1)
    return found
