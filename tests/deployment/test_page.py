"""The page of all predicted images."""

import re
from collections.abc import Sequence

from melanoma.dataset.workers import Workers
from melanoma.deployment import page
from melanoma.deployment.results import Results

import pytest
from toy_findings import add, finding


def written(results: Results, failed: Sequence[str] = ()) -> str:
    with Workers(1) as workers:
        return page.write(results, {"networks": "Two networks.", "failed": failed}, workers).read_text()


def test_lists_the_images_by_probability_of_melanoma(opened: Results) -> None:
    add(opened, finding("low", 0.1), finding("a #1 50%?", 0.5, flags=("dark",)), finding("<b>", 0.3, heatmap=None))
    text = written(opened)
    assert re.findall(r'<li data-name="(.*?)"', text) == ["a #1 50%?", "&lt;b&gt;", "low"]
    assert text.count("data:image/jpeg;base64,") == 2
    assert "Check: dark" in text
    assert "Not a medical device" in text
    assert not re.search(r"src=\"(?!data:)", text)  # self-contained
    assert re.findall(r"href=\"(.*?)\"", text) == ["overlays/a%20%231%2050%25%3F.png", "overlays/low.png"]


def test_shows_the_most_suspicious_of_many(opened: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_IMAGES", 2)
    add(opened, *(finding(str(number), number / 10, heatmap=None) for number in range(4)))
    text = written(opened, failed=["b&w"])
    assert re.findall(r'<li data-name="(.*?)"', text) == ["3", "2"]
    assert "2 images with the highest probability" in text
    assert "1 image could not be read: b&amp;w." in text
