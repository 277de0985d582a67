"""Supervised pretraining of an order policy: imitate a reference, or an oracle that sees the answers.

Nearly all states are easy: on minimal 6x6 puzzles a confident denoiser is right, and what decides a board is one or
two *stuck* states where no position is sure. So the run first plays boards to collect stuck states (and a few others),
then trains on those, each time in a fresh symmetric guise and with a fresh denoiser forward.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.divergences import cross_entropy
from agents.policy import RECALL, OrderPolicy, PolicyShape, load_policy, new_policy
from pretrain.checkpoint import save_model, step_generator
from pretrain.run import Run, decayed_groups, require_at_least, require_seed, resolve_device, set_learning_rate
from tasks import Instances, Task, UnmaskError
from unmask_env import core, reference, registration
from unmask_env.core import SINGLE, Observation, Rules, SetOrder
from unmask_env.denoiser import Denoiser
from unmask_env.parallel import SoftThreshold
from unmask_env.reference import Oracle, Reference

MANY_TIMES = 30  # over which a state that looks the same each time is learned by heart
PLAYED = {"set": (-4.0, 4.0), "set+remask": (-4.0, 0.5)}  # log-odds between which thresholds are drawn
EASY = {"single": 0.15, "set": 0.15, "set+remask": 0.4}
TUTORED = (0.0, 0.3, 1.0)  # shares, by board, of the wrong symbols that are opened again for the player
STRAY = 0.36  # right symbols opened again for it in each forward, were the board full


@dataclass(frozen=True)
class ImitationConfig:
    """Imitation of a reference policy, or of an oracle that sees the answers."""

    out: str
    """folder for the policy, the logs and the state to resume from"""
    env: str = "Unmask/Sudoku6x6-v0"
    denoiser: str | None = None
    """packaged name, folder or hub id; the default is the environment's"""
    reference: Literal["oracle", "max_confidence", "margin", "entropy", "softmax_confidence", "softmax_margin"] = (
        "oracle"
    )
    """what to imitate; the oracle sees the answers and never picks a position whose top symbol is wrong. With another
    reference every board is read, and collected, not the stuck ones only"""
    init: str | None = None
    """an order policy to start from, in place of ``shape``, where the oracle is imitated. Over sets it also plays the
    boards to learn on, so that they are boards of its own (DAgger, Ross et al. 2011); where positions may be opened
    again, only when to do so is learned, by a ``doubter`` of its own, and closing stays as it is"""
    rules: Rules = SINGLE
    """with sets, the policy learns of every position how likely its top symbol is right, and of closed ones how likely
    they are wrong, on boards played at thresholds of all heights"""
    caution: float = 20.0
    """of sets: how many right symbols make up for a wrong one. Even odds of closing a position then mean that its
    symbol is right with probability caution / (1 + caution)"""
    puzzles: int = 3000
    """instances played to collect states"""
    easy: float | None = None
    """share of each batch that is not stuck or, where positions may be opened again, holds no wrong symbol; the default
    is 0.15 or 0.4"""
    steps: int = 800
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    shape: PolicyShape = field(default_factory=PolicyShape)
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    resume: bool = False
    """go on from the state in ``out``"""
    log_every: int = 20
    save_every: int = 200


class States:
    """Boards in mid-play: ``tokens``, ``answers``, ``given``, what they began with, and ``reopened``, how often each
    position was opened again, (S, L) each; and which of them are ``stuck`` (S,) bool."""

    def __init__(self, task: Task) -> None:
        empty = torch.zeros(0, task.length, dtype=torch.long)
        self.tokens, self.answers, self.given, self.reopened = (empty.clone() for _ in range(4))
        self.stuck = torch.zeros(0, dtype=torch.bool)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in vars(self):
            setattr(self, name, state[name])

    @torch.no_grad()
    def collect_sets(
        self,
        task: Task,
        denoiser: Denoiser,
        instances: Instances,
        rules: Rules,
        generator: torch.Generator,
        player: OrderPolicy | None = None,
    ) -> None:
        """Play ``instances`` by confidence thresholds between 0.3 and 1, or by ``player`` at thresholds of all heights,
        and keep the states on the way, but for those with a wrong symbol where mistakes are final: on a lost board
        nothing is right however sure it looks. Where they are not, ``stuck`` are the boards with a wrong symbol."""
        found: list[tuple[Tensor, ...]] = []
        for rows in torch.arange(len(instances)).split(200):
            part = instances[rows]
            height = float(torch.rand((), generator=generator, device=generator.device))
            # Boards that open again what they close again go in circles, and teach the same each time.
            enough = task.length if rules.actions == "set" else max(8, math.ceil(task.length / 3))
            budget = replace(rules, nfe_budget=rules.nfe_budget or enough)
            order: SetOrder
            if player is None:
                order, draws = SoftThreshold(0.3 + 0.69 * height, tau=0.02), generator
            else:
                order, draws = player, None
                low, high = PLAYED[rules.actions]
                player.threshold = 1 / (1 + math.exp(-low - (high - low) * height))
            oracle = Oracle(task.all_answers(part))
            if rules.actions == "set+remask":
                which = torch.randint(len(TUTORED), (len(part), 1), generator=generator, device=generator.device)
                rates = torch.tensor(TUTORED, device=which.device)[which]
                order, draws = _Tutored(order, draws, oracle, rates, generator), generator
            played = core.rollout(task, denoiser, order, part, rules=budget, order_generator=draws, record=True)
            for step in played.steps:
                tokens, keep, answer = step.observation.tokens, step.alive, oracle.answer(step.observation)
                wrong = (tokens != answer) & (tokens != task.mask_id)
                lost = wrong.any(1)
                if rules.actions == "set":
                    keep, reopened, stuck = keep & ~lost, torch.zeros_like(tokens), torch.ones_like(lost)
                else:
                    reopened, stuck = step.observation.reopened, lost
                found.append(tuple(x[keep].cpu() for x in (tokens, answer, part.tokens, reopened, stuck)))
        self.tokens, self.answers, self.given, self.reopened, self.stuck = map(torch.cat, zip(*found, strict=True))

    @torch.no_grad()
    def collect(
        self, task: Task, denoiser: Denoiser, instances: Instances, sure: float, generator: torch.Generator
    ) -> None:
        """Play ``instances`` by margin among the right positions, so that boards stay solvable; keep the states where
        one open position's top symbol is right and another's wrong: all stuck ones, one in twenty of the others. Where
        several answers are right, a state's is the one that the denoiser finds likeliest there."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for part in (instances[rows] for rows in torch.arange(len(instances)).split(500)):
            state, oracle = core.begin(part, task.mask_id), Oracle(task.all_answers(part))
            while bool(state.open.any()):
                observation = Observation(state.tokens, state.open, denoiser(state.tokens))
                answer = oracle.answer(observation)
                right = Oracle(answer).right(observation)
                open_confidence = reference.confidence(observation).masked_fill(~state.open, 0.0)
                stuck = open_confidence.max(1).values < sure
                spared = torch.rand(stuck.shape, generator=generator, device=stuck.device) < 0.05
                keep = (state.open & ~right).any(1) & right.any(1) & (stuck | spared)
                found.append((state.tokens[keep].cpu(), answer[keep].cpu(), stuck[keep].cpu()))
                action = reference.margin(observation).masked_fill(~right, -1.0).argmax(1)
                state = core.step(task, state, core.fill(observation.denoised.log_probs), action).state
                state = replace(state, open=state.open & right.any(1, keepdim=True))  # a lost board is given up
        self.tokens, self.answers, self.stuck = (torch.cat(parts) for parts in zip(*found, strict=True))
        self.given, self.reopened = self.tokens, torch.zeros_like(self.tokens)

    def sample(self, task: Task, n: int, easy: float, generator: torch.Generator) -> tuple[Instances, Tensor, Tensor]:
        """``n`` states in new guises, (n, L) what they began with, and (n, L) how often each position was opened again
        (up to ``RECALL``); a share ``easy`` of them not stuck (all of one kind where the other is empty)."""
        stuck, rest = self.stuck.nonzero().squeeze(1), (~self.stuck).nonzero().squeeze(1)
        few = n if not len(stuck) else 0 if not len(rest) else int(n * easy)
        parts = []
        for pool, count in ((stuck, n - few), (rest, few)):
            if count:
                pick = torch.randint(len(pool), (count,), generator=generator, device=generator.device).cpu()
                parts.append(pool[pick])
        rows, before = torch.cat(parts), generator.get_state()
        answers, reopened = self.answers[rows], self.reopened[rows]

        def in_guise(tokens: Tensor) -> Instances:
            generator.set_state(before)  # the same guises each time
            return task.augment(Instances(tokens, answers).to(generator.device), generator)

        # Guises move symbols about and leave masks masks, so counts travel as masks.
        times = range(1, min(RECALL, int(reopened.max())) + 1)
        marks = [in_guise(answers.masked_fill(reopened >= k, task.mask_id)).tokens == task.mask_id for k in times]
        given, states = in_guise(self.given[rows]).tokens, in_guise(self.tokens[rows])
        return states, given, torch.stack([torch.zeros_like(given), *(mark.long() for mark in marks)]).sum(0)


@dataclass(frozen=True)
class _Tutored:
    """``player``, and a hand that opens again none, some or all of the wrong symbols and few others: what a policy has
    opened again before is then mostly what it was wrong about, as it is once it has learned. In a forward that opens
    positions the one that the denoiser is surest of is all that is closed.

    ``rates`` (N, 1): the share of the wrong symbols, by board.
    """

    player: SetOrder
    draws: torch.Generator | None
    oracle: Oracle
    rates: Tensor
    generator: torch.Generator

    def sample(self, observation: Observation, generator: torch.Generator | None) -> Tensor:
        action = self.player.sample(observation, self.draws).bool()
        wrong = observation.tokens != self.oracle.answer(observation)
        chance = torch.rand(wrong.shape, generator=self.generator, device=wrong.device)
        length = wrong.shape[1]
        again = action[:, length:] | observation.reopenable & (chance < torch.where(wrong, self.rates, STRAY / length))
        return torch.cat([action[:, :length] & ~again.any(1, keepdim=True), again], 1)

    def log_prob_of(self, observation: Observation, action: Tensor) -> Tensor:
        return action.new_zeros(len(action), dtype=torch.float)


def choose_right_loss(log_prob: Tensor, right: Tensor) -> Tensor:
    """(N,) -log of the probability of choosing a right position: cross-entropy to the oracle reference, indifferent
    among its right positions.

    Args:
        log_prob: (N, L) of the policy. right: (N, L) bool, some position right in every row.
    """
    return -log_prob.masked_fill(~right, -torch.inf).logsumexp(1)


def imitation_loss(policy: OrderPolicy, target: Reference, observation: Observation, answers: Tensor) -> Tensor:
    """Scalar: cross-entropy -sum_i g(i) log pi(i) to the reference g, averaged over the batch.

    For the oracle, :func:`choose_right_loss` plus the cross-entropy of each reading's belief to the answers at the
    open positions. Which positions are right is one bit each and often the same bit; the answers teach the reading that
    those bits follow from, and cut what is left of the error several times faster.
    """
    if isinstance(target, Oracle):
        right = target.with_answers(answers).right(observation)
        some = right.any(1)
        beliefs, states = policy.read(observation)
        log_prob = policy.read_log_prob(observation, beliefs[-1], states)
        loss = choose_right_loss(log_prob[some], right[some]).sum() / some.sum().clamp(min=1)
        for belief in beliefs:
            reading = F.nll_loss(belief.transpose(1, 2), answers, reduction="none") * observation.open
            loss = loss + (reading.sum(1) / observation.open.sum(1)).mean() / len(beliefs)
        return loss
    beliefs, states = policy.read(observation)
    read = policy.read_log_prob(observation, beliefs[-1], states)
    return cross_entropy(target.log_prob(observation), read).mean()


def imitation_loss_of_sets(
    policy: OrderPolicy, observation: Observation, answers: Tensor, caution: float = 1.0, closes: bool = True
) -> Tensor:
    """Scalar: cross-entropies of every open position's top symbol being right, on boards without a mistake and where
    the policy ``closes`` (a doubter does not), of every position that may be opened again holding a wrong one, and of
    each reading's belief at both; each a mean over positions."""
    beliefs, states = policy.read(observation)
    odds = policy.read_log_odds(observation, beliefs[-1], states)
    wanted, asked = [observation.denoised.log_probs.argmax(-1) == answers], [observation.open]
    if observation.reopenable is not None:
        wrong = observation.reopenable & (observation.tokens != answers)
        wanted.append(wrong)
        # With a mistake on the board nothing is sure, and a policy that doubts every board would hardly close. What to
        # do about mistakes is the other half's part.
        asked = [observation.open & closes & ~wrong.any(1, keepdim=True), observation.reopenable]
    # Odds of closing are those of being right over caution, of opening again those of being wrong: a wrong symbol costs
    # the board, but a right one opened again leads back to where play was, and round in circles.
    shifts = [math.log(caution), 0.0]
    loss = odds.new_zeros(())
    for own, right, by, among in zip(odds.split(policy.length, 1), wanted, shifts, asked, strict=False):
        part = F.binary_cross_entropy_with_logits(own + by, right.to(own), reduction="none")
        loss = loss + (part * among).sum() / among.sum().clamp(min=1)
    undecided = observation.open if observation.reopenable is None else observation.open | observation.reopenable
    for belief in beliefs:
        reading = F.nll_loss(belief.transpose(1, 2), answers, reduction="none") * undecided
        loss = loss + reading.sum() / undecided.sum().clamp(min=1) / len(beliefs)
    return loss


def train(config: ImitationConfig, task: Task | None = None, denoiser: Denoiser | None = None) -> OrderPolicy:
    """Train an order policy by imitation and save it in ``config.out``.

    Args:
        task, denoiser: used instead of looking ``config.env`` and ``config.denoiser`` up.

    Raises:
        UnmaskError: names, sizes or settings that do not fit, an ``out`` that cannot be used or resumed.
        Interrupted: after Ctrl-C, with the state saved.
    """
    device = resolve_device(config.device, config.threads)
    require_at_least(
        1,
        puzzles=config.puzzles,
        steps=config.steps,
        batch=config.batch,
        save_every=config.save_every,
        log_every=config.log_every,
    )
    require_at_least(0, lr=config.lr, weight_decay=config.weight_decay, grad_clip=config.grad_clip)
    require_seed(config.seed)
    if not 0 < config.caution < math.inf:
        raise UnmaskError(f"caution must be greater than 0 and finite, not {config.caution}")
    easy = EASY[config.rules.actions] if config.easy is None else config.easy
    config = replace(config, easy=easy)  # what a run is resumed with is what it was, not what was left out
    if not 0 <= easy <= 1:
        raise UnmaskError(f"easy must be between 0 and 1, not {easy}")
    task, denoiser = registration.given_or_resolved(task, denoiser, config.env, config.denoiser, device)
    target = reference.get(config.reference)
    shape = config.shape
    if not isinstance(target, Oracle):  # other references decide on sure boards too
        shape = replace(shape, sure=2.0)
        if config.init is not None:
            raise UnmaskError(f"init is for imitating the oracle, not {config.reference}; leave out one of the two")
    sets = config.rules.actions != "single"
    if config.rules.remask_budget is not None:
        raise UnmaskError("imitation does not count a remask_budget; leave it out, and give it to what comes after")
    if sets and config.reference != "oracle":
        raise UnmaskError(f"over sets the oracle is what can be imitated, not {config.reference}")
    if config.init is None:
        policy = new_policy(shape, task, denoiser, config.seed, gate=1.0, sets=sets).to(device)
    else:
        policy = load_policy(config.init, task, denoiser, config.rules.actions).to(device)
    trained = policy
    if config.init is not None and config.rules.actions == "set+remask":
        if policy.doubter is None and bool(policy.doubt.any()):
            raise UnmaskError(
                f"{config.init} opens positions again with the network that closes them; start from a policy that was "
                "trained with --actions set"
            )
        policy.begin_doubting()
        trained = policy.doubter
    optimizer = torch.optim.AdamW(decayed_groups(trained, config.weight_decay), lr=config.lr, betas=(0.9, 0.99))
    states = States(task)
    run = Run(config, config.steps, {"policy": policy, "optimizer": optimizer, "states": states}, "imitation")
    with run:
        if not len(states.tokens):
            run.note("collecting states")
            generator = step_generator(device, config.seed, 0, 3 << 16)
            instances = task.sample(config.puzzles, generator)
            if sets:
                # Not the policy itself, whose threshold would stay where play left it.
                player = None if config.init is None else copy.deepcopy(policy)
                states.collect_sets(task, denoiser, instances, config.rules, generator, player)
            else:
                states.collect(task, denoiser, instances, policy.sure, generator)
            if not len(states.tokens):
                raise UnmaskError(
                    f"no state of {config.puzzles} puzzles has a right and a wrong position to choose between; "
                    "try more puzzles"
                )
            stuck = int(states.stuck.sum())
            if config.rules.actions == "set+remask" and not stuck:
                warnings.warn(
                    f"no board of {config.puzzles} puzzles came to hold a wrong symbol, so the policy learns to open "
                    "nothing again; take more puzzles, or an environment in which a mistake does not end the episode",
                    stacklevel=2,
                )
            share = 1 - easy if 0 < stuck < len(states.stuck) else 1.0
            recurring = stuck or len(states.stuck)
            times = share * config.steps * config.batch / recurring
            if times > MANY_TIMES and type(task).augment is Task.augment:
                warnings.warn(
                    f"{task.name} shows no guises, and each of {recurring} states will be seen about {times:.0f} times "
                    "as it is, which learns them by heart; take more puzzles or fewer steps",
                    stacklevel=2,
                )
        policy.train()
        for step in run.loop():
            generator = step_generator(device, config.seed, step, 2 << 16)
            boards, given, reopened = states.sample(task, config.batch, easy, generator)
            is_open = boards.tokens == task.mask_id
            observation = Observation(boards.tokens, is_open, denoiser(boards.tokens))
            if config.rules.actions == "set+remask":
                again = ~is_open & (given == task.mask_id)
                observation = replace(observation, reopenable=again, reopened=reopened)
            if sets:
                loss = imitation_loss_of_sets(trained, observation, boards.answers, config.caution, trained is policy)
            else:
                loss = imitation_loss(policy, target, observation, boards.answers)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), config.grad_clip)
            decay = 0.52 + 0.48 * math.cos(math.pi * step / config.steps)
            set_learning_rate(optimizer, config.lr * decay * min(1.0, (step + 1) / 50))
            optimizer.step()
            if (step + 1) % config.log_every == 0:
                run.log({"loss": loss.item()}, f"loss {loss.item():.3f}")
    policy.eval()
    save_model(policy, Path(config.out))
    return policy
