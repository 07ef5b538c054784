"""Numbers read well and never lie by more than their last digit."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlorch.observe.units import (
    BLOCKS,
    bytes_text,
    clock_text,
    count_text,
    number_text,
    percent_text,
    seconds_text,
    shrink,
    sparkline,
    stretch,
)


@pytest.mark.parametrize(
    ("got", "text"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(1_220_000), "1.22 MB"),
        (bytes_text(999_600), "1 MB"),
        (bytes_text(3.2e12), "3.2 TB"),
        (seconds_text(0), "0 s"),
        (seconds_text(0.0031), "3.1 ms"),
        (seconds_text(0.42), "420 ms"),
        (seconds_text(3.14), "3.1 s"),
        (seconds_text(725), "12 min 05 s"),
        (seconds_text(12_000), "3 h 20 min"),
        (seconds_text(math.nan), "–"),
        (clock_text(123.9), "2:03"),
        (clock_text(3723), "1:02:03"),
        (count_text(4812.4), "4,812"),
        (count_text(1_234_567), "1.23 M"),
        (count_text(999_960), "1 M"),
        (number_text(0.00012), "1.2e-4"),
        (number_text(12_345), "12,345"),
        (number_text(1e9), "1.0e9"),
        (number_text(math.inf), "inf"),
        (percent_text(0.46), "46%"),
        (percent_text(0.014), "1.4%"),
        (percent_text(0.9999), "100%"),
    ],
)
def test_numbers_read_as_people_write_them(got: str, text: str) -> None:
    assert got == text


UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@given(st.floats(1, 9e14))
def test_bytes_are_right_to_three_digits(count: float) -> None:
    value, unit = bytes_text(count).split()
    assert float(value) * UNITS[unit] == pytest.approx(count, rel=0.006)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=80), st.integers(1, 40))
def test_shrinking_keeps_bounds_order_and_size(values: list[float], width: int) -> None:
    small = shrink(values, width)
    assert len(small) == min(len(values), width)
    assert min(values) - 1e-6 <= min(small) <= max(small) <= max(values) + 1e-6
    assert len(stretch(values, width)) == width


def test_a_sparkline_rises_with_its_values_and_skips_what_is_not_finite() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 20) == BLOCKS
    assert sparkline([0.0, math.nan, 7.0], 20) == BLOCKS[0] + BLOCKS[-1]
    assert len(sparkline(list(range(1000)), 30)) == 30
    assert set(sparkline([2.0] * 5, 9)) == {BLOCKS[4]}
    assert sparkline([], 9) == ""
