"""The output folder: table, masks, overlays, and what an interrupted run left there."""

import csv
import os
from pathlib import Path

from melanoma.deployment import results
from melanoma.deployment.images import Broken, ImageFile
from melanoma.deployment.results import Results
from melanoma.errors import InputError

import numpy as np
import pytest
from PIL import Image
from toy_findings import MADE_OF, add, finding


def test_table_has_probabilities_decisions_and_flags(opened: Results) -> None:
    add(opened, finding("a, b", 0.3, flags=("dark", "small")), finding("c", 0.4))
    with (opened.folder / results.TABLE).open(newline="") as stream:
        first, second = csv.DictReader(stream)
    assert first == {
        "image": "a, b",
        "benign_nevus": "0.600000024",
        "melanoma": "0.300000012",
        "seborrheic_keratosis": "0.100000001",
        "melanoma_at_youden": "no",
        "melanoma_at_90_sensitivity": "yes",
        "flags": "dark; small",
        "file": "/images/a, b.jpg",
        "changed": "2026-11-26T12:00:00+00:00",
    }
    assert second["melanoma_at_youden"] == "yes"


def test_mask_has_the_size_of_the_image_and_two_values(opened: Results) -> None:
    add(opened, finding("deep/a"))
    with Image.open(opened.folder / "masks/deep/a_segmentation.png") as mask:
        assert (mask.size, mask.mode) == ((50, 30), "L")
        pixels = np.asarray(mask)
    assert set(np.unique(pixels)) == {0, 255}
    assert (pixels > 0).mean() == pytest.approx(8 * 4 / 16**2, abs=0.02)
    assert (opened.folder / "overlays/deep/a.png").is_file()


def test_without_grad_cam_there_is_no_overlay(opened: Results) -> None:
    add(opened, finding("a", heatmap=None))
    assert not (opened.folder / "overlays").exists()


def test_half_a_line_of_an_interrupted_run_is_removed(opened: Results) -> None:
    add(opened, finding("a"), finding("b"))
    table = opened.folder / results.TABLE
    complete = table.read_text()
    table.write_text(complete + "c,0.5,0.")
    opened.open(MADE_OF, overwrite=False)
    assert table.read_text() == complete
    assert [row["image"] for row in opened.rows()] == ["a", "b"]


def test_results_of_other_networks_are_replaced_only_on_request(opened: Results) -> None:
    add(opened, finding("a"))
    other = MADE_OF | {"networks": {"a": "456"}}
    with pytest.raises(InputError, match="--overwrite"):
        opened.open(other, overwrite=False)
    assert [row["image"] for row in opened.rows()] == ["a"]
    opened.open(other, overwrite=True)
    assert not list(opened.rows())


def test_images_without_line_are_predicted(opened: Results, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    first, second = (ImageFile(tmp_path / f"{name}.jpg", name) for name in "ab")
    for one in (first, second):
        one.path.touch()
    add(opened, finding("a", state=first.state()), finding("earlier"))
    assert opened.without_line([first, second]) == [second]
    assert "results of 1 other images" in caplog.text


@pytest.mark.parametrize("changed", ["another file", "another content"])
def test_line_of_another_file_is_not_taken_for_this_one(changed: str, opened: Results, tmp_path: Path) -> None:
    one = ImageFile(tmp_path / "a.jpg", "a")
    one.path.touch()
    add(opened, finding("a", state=one.state()))
    if changed == "another file":
        one = ImageFile(tmp_path / "more" / "a.jpg", "a")
    else:
        os.utime(one.path, (0, 0))
    with pytest.raises(InputError, match="use another --out"):
        opened.without_line([one])


def test_table_with_other_columns_is_replaced_only_on_request(opened: Results) -> None:
    (opened.folder / results.TABLE).write_text("image,melanoma\na,0.5\n")
    with pytest.raises(InputError, match="other networks, settings or code"):
        opened.open(MADE_OF, overwrite=False)


def test_submission_has_the_probabilities_alone(opened: Results) -> None:
    add(opened, finding("a", 0.3, flags=("dark",)))
    opened.write_submission()
    lines = (opened.folder / results.SUBMISSION).read_text().splitlines()
    assert lines == ["image,benign_nevus,melanoma,seborrheic_keratosis", "a,0.600000024,0.300000012,0.100000001"]


def test_list_of_failed_images_goes_when_none_fails_any_more(opened: Results) -> None:
    opened.write_failed([Broken(ImageFile(Path("/images/a.jpg"), "a"), "broken")])
    lines = (opened.folder / results.FAILED).read_text().splitlines()
    assert lines == ["image,reason,file", "a,broken,/images/a.jpg"]
    opened.write_failed([])
    assert not (opened.folder / results.FAILED).exists()
