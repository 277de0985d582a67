"""Models by name, folder or hub id, and training states that resume exactly.

Only safetensors and JSON are ever read: no pickle is loaded from a file that a user names.
"""

from __future__ import annotations

import copy
import inspect
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pretrain import card
from tasks import UnknownNameError, UnmaskError
from tasks.errors import first_line
from tasks.files import read_text, write_atomically

PACKAGED_DENOISERS = Path(__file__).parent / "models"
Model = TypeVar("Model", bound=nn.Module)


class CheckpointError(UnmaskError):
    """A checkpoint that is missing, truncated, or not what it was taken for."""


# ---------------------------------------------------------------------- models
def save_model(model: nn.Module, folder: Path, half: bool = False, described: str | None = None) -> None:
    """Write ``README.md``, ``config.json`` and ``model.safetensors``, each atomically, the weights last.

    Args:
        half: store float16 weights; they are read back into float32.
        described: the model's card; default: :func:`pretrain.card.card_of`. One that a person wrote there stays.
    """
    text = card.card_of(model) if described is None else described
    stored = copy.deepcopy(model).cpu()
    card.write(folder, text)
    with tempfile.TemporaryDirectory() as temporary:
        (stored.half() if half else stored).save_pretrained(temporary)
        for name in ("config.json", "model.safetensors"):
            content = (Path(temporary) / name).read_bytes()
            write_atomically(folder / name, lambda path, content=content: path.write_bytes(content))
    if isinstance(model, card.HubModel):
        model.origin = folder.resolve()


def packaged(root: Path) -> list[str]:
    """Names of the models that ship under ``root``."""
    return sorted(p.parent.name for p in root.glob("*/config.json"))


def load_model(cls: type[Model] | tuple[type[Model], ...], name: str | Path, packaged_root: Path, kind: str) -> Model:
    """A model by packaged name, by folder, or by hub id (``owner/name``), on the CPU in float32.

    Args:
        cls: the model class, or several, of which the first counts whose required arguments ``config.json`` has.
        packaged_root: folder of the models that ship under a plain name.
        kind: what to call it in messages, for example ``"denoiser"``.

    Raises:
        CheckpointError: no such folder, a file missing, truncated or of another kind.
        UnknownNameError: a plain name that is neither packaged nor a folder.
    """
    name = str(name)
    if not name.strip():
        raise UnknownNameError(kind, name, packaged(packaged_root))
    folder = packaged_root / name if name in packaged(packaged_root) else Path(name)
    if not folder.exists():
        hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not folder.parent.exists()
        if hub_id:  # where the first part is a folder here, a missing folder was meant
            folder = _download(name, kind)
        elif "/" in name:
            raise CheckpointError(f"no {kind} at {name}: the folder does not exist")
        else:
            raise UnknownNameError(kind, name, packaged(packaged_root))
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise CheckpointError(
                f"no {kind} at {name}: {file} is missing; needed is a folder with config.json and model.safetensors"
            )
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}/config.json is no {kind}'s: it holds no settings")
    _check_utf8(folder)
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{folder}/model.safetensors is truncated or not safetensors ({error})") from None
    classes = cls if isinstance(cls, tuple) else (cls,)
    make = next((one for one in classes if _required(one) <= config.keys()), classes[-1])
    try:
        if not 0 <= (config.get("layers") or 0) <= len(stored):
            raise ValueError(f"layers is {config['layers']}, and there are {len(stored)} tensors")
        with torch.device("meta"):  # sizes that nothing is stored of cost nothing
            empty = make(**config)
    except (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{folder} is no {kind}: its config.json does not fit ({first_line(error)})") from None
    expected = {key: tuple(value.shape) for key, value in empty.state_dict().items()}
    if stored != expected:
        odd = sorted(stored.items() ^ expected.items())[0][0]
        raise CheckpointError(f"{folder} is no {kind} of its config.json: tensor {odd!r} differs")
    model = make(**config)
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = {key: file.get_tensor(key) for key in stored}
    check_weights(weights, folder / "model.safetensors")
    model.load_state_dict(weights)
    if isinstance(model, card.HubModel):
        model.origin = folder.resolve()
    return model.eval()


def read_json(path: Path) -> Any:
    """What a file of JSON holds. Raises :class:`CheckpointError` where it cannot be read (see
    :func:`tasks.files.read_text`), is no JSON, or nested beyond reading."""
    text = read_text(path, CheckpointError)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, numbers of thousands of digits
        raise CheckpointError(f"{path} is not JSON ({first_line(error)})") from None


def check_weights(weights: Mapping[str, Tensor], file: Path) -> None:
    """Raises :class:`CheckpointError` for a tensor of ``file`` that holds other values than finite floating numbers."""
    for key, value in weights.items():
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise CheckpointError(f"{file}: tensor {key!r} holds values that are no finite numbers")


def _check_utf8(path: Path) -> None:
    """Raises :class:`CheckpointError` for a name that safetensors does not open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: safetensors opens no folder whose name is not UTF-8; rename it") from None


def _required(cls: type) -> set[str]:
    """Arguments that the constructor cannot do without."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD} - {"self"}


def _download(name: str, kind: str) -> Path:
    """The folder of hub id ``name`` in the local cache: its two files and nothing else, so never a pickle."""
    huggingface_hub.utils.logging.set_verbosity_error()  # what goes wrong is said once, below
    try:
        paths = [Path(hf_hub_download(name, file)) for file in ("config.json", "model.safetensors")]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"no {kind} at {name}: not a folder, and not on the hub ({first_line(error)})") from None
    return paths[0].parent


# ---------------------------------------------------------------------- training states
def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON with tensors replaced by references; dictionaries become pairs so that integer keys survive."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        # A clone on the CPU: safetensors refuses tensors that share memory.
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if isinstance(value, dict):
        return {"pairs": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_pack(item, tensors) for item in value]}
    return {"value": value}


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    match value:
        case {"tensor": key}:
            return tensors[key]
        case {"pairs": pairs}:
            return {key: _unpack(item, tensors) for key, item in pairs}
        case {"list": items}:
            return [_unpack(item, tensors) for item in items]
        case {"value": plain}:
            return plain
    raise CheckpointError("not a training state")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write nested dictionaries of tensors and plain values to one safetensors file, atomically."""
    tensors: dict[str, Tensor] = {}
    packed = json.dumps(_pack(state, tensors))
    # Not save_file: it writes to a file of a random name first, which a killed run would leave behind.
    content = save(tensors, metadata={"unmask_state": packed})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def load_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote.

    Raises:
        CheckpointError: the file is missing, truncated, or no training state.
    """
    if not path.is_file():
        raise CheckpointError(f"nothing to resume: {path} does not exist; start without --resume must")
    try:
        with safe_open(path, "pt") as file:
            packed = (file.metadata() or {}).get("unmask_state")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or not a training state ({error})") from None
    if packed is None:
        raise CheckpointError(f"{path} is a safetensors file but not a training state of this package")
    try:
        return _unpack(json.loads(packed), tensors)
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is a damaged training state ({first_line(error)})") from None


def checked_device(device: torch.device | str) -> torch.device:
    """``device``, if this machine has it. Raises :class:`UnmaskError`: an unknown device, CUDA where there is none."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda") or isinstance(device, int):
        raise UnmaskError(f"unknown device {device!r}; use cpu, cuda or cuda:N")
    if found.type == "cuda" and not (found.index or 0) < torch.cuda.device_count():
        raise UnmaskError(
            f"this machine has {torch.cuda.device_count()} CUDA devices, so no {device}; use --device cpu"
        )
    return found


def step_generator(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator that depends only on ``key`` (seed, step, rank, ...).

    Training loops make one per step, so a resumed run draws what the uninterrupted one would have drawn, and no
    generator state needs saving. Keys that differ only in trailing zeros coincide.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)
