"""The overlay of one image."""

from melanoma.deployment import overlay

import numpy as np
import pytest
from toy_findings import finding

YELLOW, WHITE = (255, 212, 0), (255, 255, 255)


def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == colour).all(axis=-1).sum())


def test_shows_contour_and_crop() -> None:
    tile = np.asarray(overlay.with_contour(finding("a")))
    assert tile.shape == (overlay.TILE, overlay.TILE * 50 // 30, 3)
    assert count(tile, YELLOW) > 500
    assert count(tile, WHITE) > 500


@pytest.mark.parametrize("value", [0, 1])
def test_empty_and_full_masks_have_no_contour(value: int) -> None:
    tile = np.asarray(overlay.with_contour(finding("a", mask=np.full((16, 16, 1), value, np.uint8))))
    assert count(tile, YELLOW) == count(tile, WHITE) == 0


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000)])
def test_elongated_images_stay_readable(size: tuple[int, int]) -> None:
    width, height = overlay.with_contour(finding("a", size=size)).size
    assert height == overlay.TILE
    assert overlay.TILE / overlay.MAX_ASPECT <= width <= overlay.TILE * overlay.MAX_ASPECT


@pytest.mark.parametrize("name", ["a\nb", "W" * 300, ""])
def test_name_fits(name: str) -> None:
    picture = np.asarray(overlay.draw(finding(name)))
    assert (picture[: overlay.GAP + 20, -overlay.GAP :] == WHITE).all()
    shown = overlay.shortened(name, 18, 500)
    assert overlay.font(18).getlength(shown) <= 500
    assert shown == name.replace("\n", " ") or (shown.endswith("…") and len(shown) > 20)


def test_bar_of_melanoma_warns_from_the_lowest_threshold() -> None:
    alert = (209, 73, 91)
    assert count(np.asarray(overlay.draw(finding("a", 0.19))), alert) == 0
    assert count(np.asarray(overlay.draw(finding("a", 0.21))), alert) > 1000
