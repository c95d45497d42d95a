"""Figures by hand, and against scikit-learn."""

from melanoma import isic, metrics

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

Figures = dict[str, float | None]


def grid(*rows: str) -> np.ndarray:
    """A mask (1, H, W, 1) from rows of 0 and 1."""
    return np.array([[int(pixel) for pixel in row] for row in rows], np.uint8)[None, ..., None]


def cases(right_rest: int, false: int, missed: int, hit: int) -> tuple[np.ndarray, np.ndarray]:
    """Truth and score whose confusion matrix at 0.5 has these counts."""
    counts = [right_rest, false, missed, hit]
    return np.repeat([False, False, True, True], counts), np.repeat([0.1, 0.9, 0.2, 0.8], counts)


def random_split(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    return labels, rng.dirichlet(np.ones(3), count) * 0.7 + 0.3 * np.eye(3)[labels]


def mean_score(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Interval of a mean."""

    def compute(rows: np.ndarray) -> Figures:
        return {"mean": float(values[rows].mean())}

    bounds = metrics.intervals(compute, np.zeros(len(values)), seed, draws=300)["mean"]
    assert bounds is not None
    return bounds


def test_mask_figures_are_the_fractions_counted_by_hand() -> None:
    truth, predicted = grid("110", "110", "000"), grid("010", "011", "000")  # 2 hit, 2 missed, 1 false, 4 right outside
    expected = {
        "jaccard": 2 / 5,
        "dice": 4 / 7,
        "threshold_jaccard": 0.0,
        "pixel_accuracy": 6 / 9,
        "sensitivity": 2 / 4,
        "specificity": 4 / 5,
    }
    assert {name: value.item() for name, value in metrics.per_image(truth, predicted).items()} == expected


def test_threshold_jaccard_keeps_what_reaches_the_threshold() -> None:
    truth = grid("11111", "11111", "11111", "11111")
    reaches, fails = grid("11111", "11111", "11100", "00000"), grid("11111", "11111", "11000", "00000")
    found = metrics.per_image(np.concatenate([truth, truth]), np.concatenate([reaches, fails]))
    assert found["jaccard"].tolist() == [0.65, 0.6]
    assert found["threshold_jaccard"].tolist() == [0.65, 0.0]


def test_each_image_has_its_own_figures() -> None:
    truth = np.concatenate([grid("110", "110", "000"), grid("000", "000", "001")])
    predicted = np.concatenate([grid("110", "110", "000"), grid("100", "000", "000")])
    assert metrics.per_image(truth, predicted)["jaccard"].tolist() == [1, 0]


def test_two_empty_masks_agree() -> None:
    empty = grid("000", "000", "000")
    assert all(value.item() == 1 for value in metrics.per_image(empty, empty).values())


def test_lesion_missed_altogether_scores_nothing() -> None:
    found = metrics.per_image(grid("100", "000", "000"), grid("000", "000", "000"))
    assert [found[name].item() for name in ("jaccard", "dice", "sensitivity", "specificity")] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("truth", "predicted"),
    [
        (grid("11"), grid("11", "11")),
        (grid("11")[:0], grid("11")[:0]),
        (grid("11") * 255, grid("11")),
        (grid("11"), grid("11") * 255),
    ],
    ids=["shapes differ", "no image", "truth of 255", "prediction of 255"],
)
def test_unfit_masks_are_refused(truth: np.ndarray, predicted: np.ndarray) -> None:
    with pytest.raises(ValueError, match="mask"):
        metrics.per_image(truth, predicted)


def test_confusion_matrix_of_2018_gives_its_figures() -> None:
    truth, score = cases(360, 55, 21, 109)
    found = metrics.at_threshold(truth, score >= 0.5)
    assert metrics.binary_confusion(truth, score >= 0.5).tolist() == [[360, 55], [21, 109]]
    assert found["f1"] == pytest.approx(0.741, abs=0.0005)
    assert found["sensitivity"] == pytest.approx(0.838, abs=0.0005)
    assert found["specificity"] == pytest.approx(0.867, abs=0.0005)
    assert found["weighted f1"] == pytest.approx(0.8656, abs=0.00005)  # the "86 %" of 2018
    assert found["accuracy"] == pytest.approx(469 / 545)


def test_figures_of_one_class_by_hand() -> None:
    truth, score = np.array([0, 0, 0, 1, 1], bool), np.array([0.1, 0.2, 0.6, 0.5, 0.9])
    assert metrics.auc(truth, score) == pytest.approx(5 / 6)
    assert metrics.average_precision(truth, score) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert metrics.at_threshold(truth, score >= 0.5) == pytest.approx(
        {
            "sensitivity": 1,
            "specificity": 2 / 3,
            "precision": 2 / 3,
            "f1": 4 / 5,
            "weighted f1": 0.8,
            "accuracy": 4 / 5,
        }
    )


def test_pairs_of_equal_score_count_half() -> None:
    truth, score = np.array([0, 1, 0, 1], bool), np.array([0.3, 0.3, 0.1, 0.9])
    assert metrics.auc(truth, score) == (0.5 + 1 + 1 + 1) / 4


@pytest.mark.parametrize("levels", [3, 1000])  # many ties, and next to none
@pytest.mark.parametrize("seed", range(5))
def test_figures_agree_with_scikit_learn(seed: int, levels: int) -> None:
    labels, probabilities = random_split(200, seed)
    probabilities = np.round(probabilities * levels) / levels
    thresholds = {"melanoma": {"low": 0.2, "high": 0.4}, "seborrheic keratosis": {"low": 0.1, "high": 0.3}}
    found = metrics.figures(labels, probabilities, thresholds)
    expected = {"balanced accuracy": sklearn_metrics.balanced_accuracy_score(labels, probabilities.argmax(axis=1))}
    for index in isic.RANKED:
        name, truth, score = isic.CLASSES[index], labels == index, probabilities[:, index]
        expected[f"{name} auc"] = sklearn_metrics.roc_auc_score(truth, score)
        expected[f"{name} average precision"] = sklearn_metrics.average_precision_score(truth, score)
        for point, threshold in thresholds[name].items():
            positive = score >= threshold
            values = {
                "sensitivity": sklearn_metrics.recall_score(truth, positive),
                "specificity": sklearn_metrics.recall_score(~truth, ~positive),
                "precision": sklearn_metrics.precision_score(truth, positive),
                "f1": sklearn_metrics.f1_score(truth, positive),
                "weighted f1": sklearn_metrics.f1_score(truth, positive, average="weighted"),
                "accuracy": sklearn_metrics.accuracy_score(truth, positive),
            }
            expected |= {f"{name} {figure} at {point}": value for figure, value in values.items()}
    expected["mean auc"] = (expected["melanoma auc"] + expected["seborrheic keratosis auc"]) / 2
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found.keys() - expected.keys() == {f"{isic.CLASSES[index]} calibration error" for index in isic.RANKED}
    confusion = sklearn_metrics.confusion_matrix(labels, probabilities.argmax(axis=1))
    assert np.array_equal(metrics.class_confusion(labels, probabilities), confusion)


def test_figures_of_an_absent_class_are_undefined() -> None:
    truth, score = np.zeros(4, bool), np.array([0.1, 0.2, 0.3, 0.4])
    assert metrics.auc(truth, score) is metrics.average_precision(truth, score) is None
    assert metrics.auc(~truth, score) is None
    found = metrics.at_threshold(truth, score >= 0.5)
    assert {name for name, value in found.items() if value is None} == {"sensitivity", "precision", "f1"}
    assert (found["specificity"], found["accuracy"], found["weighted f1"]) == (1, 1, 1)


def test_balanced_accuracy_is_over_the_classes_that_occur() -> None:
    probabilities = np.eye(3)[[0, 0, 1, 1]]
    found = metrics.figures(np.array([0, 0, 0, 1]), probabilities, {"melanoma": {}, "seborrheic keratosis": {}})
    assert found["balanced accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["seborrheic keratosis auc"] is found["mean auc"] is None


def test_calibration_by_hand() -> None:
    truth, score = np.array([0, 1, 1, 1], bool), np.array([0.12, 0.18, 0.95, 1.0])
    promised, found, counts = metrics.calibration(truth, score)
    assert promised == pytest.approx([0.15, 0.975])
    assert (found.tolist(), counts.tolist()) == ([0.5, 1], [2, 2])
    assert metrics.calibration_error(truth, score) == pytest.approx((2 * 0.35 + 2 * 0.025) / 4)


def test_probabilities_that_come_true_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    score = rng.random(20000)
    assert metrics.calibration_error(rng.random(20000) < score, score) < 0.02
    assert metrics.calibration_error(rng.random(20000) < score**2, score) > 0.1


def test_sensitive_threshold_is_the_highest_that_misses_a_tenth() -> None:
    score = np.arange(20) / 20
    truth = np.arange(20) >= 10  # 10 positives from 0.5 up: one may be missed
    assert metrics.sensitive_threshold(truth, score) == 0.55
    assert metrics.sensitive_threshold(truth[:-1], score[:-1]) == 0.5  # none of 9


def test_youden_threshold_by_hand() -> None:
    truth = np.array([0, 0, 0, 0, 1, 0, 1, 1])
    score = np.arange(1, 9) / 10  # at 0.5: sensitivity 1, specificity 4/5; at 0.7: 2/3 and 1
    assert metrics.youden_threshold(truth, score) == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_beats_youdens(seed: int) -> None:
    labels, probabilities = random_split(60, seed)
    truth, score = labels == isic.MELANOMA, probabilities[:, isic.MELANOMA]

    def index(threshold: float) -> float:
        return float((score >= threshold)[truth].mean() + (score < threshold)[~truth].mean() - 1)

    assert index(metrics.youden_threshold(truth, score)) == pytest.approx(max(index(value) for value in score))


def test_youden_threshold_of_equal_scores_is_finite() -> None:
    assert metrics.youden_threshold(np.array([0, 1, 0]), np.full(3, 0.25)) == 0.25


def test_intervals_are_seeded() -> None:
    values = np.random.default_rng(0).random(40)
    assert mean_score(values, seed=1) == mean_score(values, seed=1) != mean_score(values, seed=2)


def test_interval_holds_the_figure_and_narrows_with_more_images() -> None:
    few = np.random.default_rng(0).random(30)
    many = np.tile(few, 16)
    (low, high), (many_low, many_high) = mean_score(few), mean_score(many)
    assert low < few.mean() < high
    assert many_low < many.mean() < many_high
    assert (many_high - many_low) == pytest.approx((high - low) / 4, rel=0.3)


def test_intervals_keep_the_number_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [5, 3, 1])
    bounds = metrics.intervals(lambda rows: {"melanoma": int((labels[rows] == 1).sum())}, labels, seed=0, draws=50)
    assert bounds == {"melanoma": (3, 3)}


def test_interval_of_an_undefined_figure_is_none() -> None:
    bounds = metrics.intervals(lambda rows: {"auc": None, "n": len(rows)}, np.zeros(4), seed=0, draws=5)
    assert bounds == {"auc": None, "n": (4, 4)}


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Scores of two normal distributions a known distance apart have a known AUC."""
    rng, covered, runs = np.random.default_rng(0), 0, 200
    truth = np.repeat([False, True], [70, 30])
    for _ in range(runs):
        score = rng.normal(truth * 1.2)

        def compute(rows: np.ndarray, score: np.ndarray = score) -> Figures:
            return {"auc": metrics.auc(truth[rows], score[rows])}

        bounds = metrics.intervals(compute, truth, seed=1, draws=300)["auc"]
        assert bounds is not None
        covered += bounds[0] <= stats.norm.cdf(1.2 / 2**0.5) <= bounds[1]
    assert 0.88 <= covered / runs <= 0.99


@pytest.mark.parametrize("levels", [4, 1000])
def test_sensitivity_at_a_rate_of_false_positives_is_that_of_the_curve(levels: int) -> None:
    labels, probabilities = random_split(97)
    truth, score = labels == isic.MELANOMA, np.round(probabilities[:, isic.MELANOMA] * levels) / levels
    false, true, _ = sklearn_metrics.roc_curve(truth, score, drop_intermediate=False)
    grid = np.append(np.linspace(0, 1, 101), false)
    assert metrics.sensitivity_at(truth, score, grid) == pytest.approx(np.interp(grid, false, true))


def test_band_of_a_curve_holds_it_and_narrows_with_more_images() -> None:
    labels, probabilities = random_split(100)
    truth, score = labels == isic.MELANOMA, probabilities[:, isic.MELANOMA]
    grid, low, high = metrics.roc_band(truth, score, seed=0)
    curve = metrics.sensitivity_at(truth, score, grid)
    assert (low <= curve).all() and (curve <= high).all()
    _, many_low, many_high = metrics.roc_band(np.tile(truth, 16), np.tile(score, 16), seed=0)
    assert (many_high - many_low).mean() == pytest.approx((high - low).mean() / 4, rel=0.3)


def test_system_does_not_differ_from_itself() -> None:
    labels, probabilities = random_split(60)
    for difference in metrics.compare(labels, probabilities, probabilities, seed=0, draws=50).values():
        assert (difference.difference, difference.interval, difference.p_value) == (0, (0, 0), 1)


def test_better_system_is_seen_to_be_better_and_noise_is_not() -> None:
    labels, probabilities = random_split(300)
    rng = np.random.default_rng(1)
    better = 0.5 * probabilities + 0.5 * np.eye(3)[labels]
    found = metrics.compare(labels, probabilities, better, seed=0, draws=200)
    assert set(found) == {"melanoma auc", "seborrheic keratosis auc", "mean auc"}
    for difference in found.values():
        assert difference.difference == pytest.approx(difference.second - difference.first)
        assert difference.interval[0] > 0 and difference.p_value == pytest.approx(2 / 201)
    noisy = probabilities + rng.normal(scale=1e-3, size=probabilities.shape)
    assert all(value.p_value > 0.01 for value in metrics.compare(labels, probabilities, noisy, seed=0).values())


def test_pairing_makes_differences_surer_than_intervals_apart() -> None:
    labels, probabilities = random_split(200)
    other = probabilities + np.random.default_rng(1).normal(scale=0.02, size=probabilities.shape)
    paired = metrics.compare(labels, probabilities, other, seed=0, draws=300)["melanoma auc"].interval
    alone = metrics.intervals(lambda rows: metrics.areas(labels[rows], other[rows]), labels, 0, 300)["melanoma auc"]
    assert alone is not None and paired[1] - paired[0] < 0.5 * (alone[1] - alone[0])
