"""Supervised pretraining of an order policy: imitate a reference, or an oracle that sees the answers.

Nearly all states are certain: on minimal 6x6 puzzles a confident denoiser is right, and what decides a board is one or
two *uncertain* states where no position is confident. So the run first plays boards to collect uncertain states (and a
few others), then trains on those, each time under a fresh symmetry and with a fresh denoiser forward.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.cards import publisher
from agents.policy import OrderPolicy, belief_log_prob, new_policy
from agents.remask_policy import RemaskPolicy
from agents.setup import (
    TrainConfig,
    annealed,
    descend,
    load_init,
    make_optimizer,
    process_of,
    require_masks,
)
from agents.states import States
from agents.validation import Validation
from pretrain import processes
from pretrain.checkpoint import step_generator
from pretrain.run import Run, set_learning_rate
from tasks import Task, UnmaskError
from tasks.settings import AtLeast0, AtLeast1, NotNegative, Positive, Share, validate
from unmask_env.process import Unmasking
from unmask_env.reference import Oracle, Reference, default_reference, reference
from unmask_env.state import FLOOR, Observation, Rules

CERTAIN_FRACTION = {"single": 0.15, "set": 0.15, "set+remask": 0.4}
MANY_TIMES = 30  # over which a state that looks the same each time is learned by heart


# ---------------------------------------------------------------------- settings
@dataclass(frozen=True)
class ImitationConfig(TrainConfig):
    """Imitation of a reference policy, or of an oracle that sees the answers.

    Of single positions, ``init`` replaces ``policy``. Over sets it also plays the boards to learn on, so that they are
    boards of its own (DAgger, Ross et al. 2011); where positions may be masked again, only when to do so is learned,
    by a second network, and filling stays as it is.
    """

    reference: Literal["oracle", "max_confidence", "margin", "entropy", "softmax_confidence", "softmax_margin"] = (
        "oracle"
    )
    """what to imitate; the oracle sees the answers and never picks a position whose top symbol is wrong. With another
    reference every board is read, and collected, not the uncertain ones only"""
    error_cost: Positive = 20.0
    """cost of one wrong symbol relative to one position left masked (sets only). Even odds of filling a position then
    mean that its symbol is right with probability error_cost / (1 + error_cost)"""
    puzzles: AtLeast1 = 3000
    """instances played to collect states, over all processes"""
    certain_fraction: Share | None = None
    """share of each batch that is not uncertain or, where positions may be masked again, holds no wrong symbol;
    default: 0.15, or 0.4"""
    steps: AtLeast1 = 800
    batch: AtLeast1 = 128
    """states per step, over all processes"""
    lr: NotNegative = 2e-3
    weight_decay: NotNegative = 0.01
    log_every: AtLeast1 = 20
    save_every: AtLeast1 = 200
    validate_every: AtLeast0 = 200


def check(config: ImitationConfig) -> ImitationConfig:
    """``config`` with its defaults filled in: what a run is resumed with is what it was, not what was left out.

    Raises:
        UnmaskError: settings that are out of range or do not fit each other.
    """
    validate(config)
    require_masks(config.rules)
    if config.certain_fraction is None:
        config = replace(config, certain_fraction=CERTAIN_FRACTION[config.rules.actions])
    if config.rules.remask_budget is not None:
        raise UnmaskError("imitation does not count a remask_budget; leave it out, and give it to what comes after")
    if config.reference != "oracle" and config.rules.actions != "single":
        raise UnmaskError(f"over sets the oracle is what can be imitated, not {config.reference}")
    if config.reference != "oracle" and config.init is not None:
        raise UnmaskError(f"init is for imitating the oracle, not {config.reference}; leave out one of the two")
    return config


# ---------------------------------------------------------------------- losses
def choose_right_loss(log_prob: Tensor, right: Tensor) -> Tensor:
    """(N,) -log of the probability of choosing a right position: cross-entropy to the oracle reference, indifferent
    among its right positions.

    Args:
        log_prob: (N, L) of the policy. right: (N, L) bool, some position right in every row.
    """
    return -log_prob.masked_fill(~right, -torch.inf).logsumexp(1)


def belief_loss(seen: Observation, belief: Tensor, answers: Tensor) -> Tensor:
    """(N, L) cross-entropy of a belief (N, L, K) to the answers (N, L); 0 where the answer is not shown."""
    log_prob = belief_log_prob(seen, belief, answers)
    return -log_prob.masked_fill(log_prob <= FLOOR, 0.0) if seen.denoised.log_probs is None else -log_prob


def mean_cross_entropy(odds: Tensor, target: Tensor, among: Tensor) -> Tensor:
    """Scalar: over positions ``among`` (N, L) bool, of Bernoulli variables with log-odds ``odds`` to ``target``."""
    parts = F.binary_cross_entropy_with_logits(odds, target, reduction="none")
    return (parts * among).sum() / among.sum().clamp(min=1)


def imitation_loss(policy: OrderPolicy, target: Reference, seen: Observation, answers: Tensor) -> Tensor:
    """Scalar: cross-entropy -sum_i g(i) log pi(i) to the reference g, averaged over the batch.

    For the oracle, :func:`choose_right_loss` plus the cross-entropy of each pass's belief to the answers at the masked
    positions. Which positions are right is one bit each and often the same bit; the answers teach the reading that
    those bits follow from, and cut what is left of the error several times faster.
    """
    beliefs, states = policy.read(seen)
    pi = policy.head(seen, beliefs[-1], states)
    if not isinstance(target, Oracle):
        return pi.cross_entropy(target(seen)).mean()
    right = replace(target, answers=answers).right(seen)
    some = right.any(1)
    loss = choose_right_loss(pi.log_probs[some], right[some]).sum() / some.sum().clamp(min=1)
    for belief in beliefs:
        reading = belief_loss(seen, belief, answers) * seen.fillable
        loss = loss + (reading.sum(1) / seen.fillable.sum(1)).mean() / len(beliefs)
    return loss


def set_imitation_loss(
    policy: OrderPolicy, seen: Observation, answers: Tensor, error_cost: float = 1.0, fills: bool = True
) -> Tensor:
    """Scalar: cross-entropies of every masked position's top symbol being right, on boards without a mistake and where
    the policy ``fills`` (the remasking half of a policy does not), of every position that may be masked again holding a
    wrong one, and of each pass's belief at both; each a mean over positions."""
    beliefs, states = policy.read(seen)
    fill, *remask = policy.head.log_odds(seen, beliefs[-1], states).split(policy.length, 1)
    # Odds of filling are those of being right over the error cost, of masking again those of being wrong: a wrong
    # symbol costs the board, but a right one masked again leads back to where play was, and round in circles.
    shift, right = math.log(error_cost), seen.denoised.best == answers
    terms, believed = [(fill, shift, right, seen.fillable)], seen.fillable
    if seen.remaskable is not None:
        wrong = seen.remaskable & (seen.tokens != answers)
        # With a mistake on the board nothing is certain, and a policy that doubts every board would hardly fill. What
        # to do about mistakes is the other half's part.
        among = seen.fillable & fills & ~wrong.any(1, keepdim=True)
        terms = [(fill, shift, right, among), (remask[0], 0.0, wrong, seen.remaskable)]
        believed = seen.fillable | seen.remaskable
    loss = fill.new_zeros(())
    for odds, added, label, mask in terms:
        loss = loss + mean_cross_entropy(odds + added, label.to(odds), mask)
    for belief in beliefs:
        reading = belief_loss(seen, belief, answers) * believed
        loss = loss + reading.sum() / believed.sum().clamp(min=1) / len(beliefs)
    return loss


# ---------------------------------------------------------------------- the loop
def train(config: ImitationConfig, process: Unmasking | None = None) -> OrderPolicy | RemaskPolicy:
    """Train an order policy by imitation and save it in ``config.out``.

    ``process`` and what is raised are as in :func:`agents.upo.train`.
    """
    config = check(config)
    process = process_of(config, process)
    task, device, target = process.task, process.device, reference(config.reference)
    mine, rank = processes.share(config, "puzzles", "batch"), processes.rank()
    policy, trained = _policies(config, process)
    optimizer = make_optimizer(config, trained)
    states = States(task)
    rival = reference(default_reference(config.rules.actions)) if target.sees_answers else target
    title = f"imitation {task.name}"
    monitor = Validation(config, process, rival, title, gains=target.sees_answers)
    parts = {"policy": policy, "optimizer": optimizer, "states": states, "validation": monitor}
    how = "imitation" if target.sees_answers else ""
    run = Run(config, config.steps, parts, title, publish=publisher(policy, monitor, lambda: how))
    with run:
        if not len(states):
            run.note("collecting states")
            new = States(task)
            with run.interruptible():
                _collect(mine, process, policy, new)
            new.pool()
            states.load_state_dict(new.state_dict())
            _check_states(config, process, states)
        policy.train()
        for step in run.loop():
            generator = step_generator(device, config.seed, step, 2 << 16, rank)
            drawn = states.sample(task, mine.batch, config.certain_fraction, generator)
            seen, answers = drawn.observe(process), drawn.answers
            if config.rules.actions == "single":
                loss = imitation_loss(trained, target, seen, answers)
            else:
                loss = set_imitation_loss(trained, seen, answers, config.error_cost, trained is policy)
            rate = annealed(config.lr, step, config.steps)
            set_learning_rate(optimizer, rate)
            norm = descend(config, optimizer, list(trained.parameters()), loss)
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps or monitor.due(step + 1):
                scalars = processes.mean({"loss": loss.item(), "gradient/norm": norm, "learning_rate": rate})
                monitor.report(run, policy, scalars, f"loss {scalars['loss']:.3f}", config.batch)
    return policy.eval()


def _policies(config: ImitationConfig, process: Unmasking) -> tuple[OrderPolicy | RemaskPolicy, OrderPolicy]:
    """The policy, and its part that is trained."""
    shape = config.policy if config.reference == "oracle" else replace(config.policy, defer_above=2.0)
    policy = start_sets(replace(config, policy=shape), process)
    return policy, part_to_train(policy, config.rules)


def start_sets(config: TrainConfig, process: Unmasking) -> OrderPolicy | RemaskPolicy:
    """``config.init``, or a new policy that trusts its belief; where positions may be masked again, with a second
    network that learns when."""
    actions = config.rules.actions
    if config.init is None:
        arguments = (process.task, process.denoiser, config.seed)
        return new_policy(config.policy, *arguments, belief_weight=1.0, sets=actions != "single").to(process.device)
    policy = load_init(config, process)
    if isinstance(policy, OrderPolicy) and actions == "set+remask":
        if policy.masks_again:
            raise UnmaskError(
                f"{config.init} masks positions again with the network that fills them; start from a policy that "
                "was trained with --actions set"
            )
        policy = RemaskPolicy.start(policy)
    return policy.to(process.device)


def part_to_train(policy: OrderPolicy | RemaskPolicy, rules: Rules) -> OrderPolicy:
    """Of a policy that also masks again, the network that the actions of ``rules`` are about."""
    if isinstance(policy, OrderPolicy):
        return policy
    return policy.remask if rules.actions == "set+remask" else policy.fill


def _collect(config: ImitationConfig, process: Unmasking, policy: OrderPolicy | RemaskPolicy, states: States) -> None:
    """Fill ``states`` with those of this process's puzzles."""
    generator = step_generator(process.device, config.seed, 0, 3 << 16, processes.rank())
    instances = process.task.sample(config.puzzles, generator)
    if config.rules.actions == "single":
        states.collect(process, instances, policy.config.defer_above, generator)
    else:
        states.collect_sets(process, instances, generator, None if config.init is None else policy)


def _check_states(config: ImitationConfig, process: Unmasking, states: States) -> None:
    """Warn, once for all processes, where the states will not do. Raises :class:`tasks.UnmaskError`: there are none."""
    task = process.task
    if not len(states):
        raise UnmaskError(
            f"no state of {config.puzzles} puzzles has a right and a wrong position to choose between; try more puzzles"
        )
    if processes.rank() > 0:
        return
    uncertain = int(states.uncertain.sum())
    if config.rules.actions == "set+remask" and not uncertain:
        warnings.warn(
            f"no board of {config.puzzles} puzzles came to hold a wrong symbol, so the policy learns to mask nothing "
            "again; take more puzzles, or an environment in which a mistake does not end the episode",
            stacklevel=3,
        )
    share = 1 - config.certain_fraction if 0 < uncertain < len(states) else 1.0
    recurring = uncertain or len(states)
    times = share * config.steps * config.batch / recurring
    if times > MANY_TIMES and type(task).augment is Task.augment:
        warnings.warn(
            f"{task.name} has no symmetries, and each of {recurring} states will be seen about {times:.0f} times as it "
            "is, which learns them by heart; take more puzzles or fewer steps",
            stacklevel=3,
        )
