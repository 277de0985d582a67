"""Write the golden values anew: ``python -m tests.golden.write``. Say in the changelog what changed, and why."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from tests.golden.cases import CASES, INTERFACES, Case, Interface
from tests.golden.play import play, play_interface

VALUES = Path(__file__).parent / "values.json"
DECIMALS = {"reward": 6, "log_prob": 2, "log_reference": 2}  # 3 would tell processors apart


def digest(name: str, values: Tensor) -> str:
    """A short hash of a quantity: whole numbers and flags as they are; floats clamped at -1e4 and rounded as
    ``DECIMALS`` say, to whole numbers, which know no -0.0."""
    if values.is_floating_point():
        values = (values.double().clamp(min=-1e4) * 10 ** DECIMALS[name]).round()
    return hashlib.sha256(values.long().contiguous().numpy().tobytes()).hexdigest()[:12]


def hashes(case: Case | Interface) -> dict[str, str]:
    """Quantity to hash."""
    played = (play_interface if isinstance(case, Interface) else play)(**case._asdict())
    return {name: digest(name, values) for name, values in played.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = [f"{json.dumps(case.id)}: {json.dumps(hashes(case))}" for case in (*CASES, *INTERFACES)]
    VALUES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
