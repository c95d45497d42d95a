"""Intervals against a plain loop over scikit-learn, exact cases, and how often they contain a known value."""

from collections.abc import Callable, Iterator

from melanoma.classes import CLASSES, MELANOMA, TASKS
from melanoma.metrics import bootstrap, classification, weighted

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

THRESHOLDS = {"melanoma": {"point": 0.3}, "seborrheic keratosis": {"point": 0.2}}
BOUNDS = [2.5, 97.5]


def set_draws(monkeypatch: pytest.MonkeyPatch, draws: int) -> None:
    monkeypatch.setattr(bootstrap, "DRAWS", draws)


def random_split(count: int, seed: int = 0, levels: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) of all classes and probabilities (N, 3), rounded to `levels` values: few give many ties."""
    rng = np.random.default_rng(seed)
    labels = np.append([0, 1, 2], rng.integers(0, 3, count - 3))
    probabilities = rng.dirichlet(np.ones(3), count) * 0.7 + 0.3 * np.eye(3)[labels]
    return labels, np.round(probabilities * levels) / levels


def resampled_rows(groups: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The plain way to resample: rows with replacement, within each group."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    for _ in range(bootstrap.DRAWS):
        yield np.concatenate([rng.choice(rows, len(rows)) for rows in members])


def plain_intervals(
    compute: Callable[[np.ndarray], dict[str, float]], groups: np.ndarray, seed: int
) -> dict[str, list[float]]:
    """Percentiles over resampled rows, one after the other, NaN left out."""
    draws = [compute(rows) for rows in resampled_rows(groups, seed)]
    return {name: np.nanpercentile([draw[name] for draw in draws], BOUNDS).tolist() for name in draws[0]}


def calibration_error(truth: np.ndarray, score: np.ndarray) -> float:
    """Expected calibration error bin by bin."""
    place = np.minimum(np.floor(score * 10), 9)
    bins = [place == value for value in range(10) if (place == value).any()]
    return float(sum(abs(score[one].mean() - truth[one].mean()) * one.mean() for one in bins))


def sklearn_metrics_of(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """What `classification.all_metrics` computes at THRESHOLDS, by scikit-learn; NaN where undefined."""
    found = {"balanced accuracy": sklearn_metrics.balanced_accuracy_score(labels, probabilities.argmax(axis=1))}
    for index in TASKS:
        name, truth, score = CLASSES[index], labels == index, probabilities[:, index]
        found[f"{name} auc"] = sklearn_metrics.roc_auc_score(truth, score)
        found[f"{name} average precision"] = sklearn_metrics.average_precision_score(truth, score)
        found[f"{name} calibration error"] = calibration_error(truth, score)
        for point, threshold in THRESHOLDS[name].items():
            positive = score >= threshold
            values = {
                "sensitivity": sklearn_metrics.recall_score(truth, positive, zero_division=np.nan),
                "specificity": sklearn_metrics.recall_score(~truth, ~positive, zero_division=np.nan),
                "precision": sklearn_metrics.precision_score(truth, positive, zero_division=np.nan),
                "f1": sklearn_metrics.f1_score(truth, positive, zero_division=np.nan),
                "weighted f1": sklearn_metrics.f1_score(truth, positive, average="weighted", zero_division=0),
                "accuracy": sklearn_metrics.accuracy_score(truth, positive),
            }
            found |= {f"{name} {metric} at {point}": value for metric, value in values.items()}
    return found | {"mean auc": (found["melanoma auc"] + found["seborrheic keratosis auc"]) / 2}


def assert_intervals(found: bootstrap.Intervals, expected: dict[str, list[float]]) -> None:
    assert found.keys() == expected.keys()
    for name, interval in found.items():
        assert interval == pytest.approx(expected[name], abs=1e-12), name


@pytest.mark.parametrize("levels", [5, 1000], ids=["many ties", "few ties"])
def test_intervals_equal_a_plain_loop_over_scikit_learn(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_draws(monkeypatch, 50)
    labels, probabilities = random_split(40, levels=levels)
    expected = plain_intervals(lambda rows: sklearn_metrics_of(labels[rows], probabilities[rows]), labels, seed=3)
    assert_intervals(bootstrap.classification_intervals(labels, probabilities, THRESHOLDS, seed=3), expected)
    aucs = ["melanoma auc", "seborrheic keratosis auc", "mean auc"]
    assert_intervals(bootstrap.auc_intervals(labels, probabilities, seed=3), {name: expected[name] for name in aucs})
    score = probabilities[:, MELANOMA]
    found, intervals = bootstrap.binary_intervals(labels, MELANOMA, score, THRESHOLDS["melanoma"]["point"], seed=3)
    names = {"auc": "melanoma auc"} | {name: f"melanoma {name} at point" for name in ("sensitivity", "specificity")}
    assert_intervals(intervals, {short: expected[name] for short, name in names.items()})
    every = classification.all_metrics(labels, probabilities, THRESHOLDS)
    assert found == {short: every[name] for short, name in names.items()}


def test_intervals_of_means_equal_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    set_draws(monkeypatch, 50)
    rng = np.random.default_rng(0)
    values = {"jaccard": rng.random(40), "dice": rng.random(40)}
    expected = plain_intervals(
        lambda rows: {name: float(value[rows].mean()) for name, value in values.items()}, np.zeros(40), seed=3
    )
    assert_intervals(bootstrap.mean_intervals(values, seed=3), expected)


@pytest.mark.parametrize("levels", [5, 1000], ids=["many ties", "few ties"])
def test_roc_band_equals_a_plain_loop_over_scikit_learn(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_draws(monkeypatch, 50)
    labels, probabilities = random_split(40, levels=levels)
    truth, score = labels == MELANOMA, probabilities[:, MELANOMA]
    rates, low, high = bootstrap.roc_band(truth, score, seed=3)
    curves = []
    for rows in resampled_rows(truth, seed=3):
        false, true, _ = sklearn_metrics.roc_curve(truth[rows], score[rows], drop_intermediate=False)
        curves.append(np.interp(rates, false, true))
    assert rates.tolist() == np.linspace(0, 1, 101).tolist()
    assert np.array([low, high]) == pytest.approx(np.percentile(curves, BOUNDS, axis=0), abs=1e-12)


@pytest.mark.parametrize("levels", [5, 1000], ids=["many ties", "few ties"])
def test_paired_differences_equal_a_plain_loop_over_scikit_learn(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_draws(monkeypatch, 50)
    labels, first = random_split(40, levels=levels)
    second = np.round((0.8 * first + 0.2 * np.random.default_rng(1).dirichlet(np.ones(3), 40)) * levels) / levels
    found = bootstrap.paired_differences(labels, first, second, seed=3)
    for index in TASKS:
        truth, systems = labels == index, [first[:, index], second[:, index]]
        draws = []
        for rows in resampled_rows(labels, seed=3):
            one, other = (sklearn_metrics.roc_auc_score(truth[rows], score[rows]) for score in systems)
            draws.append(other - one)
        difference = found[f"{CLASSES[index]} auc"]
        values = [difference.first, difference.second]
        assert values == pytest.approx([sklearn_metrics.roc_auc_score(truth, score) for score in systems])
        assert difference.difference == difference.second - difference.first
        assert difference.interval == pytest.approx(np.percentile(draws, BOUNDS), abs=1e-12)
        tail = min(np.less_equal(draws, 1e-12).sum(), np.greater_equal(draws, -1e-12).sum())
        assert difference.p_value == pytest.approx(min(1, 2 * (tail + 1) / 51))


@pytest.mark.parametrize("block", [1, 90, 2**16], ids=["one draw", "a few draws", "all draws"])
def test_counts_are_those_of_resampled_rows_whatever_the_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_draws(monkeypatch, 7)
    monkeypatch.setattr(bootstrap, "BLOCK", block)
    groups = np.array([2, 0, 0, 1, 0, 2, 2, 0, 0, 1, 0, 0, 2])
    found = np.concatenate(list(bootstrap.resample_counts(groups, seed=5)))
    expected = [np.bincount(rows, minlength=len(groups)) for rows in resampled_rows(groups, seed=5)]
    assert found.tolist() == np.array(expected).tolist()


def test_resampling_keeps_the_number_of_each_group() -> None:
    groups = np.repeat([0, 1, 2], [5, 3, 1])
    for counts in bootstrap.resample_counts(groups, seed=0):
        for group, size in enumerate([5, 3, 1]):
            assert (counts[:, groups == group].sum(axis=1) == size).all()


def test_intervals_are_seeded() -> None:
    values = {"jaccard": np.random.default_rng(0).random(40)}
    first = bootstrap.mean_intervals(values, seed=1)
    assert first == bootstrap.mean_intervals(values, seed=1) != bootstrap.mean_intervals(values, seed=2)


def test_interval_of_equal_values_is_the_value() -> None:
    assert bootstrap.mean_intervals({"jaccard": np.full(4, 0.75)}, seed=0) == {"jaccard": (0.75, 0.75)}


def test_interval_contains_the_mean_and_narrows_with_more_images(monkeypatch: pytest.MonkeyPatch) -> None:
    set_draws(monkeypatch, 300)
    few = np.random.default_rng(0).random(30)
    few_interval = bootstrap.mean_intervals({"jaccard": few}, seed=0)["jaccard"]
    many_interval = bootstrap.mean_intervals({"jaccard": np.tile(few, 16)}, seed=0)["jaccard"]
    assert few_interval is not None and many_interval is not None
    (low, high), (many_low, many_high) = few_interval, many_interval
    assert low < few.mean() < high
    assert many_low < few.mean() < many_high
    assert (many_high - many_low) == pytest.approx((high - low) / 4, rel=0.3)


def test_interval_of_an_undefined_metric_is_none() -> None:
    labels, probabilities = np.array([0, 0, 1, 1]), np.eye(3)[[0, 1, 1, 1]]
    found = bootstrap.auc_intervals(labels, probabilities, seed=0)
    assert found["melanoma auc"] is not None
    assert found["seborrheic keratosis auc"] is found["mean auc"] is None


def test_draws_in_which_a_metric_is_undefined_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    set_draws(monkeypatch, 200)
    labels = np.array([1, 1, 0, 0])
    probabilities = np.array([[0.1, 0.9, 0], [0.9, 0.1, 0], [0.9, 0.1, 0], [0.9, 0.1, 0]])
    thresholds = {"melanoma": {"point": 0.5}, "seborrheic keratosis": {}}
    found = bootstrap.classification_intervals(labels, probabilities, thresholds, seed=0)
    assert found["melanoma precision at point"] == (1, 1)  # a quarter of the draws lack the one positive prediction
    assert found["melanoma sensitivity at point"] == (0, 1)


def test_metric_undefined_in_every_draw_has_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    def defined_on_the_data_only(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {"metric": np.where((weights == 1).all(axis=1), 1.0, np.nan)}

    set_draws(monkeypatch, 5)
    assert bootstrap.intervals(defined_on_the_data_only, np.zeros(20), seed=0) == {"metric": None}


def test_intervals_contain_the_true_auc_as_often_as_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of two normal distributions a known distance apart have a known AUC."""
    set_draws(monkeypatch, 300)
    rng, covered, runs = np.random.default_rng(0), 0, 200
    labels = np.repeat([0, 1], [70, 30])
    for _ in range(runs):
        score = rng.normal((labels == 1) * 1.2)
        bounds = bootstrap.binary_intervals(labels, 1, score, 0.5, seed=1)[1]["auc"]
        assert bounds is not None
        covered += bounds[0] <= stats.norm.cdf(1.2 / 2**0.5) <= bounds[1]
    assert 0.88 <= covered / runs <= 0.99


def test_roc_corners_by_hand() -> None:
    truth, score = np.array([0, 1, 0, 1, 0], bool), np.array([0.1, 0.4, 0.4, 0.9, 0.95])
    ranking = weighted.rank(truth, score, np.array([[1, 1, 1, 1, 1], [0, 2, 3, 0, 0]]))
    false, true = weighted.roc_curve(ranking)
    assert false == pytest.approx(np.array([[0, 1, 1, 1, 2, 3], [0, 0, 0, 0, 3, 3]]) / 3)
    assert true == pytest.approx(np.array([[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 2, 2]]) / 2)


def test_roc_band_contains_the_curve_and_narrows_with_more_images(monkeypatch: pytest.MonkeyPatch) -> None:
    set_draws(monkeypatch, 300)
    labels, probabilities = random_split(100)
    truth, score = labels == MELANOMA, probabilities[:, MELANOMA]
    rates, low, high = bootstrap.roc_band(truth, score, seed=0)
    false, true, _ = sklearn_metrics.roc_curve(truth, score, drop_intermediate=False)
    curve = np.interp(rates, false, true)
    assert (low <= curve).all() and (curve <= high).all()
    _, many_low, many_high = bootstrap.roc_band(np.tile(truth, 16), np.tile(score, 16), seed=0)
    assert (many_high - many_low).mean() == pytest.approx((high - low).mean() / 4, rel=0.3)


def test_system_does_not_differ_from_itself() -> None:
    labels, probabilities = random_split(60)
    found = bootstrap.paired_differences(labels, probabilities, probabilities, seed=0)
    assert set(found) == {"melanoma auc", "seborrheic keratosis auc", "mean auc"}
    for difference in found.values():
        assert (difference.difference, difference.interval, difference.p_value) == (0, (0, 0), 1)


def test_better_system_is_significant_and_noise_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    set_draws(monkeypatch, 200)
    labels, probabilities = random_split(300)
    better = 0.5 * probabilities + 0.5 * np.eye(3)[labels]
    for difference in bootstrap.paired_differences(labels, probabilities, better, seed=0).values():
        assert difference.interval[0] > 0 and difference.p_value == 2 / 201
    noisy = probabilities + np.random.default_rng(1).normal(scale=1e-3, size=probabilities.shape)
    found = bootstrap.paired_differences(labels, probabilities, noisy, seed=0)
    assert all(difference.p_value > 0.05 for difference in found.values())


def test_undefined_metrics_are_not_compared() -> None:
    labels, probabilities = random_split(30)
    assert set(bootstrap.paired_differences(labels % 2, probabilities, probabilities, seed=0)) == {"melanoma auc"}


def test_paired_interval_is_narrower_than_that_of_one_system(monkeypatch: pytest.MonkeyPatch) -> None:
    set_draws(monkeypatch, 300)
    labels, probabilities = random_split(200)
    other = probabilities + np.random.default_rng(1).normal(scale=0.02, size=probabilities.shape)
    paired = bootstrap.paired_differences(labels, probabilities, other, seed=0)["melanoma auc"].interval
    single = bootstrap.auc_intervals(labels, other, seed=0)["melanoma auc"]
    assert single is not None and paired[1] - paired[0] < 0.5 * (single[1] - single[0])
