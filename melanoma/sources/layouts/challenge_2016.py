"""ISIC 2016: ISBI2016_ISIC_Part3_{Training,Test}_Data and headerless CSVs of benign or malignant.

The test CSV has 0.0 and 1.0 in place of the words. Masks, of part 1 or of part 3B, may lie beside them.

Source: Gutman et al. 2016, arXiv 1605.01397.
"""

import re
from pathlib import Path

from melanoma.sources import csv_table
from melanoma.sources.files import NOT_USED, Files, split_by_folder
from melanoma.sources.layouts.layout import Annotations, Layout, Reading, read_annotated

FOLDER = re.compile(r"isbi2016_isic_part(1|3b?)_(training|test)_(data|groundtruth)")
IMAGES = re.compile(r"isbi2016_isic_part3b?_(training|test)_data")
TRUTH = re.compile(r"isbi2016_isic_part3b?_(training|test)_groundtruth")
DIAGNOSES = {"0": "benign", "0.0": "benign", "1": "malignant", "1.0": "malignant"}


def recognise(files: Files) -> bool:
    """Whether there is a folder of images of part 3."""
    return files.named(IMAGES)


def split_of(relative: Path) -> str | None:
    """Split of a file in a folder of part 3, or of the masks of part 1."""
    for folder in relative.parent.parts:
        found = FOLDER.fullmatch(folder.lower())
        if found and (found[1] != "1" or found[3] == "groundtruth"):
            return split_by_folder(Path(folder, relative.name))
    return NOT_USED


def read(files: Files) -> Reading:
    """Reads the layout."""
    annotations = Annotations()
    for path in files.table_paths:
        if TRUTH.fullmatch(path.stem.lower()):
            table = csv_table.name_columns(csv_table.read(path, header=False), ["image_id", "label"])
            table = csv_table.drop_equal_rows(table, "image_id")
            diagnoses = [DIAGNOSES.get(word, word) for word in table.columns["label"]]
            annotations.add(table, csv_table.ids(table, "image_id").tolist(), diagnoses)
    return read_annotated(files, split_of, annotations, mask_expected=True)


LAYOUT = Layout(
    "isic2016",
    "ISIC 2016 challenge, part 3",
    recognise,
    read,
    "Gutman et al. 2016, arXiv 1605.01397",
)
