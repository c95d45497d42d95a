"""Metrics of probabilities against fractions counted by hand, and against scikit-learn."""

from melanoma.classes import CLASSES, MELANOMA, TASKS
from melanoma.metrics import classification

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

NO_THRESHOLDS: dict[str, dict[str, float]] = {CLASSES[index]: {} for index in TASKS}


def random_split(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and probabilities (N, 3) that are more often right than wrong."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    return labels, rng.dirichlet(np.ones(3), count) * 0.7 + 0.3 * np.eye(3)[labels]


def test_confusion_matrix_of_2018_gives_its_metrics() -> None:
    cells = [360, 55, 21, 109]  # TN, FP, FN, TP
    truth, positive = np.repeat([False, False, True, True], cells), np.repeat([False, True, False, True], cells)
    found = classification.threshold_metrics(truth, positive)
    assert classification.binary_confusion(truth, positive).tolist() == [[360, 55], [21, 109]]
    f1, rest_f1 = 218 / (218 + 76), 720 / (720 + 76)
    assert found == pytest.approx(
        {
            "sensitivity": 109 / 130,
            "specificity": 360 / 415,
            "precision": 109 / 164,
            "f1": f1,
            "weighted f1": (130 * f1 + 415 * rest_f1) / 545,  # 0.8656: the "86 %" of 2018
            "accuracy": 469 / 545,
        },
        rel=1e-15,
    )


def test_metrics_of_one_class_are_the_fractions_counted_by_hand() -> None:
    truth, score = np.array([0, 0, 0, 1, 1], bool), np.array([0.1, 0.2, 0.6, 0.5, 0.9])
    assert classification.auc(truth, score) == 5 / 6
    assert classification.average_precision(truth, score) == pytest.approx((1 + 2 / 3) / 2, rel=1e-15)
    assert classification.threshold_metrics(truth, score >= 0.5) == pytest.approx(
        {
            "sensitivity": 1,
            "specificity": 2 / 3,
            "precision": 2 / 3,
            "f1": 4 / 5,
            "weighted f1": 4 / 5,
            "accuracy": 4 / 5,
        },
        rel=1e-15,
    )


def test_pairs_of_equal_score_count_half_in_the_auc() -> None:
    truth, score = np.array([0, 1, 0, 1], bool), np.array([0.3, 0.3, 0.1, 0.9])
    assert classification.auc(truth, score) == (1 / 2 + 1 + 1 + 1) / 4


def test_images_of_equal_score_have_the_same_precision() -> None:
    truth, score = np.array([0, 1, 1, 0], bool), np.array([0.5, 0.5, 0.5, 0.1])
    assert classification.average_precision(truth, score) == pytest.approx(2 / 3, rel=1e-15)


def test_equal_scores_everywhere_give_an_auc_of_one_half() -> None:
    truth = np.array([0, 1, 1, 0, 0], bool)
    assert classification.auc(truth, np.full(5, 0.2)) == 1 / 2
    assert classification.average_precision(truth, np.full(5, 0.2)) == 2 / 5


@pytest.mark.parametrize("levels", [3, 1000], ids=["many ties", "few ties"])
@pytest.mark.parametrize("seed", range(5))
def test_metrics_agree_with_scikit_learn(seed: int, levels: int) -> None:
    labels, probabilities = random_split(200, seed)
    probabilities = np.round(probabilities * levels) / levels
    thresholds = {"melanoma": {"low": 0.2, "high": 0.4}, "seborrheic keratosis": {"low": 0.1, "high": 0.3}}
    found = classification.all_metrics(labels, probabilities, thresholds)
    expected = {"balanced accuracy": sklearn_metrics.balanced_accuracy_score(labels, probabilities.argmax(axis=1))}
    for index in TASKS:
        name, truth, score = CLASSES[index], labels == index, probabilities[:, index]
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
            expected |= {f"{name} {metric} at {point}": value for metric, value in values.items()}
    expected["mean auc"] = (expected["melanoma auc"] + expected["seborrheic keratosis auc"]) / 2
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found.keys() - expected.keys() == {f"{CLASSES[index]} calibration error" for index in TASKS}
    confusion = sklearn_metrics.confusion_matrix(labels, probabilities.argmax(axis=1))
    assert np.array_equal(classification.class_confusion(labels, probabilities), confusion)


def test_all_metrics_begin_with_the_challenges_scores() -> None:
    labels, probabilities = random_split(30)
    aucs = classification.task_aucs(labels, probabilities)
    assert list(aucs) == ["melanoma auc", "seborrheic keratosis auc", "mean auc"]
    found = classification.all_metrics(labels, probabilities, NO_THRESHOLDS)
    assert list(found.items())[:3] == list(aucs.items())


def test_metrics_of_an_absent_class_are_none() -> None:
    truth, score = np.zeros(4, bool), np.array([0.1, 0.2, 0.3, 0.4])
    assert classification.auc(truth, score) is classification.average_precision(truth, score) is None
    assert classification.auc(~truth, score) is None
    found = classification.threshold_metrics(truth, score >= 0.5)
    assert {name for name, value in found.items() if value is None} == {"sensitivity", "precision", "f1"}
    assert (found["specificity"], found["accuracy"], found["weighted f1"]) == (1, 1, 1)


def test_metrics_of_an_absent_rest_are_none() -> None:
    found = classification.threshold_metrics(np.ones(4, bool), np.ones(4, bool))
    assert {name for name, value in found.items() if value is None} == {"specificity"}
    assert (found["sensitivity"], found["f1"], found["weighted f1"]) == (1, 1, 1)


def test_confusion_matrices_keep_absent_classes() -> None:
    assert classification.binary_confusion(np.zeros(3, bool), np.zeros(3, bool)).tolist() == [[3, 0], [0, 0]]
    found = classification.class_confusion(np.array([0, 0, 1]), np.eye(3)[[0, 1, 1]])
    assert found.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_balanced_accuracy_is_over_the_classes_that_occur() -> None:
    found = classification.all_metrics(np.array([0, 0, 0, 1]), np.eye(3)[[0, 0, 1, 1]], NO_THRESHOLDS)
    assert found["balanced accuracy"] == pytest.approx((2 / 3 + 1) / 2, rel=1e-15)
    assert found["seborrheic keratosis auc"] is found["mean auc"] is None


def test_calibration_is_the_fractions_counted_by_hand() -> None:
    truth, score = np.array([0, 1, 1, 1], bool), np.array([0.12, 0.18, 0.95, 1.0])
    probability, frequency, counts = classification.calibration_bins(truth, score)
    assert probability == pytest.approx([0.15, 0.975])
    assert (frequency.tolist(), counts.tolist()) == ([1 / 2, 1], [2, 2])
    assert classification.calibration_error(truth, score) == pytest.approx((2 * 0.35 + 2 * 0.025) / 4)


def test_last_bin_holds_probabilities_from_nine_tenths_to_one() -> None:
    probability, frequency, counts = classification.calibration_bins(
        np.array([0, 1, 1], bool), np.array([0.875, 0.9375, 1])
    )
    assert (probability.tolist(), frequency.tolist(), counts.tolist()) == ([0.875, 0.96875], [0, 1], [1, 2])


def test_calibration_error_is_the_weighted_gap_of_the_bins() -> None:
    labels, probabilities = random_split(100)
    truth, score = labels == MELANOMA, probabilities[:, MELANOMA].astype(np.float32)
    probability, frequency, counts = classification.calibration_bins(truth, score)
    expected = np.average(np.abs(probability - frequency), weights=counts)
    assert classification.calibration_error(truth, score) == pytest.approx(expected)


def test_probabilities_equal_to_the_frequency_have_a_small_calibration_error() -> None:
    rng = np.random.default_rng(0)
    score = rng.random(20000)
    assert classification.calibration_error(rng.random(20000) < score, score) < 0.02
    assert classification.calibration_error(rng.random(20000) < score**2, score) > 0.1


def test_high_sensitivity_threshold_is_the_highest_that_misses_a_tenth() -> None:
    score = np.arange(20) / 20
    truth = np.arange(20) >= 10  # 10 positives from 0.5 up: one may be missed
    assert classification.high_sensitivity_threshold(truth, score) == 0.55
    assert classification.high_sensitivity_threshold(truth[:-1], score[:-1]) == 0.5  # 9 positives: none may


def test_youden_threshold_by_hand() -> None:
    truth = np.array([0, 0, 0, 0, 1, 0, 1, 1])
    score = np.arange(1, 9) / 10  # at 0.5: sensitivity 1, specificity 4/5; at 0.7: 2/3 and 1
    assert classification.youden_threshold(truth, score) == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_is_better_than_youdens(seed: int) -> None:
    labels, probabilities = random_split(60, seed)
    truth, score = labels == MELANOMA, probabilities[:, MELANOMA]

    def index(threshold: float) -> float:
        return float((score >= threshold)[truth].mean() + (score < threshold)[~truth].mean() - 1)

    best = max(index(value) for value in score)
    assert index(classification.youden_threshold(truth, score)) == pytest.approx(best)


def test_youden_threshold_of_equal_scores_is_finite() -> None:
    assert classification.youden_threshold(np.array([0, 1, 0]), np.full(3, 0.25)) == 0.25


def test_operating_points_have_the_names_of_the_reports() -> None:
    truth, score = np.array([0, 1, 0, 1], bool), np.array([0.1, 0.4, 0.6, 0.9])
    assert classification.operating_points(truth, score) == {"Youden": 0.9, "90 % sensitivity": 0.4}


def test_curves_run_through_the_points_counted_by_hand() -> None:
    truth, score = np.array([0, 1, 0, 1], bool), np.array([0.1, 0.4, 0.6, 0.9])
    false_positive_rate, true_positive_rate = classification.roc_curve(truth, score)
    assert {(0, 0.5), (0.5, 1), (1, 1)} < set(
        zip(false_positive_rate.tolist(), true_positive_rate.tolist(), strict=True)
    )
    recall, precision = classification.precision_recall_curve(truth, score)
    assert {(0.5, 1), (0.5, 1 / 2), (1, 2 / 3)} < set(zip(recall.tolist(), precision.tolist(), strict=True))
