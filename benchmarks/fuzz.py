"""Malformed input by the thousand: what a user may hand over is taken, or refused in one line, and nothing hangs.

    python benchmarks/fuzz.py --out benchmarks/results/fuzz.json

Kinds: command lines (one wrong flag, or words at random), files for ``--config``, configurations and weights of models,
adapters, folders of transformers' models and tokenizers, training states alone and resumed, puzzle files, tables,
lines, problems and texts, tasks of one's own with a method or attribute that is odd, frontiers read back, and answers
to word problems and to Countdown. Each input starts from a good one and is damaged: bytes changed, cut or repeated,
values replaced by others. It runs in a process of its own, which is killed when it has taken ``--deadline`` seconds of
processor time, or six times as many by the clock. A message of more than one line or of more than 300 characters counts
as a fault, and so does any error that is not a :class:`tasks.UnmaskError`. The inputs depend on the seed alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import tyro
from common import report
from rich.console import Console

from agents import cli
from agents.policy import PACKAGED_POLICIES, load_policy
from pretrain.backbone import Backbone
from pretrain.checkpoint import PACKAGED_DENOISERS, load_model, load_state, save_state
from tasks import UnmaskError
from unmask_env.denoiser import load_denoiser

LONGEST = 300
JUNK: tuple[Any, ...] = (None, True, False, 0, 1, -1, 2, 0.5, 1e300, -1e300, 2**31, 2**63, 10**400, "", "x", "nan")
JUNK += ("inf", [], {}, [None], {"a": 1}, [[]], "None", "../..", "\0", "\u2028", "é", "x" * 5000, [0] * 1000)
WORDS = (
    "",
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e300",
    "2147483648",
    "9223372036854775808",
    "True",
    "none",
    "[]",
    "{}",
    "'",
)
WORDS += ("\u2028", "a,b=c", "name:opt=", ":", "=", ",", "--", "-h x", "1" * 400, "../nowhere", "[/red]", "hf:", "💥")
SMALL = {"puzzles": 2, "iterations": 1, "steps": 1, "group": 2, "batch": 2, "num-envs": 2, "limit": 2}
SMALL |= {"validation-puzzles": 2, "dim": 8, "layers": 1}

Case = tuple[str, Callable[[], object]]


# ---------------------------------------------------------------------- damage
def bytes_of(good: bytes, draws: random.Random) -> bytes:
    """``good`` with one to four of: bytes changed, cut out, repeated, or put in."""
    data = bytearray(good)
    for _ in range(draws.randint(1, 4)):
        at = draws.randrange(len(data) + 1)
        end = min(len(data), at + draws.choice((1, 1, 2, 8, 64, 1000)))
        match draws.randrange(5):
            case 0:
                data[at:end] = bytes(draws.randrange(256) for _ in range(end - at))
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end] * draws.randint(1, 20)
            case 3:
                special = (
                    b"\0",
                    b"\xff\xfe",
                    b"\xef\xbb\xbf",
                    b"\n",
                    b"\r",
                    b"\xe2\x80\xa8",
                    b"\x0c",
                    b'"',
                    b",",
                    b"\t",
                    b"9" * 50,
                )
                data[at:at] = draws.choice(special)
            case _:
                del data[at:]
    return bytes(data)


def value_of(good: Any, draws: random.Random) -> Any:
    """``good`` JSON with a value somewhere in it replaced, or a key left out or added."""
    if isinstance(good, dict) and good and draws.random() < 0.85:
        key = draws.choice(sorted(good))
        if draws.random() < 0.15:
            return {name: item for name, item in good.items() if name != key}
        if draws.random() < 0.1:
            return good | {draws.choice(("extra", "", "self", "__class__", key + "x")): draws.choice(JUNK)}
        return good | {key: value_of(good[key], draws)}
    if isinstance(good, list) and good and draws.random() < 0.85:
        at = draws.randrange(len(good))
        return [*good[:at], value_of(good[at], draws), *good[at + 1 :]]
    return draws.choice(JUNK)


def damaged_json(good: Any, draws: random.Random) -> bytes:
    odd = draws.random()
    if odd < 0.04:
        return b"[" * draws.choice((100, 10_000, 200_000))
    if odd < 0.08:
        return json.dumps(good).replace("1", "1" * draws.choice((50, 5000)), 1).encode()
    if odd < 0.3:
        return bytes_of(json.dumps(good).encode(), draws)
    return json.dumps(value_of(good, draws)).encode()


# ---------------------------------------------------------------------- kinds of input
def command_lines(folder: Path, draws: random.Random) -> Iterator[Case]:
    """Small runs with one flag that has a word at random, and words at random."""
    flags: dict[str, list[str]] = {}
    for name, command in cli.COMMANDS.items():
        shown = io.StringIO()
        if command.settings:
            with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
                cli.parse(name, ["--help"])
        words = {word for word in shown.getvalue().replace(",", " ").split() if word[:2] == "--"}
        flags[name] = sorted(words - {"--compile"})  # which takes longer than the deadline
    while True:
        name = draws.choice(sorted(cli.COMMANDS))
        words = name.split()
        if draws.random() < 0.2 or not flags[name]:
            words = [draws.choice((*words, *WORDS, "train", "list", "--help")) for _ in range(draws.randint(0, 4))]
        else:
            needed = {"--out": str(folder / "out")} if words[0] in ("train", "pretrain", "demo") else {}
            if words[0] in ("evaluate", "show", "frontier"):
                needed |= {"--denoiser": "sudoku4", "--orders": "margin"}
            if words[0] != "train" and words[0] != "demo":
                needed |= {"--task": "sudoku4"}
            if words[0] == "likelihood":
                needed |= {"--denoiser": "sudoku4"}
            if words[0] == "train":
                needed |= {"--env": "Unmask/Sudoku4x4-v0"}
            needed |= {f"--{flag}": str(value) for flag, value in SMALL.items() if f"--{flag}" in flags[name]}
            flag = draws.choice(flags[name])
            given = {known: value for known, value in needed.items() if known in flags[name]} | {
                flag: draws.choice(WORDS)
            }
            words += [word for pair in given.items() for word in pair]
        if not words:
            continue

        yield " ".join(words), lambda words=words: command_line(words, folder)


def command_line(words: list[str], folder: Path) -> None:
    """``unmask WORDS``; its message as an :class:`UnmaskError` with nothing left out."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            cli.main(words)
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise RefusedError(re.sub(r"^unmask[\w -]*: ", "", said.getvalue().removesuffix("\n"))) from None
    finally:
        shutil.rmtree(folder / "out", ignore_errors=True)


class RefusedError(UnmaskError):
    """What a command said, whole."""

    def __init__(self, said: str) -> None:
        ValueError.__init__(self, said)


def models(folder: Path, draws: random.Random) -> Iterator[Case]:
    import tasks

    task = tasks.get("sudoku6")
    denoiser = load_denoiser("sudoku6-tiny", task)
    kinds = [(PACKAGED_DENOISERS / "sudoku6-tiny", lambda at: load_model(Backbone, at, PACKAGED_DENOISERS, "denoiser"))]
    kinds += [
        (PACKAGED_POLICIES / name, lambda at: load_policy(str(at), task, denoiser))
        for name in ("sudoku6-tiny-rewards",)
    ]
    kinds += [(PACKAGED_POLICIES / "sudoku6-tiny-sets-rewards", lambda at: load_policy(str(at), task, denoiser))]
    for number in range(10**9):
        source, load = draws.choice(kinds)
        at = folder / f"model{number % 8}"
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir()
        config, weights = (source / "config.json").read_bytes(), (source / "model.safetensors").read_bytes()
        if draws.random() < 0.75:
            config = damaged_json(json.loads(config), draws)
        else:
            weights = bytes_of(weights, draws)
        (at / "config.json").write_bytes(config)
        (at / "model.safetensors").write_bytes(weights)
        yield f"config {config[:150]!r}", lambda at=at, load=load: load(at)


def states(folder: Path, draws: random.Random) -> Iterator[Case]:
    path = folder / "state.safetensors"
    save_state(
        path, {"step": 3, "settings": {"a": 1, "out": "x"}, "parts": {"policy": {"w": torch.ones(3), "n": [1, 2]}}}
    )
    good = path.read_bytes()
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    while True:
        if draws.random() < 0.5:
            data = bytes_of(good, draws)
        else:
            inner = damaged_json(json.loads(header["__metadata__"]["unmask_state"]), draws).decode("utf-8", "replace")
            changed = header | {"__metadata__": {"unmask_state": inner}}
            text = json.dumps(changed).encode()
            data = len(text).to_bytes(8, "little") + text + good[8 + size :]

        def run(data: bytes = data) -> None:
            path.write_bytes(data)
            load_state(path)

        yield repr(data[:200]), run


FILES: dict[str, tuple[str, bytes]] = {
    "puzzles": ("sudoku4:PATH", b"Puzzle,Solution\n1000003000400002,1324413232414213\n0204000000001030,\n"),
    "table": (
        "tabular:PATH",
        b"age,kind,size\n" + b"".join(b"%d,%s,%.1f\n" % (i % 7, b"ab"[i % 2 :][:1], i / 3) for i in range(80)),
    ),
    "text": ("text:PATH,length=16", b"It was the best of times, it was the worst of times. " * 60),
    "lines": ("lines:PATH,tokenizer=TOKENIZER", b"a b c d e\nb c\na a\tb c\n" * 30),
    "problems": (
        "math:PATH,tokenizer=TOKENIZER",
        b"".join(b'{"question": "a b c", "answer": "a #### %d"}\n' % i for i in range(40)),
    ),
}


def files(kind: str) -> Callable[[Path, random.Random], Iterator[Case]]:
    name, good = FILES[kind]

    def cases(folder: Path, draws: random.Random) -> Iterator[Case]:
        import tasks

        tokenizer = str(tokenizer_at(folder / "tokenizer")) if "TOKENIZER" in name else ""
        path = folder / "input"
        while True:
            data = bytes_of(good, draws)
            if draws.random() < 0.1:
                data = draws.choice(
                    (b"", b"\0" * 100, data.decode("utf-8", "replace").encode("utf-16"), b"\n" * 999, b"x" * 10**6)
                )

            def run(data: bytes = data) -> None:
                path.write_bytes(data)
                if kind == "puzzles":
                    from tasks.sudoku_csv import read_csv

                    read_csv(path, 2, 2)
                else:
                    tasks.get(name.replace("PATH", str(path)).replace("TOKENIZER", tokenizer))

            yield repr(data[:200]), run

    return cases


def tokenizer_at(folder: Path) -> Path:
    import tokenizers
    import transformers

    words = {word: i for i, word in enumerate(("<pad>", "<mask>", "<unk>", "</s>", *"abcde0123456789"))}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "mask_token": "<mask>", "unk_token": "<unk>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **names).save_pretrained(folder)
    return folder


def answers(folder: Path, draws: random.Random) -> Iterator[Case]:
    """Texts that a model may write: formulas at random, and those that take for ever to work out."""
    from tasks.math_word import is_right

    atoms = (
        "1",
        "2",
        "x",
        "y",
        "9",
        "\\frac",
        "{",
        "}",
        "(",
        ")",
        "^",
        "**",
        "\\boxed{",
        "$",
        "!",
        "\\binom",
        "\\sqrt",
        "+",
        "-",
    )
    atoms += (
        "####",
        "\\pi",
        ",",
        ".",
        " ",
        "%",
        "=",
        "\\left(",
        "\\right)",
        "999999999",
        "[",
        "]",
        "e",
        "\\cdot",
        "__import__('os')",
        "\n",
    )
    heavy = (
        "$9^{(9)^{9}}$",
        "\\binom{999999999}{499999999}",
        "$(x+y+z)^{99}$",
        "(" * 1900,
        "$9^{9^{9}}$",
        "9**9**9",
        "$1500!!$",
    )
    while True:
        text = (
            draws.choice(heavy)
            if draws.random() < 0.01
            else "".join(draws.choice(atoms) for _ in range(draws.randint(1, 40)))
        )
        yield text[:200], lambda text=text: is_right(text, draws.choice(("18", "\\frac{1}{2}", "x^2")))


def countdown(folder: Path, draws: random.Random) -> Iterator[Case]:
    import tasks

    task = tasks.get("countdown")
    instances = task.heldout(1)
    while True:
        tokens = torch.tensor([[draws.randrange(task.vocab_size + 1) for _ in range(task.length)]])
        yield str(tokens.tolist()), lambda tokens=tokens: task.reward(tokens, instances)


WRONG = (
    *("None", "0", "'x'", "[]", "{}", "x[:0]", "x[:1]", "x[0]", "(x, x)", "[x]", "x.float()", "x.double()", "x.bool()"),
    *("x.numpy()", "x.tolist()", "x.to('meta')", "x * float('nan')", "x / 0", "x.unsqueeze(1)", "x.sum()", "x - 9"),
    *(
        "x + 9",
        "x.expand(2, -1)",
        "1 / 0",
        "exec('raise OSError(\"no\\\\nfile\")')",
        "{}['a']",
        "x.nothing",
        "object()",
    ),
    *("x.to_sparse()", "x * 1j", "x.T", "x.half()", "(y for y in x)", "lambda: x", "NotImplemented", "x.short()", "x"),
    *("{'a': x}", "{'a': None}", "{'a': x.bool()}", "{1: x}", "x.requires_grad_()", "type(x)", "x.repeat(2, 1)", "-x"),
)
METHODS = ("sample", "heldout", "reward", "metrics", "augment", "all_answers", "settled", "clean", "draw", "select")
FIELDS = ("name", "symbols", "shape", "box", "vocabularies", "prompt_length", "one_answer", "length", "coordinates")
OWN = """from tasks import Instances
from tasks.sudoku import Sudoku


class Mine(Sudoku):
    def __init__(self):
        super().__init__(2, 2)
"""


def own_tasks(folder: Path, draws: random.Random) -> Iterator[Case]:
    """Tasks of one's own with one method that gives something odd, or one odd attribute, played and trained on."""
    command_line(
        ["evaluate", "--task", "sudoku4", "--denoiser", "sudoku4", "--limit", "2"], folder
    )  # loads what it needs
    with contextlib.suppress(UnmaskError):
        command_line(["train", "--out", str(folder / "out"), "--lr", "-1"], folder)
    for number in range(10**9):
        wrong, lines = draws.choice(WRONG), OWN
        if draws.random() < 0.25:
            lines += f"        x = self.shape\n        self.{draws.choice(FIELDS)} = {wrong}\n"
        else:
            method = draws.choice(METHODS)
            lines += f"\n    def {method}(self, *args, **more):\n        x = super().{method}(*args, **more)\n"
            if method in ("sample", "heldout", "augment", "select") and draws.random() < 0.7:
                part = draws.choice(("x.tokens", "x.answers"))
                lines += f"        given, x = x, {part}\n        made = {wrong}\n"
                lines += "        pair = [given.tokens, given.answers]\n"
                lines += f"        pair[{int(part == 'x.answers')}] = made\n        return Instances(*pair)\n"
            else:
                lines += f"        return {wrong}\n"
        path = folder / f"mine{number}.py"
        needed = {"--task": f"{path}:Mine", "--denoiser": "sudoku4", "--out": str(folder / "out")}
        needed |= {f"--{flag}": str(value) for flag, value in SMALL.items()}
        kept = {
            "evaluate": ("task", "denoiser", "limit"),
            "show": ("task", "denoiser"),
            "train upo": ("task", "denoiser", "out", "puzzles", "iterations", "group", "validation-puzzles", "dim"),
            "train imitation": ("task", "denoiser", "out", "puzzles", "steps", "batch", "validation-puzzles", "dim"),
            "pretrain mdm": ("task", "out", "steps", "batch", "dim", "layers"),
        }
        name = draws.choice(sorted(kept))
        words = [*name.split(), *(word for flag in kept[name] for word in (f"--{flag}", needed[f"--{flag}"]))]
        words += ["--heads", "1"] * (name == "pretrain mdm") + ["--layers", "1"] * name.startswith("train")

        def run(words: list[str] = words, path: Path = path, lines: str = lines) -> None:
            path.write_text(lines)
            command_line(words, folder)

        yield lines[lines.index("(2, 2)") + 7 :] + " ".join(words[:2]), run


def configs(folder: Path, draws: random.Random) -> Iterator[Case]:
    """Damaged ``run.json`` files after ``--config``."""
    import dataclasses

    from tasks.settings import validate

    classes = {name: cli.settings_class(name) for name in sorted(cli.COMMANDS) if cli.COMMANDS[name].settings}
    path = folder / "run.json"
    while True:
        name = draws.choice(sorted(classes))
        fields = [field for field in dataclasses.fields(classes[name]) if field.default is dataclasses.MISSING]
        given = {field.name: "x" for field in fields if field.default_factory is dataclasses.MISSING}
        good = json.loads(json.dumps(dataclasses.asdict(classes[name](**given)), default=str))
        data = damaged_json(good | {"kind": classes[name].__name__}, draws)

        def run(name: str = name, data: bytes = data) -> None:
            path.write_bytes(data)
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    validate(cli.parse(name, ["--config", str(path)]))
            except SystemExit as stop:
                raise RuntimeError(f"the parser ended the program with {stop.code}") from None

        yield f"{name} {data[:150]!r}", run


def frontiers(folder: Path, draws: random.Random) -> Iterator[Case]:
    """Damaged JSON of a frontier, read back for a page."""
    row = {"method": "threshold", "setting": {"theta": 0.6}, "learned": False, "order": "threshold", "solve_rate": 0.5}
    row |= {"nfe": 3.5, "passes": 3.5, "policy_passes": 0.0, "trained": "", "n": 2, "ci95": [0.1, 0.9], "seconds": 1.5}
    good = [row, row | {"learned": True, "method": "runs/a", "setting": {"threshold": 0.35}}]
    path = folder / "frontier.json"
    while True:
        data = damaged_json(draws.choice((good, {"points": good})), draws)

        def run(data: bytes = data) -> None:
            path.write_bytes(data)
            command_line(["frontier", "--read", str(path), "--html", str(folder / "page.html")], folder)

        yield repr(data[:200]), run


def state_of(good: Any, draws: random.Random) -> Any:
    """``good``, a training state, with a value or a tensor somewhere in it replaced, or a key left out."""
    if isinstance(good, dict) and good and draws.random() < 0.97:
        key = draws.choice(list(good))
        if draws.random() < 0.03:
            return {name: item for name, item in good.items() if name != key}
        return good | {key: state_of(good[key], draws)}
    if isinstance(good, list) and good and draws.random() < 0.9:
        at = draws.randrange(len(good))
        return [*good[:at], state_of(good[at], draws), *good[at + 1 :]]
    if isinstance(good, torch.Tensor) and draws.random() < 0.8:
        odd = (
            good * float("nan"),
            good[:0] if good.ndim else good[None],
            good.long(),
            good.double(),
            good.flatten()[:1],
        )
        return draws.choice((*odd, good[None], good.bool(), good / 0, good.float() - 10**6, torch.zeros(2, 3)))
    return draws.choice(JUNK)


def resumed(folder: Path, draws: random.Random) -> Iterator[Case]:
    """Damaged states that runs of several learners go on from."""
    words = {
        "upo": "train upo --imitation 0 --iterations 1 --puzzles 2 --group 2",
        "imitation": "train imitation --puzzles 20 --steps 1 --batch 2 --validate-every 1",
        "policy-iteration": "train policy-iteration --puzzles 2 --steps 1 --iterations 1 --batch 2",
        "mdm": "pretrain mdm --task sudoku4 --steps 1 --batch 2 --dim 8 --layers 1 --heads 1",
    }
    small = " --env Unmask/Sudoku4x4-v0 --dim 8 --layers 1 --heads 1 --validation-puzzles 2"
    words = {name: (line + small * ("train" in line[:5])).split() for name, line in words.items()}
    begun = {}
    for name, line in words.items():
        out = folder / f"begun-{name}"
        command_line([*line, "--out", str(out)], folder)
        begun[name] = out / "state.safetensors"
    while True:
        name = draws.choice(sorted(words))
        good, line = begun[name], words[name]
        if draws.random() < 0.2:
            data = bytes_of(good.read_bytes(), draws)
        else:
            save_state(folder / "damaged", state_of(load_state(good), draws))
            data = (folder / "damaged").read_bytes()
        length = "--iterations" if "--iterations" in line else "--steps"
        longer = ["2" if before == length else word for before, word in zip(["", *line], line, strict=False)]

        def run(name: str = name, longer: list[str] = longer, data: bytes = data) -> None:
            out = folder / "out"
            shutil.copytree(folder / f"begun-{name}", out, dirs_exist_ok=True)
            (out / "state.safetensors").write_bytes(data)
            command_line([*longer, "--out", str(out), "--resume", "must"], folder)

        yield f"{name} {data[:150]!r}", run


LINES = "the cat sat on the mat . the dog ran on the mat . " * 30


def causal_model(folder: Path) -> Path:
    """A causal model of random weights and a tokenizer of words."""
    import tokenizers
    import transformers

    words = ["<mask>", *dict.fromkeys(LINES.split())]
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="."))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, mask_token="<mask>").save_pretrained(folder)
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def damaged_folder(good: Path, at: Path, draws: random.Random) -> str:
    """A copy of ``good`` at ``at`` with one file damaged; which."""
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(good, at)
    path = draws.choice(sorted(file for file in at.iterdir() if file.is_file()))
    data = path.read_bytes()
    path.write_bytes(damaged_json(json.loads(data), draws) if path.suffix == ".json" else bytes_of(data, draws))
    return f"{path.name} {path.read_bytes()[:150]!r}"


def adapters(folder: Path, draws: random.Random) -> Iterator[Case]:
    from pretrain.adapter import AdapterConfig, adapt
    from tasks.text import Corpus, Text

    base = causal_model(folder / "base")
    task = Text(Corpus((LINES,), (LINES,), (LINES,)), tokenizer=str(base), length=7, packed=False)
    with contextlib.redirect_stdout(io.StringIO()):
        adapt(AdapterConfig("text", str(folder / "run"), base=str(base), steps=1, batch=2, rank=2), task)
    good = folder / "good"
    good.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        shutil.copy(folder / "run" / name, good / name)
    while True:
        shown = damaged_folder(good, folder / "at", draws)
        yield shown, lambda: play_once(str(folder / "at"), task)


def hub_folders(folder: Path, draws: random.Random) -> Iterator[Case]:
    """Folders of transformers' masked models and tokenizers."""
    import transformers

    import tasks

    good, text = tokenizer_at(folder / "good"), folder / "lines.txt"
    text.write_text("a b c d e\nb c\na a\tb c\n" * 10)
    sizes = {"vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"intermediate_size": 8, "max_position_embeddings": 16}
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained(good)
    while True:
        at = folder / "at"
        shown = damaged_folder(good, at, draws)
        yield shown, lambda at=at: play_once(f"hf:{at}", tasks.get(f"lines:{text},tokenizer={at}"))


def play_once(name: str, task: Any) -> None:
    """One board by the denoiser ``name``."""
    from unmask_env import reference
    from unmask_env.process import Unmasking

    Unmasking(task, load_denoiser(name, task)).rollout(reference("margin"), task.heldout(1))


KINDS: dict[str, tuple[Callable[[Path, random.Random], Iterator[Case]], int]] = {
    "models": (models, 1000),
    "states": (states, 1000),
    **{kind: (files(kind), 700) for kind in FILES},
    "countdown": (countdown, 1000),
    "frontiers": (frontiers, 800),
    "configs": (configs, 900),
    "hub folders": (hub_folders, 250),
    "adapters": (adapters, 250),
    "answers": (answers, 700),
    "command line": (command_lines, 400),
    "resumed": (resumed, 300),
    "own tasks": (own_tasks, 300),
}


# ---------------------------------------------------------------------- running them
def judge(run: Callable[[], object]) -> tuple[str, str]:
    """``taken``, ``refused`` or ``fault``, and what was said."""
    try:
        run()
    except UnmaskError as error:
        said = str(error)
        bad = "\n" in said or len(said) > LONGEST or not said
        return ("fault" if bad else "refused"), said
    except BaseException:
        return "fault", traceback.format_exc(limit=-4)
    return "taken", ""


def work(kind: str, seed: int, start: int, count: int, pipe: Connection) -> None:
    """In a process of its own: the inputs ``start`` to ``count``, each announced before and judged after."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        cases = KINDS[kind][0](Path(folder), random.Random(f"{kind} {seed}"))
        for number in range(count):
            what, run = next(cases)
            if number >= start:
                pipe.send((number, what, None))
                pipe.send((number, what, judge(run)))


def heard(pipe: Connection, worker: Any, seconds: float) -> bool:
    """Whether something comes before ``worker`` has taken so many seconds of processor time, or six times as many by
    the clock: a busy machine is no hang."""

    def taken() -> float:
        try:
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # no Linux, or it has ended
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    began, before = time.monotonic(), taken()
    while time.monotonic() - began < 6 * seconds and taken() - before < seconds:
        if pipe.poll(min(1.0, seconds)):
            return True
    return pipe.poll(0)


def fuzz(kind: str, seed: int, count: int, deadline: float) -> tuple[Counter[str], list[dict[str, str]]]:
    """How often what happened, and the faults."""
    context, counts, faults, done = multiprocessing.get_context("spawn"), Counter(), [], 0
    while done < count:
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(kind, seed, done, count, theirs), daemon=False)
        worker.start()
        theirs.close()
        what, began = "", False
        while done < count:
            wait = deadline if began else 120.0  # until it has started, and made what it needs
            try:
                number, what, judged = (
                    ours.recv() if heard(ours, worker, wait) else (done, what, ("hang", f"over {deadline:g} s"))
                )
            except EOFError:
                number, judged = done, ("fault", "the process died")
            began = True
            if judged is None:
                continue
            counts[judged[0]] += 1
            done = number + 1
            if judged[0] not in ("taken", "refused"):
                faults.append({"kind": kind, "number": str(number), "input": what, "said": judged[1]})
            if judged[0] == "hang" or judged[1] == "the process died":
                break
        worker.kill()
        worker.join()
    return counts, faults


def main(
    kinds: tuple[str, ...] = tuple(KINDS),
    seed: int = 0,
    share: float = 1.0,
    deadline: float = 10.0,
    out: Path | None = None,
    show: int = 10,
) -> None:
    """Args: share: of the inputs. deadline: seconds for each. show: faults to print of each kind."""
    console, rows, faults = Console(width=160), [], []
    for kind in kinds:
        started = time.perf_counter()
        count = max(1, round(share * KINDS[kind][1]))
        counts, found = fuzz(kind, seed, count, deadline)
        faults += found
        rows.append(
            {"kind": kind, "inputs": count, **{name: counts[name] for name in ("taken", "refused", "fault", "hang")}}
        )
        console.print(rows[-1] | {"seconds": round(time.perf_counter() - started)})
        for fault in found[:show]:
            console.print(f"  {fault['number']}: {fault['input'][:200]}\n    {fault['said'][-600:]}", markup=False)
        report(out, seed=seed, deadline=deadline, inputs=sum(row["inputs"] for row in rows), rows=rows, faults=faults)
    console.print(f"{sum(row['inputs'] for row in rows)} inputs, {len(faults)} faults")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
