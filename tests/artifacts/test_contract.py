"""The list of files, and the checks of dtype, shape and range."""

from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.contract import FILES, MEMBER_NAME
from melanoma.errors import InputError

import numpy as np
import pytest

PATH = Path("array.npy")


def test_paths_are_unique() -> None:
    assert len({file.path for file in FILES.values()}) == len(FILES)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("images", "uint8", (0, 4, 4, 3)),
        ("masks", "uint8", (2, 4, 4, 1)),
        ("ids", "<U12", (2,)),
        ("ids", "<U20", (2,)),
        ("features", "float32", (2, 1024)),
    ],
)
def test_dtype_and_shape_of_the_contract_are_accepted(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    contract.check_shape(PATH, FILES[name], np.dtype(dtype), shape)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("images", "float32", (2, 4, 4, 3)),
        ("images", "uint8", (2, 4, 4, 1)),
        ("images", "uint8", (2, 4, 5, 3)),
        ("images", "uint8", (2, 4, 4)),
        ("ids", "int64", (2,)),
        ("ids", "S12", (2,)),
        ("labels", "int64", (2,)),
        ("probabilities", "float32", (2, 2)),
    ],
)
def test_other_dtype_or_shape_is_refused(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"^array\.npy: expected .* found "):
        contract.check_shape(PATH, FILES[name], np.dtype(dtype), shape)


@pytest.mark.parametrize(
    ("name", "values", "accepted"),
    [
        ("masks", [0, 1], True),
        ("masks", [0, 2], False),
        ("labels", [0, 1, 2], True),
        ("labels", [-1], True),
        ("labels", [-2], False),
        ("labels", [3], False),
        ("probabilities", [0.0, 1.0], True),
        ("probabilities", [1.0, 1.0001], False),
        ("probabilities", [0.5, np.nan], False),
        ("features", [-1e30, 1e30], True),
        ("features", [np.inf], False),
        ("features", [], True),
        ("source", [0, 7], True),
        ("source", [-1], False),
        ("has_mask", [True, False], True),
    ],
)
def test_values_are_checked_for_their_range(name: str, values: list[float], accepted: bool) -> None:
    if accepted:
        contract.check_values(PATH, FILES[name], np.array(values))
    else:
        with pytest.raises(InputError, match=r"^array\.npy: expected values from .* found "):
            contract.check_values(PATH, FILES[name], np.array(values))


@pytest.mark.parametrize(
    ("name", "matches"),
    [("", True), ("_fold1", True), ("_seed12", True), ("_fold1_seed2", True), ("_seed2_fold1", False), ("_v2", False)],
)
def test_member_names(name: str, matches: bool) -> None:
    assert bool(MEMBER_NAME.fullmatch(name)) == matches
