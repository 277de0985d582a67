"""``unmask show``: what every frame says, in the terminal's colours and on the page, for every kind of action."""

import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tasks
from agents import show
from agents.cli import main
from agents.policy import load_policy
from agents.show import KINDS, Recorded, coloured, legend, places, play, replay
from unmask_env.denoiser import load_denoiser
from unmask_env.process import Unmasking
from unmask_env.reference import reference
from unmask_env.state import Rules

SUDOKU6 = tasks.get("sudoku6")
DENOISER = load_denoiser("sudoku6-tiny", SUDOKU6)
ORDERS = ["margin", "remdm:steps=12,eta=0.2", "sudoku6-tiny-sets-rewards"]
INSTANCE = SUDOKU6.heldout(4)[3:]


def shown(name: str, temperature: float = 0.0) -> show.Show:
    named = name.partition(":")[0]
    policy = load_policy(name, SUDOKU6, DENOISER) if named.startswith("sudoku6") else reference(name)
    return play(Unmasking(SUDOKU6, DENOISER, Rules(policy.actions), temperature), name, policy, INSTANCE, 0)


@pytest.mark.parametrize("name", ORDERS)
def test_frames_say_what_happened(name: str) -> None:
    played = shown(name)
    frames, clues = played.frames, INSTANCE.tokens[0] != 6
    assert len(frames) == len(played.captions) == len(played.given) + 1 == int(played.played.nfe[0]) + 1
    for k, (before, after) in enumerate(itertools.pairwise(frames), 1):
        for i, kind in enumerate(after.kinds):
            was, now = int(before.tokens[i]), int(after.tokens[i])
            if bool(clues[i]):
                expected = "clue"
            elif now == 6:
                expected = "masked" if was == 6 else "remasked"
            else:
                expected = "new" if was != now else "filled"
            assert kind == KINDS[expected]
            assert after.order[i] == (k if expected == "new" else before.order[i] if expected == "filled" else 0)
            assert (i in after.wrong) == (expected in ("new", "filled") and now != int(INSTANCE.answers[0, i]))
    again = sum(frame.kinds.count(KINDS["remasked"]) for frame in frames)
    assert again == int(played.played.state.remask_count.sum())
    assert (again > 0) == name.startswith("remdm")


@pytest.mark.parametrize("name", ORDERS)
def test_what_the_policy_gave_is_its_distribution(name: str) -> None:
    played = shown(name)
    for step, given in zip(played.played.steps, played.given, strict=True):
        assert given.shape == step.action[0].shape
        assert bool((given[step.action[0]] > 0).all()), "what was done was possible"
        assert bool((given[~step.observation.action_mask[0]] == 0).all())
        if name == "margin":
            assert float(given.sum()) == pytest.approx(1)


def test_recording_changes_nothing_and_oracles_see_their_answers() -> None:
    policy = Recorded(reference("oracle"))
    played = Unmasking(SUDOKU6, DENOISER).rollout(policy, INSTANCE)
    assert torch.equal(played.tokens, Unmasking(SUDOKU6, DENOISER).rollout(reference("oracle"), INSTANCE).tokens)
    assert len(policy.given) == int(played.nfe[0])


# ---------------------------------------------------------------------- in colour
@pytest.mark.parametrize("name", ["sudoku4", "sudoku6", "sudoku9", "text"])
def test_symbols_are_found_where_they_are_drawn(name: str) -> None:
    task = tasks.get(name)
    for tokens in (task.heldout(2).tokens[1], task.heldout(2).answers[1]):
        drawn = task.draw(tokens)
        found = [drawn[slice(*span)] for span in places(task, tokens.tolist(), drawn)]
        blank = "_" if name == "text" else "."
        assert found == [blank if t == task.mask_id else task.symbol(t) for t in tokens.tolist()]


def test_a_drawing_of_another_kind_has_no_places() -> None:
    task = tasks.get("zebra:houses=3")
    tokens = task.heldout(1).tokens[0]
    assert places(task, tokens.tolist(), task.draw(tokens)) is None


def test_colours_on_a_terminal() -> None:
    """A wrong symbol is red, what is masked again yellow; every frame is drawn, with its line."""
    played = shown(ORDERS[1])
    k = next(k for k, frame in enumerate(played.frames) if frame.wrong and "r" in frame.kinds)
    frame, confidence = played.frames[k], torch.linspace(0, 1, 36)
    text = coloured(SUDOKU6, frame, confidence)
    assert text.plain == SUDOKU6.draw(frame.tokens)
    spans = dict(zip(range(36), places(SUDOKU6, frame.tokens.tolist(), text.plain), strict=True))
    styles = {(span.start, span.end): str(span.style) for span in text.spans}
    for i, kind in enumerate(frame.kinds):
        style = show.STYLES[kind]
        if i in frame.wrong:
            style = "white on red" if kind == "a" else "red"
        elif kind == "m":
            style = show.shaded(float(confidence[i]))
        assert styles.get(spans[i], "") == style
    written = io.StringIO()
    replay(Console(file=written, force_terminal=True, width=80), SUDOKU6, played, 0.0)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    assert "\x1b[" in written.getvalue()
    assert all(f"step {n} (order" in plain for n in range(1, len(played.frames)))
    assert "masked again" in legend(SUDOKU6).plain


# ---------------------------------------------------------------------- as a page
class Page(HTMLParser):
    """The tags of a page, each with its attributes, and the text of its JSON."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data, self._inside = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("type") == "application/json"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        self.data += data * self._inside


def test_the_page_holds_all_that_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "page.html"
    words = ["--task", "sudoku6", "--denoiser", "sudoku6-tiny", "--index", "3", "--delay", "0"]
    main(["show", *words, "--orders", *ORDERS, "--html", str(out)])
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert not [tag for tag, found in page.tags if {"src", "href", "action"} & set(found)], "no asset from elsewhere"
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    names = [tag for tag, _ in page.tags]
    assert {"meta", "style", "select", "button", "input"} <= set(names)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in text
    assert [found["type"] for tag, found in page.tags if tag == "input"] == ["range", "checkbox"]
    data = json.loads(page.data)
    assert (data["shape"], data["box"], data["title"]) == ([6, 6], [2, 3], "sudoku6, denoiser sudoku6-tiny, instance 3")
    assert [order["name"] for order in data["orders"]] == ORDERS
    said = capsys.readouterr().out
    for order in data["orders"]:
        played = shown(order["name"])
        assert len(order["frames"]) == len(played.frames)
        assert f"{order['name']}:" in said
        for k, frame in enumerate(order["frames"]):
            own = played.frames[k]
            assert (frame["kinds"], frame["order"], frame["wrong"]) == (own.kinds, own.order, own.wrong)
            blank = [int(token) == 6 for token in own.tokens]
            assert frame["symbols"] == ["" if b else str(int(t) + 1) for t, b in zip(own.tokens, blank, strict=True)]
            if k == len(played.given):
                assert "policy" not in frame
                continue
            probability = DENOISER(own.tokens.unsqueeze(0)).log_probs[0].exp()
            fill, again = played.given[k][:36], played.given[k][36:]
            for i in range(36):
                assert frame["free"][i] == blank[i]
                if blank[i]:
                    assert frame["confidence"][i] == pytest.approx(1000 * float(probability[i].max()), abs=0.6)
                    assert frame["policy"][i] == pytest.approx(1000 * float(fill[i]), abs=0.6)
                    best = probability[i].sort(descending=True)
                    assert [s for s, _ in frame["top"][i]] == [str(int(s) + 1) for s in best.indices[:3]]
                elif len(again) and own.kinds[i] != KINDS["clue"]:
                    assert frame["policy"][i] in (-1, pytest.approx(1000 * float(again[i]), abs=0.6))
                else:
                    assert (frame["confidence"][i], frame["policy"][i], frame["top"][i]) == (-1, -1, None)


def test_no_symbol_ends_the_page(tmp_path: Path) -> None:
    """Text of a task is data, whatever it says."""
    task = tasks.get("sudoku4")
    task.symbols = ("</script><b>", "<!--", "DATA", '"&')
    instance = task.heldout(1)
    process = Unmasking(task, load_denoiser("sudoku4", tasks.get("sudoku4")))
    show.write_page(task, instance, [play(process, "<i>", reference("margin"), instance, 0)], "t", tmp_path / "p.html")
    page = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("b") == 0
    data = json.loads(page.data)
    assert data["orders"][0]["name"] == "<i>"
    assert data["answers"] == [task.symbols[int(token)] for token in instance.answers[0]]


@pytest.mark.parametrize("words", [["--orders", "margin", "best"], ["--html", "."]])
def test_mistakes(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["show", "--task", "sudoku6", "--denoiser", "sudoku6-tiny", *words])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("unmask show: ")
    assert not list(tmp_path.iterdir())


def test_a_page_of_names_that_are_not_utf8_and_two_files_of_one_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    played = shown("margin")._replace(name="\udcff</script>")
    show.write_page(SUDOKU6, INSTANCE, [played], "of \udcff</title>", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "\\udcff\\u003c/script>" in page
    with pytest.raises(SystemExit) as stop:
        main(["show", "--task", "sudoku4", "--html", str(tmp_path / "a"), "--gif", str(tmp_path / "a")])
    assert stop.value.code == 2
    assert "--gif and --html both name" in capsys.readouterr().err
