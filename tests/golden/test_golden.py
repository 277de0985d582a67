"""Rollouts and interfaces do what they did: hashes of tokens, rewards, forwards, ends and log-probabilities."""

import json

import pytest

from tests.golden.cases import CASES, INTERFACES, Case, Interface
from tests.golden.write import VALUES, hashes
from tests.toys import sweep

GOLDEN = json.loads(VALUES.read_text())


def every_policy_once(case: Case) -> bool:
    """On small boards, with everything drawn and no rule but the kind of action; packaged policies on their own."""
    small = case.task != "sudoku6" or case.policy.startswith("sudoku6")
    return small and case.sampled and case.temperature > 0 and case.rules.keys() == {"actions"}


def every_interface_twice(interface: Interface) -> bool:
    """With single positions drawn, and with all that sets are allowed."""
    plain = interface.rules == {"actions": "single"} or "on_illegal" in interface.rules
    return plain and (interface.temperature > 0 or "on_illegal" in interface.rules)


def test_every_case_has_its_values_and_its_own_id() -> None:
    assert [case.id for case in (*CASES, *INTERFACES)] == list(GOLDEN)


@pytest.mark.parametrize("case", sweep(CASES, every_policy_once, lambda case: case.id))
def test_rollouts_do_what_they_did(case: Case) -> None:
    assert hashes(case) == GOLDEN[case.id]


@pytest.mark.parametrize("interface", sweep(INTERFACES, every_interface_twice, lambda interface: interface.id))
def test_interfaces_do_what_they_did(interface: Interface) -> None:
    assert hashes(interface) == GOLDEN[interface.id]
