"""The table of results in README.md, from committed JSON.

python benchmarks/readme.py    # rewrites the lines between the two marks
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks/readme.py -->\n", "<!-- end -->\n"

Row = dict[str, Any]


def rows(name: str) -> list[Row]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def failures(row: Row) -> int:
    return row["failures"] if "failures" in row else round((1 - row["solve_rate"]) * row["n"])


def passes(row: Row) -> float:
    """Of denoiser and policy, per instance."""
    return row["passes"] + row.get("policy_passes", 0.0)


def among(values: list[float], digits: int = 1) -> str:
    low, high = rounded(min(values), digits), rounded(max(values), digits)
    return low if low == high else f"{low} to {high}"


def rounded(value: float, digits: int = 1) -> str:
    """Halves up, as people round."""
    return f"{value + 1e-9:.{digits}f}"


def single(name: str) -> tuple[str, str, str]:
    """Failures of the best heuristic and of each seed of a policy, and their passes."""
    heuristics = [row for row in rows(name) if row["order"] in ("max_confidence", "margin", "entropy")]
    learned = [row for row in rows(name) if row["order"].startswith("runs/")]
    best = min(heuristics, key=failures)
    seeds = ", ".join(str(failures(row)) for row in learned)
    spent = f"{rounded(passes(best))}; {among([passes(row) for row in learned])}"
    return f"{failures(best):,} of {best['n']:,} fail ({best['order']})", seeds, spent


def sets() -> tuple[str, str, str]:
    """The best confidence threshold, and each seed at the decoding threshold that is the default."""
    listed = rows("rewards-sets-sudoku6-tiny")
    best = min((row for row in listed if row["order"] == "threshold"), key=failures)
    default = {"threshold": 0.5, "read": "always"}
    learned = [row for row in listed if row["setting"] == default]
    seeds = ", ".join(str(failures(row)) for row in learned)
    forwards = among([row["nfe"] for row in learned])
    spent = f"{rounded(passes(best))}; {among([passes(row) for row in learned])}"
    rule = f"{failures(best):,} of {best['n']:,} fail in {rounded(best['nfe'])} forwards (confidence threshold)"
    return rule, f"{seeds} in {forwards}", spent


def cells(name: str, policies: str = "runs/") -> tuple[str, str, str]:
    """Cells that are right, in per cent: of the best heuristic, and of the policies whose names begin so."""
    listed = rows(name)
    learned = [row for row in listed if row["order"].startswith(policies)]
    heuristics = [row for row in listed if row["order"] in ("max_confidence", "margin", "entropy")]
    best = max(heuristics, key=lambda row: row["cell_accuracy"])
    shares = ", ".join(rounded(100 * row["cell_accuracy"]) for row in learned)
    spent = f"{rounded(passes(best))}; {among([passes(row) for row in learned])}"
    return f"{rounded(100 * best['cell_accuracy'])} % of the cells right ({best['order']})", f"{shares} %", spent


def table() -> str:
    """Markdown, one row per setting."""
    settings = {
        "6x6 Sudoku, one cell per forward": single("rewards-sudoku6-tiny"),
        "6x6 Sudoku, several cells per forward": sets(),
        "4x4 Sudoku, a denoiser stopped early": cells("rewards-sudoku4-weak"),
        "4x4 Sudoku, a larger denoiser stopped early, a policy of 1.7 % of its size": cells(
            "narrow", "runs/narrow/no-hidden"
        ),
        "6x6 Sudoku, a denoiser trained to read its own belief": single("rewards-sudoku6-recurrent"),
    }
    head = [
        "frozen denoiser and task",
        "best rule",
        "learned from rewards, three seeds",
        "network passes: rule; learned",
    ]
    lines = [head, ["---"] * len(head), *([name, *row] for name, row in settings.items())]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def updated(page: str) -> str:
    """``page`` with the table as it is now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
