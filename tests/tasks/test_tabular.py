"""Tables: bins, vocabularies per column, the metrics by hand, and the errors of a user's file."""

from pathlib import Path

import numpy as np
import pytest
import torch

import tasks
from pretrain.backbone import Backbone
from pretrain.train import OBJECTIVES, pretrain
from tasks import Tabular, UnmaskError
from tasks.tabular import shape, trend


def written(folder: Path, rows: int = 200, seed: int = 0) -> Path:
    """A number, a number of four values that follows it, and a category that follows that."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=rows)
    level = np.digitize(x, [-1, 0, 1])
    lines = [f"{a:.5f},{b},{'low' if b < 2 else 'high'}" for a, b in zip(x, level, strict=True)]
    file = folder / "table.csv"
    file.write_text("x,level,kind\n" + "\n".join(lines) + "\n")
    return file


@pytest.fixture
def task(tmp_path: Path) -> Tabular:
    return tasks.get(f"tabular:{written(tmp_path)},bins=8")


def test_every_column_has_its_symbols(task: Tabular) -> None:
    assert task.vocabularies == (8, 4, 2)
    assert task.vocab_size == 14
    assert task.symbols[-2:] == ("kind=high", "kind=low")
    rows = task.clean(500, torch.Generator().manual_seed(0))
    first, last = rows.min(0).values.tolist(), rows.max(0).values.tolist()
    assert (first, last) == ([0, 8, 12], [7, 11, 13])
    counts = task._tokens["train"][:, 0].bincount()
    assert counts.min() >= 18
    assert counts.max() <= 22, "160 rows in 8 bins"


def test_rows_are_split_once_and_for_all(task: Tabular) -> None:
    assert {split: len(rows) for split, rows in task.rows.items()} == {"train": 160, "validation": 20, "test": 20}
    every = np.concatenate(list(task.rows.values()))
    assert np.array_equal(np.sort(every[:, 0]), np.sort(task.table.values[:, 0]))
    assert len(task.heldout().answers) == 20
    assert torch.equal(task.heldout(5).tokens, task.heldout(5).tokens)


def test_decoding_stays_in_the_bin(task: Tabular) -> None:
    tokens = task.encode(task.rows["test"])
    values = task.decode(tokens, torch.Generator().manual_seed(0))
    assert torch.equal(task.encode(values), tokens)
    assert np.array_equal(values[:, 1:], task.rows["test"][:, 1:])
    assert not np.array_equal(values[:, 0], task.rows["test"][:, 0])
    assert np.isin(values[:, 0], task.rows["train"][:, 0]).all()


def test_a_denoiser_predicts_a_columns_own_symbols_alone(task: Tabular, tmp_path: Path) -> None:
    config = OBJECTIVES["mdm"](task="t", out=str(tmp_path / "run"), steps=30, batch=64, dim=16, layers=1, heads=2)
    model = pretrain(config, task)
    loaded = Backbone.from_pretrained(tmp_path / "run")
    tokens = torch.full((1, 3), task.mask_id)
    for one in (model, loaded):
        probabilities = one(tokens).logits.softmax(-1)[0]
        assert probabilities[0, :8].sum().item() == pytest.approx(1)
        assert probabilities[1, 8:12].sum().item() == pytest.approx(1)
        assert probabilities[2, 12:].sum().item() == pytest.approx(1)
        assert (probabilities[0, 8:] == 0).all()
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)


@pytest.mark.parametrize("sizes", [[8, 4, 1], [8, 6], [14, 0, 0]])
def test_vocabularies_that_do_not_fit(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="vocabularies must be 3 sizes of at least 1 that add up to 14"):
        Backbone(14, [[0], [1], [2]], 16, 1, 2, vocabularies=sizes)


def test_shape_by_hand() -> None:
    """1 - KS of the numbers is 1/2; 1 - total variation of the categories (1/2, 1/2) and (1/4, 3/4) is 3/4."""
    real = np.array([[1.0, 0], [2, 0], [3, 1], [4, 1]])
    generated = np.array([[3.0, 0], [3, 1], [4, 1], [4, 1]])
    assert shape(real, generated, (None, ("a", "b"))) == pytest.approx((0.5 + 0.75) / 2)
    assert shape(real, real, (None, ("a", "b"))) == 1


def test_trend_by_hand() -> None:
    real = np.array([[0.0, 0], [1, 1], [2, 2], [3, 3]])
    turned = real * [1, -1]
    assert trend(real, turned, (None, None)) == pytest.approx(0)  # correlations 1 and -1
    assert trend(real, real, (None, None)) == pytest.approx(1)
    a = np.array([[0.0, 0], [0, 0], [1, 1], [1, 1]])
    b = np.array([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    assert trend(a, b, (("x", "y"), ("u", "v"))) == pytest.approx(0.5)
    mixed = trend(np.array([[0.0, 0], [10, 1]]), np.array([[0.4, 0], [5, 1]]), (None, ("u", "v")))
    assert mixed == pytest.approx(0.5)  # 0 and 0.4 share a bin of width 1; 10 and 5 do not


@pytest.mark.parametrize(("source", "columns", "rows"), [("magic", 11, 19020), ("letter", 17, 20000)])
def test_packaged_tables(source: str, columns: int, rows: int) -> None:
    task = tasks.get(f"tabular:{source}")
    assert task.length == columns
    assert sum(len(part) for part in task.rows.values()) == rows
    draw = torch.Generator().manual_seed(0)
    real = task.clean(3000, draw)
    good = task.quality(real, draw)
    assert good["shape"] > 0.96
    assert good["trend"] > 0.95
    apart = torch.stack([column[torch.randperm(3000, generator=draw)] for column in real.T], 1)
    bad = task.quality(apart, draw)
    assert bad["shape"] == pytest.approx(good["shape"], abs=0.01)
    assert bad["trend"] < good["trend"] - 0.05


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "name a CSV file or one of"),
        ("", "has 0 rows; a table needs a header and at least 20"),
        ("a,b\n" + "1,2\n" * 19, "has 19 rows"),
        ("a,b\n" + "1,2\n" * 30 + "1\n", "line 32: 2 non-empty entries expected"),
        ("a,b\n" + "1,2\n" * 30 + "1,\n", "line 32: 2 non-empty entries expected"),
        ("a,b\n" + "1,2\n" * 30 + "1,nan\n" * 3, "line 32: 'nan' in 'b', a column of numbers"),
        ("a,b\n" + "1,2\n" * 30 + "NA,2\n", "line 32: 'NA' in 'a', a column of numbers"),
        ("a;b\n" + "1;2\n" * 30, "has one column; entries are separated by commas"),
        ("a,b\n" + "".join(f"{i},id{i}\n" for i in range(30)), "'b' has 30 different entries in 30 rows"),
    ],
)
def test_files_that_are_no_table(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "some.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UnmaskError, match=message) as caught:
        tasks.get(f"tabular:{file}")
    assert "\n" not in str(caught.value)


def test_too_few_bins(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="bins must be a whole number of at least 2, not 1"):
        tasks.get(f"tabular:{written(tmp_path)},bins=1")
