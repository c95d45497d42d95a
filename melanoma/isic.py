"""The official ISIC 2017 layout on disk, read into records; the ways to divide them into splits.

A source folder holds, for each of Training, Validation and Test_v2, whatever of these there is:

    ISIC-2017_<Name>_Data/ISIC_nnnnnnn.jpg                              photographs (superpixel PNGs are no photographs)
    ISIC-2017_<Name>_Part1_GroundTruth/ISIC_nnnnnnn_segmentation.png    lesion masks, 0 or 255
    ISIC-2017_<Name>_Part3_GroundTruth.csv                              image_id,melanoma,seborrheic_keratosis

Source: Codella et al. 2018, arXiv 1710.05006.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from melanoma.errors import InputError

import numpy as np
import pandas as pd

CLASSES = ("benign nevus", "melanoma", "seborrheic keratosis")
NEVUS, MELANOMA, KERATOSIS = range(3)
RANKED = (MELANOMA, KERATOSIS)  # the challenge's two tasks: each against the rest
OFFICIAL = "official"  # the challenge's own division into splits
SPLITS = ("train", "val", "test")
OFFICIAL_NAMES = {"train": "Training", "val": "Validation", "test": "Test_v2"}
OFFICIAL_COUNTS = {"train": 2000, "val": 150, "test": 600}

AGES = (40, 60)  # years, where bands end
AGE_BANDS = ("below 40 years", "40 to 59 years", "60 years and more")

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
SUPERPIXELS = "_superpixels"

# Train photographs of lesions that validation or test show too, from published lists of duplicates.
RECURRING = frozenset(
    (
        "ISIC_0012887",
        "ISIC_0013163",
        "ISIC_0012237",
        "ISIC_0013417",
        "ISIC_0013737",
        "ISIC_0012713",
        "ISIC_0012175",
        "ISIC_0012271",
        "ISIC_0012970",
    )
)

# Images per class (nevus, melanoma, keratosis) in the 2018 division of the 2750 pooled images.
POOL_2018 = (1843, 521, 386)
PARTS_2018 = {"val": (327, 130, 88), "test": (196, 59, 45)}


@dataclass(frozen=True)
class Record:
    """One photograph: its id, where it lies, and what is known of it."""

    id: str
    image: Path
    mask: Path | None  # None: the split has no mask folder
    label: int | None  # index into CLASSES; None: the split has no label file


def image_folder(source: Path, split: str) -> Path:
    """Folder of a split's photographs."""
    return source / f"ISIC-2017_{OFFICIAL_NAMES[split]}_Data"


def mask_folder(source: Path, split: str) -> Path:
    """Folder of a split's lesion masks."""
    return source / f"ISIC-2017_{OFFICIAL_NAMES[split]}_Part1_GroundTruth"


def label_file(source: Path, split: str) -> Path:
    """CSV of a split's diagnoses."""
    return source / f"ISIC-2017_{OFFICIAL_NAMES[split]}_Part3_GroundTruth.csv"


def first_ids(ids: Sequence[str], count: int = 10) -> str:
    """The first ids of a list, and how many more there are, for a message."""
    more = f" and {len(ids) - count} more" if len(ids) > count else ""
    return ", ".join(ids[:count]) + more


def read_labels(path: Path) -> dict[str, int]:
    """Diagnoses by image id.

    Args:
        path: CSV with the columns image_id, melanoma, seborrheic_keratosis; the last two 0 or 1, never both 1.

    Returns:
        {id: index into CLASSES}; both columns 0 means benign nevus.

    Raises:
        InputError: it is no CSV, a column is missing, an id comes twice, a value is not 0 or 1, or both are 1; names
            the line.
    """
    try:
        table = pd.read_csv(path, dtype=str, skip_blank_lines=False).dropna(how="all")
    except ValueError as error:  # pandas' parser errors and bad encodings are ValueErrors
        raise InputError(f"{path}: no readable CSV ({error})") from None
    missing = {"image_id", "melanoma", "seborrheic_keratosis"} - set(table.columns)
    if missing:
        raise InputError(f"{path}: no column {', '.join(sorted(missing))}; it has {', '.join(table.columns)}")
    names, texts = table["image_id"], table[["melanoma", "seborrheic_keratosis"]]
    values = texts.apply(pd.to_numeric, errors="coerce")
    wrong = ~values.isin([0, 1]).all(axis=1) | (values.sum(axis=1) > 1) | names.isna()
    for row in table.index[wrong | names.duplicated()][:1]:
        line = f"{path}, line {row + 2}: {names[row]}"  # the header is line 1
        if wrong[row]:
            raise InputError(f"{line} has labels {texts.loc[row].tolist()}; expected 0 or 1, and not both 1")
        raise InputError(f"{line} comes twice")
    classes = np.select([values["melanoma"] == 1, values["seborrheic_keratosis"] == 1], [MELANOMA, KERATOSIS], NEVUS)
    return dict(zip(names, classes.tolist(), strict=True))


def read_metadata(paths: Sequence[Path]) -> pd.DataFrame:
    """What is known of patients: columns age_approximate (years, NaN: unknown) and sex, by image id.

    Args:
        paths: CSVs with the columns image_id, age_approximate, sex, as the challenge has them.

    Raises:
        InputError: one is no such CSV, or an id comes twice.
    """
    columns = ["image_id", "age_approximate", "sex"]
    tables = []
    for path in paths:
        try:
            table = pd.read_csv(path, dtype=str)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: no readable CSV ({error})") from None
        if missing := sorted(set(columns) - set(table.columns)):
            raise InputError(f"{path}: no column {', '.join(missing)}; it has {', '.join(table.columns)}")
        tables.append(table[columns])
    known = pd.concat(tables).dropna(subset="image_id").set_index("image_id")
    if twice := known.index[known.index.duplicated()].tolist():
        raise InputError(f"metadata of ids come twice: {first_ids(twice)}")
    known["age_approximate"] = pd.to_numeric(known["age_approximate"], errors="coerce")
    return known


def subgroups(known: pd.DataFrame, ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Rows of the images of each sex and age band that occurs, int (K,); what is not known is a group too.

    Args:
        known: of `read_metadata`.
        ids: of the images.
    """
    rows = known.reindex(list(ids))
    sex = rows["sex"].where(rows["sex"].isin(["female", "male"]), "sex unknown")
    bands = pd.cut(rows["age_approximate"], [-np.inf, *AGES, np.inf], right=False, labels=list(AGE_BANDS))
    age = bands.cat.add_categories("age unknown").fillna("age unknown")
    groups: dict[str, np.ndarray] = {}
    for column, names in ((sex, ("female", "male", "sex unknown")), (age, (*AGE_BANDS, "age unknown"))):
        groups |= {name: found for name in names if len(found := np.flatnonzero(column == name))}
    return groups


def read_split(source: Path, split: str) -> list[Record]:
    """The records of one official split, by id; empty where its image folder is absent.

    Raises:
        InputError: a photograph lacks its mask though the mask folder is there, or its label though the CSV is.
    """
    folder, masks, csv = (place(source, split) for place in (image_folder, mask_folder, label_file))
    if not folder.is_dir():
        return []
    images = {
        path.stem: path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.stem.endswith(SUPERPIXELS)
    }
    mask_paths = {name: masks / f"{name}_segmentation.png" for name in images} if masks.is_dir() else {}
    unmasked = [name for name, path in mask_paths.items() if not path.is_file()]
    if unmasked:
        raise InputError(f"{masks}: no mask for {first_ids(unmasked)}")
    labels = read_labels(csv) if csv.is_file() else None
    unlabelled = [name for name in images if labels is not None and name not in labels]
    if unlabelled:
        raise InputError(f"{csv}: no label for {first_ids(unlabelled)}")
    labels = labels or {}
    return [Record(name, path, mask_paths.get(name), labels.get(name)) for name, path in images.items()]


def superpixel_files(source: Path) -> int:
    """How many superpixel label maps lie among photographs and masks."""
    folders = (folder(source, split) for split in SPLITS for folder in (image_folder, mask_folder))
    return sum(1 for folder in folders for _ in folder.glob(f"*{SUPERPIXELS}*"))


def unused_labels(source: Path, splits: dict[str, list[Record]]) -> list[str]:
    """Ids that the label files of these splits name, though there is no photograph."""
    files = {split: label_file(source, split) for split in splits}
    known = {record.id for records in splits.values() for record in records}
    return [name for path in files.values() if path.is_file() for name in read_labels(path) if name not in known]


def read_source(source: Path) -> dict[str, list[Record]]:
    """The records of every official split that the folder holds.

    Raises:
        InputError: the folder holds no photographs of any split.
    """
    splits = {split: records for split in SPLITS if (records := read_split(source, split))}
    if not splits:
        expected = ", ".join(image_folder(source, split).name for split in SPLITS)
        raise InputError(
            f"{source}: no photographs here; expected at least one of {expected}; to fetch them: "
            f"python download_data.py --out {source}"
        )
    return splits


def divide_2018(splits: dict[str, list[Record]], seed: int) -> dict[str, list[Record]]:
    """Pools all labelled records and divides them as the 2018 repository did, class by class.

    With the 2750 labelled images of 2018: validation 327 nevi, 130 melanomas, 88 keratoses; test 196, 59, 45; the rest
    train. With fewer images of a class, its parts shrink in proportion.

    Args:
        splits: records by official split; unlabelled ones are left out.
        seed: decides who goes where.

    Raises:
        InputError: nothing is labelled, or some labelled records have masks and others have none.
    """
    pool = [record for records in splits.values() for record in records if record.label is not None]
    if not pool:
        raise InputError("--split 2018 divides labelled images, and there are none: add a label file (README, 'Data')")
    if len({record.mask is None for record in pool}) > 1:
        raise InputError("--split 2018 mixes the official splits, so either all of them need a mask folder or none")
    order = np.random.default_rng(seed).permutation(len(pool))
    divided: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for label in range(len(CLASSES)):
        of_class = [pool[row] for row in order if pool[row].label == label]
        shrink = min(1.0, len(of_class) / POOL_2018[label])
        start = 0
        for split, counts in PARTS_2018.items():
            stop = start + round(counts[label] * shrink)
            divided[split] += of_class[start:stop]
            start = stop
        divided["train"] += of_class[start:]
    return {split: sorted(records, key=lambda record: record.id) for split, records in divided.items() if records}


def interleave(records: list[Record]) -> list[Record]:
    """The classes taken in turns, so that the first few rows of a split hold each of them."""
    seen: dict[int | None, int] = {}
    turns = []
    for record in records:
        seen[record.label] = turn = seen.get(record.label, -1) + 1
        turns.append(turn)
    return [records[row] for row in np.argsort(turns, kind="stable")]


def fingerprint(splits: dict[str, list[Record]]) -> str:
    """Tells one source from another: SHA-256 over every record's split, id, label, and its files' names and sizes."""
    digest = hashlib.sha256()
    for split, records in splits.items():
        for record in records:
            files = [(path.name, path.stat().st_size) for path in (record.image, record.mask) if path]
            digest.update(repr((split, record.id, record.label, files)).encode())
    return digest.hexdigest()
