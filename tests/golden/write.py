"""Write the golden values anew: ``python -m tests.golden.write``. Say in the changelog what changed, and why."""

import json
from pathlib import Path

import torch

from tests.golden.cases import CASES, INTERFACES
from tests.golden.play import play, play_interface

VALUES = Path(__file__).parent / "values.json"

if __name__ == "__main__":
    torch.set_num_threads(1)
    values = {case.id: play(case) for case in CASES}
    values |= {"/".join(map(str, interface)): play_interface(*interface) for interface in INTERFACES}
    VALUES.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in values.items()) + "\n}\n")
