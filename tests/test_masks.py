"""From probabilities to masks: turned views, threshold, clean-up; and the folds whose masks are their own."""

from melanoma import augment, folds, masks, training
from melanoma.errors import InputError

import keras
import numpy as np
import pytest
from sklearn.metrics import jaccard_score


class Brightness(keras.layers.Layer):
    """Takes red, from 0 to 255, for the probability."""

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        return keras.ops.cast(x[..., :1], "float32") / 255


class LeftHalf(keras.layers.Layer):
    """Calls the left half of whatever it sees lesion."""

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        columns = keras.ops.arange(x.shape[2]) < x.shape[2] // 2
        return keras.ops.zeros_like(x[..., :1], dtype="float32") + keras.ops.cast(
            columns[None, None, :, None], "float32"
        )


class Constant(keras.layers.Layer):
    """The same probability everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        return keras.ops.zeros_like(x[..., :1], dtype="float32") + self.value


def network(layer: keras.layers.Layer, size: int = 8) -> keras.Model:
    inputs = keras.Input((size, size, 3))
    return keras.Model(inputs, layer(inputs))


def pictures(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


@pytest.mark.parametrize("variant", range(augment.TURNS))
def test_turning_back_undoes_a_turn(variant: int) -> None:
    images = pictures(2)
    there = augment.turned(images, variant, training.IMAGE_AXES)
    assert np.array_equal(augment.turned_back(there, variant, training.IMAGE_AXES), images)


def test_turns_are_all_different() -> None:
    image = pictures(1)[0]
    assert len({augment.turned(image, variant, (0, 1)).tobytes() for variant in range(augment.TURNS)}) == 8


def test_network_that_does_not_care_sees_the_same_in_turned_views() -> None:
    images = pictures(3)
    expected = images[..., :1] / 255
    for turns in (False, True):
        assert np.allclose(training.mean_output([network(Brightness())], images, turns), expected, atol=1e-6)


def test_turned_views_are_averaged() -> None:
    found = training.mean_output([network(LeftHalf())], pictures(1), True)
    assert np.allclose(found, 0.5)  # of eight views, four have any given pixel on the left


def test_models_are_averaged() -> None:
    models = [network(Constant(0.2)), network(Constant(0.6))]
    assert np.allclose(training.mean_output(models, pictures(1), False), 0.4)


@pytest.mark.parametrize("count", [1, 5, 16, 19])
def test_prediction_in_blocks_is_that_of_each_image(count: int) -> None:
    images = pictures(count)
    found = np.concatenate(list(training.predict([network(Brightness())], images, 2, "images")))
    assert np.allclose(found, images[..., :1] / 255, atol=1e-6)


def test_every_image_is_seen_by_its_own_model_where_asked() -> None:
    values = [0.1, 0.5, 0.9]
    own = np.random.default_rng(1).integers(0, 3, 41)
    seers = own[:, None] == np.arange(3)
    models = [network(Constant(value)) for value in values]
    found = np.concatenate(list(training.predict(models, pictures(41), 2, "images", True, seers)))
    assert np.allclose(found[:, 0, 0, 0], np.array(values)[own])


def test_largest_part_stays_and_its_holes_are_filled() -> None:
    drawn = np.array(
        [
            [1, 1, 0, 0, 0, 0],
            [0, 0, 0, 1, 1, 1],
            [0, 0, 0, 1, 0, 1],
            [0, 0, 0, 1, 1, 1],
            [0, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 0, 0],
        ]
    )
    expected = np.zeros_like(drawn)
    expected[1:4, 3:6] = 1
    cleaned = masks.clean(drawn.astype(np.uint8)[..., None])
    assert cleaned.dtype == np.uint8 and np.array_equal(cleaned[..., 0], expected)


def test_bay_at_the_edge_is_no_hole() -> None:
    drawn = np.zeros((4, 4, 1), np.uint8)
    drawn[:, 0] = drawn[0] = drawn[3] = 1
    assert np.array_equal(masks.clean(drawn), drawn)


@pytest.mark.parametrize("value", [0, 1])
def test_empty_and_full_masks_stay_as_they_are(value: int) -> None:
    drawn = np.full((5, 5, 1), value, np.uint8)
    assert np.array_equal(masks.clean(drawn), drawn)


def test_outline_begins_at_the_threshold() -> None:
    probability = np.array([0.2, 0.5, 0.8, 0.49], np.float32).reshape(1, 2, 2, 1)
    assert masks.outline(probability, 0.5, False).ravel().tolist() == [0, 1, 1, 0]
    assert masks.outline(probability, 0.5, True).ravel().tolist() == [0, 1, 1, 0]  # corners touch


def test_threshold_is_the_one_with_the_best_jaccard() -> None:
    truth = np.zeros((2, 8, 8, 1), np.uint8)
    truth[:, 2:6, 2:6] = 1
    probability = np.where(truth, 0.35, 0.22).astype(np.float32)
    chosen = masks.choose_threshold(truth, probability, False)
    assert chosen == pytest.approx(0.25)
    assert masks.mean_jaccard(truth, masks.outline(probability, chosen, False)) == 1


def test_effects_tell_each_step_from_the_others() -> None:
    truth = np.zeros((1, 8, 8, 1), np.uint8)
    truth[0, 2:6, 2:6] = 1
    plain = np.where(truth, 0.4, 0.0).astype(np.float32)  # needs a threshold
    turned = plain.copy()
    turned[0, 0, 0] = 0.9  # needs clean-up
    rows = masks.effects(truth, plain, turned)
    found = {(row["turns"], row["cleaned"], row["threshold_chosen"]): row["jaccard"] for row in rows}
    assert found == {
        (False, False, False): 0,
        (False, False, True): 1,
        (False, True, False): 0,
        (False, True, True): 1,
        (True, False, False): 0,
        (True, False, True): pytest.approx(16 / 17),
        (True, True, False): 0,
        (True, True, True): 1,
    }


def test_jaccard_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = (rng.integers(0, 2, (6, 9, 9, 1)).astype(np.uint8) for _ in range(2))
    expected = np.mean(
        [jaccard_score(*pair) for pair in zip(truth.reshape(6, -1), predicted.reshape(6, -1), strict=True)]
    )
    assert masks.mean_jaccard(truth, predicted) == pytest.approx(expected)


def test_folds_keep_a_photograph_and_its_copies_together() -> None:
    ids = [f"ISIC_{number:07d}" for number in range(23)]
    rows = ids + [f"{name}{augment.COPY}{number}" for number, name in enumerate(ids[::2])]
    assigned = folds.assign(rows, 5, seed=0)
    of = dict(zip(rows, assigned.tolist(), strict=True))
    assert all(of[name] == of[augment.original(name)] for name in rows)
    assert sorted(np.bincount(assigned[: len(ids)]).tolist()) == [4, 4, 5, 5, 5]
    assert np.array_equal(assigned, folds.assign(rows, 5, seed=0))
    assert not np.array_equal(assigned, folds.assign(rows, 5, seed=1))


def test_more_folds_than_photographs_are_refused() -> None:
    with pytest.raises(InputError, match="2 photographs make no 3 folds"):
        folds.assign(["a", "b", f"a{augment.COPY}1"], 3, 0)
