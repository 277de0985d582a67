"""Text: splits, windows, holes, and the errors of a user's files."""

from pathlib import Path

import pytest
import torch

import tasks
from tasks import UnmaskError
from tasks.text import UNKNOWN, Corpus, CorpusError, Text, from_datasets, from_files

PROSE = "the order of things is the order of time, and time is short.\n" * 60


def small(**options) -> Text:
    return Text(Corpus((PROSE + "q",), (PROSE[:200],), ("zebra " * 40,)), **{"length": 16} | options)


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


def test_spans_are_hidden_in_runs() -> None:
    task = small(length=30, hide=0.4, span=5)
    holes = task.sample(200, torch.Generator().manual_seed(1)).tokens == task.mask_id
    assert (holes.sum(1) == 12).all()
    starts = (holes & ~torch.nn.functional.pad(holes, (1, 0))[:, :-1]).sum(1)
    assert int(starts.max()) <= 5  # whole runs of five, one cut short, and those at the edges
    assert float(starts.float().mean()) < 3
    assert holes.any(0).all()  # no place is spared
    loose = small(length=30, hide=0.4).sample(200, torch.Generator().manual_seed(1)).tokens == task.mask_id
    assert float((loose & ~torch.nn.functional.pad(loose, (1, 0))[:, :-1]).sum(1).float().mean()) > 5
    with pytest.raises(UnmaskError, match="span must be between 1 and 16, the length, not 17"):
        small(span=17)


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
    assert corpus.train == (PROSE[: len(PROSE) * 18 // 20],) * 2
    assert corpus.test[0].endswith("short.\n")
    by_name = [tasks.get(f"text:{tmp_path / part},length=8") for part in ("", "mine.txt")]
    assert [task.length for task in by_name] == [8, 8]
    assert torch.equal(by_name[0].heldout(3).answers, by_name[1].heldout(3).answers)


def test_packed_windows_cross_documents_and_others_do_not() -> None:
    corpus = Corpus(("a" * 30, "b" * 5, "c" * 20), ("a" * 9, "c" * 7), ("b" * 8,))
    packed, apart = (Text(corpus, length=8, rare=1, packed=packed) for packed in (True, False))

    def seen(task: Text) -> set[str]:
        return {"".join(sorted(set(task.draw(w)))) for w in task.clean(500, torch.Generator().manual_seed(0))}

    assert seen(apart) == {"a", "c"}  # the document of 5 has no window
    assert {"\na", "\nab", "\nbc"} <= seen(packed)
    assert apart.windows("train") == 23 + 13
    assert apart.windows("validation") == 2
    assert packed.windows("train") == 30 + 2 + 5 + 2 + 20 - 7
    with pytest.raises(CorpusError, match="the test text is shorter than a window of 9 symbols"):
        Text(corpus, length=9, rare=1, packed=False)


def test_byte_pairs_lose_nothing_and_are_fewer() -> None:
    task = small(level="bpe", pieces=280, length=8)
    assert task.vocab_size == 280
    assert len(task.texts["train"]) < len(PROSE) / 2
    joined = "".join(task.symbols[t] for t in task.texts["test"].tolist())
    assert joined == "zebra " * 40
    again = small(level="bpe", pieces=280, length=8)
    assert torch.equal(again.texts["train"], task.texts["train"])
    accents = Text(Corpus(("été à Zürich " * 30,) * 2, ("naïve 😀 " * 9,), ("ÅÄÖ" * 30,)), level="bpe", length=8)
    assert len(accents.texts["test"]) == 2 * 90  # letters that training never showed fall apart into their bytes


def test_a_dataset(tmp_path: Path) -> None:
    """A local folder goes through the same library as one of the hub."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": [f"{i} {PROSE}" for i in range(40)], "n": list(range(40))}).to_parquet(
        tmp_path / "train.parquet"
    )
    corpus = from_datasets(str(tmp_path))
    assert [len(documents) for documents in corpus] == [36, 2, 2]
    assert corpus.train[0] == f"0 {PROSE}"
    assert corpus.validation[-1].startswith("37 ") or corpus.validation[-1].startswith("39 ")
    assert set(corpus.train).isdisjoint(corpus.validation + corpus.test)
    task = tasks.get(f"text:hf:{tmp_path},length=32,packed=false")
    assert task.length == 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_files(["nowhere.txt"]), "cannot read nowhere.txt"),
        (lambda: Text(Corpus(("long enough",), ("short",), ("long enough",)), length=8), "validation text is shorter"),
        (lambda: Text(Corpus(("long enough",), (), ("long enough",)), length=8), "validation text is shorter"),
        (lambda: small(level="words"), "level must be characters or bpe, not 'words'"),
        (lambda: small(level="bpe", pieces=255), "pieces must be a whole number of at least 256, not 255"),
        (lambda: tasks.get("text:nowhere.txt"), "cannot read nowhere.txt"),
        (lambda: tasks.get("text:length=16,oops"), "'oops' is not of the form option=value"),
        (lambda: tasks.get("text:lenght=16"), "task 'text:lenght=16' takes source, level, length"),
        (lambda: tasks.get("text:length=abc"), "length must be a whole number, not 'abc'"),
        (lambda: tasks.get("text:length=1.5"), "length must be a whole number, not '1.5'"),
        (lambda: tasks.get("text:length=true"), "length must be a whole number, not 'true'"),
        (lambda: tasks.get("text:hide=x"), "hide must be a number, not 'x'"),
        (lambda: tasks.get("text:packed=no"), "packed must be true or false, not 'no'"),
        (lambda: tasks.get("text:level=words"), "level must be characters or bpe, not 'words'"),
        (lambda: tasks.get("text:length=8,length=9"), "length is given twice"),
        (lambda: tasks.get("text:length=8", length=9), "length is given twice"),
        (lambda: tasks.get("text:,length=9"), "source must be a name, not ''"),
        (lambda: tasks.get("text:"), "source must be a name, not ''"),
        (lambda: tasks.get("sudoku6:blanks=x"), "blanks must be a whole number, not 'x'"),
        (lambda: tasks.get("tabular:bins=2.5"), "bins must be a whole number, not '2.5'"),
        (
            lambda: Text(Corpus(*[("abcdefgh" * 4,)] * 3), length=8),
            "seen fewer than 20 times",
        ),
        (lambda: tasks.get("txt:length=16"), "unknown task 'txt'"),
        (lambda: small(hide=0.0), "hide must be a number above 0 and at most 1, not 0.0"),
    ],
)
def test_mistakes(make, message: str) -> None:
    with pytest.raises(UnmaskError, match=message):
        make()


def test_names_carry_options(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(PROSE)
    task = tasks.get(f"text:{file},length=8,hide=0.25,packed=False")
    assert (task.length, task.hide) == (8, 0.25)
    assert task.name == f"text:{file},length=8,hide=0.25,packed=False"
    assert tasks.get("sudoku6").name == "sudoku6"
    assert tasks.get("sudoku6:blanks=3").name == "sudoku6:blanks=3"


def test_held_out_windows_do_not_overlap() -> None:
    task = small(rare=1)
    windows = task.heldout(10**6).answers
    assert len(windows) == 1 + (240 - 16) // 16
    assert len(task.heldout(3).answers) == 3
    drawn = "".join(task.draw(w) for w in task.heldout(10**6, "validation").answers)
    assert len(drawn) <= 200
    assert drawn.startswith(PROSE[:16])


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [PROSE if i % 2 else None for i in range(40)]
    datasets.Dataset.from_dict(
        {"text": rows}, features=datasets.Features({"text": datasets.Value("large_string")})
    ).to_parquet(tmp_path / "train.parquet")
    assert [len(documents) for documents in from_datasets(str(tmp_path))] == [18, 1, 1]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(CorpusError, match="as UTF-8 text"):
        from_files([file])
