"""UPO: an order policy trained against a reference policy (Hong et al. 2025, arXiv 2510.05725).

Read from top to bottom: settings, regularisers, the loss, the loop. For each instance a group of G trajectories is
sampled from the policy; a trajectory's advantage is its reward minus the group's mean; clipped ratios raise the
probability of the positions chosen on better trajectories; and a divergence holds the policy near the reference g:

    maximise  E[ r(x_0) ] - beta * D(pi || g)

Denoiser outputs are cached in the rollout (the paper's Algorithm 2), so an update runs the small policy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from agents.divergences import categorical_kl, cross_entropy, trajectory_kl_surrogate
from agents.learner import LearnerConfig, look_ahead, prepare, require_groups
from agents.mining import Pool
from agents.policy import OrderPolicy
from pretrain.checkpoint import save_model, step_generator
from pretrain.run import Run, decayed_groups, set_learning_rate
from tasks import Task, UnmaskError
from unmask_env import exact, set_laws
from unmask_env.core import Denoised, Observation, Rollout, rollout
from unmask_env.denoiser import Denoiser
from unmask_env.parallel import SetReference
from unmask_env.reference import Reference

Regulariser = Literal["auto", "none", "cross_entropy", "trajectory_kl", "step_kl", "terminal_kl"]


@dataclass(frozen=True)
class UPOConfig(LearnerConfig):
    """UPO: groups of trajectories, and a divergence from a reference policy."""

    regulariser: Regulariser = "auto"
    """cross_entropy to a deterministic reference, UPO's trajectory_kl estimate, the exact step_kl, or, on boards small
    enough to enumerate, the exact terminal_kl that the others bound; auto takes cross_entropy where the reference is
    deterministic and step_kl elsewhere"""
    puzzles: int = 32
    """groups per iteration"""
    group: int = 8
    """trajectories per group (the paper's is 6)"""
    temperature: float = 1.0
    """of the order while sampling (the released code's is 0.8); log-probabilities, ratios and divergences are those of
    the distribution sampled from"""
    over_steps: Literal["sum", "mean"] = "sum"
    """how a trajectory's steps combine: the released code sums, the paper writes a mean"""
    mine: float = 0.75
    """share of instances resampled among those that went wrong before; 0 trains on fresh ones only"""


# ---------------------------------------------------------------------- what a rollout leaves for the update
class Batch(NamedTuple):
    """Steps of T trajectories, S in all, flattened.

    ``observation`` has S rows; ``action`` (S,); ``old_log_prob`` (S,) of the actions under the sampling distribution;
    ``trajectory`` (S,) and ``time`` (S,) indices; ``advantage`` (S,).
    """

    observation: Observation
    action: Tensor
    old_log_prob: Tensor
    trajectory: Tensor
    time: Tensor
    advantage: Tensor

    def rows(self, index: Tensor) -> Batch:
        return Batch(*(part[index] for part in self))


class Tempered:
    """An order at a sampling temperature: pi(i)^(1/T), renormalised."""

    def __init__(self, policy: OrderPolicy, temperature: float) -> None:
        self.policy, self.temperature = policy, temperature

    def log_prob(self, observation: Observation) -> Tensor:
        log_prob = self.policy.log_prob(observation)
        if self.temperature == 1.0:
            return log_prob
        open_somewhere = observation.open.any(1, keepdim=True)
        allowed = log_prob > -torch.inf
        scaled = (log_prob.masked_fill(~allowed, 0.0) / self.temperature).masked_fill(~allowed, -torch.inf)
        return torch.where(open_somewhere, scaled.log_softmax(1), log_prob)

    def log_prob_of(self, observation: Observation, action: Tensor) -> Tensor:
        """(S,) log-probabilities of sets (S, A), which have no temperature."""
        return self.policy.log_prob_of(observation, action)

    def sample(self, observation: Observation, generator: torch.Generator | None) -> Tensor:
        return self.policy.sample(observation, generator)


def group_advantage(reward: Tensor, group: int, normalise: bool) -> Tensor:
    """(T,) reward minus its group's mean, over the group's standard deviation if asked for.

    A group whose rewards are all equal has advantage exactly 0: it carries no signal.
    """
    grouped = reward.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    centred = torch.where((grouped == grouped[:, :1]).all(1, keepdim=True), 0.0, centred)
    if normalise:
        centred = centred / (grouped.std(1, keepdim=True) + 1e-4)
    return centred.flatten()


def flatten(played: Rollout, advantage: Tensor) -> Batch:
    """The live steps of a recorded rollout, side by side; rows may have had different numbers of holes."""
    steps = played.steps
    alive = torch.stack([s.alive for s in steps])  # (steps, T)
    time, trajectory = alive.nonzero(as_tuple=True)
    remask = steps[0].observation.reopenable is not None
    observation = Observation(
        torch.stack([s.observation.tokens for s in steps])[alive],
        torch.stack([s.observation.open for s in steps])[alive],
        Denoised.join([s.observation.denoised for s in steps], lambda part: torch.stack(list(part))[alive]),
        torch.stack([s.observation.reopenable for s in steps])[alive] if remask else None,
        torch.stack([s.observation.reopened for s in steps])[alive] if remask else None,
    )
    action = torch.stack([s.action for s in steps])[alive]
    old = torch.stack([s.log_prob for s in steps])[alive]
    return Batch(observation, action, old, trajectory, time, advantage[trajectory])


# ---------------------------------------------------------------------- regularisers
def check_regulariser(config: UPOConfig, reference: Reference) -> str:
    """The regulariser that ``config`` means.

    Raises:
        UnmaskError: a KL to a reference that gives some open positions probability 0 (it would be infinite).
    """
    chosen = config.regulariser
    if chosen == "auto":
        chosen = "cross_entropy" if reference.deterministic else "step_kl"
    if config.beta == 0:
        return "none"
    if config.rules.actions != "single":
        if chosen == "terminal_kl":
            raise UnmaskError("terminal_kl enumerates single positions; over sets take step_kl or trajectory_kl")
        if chosen == "step_kl" and config.shape.law == "plackett_luce":
            if config.regulariser == "step_kl":
                raise UnmaskError("the KL of Plackett-Luce sets has no closed form; take --regulariser trajectory_kl")
            chosen = "trajectory_kl"
    if chosen.endswith("_kl") and reference.deterministic:
        raise UnmaskError(
            f"the KL to the deterministic reference {config.reference} is infinite; use regulariser cross_entropy, "
            "or a softmax reference"
        )
    return chosen


def terminal_divergence(graph: exact.Graph, policy: Tempered, reference: Reference) -> Callable[[], Tensor]:
    """KL(p_pi || p_g) of the finished sequences, exact and differentiable, as a function of the policy as it is.

    Averaged over the instances of ``graph``. The paper's objective has this KL; its loss bounds it by the trajectory's.
    """
    with torch.no_grad():
        log_reference = exact.tabulate(graph, reference)

    def divergence() -> Tensor:
        values = exact.evaluate(graph, exact.tabulate(graph, policy), log_reference)
        return (graph.weight * values.terminal_kl).sum()

    return divergence


# ---------------------------------------------------------------------- the loss
def upo_loss(
    policy: Tempered,
    reference: Reference,
    batch: Batch,
    regulariser: str,
    beta: float,
    clip: float,
    over_steps: str = "sum",
    terminal: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Mean over trajectories of the clipped policy-gradient loss plus ``beta`` times the divergence.

    L_pg = - sum_n min(rho_n A, clip(rho_n, 1 - eps, 1 + eps) A), rho_n = pi(a_n | x_n) / pi_old(a_n | x_n).

    Args:
        terminal: the regulariser ``terminal_kl``, from :func:`terminal_divergence`.

    Returns:
        The scalar loss, and parts to log.
    """
    sets = batch.action.ndim > 1
    log_prob = None if sets else policy.log_prob(batch.observation)  # (S, L)
    if log_prob is None:
        taken = policy.log_prob_of(batch.observation, batch.action)
    else:
        taken = log_prob.gather(1, batch.action.unsqueeze(1)).squeeze(1)
    trajectories, index = batch.trajectory.unique(return_inverse=True)
    count = len(trajectories)
    length = torch.zeros(count, device=taken.device).index_add(0, index, torch.ones_like(taken))
    per_step = 1.0 / (count * (length[index] if over_steps == "mean" else 1.0))

    ratio = (taken - batch.old_log_prob).clamp(-10, 10).exp()
    gain = torch.minimum(ratio * batch.advantage, ratio.clamp(1 - clip, 1 + clip) * batch.advantage)
    loss = -(gain * per_step).sum()
    clipped = ((ratio - 1).abs() > clip).float().mean()
    parts = {"loss/policy": loss.item(), "ratio/clipped": clipped.item()}
    if regulariser == "none":
        return loss, parts
    if regulariser == "terminal_kl" and terminal is not None:
        regular = terminal()
        return loss + beta * regular, parts | {"divergence/terminal_kl": regular.item()}
    with torch.no_grad():
        log_ref = None if sets else reference.log_prob(batch.observation)
    if regulariser == "trajectory_kl":
        if log_ref is None:
            target = reference.log_prob_of(batch.observation, batch.action)
        else:
            target = log_ref.gather(1, batch.action.unsqueeze(1)).squeeze(1)
        divergence = trajectory_kl_surrogate(taken, batch.old_log_prob, target, index, count)
        regular = (divergence / (length if over_steps == "mean" else 1.0)).mean()
    else:
        if log_prob is None or log_ref is None:
            each = set_divergence(policy.policy, reference, batch.observation, regulariser)
        else:
            each = categorical_kl(log_prob, log_ref) if regulariser == "step_kl" else cross_entropy(log_ref, log_prob)
        # Where the denoiser is sure, the policy is its fixed base, which may exclude what the reference would do: an
        # infinite constant that no gradient could change.
        infinite = each.isposinf()
        each = each.masked_fill(infinite, 0.0)
        regular = (each * per_step).sum()
        parts[f"divergence/{regulariser}"] = each.mean().item()
        parts["divergence/infinite_share"] = infinite.float().mean().item()
    return loss + beta * regular, parts


def set_divergence(policy: OrderPolicy, reference: SetReference, observation: Observation, regulariser: str) -> Tensor:
    """(S,) exact divergence of a policy over sets from a reference: the KL of two laws of independent entries, or the
    cross-entropy to a deterministic reference."""
    if regulariser == "step_kl":
        theirs = reference.log_inclusion(observation)
        return set_laws.independent_kl(policy.log_inclusion(observation), theirs, observation.choices)
    return -policy.log_prob_of(observation, reference.sample(observation, None))


def regularised_advantage(batch: Batch, kl: Tensor, beta: float, group: int) -> Tensor:
    """(S,) advantages with the divergence still to come as a cost: A - beta * (future KL - its group's mean).

    The exact gradient of E[r] - beta * E[sum_n KL_n] has this term beside the gradient of each KL_n, because an action
    also decides which states, and so which KLs, follow (derived; policy gradient with reward-to-go).

    Args:
        kl: (S,) exact per-step KL under the sampling policy.
    """
    trajectories, steps = (int(batch.trajectory.max()) // group + 1) * group, int(batch.time.max()) + 1
    table = torch.zeros(trajectories, steps, device=kl.device).index_put((batch.trajectory, batch.time), kl)
    future = table.flip(1).cumsum(1).flip(1) - table
    grouped = future.view(-1, group, steps)
    centred = (grouped - grouped.mean(1, keepdim=True)).view(trajectories, steps)
    return batch.advantage - beta * centred[batch.trajectory, batch.time]


# ---------------------------------------------------------------------- the loop
def train(config: UPOConfig, task: Task | None = None, denoiser: Denoiser | None = None) -> OrderPolicy:
    """Train an order policy with UPO and save it in ``config.out``.

    Args:
        task, denoiser: used instead of looking ``config.env`` and ``config.denoiser`` up.

    Raises:
        UnmaskError: names, sizes or settings that do not fit, an ``out`` that cannot be used or resumed.
        Interrupted: after Ctrl-C, with the state saved.
    """
    require_groups(config.puzzles, config.group)
    if not 0 < config.temperature < math.inf:
        raise UnmaskError(f"temperature must be greater than 0, not {config.temperature}")
    if not 0 <= config.mine < 1:
        raise UnmaskError(f"mine must be at least 0 and below 1, not {config.mine}")
    config, task, denoiser, reference, policy, device = prepare(config, task, denoiser)
    if config.rules.actions != "single" and config.temperature != 1:
        raise UnmaskError(f"policies over sets are sampled at temperature 1, not {config.temperature}")
    regulariser = check_regulariser(config, reference)
    if regulariser == "terminal_kl":
        exact.check_holes(task, look_ahead(task))
    behaviour = Tempered(policy, config.temperature)
    optimizer = torch.optim.AdamW(decayed_groups(policy, config.weight_decay), lr=config.lr, betas=(0.9, 0.99))
    pool = Pool(task, config.mine)
    run = Run(config, config.iterations, {"policy": policy, "optimizer": optimizer, "pool": pool}, f"upo {task.name}")
    with run:
        for iteration in run.loop():
            generator = step_generator(device, config.seed, iteration, 1 << 16)
            instances, fresh = pool.sample(config.puzzles, generator)
            policy.eval()
            played = rollout(
                task,
                denoiser,
                behaviour,
                instances.repeat(config.group),
                rules=config.rules,
                order_generator=generator,
                temperature=config.fill_temperature,
                fill_generator=generator if config.fill_temperature > 0 else None,
                record=True,
            )
            reward = played.reward.view(config.puzzles, config.group)
            right = reward  # what the task gives, without the count of forwards
            if config.rules.speed > 0:
                right = task.reward(played.state.tokens, instances.repeat(config.group)).view_as(reward)
            pool.add(instances, right.mean(1) < 1)
            batch = flatten(played, group_advantage(played.reward, config.group, config.normalise))
            if regulariser.endswith("_kl"):
                with torch.no_grad():
                    if config.rules.actions == "single":
                        theirs = reference.log_prob(batch.observation)
                        kl = categorical_kl(behaviour.log_prob(batch.observation), theirs)
                    else:  # of Plackett-Luce sets an estimate by what was drawn
                        kl = batch.old_log_prob - reference.log_prob_of(batch.observation, batch.action)
                        if regulariser == "step_kl":
                            kl = set_divergence(policy, reference, batch.observation, "step_kl")
                if not bool(kl.isfinite().all()):
                    raise UnmaskError(
                        f"the policy {config.init} chooses positions that the reference {config.reference} never does, "
                        "so the KL is infinite; start from the reference, or use another one or --beta 0"
                    )
            if regulariser == "step_kl":
                batch = batch._replace(advantage=regularised_advantage(batch, kl, config.beta, config.group))
            if not config.normalise:
                # A group's mean contains the trajectory itself, which shrinks the expected gradient by (G - 1) / G and
                # would let beta weigh more than it says; this makes it the mean of the others.
                batch = batch._replace(advantage=batch.advantage * config.group / (config.group - 1))
            terminal = None
            if regulariser == "terminal_kl":
                graph = exact.enumerate_boards(
                    task, denoiser, instances, config.fill_temperature, hidden=policy.hidden is not None
                )
                terminal = terminal_divergence(graph, behaviour, reference)

            policy.train()
            set_learning_rate(optimizer, config.learning_rate(iteration))
            trajectories = config.puzzles * config.group
            logged: dict[str, list[float]] = {}
            for _ in range(config.epochs):
                shuffled = torch.randperm(trajectories, generator=generator, device=device)
                for chosen in shuffled.chunk(config.minibatches):
                    part = batch.rows(torch.isin(batch.trajectory, chosen).nonzero().squeeze(1))
                    loss, parts = upo_loss(
                        behaviour, reference, part, regulariser, config.beta, config.clip, config.over_steps, terminal
                    )
                    for name, value in parts.items():
                        logged.setdefault(name, []).append(value)
                    if not loss.requires_grad:  # the denoiser was sure throughout: there was nothing to decide
                        continue
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip)
                    optimizer.step()
            informative = (reward != reward[:, :1]).any(1).float().mean().item()
            scalars = {name: sum(values) / len(values) for name, values in logged.items()}
            scalars |= {"reward/fresh": reward[:fresh].mean().item(), "groups/informative": informative}
            if fresh < config.puzzles:
                scalars["reward/mined"] = reward[fresh:].mean().item()
            if config.rules.actions != "single":
                scalars |= {"solved/fresh": right[:fresh].mean().item(), "nfe": played.nfe.float().mean().item()}
            run.log(scalars, f"reward {scalars['reward/fresh']:.3f}, {informative:.0%} of groups informative")
    policy.eval()
    save_model(policy, Path(config.out))
    return policy
