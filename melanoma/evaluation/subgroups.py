"""Groups of images by the patient's sex and age."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from melanoma.errors import InputError, list_first
from melanoma.log import log
from melanoma.sources import csv_table

import numpy as np
import pandas as pd

POSSIBLE_AGES = (0, 120)  # years
AGES = (40, 60)  # years, where the second and third band start
AGE_BANDS = ("below 40 years", "40 to 59 years", "60 years and more")
ID, AGE = "image_id", "age_approximate"
COLUMNS = {ID: csv_table.ID_COLUMNS, AGE: (AGE, "age_approx", "age"), "sex": ("sex",)}  # and the names accepted
UNKNOWN_SEX, UNKNOWN_AGE = "sex unknown", "age unknown"


def read_metadata(paths: Sequence[Path], ids: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Reads the columns age_approximate (years, NaN if unknown) and sex, indexed by image id.

    Args:
        paths: CSV files with the columns image_id, age_approximate and sex, or other usual names of these (see
            `COLUMNS`), in the dialects of `csv_table.read`. Equal rows of an id count once.
        ids: image ids of each split; those of the files match them without regard to case.

    Returns:
        One row for each of `ids` that a file lists.

    Raises:
        InputError: a file is not such a CSV, an id has two different rows, or no id is in any split.
    """
    metadata = pd.concat([_read_file(path) for path in paths]).drop_duplicates()
    if repeated := metadata.loc[metadata["key"].duplicated(), "key"].tolist():
        raise InputError(f"--metadata: the files differ in age or sex of: {list_first(repeated)}")
    known = {name.casefold(): name for members in ids.values() for name in members}
    listed = len(metadata)
    metadata = metadata[metadata["key"].isin(known)]
    if len(metadata) not in (0, len(known)) or listed > len(metadata):
        log.info(
            "--metadata: %d of %d images are listed; %d other lines are ignored",
            *(len(metadata), len(known), listed - len(metadata)),
        )
    if metadata.empty:
        raise InputError("--metadata has no id of these images: the file must belong to the images of step 1")
    return metadata.set_index(metadata["key"].map(known)).drop(columns="key")


def _read_file(path: Path) -> pd.DataFrame:
    """Columns key (id in lower case), age_approximate and sex of one file; errors as of `read_metadata`."""
    table = csv_table.select(csv_table.read(path), COLUMNS)
    table = csv_table.drop_equal_rows(table, ID)
    ages, sexes = csv_table.numbers(table, AGE), table.columns["sex"].str.casefold()
    ages, sexes = ages.where(ages.between(*POSSIBLE_AGES)), sexes.replace({"f": "female", "m": "male"})
    for what, unknown in (
        ("ages", ages.isna() & (table.columns[AGE] != "")),
        ("sexes", ~sexes.isin(["female", "male", "", "unknown"])),
    ):
        if unknown.any():
            note = f"unreadable {what} taken as unknown: {unknown.sum()}"
            table = replace(table, assumptions=(*table.assumptions, note))
    csv_table.log_assumptions(table)
    key = csv_table.ids(table, ID).str.casefold()
    return pd.DataFrame({"key": key, AGE: ages, "sex": sexes})


def subgroups(metadata: pd.DataFrame, ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Rows of the images of each sex and each age band that occurs; unknown sex and age are groups too.

    Args:
        metadata: result of `read_metadata`.
        ids: image ids, one per row.

    Returns:
        {group: int (K,)}, indices into `ids`.
    """
    rows = metadata.reindex(list(ids))
    sex = rows["sex"].where(rows["sex"].isin(["female", "male"]), UNKNOWN_SEX)
    bands = pd.cut(rows["age_approximate"], [-np.inf, *AGES, np.inf], right=False, labels=list(AGE_BANDS))
    age = bands.cat.add_categories(UNKNOWN_AGE).fillna(UNKNOWN_AGE)
    groups: dict[str, np.ndarray] = {}
    for column, names in ((sex, ("female", "male", UNKNOWN_SEX)), (age, (*AGE_BANDS, UNKNOWN_AGE))):
        groups |= {name: found for name in names if len(found := np.flatnonzero(column == name))}
    return groups
