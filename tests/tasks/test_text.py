"""Text: splits, windows, holes, and the errors of a user's files."""

from pathlib import Path

import pytest
import torch

from tasks import UnmaskError
from tasks.text import UNKNOWN, Corpus, CorpusError, Text, from_files

PROSE = "the order of things is the order of time, and time is short.\n" * 60


def small(**options) -> Text:
    return Text(Corpus(PROSE + "q", PROSE[:200], "zebra " * 40), length=16, **options)


def test_windows_are_pieces_of_the_training_text() -> None:
    task = small()
    windows = task.clean(50, torch.Generator().manual_seed(0))
    assert windows.shape == (50, 16)
    for window in windows:
        assert "".join(task.symbols[int(t)] for t in window).replace(UNKNOWN, "q") in PROSE + "q"
    assert torch.equal(windows, task.clean(50, torch.Generator().manual_seed(0)))
    assert len(windows.unique(dim=0)) > 20


def test_rare_characters_share_a_symbol() -> None:
    task = small()
    assert "q" not in task.symbols
    assert task.symbols[-1] == UNKNOWN
    drawn = task.draw(task.heldout(1).answers[0])
    assert drawn.replace(UNKNOWN, "z").count("z") == drawn.count(UNKNOWN)
    assert "z" not in task.symbols  # a test character that training never showed
    assert UNKNOWN in drawn


def test_instances_hide_their_share_and_are_rewarded_for_it() -> None:
    task = small(hide=0.25)
    instances = task.sample(8, torch.Generator().manual_seed(1))
    holes = instances.tokens == task.mask_id
    assert (holes.sum(1) == 4).all()
    assert torch.equal(instances.tokens[~holes], instances.answers[~holes])
    assert task.reward(instances.answers, instances).tolist() == [1.0] * 8
    wrong = instances.answers.clone()
    rows, columns = holes.nonzero(as_tuple=True)
    wrong[0, columns[rows == 0][0]] += 1
    assert task.reward(wrong, instances).tolist() == [0.75] + [1.0] * 7
    assert task.metrics(wrong, instances)["exact"].tolist() == [0.0] + [1.0] * 7


def test_heldout_is_fixed_and_of_its_split() -> None:
    task = small()
    first, again = task.heldout(5), small().heldout(5)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(task.heldout(5, "validation").answers, first.answers)
    assert task.draw(task.heldout(5, "validation").answers[0]) == PROSE[:16]


def test_a_users_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(PROSE)
    corpus = from_files([file, file])
    assert len(corpus.train) == 2 * (len(PROSE) * 18 // 20) + 2
    assert corpus.train[:100] == PROSE[:100]
    assert corpus.test.endswith("short.\n")
    assert Text(corpus, length=8).length == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_files(["nowhere.txt"]), "cannot read nowhere.txt"),
        (lambda: Text(Corpus("long enough", "short", "long enough"), length=8), "validation text is shorter"),
        (lambda: small(hide=0.0), "hide above 0"),
    ],
)
def test_mistakes(make, message: str) -> None:
    with pytest.raises(UnmaskError, match=message):
        make()


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(CorpusError, match="as UTF-8 text"):
        from_files([file])
