"""The three classes of the ISIC 2017 challenge, its two tasks, and its splits."""

CLASSES = ("benign nevus", "melanoma", "seborrheic keratosis")
NEVUS, MELANOMA, KERATOSIS = range(3)
TASKS = (MELANOMA, KERATOSIS)  # each against the other two classes
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "cross-validation", "val": "validation", "test": "test"}  # of evaluated predictions
