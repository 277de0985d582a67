"""Policy iteration from rewards alone: the values of single decisions by play, at the states where there is one.

Nearly every state of a game is certain: the denoiser is sure of some position, and filling it costs nothing. What
decides a board is one or two *uncertain* states. So each iteration

1. plays new puzzles to their first uncertain state, and from there to the next ones (or, where there are many, to
   some of them);
2. evaluates: there every candidate position is filled once and the board finished (by the reference in the first
   iteration and while all values are 0, else by the policy), which gives Q(s, a), the reward;
3. improves: the policy's belief q is fitted so that q_a(v_a), what it gives to the symbol v_a that the denoiser would
   fill in at a, is Q(s, a). A reward of 0 or 1 is then whether that symbol was right, and others are a regression.

The policy is g(a | s) exp(Q(s, a) / beta), normalised: for this Q the exact optimum of E[Q] - beta KL(pi || g) (the
improvement step of KL-regularised policy iteration, for example Geist et al. 2019, arXiv 1901.11275, eq. 4). Where that
optimum is asked for at any beta (``sampled``) and filling is greedy, the fit also has its divergence from the policy.

Of sets a position's value hardly depends on the others, and one finished board that was rewarded tells it of all
positions at once: it takes the answer's place in imitation of the oracle (expert iteration; Anthony et al. 2017, arXiv
1705.08439, with the policy's own best play as the expert).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from agents.cards import publisher
from agents.imitation import CERTAIN_FRACTION, mean_cross_entropy, part_to_train, set_imitation_loss, start_sets
from agents.policy import OrderPolicy, belief_log_odds
from agents.remask_policy import RemaskPolicy
from agents.setup import Setup, TrainConfig, annealed, descend, make_optimizer, require_masks, setup
from agents.states import States, at_random_threshold
from agents.validation import Validation
from pretrain import processes
from pretrain.checkpoint import step_generator
from pretrain.masking import gumbel
from pretrain.run import Run, set_learning_rate
from tasks import Instances, UnmaskError
from tasks.settings import AtLeast0, AtLeast1, AtLeast2, NotNegative, Positive, Temperature
from unmask_env.distributions import Categorical, ranked
from unmask_env.process import Unmasking
from unmask_env.reference import Policy, Reference, SoftmaxConfidence
from unmask_env.state import Observation, Rules, State

EXPLAINED, GOOD_LABELS = 0.1, 0.9  # of the variance; of boards, and a mean reward: below it labels are called poor
FOLLOWED = 0.1  # temperature of the values by which play goes on from a state that was evaluated
HELD_OUT = 10  # one in so many states is kept from the fit, where values are noisy
BOARD_SUMS = ("sum/finished", "sum/rewarded", "sum/earned")  # to log, of boards that may be labels
BOARDS_MEASURED = 32  # to know how many uncertain states they meet
BOARDS_PER_THRESHOLD = 50  # boards of sets that are played at the same threshold


# ---------------------------------------------------------------------- settings
@dataclass(frozen=True)
class PolicyIterationConfig(TrainConfig):
    """Policy iteration from rewards alone, against a reference policy."""

    reference: str | None = None
    """the reference policy g, with its options; default: softmax_confidence; for sets, where
    validation alone knows it, soft_threshold"""
    beta: Positive = 1e-3
    """weight of the KL from the reference, in units of reward: the temperature of the values (single positions)"""
    fill_temperature: Temperature | None = None
    """0 fills greedily; 1 samples the denoiser's distribution, and asks for several ``continuations``; default: the
    task's"""
    iterations: AtLeast1 = 4
    """rounds of play and fitting"""
    puzzles: AtLeast1 = 1000
    """instances played in each, over all processes"""
    steps: AtLeast1 = 200
    """of AdamW in each"""
    batch: AtLeast1 = 128
    """states per step, over all processes"""
    rows: AtLeast1 = 500
    """boards per forward while playing, of each process"""
    lr: NotNegative = 2e-3
    weight_decay: NotNegative = 0.01
    labels: Literal["auto", "values", "boards"] = "auto"
    """what a state is labelled with: ``boards``, the best finished board that play from it reached, every symbol of
    which then counts as right, or ``values`` of single decisions, each played out. Default: boards; values where
    symbols are drawn or the objective is regularised (``sampled``), as one board's luck says little of a choice, and of
    single positions where several answers are right, as one board then says little of the others"""
    candidates: AtLeast2 | None = None
    """positions that are tried at a state, drawn from the reference where there are more; default: 16, of sets 8"""
    retries: AtLeast0 = 16
    """samples of play until a board is rewarded"""
    error_cost: Positive = 20.0
    """cost of one wrong symbol relative to one position left masked (sets)"""
    continuations: AtLeast1 = 1
    """how often each is played to the end; the value is the mean. The same random numbers fill the boards of all
    candidates of a state"""
    sampled: bool = False
    """play on by samples of the policy instead of its most likely positions, the divergence on the way counted against
    the reward: the values are then those of the regularised objective at any beta"""
    levels: AtLeast1 = 6
    """uncertain states of a board that are evaluated at most, one after the other; spread over the play where there are
    at least twice as many (single positions)"""
    states: AtLeast1 = 1500
    """labelled at most in each iteration, over all processes, where single positions are chosen: on each level half of
    those that are left (the same number, where levels are spread), of boards that are drawn where there are more"""
    capacity: AtLeast1 = 40_000
    """states kept to fit; the oldest are forgotten"""
    save_every: AtLeast1 = 100
    log_every: AtLeast1 = 20
    validate_every: AtLeast0 = 200


# ---------------------------------------------------------------------- play
@dataclass(frozen=True)
class Player:
    """Plays boards to their end, or to their next uncertain state.

    Where that changes no reward it fills all positions that are as confident as ``defer_above`` in one forward: the
    same boards, in a third of the forwards.

    Attributes:
        process: under rules that allow ``policy`` its actions.
        beta: above 0, beta * log(pi / g) of every action counts against the reward; g is ``reference``.
        told: of how many more states were labelled.
    """

    process: Unmasking
    policy: Policy
    reference: Reference
    defer_above: float
    beta: float = 0.0
    told: Callable[[int], None] = lambda states: None

    @classmethod
    def of(cls, process: Unmasking, policy: Policy, reference: Reference, defer_above: float, beta: float) -> Player:
        """One that hurries where it may: rewards do not count forwards, and nothing is drawn."""
        rules = process.rules
        if rules.nfe_budget is None and rules.speed == 0 and process.temperature == 0 and beta == 0:
            process = replace(process, rules=replace(rules, actions="set", remask_budget=None))
        return cls(process, policy, reference, defer_above, beta)

    def uniform(self, group: Tensor, rows: Tensor | slice, generator: torch.Generator) -> Tensor | None:
        """(R, L), the randomness of one step's filling of ``rows``, the same for rows of the same ``group`` (N,); None
        where nothing is drawn."""
        if self.process.temperature == 0:
            return None
        shape = (int(group.max()) + 1, self.process.task.length)
        return torch.rand(shape, generator=generator, device=group.device)[group[rows]]

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
        passing: Tensor | None = None,
    ) -> tuple[State, Tensor]:
        """The rows at their end, or at their next uncertain state, and what each was rewarded (N,) on the way.

        Args:
            sample: the policy; else its mode is played.
            group: (N,) int64; rows of the same group fill with the same random numbers. None: each with its own.
            passing: (N,) int64, how many uncertain states of each row are passed over; counted down in place.
        """
        reward = torch.zeros(len(state), device=self.process.device)
        rows = torch.arange(len(state), device=reward.device)
        group = rows if group is None else group
        ended: list[tuple[Tensor, State]] = []
        while len(rows):
            seen = self.process.observe(state)
            certain = seen.certain(self.defer_above)
            over = state.done
            if to_uncertain:
                uncertain = ~certain.any(1) & ~over
                if passing is not None:
                    passed = uncertain & (passing[rows] > 0)
                    passing[rows] -= passed.long()
                    uncertain = uncertain & ~passed
                over = over | uncertain
            if bool(over.any()):
                ended.append((rows[over], state[over]))
                rows, state, seen, certain = rows[~over], state[~over], seen[~over], certain[~over]
                if not len(rows):
                    break
            action, cost = self.act(seen, certain, generator if sample else None)
            state, gained = self.process.step(state, seen, action, self.uniform(group, rows, generator))
            reward[rows] += gained - cost
        if not ended:
            return state, reward
        order = torch.cat([part for part, _ in ended]).argsort()
        return State.join([part for _, part in ended], torch.cat)[order], reward


def in_parts(state: State, rows: int) -> list[State]:
    """The rows of ``state``, ``rows`` at a time."""
    return [state[part] for part in torch.arange(len(state), device=state.tokens.device).split(max(1, rows))]


# ---------------------------------------------------------------------- labels
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
        uniform = player.uniform(group, slice(None), generator)
        forked, reward = player.process.step(state[part][rows], seen[part][rows], action, uniform)
        reward = reward + player.play(forked, generator, config.sampled, group=group)[1]
        total = torch.zeros(len(part), g.shape[1], device=g.device)
        total.index_put_((rows, positions), reward / times, accumulate=True)
        values[part] = torch.where(asked[part], total, torch.nan)
        player.told(len(part))
    return values


def finished_boards(
    config: PolicyIterationConfig, player: Player, state: State, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(S, L) the best finished board that play from each state reaches, and (S,) what it earned.

    The first try is greedy, further ones sample the policy at uncertain states, until the reward is 1.
    """
    tokens, best = state.tokens.clone(), torch.full((len(state),), -torch.inf, device=state.tokens.device)
    for attempt in range(1 + config.retries):
        for rows in (best < 1).nonzero().squeeze(1).split(config.rows):
            end, reward = player.play(state[rows], generator, sample=attempt > 0)
            better = reward > best[rows]
            tokens[rows[better]], best[rows[better]] = end.tokens[better], reward[better]
    return tokens, best


def label(
    config: PolicyIterationConfig, player: Player, seen: Observation, state: State, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(S, L) symbols; (S, L) what filling each position with its symbol is worth, NaN where that is not known; and (S,)
    the reward of the board that labels, NaN where none does."""
    if config.labels == "values":
        values = values_of(config, player, seen, state, generator)
        symbols = torch.where(values.isnan(), player.process.task.mask_id, seen.denoised.best)
        return symbols, values, values.new_full((len(state),), torch.nan)
    board, reward = finished_boards(config, player, state, generator)
    player.told(len(state))
    return board, torch.where(seen.fillable & (reward > 0).unsqueeze(1), 1.0, torch.nan), reward


def best_symbols_values(labels: str, seen: Observation, answers: Tensor, values: Tensor) -> Tensor:
    """(N, L) what filling each position with the denoiser's symbol is worth, NaN where that is not known: of another
    symbol than the one that was tried nothing is; of another than a rewarded board's it is 0."""
    same = answers == seen.denoised.best
    values = values.masked_fill(~seen.masked, torch.nan)
    return values.masked_fill(~same, torch.nan) if labels == "values" else torch.where(same, values, values * 0.0)


# ---------------------------------------------------------------------- play that meets the states to learn from
@torch.no_grad()
def play_positions(
    config: PolicyIterationConfig, player: Player, states: States, generator: torch.Generator
) -> dict[str, float]:
    """Play new puzzles from one uncertain state to the next, and add to ``states`` those where the choice matters; what
    to log. Where boards meet at least twice as many as ``config.levels``, on average, some are passed over, so that the
    others are of all of the play."""
    process = player.process
    instances = process.task.sample(config.puzzles, generator)
    by_length = (instances.tokens == process.task.mask_id).sum(1).argsort(stable=True)  # rows of a part end together
    state = process.reset(instances[by_length])
    met = informative = 0
    sums = dict.fromkeys(("sum/unexplained", "sum/differing", *BOARD_SUMS), 0.0)
    spread = spread_of(config, player, state)
    for level in range(config.levels):
        reached = []
        for part in in_parts(state, config.rows):
            passing = pass_over(player, part, spread, level, generator) if spread else None
            reached.append(player.play(part, generator, to_uncertain=True, passing=passing)[0])
        state = State.join(reached, torch.cat)
        if bool(state.done.all()):
            break
        followed = []
        # Few boards come to many levels, unless the levels are spread over all of the play.
        share = config.levels - level if spread else 2
        labelled = _some(state[~state.done], max(1, (config.states - met) // share), generator)
        for part in in_parts(labelled, config.rows):
            seen = process.observe(part)
            answers, stored, reward = label(config, player, seen, part, generator)
            values = best_symbols_values(config.labels, seen, answers, stored)
            _count_boards(sums, reward)
            if isinstance(player.policy, OrderPolicy):
                sums["sum/unexplained"] += float(centred(values - predicted_values(player.policy, seen)).square().sum())
                sums["sum/differing"] += float(centred(values).square().sum())
            known = ~values.isnan()
            most = values.masked_fill(~known, -torch.inf).amax(1)
            least = values.masked_fill(~known, torch.inf).amin(1)
            # Where choices are worth the same, the regularised optimum is the reference: to be learned, too.
            matters = (most > least) | (config.sampled & (known.sum(1) > 1))
            _keep(config, states, part[matters], answers[matters], stored[matters])
            met, informative = met + len(part), informative + int(matters.sum())
            # A board that is lost has nothing more to tell, nor has a choice that loses it.
            rows = (known.any(1) & ((most > 0) | config.sampled)).nonzero().squeeze(1)
            hopeful = known & ((values > least.unsqueeze(1)) | ~matters.unsqueeze(1) | config.sampled)
            scores = player.reference(seen).entry_log_probs() + values / max(FOLLOWED, player.beta)
            chosen = Categorical.of(scores.masked_fill(~hopeful, 0.0)[rows], hopeful[rows]).sample(generator)
            uniform = process.uniform(part[rows], generator)
            followed.append(process.step(part[rows], seen[rows], chosen, uniform)[0])
        state = State.join(followed, torch.cat)
    return {"play/states": float(met), "play/informative": float(informative)} | sums


def spread_of(config: PolicyIterationConfig, player: Player, state: State) -> float:
    """How far apart the levels are, in uncertain states per hole of a board, so that they are of all of the play; 0:
    one after the other, as boards meet less than twice as many, on average over some of the rows."""
    where = {"device": state.tokens.device}
    some = state[torch.linspace(0, len(state) - 1, min(len(state), BOARDS_MEASURED), **where).long()]
    most, met = 2 * some.tokens.shape[1], 0
    own = torch.Generator(player.process.device).manual_seed(0)  # so that measuring changes nothing of the play
    for part in in_parts(some, config.rows):
        left = torch.full((len(part),), most, **where)
        player.play(part, own, to_uncertain=True, passing=left)
        met += int((most - left).sum())
    if met < 2 * config.levels * len(some):
        return 0.0
    return met / int((some.instances.tokens == player.process.task.mask_id).sum()) / config.levels


def pass_over(player: Player, state: State, spread: float, level: int, generator: torch.Generator) -> Tensor:
    """(N,) int64, how many uncertain states of each board to pass over before its next level: first a random offset,
    then the distance between levels, rounded at random."""
    apart = spread * (state.instances.tokens == player.process.task.mask_id).sum(1)
    drawn = torch.rand(apart.shape, generator=generator, device=apart.device)
    return (drawn * apart if level == 0 else (apart - 1).clamp(min=0) + drawn).long()


def _count_boards(sums: dict[str, float], reward: Tensor) -> None:
    """Add the boards that were finished for labels, those that are labels, as they earned something, and what these
    earned; ``reward`` (S,), NaN where there is no board."""
    label = reward > 0
    sums["sum/finished"] += float((~reward.isnan()).sum())
    sums["sum/rewarded"] += float(label.sum())
    sums["sum/earned"] += float(reward[label].sum())


def rates(played: dict[str, float]) -> dict[str, float]:
    """What to log of an iteration's play: its sums, which are over all processes, as the shares that they mean.

    ``play/explained_variance``, of the values of single positions, is 1 - sum (Q - q)^2 / sum Q^2 over the candidates
    of states that were not learned from yet, of differences from each state's mean. ``play/labelled`` is the
    share of finished boards that earned something, and so are labels, ``play/best_reward`` their mean reward. What was
    not measured is left out.
    """
    sums = {name.removeprefix("sum/"): total for name, total in played.items() if name.startswith("sum/")}
    told = {name: value for name, value in played.items() if not name.startswith("sum/")}
    if sums.get("differing", 0.0) > 0:
        told["play/explained_variance"] = 1 - sums["unexplained"] / sums["differing"]
    if sums.get("finished", 0.0) > 0:
        told["play/labelled"] = sums["rewarded"] / sums["finished"]
    if sums.get("rewarded", 0.0) > 0:
        told["play/best_reward"] = sums["earned"] / sums["rewarded"]
    return told


def centred(values: Tensor) -> Tensor:
    """(S, L) differences from the mean of a state's known values; 0 where they are not known (NaN)."""
    return (values - values.nanmean(1, keepdim=True)).nan_to_num(0.0)


def predicted_values(policy: OrderPolicy, seen: Observation) -> Tensor:
    """(S, L) what a policy holds filling each position to be worth."""
    beliefs, read = policy.read(seen)
    return policy.head.values(seen, beliefs[-1], read)


def _some(state: State, most: int, generator: torch.Generator) -> State:
    """``most`` rows, drawn, in their order; all where there are no more."""
    if len(state) <= most:
        return state
    drawn = torch.randperm(len(state), generator=generator, device=state.tokens.device)[:most]
    return state[drawn.sort().values]


def _keep(config: PolicyIterationConfig, states: States, state: State, answers: Tensor, values: Tensor) -> None:
    columns = {"tokens": state.tokens, "answers": answers, "given": state.instances.tokens, "values": values}
    uncertain = torch.ones(len(state), dtype=torch.bool)
    states.add(config.capacity, **columns, remask_count=state.remask_count, uncertain=uncertain)


@torch.no_grad()
def play_sets(
    config: PolicyIterationConfig,
    player: Player,
    process: Unmasking,
    policy: OrderPolicy | RemaskPolicy | None,
    states: States,
    generator: torch.Generator,
) -> dict[str, float]:
    """Play new puzzles by sets, at thresholds of every height, and add the states on the way to ``states``, labelled by
    ``player``, who plays one position at a time; what to log.

    Where one answer is right, a puzzle's states share its label; else each is played to its own end.

    Args:
        policy: plays the sets; None: confidence thresholds.
    """
    task = process.task
    instances = task.sample(config.puzzles, generator)
    sums = dict.fromkeys(BOARD_SUMS, 0.0)
    if config.labels == "boards" and (task.one_answer or config.rules.actions == "set+remask"):
        board, reward = finished_boards(config, player, player.process.reset(instances), generator)
        _count_boards(sums, reward)
        rewarded = reward > 0
        won = Instances(instances.tokens[rewarded.cpu()], board[rewarded].cpu())
        if not len(won):
            return {"play/states": 0.0} | sums
        new = States(task)
        new.collect_sets(process, won, generator, policy, won.answers.unsqueeze(1), boards=BOARDS_PER_THRESHOLD)
        columns = {name: column for name, column in vars(new).items() if name != "values"}
        states.add(config.capacity, **columns, values=torch.where(new.tokens == task.mask_id, 1.0, torch.nan))
        return {"play/states": float(len(new))} | sums
    met = kept = 0
    for rows in torch.arange(len(instances)).split(BOARDS_PER_THRESHOLD):
        hasty = at_random_threshold(config.rules, policy, generator)
        filled = generator if process.temperature > 0 else None
        played = process.rollout(hasty, instances[rows], generator if hasty.sampled else None, filled, record=True)
        tokens = torch.cat([step.observation.tokens[step.alive] for step in played.steps])
        whose = torch.cat([step.alive.nonzero().squeeze(1) for step in played.steps])
        start = player.process.reset(instances[rows])[whose]
        for part in in_parts(replace(start, tokens=tokens, masked=tokens == task.mask_id), config.rows):
            seen = player.process.observe(part)
            answers, values, reward = label(config, player, seen, part, generator)
            _count_boards(sums, reward)
            useful = (values > 0).any(1)
            _keep(config, states, part[useful], answers[useful], values[useful])
            met, kept = met + len(part), kept + int(useful.sum())
    return {"play/states": float(met), "play/labelled": kept / max(1, met)} | sums


# ---------------------------------------------------------------------- improvement
def widen_value_range(policy: OrderPolicy, states: States) -> None:
    """The ends of the policy's values: 0 and 1 where rewards are; else those of the advantages, the differences from
    the mean of a state's candidates, which is all that a choice depends on."""
    known = states.values[~states.values.isnan()]
    low, high = policy.head.value_range.tolist()
    ends = [0.0, 1.0]
    if low < 0 or not bool(((known == 0) | (known == 1)).all()):
        most = float(centred(states.values).abs().max())
        most = max(most, high if low < 0 else 0.0)
        ends = [-most, most]
    policy.head.value_range.copy_(torch.tensor(ends))


@torch.no_grad()
def shrink_values(config: PolicyIterationConfig, process: Unmasking, policy: OrderPolicy, heldout: States) -> float:
    """Multiply a policy's values by what they predict of those of states ``heldout``; the factor.

    It is the slope of the line through 0, of differences from each state's mean, at most 1: shrunk so, values are the
    best prediction (in squared error) that is linear in them. The slope is uncertain itself: where it is t standard
    errors, over states, it counts by max(0, 1 - 1 / t^2) (as the positive part of the James-Stein estimator). Values of
    noise, divided by a small beta, would outweigh the reference; at 0 the policy is the reference.
    """
    together, own = [], 0.0
    for rows in torch.arange(len(heldout)).split(config.rows):
        kept = heldout.rows(rows, process.device)
        seen = kept.observe(process)
        values = best_symbols_values(config.labels, seen, kept.answers, kept.values)
        predicted = centred(predicted_values(policy, seen).masked_fill(values.isnan(), torch.nan))
        together.append((predicted * centred(values)).sum(1))
        own += float(predicted.square().sum())
    products = torch.cat(together)
    total, variance = float(products.sum()), float(products.square().sum())
    slope = min(1.0, total / own) * max(0.0, 1 - variance / total**2) if total > 0 else 0.0
    slope = processes.mean({"slope": slope})["slope"]  # the same in all, to the bit
    policy.head.value_range.mul_(slope)
    return slope


def value_loss(policy: OrderPolicy, seen: Observation, values: Tensor, regularised: bool = False) -> Tensor:
    """Scalar: cross-entropy, averaged over candidates and passes, of Bernoulli variables of these odds to the values in
    their range; its minimum is at their mean, as that of a squared error.

    Args:
        values: (N, L), NaN where they are not known.
        regularised: add KL(pi' || pi), averaged over rows, of the improved policy pi' = g exp(Q / beta) from this one,
            both over the candidates. A small beta makes differences count that the values' own loss hardly sees. For
            values without noise: it is not linear in them, so that noise would not average out.
    """
    low, high = policy.head.value_range
    known = ~values.isnan()
    relative = values - values.nanmean(1, keepdim=True) if float(low) < 0 else values
    target = ((relative - low) / (high - low)).nan_to_num(0.0).clamp(0.0, 1.0)
    beliefs, read = policy.read(seen)
    last = policy.head.log_odds(seen, beliefs[-1], read)
    odds = [*(belief_log_odds(seen, belief, seen.denoised.best) for belief in beliefs[:-1]), last]
    loss = sum(mean_cross_entropy(each, target, known) for each in odds) / len(odds)
    if not regularised:
        return loss
    scores = (values.nan_to_num(0.0), policy.head.values(seen, beliefs[-1], read))
    improved, own = (policy.head.over_base(seen, each / policy.head.beta, known) for each in scores)
    return loss + improved.kl(own).mean()


def set_value_loss(policy: OrderPolicy, seen: Observation, values: Tensor, error_cost: float) -> Tensor:
    """Scalar: of sets, the cross-entropies of a position's value being its state's highest, under the odds that it is
    filled and under each pass's belief in its symbol."""
    known = ~values.isnan()
    right = (values >= values.masked_fill(~known, -torch.inf).amax(1, keepdim=True)).float()
    beliefs, read = policy.read(seen)
    fill = policy.head.log_odds(seen, beliefs[-1], read)[:, : policy.length] + math.log(error_cost)
    odds = [belief_log_odds(seen, belief, seen.denoised.best) for belief in beliefs]
    believed = sum(mean_cross_entropy(each, right, known) for each in odds) / len(odds)
    return mean_cross_entropy(fill, right, known) + believed


def loss_of(
    config: PolicyIterationConfig,
    process: Unmasking,
    policy: OrderPolicy | RemaskPolicy,
    states: States,
    generator: torch.Generator,
) -> Tensor:
    """Scalar: of a batch of states under new symmetries and with fresh forwards of the denoiser."""
    certain = CERTAIN_FRACTION[config.rules.actions]
    drawn = states.sample(process.task, config.batch, certain, generator)
    seen = drawn.observe(process)
    if config.rules.actions != "single" and config.labels == "boards":
        trained = part_to_train(policy, config.rules)
        return set_imitation_loss(trained, seen, drawn.answers, config.error_cost, trained is policy)
    values = best_symbols_values(config.labels, seen, drawn.answers, drawn.values)
    if config.rules.actions == "single":
        # Filled greedily, at the optimum all play from a state is worth the same, so that values then have no noise.
        regularised = config.sampled and config.labels == "values" and process.temperature == 0
        return value_loss(policy, seen, values, regularised)
    return set_value_loss(policy, seen, values, config.error_cost)


class OneByOne(Policy):
    """A policy over sets, played one position at a time: in proportion to the odds that each is filled."""

    def __init__(self, policy: OrderPolicy | RemaskPolicy) -> None:
        self.policy, self.reads_hidden = policy, policy.reads_hidden

    def __call__(self, seen: Observation) -> Categorical:
        alone = replace(seen, remaskable=None, remask_count=None)
        return Categorical.of(self.policy.log_odds(alone)[:, : self.policy.length], seen.fillable)


# ---------------------------------------------------------------------- the loop
def train(config: PolicyIterationConfig, process: Unmasking | None = None) -> OrderPolicy | RemaskPolicy:
    """Train an order policy by policy iteration and save it in ``config.out``.

    ``process`` and what is raised are as in :func:`agents.upo.train`.
    """
    config, process, g, policy = _start(config, process)
    mine, rank = processes.share(config, "puzzles", "batch"), processes.rank()
    mine = replace(mine, states=max(1, config.states // processes.count()))
    optimizer, states, heldout = make_optimizer(config, policy), States(process.task), States(process.task)
    noisy = config.rules.actions == "single" and process.draws and not config.sampled
    total, title = config.iterations * config.steps, f"policy iteration {process.task.name}"
    monitor = Validation(config, process, g, title)
    parts = {"policy": policy, "optimizer": optimizer, "states": states, "heldout": heldout, "validation": monitor}
    publish = publisher(policy, monitor, lambda: "rewards" if len(states) else "")
    run = Run(config, total, parts, title, publish, round_length=config.steps)
    with run:
        if idle := _not_used(config):
            run.say(f"{title}: {idle}")
        for step in run.loop():
            iteration, within = divmod(step, config.steps)
            if within == 0:
                run.note(f"iteration {iteration + 1}: playing")
                generator = step_generator(process.device, config.seed, iteration, 4 << 16, rank)
                empty = isinstance(policy, OrderPolicy) and policy.values_are_zero
                trusted = None if empty or (iteration == 0 and config.init is None) else policy.eval()
                new = States(process.task)
                what = f"iteration {iteration + 1}: playing, {{:,}} of up to {{:,}} states"
                told = run.counter(what, min(mine.states, mine.puzzles * mine.levels))
                with run.interruptible():
                    played = _play(mine, process, g, trusted, new, generator, told)
                new.pool()
                numbers = torch.arange(len(new)) + len(states) + len(heldout)
                apart = (numbers % HELD_OUT == HELD_OUT - 1) & noisy
                for pool, rows, size in ((states, ~apart, 1), (heldout, apart, HELD_OUT)):
                    columns = {name: column[rows] for name, column in new.state_dict().items()}
                    pool.add(max(1, config.capacity // size), **columns)
                if not len(states) and iteration == 0:
                    run.say(f"{title}: {_nothing_to_learn(config)}")
                if len(states) and config.rules.actions == "single":
                    widen_value_range(policy, states)
                played = rates(processes.mean(played))
                monitor.cause = _why_not(played)
                run.log(played | {"play/kept": float(len(states))})
            if not len(states):
                continue
            policy.train()
            generator = step_generator(process.device, config.seed, step, 5 << 16, rank)
            loss = loss_of(mine, process, policy, states, generator)
            rate = annealed(config.lr, step, total)
            set_learning_rate(optimizer, rate)
            norm = descend(config, optimizer, list(policy.parameters()), loss)
            due, ends, scalars, fitted = monitor.due(step + 1), within + 1 == config.steps, {}, None
            if len(heldout) and (due or ends):
                fitted = policy.head.value_range.clone()
                scalars["values/slope"] = shrink_values(config, process, policy.eval(), heldout)
                if scalars["values/slope"] == 0:
                    monitor.cause = "its values predict nothing of states that were kept from the fit"
            if (step + 1) % config.log_every == 0 or step + 1 == total or due or scalars:
                scalars |= processes.mean({"loss": loss.item(), "gradient/norm": norm, "learning_rate": rate})
                said = f"iteration {iteration + 1} loss {scalars['loss']:.3f}"
                monitor.report(run, policy, scalars, said, config.batch)
            if fitted is not None and not ends:
                policy.head.value_range.copy_(fitted)
    return policy.eval()


def _start(config: PolicyIterationConfig, process: Unmasking | None) -> Setup:
    """The parts of the run, the settings that were left open filled in.

    Raises:
        UnmaskError: settings that do not fit each other.
    """
    require_masks(config.rules)
    sets, remasks = config.rules.actions != "single", config.rules.actions == "set+remask"
    if sets and config.sampled:
        raise UnmaskError("sampled is for single positions; over sets leave it out")
    if sets and config.beta != PolicyIterationConfig.beta:
        raise UnmaskError("beta is for single positions; over sets leave it out, or train by unmask train upo --beta")
    if sets and config.rules.speed > 0:
        raise UnmaskError(
            "policy iteration over sets does not count forwards, which its threshold trades for reward; leave --speed "
            "out, or train by unmask train upo --speed"
        )
    if remasks and config.labels == "values":
        raise UnmaskError("values of single decisions say nothing of masking again; leave --labels out, or take boards")
    if config.rules.remask_budget is not None:
        raise UnmaskError(
            "policy iteration does not count a remask_budget; leave it out, and give it to what comes after"
        )
    start = {"make": start_sets} if sets else {"belief_weight": 1.0, "beta": config.beta}
    ready = setup(config, process, **start)
    config, process, policy = ready.config, ready.process, ready.policy
    if not sets and policy.head.beta != config.beta:
        made = f"of beta {policy.head.beta:g}" if policy.head.beta else "that has no values"
        raise UnmaskError(
            f"{config.init} is a policy {made}, and beta is {config.beta:g}; start from one of policy-iteration with "
            "this --beta, or leave --init out"
        )
    labels = config.labels
    if labels == "auto":
        drawn = config.sampled or process.temperature > 0
        several = not (sets or process.task.one_answer)
        labels = "values" if (drawn or several) and not remasks else "boards"
    candidates = config.candidates or _most_candidates(sets)
    return ready._replace(config=replace(config, labels=labels, candidates=candidates))


def _most_candidates(sets: bool) -> int:
    return 8 if sets else 16


def _not_used(config: PolicyIterationConfig) -> str:
    """One line on settings, other than their defaults, that nothing in this run reads; empty: there are none."""
    sets = config.rules.actions != "single"
    use = dict.fromkeys(("levels", "states"), "single positions") if sets else {"error_cost": "sets"}
    if config.labels == "boards":
        use |= dict.fromkeys(("candidates", "continuations"), "labels of values")
    else:
        use["retries"] = "labels of boards"
    ordinary = replace(PolicyIterationConfig(config.out), candidates=_most_candidates(sets))
    idle = [f"{name} (of {what})" for name, what in use.items() if getattr(config, name) != getattr(ordinary, name)]
    these = "sets" if sets else "single positions"
    return f"not used with {these} and labels of {config.labels}: {', '.join(idle)}" if idle else ""


def _play(
    config: PolicyIterationConfig,
    process: Unmasking,
    g: Reference,
    policy: OrderPolicy | RemaskPolicy | None,
    states: States,
    generator: torch.Generator,
    told: Callable[[int], None],
) -> dict[str, float]:
    """One iteration's play. ``policy`` None: the reference plays."""
    if config.rules.actions == "single":
        beta = config.beta if config.sampled else 0.0
        defer_above = config.policy.defer_above if policy is None else policy.config.defer_above
        player = Player.of(process, g if policy is None else policy, g, defer_above, beta)
        return play_positions(config, replace(player, told=told), states, generator)
    alone = replace(process, rules=Rules(block_length=process.rules.block_length))
    single = SoftmaxConfidence()
    player = Player.of(alone, single if policy is None else OneByOne(policy), single, config.policy.defer_above, 0.0)
    return play_sets(config, player, process, policy, states, generator)


def _why_not(played: dict[str, float]) -> str:
    """What the last iteration's play says of a policy that is no better for all its training; empty: nothing."""
    explained, earned = played.get("play/explained_variance", 1.0), played.get("play/best_reward")
    if explained < EXPLAINED:
        return f"its values explain {100 * max(0.0, explained):.0f} % of how the candidates of new states differ"
    if earned is None:  # no boards are labels
        return ""
    if earned < GOOD_LABELS:
        return f"the boards that it learns from earn {earned:.2f} on average, and all their symbols count as right"
    if (labelled := played["play/labelled"]) < GOOD_LABELS:
        return f"{100 * (1 - labelled):.0f} % of the boards that it finished earned nothing, and teach nothing"
    return ""


def _nothing_to_learn(config: PolicyIterationConfig) -> str:
    return (
        f"no state of {config.puzzles} puzzles has a choice that changes the reward, or play earned none, so nothing "
        "was learned; take more --puzzles, a higher --defer-above, or a reward that tells more boards apart"
    )
