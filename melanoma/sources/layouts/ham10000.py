"""HAM10000: HAM10000_metadata.csv with the columns lesion_id, image_id and dx; images and masks in any folders.

Source: Tschandl et al. 2018, Scientific Data 5:180161.
"""

from melanoma.sources import csv_table
from melanoma.sources.files import Files, no_split
from melanoma.sources.layouts.layout import Annotations, Layout, Reading, column, read_annotated


def recognise(files: Files) -> bool:
    """Whether there is a table of diagnoses."""
    return bool(files.table_paths_with("image_id", "dx"))


def read(files: Files) -> Reading:
    """Reads the layout."""
    annotations = Annotations()
    for table in files.require_tables("image_id", "dx"):
        table = csv_table.drop_equal_rows(table, "image_id")
        names = csv_table.ids(table, "image_id").tolist()
        annotations.add(table, names, column(table, "dx"), column(table, "lesion_id"))
    return read_annotated(files, no_split, annotations)


LAYOUT = Layout(
    "ham10000",
    "HAM10000",
    recognise,
    read,
    "Tschandl et al. 2018, Scientific Data 5:180161; CC-BY-NC",
)
