"""The page and the model card: complete, self-contained, and whole in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

from melanoma import isic, report, stages

import numpy as np
import pandas as pd
import pipeline
import pytest
from pipeline import exit_code, places, reader

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# Tells, in the page's title, how far it is wider than the window, and how many of its pictures show.
MEASURE = """<script>addEventListener("load", () => {
  const pictures = [...document.images], root = document.documentElement;
  document.title = [root.scrollWidth - innerWidth, pictures.length, pictures.filter(one => one.naturalWidth).length];
})</script>"""


@pytest.fixture
def page(finished: Path) -> str:
    return (finished / "graphics" / report.PAGE).read_text(encoding="utf-8")


def metadata(folder: Path, path: Path) -> Path:
    """Ages and sexes in turns for the test split of a chain; the last image is left out."""
    ids = reader(folder).load("ids", split="test").tolist()[:-1]
    ages, sexes = [str(20 + 10 * (place % 6)) for place in range(len(ids))], ["female", "male", ""] * len(ids)
    table = {"image_id": ids, "age_approximate": [*ages[:-1], "unknown"], "sex": sexes[: len(ids)]}
    pd.DataFrame(table).to_csv(path, index=False)
    return path


def test_page_needs_nothing_beside_it(page: str) -> None:
    targets = re.findall(r'(?:src|href)="([^",]*)', page)
    assert targets and set(targets) == {"data:image/png;base64"}
    assert not re.search(r"https?://|@import|url\(", page)


def test_page_has_every_figure_and_picture(finished: Path, page: str) -> None:
    graphics = finished / "graphics"
    found = json.loads((graphics / "metrics.json").read_text())["systems"][pipeline.BACKBONE]
    for scored in found["splits"].values():
        for figure, value in scored["figures"].items():
            row = f'<tr><th scope="row">{figure}</th><td>{"undefined" if value is None else f"{value:.3f}"}'
            assert row in page, figure
    shown = set(re.findall(r'alt="([\w.]+)"', page))
    there = {path.name for path in graphics.glob("*.png")}
    assert shown == {name for name in there if not re.search("curves|augmentation", name)}


def test_page_says_what_was_run_and_what_it_is_not(page: str) -> None:
    assert "Not a medical device" in page
    assert re.search(r"code at commit ([0-9a-f]{7,}(-dirty)?|unknown)\.", page)
    for script in stages.SCRIPTS[:-1]:
        assert f"<b>{script}</b>" in page
    assert f"backbone={pipeline.BACKBONE}" in page and str(pipeline.ROOT) not in page


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_page_fits_a_real_browser_and_shows_its_pictures(width: int, page: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    address = (tmp_path / "page.html").as_uri()
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True)
    measured = re.search(r"<title>(-?\d+),(\d+),(\d+)</title>", done.stdout)
    assert measured, done.stdout[:500]
    wider, pictures, loaded = map(int, measured.groups())
    assert wider <= 0
    assert pictures == loaded == page.count("<img ") > 8


def test_card_says_what_the_model_is_for_and_where_it_is_blind(finished: Path) -> None:
    card = (finished / "graphics" / report.CARD).read_text(encoding="utf-8")
    for needed in ("# Model card", "must not be used", "CC-0", "## Limits", "| melanoma auc |", "By sex and age: not"):
        assert needed in card
    saved = json.loads(reader(finished).path("thresholds").read_text())
    for name, points in saved.items():
        for point, value in points.items():
            assert f"| {name} | {point} | {value:.4f} |" in card


def test_figures_by_sex_and_age_are_of_those_images(own_chain: Path, tmp_path: Path) -> None:
    path = metadata(own_chain, tmp_path / "metadata.csv")
    pipeline.run(stages.EVALUATION, own_chain, "--metadata", str(path))
    graphics, labels = own_chain / "graphics", reader(own_chain).load("labels", split="test")
    groups = json.loads((graphics / "metrics.json").read_text())["systems"][pipeline.BACKBONE]["subgroups"]
    assert set(groups["val"]) == {"sex unknown", "age unknown"}
    assert groups["test"]["female"]["n"] == 4 and groups["test"]["sex unknown"]["n"] == 4
    for names in (("female", "male", "sex unknown"), (*isic.AGE_BANDS, "age unknown")):
        assert sum(groups["test"][name]["n"] for name in names) == len(labels)
        assert sum(groups["test"][name]["melanomas"] for name in names) == (labels == isic.MELANOMA).sum()
    card = (graphics / report.CARD).read_text(encoding="utf-8")
    assert "| female | 4 |" in card and "By sex and age: not" not in card


def test_age_bands_begin_with_their_first_year() -> None:
    known = pd.DataFrame({"age_approximate": [39, 40, 59, 60, np.nan], "sex": ["male"] * 5}, index=list("abcde"))
    found = {name: rows.tolist() for name, rows in isic.subgroups(known, list("abcde")).items()}
    assert [found[name] for name in (*isic.AGE_BANDS, "age unknown")] == [[0], [1, 2], [3], [4]]


@pytest.mark.usefixtures("logging_restored")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image_id,sex\nISIC_1,male\n", "no column age_approximate"),
        ("image_id,age_approximate,sex\nISIC_1,30,male\nISIC_1,30,male\n", "come twice: ISIC_1"),
        ("", "no readable CSV"),
        (None, "no readable CSV"),
        ("image_id,age_approximate,sex\nISIC_1.jpg,30,male\n,,\n,,\n", "knows none of these images"),
    ],
)
def test_unfit_metadata_are_refused(
    content: str | None,
    message: str,
    own_chain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, before = tmp_path / "metadata.csv", (own_chain / "graphics" / "metrics.json").read_bytes()
    if content is not None:
        path.write_text(content)
    assert exit_code(monkeypatch, stages.EVALUATION, *places(own_chain), "--metadata", str(path)) == 2
    assert message in capsys.readouterr().err
    assert (own_chain / "graphics" / "metrics.json").read_bytes() == before
