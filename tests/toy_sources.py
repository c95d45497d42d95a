"""Small data sets in every layout, for tests: every image has a colour and a texture of its own, and a darker disc."""

import colorsys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 72  # pixels


def image(path: Path, number: int = 0) -> Path:
    """Writes an image that depends on the number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = np.array(colorsys.hsv_to_rgb(0.05 + number % 17 / 20, 0.4, 0.9)) * 255
    texture = np.random.default_rng(number).normal(1, 0.12, (SIDE // 3, SIDE // 3)).repeat(3, axis=0).repeat(3, axis=1)
    pixels = texture[..., None] * colour * np.where(disc(number), 0.5, 1.0)[..., None]
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def mask(path: Path, number: int = 0) -> Path:
    """Writes the mask of the disc."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(disc(number) * np.uint8(255)).save(path)
    return path


def disc(number: int) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return np.hypot(rows - SIDE / 2, columns - SIDE / 2 - number % 5) < 15 + number % 7


def text(path: Path, lines: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def isic2016(root: Path) -> Path:
    for number, split in enumerate(("Training", "Training", "Training", "Test", "Test")):
        image(root / f"ISBI2016_ISIC_Part3_{split}_Data" / f"ISIC_{number:07}.jpg", number)
        mask(root / f"ISBI2016_ISIC_Part1_{split}_GroundTruth" / f"ISIC_{number:07}_Segmentation.png", number)
    text(
        root / "ISBI2016_ISIC_Part3_Training_GroundTruth.csv",
        ["ISIC_0000000,benign", "ISIC_0000001,malignant", "ISIC_0000002,benign"],
    )
    text(root / "ISBI2016_ISIC_Part3_Test_GroundTruth.csv", ["ISIC_0000003,0.0", "ISIC_0000004,1.0"])
    return root


def isic2018(root: Path) -> Path:
    columns = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
    rows = {"Training": (0, 1, 2, 4), "Validation": (1,), "Test": (0,)}
    number = 24306
    for split, classes in rows.items():
        lines = ["image," + ",".join(columns)]
        for index in classes:
            name = f"ISIC_{number:07}"
            image(root / f"ISIC2018_Task3_{split}_Input" / f"{name}.jpg", number)
            lines.append(f"{name}," + ",".join(str(float(place == index)) for place in range(len(columns))))
            number += 1
        text(root / f"ISIC2018_Task3_{split}_GroundTruth" / f"ISIC2018_Task3_{split}_GroundTruth.csv", lines)
    text(
        root / "ISIC2018_Task3_Training_LesionGroupings.csv",
        ["image,lesion_id,diagnosis_confirm_type", "ISIC_0024306,HAM_1,histopathology", "ISIC_0024307,HAM_1,x"],
    )
    return root


def isic2019(root: Path) -> Path:
    columns = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
    lines = ["image," + ",".join(columns)]
    for number, index in enumerate((0, 1, 4, 7)):
        name = f"ISIC_{number:07}_downsampled"
        image(root / "ISIC_2019_Training_Input" / f"{name}.jpg", number)
        lines.append(f"{name}," + ",".join(str(float(place == index)) for place in range(len(columns))))
    text(root / "ISIC_2019_Training_GroundTruth.csv", lines)
    text(
        root / "ISIC_2019_Training_Metadata.csv",
        [
            "image,age_approx,anatom_site_general,lesion_id,sex",
            "ISIC_0000000_downsampled,55.0,anterior torso,,female",
            "ISIC_0000001_downsampled,30.0,anterior torso,MSK4_0011169,female",
        ],
    )
    return root


def ham10000(root: Path) -> Path:
    lines = ["lesion_id,image_id,dx,dx_type,age,sex,localization"]
    for number, diagnosis in enumerate(("mel", "nv", "bkl", "bcc", "nv", "nv")):
        name = f"ISIC_{24306 + number:07}"
        image(root / f"HAM10000_images_part_{1 + number % 2}" / f"{name}.jpg", number)
        lines.append(f"HAM_{number // 2:07},{name},{diagnosis},histo,80.0,male,scalp")
        if number < 3:
            mask(root / "HAM10000_segmentations_lesion_tschandl" / f"{name}_segmentation.png", number)
    text(root / "HAM10000_metadata.csv", lines)
    return root


def isic2020(root: Path) -> Path:
    lines = [
        "image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target",
        "ISIC_2637011,IP_7279968,male,45,head/neck,unknown,benign,0",
        "ISIC_0015719,IP_7279968,female,45,upper extremity,melanoma,malignant,1",
        "ISIC_0052212,IP_2842074,female,50,lower extremity,seborrheic keratosis,benign,0",
        "ISIC_0068279,IP_6890425,female,45,head/neck,lentigo NOS,benign,0",
    ]
    for number, line in enumerate(lines[1:]):
        image(root / "jpeg" / "train" / f"{line.split(',')[0]}.jpg", number)
    image(root / "jpeg" / "test" / "ISIC_0052060.jpg", 9)
    text(root / "train.csv", lines)
    text(root / "test.csv", ["image_name,patient_id,sex,age_approx", "ISIC_0052060,IP_3579794,male,70.0"])
    return root


def isic_archive(root: Path) -> Path:
    lines = ["isic_id,attribution,diagnosis_1,diagnosis_2,diagnosis_3,image_type,lesion_id,patient_id"]
    rows = (
        "Benign,Benign melanocytic proliferations,Nevus,dermoscopic,IL_1,IP_1",
        "Malignant,Malignant melanocytic proliferations (Melanoma),Melanoma in situ,dermoscopic,IL_2,IP_1",
        "Benign,Benign epidermal proliferations,Seborrheic keratosis,dermoscopic,IL_3,IP_2",
        "Benign,Benign epidermal proliferations,,dermoscopic,IL_4,IP_3",
        "Benign,Benign melanocytic proliferations,Nevus,clinical: overview,IL_5,IP_4",
    )
    for number, row in enumerate(rows):
        image(root / f"ISIC_{number:07}.jpg", number)
        lines.append(f"ISIC_{number:07},Anonymous,{row}")
    text(root / "metadata.csv", lines)
    return root


def ph2(root: Path) -> Path:
    lines = ["|| Name   ||  Histological Diagnosis  || Clinical Diagnosis || Asymmetry | Pigment Network || Colors ||"]
    for number in range(3):
        name = f"IMD{number + 2:03}"
        folder = root / "PH2Dataset" / "PH2 Dataset images" / name
        image(folder / f"{name}_Dermoscopic_Image" / f"{name}.bmp", number)
        mask(folder / f"{name}_lesion" / f"{name}_lesion.bmp", number)
        mask(folder / f"{name}_roi" / f"{name}_R1_Label3.bmp", number)
        lines.append(f"|| {name} ||                        ||         {number}        || 0 |  T  || 4 ||")
    text(root / "PH2Dataset" / "PH2_dataset.txt", [*lines, "", "Legends:", "Clinical Diagnosis: 0 - Common Nevus"])
    return root


def image_folder(root: Path) -> Path:
    for number, name in enumerate(("left/a.tif", "left/b.webp", "right/c.BMP")):
        image(root / name, number)
    mask(root / "left" / "a_mask.png", 0)
    return root


def own_csv(root: Path) -> Path:
    for number, name in enumerate(("one/mole.png", "two/mole.png", "three.jpg", "four.jpg")):
        image(root / "photos" / name, number)
    mask(root / "masks" / "m1.png", 0)
    text(
        root / "my.csv",
        [
            "image,label,mask,split,group",
            "photos/one/mole.png,melanoma,masks/m1.png,train,Anna",
            "photos/two/mole.png,SK,,train,Anna",
            "photos/three,0,,test,Ben",
            "Photos/Four.JPG,,,test,",
        ],
    )
    return root / "my.csv"
