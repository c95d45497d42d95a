"""What `isic-cli` downloads from the ISIC archive: images and metadata.csv with isic_id and diagnosis_1 to diagnosis_5.

diagnosis_1 and diagnosis_2 are groups of diagnoses (such as Malignant) and decide nothing. Older exports have one
column diagnosis. Images that are not dermoscopic are left out.
"""

from melanoma.sources import csv_table
from melanoma.sources.diagnoses import UNCERTAIN
from melanoma.sources.files import Files, key, no_split
from melanoma.sources.layouts.layout import Annotations, Layout, Reading, column, read_annotated
from melanoma.sources.records import LeftOut

import pandas as pd

DERMOSCOPIC = ("", "dermoscopic")


def recognise(files: Files) -> bool:
    """Whether there is a table of isic_id."""
    return bool(files.table_paths_with("isic_id"))


def diagnosis(row: pd.Series) -> str:
    """The specific diagnosis of a row; if there is only a general one, that with a note, which has no class."""
    specific = row.get("diagnosis_3") or row.get("diagnosis")
    general = row.get("diagnosis_2") or row.get("diagnosis_1") or row.get("benign_malignant")
    return specific or (f"{general}, {UNCERTAIN}" if general else "")


def read(files: Files) -> Reading:
    """Reads the layout."""
    annotations = Annotations()
    other_types: dict[str, str] = {}
    for table in files.require_tables("isic_id"):
        table = csv_table.drop_equal_rows(table, "isic_id")
        names = csv_table.ids(table, "isic_id").tolist()
        diagnoses = [diagnosis(row) for _, row in table.columns.iterrows()]
        annotations.add(table, names, diagnoses, column(table, "patient_id", "lesion_id"))
        types = zip(names, column(table, "image_type") or [], strict=False)
        other_types |= {key(name): kind for name, kind in types if kind.lower() not in DERMOSCOPIC}
    reading = read_annotated(files, no_split, annotations)
    entries = [entry for entry in reading.entries if key(entry.pair.id) not in other_types]
    others = [
        LeftOut(entry.pair.id, f"not dermoscopic: {other_types[key(entry.pair.id)]}")
        for entry in reading.entries
        if key(entry.pair.id) in other_types
    ]
    remarks = [] if any(one.diagnosis for one in annotations.by_id.values()) else ["no diagnoses in the tables"]
    return Reading(entries, [*reading.left_out, *others], reading.unused_rows, reading.tables, remarks)


LAYOUT = Layout(
    "isic-cli",
    "ISIC archive, as isic-cli downloads it",
    recognise,
    read,
    "ISIC archive; each image has its own licence (column copyright_license)",
)
