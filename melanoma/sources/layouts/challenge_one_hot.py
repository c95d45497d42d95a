"""ISIC 2018 (task 3) and ISIC 2019: a CSV with a column of 0 and 1 for every diagnosis.

    ISIC2018_Task3_{Training,Validation,Test}_Input, ..._GroundTruth.csv, ..._LesionGroupings.csv
    ISIC_2019_{Training,Test}_Input, ..._GroundTruth.csv, ..._Metadata.csv

Source: Codella et al. 2019, arXiv 1902.03368; Tschandl et al. 2018, Scientific Data 5:180161.
"""

from functools import partial

from melanoma.sources import csv_table
from melanoma.sources.files import Files, split_by_folder
from melanoma.sources.layouts.layout import Annotations, Layout, Reading, column, indicated, read_annotated

CODES = {  # columns; the last two of each challenge are its own
    "isic2018": ("mel", "nv", "bcc", "bkl", "df", "vasc", "akiec"),
    "isic2019": ("mel", "nv", "bcc", "bkl", "df", "vasc", "ak", "scc", "unk"),
}


def recognise(files: Files, name: str) -> bool:
    """Whether there is a CSV with the columns of a challenge."""
    return bool(files.table_paths_with("image", *CODES[name]))


def read(files: Files, name: str) -> Reading:
    """Reads one of the two layouts."""
    annotations = Annotations()
    files.require_tables("image", *CODES[name])
    for table in files.require_tables("image"):
        table = csv_table.drop_equal_rows(table, "image")
        has_diagnoses = set(CODES[name]) <= set(table.columns)
        diagnoses, groups = indicated(table, CODES[name]) if has_diagnoses else None, column(table, "lesion_id")
        if diagnoses or groups:
            annotations.add(table, csv_table.ids(table, "image").tolist(), diagnoses, groups)
    return read_annotated(files, split_by_folder, annotations)


CREDIT = "Codella et al. 2019, arXiv 1902.03368; Tschandl et al. 2018, Scientific Data 5:180161; CC-BY-NC"
LAYOUTS = [
    Layout(name, title, partial(recognise, name=name), partial(read, name=name), CREDIT)
    for name, title in (("isic2018", "ISIC 2018 challenge, task 3"), ("isic2019", "ISIC 2019 challenge"))
]
