"""Rules and trained policies as programs of ``torch.export``, which run where this package is not installed."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn

from agents.decoding import Thresholds, most_likely_set
from agents.policy import OrderPolicy, PositionHead, load_policy
from tasks import UnmaskError
from tasks.files import check_writable, write_atomically, write_json
from tasks.settings import AtLeast1, AtLeast2, validate
from unmask_env.distributions import Categorical
from unmask_env.reference import REFERENCES, Policy, reference
from unmask_env.state import WHOLE, Denoised, Observation

PROGRAM, WEIGHTS = "policy.pt2", "policy.safetensors"
LARGEST = 2**28  # positions times symbols
SHARED = '''
VOCAB_SIZE = {vocab_size}


class Program:
    """The exported policy: which of a block's masks are filled now, with the likeliest tokens."""

    def __init__(self, file):
        self.exported, self.module = torch.export.load(file), None

    def __call__(self, logits, masked, tokens, mask_id):
        """(N, L) tokens after one step; logits (N, L, V or more), masked (N, L) bool, tokens (N, L)."""
        logits = logits[..., :VOCAB_SIZE].float()
        if mask_id < VOCAB_SIZE:
            mask = torch.tensor([mask_id], device=logits.device)
            logits = logits.index_fill(-1, mask, torch.finfo(torch.float32).min)
        if self.module is None:
            self.module = move_to_device_pass(self.exported, logits.device).module()
        fill = self.module(logits, masked, tokens.long().clamp(max=VOCAB_SIZE - 1))
        return torch.where(fill, logits.argmax(-1).to(tokens.dtype), tokens)
'''
SGLANG = '''"""An algorithm for SGLang's diffusion language models, written by `unmask export` for SGLang 0.5.23.

The interface was read in SGLang's source of that version. This file has not been run in the engine; its step has been
run by itself, and fills as the policy does.

Put this file into the folder sglang/srt/dllm/algorithm of SGLang's package, where it looks for algorithms, and start

    python -m sglang.launch_server --model-path MODEL --dllm-algorithm UnmaskPolicy --dllm-algorithm-config unmask.yaml
"""

import torch
from sglang.srt.dllm.algorithm.base import DllmAlgorithm
from torch.export.passes import move_to_device_pass
{shared}

class UnmaskPolicy(DllmAlgorithm):
    def __init__(self, config):
        super().__init__(config)
        self.program = Program(config.algorithm_config["program"])

    def step(self, forward_batch, full_logits, states):
        n = forward_batch.batch_size
        tokens = forward_batch.input_ids.view(n, self.block_size)
        masked = tokens == self.mask_id
        if forward_batch.dllm_prompt_mask is not None:
            masked = masked & ~forward_batch.dllm_prompt_mask
        logits = full_logits.view(n, self.block_size, -1)
        forward_batch.input_ids.copy_(self.program(logits, masked, tokens, self.mask_id).view(-1))
        return (~masked.any(1)).tolist()


Algorithm = UnmaskPolicy
'''
DINFER = '''"""A decoder for dInfer, written by `unmask export`.

The interface was read in dInfer's source (decoding/parallel_strategy.py: `decode`, not `batch_decode`). This file has
not been run in the engine; its step has been run by itself, and fills as the policy does.

Give UnmaskDecoder("policy.pt2", mask_id) to its diffusion model in place of a decoder of its own.
"""

import torch
from dinfer.decoding.parallel_strategy import ParallelDecoder, broadcast_if_needed
from torch.export.passes import move_to_device_pass
{shared}

class UnmaskDecoder(ParallelDecoder):
    def __init__(self, program, mask_id):
        super().__init__(0, mask_id=mask_id)
        self.program = Program(program)

    def decode(self, logits, block_start, block_end, x, iter_threshold=None):
        tokens = x[:, block_start:block_end]
        masked = tokens == self.mask_id
        x[:, block_start:block_end] = self.program(logits, masked, tokens, self.mask_id)
        broadcast_if_needed(x.data)
'''


class Decision(nn.Module):
    """Which positions a policy fills, without randomness, as a function of tensors alone.

    Args:
        policy: an order policy of fillings, or a reference that neither draws nor looks back.
    """

    def __init__(self, policy: Policy, vocab_size: int) -> None:
        super().__init__()
        self.policy, self.vocab_size = policy, vocab_size

    def forward(self, logits: Tensor, masked: Tensor, tokens: Tensor) -> Tensor:
        """(N, L) bool, among ``masked`` (N, L) bool; at least one in each row that has any.

        Args:
            logits: (N, L, V) float32. tokens: (N, L) int64; what stands at masks is not read.
        """
        log_probs = logits.log_softmax(-1)
        denoised = Denoised.of(log_probs)
        if self.vocab_size <= WHOLE:
            probabilities = log_probs.exp()
            denoised = replace(denoised, _entropy=-torch.xlogy(probabilities, probabilities).sum(-1))
        seen = Observation(torch.where(masked, self.vocab_size, tokens), masked, masked, denoised)
        policy = self.policy
        if not isinstance(policy, OrderPolicy):
            fill = policy(seen).mode()
        elif isinstance(policy.head, PositionHead):  # every board is read, and where the policy would not, it defers
            beliefs, states = policy.read(seen)
            decided, unread = policy.head(seen, beliefs[-1], states), policy.head.unread(seen)
            reads = policy.uncertain(seen).unsqueeze(1)
            fill = Categorical(torch.where(reads, decided.log_probs, unread.log_probs)).mode()
        else:
            fill = most_likely_set(seen, policy.log_odds(seen), Thresholds())
        return fill & masked


@dataclass(frozen=True)
class ExportCommand:
    """Write a rule or a trained policy as a program that needs torch alone, and what SGLang or dInfer call it by."""

    policy: tyro.conf.Positional[str]
    """a reference policy that neither draws nor looks back, with its options, or a trained policy's name, folder or hub
    id"""
    out: Path
    """folder for the program and what belongs to it"""
    to: Literal["torch", "sglang", "dinfer"] = "torch"
    vocab_size: AtLeast2 | None = None
    """symbols, of a rule; a trained policy knows its own"""
    length: AtLeast1 | None = None
    """positions of the sequence or block, of a rule; likewise"""


def _decision(policy: Policy, vocab_size: int, length: int) -> tuple[Decision, tuple[Tensor, Tensor, Tensor]]:
    """The module, with three rows that it was tried on. Raises :class:`UnmaskError` as :func:`export`."""
    name = policy.name
    draws = policy.sampled and not policy.deterministic
    if draws or policy.sees_answers or policy.reads_hidden or policy.actions == "set+remask":
        raise UnmaskError(
            f"{name} cannot be exported: it draws, sees answers, reads hidden states or masks positions again"
        )
    if vocab_size * length > LARGEST:
        raise UnmaskError(f"{length} positions of {vocab_size} symbols are more than a program takes; {LARGEST} in all")
    module = Decision(policy, vocab_size).eval()
    masked = torch.arange(length).expand(3, length) % 2 == 0
    example = (torch.zeros(3, length, vocab_size), masked, torch.zeros(3, length, dtype=torch.long))
    module(*example)  # says in one line what it lacks
    return module, example


def export(policy: Policy, vocab_size: int, length: int) -> torch.export.ExportedProgram:
    """:class:`Decision` as a program, for any number of rows.

    Raises:
        UnmaskError: a policy that draws, looks back, masks again, or reads what is not the logits'; too large a size.
    """
    return _program(*_decision(policy, vocab_size, length))


def _program(module: Decision, example: tuple[Tensor, Tensor, Tensor]) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("rows")
    return torch.export.export(module, example, dynamic_shapes=({0: rows}, {0: rows}, {0: rows}))


def run(command: ExportCommand) -> None:
    """``unmask export``."""
    validate(command)
    known = command.policy.partition(":")[0] in REFERENCES
    policy = reference(command.policy) if known else load_policy(command.policy).requires_grad_(False)
    vocab_size = command.vocab_size or getattr(policy, "vocab_size", None)
    length = command.length or getattr(policy, "length", None)
    if vocab_size is None or length is None:
        raise UnmaskError(f"{command.policy} is a rule; say --vocab-size and --length")
    if not known and (vocab_size, length) != (policy.vocab_size, policy.length):
        raise UnmaskError(
            f"{command.policy} is for {policy.vocab_size} symbols and {policy.length} positions, not {vocab_size} and "
            f"{length}"
        )
    decision = _decision(policy, vocab_size, length)
    check_writable(command.out / PROGRAM, "--out")
    program = _program(*decision)
    write_atomically(command.out / PROGRAM, lambda path: _save(program, path))
    if program.state_dict:  # a rule has no weights
        weights = {name: weight.contiguous() for name, weight in program.state_dict.items()}
        write_atomically(command.out / WEIGHTS, lambda path: save_file(weights, path))
    settings = {"policy": command.policy, "vocab_size": vocab_size, "length": length, "torch": torch.__version__}
    write_json(command.out / "policy.json", settings)
    for name, text in engine_files(command.to, vocab_size, length, command.out / PROGRAM).items():
        write_atomically(command.out / name, lambda path, text=text: path.write_text(text))
    print(f"{command.out / PROGRAM}: {command.policy}, {vocab_size} symbols, {length} positions")


def engine_files(to: str, vocab_size: int, length: int, program: Path) -> dict[str, str]:
    """What an engine needs beside the program, by file."""
    shared = SHARED.replace("{vocab_size}", str(vocab_size))
    if to == "sglang":
        settings = f"program: {json.dumps(str(program.resolve()))}\nblock_size: {length}\n"  # a string of YAML, too
        return {"unmask_policy.py": SGLANG.replace("{shared}", shared), "unmask.yaml": settings}
    return {"unmask_decoder.py": DINFER.replace("{shared}", shared)} if to == "dinfer" else {}


def _save(program: torch.export.ExportedProgram, path: Path) -> None:
    whole = io.BytesIO()  # torch's writer ends the process where it cannot write to a file
    torch.export.save(program, whole)
    path.write_bytes(whole.getvalue())
