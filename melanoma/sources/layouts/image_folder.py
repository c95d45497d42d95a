"""A folder of images: without labels, or in folders named after their diagnosis; with masks if there are any.

Folders inside it are read too. Where images lie in folders such as train/melanoma and test/nevus, the names of folders
give diagnosis and split.
"""

from melanoma.sources.diagnoses import CLASS_OF, normalise
from melanoma.sources.files import Files, no_split, pair, split_by_folder
from melanoma.sources.layouts.layout import Annotation, Entry, Layout, Reading


def recognise(files: Files) -> bool:
    """Whether there are images."""
    return bool(files.images)


def read(files: Files) -> Reading:
    """Reads the layout."""
    if not has_class_folders(files):
        pairs, left_out = pair(files, no_split)
        return Reading([Entry(one, Annotation()) for one in pairs], left_out)
    pairs, left_out = pair(files, split_by_folder)
    entries = [Entry(one, Annotation(one.image.parent.name)) for one in pairs]
    return Reading(entries, left_out, remarks=["the names of the folders are the diagnoses"])


def has_class_folders(files: Files) -> bool:
    """Whether the folders of the images are named after at least two diagnoses that have a class."""
    names = {normalise(path.parent.name) for path in files.images}
    return len(names & CLASS_OF.keys()) > 1


LAYOUT = Layout("folder", "a folder of images", recognise, read)
