"""ISIC 2017, the challenge that this project is built for.

A source folder holds, for each of Training, Validation and Test_v2, any of:

    ISIC-2017_<Name>_Data/ISIC_nnnnnnn.jpg                              images (superpixel PNGs among them are skipped)
    ISIC-2017_<Name>_Part1_GroundTruth/ISIC_nnnnnnn_segmentation.png    lesion masks, 0 or 255
    ISIC-2017_<Name>_Part3_GroundTruth.csv                              image_id,melanoma,seborrheic_keratosis

Source: Codella et al. 2018, arXiv 1710.05006.
"""

import re
from dataclasses import replace
from pathlib import Path

from melanoma.classes import CLASSES, KERATOSIS, MELANOMA, NEVUS
from melanoma.sources import csv_table
from melanoma.sources.files import NOT_USED, Files
from melanoma.sources.layouts.layout import Annotations, Layout, Reading, indicated, read_annotated

NAMES = {"train": "Training", "val": "Validation", "test": "Test_v2"}
COUNTS = {"train": 2000, "val": 150, "test": 600}
COLUMNS = {"melanoma": MELANOMA, "seborrheic_keratosis": KERATOSIS}

IMAGE_FOLDER = "ISIC-2017_{}_Data"
MASK_FOLDER = "ISIC-2017_{}_Part1_GroundTruth"
LABEL_FILE = "ISIC-2017_{}_Part3_GroundTruth.csv"

# Training images of lesions that validation or test contain too, from published lists of duplicates.
KNOWN_DUPLICATES = frozenset(
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


def image_folder(source: Path, split: str) -> Path:
    """Folder of a split's images."""
    return source / IMAGE_FOLDER.format(NAMES[split])


def mask_folder(source: Path, split: str) -> Path:
    """Folder of a split's lesion masks."""
    return source / MASK_FOLDER.format(NAMES[split])


def label_file(source: Path, split: str) -> Path:
    """CSV of a split's diagnoses."""
    return source / LABEL_FILE.format(NAMES[split])


def normalise(name: str) -> str:
    """A name in lower case with hyphens, so that case and separators do not matter."""
    return re.sub(r"[-_ ]+", "-", name.lower())


def split_of(relative: Path) -> str | None:
    """Split of a file in one of the challenge's folders."""
    for folder in map(normalise, relative.parent.parts):
        for split, name in NAMES.items():
            if folder in (normalise(IMAGE_FOLDER.format(name)), normalise(MASK_FOLDER.format(name))):
                return split
    return NOT_USED


def recognise(files: Files) -> bool:
    """Whether there is a folder of images."""
    folders = {normalise(IMAGE_FOLDER.format(name)) for name in NAMES.values()}
    return any(normalise(folder) in folders for folder in files.folders)


def read_labels(path: Path) -> dict[str, int]:
    """Reads the diagnoses of a label file.

    Args:
        path: CSV with the columns image_id, melanoma, seborrheic_keratosis, in the dialects of `csv_table.read`; the
            last two 0 or 1, never both 1.

    Returns:
        {id: index into CLASSES}; both columns 0 means benign nevus.

    Raises:
        InputError: the file is not a CSV, a column is missing, an id is repeated with another label, a value is not 0
            or 1, or both are 1; names the line.
    """
    table = _read_table(path)
    csv_table.log_assumptions(table)
    return _labels(table)


def _read_table(path: Path) -> csv_table.Table:
    table = csv_table.name_columns(csv_table.read(path), ("image_id", *COLUMNS))
    names = {"image_id": csv_table.ID_COLUMNS} | {name: (name,) for name in COLUMNS}
    return csv_table.drop_equal_rows(csv_table.select(table, names), "image_id")


def _labels(table: csv_table.Table) -> dict[str, int]:
    classes = [COLUMNS.get(column, NEVUS) for column in indicated(table, list(COLUMNS))]
    return dict(zip(csv_table.ids(table, "image_id"), classes, strict=True))


def read(files: Files) -> Reading:
    """Reads the splits that have images, each with its own CSV."""
    annotations: dict[str | None, Annotations] = {}
    for split, name in NAMES.items():
        for path in files.table_paths:
            if normalise(path.name) == normalise(LABEL_FILE.format(name)):
                table = _read_table(path)
                labels = _labels(table)
                diagnoses = [CLASSES[label] for label in labels.values()]
                annotations.setdefault(split, Annotations()).add(table, list(labels), diagnoses)
    reading = read_annotated(files, split_of, annotations, mask_expected=True)
    metadata = [path for path in files.table_paths if path.stem.lower().endswith("_metadata")]  # evaluate.py reads them
    return replace(reading, tables=[*reading.tables, *metadata])


LAYOUT = Layout(
    "isic2017",
    "ISIC 2017 challenge",
    recognise,
    read,
    "Codella et al. 2018, arXiv 1710.05006; CC-0 as far as known here (not confirmed from the official page)",
    KNOWN_DUPLICATES,
)
