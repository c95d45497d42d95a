"""SIIM-ISIC 2020: a CSV with image_name, patient_id and target; images in folders named after train and test.

The diagnosis counts where it is known; otherwise target 1 means melanoma, and target 0 benign.

Source: Rotemberg et al. 2021, Scientific Data 8:34.
"""

from pathlib import Path

from melanoma.errors import InputError
from melanoma.sources import csv_table
from melanoma.sources.diagnoses import NO_DIAGNOSIS, agree
from melanoma.sources.files import Files, split_by_folder
from melanoma.sources.layouts.layout import Annotations, Layout, Reading, column, indicated, read_annotated


def recognise(files: Files) -> bool:
    """Whether there is a table of targets."""
    return any(not is_submission(path) for path in files.table_paths_with("image_name", "target"))


def is_submission(path: Path) -> bool:
    """Whether a table holds predictions, as sample_submission.csv does: its targets are not diagnoses."""
    return "submission" in path.stem.lower()


def diagnoses(table: csv_table.Table) -> list[str]:
    """The diagnosis of every row.

    Raises:
        InputError: a target is not 0 or 1, or contradicts the diagnosis; names the line.
    """
    by_target = ["malignant" if target else "benign" for target in indicated(table, ["target"])]
    found = []
    words = column(table, "diagnosis") or by_target
    for line, word, general in zip(table.columns.index, words, by_target, strict=True):
        agreed = general if word.lower() in NO_DIAGNOSIS else agree(word, general)
        if agreed is None:
            raise InputError(f"{table.path}, line {line}: the diagnosis is {word}, but the target says {general}")
        found.append(agreed)
    return found


def read(files: Files) -> Reading:
    """Reads the layout."""
    annotations = Annotations()
    files.require_tables("image_name", "target")
    for table in files.require_tables("image_name"):
        if is_submission(table.path):
            continue
        table = csv_table.drop_equal_rows(table, "image_name")
        names = csv_table.ids(table, "image_name").tolist()
        found = diagnoses(table) if "target" in table.columns else None
        annotations.add(table, names, found, column(table, "patient_id", "lesion_id"))
    return read_annotated(files, split_by_folder, annotations)


LAYOUT = Layout(
    "isic2020",
    "SIIM-ISIC 2020 challenge",
    recognise,
    read,
    "Rotemberg et al. 2021, Scientific Data 8:34; CC-BY-NC",
)
