"""UPO: an order policy trained against a reference policy (Hong et al. 2025, arXiv 2510.05725).

For each instance a group of G trajectories is sampled from the policy, which fill by the same random numbers where
symbols are drawn; a trajectory's advantage is its reward minus the group's mean; clipped ratios raise the probability
of the actions of better trajectories; and a divergence holds the policy near the reference g:

    maximise  E[ r(x_0) ] - beta * D(pi || g)

Denoiser outputs are cached in the rollout (the paper's Algorithm 2), so an update runs the small policy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from agents.cards import publisher
from agents.forks import uncertain_states
from agents.policy import OrderPolicy
from agents.remask_policy import RemaskPolicy
from agents.replay import Replay
from agents.setup import RLConfig, Setup, look_ahead, make_optimizer, minibatch_epochs, setup
from agents.validation import Validation
from pretrain import processes
from pretrain.checkpoint import step_generator
from pretrain.run import Run, set_learning_rate
from tasks import Instances, UnmaskError
from tasks.settings import AtLeast0, AtLeast1, AtLeast2, Positive, ShareBelow1, validate
from unmask_env import exact
from unmask_env.distributions import Categorical, Distribution, NoClosedFormError
from unmask_env.process import Unmasking, checked_reward
from unmask_env.reference import Policy, Reference, default_reference
from unmask_env.reference import reference as named_reference
from unmask_env.state import Observation, Rollout

IMITATION = 20  # iterations that bring a new policy to its reference

Regulariser = Literal["auto", "none", "cross_entropy", "trajectory_kl", "step_kl", "terminal_kl"]


# ---------------------------------------------------------------------- settings
@dataclass(frozen=True)
class UPOConfig(RLConfig):
    """UPO: groups of trajectories, and a divergence from a reference policy."""

    regulariser: Regulariser = "auto"
    """cross_entropy to a deterministic reference, UPO's trajectory_kl estimate, the exact step_kl, or, on boards small
    enough to enumerate, the exact terminal_kl that the others bound; auto takes cross_entropy where the reference is
    deterministic and step_kl elsewhere"""
    puzzles: AtLeast1 = 32
    """groups per iteration, over all processes"""
    group: AtLeast2 = 8
    """trajectories per group (the paper's is 6)"""
    temperature: Positive = 1.0
    """of the policy while sampling single positions (the released code's is 0.8); log-probabilities, ratios and
    divergences are those of the distribution sampled from"""
    over_steps: Literal["sum", "mean"] = "sum"
    """how a trajectory's steps combine: the released code sums, the paper writes a mean"""
    imitation: AtLeast0 | None = None
    """iterations before the others, in which a new policy of belief weight 1 imitates the reference on play of its own;
    0: it is the reference exactly, at belief weight 0. Default: 20; with ``init``, and for stochastic references over
    sets, 0. On a weak 4x4 denoiser UPO gained 0.2 points from the bare reference, 3.1 at belief weight 1, 4.8 at belief
    weight 1 with imitation, and 0.1 with imitation alone (benchmarks/results/upo-start.json)"""
    branch: bool = False
    """fork a group at an uncertain state of a shared greedy play, so that what its rewards differ by was decided from
    there on. The instances that come to one are learned from, the others are not"""
    replay_fraction: ShareBelow1 = 0.0
    """share of instances resampled among those that failed before; 0 trains on fresh ones only"""


# ---------------------------------------------------------------------- what a rollout leaves for the update
class Batch(NamedTuple):
    """Steps of T trajectories, S in all, flattened.

    ``observation`` has S rows; ``action`` (S, A) bool; ``old_log_prob`` (S,) of the actions under the sampling
    distribution; ``trajectory`` (S,) and ``time`` (S,) indices; ``advantage`` (S,).
    """

    observation: Observation
    action: Tensor
    old_log_prob: Tensor
    trajectory: Tensor
    time: Tensor
    advantage: Tensor

    def rows(self, index: Tensor) -> Batch:
        """The batch of the rows ``index``."""
        return Batch(*(part[index] for part in self))


class Tempered(Policy):
    """A policy at a sampling temperature: pi(a)^(1/T), renormalised.

    Args:
        certain: what is played on boards that the policy does not read, as there is nothing to decide: draws from its
            base would only blur what a group's rewards say of its decisions. None: the policy's base.
    """

    def __init__(self, policy: Policy, temperature: float, certain: Policy | None = None) -> None:
        self.policy, self.temperature, self.certain = policy, temperature, certain
        self.actions, self.reads_hidden = policy.actions, policy.reads_hidden

    def __call__(self, seen: Observation) -> Distribution:
        pi = self.policy(seen).tempered(self.temperature)
        if self.certain is None:
            return pi
        reads = self.policy.uncertain(seen).unsqueeze(1)
        return Categorical(torch.where(reads, pi.log_probs, self.certain(seen).log_probs))


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


def flatten(played: Rollout, advantage: Tensor, looks_back: bool = False) -> Batch:
    """The live steps of a recorded rollout, side by side; rows may have had different numbers of masks.

    Args:
        looks_back: keep each step's forward before it, for references that compare the two.
    """
    steps = played.steps
    alive = torch.stack([step.alive for step in steps])  # (steps, T)
    time, trajectory = alive.nonzero(as_tuple=True)

    def live(parts: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(parts))[alive]

    observations = []
    for seen in (step.observation for step in steps):
        # Every step has a forward before it, or none has; that of a first step is never looked at.
        previous = (seen.history.previous or seen.denoised.without_hidden()) if looks_back else None
        observations.append(replace(seen, history=replace(seen.history, previous=previous)))
    action, log_prob = live(step.action for step in steps), live(step.log_prob for step in steps)
    return Batch(Observation.join(observations, live), action, log_prob, trajectory, time, advantage[trajectory])


# ---------------------------------------------------------------------- regularisers
def check_regulariser(config: UPOConfig, reference: Reference) -> str:
    """The regulariser that ``config`` means.

    Raises:
        UnmaskError: a KL to a reference that gives some allowed actions probability 0 (it would be infinite).
    """
    chosen = config.regulariser
    if chosen == "auto":
        chosen = "cross_entropy" if reference.deterministic else "step_kl"
    if config.beta == 0:
        return "none"
    if config.rules.actions != "single":
        if chosen == "terminal_kl":
            raise UnmaskError("terminal_kl enumerates single positions; over sets take step_kl or trajectory_kl")
        if chosen == "step_kl" and config.policy.distribution == "plackett_luce":
            if config.regulariser == "step_kl":
                raise UnmaskError("the KL of Plackett-Luce sets has no closed form; take --regulariser trajectory_kl")
            chosen = "trajectory_kl"
    if chosen.endswith("_kl") and reference.deterministic:
        raise UnmaskError(
            f"the KL to the deterministic reference {config.reference} is infinite; use regulariser cross_entropy, "
            "or a softmax reference"
        )
    return chosen


def trajectory_kl_surrogate(log_prob: Tensor, old: Tensor, target: Tensor, trajectory: Tensor, count: int) -> Tensor:
    """(T,) UPO's score-function surrogate for the trajectory-level KL, which bounds the terminal KL from above.

    stopgrad[ w (1 + log P - log P_ref) ] log P with w = clamp(P / P_old, 0.5, 2), as in the released ``compute_loss``
    but in log space throughout. Its value means nothing; its gradient estimates that of the KL.

    Args:
        log_prob, old, target: (S,) log-probabilities of the actions under the policy, the sampling policy and the
            reference. trajectory: (S,) index of the trajectory, below ``count``.
    """

    def total(values: Tensor) -> Tensor:
        return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, trajectory, values)

    log_p, log_old, log_ref = total(log_prob), total(old), total(target)
    weight = (log_p - log_old).clamp(-10, 10).exp().clamp(0.5, 2.0)
    return (weight * (1 + log_p - log_ref)).detach() * log_p


def terminal_divergence(graph: exact.Graph, policy: Policy, reference: Reference) -> Callable[[], Tensor]:
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
    policy: Policy,
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
    pi = policy(batch.observation)
    log_prob = pi.log_prob(batch.action)  # (S,)
    trajectories, index = batch.trajectory.unique(return_inverse=True)
    count = len(trajectories)
    length = torch.zeros(count, device=log_prob.device).index_add(0, index, torch.ones_like(log_prob))
    per_step = 1.0 / (count * (length[index] if over_steps == "mean" else 1.0))

    ratio = (log_prob - batch.old_log_prob).clamp(-10, 10).exp()
    gain = torch.minimum(ratio * batch.advantage, ratio.clamp(1 - clip, 1 + clip) * batch.advantage)
    loss = -(gain * per_step).sum()
    parts = {"loss/policy": loss.item(), "ratio/clipped": ((ratio - 1).abs() > clip).float().mean().item()}
    if regulariser == "none":
        return loss, parts
    if regulariser == "terminal_kl" and terminal is not None:
        divergence = terminal()
        return loss + beta * divergence, parts | {"divergence/terminal_kl": divergence.item()}
    with torch.no_grad():
        g = reference(batch.observation)
    if regulariser == "trajectory_kl":
        surrogate = trajectory_kl_surrogate(log_prob, batch.old_log_prob, g.log_prob(batch.action), index, count)
        return loss + beta * (surrogate / (length if over_steps == "mean" else 1.0)).mean(), parts
    divergence = pi.kl(g) if regulariser == "step_kl" else pi.cross_entropy(g)
    # Where the denoiser is confident, the policy is its fixed base, which may exclude what the reference would do: an
    # infinite constant that no gradient could change.
    infinite = divergence.isposinf()
    divergence = divergence.masked_fill(infinite, 0.0)
    parts[f"divergence/{regulariser}"] = divergence.mean().item()
    parts["divergence/infinite_share"] = infinite.float().mean().item()
    return loss + beta * (divergence * per_step).sum(), parts


def regularised_advantage(batch: Batch, kl: Tensor, beta: float, group: int) -> Tensor:
    """(S,) advantages with the divergence still to come as a cost: A - beta * (future KL - its group's mean).

    The exact gradient of E[r] - beta * E[sum_n KL_n] has this term beside the gradient of each KL_n, because an action
    also decides which states, and so which KLs, follow (derived; policy gradient with reward-to-go).

    Args:
        kl: (S,) exact per-step KL under the sampling policy.
    """
    trajectories, steps = (int(batch.trajectory.max()) // group + 1) * group, int(batch.time.max()) + 1
    table = torch.zeros(trajectories, steps, device=kl.device).index_put((batch.trajectory, batch.time), kl)
    grouped = (table.flip(1).cumsum(1).flip(1) - table).view(-1, group, steps)
    centred = (grouped - grouped.mean(1, keepdim=True)).view(trajectories, steps)
    return batch.advantage - beta * centred[batch.trajectory, batch.time]


# ---------------------------------------------------------------------- the loop
def train(config: UPOConfig, process: Unmasking | None = None) -> OrderPolicy | RemaskPolicy:
    """Train an order policy with UPO and save it in ``config.out``.

    Under ``torchrun`` the groups are split over the processes, each whole on one of them.

    Args:
        process: its task and denoiser are used instead of looking ``config.env`` and ``config.denoiser`` up.

    Raises:
        UnmaskError: names, sizes or settings that do not fit, an ``out`` that cannot be used or resumed.
        Interrupted: after Ctrl-C, with the state saved.
    """
    validate(config)
    config = with_imitation(config)
    config, process, reference, policy = ready = setup(config, process, belief_weight=float(config.imitation > 0))
    if config.rules.actions != "single" and config.temperature != 1:
        raise UnmaskError(f"policies over sets are sampled at temperature 1, not {config.temperature}")
    regulariser = check_regulariser(config, reference)
    if regulariser == "terminal_kl":
        exact.check_holes(process.task, look_ahead(process.task))
    mine, rank = ready._replace(config=processes.share(config, "puzzles")), processes.rank()
    defers = reference.deterministic and isinstance(policy, OrderPolicy) and policy.actions == "single"
    behaviour = Tempered(policy, config.temperature, reference if defers else None)
    optimizer = make_optimizer(config, policy)
    replay = Replay(process.task, config.replay_fraction)
    title = f"upo {process.task.name}"
    monitor = Validation(config, process, reference, title)
    parts = {"policy": policy, "optimizer": optimizer, "replay": replay, "validation": monitor}
    run = Run(config, config.imitation + config.iterations, parts, title, publish=publisher(policy, monitor))
    with run:
        for step in run.loop():
            iteration = step - config.imitation
            policy.eval()
            if iteration < 0:
                generator = step_generator(ready.device, config.seed, step, 6 << 16, rank)
                scalars = processes.mean(imitate(mine, behaviour, optimizer, generator))
                said = f"imitation {scalars['imitation/cross_entropy']:.3f}"
            else:
                generator = step_generator(ready.device, config.seed, iteration, 1 << 16, rank)
                set_learning_rate(optimizer, config.learning_rate(iteration))
                scalars = processes.mean(improve(mine, behaviour, optimizer, replay, regulariser, generator))
                said = f"reward {scalars['reward/fresh']:.3f} informative {scalars['groups/informative']:.0%}"
            monitor.report(run, policy, scalars, said, int(scalars.pop("steps") * processes.count()))
    return policy.eval()


# ---------------------------------------------------------------------- where a run begins
def with_imitation(config: UPOConfig) -> UPOConfig:
    """``config`` with its number of iterations of imitation filled in.

    Raises:
        UnmaskError: imitation of what is already learned, or of a stochastic reference over sets.
    """
    actions = config.rules.actions
    can = actions == "single" or named_reference(config.reference or default_reference(actions)).deterministic
    if config.imitation is None:
        return replace(config, imitation=IMITATION if config.init is None and can else 0)
    if config.imitation > 0 and config.init is not None:
        raise UnmaskError("imitation of the reference would undo what init has learned; leave out one of the two")
    if config.imitation > 0 and not can:
        raise UnmaskError("over sets only deterministic references are imitated, such as threshold")
    return config


def imitate(
    ready: Setup, behaviour: Policy, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> dict[str, float]:
    """One iteration of imitation: cross-entropy to the reference on states of the policy's own play."""
    config, process, reference, policy = ready
    set_learning_rate(optimizer, config.lr)
    count = config.puzzles * config.group
    instances = process.task.sample(count, generator)
    played = process.rollout(behaviour, instances, generator, fill_stream(process, generator), record=True)
    batch = flatten(played, torch.zeros(count, device=process.device), reference.looks_back)
    policy.train()

    def loss_of(rows: Tensor) -> tuple[Tensor, dict[str, float]]:
        seen = batch.observation[rows]
        loss = policy(seen).cross_entropy(reference(seen)).mean()
        return loss, {"imitation/cross_entropy": loss.item()}

    scalars = minibatch_epochs(config, optimizer, list(policy.parameters()), len(batch.action), loss_of, generator)
    return scalars | {"learning_rate": config.lr, "steps": len(batch.action)}


# ---------------------------------------------------------------------- one iteration
def improve(
    ready: Setup,
    behaviour: Policy,
    optimizer: torch.optim.Optimizer,
    replay: Replay,
    regulariser: str,
    generator: torch.Generator,
) -> dict[str, float]:
    """Play groups, then learn from their rewards; what to log."""
    _, process, reference, policy = ready
    batch, instances, scalars = collect(ready, behaviour, replay, regulariser, generator)
    terminal = None
    if regulariser == "terminal_kl":
        graph = exact.enumerate_boards(process, instances, hidden=policy.reads_hidden)
        terminal = terminal_divergence(graph, behaviour, reference)
    policy.train()
    scalars |= update(ready, behaviour, optimizer, batch, regulariser, terminal, generator)
    rate = optimizer.param_groups[0]["lr"]
    return scalars | {"learning_rate": rate, "steps": len(batch.action)}


def play_groups(
    ready: Setup, behaviour: Policy, replay: Replay, generator: torch.Generator
) -> tuple[Rollout, Instances, Tensor]:
    """``config.puzzles`` groups of trajectories; their instances; and which of these are fresh, (puzzles,) bool."""
    config, process, _, policy = ready
    draws = generator, fill_stream(process, generator)
    if not config.branch:
        instances, fresh = replay.sample(config.puzzles, generator)
        played = process.rollout(behaviour, instances.repeat(config.group), *draws, record=True, group=config.group)
        return played, instances, torch.arange(config.puzzles) < fresh
    # Many instances may come to no such state, so as many are tried as are played below.
    instances, fresh = replay.sample(config.puzzles * config.group, generator)
    above = getattr(policy, "config", config.policy).defer_above
    forks, found = uncertain_states(process, policy, instances, above, generator)
    rows = (~found).int().argsort(stable=True)[: config.puzzles]
    start = forks[rows.repeat_interleave(config.group)]
    played = process.rollout(behaviour, start.instances, *draws, record=True, start=start, group=config.group)
    return played, instances[rows.to(instances.tokens.device)], (rows < fresh).cpu()


def fill_stream(process: Unmasking, generator: torch.Generator) -> torch.Generator | None:
    """What draws the symbols, where they are drawn."""
    return generator if process.draws else None


def collect(
    ready: Setup, behaviour: Policy, replay: Replay, regulariser: str, generator: torch.Generator
) -> tuple[Batch, Instances, dict[str, float]]:
    """Sample groups of trajectories: the batch to learn from, its instances, and what to log."""
    config, process, reference, _ = ready
    played, instances, fresh = play_groups(ready, behaviour, replay, generator)
    reward = played.reward.view(config.puzzles, config.group).cpu()
    solved = reward
    if config.rules.speed > 0:  # what the task gives, without the count of forwards
        solved = checked_reward(process.task, played.tokens, played.state.instances).view_as(reward).cpu()
    replay.add(instances, solved.mean(1) < 1)
    batch = flatten(played, group_advantage(played.reward, config.group, config.normalise), reference.looks_back)
    batch = regularised(ready, behaviour, batch, regulariser)
    if not config.normalise:
        # A group's mean contains the trajectory itself, which shrinks the expected gradient by (G - 1) / G and
        # would let beta weigh more than it says; this makes it the mean of the others.
        batch = batch._replace(advantage=batch.advantage * config.group / (config.group - 1))
    scalars = {
        "reward/fresh": reward[fresh].mean().item(),
        "solved/fresh": solved[fresh].mean().item(),
        "groups/informative": (reward != reward[:, :1]).any(1).float().mean().item(),
        "nfe": played.nfe.float().mean().item(),
    }
    if not bool(fresh.all()):
        scalars["reward/replayed"] = reward[~fresh].mean().item()
    return batch, instances, scalars


def regularised(ready: Setup, behaviour: Policy, batch: Batch, regulariser: str) -> Batch:
    """The batch with the divergence still to come in its advantages, where the regulariser is the exact step KL.

    Raises:
        UnmaskError: the KL is infinite.
    """
    config, _, reference, _ = ready
    if not regulariser.endswith("_kl"):
        return batch
    with torch.no_grad():
        pi, g = behaviour(batch.observation), reference(batch.observation)
        try:
            kl = pi.kl(g)
        except NoClosedFormError:  # estimated by the action that was drawn
            kl = batch.old_log_prob - g.log_prob(batch.action)
    if not bool(kl.isfinite().all()):
        raise UnmaskError(
            f"the policy {config.init} chooses positions that the reference {config.reference} never does, "
            "so the KL is infinite; start from the reference, or use another one or --beta 0"
        )
    if regulariser == "step_kl":
        batch = batch._replace(advantage=regularised_advantage(batch, kl, config.beta, config.group))
    return batch


def update(
    ready: Setup,
    behaviour: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    regulariser: str,
    terminal: Callable[[], Tensor] | None,
    generator: torch.Generator,
) -> dict[str, float]:
    """``config.epochs`` passes over the batch in minibatches of trajectories; what to log, averaged."""
    config, _, reference, policy = ready

    def loss_of(chosen: Tensor) -> tuple[Tensor, dict[str, float]]:
        part = batch.rows(torch.isin(batch.trajectory, chosen).nonzero().squeeze(1))
        weights = (config.beta, config.clip, config.over_steps)
        return upo_loss(behaviour, reference, part, regulariser, *weights, terminal)

    count = config.puzzles * config.group
    return minibatch_epochs(config, optimizer, list(policy.parameters()), count, loss_of, generator)
