"""What the README shows must run."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_python_of_the_readme_runs(block: str) -> None:
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})


def test_the_example_of_a_new_environment_is_complete_and_short() -> None:
    (example,) = [block for block in BLOCKS if "unmask_env.register(" in block]
    assert len([line for line in example.splitlines() if line.strip()]) <= 40
