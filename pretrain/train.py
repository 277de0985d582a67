"""The one training loop for denoisers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tasks
from pretrain import card, processes
from pretrain.backbone import Backbone, parameter_count
from pretrain.checkpoint import PACKAGED_DENOISERS, load_model, save_model, step_generator
from pretrain.objectives.learned_order import Estimator, block_loss, learned_order_loss
from pretrain.objectives.masked import losses_of_passes, masked_diffusion_loss
from pretrain.objectives.uniform import uniform_loss
from pretrain.orders import PositionOrder
from pretrain.run import FitConfig, Run, decayed_groups, learning_rate, resolve_device, set_learning_rate
from tasks.settings import (
    AtLeast1,
    Depth,
    NotNegative,
    Share,
    ShareBelow1,
    Width,
    validate,
)


@dataclass(frozen=True)
class PretrainConfig(FitConfig):
    """What the trainings of backbones share."""

    init: str | None = None
    """start from this denoiser of the same kind (packaged name, folder or hub id), whose sizes are taken"""
    dim: Width = 96
    layers: Depth = 4
    heads: Depth = 4
    ema: ShareBelow1 = 0.998
    """decay of the exponential moving average of the weights, which is what is saved"""
    bf16: bool = False
    compile: bool = False
    half: bool = False
    """store the weights in float16, as the packaged denoisers are"""

    takes_prompts = False  # whether it can learn what is behind a prompt

    def architecture(self) -> dict[str, Any]:
        """What the :class:`Backbone` is told beside its size."""
        return {}

    def check(self, task: tasks.Task) -> None:
        """Raises :class:`tasks.UnmaskError` for settings that are out of range or do not fit ``task``."""
        validate(self)
        if self.init is not None and Path(self.init).resolve() == Path(self.out).resolve():
            raise tasks.UnmaskError(f"--init and --out are the same folder, {self.out}; name another --out")
        if self.dim % self.heads:
            raise tasks.UnmaskError(f"dim must be a multiple of heads; {self.dim} is not one of {self.heads}")
        if task.prompt_length and not self.takes_prompts:
            raise tasks.UnmaskError(f"{task.name} has prompts, behind which only mdm can be trained")
        if task.is_line and self.dim % (2 * self.heads):
            raise tasks.UnmaskError(f"for {task.name}, dim must be a multiple of 2 heads, so not {self.dim}")

    def objective(
        self, model: Backbone, clean: Tensor, generator: torch.Generator, done: float
    ) -> tuple[Tensor, Tensor]:
        """What to differentiate, a scalar, and the estimate of the loss in nats per position, a scalar or one per pass.

        Args:
            clean: (N, L) int64. done: share of the steps before this one.
        """
        loss = self.loss_of(model, clean, generator)
        return loss, loss.detach()

    def loss_of(self, model: Backbone, clean: Tensor, generator: torch.Generator) -> Tensor:
        """Scalar, of objectives that are their own estimate; by default masked diffusion's."""
        return masked_diffusion_loss(model, clean, model.mask_id, generator, model.prompt_length)


@dataclass(frozen=True)
class MDMConfig(PretrainConfig):
    """Masked diffusion: every position alike."""

    passes: Depth = 1
    """how often the denoiser reads a sequence, each time with its last belief in place of the masks; weights are
    shared, and the loss is the mean over the passes"""

    takes_prompts = True

    def architecture(self) -> dict[str, Any]:
        return {"num_passes": self.passes}

    def objective(
        self, model: Backbone, clean: Tensor, generator: torch.Generator, done: float
    ) -> tuple[Tensor, Tensor]:
        if model.num_passes == 1:
            return super().objective(model, clean, generator, done)
        losses = losses_of_passes(
            lambda noisy: model.passes(noisy)[0], clean, model.mask_id, generator, model.prompt_length
        )
        return losses.mean(), losses.detach()


@dataclass(frozen=True)
class ARConfig(PretrainConfig):
    """Autoregression, left to right."""

    def architecture(self) -> dict[str, Any]:
        return {"block_length": 1}

    def loss_of(self, model: Backbone, clean: Tensor, generator: torch.Generator) -> Tensor:
        return block_loss(model, clean, generator)


@dataclass(frozen=True)
class BlockConfig(ARConfig):
    """Block diffusion: blocks from left to right, masked diffusion inside each."""

    block_length: AtLeast1 = 4

    def architecture(self) -> dict[str, Any]:
        return {"block_length": self.block_length}

    def check(self, task: tasks.Task) -> None:
        super().check(task)
        if self.block_length > task.length:
            raise tasks.UnmaskError(f"block_length must be between 1 and {task.length}, not {self.block_length}")


@dataclass(frozen=True)
class LearnedOrderConfig(PretrainConfig):
    """What models with a learned order share."""

    order_lr: NotNegative = 1.0
    """learning rate of what the order alone learns, as a multiple of ``lr``"""
    order_start: Share = 0.0
    """share of the steps that train plain masked diffusion, at its cost, before the order begins to learn"""
    estimator: Estimator = "control_variate"
    """of the order's gradient: ``rloo``, two masks and their losses, as the paper, or ``control_variate``, one mask and
    what a second one, without gradients, says that it should cost (cheaper)"""

    def objective(
        self, model: Backbone, clean: Tensor, generator: torch.Generator, done: float
    ) -> tuple[Tensor, Tensor]:
        if done < self.order_start:  # all orders are still alike
            return super().objective(model, clean, generator, done)
        return learned_order_loss(model, clean, generator, self.estimator)


@dataclass(frozen=True)
class LearnedScheduleConfig(LearnedOrderConfig):
    """Masked diffusion with a learned schedule per position."""

    def architecture(self) -> dict[str, Any]:
        return {"order": "positions"}


@dataclass(frozen=True)
class GenMD4Config(LearnedOrderConfig):
    """Masked diffusion with a learned schedule per symbol."""

    def architecture(self) -> dict[str, Any]:
        return {"order": "symbols"}


@dataclass(frozen=True)
class LoMDMConfig(LearnedOrderConfig):
    """Masked diffusion with an order learned from the context."""

    order_lr: NotNegative = 0.1
    """learning rate of the two order networks, as a multiple of ``lr``; at 1 noise drives them into saturation"""
    order_start: Share = 0.5
    """share of the steps that train plain masked diffusion, at its cost, before the order begins to learn; the paper
    has 0, which costs more and lowers the loss more at equal steps"""
    c1: NotNegative = 0.7
    """mean weight (the paper's best)"""
    c2: NotNegative = 0.65
    """how far weights may spread around c1, below it (the paper's best); 0 is a fixed schedule"""

    def architecture(self) -> dict[str, Any]:
        return {"order": "context", "c1": self.c1, "c2": self.c2}

    def check(self, task: tasks.Task) -> None:
        super().check(task)
        if not 0 <= self.c2 < self.c1:
            raise tasks.UnmaskError(f"c1 and c2 must satisfy 0 <= c2 < c1, not c1 = {self.c1}, c2 = {self.c2}")


@dataclass(frozen=True)
class UniformConfig(PretrainConfig):
    """What models with uniform noise share."""

    prompt_fraction: Share = 0.5
    """share of the sequences of which a random part is given clean, so that prompts can be completed"""
    loss: Literal["bound", "coupling", "cross_entropy"] = "bound"
    """the bound of the prediction, or its cross-entropy"""

    def loss_of(self, model: Backbone, clean: Tensor, generator: torch.Generator) -> Tensor:
        return uniform_loss(model, clean, generator, self.loss, self.prompt_fraction)


@dataclass(frozen=True)
class UDMConfig(UniformConfig):
    """Uniform diffusion."""

    predicts: Literal["loo", "denoiser"] = "loo"
    """what the network outputs: leave-one-out, which the bound wants, or the denoiser, converted for the loss"""
    loss: Literal["bound", "cross_entropy"] = "bound"

    def architecture(self) -> dict[str, Any]:
        return {"noise": "uniform", "predicts": self.predicts}


@dataclass(frozen=True)
class MaxCouplingConfig(UDMConfig):
    """Uniform diffusion, coupled maximally: the bound of changing as rarely as possible."""

    predicts: Literal["denoiser", "loo"] = "denoiser"
    """what the network outputs: the denoiser, which this bound wants, or leave-one-out, converted for the loss"""
    loss: Literal["coupling", "cross_entropy"] = "coupling"


@dataclass(frozen=True)
class AUDMConfig(UniformConfig):
    """Absorbing uniform diffusion: told which symbols are their position's noise. AUDM and ReAUDM sample from it."""

    loss: Literal["bound", "cross_entropy"] = "bound"

    def architecture(self) -> dict[str, Any]:
        return {"noise": "uniform", "predicts": "absorbing"}


OBJECTIVES: dict[str, type[PretrainConfig]] = {
    "mdm": MDMConfig,
    "ar": ARConfig,
    "block": BlockConfig,
    "learned-schedule": LearnedScheduleConfig,
    "genmd4": GenMD4Config,
    "lomdm": LoMDMConfig,
    "udm": UDMConfig,
    "maxcoupling": MaxCouplingConfig,
    "audm": AUDMConfig,
    "reaudm": AUDMConfig,
}
"""What ``unmask pretrain`` can train, by name."""


class Objective(nn.Module):
    """A model's loss as a module, so that several processes and ``torch.compile`` see one forward."""

    def __init__(self, model: Backbone, config: PretrainConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, clean: Tensor, generator: torch.Generator, done: float = 1.0) -> tuple[Tensor, Tensor]:
        """As :meth:`PretrainConfig.objective`."""
        return self.config.objective(self.model, clean, generator, done)


def new_backbone(config: PretrainConfig, task: tasks.Task) -> Backbone:
    """An untrained model for ``task``, whose weights the seed draws; or one that starts from ``config.init``."""
    base = None if config.init is None else load_init(config.init, task)
    sizes = (config.dim, config.layers, config.heads)
    if base is not None:
        sizes = (base.dim, len(base.blocks), base.blocks[0].heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Backbone(
            task.vocab_size,
            task.coordinates.tolist(),
            *sizes,
            vocabularies=task.vocabularies,
            rotary=task.is_line,
            fingerprint=task.fingerprint,
            prompt_length=task.prompt_length,
            **config.architecture(),
        )
    if base is None:
        return model
    if _kind(base) != _kind(model):
        raise tasks.IncompatibleDenoiserError(
            f"denoiser {config.init} is of another kind than this objective's ({_kind(base)}; wanted: {_kind(model)}); "
            "--init takes what the same unmask pretrain command made"
        )
    model.load_state_dict(base.state_dict())
    return model


def _kind(model: Backbone) -> str:
    """What an objective's network is, beside its size and its passes."""
    blocks = "" if model.block_length is None else f", blocks of {model.block_length}"
    return f"{model.noise} noise, predicts {model.predicts}, {type(model.order).__name__}{blocks}"


def load_init(name: str, task: tasks.Task) -> Backbone:
    """The denoiser ``name``, to go on from. Raises :class:`tasks.UnmaskError` if it does not fit ``task``."""
    base = load_model(Backbone, name, PACKAGED_DENOISERS, "denoiser")
    task.check_denoiser(base.vocab_size, base.length, base.fingerprint)
    if not torch.equal(base.positions.coordinates, task.coordinates) or base.rotary != task.is_line:
        raise tasks.IncompatibleDenoiserError(
            f"the positions of denoiser {name} stand elsewhere than those of {task.name}"
        )
    return base


def parameter_groups(config: PretrainConfig, model: Backbone) -> list[dict[str, Any]]:
    """For AdamW; what the order alone learns has its own multiple of the learning rate."""
    groups = decayed_groups(model, config.weight_decay)
    if not isinstance(config, LearnedOrderConfig):
        return groups
    order = {id(p) for p in model.order.parameters()}
    others = [group | {"params": [p for p in group["params"] if id(p) not in order]} for group in groups]
    ordering = [group | {"params": [p for p in group["params"] if id(p) in order]} for group in groups]
    return others + [group | {"multiple": config.order_lr} for group in ordering]


def losses(means: Sequence[float]) -> dict[str, float]:
    """What is logged of the passes' losses: their mean, and each where there are several."""
    each = {f"loss/pass_{number}": value for number, value in enumerate(means, 1)} if len(means) > 1 else {}
    return {"loss": sum(means) / len(means)} | each


class RunningMean:
    """Of what was added since it was last taken; a part of a run's state, so that it covers the steps that it says."""

    def __init__(self, device: torch.device) -> None:
        self.total, self.count = torch.zeros((), device=device), 0
        self.taken: list[float] = []  # what was taken last, for the model's card

    def add(self, value: Tensor) -> None:
        """Count ``value`` in."""
        self.total, self.count = self.total + value.detach(), self.count + 1

    def take(self) -> list[float]:
        """The mean, of each entry."""
        means = [value / self.count for value in self.total.reshape(-1).tolist()]
        self.total, self.count, self.taken = torch.zeros_like(self.total), 0, means
        return means

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on."""
        return {"total": self.total, "count": self.count, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.total, self.count = state["total"].to(self.total.device), int(state["count"])
        self.taken = [float(value) for value in state.get("taken", [])]


def _places(model: Backbone) -> str | None:
    """Of a learned schedule per position, what order it means."""
    if not isinstance(model.order, PositionOrder):
        return None
    return ", ".join(f"{place:.1f}" for place in model.order.expected_places().tolist())


def denoiser_card(config: PretrainConfig, task: tasks.Task, model: Backbone, steps: int, means: Sequence[float]) -> str:
    """The card of a denoiser after ``steps`` steps, of which the last have these losses, one per pass."""
    init = config.init
    loss = ", ".join(f"{value:.4f}" for value in means)
    rows = {
        "task": f"`{task.name}`",
        "objective": f"`{type(config).__name__.removesuffix('Config')}`, {steps:,} steps",
        "began from": None if init is None else f"`{init}`",
        "seed": config.seed,
        "stored in": "float16" if config.half else "float32",
        "unmasked before each position, on average": _places(model),
        "training loss when last logged, per pass": f"{loss} nats per position" if means else None,
    }
    front = card.front_matter(model) | {"license": card.license_of([init] if init else [], PACKAGED_DENOISERS)}
    sections = (card.training(config, processes.count()), "No held-out results were measured by this run.")
    return card.build(f"Denoiser of {task.name}", front, rows | card.known(model) | rows, *sections)


def pretrain(config: PretrainConfig, task: tasks.Task | None = None) -> Backbone:
    """Train a denoiser on ``task.clean`` and save its moving average in ``config.out``.

    Under ``torchrun`` the batch is split over the processes.

    Args:
        task: used instead of looking ``config.task`` up.

    Raises:
        UnmaskError: unknown task or device, settings that do not fit, an ``out`` that cannot be used or resumed.
        Interrupted: after Ctrl-C, with the state saved.
    """
    task = task or tasks.get(config.task)
    device = resolve_device(config.device, config.threads)
    config.check(task)
    device = processes.join(device)
    mine = processes.share(config, "batch")

    model = new_backbone(config, task).to(device)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    optimizer = torch.optim.AdamW(parameter_groups(config, model), lr=config.lr, betas=(0.9, 0.99))
    mean = RunningMean(device)
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer, "mean": mean}
    title = f"pretrain {task.name} ({parameter_count(model):,} parameters)"

    def publish(steps: int, folder: Path) -> None:
        text = denoiser_card(config, task, averaged.module, steps, mean.taken)
        save_model(averaged.module, folder, half=config.half, described=text)

    run = Run(config, config.steps, parts, title, publish=publish)
    if config.compile:
        model.compile()
        model.passes = torch.compile(model.passes)
    objective: nn.Module = Objective(model, config)
    if processes.count() > 1:
        # Before its start an order's parameters have no gradients.
        late = isinstance(config, LearnedOrderConfig) and config.order_start > 0
        objective = DistributedDataParallel(objective, find_unused_parameters=late)
    precision = torch.autocast(device.type, torch.bfloat16) if config.bf16 else contextlib.nullcontext()

    model.train()
    with run:
        for step in run.loop():
            generator = step_generator(device, config.seed, step, processes.rank())
            clean = task.clean(mine.batch, generator)
            with precision:
                loss, bound = objective(clean, generator, step / config.steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            set_learning_rate(optimizer, learning_rate(config, step))
            optimizer.step()
            averaged.update_parameters(model)
            mean.add(bound)
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                means = mean.take()  # one per pass
                note = "loss " + " ".join(f"{value:.4f}" for value in means)
                scalars = losses(means) | {"grad_norm": float(norm), "lr": learning_rate(config, step)}
                run.log(scalars | {"throughput/sequences_per_second": run.rate(config.batch)}, note)
    trained: Backbone = averaged.module
    return trained.eval()
