"""The golden cases, as data: what is played, by which policy, under which rules. Names and options only."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple


def _named(options: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())


class Case(NamedTuple):
    """One rollout. ``policy``: a reference with its options, or a packaged policy; ``threshold``: of its decoding."""

    task: str
    denoiser: str
    policy: str
    rules: dict[str, Any]
    sampled: bool
    temperature: float
    instances: int
    threshold: float | None = None

    @property
    def id(self) -> str:
        threshold = "" if self.threshold is None else f"@{self.threshold}"
        how = f"{'sampled' if self.sampled else 'mode'}-{self.temperature:g}"
        return f"{self.task}/{self.denoiser}/{self.policy}{threshold}/{_named(self.rules)}/{how}"


class Interface(NamedTuple):
    """Three rows of sudoku4 behind one interface, with the same actions as behind every other."""

    kind: str
    rules: dict[str, Any]
    temperature: float

    @property
    def id(self) -> str:
        return f"{self.kind}/{_named(self.rules)}/{self.temperature:g}"


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
    "threshold:theta=-0.3,score=entropy",
    "factor",
    "entropy_bounded",
    "kl_stability",
    "schedule",
    "schedule:steps=4,shape=linear",
    "oracle_sets",
]
REMASKING = [
    "soft_threshold:remask=0.2",
    "oracle_sets",
    "remdm:strategy=cap,eta=0.2",
    "remdm:strategy=rescale,eta=0.5",
    "remdm:strategy=loop,eta=0.2",
    "remdm:strategy=conf",
    "self_planning",
    "self_planning:steps=8,eta=2.0",
]
POLICIES = {"single": SINGLE, "set": SETS, "set+remask": REMASKING}
SOME = {
    "single": ["margin", "softmax_confidence"],
    "set": ["soft_threshold", "threshold:theta=0.8", "schedule"],
    "set+remask": ["soft_threshold:remask=0.2", "self_planning"],
}
HOW = list(product((False, True), (0.0, 1.0)))  # sampled or the mode; temperature of filling
GREEDY, SAMPLED = (False, 0.0), (True, 1.0)


def _boards() -> list[Case]:
    cases = []
    for actions, policies in POLICIES.items():
        settings = [(policies, {}, HOW), (policies, {"block_length": 4}, [GREEDY, SAMPLED])]
        if actions == "set+remask":
            settings.append((policies, {"remask_budget": 2}, [GREEDY, SAMPLED]))
        else:
            more = [{"nfe_budget": 3}, {"speed": 1.0}, {"speed": 0.5, "speed_bonus": True}]
            settings += [(SOME[actions], rules, [GREEDY, SAMPLED]) for rules in more]
        for names, rules, hows in settings:
            for policy, how in product(names, hows):
                cases.append(Case("sudoku4", "sudoku4", policy, {"actions": actions} | rules, *how, 12))
        for names, rules in ((policies, {}), (SOME[actions], {"block_length": 6})):
            for policy, how in product(names, (GREEDY, SAMPLED)):
                cases.append(Case("sudoku6", "sudoku6-tiny", policy, {"actions": actions} | rules, *how, 12))
    for policy in ("threshold:theta=0.8", "schedule", "kl_stability"):  # rules of sets where remasking is allowed
        cases.append(Case("sudoku4", "sudoku4", policy, {"actions": "set+remask"}, *SAMPLED, 12))
    return cases


def _others() -> list[Case]:
    cases = []
    for task, denoiser in (("text", "text"), ("zebra:houses=3", "zebra3"), ("countdown", "countdown3")):
        # Countdown's margins tie up to the last bit, which every processor sets its own way.
        margin = "softmax_margin" if task == "countdown" else "margin"
        for actions, policies in (("single", (margin, "oracle")), ("set", ("threshold", "oracle_sets"))):
            for policy, how in product(policies, (GREEDY, SAMPLED)):
                cases.append(Case(task, denoiser, policy, {"actions": actions}, *how, 6))
    for policy, how in product(("margin", "softmax_confidence"), (GREEDY, SAMPLED)):
        cases.append(Case("sudoku4", "sudoku4-audm", policy, {"actions": "single"}, *how, 12))
    for policy, how in product(("learned", "learned_greedy"), HOW):
        cases.append(Case("sudoku4", "learned order", policy, {"actions": "single"}, *how, 12))
    return cases


def _policies() -> list[Case]:
    six, cases = ("sudoku6", "sudoku6-tiny"), []
    for how in HOW:
        cases.append(Case(*six, "sudoku6-tiny-upo", {"actions": "single"}, *how, 16))
        cases += [Case(*six, "sudoku6-tiny-sets", {"actions": actions}, *how, 16) for actions in ("set", "set+remask")]
    for threshold, actions in product((0.3, 0.7), ("set", "set+remask")):
        cases.append(Case(*six, "sudoku6-tiny-sets", {"actions": actions}, *GREEDY, 16, threshold))
    for how, threshold in ((GREEDY, None), (GREEDY, 0.3), (SAMPLED, None)):
        rules = {"actions": "set+remask", "remask_budget": 2}
        cases.append(Case(*six, "sudoku6-tiny-sets", rules, *how, 16, threshold))
    cases.append(Case(*six, "sudoku6-tiny-sets", {"actions": "set", "block_length": 6}, *GREEDY, 16))
    return cases


def _interfaces() -> list[Interface]:
    cut = {"actions": "set+remask", "nfe_budget": 8}
    settings = [
        ({"actions": "single"}, 0.0),
        ({"actions": "single"}, 1.0),
        ({"actions": "single", "nfe_budget": 12, "reference": "margin"}, 1.0),
        ({"actions": "set"}, 0.0),
        ({"actions": "set"}, 1.0),
        ({"actions": "set", "nfe_budget": 9, "block_length": 4}, 1.0),
        (cut, 0.0),
        (cut, 1.0),
        (cut | {"remask_budget": 1}, 1.0),  # some actions remask more than are left, which is illegal
        (cut | {"remask_budget": 1, "on_illegal": "terminate"}, 0.0),
    ]
    return [Interface(kind, *setting) for setting, kind in product(settings, ("gym", "vector", "sb3", "torchrl"))]


CASES = [*_boards(), *_others(), *_policies()]
INTERFACES = _interfaces()
