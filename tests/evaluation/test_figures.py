"""Figures: points and curves of known predictions, error bars, removal of old files."""

from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.dataset.cache import Cache
from melanoma.dataset.splits import UNLABELLED, originals_with_mask
from melanoma.dataset.workers import Workers
from melanoma.errors import InputError
from melanoma.evaluation import figures, plots
from melanoma.evaluation.scoring import System

import numpy as np
import pandas as pd
import pipeline
import pytest
from matplotlib.figure import Figure
from PIL import Image

LABELS = np.array([0, 0, 1, 1])
PROBABILITIES = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.4, 0.6, 0], [0.1, 0.9, 0]])
SYSTEM = System("a", {"val": PROBABILITIES}, {"melanoma": {"low": 0.5, "high": 0.85}})


def test_operating_points_lie_at_their_rates() -> None:
    truth, score = LABELS == 1, PROBABILITIES[:, 1]
    roc, precision_recall = figures.points_at(truth, score, [0.5, 0.85, 2.0])
    assert roc == [(1 / 2, 1), (0, 1 / 2), (0, 0)]
    assert precision_recall == [(1, 2 / 3), (1 / 2, 1), (0, 0)]


def test_curves_name_their_areas_and_only_the_first_system_has_points_and_band() -> None:
    roc, precision_recall = figures.curves("val", LABELS, [SYSTEM, System("b", SYSTEM.probabilities, {})], seed=0)
    assert [(curve.panel, curve.label) for curve in roc] == [("melanoma", "a: AUC 0.750"), ("melanoma", "b: AUC 0.750")]
    assert [curve.label for curve in precision_recall] == ["a: AP 0.833", "b: AP 0.833"]
    assert [len(curve.points) for curve in roc + precision_recall] == [2, 0, 2, 0]
    assert [curve.band is None for curve in roc] == [False, True]
    assert [curve.style for curve in roc] == [0, 1]


def test_several_systems_share_a_panel_for_each_class_and_one_system_has_one_panel() -> None:
    labels, probabilities = np.array([0, 1, 2, 2]), np.vstack([PROBABILITIES[:3], [0, 0, 1]])
    several = [System(name, {"val": probabilities}, {}) for name in "abcd"]
    roc, _ = figures.curves("val", labels, several, seed=0)
    assert {curve.panel for curve in roc} == {"melanoma", "seborrheic keratosis"}
    assert len({(curve.panel, curve.colour, curve.style) for curve in roc}) == len(roc) == 8
    assert [(curve.panel, curve.colour) for curve in figures.curves("val", labels, several[:1], seed=0)[0]] == [
        ("", 0),
        ("", 1),
    ]


def test_first_system_without_predictions_of_a_split_has_only_the_curves_of_the_others(tmp_path: Path) -> None:
    others = System("b", {"val": PROBABILITIES}, {"melanoma": {"low": 0.5}})
    figures.draw_evaluation(tmp_path, "val", LABELS, [System("a", {}, {}), others], seed=0)
    assert {path.name for path in tmp_path.iterdir()} == {"roc_val.png", "precision_recall_val.png"}


@pytest.mark.parametrize("name", ["a$^$b", "_a", r"\frac{x}", "\u4e2d\u6587", "$x$", "\udcff"])
def test_any_name_is_drawn_as_it_is_and_has_a_legend_entry(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []

    def save(figure: Figure, path: Path) -> None:
        original(figure, path)
        (axis,) = figure.axes
        legend = axis.get_legend()
        assert legend
        found = [*legend.get_texts(), axis.title, figure.texts[0]]
        assert not any(text.get_parse_math() for text in found)
        texts.extend(text.get_text().strip() for text in found)

    original = plots.save
    monkeypatch.setattr(plots, "save", save)
    line = np.linspace(0, 1, 3)
    plots.plot_curves(tmp_path / "a.png", [plots.Curve("", name, line, line)], name, ("x", "y"))
    drawn = name.encode(errors="backslashreplace").decode()  # bytes that are no text cannot be drawn
    assert texts == [drawn, "", drawn]


def test_class_without_images_has_no_curve() -> None:
    assert figures.curves("val", np.zeros(4, int), [SYSTEM], seed=0) == ([], [])


def test_error_bars_are_wilsons_interval() -> None:
    low, high = plots.wilson_errors(np.array([0, 0.5]), np.array([10, 10]))
    assert (low.tolist()[0], high[0]) == (0, pytest.approx(0.27753, abs=1e-5))
    assert (low[1], high[1]) == pytest.approx((0.5 - 0.23659, 0.5 - 0.23659), abs=1e-5)


def test_history_has_one_line_per_epoch(tmp_path: Path) -> None:
    history = {"loss": [2.0, 1.0], "val_loss": [3.0, 2.5]}
    figures.draw_training(tmp_path / "net", {"loss": "loss"}, "a network", history, [4.0, 3.0], 2)
    table = pd.read_csv(tmp_path / "net_history.csv")
    assert table.to_dict("list") == {"epoch": [1, 2], "seconds": [4.0, 3.0], **history}
    with Image.open(tmp_path / "net_curves.png") as image:
        assert np.asarray(image).std() > 5


def test_figure_of_copies_is_removed_where_there_are_no_labels(own_chain: Path, tmp_path: Path) -> None:
    store, path = Store(own_chain / "data", contract.PREPROCESSING, {}), tmp_path / "augmentation.png"
    figures.draw_copies(store, path)
    assert path.is_file()
    store.remove("labels", split="train")
    figures.draw_copies(store, path)
    assert not path.exists()


def test_figure_of_doubtful_masks_darkens_what_is_outside(
    own_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = pipeline.records(own_source, "train")[:15]
    path, drawn = tmp_path / "doubts.png", []
    monkeypatch.setattr(plots, "image_grid", lambda path, rows, title: drawn.append((rows, title)))
    cache = Cache(tmp_path / "data", 32)
    with Workers(1) as workers:
        cache.read(records, workers)
        figures.draw_doubtful_masks(path, [(record, "mask empty") for record in records], cache)
        image, mask = cache.pixels(records[0])
    ((rows, title),) = drawn
    assert [len(row) for row in rows] == [4, 4, 4] and "12 of 15" in title
    tile = rows[0][0]
    assert tile.title == f"{records[0].id}\nmask empty"
    assert mask is not None and np.array_equal(tile.truth, mask)
    assert np.array_equal(tile.image, np.where(mask, image, image // 2))


def test_figure_of_doubtful_masks_is_removed_if_there_are_none(own_source: Path, tmp_path: Path) -> None:
    records, path = pipeline.records(own_source, "train")[:1], tmp_path / "doubts.png"
    cache = Cache(tmp_path / "data", 32)
    with Workers(1) as workers:
        cache.read(records, workers)
        figures.draw_doubtful_masks(path, [(records[0], "mask empty")], cache)
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5
        figures.draw_doubtful_masks(path, [], cache)
    assert not path.exists()


def test_figure_of_regions_needs_no_labels(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(finished / "data", contract.ROI, {})
    monkeypatch.setattr(store, "has", lambda name, **_: name != "labels")
    figures.draw_roi(store, "val", "crop", tmp_path / "roi.png")
    assert (tmp_path / "roi.png").is_file()


@pytest.fixture
def partly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, list[list[list[plots.Tile]]]]:
    """Arrays of images of which some have no mask or no label, and the grids of images that are drawn."""
    grids: list[list[list[plots.Tile]]] = []
    monkeypatch.setattr(plots, "image_grid", lambda _, tiles, title: grids.append(tiles))
    store, source = Store(tmp_path, contract.PREPROCESSING, {}), [0, 1, 2, 3, 1, 2]
    has_mask, pixels = np.array([True, False, True, True, False, True]), np.zeros((6, 8, 8, 3), np.uint8)
    masks = np.broadcast_to(has_mask[:, None, None, None], (6, 8, 8, 1)).astype(np.uint8)
    pixels[:] = np.arange(6)[:, None, None, None]  # the number of the row
    for split in ("train", "val"):
        pipeline.save_rows(tmp_path, split, source)
        labels = np.array([0, 1, 2, UNLABELLED, 1, 2], np.int8)
        arrays = {"labels": labels, "has_mask": has_mask, "masks": masks, "images": pixels}
        for name, array in arrays.items():
            store.save(name, array, split=split)
        Store(tmp_path, contract.SEGNET, {}).save("predicted", masks, split=split)
        Store(tmp_path, contract.ROI, {}).save("roi", pixels, split=split)
    return Store(tmp_path, contract.EVALUATION, {}), grids


def test_figure_of_copies_shows_them_beside_their_original_with_contours_of_masks_only(
    partly: tuple[Store, list[list[list[plots.Tile]]]], tmp_path: Path
) -> None:
    store, grids = partly
    figures.draw_copies(store, tmp_path / "a.png")
    (grid,) = grids
    assert [[int(tile.image[0, 0, 0]) for tile in row] for row in grid] == [[1, 4], [2, 5]]
    assert [[tile.truth is not None for tile in row] for row in grid] == [[False, False], [True, True]]


def test_figures_of_masks_show_images_that_have_one(
    partly: tuple[Store, list[list[list[plots.Tile]]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, grids = partly
    figures.draw_overlays(store, originals_with_mask(store, "val"), tmp_path / "a.png")
    assert {int(tile.image[0, 0, 0]) for row in grids[0] for tile in row} == {0, 2, 3}
    drawn: list[dict[str, np.ndarray]] = []
    monkeypatch.setattr(plots, "jaccard", lambda path, area, values, groups, title: drawn.append(groups))
    figures.draw_jaccard(store, originals_with_mask(store, "val"), tmp_path / "b.png")
    (groups,) = drawn
    assert {name: rows.tolist() for name, rows in groups.items()} == {
        "benign nevus": [True, False, False],
        "seborrheic keratosis": [False, True, False],
        "no label": [False, False, True],
    }


def test_figure_of_regions_shows_images_without_label_apart(
    partly: tuple[Store, list[list[list[plots.Tile]]]], tmp_path: Path
) -> None:
    store, grids = partly
    figures.draw_roi(store, "val", "crop", tmp_path / "a.png")
    assert [row[0].title.splitlines()[0] for row in grids[0]] == [
        *("benign nevus", "melanoma", "seborrheic keratosis", "no label")
    ]
    assert [int(row[0].image[0, 0, 0]) for row in grids[0]] == [0, 1, 2, 3]


def test_old_files_of_every_split_are_removed_and_others_kept(tmp_path: Path) -> None:
    for name in ("roc_val.png", "roc_train.png", "roc_mine.png", "page.html"):
        (tmp_path / name).write_bytes(b"")
    figures.remove(tmp_path, (figures.ROC, "page.html"), keep=[tmp_path / "roc_mine.png"])
    assert [path.name for path in tmp_path.iterdir()] == ["roc_mine.png"]


def test_file_that_the_run_reads_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "roc_val.png").write_bytes(b"")
    with pytest.raises(InputError, match="this run replaces"):
        figures.remove(tmp_path, (figures.ROC,), keep=[tmp_path / ".." / tmp_path.name / "roc_val.png"])
    assert (tmp_path / "roc_val.png").is_file()


@pytest.mark.parametrize("name", ["segnet_overlays", "segnet_jaccard", "augmentation", "roi", "roc_test"])
def test_finished_chain_has_figures_with_content(finished: Path, name: str) -> None:
    with Image.open(finished / "graphics" / f"{name}.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_curves_of_networks_that_are_gone_are_removed(tmp_path: Path) -> None:
    kept = ["toy_full_curves.png", "toyv2_full_curves.png", "toy_mine_curves.png", "roc_val.png"]
    removed = ["toy_head_curves.png", "toy_pretrain_seed1_curves.png", "toy_full_fold2_seed1_history.csv"]
    removed += ["toy_curves.png"]
    for name in kept + removed:
        (tmp_path / name).write_bytes(b"")
    figures.remove_curves(tmp_path, "toy", {"toy_full"})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
