"""PH2: a folder for every image, below it the image, its mask and colour regions; diagnoses in PH2_dataset.txt.

The table's columns are separated by "||": name, histological diagnosis, clinical diagnosis, then other features. The
clinical diagnosis is 0 common nevus, 1 atypical nevus, 2 melanoma.

Source: Mendonça et al. 2013, EMBC, pages 5437 to 5440.
"""

import re

from melanoma.errors import InputError
from melanoma.sources import csv_table
from melanoma.sources.files import Files, key, no_split
from melanoma.sources.layouts.layout import Annotation, Annotations, Layout, Reading, read_annotated

FOLDER = re.compile(r"imd\d+_dermoscopic_image")
TABLE = "ph2_dataset.txt"
DIAGNOSES = {"0": "common nevus", "1": "atypical nevus", "2": "melanoma"}
NAME, CLINICAL = 1, 3  # columns


def recognise(files: Files) -> bool:
    """Whether there is a folder of one image."""
    return files.named(FOLDER)


def read(files: Files) -> Reading:
    """Reads the layout.

    Raises:
        InputError: a diagnosis is not 0, 1 or 2; names the line.
    """
    annotations = Annotations()
    tables = [path for path in files.table_paths if path.name.lower() == TABLE]
    for path in tables:
        for number, line in enumerate(csv_table.read_text(path).splitlines(), start=1):
            cells = [cell.strip() for cell in line.split("||")]
            if len(cells) <= CLINICAL or not re.fullmatch(r"IMD\d+", cells[NAME], re.IGNORECASE):
                continue  # headings and the legend
            if cells[CLINICAL] not in DIAGNOSES:
                raise InputError(f"{path}, line {number}: clinical diagnosis {cells[CLINICAL]!r}; expected 0, 1 or 2")
            annotations.by_id[key(cells[NAME])] = Annotation(DIAGNOSES[cells[CLINICAL]])
            annotations.names[key(cells[NAME])] = cells[NAME]
    if tables and not annotations.by_id:
        raise InputError(f"{tables[0]}: no line with a name and a clinical diagnosis between ||")
    reading = read_annotated(files, no_split, annotations, mask_expected=True)
    missing = [] if tables else ["PH2_dataset.txt is missing: no diagnoses (PH2_dataset.xlsx is not read)"]
    return Reading(reading.entries, reading.left_out, reading.unused_rows, tables, missing)


LAYOUT = Layout(
    "ph2",
    "PH2",
    recognise,
    read,
    "Mendonça et al. 2013, EMBC, pages 5437 to 5440; for research and education",
)
