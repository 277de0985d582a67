"""Rollouts and interfaces do what they did: hashes of tokens, rewards, forwards, ends and log-probabilities."""

import json

import pytest

from tests.golden.cases import CASES, INTERFACES, Case, Interface
from tests.golden.write import VALUES, hashes

GOLDEN = json.loads(VALUES.read_text())


def test_every_case_has_its_values_and_its_own_id() -> None:
    assert [case.id for case in (*CASES, *INTERFACES)] == list(GOLDEN)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_rollouts_do_what_they_did(case: Case) -> None:
    assert hashes(case) == GOLDEN[case.id]


@pytest.mark.parametrize("interface", INTERFACES, ids=lambda interface: interface.id)
def test_interfaces_do_what_they_did(interface: Interface) -> None:
    assert hashes(interface) == GOLDEN[interface.id]
