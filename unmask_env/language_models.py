"""Masked language models of the library ``transformers``, and published masked diffusion ones, as frozen denoisers."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor

from pretrain.adapter import ADAPTER, WEIGHTS, adapter_folder, checked_adapter, mask_of, masked_model
from tasks import IncompatibleDenoiserError, Task, UnmaskError
from tasks.errors import first_line, optional
from tasks.settings import check
from tasks.tokenizers import check_finite, check_published, unread
from unmask_env.caches import Cache, KeyValues, Reuse
from unmask_env.families import FAMILIES, Family, configure, family_of
from unmask_env.shared import Named
from unmask_env.state import CHUNK, WHOLE, Block, Denoised

DType = Literal["float32", "bfloat16", "float16"]


class HFDenoiser(Named):
    """A masked language model, or a masked diffusion language model such as LLaDA, Dream or SDAR, as the denoiser of a
    task whose symbols are the tokens of the model's tokenizer (:class:`tasks.Lines`, :class:`tasks.MathWord`).

    Published diffusion models of a known family (:mod:`unmask_env.families`) are loaded as the class of
    ``transformers`` whose computation they are; none of their own code is run. A folder of an adapter of
    :func:`pretrain.adapter.adapt`, or its packaged name, is loaded with the causal model that it is of.

    Rows of different lengths may share a batch: padding, on whichever side, is moved to the right and hidden by the
    attention mask, so that every row is what it is alone. A model that does not heed the mask (as own code may not;
    this is tried out when it is loaded) is given rows of one length at a time, without padding.

    Args:
        source: a folder or a hub id; nothing else is downloaded. task: its ``vocab_size`` must be that of the
            tokenizer; positions that hold its ``pad_id``, if it has one, are padding. Where it has a ``pad_side``,
            ``left`` or ``right``, only those up to the first other token on that side are: where tokenizers have one
            token for padding and for the end, an answer holds it too.
        hidden: give the last hidden states too.
        trust_remote_code: run the model's own code, where it brings some and is of no known family. Only for sources
            that you trust.
        shifted: the logits at a position are of the next one, as Dream's are; None: by the model's family.
        adapter: a folder or hub id of a PEFT adapter of it. device_map: lay its layers out over devices, as
            ``transformers`` does (``auto``; it takes ``accelerate``), instead of on ``device``.
        load: more arguments of ``from_pretrained``, such as ``quantization_config``.
        cache: use keys and values again where filling goes block by block (:mod:`unmask_env.caches`): those of the
            prompt and of finished blocks (``prefix``), and those behind the block in play, too (``dual``). Of models
            of a known family; exact of SDAR's, and of the others the approximation of Fast-dLLM.

    Raises:
        UnmaskError: the library is missing or the model cannot be read; a cache of a model that has none.
        IncompatibleDenoiserError: the model has no head for masked tokens, no mask token, too short a context, or
            fewer tokens than the task.
    """

    def __init__(
        self,
        source: str | Path,
        task: Task,
        device: torch.device | str = "cpu",
        dtype: DType = "float32",
        hidden: bool = False,
        trust_remote_code: bool = False,
        shifted: bool | None = None,
        adapter: str | None = None,
        device_map: str | None = None,
        load: Mapping[str, Any] | None = None,
        cache: Cache = "none",
    ) -> None:
        check("cache", cache, Cache)
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UnmaskError(f"dtype must be float32, bfloat16 or float16, not {dtype!r}")
        self.name, self.device = str(source), torch.device(device)
        options = {"dtype": getattr(torch, dtype), "device_map": device_map, **(load or {})}
        folder, family, learned = adapter_folder(self.name), None, None
        if folder is not None:
            model = masked_model(folder, **options)
            learned, shifted = mask_of(model), True if shifted is None else shifted
            model = model.merge_and_unload()
        else:
            model, family = _load(self.name, trust_remote_code, options)
        model = model if adapter is None else _adapted(model, adapter)
        self.model = (model if device_map is not None else model.to(self.device)).eval().requires_grad_(False)
        # Of a causal model it is applied where logits are asked for.
        self._head = None if family is None and folder is None else self.model.get_output_embeddings()
        config = self.model.config
        self.length, self.vocab_size = task.length, task.vocab_size
        self.mask_id = self._mask_of(self.name, getattr(task, "tokenizer", None)) if learned is None else learned
        self.pad_id: int | None = getattr(task, "pad_id", None)
        self.pad_side: str | None = getattr(task, "pad_side", None)
        self.context = _context(self.model)  # how many tokens it takes, where that is known
        self._check_size(source, task)
        self.hidden_dim = config.hidden_size if hidden else None
        self.shifted = (family is not None and family.shifted) if shifted is None else shifted
        self.calls = 0
        self.masks_padding = True
        self.masks_padding = self._heeds_the_mask()
        self.carries = cache != "none"
        if self.carries:
            self._check_cache(cache)
            self._reuse = Reuse(
                lambda ids, real, past: self._forward(ids, past_key_values=past, **self._attention(ids, real))[0],
                lambda ids, **options: self._forward(ids, **options)[0],
                cache == "dual",
                self._attention_block,
                self.shifted,
                self.model.dtype,
            )

    @property
    def _attention_block(self) -> int | None:
        """Where attention goes by blocks, their length."""
        return getattr(self.model.config, "block_length", None)

    def _check_size(self, source: str | Path, task: Task) -> None:
        """Raises IncompatibleDenoiserError for a task of more symbols or positions than the model takes."""
        tokens = self.model.config.vocab_size
        if tokens < task.vocab_size:
            raise IncompatibleDenoiserError(
                f"task {task.name} has {task.vocab_size} symbols, the model {source} only {tokens} tokens; "
                "read the task with the model's own tokenizer"
            )
        if self.context is not None and task.length > self.context:
            raise IncompatibleDenoiserError(
                f"sequences of task {task.name} have {task.length} positions, the context of {source} {self.context}"
            )

    def _check_cache(self, cache: str) -> None:
        if self._head is None or not self.masks_padding:
            raise UnmaskError(
                f"cache={cache} takes a model of the families {', '.join(FAMILIES)}; {self.name} is of none, so leave "
                "the cache out"
            )
        if len({parameter.device for parameter in self.model.parameters()}) > 1:
            raise UnmaskError(f"cache={cache} takes a model on one device; leave out the cache or device_map")

    def _mask_of(self, source: str, tokenizer: Any) -> int:
        """The tokenizer's mask token; the configuration's, which may be a default of its kind, where that has none."""
        told, config = (getattr(having, "mask_token_id", None) for having in (tokenizer, self.model.config))
        mask_id = config if told is None else told
        if mask_id is None:
            raise IncompatibleDenoiserError(f"{source} has no mask token: neither its configuration nor its tokenizer")
        said = f"the mask token is {told} by the tokenizer and {config} by the configuration of {source}"
        most = self.model.config.vocab_size
        if not (isinstance(mask_id, int) and 0 <= mask_id < most):
            raise IncompatibleDenoiserError(f"{said}; it must be between 0 and {most - 1}, as the model's tokens are")
        if None not in (told, config) and told != config:
            logging.getLogger(__name__).warning("%s; %s is used", said, mask_id)
        return mask_id

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        where: Tensor | None = None,
        block: Block | None = None,
        carried: KeyValues | None = None,
    ) -> Denoised:
        """One forward of (N, L) task tokens; where it holds padding the result means nothing.

        With a cache and the ``block`` in play it uses again what an earlier answer ``carried``, where that is of this
        board; without a block it is whole.
        """
        log_probs_at, hidden, carried = self._asked(tokens, block, carried)
        if self.vocab_size > WHOLE:
            everywhere = torch.ones_like(tokens, dtype=torch.bool)
            denoised = Denoised.at(everywhere if where is None else where, self.vocab_size, log_probs_at, hidden)
            return dataclasses.replace(denoised, carried=carried)
        rows = torch.arange(len(tokens), device=tokens.device).unsqueeze(1).expand(tokens.shape)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        return dataclasses.replace(Denoised.of(log_probs_at(rows, positions), hidden), carried=carried)

    @torch.no_grad()
    def log_prob_of(self, symbols: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
        """(N, L) float32 log-probability of ``symbols`` (N, L) given ``tokens`` (N, L), from one forward; 0 outside
        ``where`` (N, L) bool. Of the whole vocabulary, where a :class:`Denoised` shows the likeliest symbols alone."""
        log_probs_at = self._asked(tokens)[0]
        answer = torch.zeros(tokens.shape, device=tokens.device)
        for some in where.nonzero().split(max(1, CHUNK // self.vocab_size)):
            at = some.unbind(1)
            answer[at] = log_probs_at(*at).gather(-1, symbols[at].unsqueeze(-1)).squeeze(-1)
        return answer

    def _asked(
        self, tokens: Tensor, block: Block | None = None, carried: KeyValues | None = None
    ) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor | None, KeyValues | None]:
        """What maps rows and positions (...) of ``tokens`` (N, L) to their (..., V) log-probabilities, the hidden
        states (N, L, D), where they are asked for, and what is carried on."""
        self.calls += 1
        real = torch.ones_like(tokens, dtype=torch.bool) if self.pad_id is None else tokens != self.pad_id
        if self.pad_side == "left":
            real = real.long().cummax(1).values.bool()
        elif self.pad_side == "right":
            real = real.flip(1).long().cummax(1).values.bool().flip(1)
        order = real.long().argsort(dim=1, descending=True, stable=True)  # what is not padding first, in its order
        ids, counts = self._ids(tokens).gather(1, order), real.sum(1)
        if self.carries and block is not None:
            states, hidden, carried = self._again(ids, real, order, block, carried)
        elif self.masks_padding:
            states, hidden = self._body(ids, torch.arange(ids.shape[1], device=ids.device) < counts.unsqueeze(1))
        else:
            states, hidden = self._one_length_at_a_time(ids, counts)
        back = order.argsort(1)  # (N, L) where each position went
        if hidden is not None:
            hidden = hidden.gather(1, back.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))

        def log_probs_at(rows: Tensor, positions: Tensor) -> Tensor:
            chosen = self._logits(states[rows, back[rows, positions]])[..., : self.vocab_size].float()
            if self.mask_id < self.vocab_size:
                chosen[..., self.mask_id] = -torch.inf  # a mask is no answer
            return chosen.log_softmax(-1)

        return log_probs_at, hidden, carried

    def _ids(self, tokens: Tensor) -> Tensor:
        """The model's tokens."""
        return torch.where(tokens == self.vocab_size, self.mask_id, tokens)

    def _again(
        self, ids: Tensor, real: Tensor, order: Tensor, block: Block, carried: KeyValues | None
    ) -> tuple[Tensor, Tensor | None, KeyValues]:
        """As :meth:`_body` of ``ids``, whose padding the ``order`` moved right, and what is carried on."""
        begun = self._ids(block.begun).gather(1, order)  # without what was filled with a symbol of padding since
        position = torch.arange(order.shape[1], device=order.device)
        start, stop = ((real & (position < end.unsqueeze(1))).sum(1) for end in (block.start, block.stop))
        states, carried = self._reuse(ids, begun, real.sum(1), start, stop, carried)
        return self._shift(states), None if self.hidden_dim is None else states.float(), carried

    def _body(self, ids: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Of (N, L) model tokens, padded on the right: what :meth:`_logits` makes logits of, and float32 hidden states,
        where they are asked for."""
        states, last = self._forward(ids, **self._attention(ids, seen))
        return self._shift(states), None if last is None else last.float()

    def _attention(self, ids: Tensor, seen: Tensor | None) -> dict[str, Tensor]:
        if self._attention_block is not None:
            return {"attention_mask": _whole_blocks(self._attention_block, ids, seen, self.model.dtype)}
        return {} if seen is None else {"attention_mask": seen.long()}

    def _forward(self, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """The model on (N, L) of its tokens: states or logits where the model has them, and the last hidden states."""
        try:
            if self._head is not None:
                states = last = self.model.base_model(input_ids=ids, **options).last_hidden_state
            else:
                out = self.model(input_ids=ids, output_hidden_states=self.hidden_dim is not None, **options)
                states, last = out.logits, out.hidden_states[-1] if self.hidden_dim is not None else None
        except Exception as error:  # code of hundreds of models, and devices that run out of memory
            said = f"{type(error).__name__}: {first_line(error)}"[:150]
            raise UnmaskError(
                f"the model {self.name} fails on {ids.shape[0]} x {ids.shape[1]} tokens: {said}"
            ) from None
        if states.shape[:2] != ids.shape or (self._head is None and states.shape[-1] < self.vocab_size):
            raise UnmaskError(
                f"the model {self.name} answers {tuple(ids.shape)} tokens with logits of shape {tuple(states.shape)}; "
                f"({', '.join(map(str, ids.shape))}, at least {self.vocab_size}) are needed"
            )
        return states, None if self.hidden_dim is None else last

    def _shift(self, states: Tensor) -> Tensor:
        return torch.cat([states[:, :1], states[:, :-1]], 1) if self.shifted else states

    def _logits(self, states: Tensor) -> Tensor:
        """(..., V), in the model's precision."""
        return states if self._head is None else self._head(states)

    def _one_length_at_a_time(self, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor | None]:
        parts: dict[int, tuple[Tensor, Tensor | None]] = {}
        for count in counts.unique().tolist():
            parts[count] = self._body(ids[counts == count, :count], None)

        def together(of: Callable[[tuple[Tensor, Tensor | None]], Tensor]) -> Tensor:
            first = of(next(iter(parts.values())))
            whole = first.new_zeros(*ids.shape, first.shape[-1])
            for count, part in parts.items():
                whole[counts == count, :count] = of(part)
            return whole

        return together(lambda part: part[0]), None if self.hidden_dim is None else together(lambda part: part[1])

    def _heeds_the_mask(self) -> bool:
        """Whether padding leaves a short sequence's logits as they are without it."""
        if self.length < 2:
            return True
        short = max(1, self.length // 2)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocab_size, (1, self.length), generator=generator).to(self.device)
        seen = torch.arange(self.length, device=self.device).unsqueeze(0) < short
        try:
            padded = self._logits(self._body(ids, seen)[0][:, :short]).float().log_softmax(-1)
        except UnmaskError as error:
            if isinstance(error.__context__, TypeError):  # it takes no attention mask
                return False
            raise
        alone = self._logits(self._body(ids[:, :short], None)[0]).float().log_softmax(-1)
        return bool((padded - alone).abs().max() < (1e-3 if self.model.dtype == torch.float32 else 0.3))


def _context(model: torch.nn.Module) -> int | None:
    """How many tokens the model takes; RoBERTa's kind (CamemBERT, MPNet, ESM) counts positions from behind the
    padding's."""
    config: Any = model.config
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "max_sequence_length", None)
    behind = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return None if most is None else int(most) - max(behind, default=0)


def _whole_blocks(block: int, ids: Tensor, seen: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(N, 1, L, L) what attention adds: 0 for positions of the own block and of those before it, else -infinity."""
    of = torch.arange(ids.shape[1], device=ids.device) // block  # (L,)
    allowed = (of.unsqueeze(1) >= of).unsqueeze(0)  # (1, L, L)
    allowed = allowed if seen is None else allowed & seen.unsqueeze(1)
    allowed = allowed | torch.eye(len(of), dtype=torch.bool, device=ids.device)  # no row of padding is empty
    added = torch.zeros(allowed.shape, dtype=dtype, device=ids.device)
    return added.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1).expand(len(ids), -1, -1, -1)


def _adapted(model: Any, adapter: str) -> Any:
    with optional("adapters", "unmask[text]"):
        import peft
    try:
        if not Path(adapter).is_dir():  # a hub id
            hf_hub_download(adapter, WEIGHTS)
            adapter = str(Path(hf_hub_download(adapter, ADAPTER)).parent)
        checked_adapter(Path(adapter))
        with warnings.catch_warnings(action="ignore"):  # of names that transformers will drop
            return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except UnmaskError:
        raise
    except Exception as error:  # peft raises many types for what it cannot read
        raise UnmaskError(f"cannot read the adapter {adapter}: {first_line(error)}") from None


def _load(source: str, trust_remote_code: bool, options: dict[str, Any]) -> tuple[Any, Family | None]:
    """The model, and its family if it has one."""
    with optional("models of transformers", "unmask[text]"):
        import transformers
    transformers.utils.logging.disable_progress_bar()  # many lines for seconds of reading
    transformers.utils.logging.set_verbosity_error()  # what is missing is checked below
    options = options | {"output_loading_info": True, "use_safetensors": True}
    try:
        check_published(source)
        published = transformers.PretrainedConfig.get_config_dict(source)[0]
        family = family_of(published)
        if family is not None:
            config = configure(family, published, source)
            options |= {"config": config, "key_mapping": dict(family.weights or {}) or None}
            model, report = getattr(transformers, family.architecture).from_pretrained(source, **options)
        else:
            options["trust_remote_code"] = trust_remote_code
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            own_code = getattr(config, "auto_map", None) or {}
            kinds = ("AutoModelForMaskedLM", "AutoModel", "AutoModelForCausalLM")
            kind = next((kind for kind in kinds if kind in own_code), "AutoModelForMaskedLM")
            model, report = getattr(transformers, kind).from_pretrained(source, **options)
    except UnmaskError:
        raise
    except Exception as error:  # transformers raises many types for what it cannot read
        if "Unrecognized configuration class" in str(error):
            raise IncompatibleDenoiserError(
                f"{source} is a {config.model_type} without a head for masked tokens; it cannot fill holes"
            ) from None
        raise UnmaskError(f"cannot read the model {source}: {unread(error)}") from None
    check_finite(model, source)
    missing = sorted(name for name in report["missing_keys"] if family is not None or not name.endswith("bias"))
    if missing:
        raise IncompatibleDenoiserError(
            f"{source} lacks weights of a masked language model, {missing[0]} for example: its head was not saved, or "
            "is of another kind"
        )
    if family is not None and report["unexpected_keys"]:
        raise IncompatibleDenoiserError(
            f"{source} has weights that {family.architecture} has no place for, {sorted(report['unexpected_keys'])[0]} "
            "for example: it is of another kind than its configuration says"
        )
    return model, family
