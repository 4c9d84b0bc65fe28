"""The p-values that the tests of distributions rest on agree with printed tables."""

import numpy as np
import pytest

from .chances import chi_square, mean, same_distribution, uniform


@pytest.mark.parametrize(
    ("degrees", "critical", "chance"),
    [
        (1, 3.841, 0.05),
        (1, 10.828, 0.001),
        (2, 13.816, 0.001),
        (5, 20.515, 0.001),
        (10, 18.307, 0.05),
        (23, 49.728, 0.001),
        (99, 123.225, 0.05),
        (100, 149.449, 0.001),
    ],
)
def test_chi_square_agrees_with_the_table(degrees: int, critical: float, chance: float) -> None:
    """Critical values of the NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.4."""
    off = np.sqrt(critical * 100 / 2)
    counts = [100 + off, 100 - off, *[100] * (degrees - 1)]
    assert chi_square(np.array(counts), 100) == pytest.approx(chance, rel=2e-3)


def test_chi_square_of_what_was_expected_is_certain() -> None:
    assert chi_square([7, 7, 7], 7) == 1.0
    assert chi_square([7, 7], 7) == 1.0


@pytest.mark.parametrize(("scaled", "chance"), [(1.2238, 0.10), (1.3581, 0.05), (1.6276, 0.01), (1.9495, 0.001)])
def test_the_uniform_test_agrees_with_the_table(scaled: float, chance: float) -> None:
    """Smirnov, Ann. Math. Stat. 19 (1948): the largest distance times the root of the sample's size."""
    size = 40_000
    evenly = (np.arange(size) + 0.5) / size
    moved = evenly * (1 - scaled / np.sqrt(size))  # at 1 the sample is ahead by the critical distance
    assert uniform(moved) == pytest.approx(chance, rel=0.03)
    assert same_distribution(moved, np.linspace(0, 1, 50 * size)) == pytest.approx(chance, rel=0.2)


def test_equal_samples_come_from_one_distribution() -> None:
    values = np.linspace(0, 1, 100)
    assert same_distribution(values, values) == 1.0


@pytest.mark.parametrize(("errors", "chance"), [(1.959964, 0.05), (3.290527, 0.001)])
def test_the_mean_test_agrees_with_the_normal_table(errors: float, chance: float) -> None:
    assert mean(np.full(25, 2 + errors * 3 / 5), expected=2, variance=9) == pytest.approx(chance, rel=1e-4)
