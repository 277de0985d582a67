"""The golden cases, as data: what is played, by which policy, under which rules."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One rollout. ``policy``: a reference with its options, or a packaged policy; ``at``: its decoding threshold."""

    task: str
    denoiser: str
    policy: str
    rules: dict[str, Any]
    sampled: bool
    temperature: float
    instances: int
    at: float | None = None

    @property
    def id(self) -> str:
        rules = ",".join(f"{name}={value}" for name, value in self.rules.items())
        at = "" if self.at is None else f"@{self.at}"
        how = f"{'sampled' if self.sampled else 'mode'}-{self.temperature:g}"
        return f"{self.task}/{self.denoiser}/{self.policy}{at}/{rules}/{how}"


SINGLE = [
    "random",
    "left_to_right",
    "max_confidence",
    "margin",
    "entropy",
    "softmax_confidence",
    "softmax_confidence:literal=true",
    "softmax_margin:tau=0.2",
    "top_k:k=3",
    "oracle",
]
SETS = [
    "soft_threshold",
    "fixed_k",
    "fixed_k:k=3,score=entropy",
    "threshold:theta=0.8",
    "threshold:theta=0.7,score=margin",
    "factor",
    "entropy_bounded",
    "kl_stability",
    "schedule",
    "schedule:steps=4,shape=linear",
    "oracle_sets",
]
REMASKING = [
    *[f"remdm:strategy={strategy}" for strategy in ("cap", "rescale", "loop", "conf")],
    "self_planning",
    "self_planning:steps=8,eta=2.0",
]
HOW = list(product((False, True), (0.0, 1.0)))  # sampled or the mode; temperature of filling


def _rules(actions: str) -> list[dict[str, Any]]:
    block = {"actions": actions, "block_length": 4}
    kinds: list[dict[str, Any]] = [{"actions": actions}, block]
    if actions == "set":
        kinds += [{"actions": "set", "nfe_budget": 3}, {"actions": "set", "speed": 1.0}]
    if actions == "set+remask":
        kinds.append({"actions": actions, "remask_budget": 2})
    return kinds


def _boards() -> list[Case]:
    cases = []
    for actions, policies in (("single", SINGLE), ("set", SETS), ("set+remask", SETS + REMASKING)):
        for rules, policy, (sampled, temperature) in product(_rules(actions), policies, HOW):
            cases.append(Case("sudoku4", "sudoku4", policy, rules, sampled, temperature, 12))
        for policy, (sampled, temperature) in product(policies, ((False, 0.0), (True, 1.0))):
            cases.append(Case("sudoku6", "sudoku6-tiny", policy, {"actions": actions}, sampled, temperature, 12))
    return cases


def _others() -> list[Case]:
    cases = []
    for task, denoiser in (("text", "text"), ("zebra:houses=3", "zebra3"), ("countdown", "countdown3")):
        for actions, policies in (("single", ("margin", "oracle")), ("set", ("threshold", "oracle_sets"))):
            for policy, (sampled, temperature) in product(policies, ((False, 0.0), (True, 1.0))):
                cases.append(Case(task, denoiser, policy, {"actions": actions}, sampled, temperature, 4))
    for policy in ("margin", "softmax_confidence"):
        cases.append(Case("sudoku4", "sudoku4-audm", policy, {"actions": "single"}, True, 0.0, 12))
    for policy, (sampled, temperature) in product(("learned", "learned_greedy"), HOW):
        cases.append(Case("sudoku4", "learned order", policy, {"actions": "single"}, sampled, temperature, 12))
    return cases


def _policies() -> list[Case]:
    cases = []
    for sampled, temperature in HOW:
        six = ("sudoku6", "sudoku6-tiny")
        cases.append(Case(*six, "sudoku6-tiny-upo", {"actions": "single"}, sampled, temperature, 24))
        cases.append(Case(*six, "sudoku6-tiny-sets", {"actions": "set"}, sampled, temperature, 24))
        cases.append(Case(*six, "sudoku6-tiny-sets", {"actions": "set+remask"}, sampled, temperature, 24))
    for at, actions in product((0.3, 0.7, 0.95), ("set", "set+remask")):
        cases.append(Case("sudoku6", "sudoku6-tiny", "sudoku6-tiny-sets", {"actions": actions}, False, 0.0, 24, at))
    rules = {"actions": "set+remask", "remask_budget": 2}
    cases.append(Case("sudoku6", "sudoku6-tiny", "sudoku6-tiny-sets", rules, False, 0.0, 24, 0.3))
    return cases


CASES = [*_boards(), *_others(), *_policies()]
INTERFACES = list(product(("gym", "vector", "sb3", "torchrl"), ("single", "set", "set+remask"), (0.0, 1.0)))
"""(interface, actions, temperature): three rows of sudoku4 for many steps, with the same actions."""
