"""Boards in mid-play to learn on: where a policy is uncertain, or where a set decides something."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agents.policy import MAX_REMASK_COUNT, OrderPolicy
from agents.remask_policy import RemaskPolicy
from pretrain import processes
from tasks import Instances, Task
from unmask_env.process import Unmasking
from unmask_env.reference import Oracle, Policy, SoftThreshold
from unmask_env.state import Observation, Rules

THRESHOLD_LOG_ODDS = {"set": (-4.0, 4.0), "set+remask": (-4.0, 0.5)}  # between which thresholds are drawn
REMASK_RATES = (0.0, 0.3, 1.0)  # shares, by board, of the wrong symbols that are masked again for the player
FALSE_REMASK_RATE = 0.36  # right symbols masked again for it in each forward, were the board full


def at_random_threshold(rules: Rules, player: OrderPolicy | RemaskPolicy | None, generator: torch.Generator) -> Policy:
    """``player`` at a random threshold, or a confidence threshold between 0.3 and 1: together, play of every haste."""
    height = float(torch.rand((), generator=generator, device=generator.device))
    if player is None:
        return SoftThreshold(0.3 + 0.69 * height, tau=0.02)
    low, high = THRESHOLD_LOG_ODDS[rules.actions]
    return player.at(1 / (1 + math.exp(-low - (high - low) * height)))


class Sample(NamedTuple):
    """Some states, (n, L) each; see :class:`States`."""

    tokens: Tensor
    answers: Tensor
    given: Tensor
    remask_count: Tensor
    values: Tensor | None

    def observe(self, process: Unmasking) -> Observation:
        """What a policy sees of them; their history is not known."""
        # Which positions may be chosen does not depend on blocks here: a policy is to know all of them.
        process = replace(process, rules=replace(process.rules, block_length=None))
        state = process.reset(Instances(self.given, self.answers))
        masked = self.tokens == process.task.mask_id
        state = replace(state, tokens=self.tokens, masked=masked, remask_count=self.remask_count)
        return replace(process.observe(state), history=None)


def same_columns(own: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The columns (S, ...) of ``given`` that ``own`` has, too. Raises :class:`ValueError` where one is no tensor of the
    same form but for S, which is the same in all that have rows."""
    columns = {name: given[name] for name in own}
    for name, column in columns.items():
        alike = isinstance(column, Tensor) and column.dtype == own[name].dtype
        if not alike or (len(column) and column.shape[1:] != own[name].shape[1:]):
            raise ValueError(f"{name} is another kind of column")
    if len({len(column) for column in columns.values()} - {0}) > 1:
        raise ValueError("columns of different lengths")
    return columns


class States:
    """Boards in mid-play, (S, L) each: ``tokens``; ``answers``; ``given``, what they began with; ``remask_count``; and
    which of them are ``uncertain`` (S,) bool: of single positions no position is confident, of remasking some symbol is
    wrong. Where ``values`` are kept, they are those of filling a position with its symbol in ``answers``, NaN where it
    is not known."""

    def __init__(self, task: Task) -> None:
        empty = torch.zeros(0, task.length, dtype=torch.long)
        self.tokens, self.answers, self.given, self.remask_count = (empty.clone() for _ in range(4))
        self.values = torch.zeros(0, task.length)
        self.uncertain = torch.zeros(0, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.tokens)

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        for name, column in same_columns(vars(self), state).items():
            setattr(self, name, column)

    # ------------------------------------------------------------------ collecting
    @torch.no_grad()
    def collect(self, process: Unmasking, instances: Instances, defer_above: float, generator: torch.Generator) -> None:
        """Play ``instances`` by margin among the right positions, so that boards stay solvable; keep the states where
        one position's top symbol is right and another's wrong: all uncertain ones, one in twenty of the others. Where
        several answers are right, a state's is the one that the denoiser finds likeliest there."""
        process = replace(process, rules=Rules(), temperature=0.0)
        kept: list[tuple[Tensor, ...]] = []
        for part in (instances[rows] for rows in torch.arange(len(instances)).split(500)):
            state, oracle = process.reset(part), Oracle(process.task.all_answers(part.to(process.device)))
            while not bool(state.done.all()):
                seen = process.observe(state)
                answer = oracle.answer(seen)
                right = Oracle(answer).right(seen)
                uncertain = ~seen.certain(defer_above).any(1)
                spared = torch.rand(uncertain.shape, generator=generator, device=uncertain.device) < 0.05
                keep = (seen.fillable & ~right).any(1) & right.any(1) & (uncertain | spared)
                kept.append((state.tokens[keep].cpu(), answer[keep].cpu(), uncertain[keep].cpu()))
                best = seen.margin.masked_fill(~right, -1.0).argmax(1, keepdim=True)
                state, _ = process.step(state, seen, torch.zeros_like(right).scatter(1, best, True))
                state = replace(state, done=state.done | ~right.any(1))  # a lost board is given up
        self.tokens, self.answers, self.uncertain = (torch.cat(parts) for parts in zip(*kept, strict=True))
        self.given, self.remask_count = self.tokens, torch.zeros_like(self.tokens)

    @torch.no_grad()
    def collect_sets(
        self,
        process: Unmasking,
        instances: Instances,
        generator: torch.Generator,
        player: OrderPolicy | RemaskPolicy | None = None,
        answers: Tensor | None = None,
        boards: int = 200,
    ) -> None:
        """Play ``instances`` by confidence thresholds between 0.3 and 1, or by ``player`` at thresholds of all heights,
        and keep the states on the way.

        Args:
            answers: (N, K, L) that count as right; default: all that the task knows.
            boards: how many are played at the same threshold.

        Where mistakes are final, those with a wrong symbol are left out: on a lost board nothing is right however
        confident it looks. Where they are not, the ``uncertain`` states are the boards with a wrong symbol.
        """
        rules, length = process.rules, process.task.length
        remasks = rules.actions == "set+remask"
        # Boards that mask again what they fill again go in circles, and teach the same each time.
        enough = max(8, math.ceil(length / 3)) if remasks else length
        process = replace(process, rules=replace(rules, nfe_budget=rules.nfe_budget or enough), temperature=0.0)
        kept: list[tuple[Tensor, ...]] = []
        for rows in torch.arange(len(instances)).split(boards):
            part = instances[rows].to(process.device)
            policy = at_random_threshold(rules, player, generator)
            draws = generator if policy.sampled else None
            oracle = Oracle(process.task.all_answers(part) if answers is None else answers[rows].to(process.device))
            rates = None
            if remasks:
                which = torch.randint(len(REMASK_RATES), (len(part), 1), generator=generator, device=generator.device)
                rates = torch.tensor(REMASK_RATES, device=which.device)[which]
            state = process.reset(part)
            while not bool(state.done.all()):
                seen = process.observe(state)
                action = policy(seen).act(draws)
                answer = oracle.answer(seen)
                if rates is not None:
                    action = _intervene(action, seen, answer, rates, generator)
                lost = ((seen.tokens != answer) & ~seen.masked).any(1)
                keep = ~state.done if remasks else ~state.done & ~lost
                uncertain = lost if remasks else torch.ones_like(lost)
                columns = (seen.tokens, answer, part.tokens, state.remask_count, uncertain)
                kept.append(tuple(column[keep].cpu() for column in columns))
                state, _ = process.step(state, seen, action)
        columns = map(torch.cat, zip(*kept, strict=True))
        self.tokens, self.answers, self.given, self.remask_count, self.uncertain = columns

    def pool(self) -> None:
        """Hold the states of all processes, in each."""
        parts = processes.gather(self.state_dict())
        for name in vars(self):
            setattr(self, name, torch.cat([part[name] for part in parts]))

    # ------------------------------------------------------------------ batches
    def add(self, capacity: int, **columns: Tensor) -> None:
        """Append to some columns, and keep the last ``capacity`` states."""
        for name, column in columns.items():
            setattr(self, name, torch.cat([getattr(self, name), column.cpu()])[-capacity:])

    def rows(self, rows: Tensor, device: torch.device) -> Sample:
        """Some states as they are."""
        columns = (self.tokens, self.answers, self.given, self.remask_count, self.values)
        return Sample(*(column[rows].to(device) for column in columns))

    def sample(self, task: Task, n: int, certain_fraction: float, generator: torch.Generator) -> Sample:
        """``n`` states under new symmetries; a share ``certain_fraction`` of them not uncertain (all of one kind where
        the other is empty)."""
        uncertain, certain = self.uncertain.nonzero().squeeze(1), (~self.uncertain).nonzero().squeeze(1)
        few = n if not len(uncertain) else 0 if not len(certain) else int(n * certain_fraction)
        where = {"generator": generator, "device": generator.device}
        pools = ((uncertain, n - few), (certain, few))
        picked = [pool[torch.randint(len(pool), (count,), **where).cpu()] for pool, count in pools if count]
        rows, before = torch.cat(picked), generator.get_state()
        answers, counts = self.answers[rows], self.remask_count[rows].clamp(max=MAX_REMASK_COUNT)

        def augmented(tokens: Tensor) -> Instances:
            generator.set_state(before)  # the same symmetries each time
            return task.augment(Instances(tokens, answers).to(generator.device), generator)

        states, given = augmented(self.tokens[rows]), augmented(self.given[rows]).tokens
        values = self.values[rows].to(generator.device) if len(self.values) else None
        counts = counts.to(generator.device)
        if type(task).augment is not Task.augment and (values is not None or bool(counts.any())):
            whole = answers.masked_fill(answers == task.mask_id, 0)
            came_from = self._sources(task, lambda marked: augmented(whole.masked_fill(marked, task.mask_id)).tokens)
            counts = counts.gather(1, came_from)
            values = None if values is None else values.gather(1, came_from)
        return Sample(states.tokens, states.answers, given, counts, values)

    @staticmethod
    def _sources(task: Task, augmented: Callable[[Tensor], Tensor]) -> Tensor:
        """(n, L) int64, where the symbol of each position stood before a symmetry.

        Symmetries move symbols about and leave masks masks, so the bits of a position's number travel as masks. Prompts
        stay whole, since a symmetry may look at them.
        """
        position = torch.arange(task.length)
        source = torch.zeros((), dtype=torch.long)
        for bit in range((task.length - 1).bit_length()):
            marked = (position >> bit & 1).bool() & (position >= task.prompt_length)
            source = source + ((augmented(marked) == task.mask_id).long() << bit)
        return source


def _intervene(action: Tensor, seen: Observation, answer: Tensor, rates: Tensor, generator: torch.Generator) -> Tensor:
    """(N, A): the player's action, and of the wrong symbols a share ``rates`` (N, 1) masked again for it, with a few
    right ones (an intervention as in DAgger): what it has masked again before is then mostly what it was wrong about,
    as it is once it has learned. In a forward that masks again only the most confident position is filled."""
    length = answer.shape[1]
    wrong = seen.tokens != answer
    chance = torch.rand(wrong.shape, generator=generator, device=wrong.device)
    again = chance < torch.where(wrong, rates, FALSE_REMASK_RATE / length)
    again = action[:, length:] | (seen.remaskable & again)
    return torch.cat([action[:, :length] & ~again.any(1, keepdim=True), again], 1)
