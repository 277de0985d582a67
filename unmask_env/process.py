"""Unmasking as a Markov decision process, in torch alone: reset, observe, step, and the loop over them.

Time runs from the instance with masks to the complete sequence. An action names masked positions; the frozen denoiser
fills them; a finished sequence is rewarded. Nothing here knows Gymnasium, tensordict or which policy chooses.

    process = Unmasking(task, denoiser)
    state = process.reset(instances)
    while not bool(state.done.all()):
        seen = process.observe(state)                         # the one denoiser forward
        state, reward = process.step(state, seen, policy(seen).mode())

With actions ``accept`` the masked positions of the block in play are a canvas: they hold uniform noise and accepted
symbols, until the canvas settles (:mod:`unmask_env.canvas`). All else is the same.

Shapes: N rows, L positions; an action has A = L entries, or 2 L where positions may be masked again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tasks import Instances, Task, UnmaskError
from tasks.settings import AtLeast1, Temperature, validate
from tasks.task import check_instances, fill_temperature_of
from unmask_env.canvas import after_end, begin, check_canvas, followed
from unmask_env.denoiser import CanvasDenoiser, Denoiser, check_denoised, check_numbers, check_protocol
from unmask_env.reference import Policy
from unmask_env.state import (
    SINGLE,
    WHOLE,
    Block,
    Canvas,
    Denoised,
    History,
    InvalidActionError,
    Observation,
    Rollout,
    Rules,
    State,
    Step,
)


def checked_reward(task: Task, tokens: Tensor, instances: Instances) -> Tensor:
    """(N,) float32 the task's reward. Raises :class:`tasks.UnmaskError` for one that is no tensor of that shape, or
    whose numbers are not real and finite."""
    return _checked(task.reward(tokens, instances), f"the reward of task {task.name}", tokens)


def checked_metrics(task: Task, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
    """(N,) float32 each, the task's metrics. Raises :class:`tasks.UnmaskError` as :func:`checked_reward`, and where
    there are none."""
    metrics = task.metrics(tokens, instances)
    if not isinstance(metrics, dict) or not metrics:
        raise UnmaskError(f"the metrics of task {task.name} must be a dictionary with one at least, not {metrics!r}")
    return {
        name: _checked(value, f"the metric {name!r} of task {task.name}", tokens) for name, value in metrics.items()
    }


def _checked(value: object, what: str, tokens: Tensor) -> Tensor:
    form = f"{what} must be a tensor of shape ({len(tokens)},)"
    if not isinstance(value, Tensor):
        raise UnmaskError(f"{form}, not {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided or value.is_meta or value.is_complex() or value.is_quantized:
        raise UnmaskError(f"{form} of plain real numbers, not {value.dtype}, {value.layout}, on {value.device}")
    if value.shape != (len(tokens),):
        raise UnmaskError(f"{form}, not {tuple(value.shape)}")
    value = value.detach().to(tokens.device, torch.float32)
    if not bool(value.isfinite().all()):
        row = int((~value.isfinite()).nonzero()[0])
        raise UnmaskError(f"{what} must be finite; at row {row} it is {float(value[row])}")
    return value


@dataclass(frozen=True)
class Unmasking:
    """The decision process of one task and one frozen denoiser.

    Attributes:
        temperature: of the filling: 0 takes the denoiser's most likely symbol, above 0 samples p^(1 / temperature).
            None becomes the task's ``fill_temperature``.
            With actions ``accept`` 0 or 1: a denoiser of canvases has a temperature schedule of its own.
        forward_batch: the most rows that the denoiser is given at a time, which bounds its memory; None: all. Canvases
            are always whole.

    Raises:
        UnmaskError: a temperature below 0; a denoiser of canvases with other actions than ``accept``, or the reverse.
    """

    task: Task
    denoiser: Denoiser | CanvasDenoiser
    rules: Rules = SINGLE
    temperature: Temperature | None = None
    forward_batch: AtLeast1 | None = None

    def __post_init__(self) -> None:
        if self.temperature is None:
            object.__setattr__(self, "temperature", fill_temperature_of(self.task))
        validate(self)
        check_protocol(self.denoiser)
        check_canvas(self.task, self.denoiser, self.rules, self.temperature)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is, and so all boards."""
        return self.denoiser.device

    @property
    def entries(self) -> int:
        """A, the number of entries of an action."""
        return self.rules.entries(self.task.length)

    @property
    def horizon(self) -> int:
        """The most forwards that an episode takes: without a budget 2 L, so that remasking or illegal actions end; of
        canvases ``canvas_steps`` each."""
        if self.rules.nfe_budget is None and self._accepts:
            return self.rules.canvas_steps * ((self.task.length - self.task.prompt_length) // self.block_length)
        return self.rules.nfe_budget or 2 * self.task.length

    @property
    def _accepts(self) -> bool:
        return self.rules.actions == "accept"

    @property
    def draws(self) -> bool:
        """Whether play draws symbols, so that it takes a ``fill_generator``: sampled filling, and the noise of a
        canvas."""
        return self.temperature > 0 or self._accepts

    @property
    def block_length(self) -> int | None:
        """Positions of a block or a canvas; None where all behind the prompt is one."""
        own = self.rules.block_length
        return getattr(self.denoiser, "canvas_length", None) if own is None else own

    @cached_property
    def _block(self) -> Tensor | None:
        """(L,) the block of each position, where filling goes block by block."""
        if self.block_length is None:
            return None
        index = torch.arange(self.task.length, device=self.device) - self.task.prompt_length
        return index.clamp(min=0) // self.block_length

    @cached_property
    def _within_block(self) -> Tensor:
        """(L,) where each position is in its block, from 0."""
        return (torch.arange(self.task.length, device=self.device) - self.task.prompt_length) % self.block_length

    @cached_property
    def _of_blocks(self) -> Tensor | None:
        """(L, B) float, 1 where a position is of a block."""
        return None if self._block is None else torch.nn.functional.one_hot(self._block).float()

    @cached_property
    def _looked_at(self) -> list[bool]:
        """Not empty once the values of a denoiser's answer were checked: once is enough."""
        return []

    @cached_property
    def _begun(self) -> list[bool]:
        """Not empty once instances were checked: once is enough."""
        return []

    def _of_task(self, instances: Instances) -> Instances:
        if not self._begun:
            check_instances(self.task, instances)
            self._begun.append(True)
        return instances

    # ------------------------------------------------------------------ the three parts of a step
    def reset(self, instances: Instances) -> State:
        """The first state of each instance: its masks are to be filled."""
        instances = self._of_task(instances).to(self.device)
        masked = instances.tokens == self.task.mask_id
        n, device = len(instances), self.device
        zeros, no = torch.zeros(n, dtype=torch.long, device=device), torch.zeros(n, dtype=torch.bool, device=device)
        return State(
            instances.tokens,
            masked,
            instances,
            steps=zeros,
            remask_count=torch.zeros_like(instances.tokens),
            fill_prob=torch.ones(masked.shape, device=device),
            done=~masked.any(1),
            truncated=no,
            illegal=no,
            canvas=begin(self.denoiser, n) if self._accepts else None,
        )

    def permitted(self, state: State) -> tuple[Tensor, Tensor | None]:
        """(N, L) bool, the positions that may be filled now, and those that may be masked again, if the rules have
        such; none on boards that are done."""
        playing = ~state.done.unsqueeze(1)
        within = playing.expand(state.masked.shape)
        if self._block is not None:
            block = self._block.expand_as(state.masked)
            within = within & (block == block.masked_fill(~state.masked, self.task.length).min(1, keepdim=True).values)
        fillable = state.masked & within
        if self.rules.actions != "set+remask":
            return fillable, None
        filled = ~state.masked & (state.instances.tokens == self.task.mask_id)
        if self.rules.remask_budget is not None:
            filled = filled & (state.remask_count.sum(1, keepdim=True) < self.rules.remask_budget)
        return fillable, filled & within & state.masked.any(1, keepdim=True)

    def observe(self, state: State, generator: torch.Generator | None = None) -> Observation:
        """What a policy sees of ``state``: one denoiser forward for all rows together.

        Args:
            generator: with actions ``accept``, draws the noise of canvases that begin and the denoiser's symbols.
        """
        fillable, remaskable = self.permitted(state)
        block = block_holes = None
        if self._block is not None:
            block = self._block.masked_fill(~state.masked, self._of_blocks.shape[1] - 1).min(1).values
            block_holes = ((state.instances.tokens == self.task.mask_id).float() @ self._of_blocks).long()
        tokens = state.tokens
        if self._accepts:
            tokens, denoised = self._observe_canvas(state, fillable, generator)
        else:
            denoised = self._denoised(state, fillable if remaskable is None else fillable | remaskable, block)
        first = not self._looked_at and bool(fillable.any())
        check_denoised(self.denoiser, denoised, self.task, state.tokens, fillable if first else None)
        if first:
            self._looked_at.append(True)
        else:
            check_numbers(self.denoiser, denoised, fillable)
        left = None
        if self.rules.remask_budget is not None:
            left = self.rules.remask_budget - state.remask_count.sum(1)
        return Observation(
            tokens,
            state.masked,
            fillable,
            denoised,
            remaskable,
            None if remaskable is None else state.remask_count,
            History(state.steps, state.fill_prob, state.previous, left, block, block_holes),
        )

    def _denoised(self, state: State, where: Tensor, block: Tensor | None) -> Denoised:
        """The forward: of a large vocabulary only ``where`` (N, L) something may happen, since elsewhere it is not
        worth its memory; and of a denoiser that carries something with the ``block`` (N,) in play."""
        if self.forward_batch is not None and len(state) > self.forward_batch:
            parts = [
                self._denoised(state[rows], where[rows], None if block is None else block[rows])
                for rows in torch.arange(len(state), device=self.device).split(self.forward_batch)
            ]
            return Denoised.join(parts, torch.cat)
        asked = where if self.task.vocab_size > WHOLE else None
        if not getattr(self.denoiser, "carries", False):
            return self.denoiser(state.tokens) if asked is None else self.denoiser(state.tokens, asked)
        length, prompt = self.task.length, self.task.prompt_length
        size = self.rules.block_length or length
        start = prompt + (torch.zeros_like(state.steps) if block is None else block * size)
        stop = (start + size).clamp(max=length)
        position = torch.arange(length, device=self.device)
        inside = (position >= start.unsqueeze(1)) & (position < stop.unsqueeze(1))
        begun = torch.where(inside & (state.instances.tokens == self.task.mask_id), self.task.mask_id, state.tokens)
        return self.denoiser(state.tokens, asked, Block(start, stop, begun), state.carried)

    def step(
        self, state: State, seen: Observation, action: Tensor, uniform: Tensor | None = None
    ) -> tuple[State, Tensor]:
        """Fill and mask again what ``action`` says, and reward the rows that are complete. Rows that are done idle.

        Args:
            seen: what :meth:`observe` made of ``state``. action: (N, A) bool, or (N, L) to mask nothing again.
            uniform: (N, L) in [0, 1), the randomness of filling above temperature 0; with actions ``accept`` the noise,
                symbols (N, L) int64. :meth:`uniform` draws either.

        Returns:
            The state that follows, whose ``done``, ``truncated`` and ``illegal`` tell how it went, and the reward (N,).

        Raises:
            InvalidActionError: an illegal action under ``on_illegal="raise"``, or one of the wrong shape.
        """
        if self.draws and uniform is None:
            raise UnmaskError("filling above temperature 0 draws symbols; give step(..., uniform=) or a fill_generator")
        fill, remask, illegal = self._legal(state, seen, action)
        if self._accepts:
            tokens, masked, symbols, fill, canvas = self._accept(state, seen, fill, illegal, uniform)
        else:
            symbols, canvas = seen.denoised.draw(self.temperature, uniform), None
            tokens, masked = torch.where(fill, symbols, state.tokens), state.masked & ~fill
        if remask is not None:
            tokens, masked = tokens.masked_fill(remask, self.task.mask_id), masked | remask
        if (settled := self.task.settled(tokens)) is not None:
            tokens, masked = settled, settled == self.task.mask_id
        steps = state.steps + (~state.done).long()

        complete = ~masked.any(1) & ~state.done
        ended = complete | illegal if self.rules.on_illegal == "terminate" else complete
        truncated = (steps >= self.horizon) & ~ended & ~state.done
        probability = seen.denoised.log_prob_of(symbols) if self.temperature > 0 else seen.denoised.best_log_prob
        following = State(
            tokens,
            masked,
            state.instances,
            steps,
            state.remask_count if remask is None else state.remask_count + remask.long(),
            torch.where(fill, probability.exp(), state.fill_prob),
            state.done | ended | truncated,
            state.truncated | truncated,
            illegal,
            seen.denoised.without_hidden(),
            canvas,
            None if self._accepts else seen.denoised.carried,
        )
        return following, self._reward(following, complete)

    def _legal(self, state: State, seen: Observation, action: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The positions (N, L) to fill and to mask again, none in illegal actions, and (N,) bool which those are."""
        n, length = state.tokens.shape
        a_tensor = isinstance(action, Tensor)
        if not a_tensor or action.dtype != torch.bool or action.shape not in ((n, length), (n, self.entries)):
            shown = f"{action.dtype} of {tuple(action.shape)}" if a_tensor else type(action).__name__
            raise InvalidActionError(f"actions must be bool of shape ({n}, {self.entries}), not {shown}")
        fill, remask = action[:, :length], None
        legal = ~(fill & ~seen.fillable).any(1)
        if self.rules.actions == "single":
            legal &= fill.sum(1) == 1
        elif not self._accepts:
            confidence = seen.denoised.best_log_prob.masked_fill(~seen.fillable, -torch.inf)
            best = torch.zeros_like(fill).scatter_(1, confidence.argmax(1, keepdim=True), True) & seen.fillable
            fill = torch.where(fill.any(1, keepdim=True), fill, best)
        if seen.remaskable is not None:
            remask = action[:, length:] if action.shape[1] > length else torch.zeros_like(fill)
            legal &= ~(remask & ~seen.remaskable).any(1)
            if self.rules.remask_budget is not None:
                legal &= state.remask_count.sum(1) + remask.sum(1) <= self.rules.remask_budget
        illegal = ~legal & ~state.done
        if self.rules.on_illegal == "raise" and bool(illegal.any()):
            raise InvalidActionError(self._why_illegal(int(illegal.nonzero()[0]), state, seen, action))
        acts = (legal & ~state.done).unsqueeze(1)
        return fill & acts, None if remask is None else remask & acts, illegal

    # ------------------------------------------------------------------ the canvas
    def _observe_canvas(
        self, state: State, fillable: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Denoised]:
        """The tokens (N, L), noise where a canvas begins, and the forward on them."""
        if generator is None:
            raise UnmaskError("a canvas holds noise; give observe(..., generator=) or a fill_generator")
        tokens, blank = state.tokens, fillable & (state.tokens == self.task.mask_id)
        if bool(blank.any()):
            tokens = torch.where(blank, self.uniform(state, generator), tokens)
        left = (self.rules.canvas_steps - state.canvas.steps) / self.rules.canvas_steps
        draws = generator if self.temperature > 0 else None
        return tokens, self.denoiser(tokens, fillable, left, state.canvas.carried, draws)

    def _accept(
        self, state: State, seen: Observation, accepted: Tensor, illegal: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Canvas]:
        """One forward's step on the canvas: accepted positions hold the denoiser's symbols and the others ``noise``, or
        all of them, where the canvas ends, its most likely symbols.

        Returns:
            tokens and masked, (N, L) each; the denoiser's symbols (N, L) and where they were written (N, L) bool.
        """
        denoised, on = seen.denoised, seen.fillable
        canvas, ended = followed(self.rules, state, seen)
        settled = on & ended.unsqueeze(1)
        symbols = denoised.best if denoised.drawn is None else denoised.drawn
        symbols = torch.where(settled, denoised.best, symbols)
        tokens = torch.where(on & ~illegal.unsqueeze(1), noise, seen.tokens)  # an illegal action changes nothing
        tokens = torch.where(accepted | settled, symbols, tokens)
        tokens, masked = after_end(self.denoiser, tokens, state.masked & ~settled, settled)
        return tokens, masked, symbols, accepted | settled, canvas

    def _reward(self, state: State, complete: Tensor) -> Tensor:
        """(N,) float32: the task's reward of rows that are complete, with forwards counted in; 0 elsewhere."""
        reward = torch.zeros(len(state), device=self.device)
        if not bool(complete.any()):
            return reward
        reward = torch.where(complete, checked_reward(self.task, state.tokens, state.instances), reward)
        if self.rules.speed > 0:
            holes = (state.instances.tokens == self.task.mask_id).sum(1)
            reward = torch.where(complete, self.rules.shaped(reward, state.steps, holes), reward)
        return reward

    def _why_illegal(self, row: int, state: State, seen: Observation, action: Tensor) -> str:
        """One line on why row ``row`` of ``action`` is illegal."""
        length, fillable = self.task.length, seen.fillable[row].nonzero().flatten().tolist()
        wrong = (action[row, :length] & ~seen.fillable[row]).nonzero().flatten().tolist()
        if wrong:
            return f"row {row}: positions {wrong} may not be filled now; those that may are {fillable}"
        count = int(action[row, :length].sum())
        if self.rules.actions == "single":
            return f"row {row}: {count} positions where one must be chosen; those that may be filled are {fillable}"
        wrong = (action[row, length:] & ~seen.remaskable[row]).nonzero().flatten().tolist()
        if wrong:
            return f"row {row}: positions {wrong} may not be masked again: given, masked already, or no budget left"
        left = (self.rules.remask_budget or 0) - int(state.remask_count[row].sum())
        return f"row {row}: {int(action[row, length:].sum())} positions to mask again, where the budget leaves {left}"

    # ------------------------------------------------------------------ the loop
    @torch.no_grad()
    def rollout(
        self,
        policy: Policy,
        instances: Instances,
        generator: torch.Generator | None = None,
        fill_generator: torch.Generator | None = None,
        record: bool = False,
        start: State | None = None,
        group: int = 1,
    ) -> Rollout:
        """Fill every mask of ``instances``, one denoiser forward per step for all rows together.

        Rows that end earlier idle until the batch is done. An instance without a mask takes no step, and so earns 0.

        Args:
            policy: one that sees the answers is told them here.
            generator: the policy is sampled from it; without one it takes its mode.
            fill_generator: draws the symbols above temperature 0, and the noise of a canvas.
            record: keep observations, actions and their log-probabilities; hidden states only for policies that read
                them.
            start: states of ``instances`` to go on from; default: their first.
            group: so many rows in a row share their luck: a position is filled by the same random number in all of them
                (common random numbers), so that their rewards differ by what was chosen. Where a position may be filled
                twice, rows are filled apart.

        Raises:
            UnmaskError: a fill_generator at temperature 0, or none above it; a canvas needs one in any case. Rows that
                are not whole groups. No policy, or one of sets under rules of single positions.
        """
        if not isinstance(policy, Policy):
            raise UnmaskError(f"a policy is played, not {policy!r:.60}; make one by reference() or load_policy()")
        if self.rules.actions == "single" and policy.actions != "single":
            raise UnmaskError(
                f"{policy.name or 'this policy'} is for actions {policy.actions!r}, and the rules are 'single'; give "
                f"make_process(..., actions={policy.actions!r}), or Rules({policy.actions!r})"
            )
        if group < 1 or len(instances) % group:
            raise UnmaskError(f"group must divide the rows, {len(instances)}, not {group}")
        if self.draws != (fill_generator is not None):
            raise UnmaskError(
                "the noise of a canvas is drawn; give a fill_generator"
                if self._accepts
                else "sampled filling needs both a temperature above 0 and a fill_generator"
            )
        policy = policy.for_instances(self.task, self._of_task(instances).to(self.device))
        state, steps = self.reset(instances) if start is None else start, []
        reward = torch.zeros(len(state), device=self.device)
        denoiser_passes, policy_passes = torch.zeros_like(state.steps), torch.zeros_like(state.steps)
        once = self.draws and self.rules.actions in ("single", "set")
        luck = self.uniform(state[::group], fill_generator).repeat_interleave(group, 0) if once and group > 1 else None
        while not bool(state.done.all()):
            seen = self.observe(state, fill_generator)
            distribution = policy(seen)
            playing = (~state.done).long()
            denoiser_passes += playing if seen.denoised.passes is None else seen.denoised.passes * playing
            policy_passes += 0 if distribution.passes is None else distribution.passes * playing
            action = distribution.act(generator)
            if record:
                denoised = seen.denoised
                denoised = denoised.without_carried() if policy.reads_hidden else denoised.without_hidden()
                steps.append(Step(replace(seen, denoised=denoised), action, ~state.done, distribution.log_prob(action)))
            uniform = self.uniform(state, fill_generator) if luck is None else luck
            state, gained = self.step(state, seen, action, uniform)
            reward += gained
        return Rollout(replace(state, carried=None), reward, steps, denoiser_passes, policy_passes)

    def uniform(self, state: State, generator: torch.Generator | None) -> Tensor | None:
        """(N, L) in [0, 1), the randomness of one step's filling, or with actions ``accept`` (N, L) int64, noise for
        the canvas; None without a generator or where none is drawn."""
        if generator is None or not self.draws:
            return None
        if self._accepts:  # as much as a canvas holds, the same for every block: one of them takes it
            shape = (len(state), self.block_length)
            noise = torch.randint(self.task.vocab_size, shape, generator=generator, device=self.device)
            return noise[:, self._within_block]
        return torch.rand(state.tokens.shape, generator=generator, device=self.device)
