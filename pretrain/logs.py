"""Where the scalars of a run go: to TensorBoard's files, and to Weights & Biases where that is asked for."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint import read_json
from tasks import UnmaskError
from tasks.errors import MissingLibraryError, first_line, optional
from tasks.files import write_json

METRICS = ("validation/policy", "validation/reference", "loss")  # beside the settings in TensorBoard's table of runs


class Logs:
    """The logs of one run, open until ``close``. Without the library tensorboard there are no files of it, and
    ``missing`` says what to install.

    Args:
        out: the run's folder: ``tb/`` for TensorBoard, ``wandb/`` for Weights & Biases.
        settings: of the run, nested; its hyper-parameters.
        step: at which it goes on; TensorBoard forgets what an earlier try has logged from there on.
        project: of Weights & Biases; None: no logs there. A resumed run goes on as the run that it was.

    Raises:
        UnmaskError: a project, and wandb is not installed or cannot log there.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], step: int, project: str | None) -> None:
        self.wandb = None if project is None else _wandb(out, settings, project)
        self.missing = ""
        try:
            self.tensorboard = _tensorboard(out / "tb", settings, step)
        except MissingLibraryError as error:
            self.tensorboard, self.missing = None, str(error)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Scalars after ``step`` steps."""
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None and values:
            self.wandb.log({**values, "step": step})

    def close(self, failed: bool = False) -> None:
        """Write what is left, and end the run of W&B, as ``failed`` or not."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(failed))


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings by dotted names, as TensorBoard takes them."""
    values: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{before}{name}.")
        else:
            values[before + name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return values


def _tensorboard(folder: Path, settings: Mapping[str, Any], step: int) -> Any:
    """A writer of scalars, which has written the settings as hyper-parameters into the same file."""
    with optional("no TensorBoard logs", "unmask[train]"):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams
    _next_second(folder)
    writer = SummaryWriter(str(folder), purge_step=step)
    for summary in hparams(flat(settings), dict.fromkeys(METRICS, 0.0)):
        writer.file_writer.add_summary(summary)
    return writer


def _next_second(folder: Path) -> None:
    """Wait until TensorBoard's new file is named after, and so read after, those that are there."""
    newest = max((file.name.split(".")[3] for file in folder.glob("events.out.tfevents.*")), default="0")
    while newest.isdigit() and time.time() < int(newest) + 1 <= time.time() + 2:
        time.sleep(0.05)


def _wandb(out: Path, settings: Mapping[str, Any], project: str) -> Any:
    """The run of Weights & Biases; ``wandb.json`` keeps its id."""
    with optional("logs at Weights & Biases", "unmask[wandb]"):
        import wandb
    file, had = out / "wandb.json", (out / "wandb").exists()
    try:
        known = read_json(file)
    except UnmaskError:
        known = {}
    same = isinstance(known, dict) and known.get("project") == project
    identity = str(known["id"]) if same and "id" in known else secrets.token_hex(4)
    options = {"id": identity, "resume": "allow", "name": str(out), "dir": str(out), "allow_val_change": True}
    try:
        run = wandb.init(project=project, config=dict(settings), **options)
    except Exception as error:  # of many types: no account, no network, a name that it does not take
        if not had:
            shutil.rmtree(out / "wandb", ignore_errors=True)
        raise UnmaskError(f"Weights & Biases takes no logs for the project {project!r}: {first_line(error)}") from None
    run.define_metric("*", step_metric="step")  # a step may be logged again after a crash; its own counter only rises
    write_json(file, {"project": project, "id": identity})
    return run
