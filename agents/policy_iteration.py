"""Policy iteration from rewards alone: the values of single decisions by play, at the states where there is one.

Nearly every state of a game is certain: the denoiser is sure of some position, and filling it costs nothing. What
decides a board is one or two *uncertain* states. So each iteration

1. plays new puzzles to their first uncertain state, and from there to the next ones;
2. evaluates: there every candidate position is filled once and the board finished (by the reference in the first
   iteration, by the policy later), which gives Q(s, a), the reward;
3. improves: the policy's belief q is fitted so that q_a(v_a), what it gives to the symbol v_a that the denoiser would
   fill in at a, is Q(s, a). A reward of 0 or 1 is then whether that symbol was right, and others are a regression.

The policy is g(a | s) exp(Q(s, a) / beta), normalised: for this Q the exact optimum of E[Q] - beta KL(pi || g) (the
improvement step of KL-regularised policy iteration, for example Geist et al. 2019, arXiv 1901.11275, eq. 4).

Of sets a position's value hardly depends on the others, and one finished board that was rewarded tells it of all
positions at once: it takes the answer's place in imitation of the oracle (expert iteration; Anthony et al. 2017, arXiv
1705.08439, with the policy's own best play as the expert).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.policy import OrderPolicy, belief_log_odds
from agents.remask_policy import RemaskPolicy
from agents.setup import TrainConfig, descend, finish, make_optimizer, setup
from agents.states import States
from pretrain.checkpoint import step_generator
from pretrain.masking import gumbel
from pretrain.run import Run, set_learning_rate
from tasks.settings import AtLeast1, AtLeast2, NotNegative, Positive
from unmask_env.distributions import Categorical, ranked
from unmask_env.process import Unmasking
from unmask_env.reference import Policy, Reference
from unmask_env.state import Observation, State

FOLLOWED = 0.1  # temperature of the values by which play goes on from a state that was evaluated
WARMUP = 50  # steps over which the learning rate rises


# ---------------------------------------------------------------------- settings
@dataclass(frozen=True)
class PolicyIterationConfig(TrainConfig):
    """Policy iteration from rewards alone, against a reference policy."""

    reference: str | None = None
    """the reference policy g, with its options; default: softmax_confidence, and soft_threshold for sets"""
    beta: Positive = 1e-3
    """weight of the KL from the reference, in units of reward: the temperature of the values (single positions)"""
    fill_temperature: NotNegative = 0.0
    """0 fills greedily; 1 samples the denoiser's distribution, and asks for several ``continuations``"""
    iterations: AtLeast1 = 4
    """rounds of play and fitting"""
    puzzles: AtLeast1 = 1000
    """instances played in each"""
    steps: AtLeast1 = 200
    """of AdamW in each"""
    batch: AtLeast1 = 128
    """states per step"""
    rows: AtLeast1 = 500
    """boards per forward while playing"""
    lr: NotNegative = 2e-3
    weight_decay: NotNegative = 0.01
    candidates: AtLeast2 = 64
    """positions that are tried at a state, drawn from the reference where there are more"""
    continuations: AtLeast1 = 1
    """how often each is played to the end; the value is the mean. The same random numbers fill the boards of all
    candidates of a state"""
    sampled: bool = False
    """play on by samples of the policy instead of its most likely positions, the divergence on the way counted against
    the reward: the values are then those of the regularised objective at any beta"""
    levels: AtLeast1 = 6
    """uncertain states of a board that are evaluated at most, one after the other"""
    capacity: AtLeast1 = 4000
    """states kept to fit; the oldest are forgotten"""
    save_every: AtLeast1 = 100
    log_every: AtLeast1 = 20


# ---------------------------------------------------------------------- play
@dataclass(frozen=True)
class Player:
    """Plays boards to their end, or to their next uncertain state.

    Where that changes no reward it fills all positions that are as confident as ``defer_above`` in one forward: the
    same boards, in a third of the forwards.

    Attributes:
        process: under rules that allow ``policy`` its actions.
        beta: above 0, beta * log(pi / g) of every action counts against the reward; g is ``reference``.
    """

    process: Unmasking
    policy: Policy
    reference: Reference
    defer_above: float
    beta: float = 0.0

    @classmethod
    def of(cls, process: Unmasking, policy: Policy, reference: Reference, defer_above: float, beta: float) -> Player:
        """One that hurries where it may: rewards do not count forwards, and nothing is drawn."""
        rules = process.rules
        if rules.nfe_budget is None and rules.speed == 0 and process.temperature == 0 and beta == 0:
            process = replace(process, rules=replace(rules, actions="set", remask_budget=None))
        return cls(process, policy, reference, defer_above, beta)

    def certain(self, seen: Observation) -> Tensor:
        """(N, L) bool: fillable positions that are as confident as ``defer_above``."""
        return (seen.confidence >= self.defer_above) & seen.fillable

    def act(self, seen: Observation, certain: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """An action (N, L) bool, and what it costs (N,)."""
        cost = torch.zeros(len(certain), device=certain.device)
        if self.process.rules.actions == "set":
            action, rows = certain, (~certain.any(1)).nonzero().squeeze(1)
            if len(rows):
                action = action.index_put((rows,), self.policy(seen[rows]).act(generator))
            return action, cost
        pi = self.policy(seen)
        action = pi.act(generator)
        if self.beta > 0:
            cost = self.beta * (pi.log_prob(action) - self.reference(seen).log_prob(action))
        return action, cost

    def play(
        self,
        state: State,
        generator: torch.Generator,
        sample: bool = False,
        to_uncertain: bool = False,
        group: Tensor | None = None,
    ) -> tuple[State, Tensor]:
        """The rows at their end, or at their next uncertain state, and what each was rewarded (N,) on the way.

        Args:
            sample: the policy; else its mode is played.
            group: (N,) int64; rows of the same group fill with the same random numbers. None: each with its own.
        """
        reward = torch.zeros(len(state), device=self.process.device)
        rows = torch.arange(len(state), device=reward.device)
        group = rows if group is None else group
        ended: list[tuple[Tensor, State]] = []
        while len(rows):
            seen = self.process.observe(state)
            certain = self.certain(seen)
            over = state.done | ~certain.any(1) if to_uncertain else state.done
            if bool(over.any()):
                ended.append((rows[over], state[over]))
                rows, state, seen, certain = rows[~over], state[~over], seen[~over], certain[~over]
                if not len(rows):
                    break
            action, cost = self.act(seen, certain, generator if sample else None)
            uniform = None
            if self.process.temperature > 0:
                shape = (int(group.max()) + 1, state.tokens.shape[1])
                uniform = torch.rand(shape, generator=generator, device=reward.device)[group[rows]]
            state, gained = self.process.step(state, seen, action, uniform)
            reward[rows] += gained - cost
        order = torch.cat([part for part, _ in ended]).argsort()
        return State.join([part for _, part in ended], torch.cat)[order], reward


def in_parts(state: State, rows: int) -> list[State]:
    """The rows of ``state``, ``rows`` at a time."""
    return [state[part] for part in torch.arange(len(state), device=state.tokens.device).split(max(1, rows))]


# ---------------------------------------------------------------------- evaluation: values of single decisions
def values_of(
    config: PolicyIterationConfig, player: Player, seen: Observation, state: State, generator: torch.Generator
) -> Tensor:
    """(S, L) float32: the mean reward after filling each candidate of each state; NaN at other positions.

    Args:
        seen: the observation of ``state``.
    """
    g = player.reference(seen).entry_log_probs()
    noisy = (g + gumbel(g, generator)).masked_fill(g == -torch.inf, -torch.inf)
    asked = (ranked(noisy, seen.fillable) < config.candidates) & (g > -torch.inf)
    values = torch.full(g.shape, torch.nan, device=g.device)
    per_state, times = int(asked.sum(1).max()), config.continuations
    for part in torch.arange(len(state), device=g.device).split(max(1, config.rows // (per_state * times))):
        rows, positions = (index.repeat_interleave(times) for index in asked[part].nonzero(as_tuple=True))
        action = torch.zeros(len(rows), g.shape[1], dtype=torch.bool, device=g.device)
        action = action.scatter(1, positions.unsqueeze(1), True)
        group = rows * times + torch.arange(len(rows), device=g.device) % times
        uniform = None
        if player.process.temperature > 0:
            shape = (len(part) * times, g.shape[1])
            uniform = torch.rand(shape, generator=generator, device=g.device)[group]
        forked, reward = player.process.step(state[part][rows], seen[part][rows], action, uniform)
        reward = reward + player.play(forked, generator, config.sampled, group=group)[1]
        total = torch.zeros(len(part), g.shape[1], device=g.device)
        total.index_put_((rows, positions), reward / times, accumulate=True)
        values[part] = torch.where(asked[part], total, torch.nan)
    return values


@torch.no_grad()
def evaluate(
    config: PolicyIterationConfig, player: Player, states: States, generator: torch.Generator
) -> dict[str, float]:
    """Play new puzzles from one uncertain state to the next, and add to ``states`` those where the choice matters, with
    the values of its candidates; what to log."""
    task = player.process.task
    state = player.process.reset(task.sample(config.puzzles, generator))
    state = state[(state.masked.sum(1)).argsort(stable=True)]  # rows of a part end together
    counted = {"states": 0, "informative": 0}
    for _ in range(config.levels):
        reached = [player.play(part, generator, to_uncertain=True)[0] for part in in_parts(state, config.rows)]
        state = State.join(reached, torch.cat)
        state = state[~state.done]
        if not len(state):
            break
        followed = []
        for part in in_parts(state, config.rows):
            seen = player.process.observe(part)
            values = values_of(config, player, seen, part, generator)
            known = ~values.isnan()
            most, least = values.nan_to_num(-torch.inf).amax(1), values.nan_to_num(torch.inf).amin(1)
            matters = most > least
            counted["states"] += len(part)
            counted["informative"] += int(matters.sum())
            answers = seen.denoised.best.masked_fill(~known, task.mask_id)
            given, count = part.instances.tokens, part.remask_count
            columns = {"tokens": part.tokens, "answers": answers, "given": given, "values": values}
            columns |= {"remask_count": count, "uncertain": torch.ones_like(matters)}
            states.add(config.capacity, **{name: column[matters] for name, column in columns.items()})
            goes_on = (most > 0) | config.sampled  # a board that is lost has nothing more to tell
            scores = player.reference(seen).entry_log_probs() + values / max(FOLLOWED, player.beta)
            hopeful = known & ((values > least.unsqueeze(1)) | ~matters.unsqueeze(1) | config.sampled)
            action = Categorical.of(scores.masked_fill(~hopeful, 0.0), hopeful).sample(generator)
            uniform = player.process.uniform(part, generator if player.process.temperature > 0 else None)
            following, _ = player.process.step(part, seen, action, uniform)
            followed.append(following[goes_on & ~following.done])
        state = State.join(followed, torch.cat)
        if not len(state):
            break
    return {name: float(value) for name, value in counted.items()}


# ---------------------------------------------------------------------- improvement
def set_value_range(policy: OrderPolicy, states: States) -> None:
    """The ends of the policy's values: 0 and 1 where rewards are; else those of the advantages, the differences from
    the mean of a state's candidates, which is all that a choice depends on."""
    values = states.values[~states.values.isnan()]
    if not bool(((values == 0) | (values == 1)).all()):
        most = float((states.values - states.values.nanmean(1, keepdim=True)).nan_to_num(0.0).abs().max())
        policy.head.value_range.copy_(torch.tensor([-most, most]))


def value_loss(policy: OrderPolicy, seen: Observation, values: Tensor) -> Tensor:
    """Scalar: cross-entropy, averaged over candidates and passes, of Bernoulli variables of these odds to the values in
    their range; its minimum is at their mean, as that of a squared error.

    Args:
        values: (N, L), NaN where they are not known.
    """
    low, high = policy.head.value_range
    known = ~values.isnan()
    if float(low) < 0:
        values = values - values.nanmean(1, keepdim=True)
    target = ((values - low) / (high - low)).nan_to_num(0.0).clamp(0.0, 1.0)
    beliefs, read = policy.read(seen)
    odds = [belief_log_odds(seen, belief, seen.denoised.best) for belief in beliefs[:-1]]
    odds.append(policy.head.log_odds(seen, beliefs[-1], read))
    parts = [F.binary_cross_entropy_with_logits(each, target, reduction="none") for each in odds]
    return sum((part * known).sum() for part in parts) / known.sum().clamp(min=1) / len(parts)


def batch_of(
    config: PolicyIterationConfig, process: Unmasking, states: States, generator: torch.Generator
) -> tuple[Observation, Tensor]:
    """States under new symmetries, as a policy sees them, and (N, L) the values of their candidates. A value is known
    where the denoiser's symbol is the one that was tried."""
    drawn = states.sample(process.task, config.batch, 0.0, generator)
    seen = replace(process, rules=replace(process.rules, block_length=None)).observe(drawn.state(process))
    return seen, drawn.values.masked_fill((drawn.answers != seen.denoised.best) | ~seen.masked, torch.nan)


# ---------------------------------------------------------------------- the loop
def train(config: PolicyIterationConfig, process: Unmasking | None = None) -> OrderPolicy | RemaskPolicy:
    """Train an order policy by policy iteration and save it in ``config.out``.

    ``process`` and what is raised are as in :func:`agents.upo.train`.
    """
    config, process, g, policy = setup(config, process, belief_weight=1.0, beta=config.beta)
    optimizer, states = make_optimizer(config, policy), States(process.task)
    total, beta = config.iterations * config.steps, config.beta if config.sampled else 0.0
    run = Run(config, total, {"policy": policy, "optimizer": optimizer, "states": states}, "policy iteration")
    with run:
        for step in run.loop():
            iteration, within = divmod(step, config.steps)
            if within == 0:
                run.note(f"iteration {iteration + 1}: playing")
                first = iteration == 0 and config.init is None
                player = Player.of(process, g if first else policy.eval(), g, policy.config.defer_above, beta)
                generator = step_generator(process.device, config.seed, iteration, 4 << 16)
                scalars = evaluate(config, player, states, generator)
                if first and len(states):
                    set_value_range(policy, states)
                run.log({f"play/{name}": value for name, value in scalars.items()})
            policy.train()
            generator = step_generator(process.device, config.seed, step, 5 << 16)
            seen, values = batch_of(config, process, states, generator)
            decay = 0.52 + 0.48 * math.cos(math.pi * step / total)
            set_learning_rate(optimizer, config.lr * decay * min(1.0, (step + 1) / WARMUP))
            loss = value_loss(policy, seen, values)
            descend(config, optimizer, list(policy.parameters()), loss)
            if (step + 1) % config.log_every == 0:
                run.log({"loss": loss.item()}, f"loss {loss.item():.3f}, {len(states)} states")
    return finish(config, policy)
