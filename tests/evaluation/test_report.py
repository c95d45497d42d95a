"""The report and the model card: complete, self-contained, honest about synthetic images, readable in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.evaluation import report, tables

import pipeline
import pytest
from pipeline import BACKBONE, reader

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# Writes into the page's title by how much it is wider than the window, and how many of its images are shown.
MEASURE = """<script>addEventListener("load", () => {
  const images = [...document.images], root = document.documentElement;
  document.title = [root.scrollWidth - innerWidth, images.length, images.filter(one => one.naturalWidth).length];
})</script>"""


@pytest.fixture
def metrics(finished: Path) -> dict[str, Any]:
    return json.loads((finished / "graphics" / "metrics.json").read_text())


@pytest.fixture
def page(finished: Path) -> str:
    return (finished / "graphics" / report.PAGE).read_text(encoding="utf-8")


@pytest.fixture
def card(finished: Path) -> str:
    return (finished / "graphics" / report.CARD).read_text(encoding="utf-8")


def rewrite(metrics: dict[str, Any], synthetic: bool, folder: Path) -> tuple[str, str]:
    """Page and card of the same run with or without the record that its images are synthetic."""
    for entry in metrics["inputs"].values():
        if entry["script"] == contract.PREPROCESSING:
            entry["settings"]["synthetic"] = synthetic
    report.write(folder, metrics)
    return (folder / report.PAGE).read_text(encoding="utf-8"), (folder / report.CARD).read_text(encoding="utf-8")


def test_page_is_self_contained(page: str) -> None:
    targets = re.findall(r'(?:src|href)="([^",]*)', page)
    assert targets and set(targets) == {"data:image/png;base64"}
    assert not re.search(r"https?://|@import|url\(", page)


def test_page_and_card_have_every_metric_with_its_interval(metrics: dict[str, Any], page: str, card: str) -> None:
    system = metrics["systems"][BACKBONE]
    for scored in system["splits"].values():
        summary = tables.summarise(scored, system["thresholds"])
        in_tables = [
            *summary.aucs.values(),
            *(one for task in summary.tasks for row in task.rows for one in row.values),
        ]
        in_text = [summary.balanced_accuracy]
        in_text += [one for task in summary.tasks for one in (task.average_precision, task.calibration_error)]
        assert len(in_tables) + len(in_text) == len(scored["metrics"])
        for value in in_tables:
            assert re.search(f">{value.number}<.*{value.bounds}<", page), value
        for value in in_text:
            assert str(value) in page, value
        for value in in_tables + in_text:
            assert str(value) in card, value


def test_test_comes_before_validation(page: str, card: str) -> None:
    assert page.index("<h2>Test,") < page.index("<h2>Validation,")
    assert card.index("### Test,") < card.index("### Validation,")


def test_page_has_every_figure(finished: Path, page: str) -> None:
    shown = set(re.findall(r'alt="([\w.]+)"', page))
    existing = {path.name for path in (finished / "graphics").glob("*.png")}
    assert shown == {name for name in existing if not re.search("curves|augmentation", name)}


def test_page_and_card_have_the_commands_of_the_run(page: str, card: str, finished: Path) -> None:
    assert "Not a medical device" in page and "Not a medical device" in card
    for text in (page, card):
        assert re.search(r"code at commit ([0-9a-f]{7,}(-dirty)?|unknown)\.", text)
        places = [text.index(f"python {script}") for script in contract.SCRIPTS]
        assert places == sorted(places)
        assert re.search(rf"^python densenet_train.py --epochs 1 --backbone {BACKBONE} --weights none$", text, re.M)
        assert str(pipeline.ROOT) not in text and str(finished) not in text


def text_of(card: str) -> str:
    """A model card without its front matter."""
    _, _, text = card.removeprefix("---\n").partition("\n---\n")
    return text


def test_front_matter_of_the_card_has_data_licence_and_every_auc(metrics: dict[str, Any], tmp_path: Path) -> None:
    _, card = rewrite(metrics, False, tmp_path)
    lines = card.removeprefix("---\n").partition("\n---\n")[0].splitlines()
    front = {key: json.loads(value) for key, _, value in (line.partition(": ") for line in lines)}  # JSON is YAML
    assert (front["license"], front["library_name"]) == ("other", "keras")
    assert front["datasets"] == ["isic-2017-challenge"]
    (model,) = front["model-index"]
    (system,) = metrics["systems"].values()
    splits = {one["dataset"]["split"]: one["metrics"] for one in model["results"]}
    assert set(splits) == {"validation", "test"}
    found = {one["name"]: one["value"] for one in splits["test"] if one["type"] == "roc_auc"}
    expected = system["splits"]["test"]["metrics"]
    assert found == {name: value for name, value in expected.items() if name.endswith(" auc")} != {}
    assert any(one["type"] == "f1" for one in splits["test"])


def test_card_says_what_the_model_is_for_and_how_it_decides(finished: Path, card: str) -> None:
    for needed in ("# Model card", "must not be used", "## Limits", "| melanoma |", "By sex and age: not measured"):
        assert needed in card
    saved = json.loads(reader(finished).path("thresholds", backbone=BACKBONE).read_text())
    for name, points in saved.items():
        for point, value in points.items():
            assert f"| {name} | {point} | {value:.4f} |" in card


def test_synthetic_run_says_so_first_and_does_not_name_the_challenge(metrics: dict[str, Any], tmp_path: Path) -> None:
    assert report.is_synthetic(report.made_with(metrics, BACKBONE))  # as segmentation_01_preprocessing.py recorded it
    page, card = rewrite(metrics, True, tmp_path)
    assert text_of(card).splitlines()[0] == f"**{report.SYNTHETIC}**"
    assert page.index(report.SYNTHETIC) < page.index("<h1>")
    for text in (page, card):
        assert "2017" not in text and "Codella" not in text and "CC-0" not in text


def test_run_on_real_images_names_the_challenge_and_is_not_called_synthetic(
    metrics: dict[str, Any], tmp_path: Path
) -> None:
    page, card = rewrite(metrics, False, tmp_path)
    assert text_of(card).startswith("# Model card") and "CC-0" in card and "ISIC 2017" in card
    for text in (page, card):
        assert "ynthetic" not in text and "Codella" in text


def test_settings_are_those_of_the_latest_run_of_each_script() -> None:
    entries = {
        "new": {"script": contract.ROI, "settings": {"roi": "crop", "data": "/home/me/data", "limit": None}},
        "old": {"script": contract.ROI, "settings": {"roi": "mask"}},
        "weights": {"script": contract.CLASSIFIER, "settings": {"weights": "/home/me/a.h5"}},
    }
    made = report.made_with({"inputs": entries, "systems": {"toy": {"inputs": list(entries)}}}, "toy")
    assert made == {contract.ROI: {"roi": "crop"}, contract.CLASSIFIER: {"weights": "a.h5"}}
    assert not report.is_synthetic(made)


def test_report_leaves_out_files_of_another_run(own_chain: Path, caplog: pytest.LogCaptureFixture) -> None:
    graphics = own_chain / "graphics"
    planted = json.loads((graphics / report.SEGMENTATION_FILE).read_text())
    planted["splits"]["val"]["metrics"]["jaccard"] = 0.9876
    (graphics / report.SEGMENTATION_FILE).write_text(json.dumps(planted))
    shutil.copyfile(graphics / "roc_val.png", graphics / "roi.png")
    with caplog.at_level("INFO", "melanoma"):
        pipeline.run(contract.EVALUATION, own_chain)
    page = (graphics / report.PAGE).read_text(encoding="utf-8")
    assert "0.988" not in page and 'alt="roi.png"' not in page and 'alt="segnet_overlays.png"' in page
    for name in (report.SEGMENTATION_FILE, "roi.png"):
        assert (
            f"not in the report: {graphics / name} was not made from {own_chain / 'data'}, or was changed"
            in caplog.text
        )


def test_file_made_from_masks_that_were_replaced_is_not_current(own_chain: Path) -> None:
    store, graphics = reader(own_chain), own_chain / "graphics"
    everything = {"segnet_overlays.png", "segnet_jaccard.png", "roi.png", report.SEGMENTATION_FILE}
    assert report.current_files(store, graphics) == everything
    pipeline.use_true_masks(own_chain)
    assert report.current_files(store, graphics) == set()


def test_backticks_in_a_command_do_not_end_its_block() -> None:
    assert report.code_fence(["python evaluate.py"]) == "```"
    assert report.code_fence(["python evaluate.py --predictions 'a", "````.csv'"]) == "`````"


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_page_fits_a_real_browser_and_shows_its_figures(width: int, page: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    address = (tmp_path / "page.html").as_uri()
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True)
    measured = re.search(r"<title>(-?\d+),(\d+),(\d+)</title>", done.stdout)
    assert measured, done.stdout[:500]
    wider, images, loaded = map(int, measured.groups())
    assert wider <= 0
    assert images == loaded == page.count("<img ") > 8
