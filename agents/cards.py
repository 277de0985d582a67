"""The model cards of order policies: what a training run knows of itself, beside what :mod:`pretrain.card` tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from agents.policy import PACKAGED_POLICIES, LearnedPolicy
from agents.validation import Validation
from pretrain import card, processes
from pretrain.checkpoint import PACKAGED_DENOISERS, save_model


def publisher(
    policy: LearnedPolicy, monitor: Validation, how: Callable[[], str] = lambda: "rewards"
) -> Callable[[int, Path], None]:
    """What writes the policy of a run, with its card, to a folder after so many steps.

    Args:
        monitor: the run's. how: it learned, if from answers or rewards.
    """

    def publish(steps: int, folder: Path) -> None:
        if steps > 0 and how():
            policy.mark_trained(how())
        save_model(policy, folder, described=policy_card(policy, monitor, steps))

    return publish


def policy_card(policy: LearnedPolicy, monitor: Validation, steps: int) -> str:
    """The card of ``policy`` after ``steps`` steps of the run that ``monitor`` watches."""
    config, process = monitor.config, monitor.process
    named = getattr(process.denoiser, "source", None)
    results = monitor.results()
    rows = {
        "task": f"`{process.task.name}`",
        "denoiser": None if named is None else f"`{named}`",
        "fingerprint of the denoiser's symbols": process.task.fingerprint,
        "made by": f"{monitor.title}, {steps:,} steps",
        "began from": None if config.init is None else f"`{config.init}`",
        "reference policy" if hasattr(config, "beta") else "imitates": f"`{config.reference}`",
        "weight of the divergence from it": getattr(config, "beta", None),
        "seed": config.seed,
        "learned from": policy.trained or "nothing yet",
    }
    sources = [named, *([config.init] if config.init else [])]
    front = card.front_matter(policy) | {
        "license": card.license_of(sources, PACKAGED_DENOISERS, PACKAGED_POLICIES),
        "model_name": f"order policy for {process.task.name}",
    }
    if results is not None:
        front["eval_results"] = [_evaluated(results, process.task.name)]
    sections = (card.training(config, processes.count()), _table(results))
    return card.build(f"Order policy for {process.task.name}", front, rows | card.known(policy) | rows, *sections)


def _evaluated(results: dict[str, Any], task: str) -> EvalResult:
    """The score as the hub lists it."""
    return EvalResult(
        task_type="reinforcement-learning",
        dataset_type=task,
        dataset_name=task,
        dataset_split="validation",
        metric_type=results["metric"],
        metric_value=results["rows"]["this policy"]["score"][0],
    )


def _table(results: dict[str, Any] | None) -> str:
    """The section of a card on the validation instances."""
    if results is None:
        return ""
    lines = [
        "## Results",
        "",
        f"On {results['n']:,} validation instances, each played once and greedily, after {results['step']:,} steps; "
        "95 % intervals over the instances, means of forwards and network passes. They chose nothing but the folder "
        "`best`, whose score they make too high.",
        "",
        f"| | {results['metric']} % | reward | forwards | network passes |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in results["rows"].items():
        score, reward = (
            _percent(row["score"]),
            f"{row['reward'][0]:.4f} ({row['reward'][1]:.4f} to {row['reward'][2]:.4f})",
        )
        lines.append(f"| {name} | {score} | {reward} | {row['forwards']:.2f} | {row['passes']:.2f} |")
    over, difference = results["over"], _percent(results["difference"], "+")
    return "\n".join([*lines, "", f"This policy minus {over}, by instance: {difference} points."])


def _percent(values: Sequence[float], sign: str = "") -> str:
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in values)
    return f"{mean} ({low} to {high})"
