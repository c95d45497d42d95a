"""Which diagnosis of a data set becomes which of the three classes."""

from melanoma.classes import CLASSES, KERATOSIS, MELANOMA, NEVUS

UNCERTAIN = "unspecified"  # part of a diagnosis that is too general for any class

# By the words and codes of the ISIC challenges, HAM10000, the ISIC archive and PH2; see `normalise`. A diagnosis that
# is not listed has no class.
CLASS_OF = {
    **dict.fromkeys(("benign nevus", "nevus", "naevus", "nv", "melanocytic nevus", "common nevus"), NEVUS),
    **dict.fromkeys(("atypical nevus", "dysplastic nevus", "blue nevus", "benign"), NEVUS),
    **dict.fromkeys(("melanoma", "mel", "malignant melanoma", "melanoma in situ", "melanoma invasive"), MELANOMA),
    **dict.fromkeys(("melanoma, nos", "lentigo maligna", "malignant"), MELANOMA),
    **dict.fromkeys(("seborrheic keratosis", "seborrhoeic keratosis", "sk", "sek", "bkl"), KERATOSIS),
    **dict.fromkeys(("benign keratosis", "pigmented benign keratosis", "benign keratosis-like lesions"), KERATOSIS),
}

OTHERS = {  # known diagnoses that have no class
    *("bcc", "basal cell carcinoma", "scc", "squamous cell carcinoma", "ak", "akiec", "actinic keratosis"),
    *("df", "dermatofibroma", "vasc", "vascular lesion", "lentigo", "solar lentigo", "lentigo nos", "other", "unk"),
}
GENERAL = {"benign": False, "malignant": True}  # whether they may be melanoma
NO_DIAGNOSIS = {"", "nan", "none", "null", "n/a", "na", "unknown"}  # cells that say that there is none

BKL = (
    "is seborrheic keratosis, solar lentigo and lichen planus-like keratosis together; all of it counts as seborrheic "
    "keratosis"
)
BROADER = {  # diagnoses that are broader than their class
    "bkl": BKL,
    "benign keratosis": BKL,
    "benign keratosis-like lesions": BKL,
    "pigmented benign keratosis": BKL,
    "benign": "is not divided into nevus and seborrheic keratosis; all of it counts as benign nevus",
    "malignant": "counts as melanoma",
}


def normalise(diagnosis: str) -> str:
    """A diagnosis in lower case, with single spaces in place of blanks and underscores."""
    return " ".join(diagnosis.replace("_", " ").casefold().split())


def agree(first: str, second: str) -> str | None:
    """The more specific of two diagnoses of one image; None if they contradict each other."""
    one, other = sorted((first, second), key=lambda word: normalise(word) in GENERAL)
    if normalise(one) == normalise(other):
        return one
    malignant = GENERAL.get(normalise(other))
    fits = malignant is not None and malignant == (class_of(one) == MELANOMA)
    return one if fits else None


def class_of(diagnosis: str) -> int | None:
    """Index into CLASSES of a diagnosis in words, as a code or as a number; None if it has no class."""
    word = normalise(diagnosis)
    if word.removesuffix(".0") in map(str, range(len(CLASSES))):
        return int(float(word))
    return CLASS_OF.get(word)


def remark(diagnosis: str) -> str | None:
    """What should be known about a diagnosis that is broader than its class; None for others."""
    note = BROADER.get(normalise(diagnosis))
    return f"{diagnosis} {note}" if note else None
