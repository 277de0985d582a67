"""A loose guard on what the interfaces cost; the tight one is benchmarks/overhead.py, on an idle machine."""

import pytest

from benchmarks import overhead


@pytest.mark.slow
def test_no_interface_costs_twice_what_it_may() -> None:
    _, ratios = overhead.measure(repeats=3)
    assert ratios.keys() == overhead.TARGETS.keys()
    for name, ratio in ratios.items():
        assert ratio <= 2 * overhead.TARGETS[name], name
