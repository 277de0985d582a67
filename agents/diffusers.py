"""A scheduler of the library ``diffusers`` that lets a reference or a trained policy choose what is filled.

    from agents.diffusers import UnmaskScheduler
    pipe = LLaDA2Pipeline(model=model, scheduler=UnmaskScheduler(order="threshold:theta=0.9"), tokenizer=tokenizer)

It stands where :class:`diffusers.BlockRefinementScheduler` does, in pipelines with a mask token (``LLaDA2Pipeline``)
and in those that renoise what is not committed (``DiffusionGemmaPipeline``).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from agents.policy import LearnedPolicy, load_policy
from pretrain.checkpoint import read_json, save_model
from tasks import Instances, Task, UnmaskError
from tasks.errors import optional
from tasks.settings import AtLeast1, Width, check
from unmask_env.process import Unmasking
from unmask_env.reference import REFERENCES, Policy, reference
from unmask_env.state import Denoised, Rules, State

with optional("the scheduler of diffusers", "unmask[diffusers]"):
    from diffusers import BlockRefinementScheduler
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_block_refinement import BlockRefinementSchedulerOutput

SAVED = "order"  # folder of a trained policy beside the scheduler's settings


class _Block(Task):
    """The block in play, whose instances are a pipeline's."""

    name, one_answer = "block", False

    def __init__(self, vocab_size: int, length: int) -> None:
        self.symbols, self.shape = tuple(map(str, range(vocab_size))), (1, length)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        raise UnmaskError("blocks are the pipeline's; none can be drawn")

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return torch.zeros(len(tokens), device=tokens.device)


class _Logits:
    """The denoiser whose answer the pipeline has computed already."""

    hidden_dim: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device, self.calls = device, 0
        self.answer: Denoised | None = None

    def __call__(self, tokens: Tensor, where: Tensor | None = None) -> Denoised | None:
        self.calls += 1
        return self.answer


class UnmaskScheduler(BlockRefinementScheduler):
    """Fills a block's masks in the order of a policy. Symbols are drawn as diffusers' own schedulers draw them, from
    the same generator; a policy that draws does so after them. What is left at the last step is filled in it, so take
    ``num_inference_steps`` of at least ``block_length`` where that should not happen.

    A policy sees the block alone, as schedulers do, and every block is an episode of its own: a schedule's steps are
    those of a block. One that masks again does so within the block. A trained one is for blocks of the length that it
    was trained on, and cannot read hidden states. Of the pipelines' settings ``threshold``, ``editing_threshold`` and
    ``minimal_topk`` mean nothing here.

    Where there is no mask token, what was filled stays, as with :class:`diffusers.BlockRefinementScheduler`; with
    ``commits`` false every position is decided anew at every step, as with :class:`diffusers.EntropyBoundScheduler`:
    what the policy fills holds its symbol until the next step, all else is noise, also after the last one.

    Args:
        order: a reference policy with its options, or the name, folder or hub id of a trained one.
        vocab_size: tokens of the tokenizer, where the model has logits of more, which are then never drawn. A trained
            policy knows its own.
        commits: see above. t_max, t_min: where it is false, the temperature at which symbols are drawn and judged
            falls linearly from the one towards the other.

    Raises:
        UnmaskError: an order that sees answers or reads hidden states; in :meth:`step`, a block of another length or
            fewer logits than a trained policy's.
    """

    @register_to_config
    def __init__(
        self,
        order: str = "threshold:theta=0.9",
        block_length: int = 32,
        num_inference_steps: int = 32,
        vocab_size: int | None = None,
        commits: bool = True,
        t_max: float = 0.8,
        t_min: float = 0.4,
    ) -> None:
        check("order", order, str)
        check("block_length", block_length, Width)
        check("num_inference_steps", num_inference_steps, Width)
        check("vocab_size", vocab_size, AtLeast1 | None)
        self.set_timesteps(num_inference_steps)
        known = order.partition(":")[0] in REFERENCES
        self.policy: Policy = reference(order) if known else load_policy(order).eval().requires_grad_(False)
        if self.policy.sees_answers or self.policy.reads_hidden:
            what = "the answers" if self.policy.sees_answers else "hidden states"
            raise UnmaskError(f"the order {order} reads {what}, which pipelines do not show; take another")
        self._process: Unmasking | None = None
        self._state: State | None = None

    # ------------------------------------------------------------------ files
    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Settings, and beside them a trained policy, which :meth:`from_pretrained` of the folder finds again."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if isinstance(self.policy, LearnedPolicy):
            save_model(self.policy, Path(save_directory) / SAVED)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> Self:
        """The scheduler of a folder or hub id. Raises :class:`tasks.UnmaskError` for settings that are none."""
        settings = Path(pretrained_model_name_or_path) / (subfolder or "") / cls.config_name
        if settings.exists() and not isinstance(read_json(settings), dict):
            raise UnmaskError(f"{settings} holds no JSON object of settings")
        saved = settings.parent / SAVED
        if saved.is_dir():
            kwargs.setdefault("order", str(saved))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    # ------------------------------------------------------------------ one step
    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        mask_token_id: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> BlockRefinementSchedulerOutput | tuple[Tensor, ...]:
        """The block after one forward; arguments and output as :meth:`diffusers.BlockRefinementScheduler.step`.

        Args:
            model_output: (N, B, V) logits. timestep: forwards that the block has had; 0 begins a new one.
            sample: (N, B) int64. mask_token_id: None where there is none: what is not committed is then replaced by
                random tokens, and ``sample`` is only read at what is.
        """
        step, vocab_size = int(timestep), self._vocab_size(model_output)
        anew = mask_token_id is None and not self.config.commits
        if anew:
            falling = 1 - step / self.num_inference_steps
            model_output = model_output / (self.config.t_min + (self.config.t_max - self.config.t_min) * falling)
            temperature, sampling_method = 1.0, "multinomial"
        logits = model_output[..., :vocab_size]
        if mask_token_id is not None and mask_token_id < vocab_size:  # a mask is no answer
            logits = logits.clone()
            logits[..., mask_token_id] = torch.finfo(logits.dtype).min
        drawn = sampling_method == "multinomial" or (sampling_method == "auto" and temperature != 0.0)
        sampled, probability = self._sample_from_logits(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator, use_multinomial=drawn
        )
        state = self._begun(0 if anew else step, sample, mask_token_id, vocab_size)
        self._process.denoiser.answer = Denoised.of(logits.float().log_softmax(-1))
        seen = self._process.observe(state)
        after, _ = self._process.step(state, seen, self.policy(seen).act(self._draws(generator, sample.device)))
        if step >= self.num_inference_steps - 1 and not anew:
            kept = torch.where(state.masked, after.tokens, state.tokens)
            after = replace(after, tokens=kept, masked=torch.zeros_like(after.masked))
        filled = state.masked & ~after.masked
        tokens = torch.where(filled, sampled, after.tokens)
        fill_prob = torch.where(filled, probability.float(), after.fill_prob)
        self._state = replace(after, tokens=tokens, fill_prob=fill_prob)
        instead: Tensor | int = 0
        if mask_token_id is not None:
            instead = mask_token_id
        else:
            size = model_output.shape[-1]
            instead = torch.randint(0, size, sample.shape, device=sample.device, generator=generator)
        previous = torch.where(after.masked, instead, tokens)
        again = ~state.masked & after.masked
        parts = (previous, filled, again, sampled, probability, model_output)
        return BlockRefinementSchedulerOutput(*parts) if return_dict else parts

    def _vocab_size(self, model_output: Tensor) -> int:
        size, known = model_output.shape[-1], getattr(self.policy, "vocab_size", None) or self.config.vocab_size
        if known is not None and known > size:
            raise UnmaskError(f"the order {self.config.order} is for {known} symbols; the model has {size} logits")
        return known or size

    def _begun(self, step: int, sample: Tensor, mask_token_id: int | None, vocab_size: int) -> State:
        """The state of play of ``sample``: a new block's, or where the last step left it and the pipeline went on."""
        length = getattr(self.policy, "length", None)
        if length not in (None, sample.shape[1]):
            raise UnmaskError(
                f"the order {self.config.order} is for {length} positions; take block_length={length}, not "
                f"{sample.shape[1]}"
            )
        begun = self._state is not None and self._state.tokens.shape == sample.shape
        if step == 0 or not begun:
            self._process = self._of(vocab_size, sample.shape[1], sample.device)
            task = self._process.task
            masked = torch.ones_like(sample, dtype=torch.bool) if mask_token_id is None else sample == mask_token_id
            tokens = torch.where(masked, task.mask_id, sample)
            return self._process.reset(Instances(tokens, torch.zeros_like(tokens)))
        state, mask_id = self._state, self._process.task.mask_id
        masked = state.masked if mask_token_id is None else sample == mask_token_id
        tokens = torch.where(masked, mask_id, sample)
        return replace(state, tokens=tokens, masked=masked, done=~masked.any(1), truncated=torch.zeros_like(state.done))

    def _of(self, vocab_size: int, length: int, device: torch.device) -> Unmasking:
        """The process of blocks of this length; the last one, where it is of the same."""
        rules = Rules(self.policy.actions, nfe_budget=2 * max(self.num_inference_steps, length))
        known = self._process
        if known is not None and (known.task.vocab_size, known.task.length, known.device, known.rules) == (
            vocab_size,
            length,
            device,
            rules,
        ):
            return known
        return Unmasking(_Block(vocab_size, length), _Logits(device), rules)

    def _draws(self, generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
        """What the policy draws from; None where it takes its mode. Without a generator, torch's own stream."""
        if not self.policy.sampled or self.policy.deterministic:
            return None
        return generator or torch.Generator(device).manual_seed(int(torch.randint(2**31, ())))
