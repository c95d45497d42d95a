"""Messages of errors."""

from melanoma.errors import list_first


def test_list_first_names_the_first_ten_and_counts_the_rest() -> None:
    ids = [str(number) for number in range(12)]
    assert list_first(ids[:2]) == "0, 1"
    assert list_first(ids) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
