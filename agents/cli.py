"""The command line: ``unmask``. A table of commands, each imported when it is asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import io
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn


class Command(NamedTuple):
    """Where the settings of a command stand (``module:dataclass``), and the function of that module that runs it."""

    settings: str
    function: str
    help: str


PRETRAIN = {
    "mdm": "Masked diffusion: every position alike.",
    "ar": "Autoregression, left to right.",
    "block": "Block diffusion: blocks from left to right, masked diffusion inside each.",
    "learned-schedule": "Masked diffusion with a learned schedule per position.",
    "genmd4": "Masked diffusion with a learned schedule per symbol.",
    "lomdm": "Masked diffusion with an order learned from the context.",
    "udm": "Uniform diffusion.",
    "maxcoupling": "Uniform diffusion, coupled maximally.",
    "audm": "Absorbing uniform diffusion.",
    "reaudm": "The same model, to be sampled with revision.",
}
COMMANDS: dict[str, Command] = {
    "list": Command("", "list_everything", "Tasks, environments, packaged models, reference policies."),
    **{
        f"pretrain {name}": Command(f"pretrain.train:{name}", "pretrain", f"Train a denoiser. {text}")
        for name, text in PRETRAIN.items()
    },
    "pretrain adapter": Command(
        "pretrain.adapter:AdapterConfig", "adapt", "Make a causal language model a masked denoiser."
    ),
    "train policy-iteration": Command(
        "agents.policy_iteration:PolicyIterationConfig", "train", "Train an order policy from rewards; the default."
    ),
    "train imitation": Command("agents.imitation:ImitationConfig", "train", "Train an order policy by imitation."),
    "train upo": Command("agents.upo:UPOConfig", "train", "Train an order policy against a reference policy."),
    "train ppo-sb3": Command("agents.sb3_ppo:SB3PPOConfig", "train", "The same by stable-baselines3's MaskablePPO."),
    "train ppo-torchrl": Command("agents.torchrl_ppo:TorchRLPPOConfig", "train", "The same by TorchRL's PPO."),
    "train grpo-torchrl": Command("agents.torchrl_ppo:TorchRLGRPOConfig", "train", "The same without a critic."),
    "evaluate": Command("agents.evaluate:EvaluateCommand", "run", "Compare orders: a table with 95 % intervals."),
    "frontier": Command("agents.frontier:FrontierCommand", "run", "Solve rate against forwards, all settings."),
    "likelihood": Command("pretrain.likelihood:LikelihoodCommand", "run", "Bounds on -log p(x) of a denoiser."),
    "export": Command("agents.export:ExportCommand", "run", "Write an order as a program of torch, SGLang or dInfer."),
    "show": Command("agents.show:ShowCommand", "run", "Watch one instance being filled."),
    "demo": Command("agents.demo:DemoConfig", "run", "Train on 6x6 Sudoku and compare, in minutes."),
}
DEFAULT_LEARNER = "policy-iteration"
"""What ``unmask train --out DIR`` means."""
TOGETHER = ("pretrain", "train policy-iteration", "train imitation", "train upo", "evaluate")
"""Commands that several processes of ``torchrun`` share."""


def usage(group: str = "") -> str:
    """The commands that begin with ``group``, a line each."""
    names = [name for name in COMMANDS if not group or name.startswith(f"{group} ")]
    more = "" if group else "; --version"
    lines = [f"usage: unmask {group + ' ' if group else ''}COMMAND [OPTIONS]; COMMAND --help says more{more}", ""]
    lines += [f"  {name.removeprefix(group).strip():<26}{COMMANDS[name].help}" for name in names]
    if group == "train":
        lines += ["", f"unmask train OPTIONS is unmask train {DEFAULT_LEARNER} OPTIONS, whose --help lists them."]
    return "\n".join(lines)


def fail(message: str, code: int = 2, command: str = "") -> NoReturn:
    """End the program with one line on stderr, which names the ``command``, and under ``torchrun`` its process if that
    is not the first."""
    rank = os.environ.get("RANK", "0")
    process = f" (process {rank})" if rank != "0" else ""
    print(f"{' '.join(filter(None, ('unmask', command)))}{process}: {message}", file=sys.stderr)
    group = sys.modules.get("torch.distributed")
    if group is not None and group.is_available() and group.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # at once: torch's own end could wait for the others, or abort over what they do
    sys.exit(code)


def split(args: Sequence[str]) -> tuple[str, list[str]]:
    """The command that ``args`` name, and the rest; asks for help end the program, and so do unknown names."""
    words = list(args)
    if words[:1] == ["train"] and words[1:2] and words[1].startswith("--") and words[1] != "--help":
        words.insert(1, DEFAULT_LEARNER)
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return name, words[length:]
    groups = {name.partition(" ")[0] for name in COMMANDS if " " in name}
    group = words[0] if words and words[0] in groups else ""
    rest = words[1:] if group else words
    if rest and rest[0] in ("-h", "--help"):
        print(usage(group))
        sys.exit(0)
    begun = list(dict.fromkeys(name.removeprefix(group).split()[0] for name in COMMANDS if name.startswith(group)))
    if not rest:
        fail(f"name what to {group or 'do'}; known: {', '.join(begun)}", command=group)
    near = difflib.get_close_matches(rest[0], begun, n=1, cutoff=0.65)  # tasks.errors would bring torch
    meant = f"; did you mean {near[0]}?" if near else ";"
    fail(f"unknown command {rest[0][:80]!r}{meant} known: {', '.join(begun)}", command=group)


def _one_word(args: Sequence[str], settings: type) -> list[str]:
    """``--task`` and ``--env`` mean the same, whichever of them the settings have."""
    fields = {field.name for field in dataclasses.fields(settings)} & {"task", "env"}
    if len(fields) != 1:
        return list(args)
    (own,) = fields
    if {"task", "env"} <= {word[2:].partition("=")[0] for word in args if word.startswith("--")}:
        from tasks import UnmaskError

        raise UnmaskError("--task and --env mean the same; give one of them")
    return [re.sub(r"^--(task|env)(?==|$)", f"--{own}", word) for word in args]


def settings_class(name: str) -> type:
    """The dataclass of a command's settings."""
    module, _, kind = COMMANDS[name].settings.partition(":")
    imported = importlib.import_module(module)
    return imported.OBJECTIVES[kind] if module == "pretrain.train" else getattr(imported, kind)


def _commands_by_class() -> dict[str, str]:
    """Which command has settings of which class, for those that write ``run.json``."""
    from pretrain.train import OBJECTIVES

    kinds = {n: COMMANDS[n].settings.partition(":")[2] for n in COMMANDS if n.startswith(("pretrain", "train"))}
    kinds |= {n: OBJECTIVES[kind].__name__ for n, kind in kinds.items() if kind in OBJECTIVES}
    return {kinds[n]: f"unmask {n}" for n in reversed(kinds)}


def parse(name: str, args: Sequence[str]) -> Any:
    """The settings that ``args`` mean, on top of those of ``--config``.

    Raises:
        UnmaskError: an option that the command does not have, a value that it does not take, or a missing one.
    """
    import tyro

    from agents import options
    from tasks import UnmaskError

    settings = settings_class(name)
    if "-h" in args or "--help" in args:
        print(options.help_of(name, settings))
        sys.exit(0)
    file, words = options.take_config(_one_word(args, settings))
    start = {} if file is None else {"default": options.read_config(file, settings, _commands_by_class())}
    options.check_flags(words, settings, start.get("default"))
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(settings, args=words, prog=f"unmask {name}", config=(tyro.conf.OmitArgPrefixes,), **start)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        text = re.sub(r"\x1b\[[0-9;]*m|[─-╿]|-{3,}", " ", captured.getvalue())
        raise UnmaskError(options.explained(" ".join(text.split()), settings)) from None


def list_everything() -> None:
    """``unmask list``."""
    from rich.console import Console

    import tasks
    from agents.policy import PACKAGED_POLICIES
    from pretrain.adapter import packaged_adapters
    from pretrain.checkpoint import PACKAGED_DENOISERS, packaged
    from unmask_env import ids
    from unmask_env.reference import REFERENCES

    console = Console()
    for title, names in {
        "tasks": tasks.names(),
        "environments": ids(),
        "packaged denoisers": [*packaged(PACKAGED_DENOISERS), *packaged_adapters()],
        "reference policies": [name for name, rule in REFERENCES.items() if rule.actions == "single"],
        "reference policies over sets": [name for name, rule in REFERENCES.items() if rule.actions != "single"],
        "packaged order policies": packaged(PACKAGED_POLICIES),
    }.items():
        console.print(f"[bold]{title}[/bold]: {', '.join(names) or '(none)'}", highlight=False)


def dispatch(name: str, rest: Sequence[str]) -> None:
    """Run the command ``name`` with its arguments."""
    if name == "list":
        if rest and rest[0] not in ("-h", "--help"):
            fail(f"it takes no arguments, not {rest[0]!r}", command=name)
        print(f"usage: unmask list\n\n{COMMANDS['list'].help}") if rest else list_everything()
        return
    settings = parse(name, rest)
    from pretrain import card, processes

    card.command.set(shlex.join(["unmask", *name.split(), *rest]))
    if not name.startswith(TOGETHER):
        processes.require_one(f"unmask {name}")
    module = COMMANDS[name].settings.partition(":")[0]
    try:
        getattr(importlib.import_module(module), COMMANDS[name].function)(settings)
    finally:
        card.command.set("")
    processes.leave()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt, as Ctrl-C is, unless somebody heeds it already."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point: exit code 0, 2 after a user's mistake (one line on stderr), 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal has no letters for
    words = list(sys.argv[1:] if args is None else args)
    if words[:1] == ["--version"]:
        from unmask_env.names import __version__

        print(f"unmask {__version__}")
        return
    name, rest = split(words)
    try:
        try:
            with terminable():
                dispatch(name, rest)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        fail("stopped", 130, name)
    except BrokenPipeError:  # who reads the output has seen enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if isinstance(error, ImportError | AttributeError):
            try:
                import unmask_env  # noqa: F401 - it looks whether something hides this project's packages
            except ImportError as hidden:
                fail(str(hidden))
        from pretrain.run import Interrupted
        from tasks import UnmaskError
        from tasks.registry import told_of_own

        if not isinstance(error, UnmaskError | OSError | Interrupted) and (told := told_of_own(error)) is not None:
            fail(str(UnmaskError(told)), command=name)
        if isinstance(error, UnmaskError | OSError):  # a user's mistake, or a place that cannot be read or written
            fail(str(UnmaskError(str(error))), command=name)
        if isinstance(error, Interrupted):
            fail(str(error), 130, name)
        if isinstance(error, MemoryError) or re.search(
            "allocate memory|out of memory", str(error)
        ):  # torch's own types
            few = "take fewer instances (--limit, --puzzles), a smaller --batch, or a smaller model"
            fail(f"not enough memory; {few}", command=name)
        raise


if __name__ == "__main__":
    main()
