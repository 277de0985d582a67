"""DiffusionGemma's canvases: the same tokens and forwards as the ``generate`` of transformers, on small random models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tasks import Instances, Task
from tests.toys import generator
from unmask_env.diffusion_gemma import DiffusionGemma
from unmask_env.process import Unmasking
from unmask_env.reference import EntropyBounded, SoftThreshold
from unmask_env.state import Rollout, Rules

transformers = pytest.importorskip("transformers")

# What generate imports of torch on its first call.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

CANVAS, PAD = 4, 0


class Continue(Task):
    """A prompt of random symbols, and canvases; the reward is the share of symbol 1."""

    name, one_answer = "continue", False

    def __init__(self, vocab_size: int, prompt: int, canvases: int) -> None:
        self.symbols, self.prompt_length = tuple(f"w{i}" for i in range(vocab_size)), prompt
        self.shape = (1, prompt + canvases * CANVAS)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        return self.behind_prompt(torch.randint(1, self.vocab_size, (n, self.length), generator=generator))

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return (tokens == 1).float().mean(1)


class PaddedLeft(Continue):
    """Row i has i positions of padding left of its prompt."""

    pad_id, pad_side = PAD, "left"

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        drawn = super().sample(n, generator)
        padding = torch.arange(self.length) < torch.arange(n).unsqueeze(1)
        return Instances(drawn.tokens.masked_fill(padding, PAD), drawn.answers)


def model(vocab_size: int = 24, seed: int = 0, spread: float = 0.3, **generation: Any) -> Any:
    """Two layers, one that attends to a window and one to all; ``spread`` of the weights makes its answers certain."""
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": 8,
        "num_global_key_value_heads": 1,
        "num_experts": 2,
        "top_k_experts": 1,
        "moe_intermediate_size": 16,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 64,
    }
    vision = {"model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 4}
    ids = dict.fromkeys(("boi_token_id", "eoi_token_id", "image_token_id"), vocab_size)
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=CANVAS, initializer_range=spread, **ids
    )
    torch.manual_seed(seed)
    made = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    for name, value in generation.items():
        setattr(made.generation_config, name, value)
    return made


def generated(made: Any, prompts: Tensor, new: int, seed: int) -> tuple[Tensor, Tensor]:
    """(N, L) tokens and (N,) tokens per forward, of transformers itself."""
    torch.manual_seed(seed)
    out = made.generate(prompts, max_new_tokens=new)
    return out.sequences, torch.as_tensor(out.tokens_per_forward)


def played(made: Any, task: Task, instances: Instances, seed: int, record: bool = False) -> Rollout:
    """By its own sampler in this package."""
    denoiser = DiffusionGemma(made, task)
    rules, bound = denoiser.sampler()
    process = Unmasking(task, denoiser, rules, temperature=1.0)
    return process.rollout(bound, instances, fill_generator=generator(seed), record=record)


def per_forward(task: Task, rollout: Rollout) -> Tensor:
    return (rollout.tokens[:, task.prompt_length :] != PAD).sum(1) / rollout.nfe


def sampler_config(bound: float) -> Any:
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

    return EntropyBoundSamplerConfig(entropy_bound=bound)


ADAPTIVE = {"max_denoising_steps": 12, "confidence_threshold": 0.6, "stability_threshold": 1, "pad_token_id": PAD}


@pytest.mark.parametrize(
    "settings",
    [
        ADAPTIVE,
        ADAPTIVE | {"stability_threshold": 2},
        ADAPTIVE | {"stability_threshold": 0, "confidence_threshold": 0.2, "t_min": 0.1, "t_max": 1.5},
        ADAPTIVE | {"sampler_config": 1.0},
        ADAPTIVE | {"eos_token_id": [3, 5, 7]},
    ],
    ids=["one", "two", "temperature", "bound", "ends"],
)
def test_one_prompt_as_generate(settings: dict[str, Any]) -> None:
    """Prompts of any length, seeds, three canvases, and canvases that end by themselves at different forwards."""
    if "sampler_config" in settings:
        settings = settings | {"sampler_config": sampler_config(settings["sampler_config"])}
    made, forwards = model(**settings), set()
    for seed, length in enumerate((1, 3, 5, 9, 5, 5)):
        task = Continue(24, length, canvases=3)
        instances = task.sample(1, generator(100 + seed))
        tokens, tokens_per_forward = generated(made, instances.tokens[:, :length], 3 * CANVAS, seed)
        ours = played(made, task, instances, seed)
        behind = ours.tokens[:, tokens.shape[1] :]
        assert torch.equal(ours.tokens[:, : tokens.shape[1]], tokens)
        assert bool((behind == PAD).all())
        assert torch.equal(per_forward(task, ours), tokens_per_forward)
        assert bool(ours.state.terminated.all())
        forwards.add(int(ours.nfe))
    print(forwards)
    assert len(forwards) > 2
