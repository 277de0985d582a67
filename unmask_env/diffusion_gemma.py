"""DiffusionGemma of ``transformers`` as a denoiser of canvases, and its own sampler in the terms of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks import IncompatibleDenoiserError, Task, UnmaskError
from tasks.errors import first_line, optional
from tasks.tokenizers import check_finite, check_published, reading
from unmask_env.language_models import DType
from unmask_env.reference import EntropyBounded
from unmask_env.shared import Named
from unmask_env.state import WHOLE, Denoised, Rules

Known = dict[tuple[int, bytes], tuple[Any, int]]  # prompt length and prefix: a cache of several rows, and which it is


class DiffusionGemma(Named):
    """DiffusionGemma, or a model of its kind, as the denoiser of a task whose symbols are its tokens.

    The prompt and the canvases that are settled are encoded once; the decoder reads that and the canvas in play. Its
    answer is tempered: the temperature falls from ``t_max`` to ``t_min`` over the forwards of a canvas. What is carried
    from one forward to the next is the self-conditioning, (N, C, D) for C positions and D channels: the mean embedding
    under the answer, which is what the model makes of the logits (N, C, V) that ``generate`` carries. The encoder's
    cache is no state: it follows from the tokens, and is made again where it is not known.

    Prompts may have padding on their left, as those of :class:`tasks.MathWord`; it is left out.

    Args:
        source: a folder or a hub id; or a ``DiffusionGemmaForBlockDiffusion``, which is put into evaluation mode.
        task: with a prompt, and at most as many symbols as the model has tokens.
        t_min, t_max: None: the checkpoint's, or 0.4 and 0.8.
        device_map: lay its layers out over devices, as ``transformers`` does, instead of on ``device``.
        load: more arguments of ``from_pretrained``, such as ``quantization_config``.

    Attributes:
        ends, pad_id: the end tokens and padding of the checkpoint's generation settings. Without padding there, the
            task's.

    Raises:
        UnmaskError: the library is missing or the model cannot be read.
        IncompatibleDenoiserError: the task has no prompt, or more symbols than the model.
    """

    hidden_dim: int | None = None

    def __init__(
        self,
        source: str | Path | Any,
        task: Task,
        device: torch.device | str = "cpu",
        dtype: DType = "float32",
        t_min: float | None = None,
        t_max: float | None = None,
        device_map: str | None = None,
        load: Mapping[str, Any] | None = None,
    ) -> None:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UnmaskError(f"dtype must be float32, bfloat16 or float16, not {dtype!r}")
        self.device, model = torch.device(device), source
        if isinstance(source, str | Path):
            model = _load(str(source), {"dtype": getattr(torch, dtype), "device_map": device_map, **(load or {})})
        self.model = (model if device_map is not None else model.to(self.device)).eval().requires_grad_(False)
        config, told = self.model.config, self.model.generation_config
        if task.vocab_size > config.text_config.vocab_size:
            raise IncompatibleDenoiserError(
                f"task {task.name} has {task.vocab_size} symbols, the model only {config.text_config.vocab_size} "
                "tokens; read the task with the model's own tokenizer"
            )
        if task.prompt_length < 1:
            raise IncompatibleDenoiserError(f"DiffusionGemma continues a prompt, and task {task.name} has none")
        self.t_min = _first(t_min, told.t_min, 0.4)
        self.t_max = _first(t_max, told.t_max, 0.8)
        if not 0 < self.t_min <= self.t_max:
            raise UnmaskError(f"t_min must be above 0 and at most t_max, not {self.t_min} and {self.t_max}")
        self.vocab_size, self.length = task.vocab_size, task.length
        self.prompt_length, self.canvas_length = task.prompt_length, config.canvas_length
        self._task_pad: int | None = getattr(task, "pad_id", None)
        ends = told.eos_token_id
        self.ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
        self.pad_id: int = _first(told.pad_token_id, self._task_pad, *self.ends, 0)
        self.calls = 0
        self._known: Known = {}

    def sampler(self) -> tuple[Rules, EntropyBounded]:
        """The rules and the reference policy that are the checkpoint's own sampler at temperature 1: the entropy bound
        (EB-sampler, arXiv 2505.24857) and adaptive stopping, with the defaults of ``transformers`` where the checkpoint
        says nothing."""
        told, rules = self.model.generation_config, Rules("accept")
        rules = replace(
            rules,
            canvas_steps=_first(told.max_denoising_steps, rules.canvas_steps),
            stop_entropy=_first(told.confidence_threshold, rules.stop_entropy),
            stop_stable=_first(told.stability_threshold, rules.stop_stable),
        )
        bound = told.sampler_config
        return rules, EntropyBounded() if bound is None else EntropyBounded(bound.entropy_bound)

    def begin(self, n: int) -> Tensor:
        """(N, C, D) zeros: no self-conditioning."""
        weight = self._embedding.weight
        return torch.zeros(n, self.canvas_length, weight.shape[1], dtype=weight.dtype, device=self.device)

    @property
    def _embedding(self) -> Any:
        return self.model.model.decoder.embed_tokens

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        where: Tensor,
        left: Tensor,
        carried: Tensor,
        generator: torch.Generator | None = None,
    ) -> Denoised:
        """One forward, see :class:`unmask_env.denoiser.CanvasDenoiser`; elsewhere the answer is uniform.

        Raises:
            UnmaskError: an error inside the model.
        """
        self.calls += 1
        try:
            return self._denoised(tokens, where, left, carried, generator)
        except UnmaskError:
            raise
        except Exception as error:  # what a configuration says shows here first, and devices run out of memory
            raise UnmaskError(f"the model failed: {type(error).__name__}: {first_line(error)}") from error

    def _denoised(
        self, tokens: Tensor, where: Tensor, left: Tensor, carried: Tensor, generator: torch.Generator | None
    ) -> Denoised:
        start = self._starts(where)  # (N,)
        index = start.unsqueeze(1) + torch.arange(self.canvas_length, device=self.device)  # (N, C)
        states = self._decoded(tokens, where.any(1), start, tokens.gather(1, index), carried)  # (N, C, D)
        temperature = self.t_min + (self.t_max - self.t_min) * left
        drawn, signal = torch.zeros_like(tokens), torch.zeros_like(carried)

        def log_probs_at(rows: Tensor, positions: Tensor) -> Tensor:
            within = positions - start[rows]
            logits = self._logits(states[rows, within]) / temperature[rows].unsqueeze(1)  # (M, V)
            if generator is not None:
                p = logits.softmax(-1, dtype=torch.float32)
                drawn[rows, positions] = torch.multinomial(p, 1, generator=generator).squeeze(1)
            signal[rows, within] = self._embedded(logits)
            return logits.log_softmax(-1)

        on = torch.zeros_like(where).scatter_(1, index, True)
        if self.vocab_size > WHOLE:
            denoised = Denoised.at(on & where.any(1, keepdim=True), self.vocab_size, log_probs_at)
        else:
            log_probs = -torch.full((*tokens.shape, self.vocab_size), float(self.vocab_size), device=self.device).log()
            log_probs[on] = log_probs_at(*on.nonzero().unbind(1))
            denoised = Denoised.of(log_probs)
        return replace(denoised, drawn=None if generator is None else drawn, carried=signal)

    def _starts(self, where: Tensor) -> Tensor:
        """(N,) int64 where the canvas in play begins; of rows that are done, the last one."""
        before = where.int().argmax(1) - self.prompt_length
        start = self.prompt_length + before // self.canvas_length * self.canvas_length
        return torch.where(where.any(1), start, self.length - self.canvas_length)

    def _logits(self, states: Tensor) -> Tensor:
        """(M, V) float32 of (M, D), as the model's own ``forward`` makes them."""
        cap = self.model.final_logit_softcapping
        return torch.tanh(self.model.lm_head(states).to(torch.float32)[:, : self.vocab_size] / cap) * cap

    def _embedded(self, logits: Tensor) -> Tensor:
        """(M, D) the mean embedding under tempered logits (M, V), as the model's decoder makes it."""
        weight = self._embedding.weight
        p = logits.to(weight.dtype).softmax(-1, dtype=torch.float32).to(weight.dtype)
        return torch.matmul(p, weight[: self.vocab_size]) * self._embedding.embed_scale.to(weight.dtype)

    def _decoded(self, tokens: Tensor, playing: Tensor, start: Tensor, canvas: Tensor, carried: Tensor) -> Tensor:
        """(N, C, D) the decoder's last states; 0 of rows that are done. Rows with prefixes of one length go together
        so that nothing is padded."""
        given = torch.zeros_like(start)
        if self._task_pad is not None:  # padding left of the prompt
            given = (tokens[:, : self.prompt_length] == self._task_pad).long().cumprod(1).sum(1)
            given = given.clamp(max=self.prompt_length - 1)
        states, known = torch.zeros_like(carried), {}
        for first, upto in torch.stack([given, start], 1)[playing].unique(dim=0).tolist():
            rows = (playing & (given == first) & (start == upto)).nonzero().squeeze(1)
            cache = self._encoded(tokens[rows, first:upto], self.prompt_length - first, known)
            states[rows] = self._decode(canvas[rows], carried[rows], cache, upto - first)
        self._known = known  # what this forward used; all else is forgotten
        return states

    def _decode(self, canvas: Tensor, carried: Tensor, cache: Any, length: int) -> Tensor:
        """(n, C, D) of canvases (n, C) behind ``length`` encoded positions."""
        decoder = self.model.model.decoder
        positions = torch.arange(length, length + self.canvas_length, dtype=torch.int32, device=self.device)
        # It would make the signal of logits (n, C, V) that are kept since the last forward; here it is made already.
        handle = decoder.self_conditioning.register_forward_pre_hook(lambda _, given: (given[0], carried))
        try:
            out = decoder(decoder_input_ids=canvas, past_key_values=cache, decoder_position_ids=positions.unsqueeze(0))
        finally:
            handle.remove()
        return out.last_hidden_state

    # ------------------------------------------------------------------ the encoder's cache
    def _encoded(self, prefix: Tensor, prompt: int, known: Known) -> Any:
        """The cache of ``prefix`` (n, T): a prompt of ``prompt`` tokens and whole canvases, encoded one by one, as
        ``generate`` does. What this and the last forward used is looked up; it is entered in ``known``."""
        keys = [(prompt, row.tobytes()) for row in prefix.numpy(force=True)]
        lookup = self._known | known
        new = [keys.index(key) for key in dict.fromkeys(keys) if key not in lookup]
        if new:
            before = prefix.shape[1] - self.canvas_length if prefix.shape[1] > prompt else 0
            cache = self._encoded(prefix[new, :before], prompt, known) if before else None
            cache = self._extended(cache, prefix[new], before)
            lookup |= {keys[row]: (cache, i) for i, row in enumerate(new)}
        cache = self._stacked([lookup[key] for key in keys], prefix.shape[1])
        known |= {key: (cache, i) for i, key in enumerate(keys)}
        return cache

    def _extended(self, cache: Any, prefix: Tensor, before: int) -> Any:
        """A cache of ``prefix`` (n, T), of which the first ``before`` tokens are in ``cache``; that stays as it is."""
        encoder, n = self.model.model.encoder, len(prefix)
        cache = self._filled([] if cache is None else [(x.keys, x.values) for x in cache.layers], before)
        positions = torch.arange(before, prefix.shape[1], dtype=torch.int32, device=self.device).unsqueeze(0)
        masks = encoder.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=torch.empty((n, positions.shape[1], 0), dtype=self.model.dtype, device=self.device),
            attention_mask=torch.ones_like(prefix, dtype=torch.bool),
            past_key_values=cache,
            position_ids=positions,
        )
        encoder(
            input_ids=prefix[:, before:].contiguous(),
            attention_mask=masks,
            past_key_values=cache,
            position_ids=positions,
        )
        return cache

    def _stacked(self, parts: Sequence[tuple[Any, int]], length: int) -> Any:
        """The cache whose rows are those of ``parts``: caches, and a row of each."""
        first, count = parts[0][0], len(parts)
        same = all(cache is first and row == i for i, (cache, row) in enumerate(parts))
        if same and first.layers[0].keys.shape[0] == count:
            return first
        layers = []
        for layer in range(len(first.layers)):
            kept = [(cache.layers[layer], slice(row, row + 1)) for cache, row in parts]
            layers.append((torch.cat([x.keys[at] for x, at in kept]), torch.cat([x.values[at] for x, at in kept])))
        return self._filled(layers, length)

    def _filled(self, layers: Sequence[tuple[Tensor, Tensor]], length: int) -> Any:
        """A new cache of ``length`` positions, with keys and values by layer; none: it is empty."""
        import transformers

        cache = transformers.DynamicCache(config=self.model.config.get_text_config(decoder=True))
        for layer, (keys, values) in zip(cache.layers, layers, strict=False):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if layer.is_sliding:  # it holds the last ones only, and counts all
                layer.cumulative_length = length
        return cache


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def is_diffusion_gemma(source: str) -> bool:
    """Whether the configuration of a folder or hub id says so; False where it cannot be read."""
    with optional("models of transformers", "unmask[text]"):
        import transformers
    try:
        return transformers.PretrainedConfig.get_config_dict(source)[0].get("model_type") == "diffusion_gemma"
    except Exception:  # what is wrong is said where the model is loaded
        return False


def _load(source: str, options: dict[str, Any]) -> Any:
    with optional("models of transformers", "unmask[text]"):
        import transformers
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    options = options | {"output_loading_info": True, "use_safetensors": True}
    with reading("model", source):
        check_published(source)
        model, report = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(source, **options)
    if report["missing_keys"]:
        raise IncompatibleDenoiserError(
            f"{source} lacks weights of DiffusionGemma, {sorted(report['missing_keys'])[0]} for example"
        )
    check_finite(model, source)
    return model
