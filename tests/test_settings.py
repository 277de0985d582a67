"""Settings that do not fit, generated from what the fields themselves say is allowed."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest

from agents import evaluate, export, frontier, imitation, sb3_ppo, show, torchrl_ppo, upo
from agents.decoding import Thresholds
from agents.demo import DemoConfig
from agents.policy import PolicyConfig
from pretrain.likelihood import LikelihoodCommand
from pretrain.train import OBJECTIVES
from tasks import UnmaskError
from tasks.settings import Range, validate
from unmask_env.reference import REFERENCES
from unmask_env.state import Rules

BETWEEN = 1e-6  # just outside
COMMANDS = [
    evaluate.EvaluateCommand,
    export.ExportCommand,
    frontier.FrontierCommand,
    show.ShowCommand,
    LikelihoodCommand,
]
LEARNERS = [
    upo.UPOConfig,
    imitation.ImitationConfig,
    sb3_ppo.SB3PPOConfig,
    torchrl_ppo.TorchRLPPOConfig,
    torchrl_ppo.TorchRLGRPOConfig,
]
KINDS = [*dict.fromkeys(OBJECTIVES.values()), *LEARNERS, *COMMANDS, DemoConfig, PolicyConfig, Rules, Thresholds]
KINDS += [rule for rule in REFERENCES.values() if dataclasses.is_dataclass(rule) and dataclasses.fields(rule)]


def outside(hint: Any) -> list[Any]:
    """Values just outside what an annotation allows; none where it allows everything."""
    options = [option for option in (get_args(hint) if get_origin(hint) not in (Annotated, Literal) else [hint])]
    option = next((o for o in options or [hint] if o is not type(None)), hint)
    if get_origin(option) is Literal:
        return ["neither"]
    base, *extras = get_args(option) if get_origin(option) is Annotated else (option,)
    if base is bool:
        return ["yes"]
    if base not in (int, float):
        return []
    bad: list[Any] = ["1", math.nan, math.inf] if base is float else ["1", 1.5, True]
    for bounds in extras:
        if isinstance(bounds, Range):
            step = 1 if base is int else BETWEEN
            bad += [bounds.least - step] if math.isfinite(bounds.least) else []
            bad += [bounds.most + step] if math.isfinite(bounds.most) else []
            bad += [kind(edge) for edge in (bounds.above, bounds.below) if math.isfinite(edge) for kind in (base,)]
    return bad


def made(kind: type, **changes: Any) -> Any:
    """With something for every field that has no default."""
    needed = {
        field.name: "x"
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return kind(**needed | changes)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_defaults_fit(kind: type) -> None:
    validate(made(kind))


def refusal(kind: type, name: str, value: Any) -> str:
    """What is said of this value; empty where it is taken."""
    try:
        validate(made(kind, **{name: value}))
    except UnmaskError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_settings_out_of_range_are_refused_by_name_in_one_line(kind: type) -> None:
    hints, tried, wrong = get_type_hints(kind, include_extras=True), 0, []
    for name in (field.name for field in dataclasses.fields(kind)):
        for value in outside(hints[name]):
            said, tried = refusal(kind, name, value), tried + 1
            if not said.startswith(f"{name} must be ") or not said.endswith(f"not {value!r}") or "\n" in said:
                wrong.append(f"{name}={value!r}: {said or 'taken'}")
    assert tried or getattr(kind, "sees_answers", False)  # all they have is what they are told
    assert not wrong, "\n".join(wrong)


def test_messages_by_hand() -> None:
    for kind, changes, message in (
        (OBJECTIVES["mdm"], {"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        (OBJECTIVES["mdm"], {"ema": 1.0}, "ema must be a number of at least 0 and below 1, not 1.0"),
        (OBJECTIVES["mdm"], {"schedule": "linear"}, "schedule must be cosine or constant, not 'linear'"),
        (OBJECTIVES["lomdm"], {"order_start": 1.1}, "order_start must be a number between 0 and 1, not 1.1"),
        (upo.UPOConfig, {"group": 1}, "group must be a whole number of at least 2, not 1"),
        (upo.UPOConfig, {"temperature": 0.0}, "temperature must be a number above 0, not 0.0"),
        (upo.UPOConfig, {"lr": math.inf}, "lr must be a number of at least 0, not inf"),
        (upo.UPOConfig, {"lr": 1e300}, "lr must be a number of at most 1e+09, not 1e+300"),
        (upo.UPOConfig, {"temperature": 1e10}, "temperature must be a number of at most 1e+09, not 10000000000.0"),
        (upo.UPOConfig, {"grad_clip": 0.0}, "grad_clip must be a number above 0, not 0.0"),
        (upo.UPOConfig, {"temperature": 1e-300}, "temperature must be a number of at least 1e-09, not 1e-300"),
        (
            upo.UPOConfig,
            {"fill_temperature": 1e-45},
            "fill_temperature must be a number of at least 1e-09, or 0, not 1e-45",
        ),
        (upo.UPOConfig, {"fill_temperature": -1.0}, "fill_temperature must be a number of at least 0, not -1.0"),
        (upo.UPOConfig, {"puzzles": 2**63}, f"puzzles must be a whole number of at most 1e+09, not {2**63}"),
        (upo.UPOConfig, {"threads": 2**31}, f"threads must be a whole number between 1 and 1024, not {2**31}"),
        (OBJECTIVES["mdm"], {"dim": 10**7}, "dim must be a whole number between 1 and 65536, not 10000000"),
    ):
        with pytest.raises(UnmaskError) as caught:
            validate(made(kind, **changes))
        assert str(caught.value) == message


def test_a_long_message_is_cut_in_its_middle() -> None:
    with pytest.raises(UnmaskError) as caught:
        validate(made(upo.UPOConfig, epochs=10**400))
    message = str(caught.value)
    assert len(message) == 300
    assert message.startswith("epochs must be a whole number of at most 1e+09, not 1000")
    assert " … " in message
    assert str(UnmaskError("two\n  lines")) == "two lines"
