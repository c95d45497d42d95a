"""Groups of images by the patient's sex and age."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from melanoma.errors import InputError, list_first

import numpy as np
import pandas as pd

AGES = (40, 60)  # years, where the second and third band start
AGE_BANDS = ("below 40 years", "40 to 59 years", "60 years and more")
UNKNOWN_SEX, UNKNOWN_AGE = "sex unknown", "age unknown"


def read_metadata(paths: Sequence[Path], ids: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Reads the columns age_approximate (years, NaN if unknown) and sex, indexed by image id.

    Args:
        paths: CSV files with the columns image_id, age_approximate and sex, as published with the challenge.
        ids: image ids of each split.

    Raises:
        InputError: a file is not such a CSV, an id occurs more than once, or no id is in any split.
    """
    columns = ["image_id", "age_approximate", "sex"]
    tables = []
    for path in paths:
        try:
            table = pd.read_csv(path, dtype=str)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable CSV file ({error})") from None
        if missing := sorted(set(columns) - set(table.columns)):
            raise InputError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table.columns)}")
        tables.append(table[columns])
    metadata = pd.concat(tables).dropna(subset="image_id").set_index("image_id")
    if duplicates := metadata.index[metadata.index.duplicated()].tolist():
        raise InputError(f"--metadata: ids occur more than once: {list_first(duplicates)}")
    metadata["age_approximate"] = pd.to_numeric(metadata["age_approximate"], errors="coerce")
    if not metadata.index.isin([image_id for members in ids.values() for image_id in members]).any():
        raise InputError("--metadata has no id of these images; ids must have no extension such as .jpg")
    return metadata


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
