"""A folder of images without labels, and with masks if there are any; folders inside it are read too."""

from melanoma.sources.files import Files, no_split
from melanoma.sources.layouts.layout import Annotations, Layout, Reading, read_annotated


def recognise(files: Files) -> bool:
    """Whether there are images."""
    return bool(files.images)


def read(files: Files) -> Reading:
    """Reads the layout."""
    return read_annotated(files, no_split, Annotations())


LAYOUT = Layout("folder", "a folder of images", recognise, read)
