"""Model cards: what is known of a model and of the run that made it, as the ``README.md`` that the hub reads.

A card goes with its weights: a model that is saved or pushed as it was loaded keeps the card of its folder. One whose
weights have changed since gets a card of what can be told from the model itself; a training run tells what it did.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin
from safetensors import SafetensorError, safe_open
from torch import nn

from tasks import UnmaskError
from tasks.files import write_atomically

CARD = "README.md"
LICENSE = "mit"  # of this package, of the models in it, and of those in which there is nothing else
MARK = "<!-- Written by unmask, and anew when a model is saved here again. To keep it, delete this line. -->"
PLACES = ("out", "resume", "save_every", "log_every", "threads")  # settings that do not change what is learned
NAMES = ("task", "env", "denoiser")  # settings that a task or process from Python takes the place of
command: ContextVar[str] = ContextVar("command", default="")
"""The command line that is being run, if any."""


# ---------------------------------------------------------------------- models that have a card
class HubModel(PyTorchModelHubMixin, library_name="unmask"):
    """A model with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``, whose card says what is known of it.

    ``model_card_kwargs`` of these methods are fields of the card's front matter, such as ``{"license": "apache-2.0"}``.

    Attributes:
        kind: what cards call it. origin: the folder that it was last loaded from or saved in.
    """

    kind = "model"
    origin: Path | None = None

    def save_pretrained(self, save_directory: str | os.PathLike, **options: Any) -> str | None:
        """``config.json``, ``model.safetensors`` and a card; a card that a person wrote stays as it is."""
        folder = Path(save_directory)
        write(folder, self.generate_model_card(**(options.get("model_card_kwargs") or {})).content)
        return super().save_pretrained(folder, **options)

    def generate_model_card(self, **data: Any) -> ModelCard:
        card = ModelCard(card_of(self))
        for name, value in data.items():
            setattr(card.data, name, value)
        return card

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Any:
        model = super()._from_pretrained(model_id=model_id, **{"strict": True} | options)
        model.origin = Path(model_id).resolve() if Path(model_id).is_dir() else None
        return model

    @classmethod
    def _load_as_pickle(cls, *_: Any) -> NoReturn:
        raise UnmaskError(f"no {cls.kind} there: model.safetensors is missing, and pickles are not read")


def card_of(model: nn.Module) -> str:
    """The card of the folder that ``model`` came from, if its weights are still the same; else what it tells itself."""
    origin = getattr(model, "origin", None)
    if origin is not None and (origin / CARD).is_file() and same_weights(model, origin):
        carried = _read(origin / CARD)
        if carried is not None:
            data, text = carried
            return _marked(front_matter(model) | data, text)
    kind = getattr(model, "kind", type(model).__name__)
    return build(kind.capitalize(), front_matter(model), known(model), "What made these weights was not recorded.")


def same_weights(model: nn.Module, folder: Path) -> bool:
    """Whether the weights in ``folder`` are those of ``model``, to the precision in which they are stored there."""
    state = model.state_dict()
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return False
    return stored.keys() == state.keys() and all(
        torch.equal(value, state[key].detach().cpu().to(value.dtype)) for key, value in stored.items()
    )


# ---------------------------------------------------------------------- cards
def build(title: str, front: dict[str, Any], rows: dict[str, Any], *sections: str) -> str:
    """The text of a card.

    Args:
        front: its front matter. rows: facts by name, for a table. In both None is not known, and left out.
    """
    facts = {name: value for name, value in rows.items() if value not in (None, "")}
    lines = [f"# {title}", "", "| | |", "|---|---|", *(f"| {name} | {_cell(fact)} |" for name, fact in facts.items())]
    return _marked(front, "\n\n".join(["\n".join(lines), *filter(None, sections)]))


def known(model: nn.Module) -> dict[str, Any]:
    """What a model tells of itself."""
    sizes = (getattr(model, "vocab_size", None), getattr(model, "length", None))
    return {
        "symbols, positions": None if None in sizes else f"{sizes[0]:,}, {sizes[1]:,}",
        "fingerprint of its symbols": getattr(model, "fingerprint", None),
        "actions": getattr(model, "actions", None),
        "learned from": getattr(model, "trained", None),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "network passes": getattr(model, "num_passes", None),
    }


def front_matter(model: nn.Module) -> dict[str, Any]:
    """What a class of models says: the library and tags."""
    info = getattr(model, "_hub_mixin_info", None)
    return {"library_name": "unmask"} if info is None else info.model_card_data.to_dict()


def training(settings: Any, number: int = 1) -> str:
    """The section of a card on the run with these settings, a dataclass, by so many processes."""
    fields = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    fields = {name: value for name, value in fields.items() if name not in (*PLACES, *NAMES)}
    lines = ["## Training", ""]
    if command.get():
        lines += ["```bash", command.get(), "```", ""]
    versions = ", ".join(f"{name} {version}" for name in ("unmask", "torch") if (version := _version(name)))
    together = f", {number} processes" if number > 1 else ""
    lines += [f"With {versions}{together}. Settings of `{type(settings).__name__}`:", ""]
    return "\n".join([*lines, "```json", json.dumps(fields), "```"])


def license_of(sources: Sequence[str | None], *roots: Path) -> str | None:
    """The licence of a model in which there is something of ``sources``: what their cards say, where all say the same;
    this package's where there are none; None, not known.

    Args:
        sources: models' names with their options; None: one that has no name. roots: where packaged ones stand.
    """
    found = {_stated(source, roots) for source in sources} if sources else {LICENSE}
    return found.pop() if len(found) == 1 else None


def _stated(source: str | None, roots: Sequence[Path]) -> str | None:
    if source is None:
        return None
    name = source.removeprefix("hf:").partition(",")[0]
    folders = [Path(name), *(root / name.partition(":")[0] for root in roots)]
    card = next((_read(folder / CARD) for folder in folders if (folder / CARD).is_file()), None)
    return None if card is None else card[0].get("license")


def write(folder: Path, text: str) -> None:
    """Write the card, but not over one that a person wrote: one without the mark of ours.

    Raises:
        UnmaskError: it cannot be written.
    """
    if not is_ours(folder):
        return
    write_atomically(folder / CARD, lambda path: path.write_text(text, encoding="utf-8"))


def is_ours(folder: Path) -> bool:
    """Whether there is no card in ``folder``, or one that was written here."""
    path = folder / CARD
    return not path.exists() or (path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace"))


# ---------------------------------------------------------------------- small parts
def _read(path: Path) -> tuple[dict[str, Any], str] | None:
    """Front matter, which may be empty, and text; None: it cannot be read."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return {}, text
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
    except Exception:  # of the library's parser
        return None
    return card.data.to_dict(), card.text


def _marked(data: dict[str, Any], text: str) -> str:
    """A card's text with its front matter and the mark."""
    front = ModelCardData(**data, ignore_metadata_errors=True).to_yaml()
    return f"---\n{front}\n---\n{MARK}\n\n{text.replace(MARK, '').strip()}\n"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
