"""Rollouts and interfaces do what they did: hashes of tokens, rewards, forwards and log-probabilities."""

import json

import pytest

from tests.golden.cases import CASES, INTERFACES, Case
from tests.golden.play import play, play_interface
from tests.golden.write import VALUES

GOLDEN = json.loads(VALUES.read_text())


def test_every_case_has_its_values() -> None:
    ids = [case.id for case in CASES] + ["/".join(map(str, interface)) for interface in INTERFACES]
    assert sorted(ids) == sorted(GOLDEN)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_rollouts_do_what_they_did(case: Case) -> None:
    assert play(case) == GOLDEN[case.id]


@pytest.mark.parametrize(("interface", "actions", "temperature"), INTERFACES)
def test_interfaces_do_what_they_did(interface: str, actions: str, temperature: float) -> None:
    assert play_interface(interface, actions, temperature) == GOLDEN[f"{interface}/{actions}/{temperature}"]
