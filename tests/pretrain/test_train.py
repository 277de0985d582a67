"""The training loop: the same seed gives the same weights, also through Ctrl-C, kill -9 and two processes."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tasks
from pretrain.backbone import Backbone
from pretrain.checkpoint import PACKAGED_DENOISERS, CheckpointError, load_model, load_state, save_state, step_generator
from pretrain.objectives.masked import masked_diffusion_loss
from pretrain.run import Interrupted, decayed_groups, learning_rate
from pretrain.train import OBJECTIVES, ARConfig, AUDMConfig, LoMDMConfig, MDMConfig, PretrainConfig, pretrain
from tasks import Sudoku, UnknownNameError, UnmaskError
from tests.toys import torchrun

pytestmark = pytest.mark.trains
SMALL = {"steps": 12, "batch": 8, "dim": 16, "layers": 1, "heads": 2, "warmup": 3, "save_every": 5, "log_every": 4}


def small(out: Path, **changes: object) -> PretrainConfig:
    return MDMConfig(**{"task": "sudoku4", "out": str(out), "threads": 1, **SMALL, **changes})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "model.safetensors")


def assert_equal_runs(one: Path, other: Path) -> None:
    """The saved weights and the whole final state agree to the bit."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    states = [load_state(out / "state.safetensors") for out in (one, other)]
    assert states[0]["step"] == states[1]["step"]
    for part in ("model", "averaged"):
        for key, value in states[0]["parts"][part].items():
            assert torch.equal(value, states[1]["parts"][part][key]), (part, key)
    for index, slots in states[0]["parts"]["optimizer"]["state"].items():
        for key, value in slots.items():
            assert torch.equal(value, states[1]["parts"]["optimizer"]["state"][index][key]), (index, key)


class Stopping(Sudoku):
    """Presses Ctrl-C, or sends another signal, while the batch of the given step is drawn."""

    def __init__(self, at: int, number: int = signal.SIGINT) -> None:
        super().__init__(2, 2)
        self.left, self.number = at, number

    def clean(self, n: int, generator: torch.Generator) -> torch.Tensor:
        if self.left == 0:
            signal.raise_signal(self.number)
        self.left -= 1
        return super().clean(n, generator)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps."""
    out = tmp_path_factory.mktemp("finished") / "run"
    pretrain(small(out))
    return out


# ---------------------------------------------------------------------- one process
def test_a_run_leaves_its_files(finished):
    names = {p.name for p in finished.iterdir()}
    assert names == {"README.md", "run.json", "config.json", "model.safetensors", "state.safetensors", "tb"}
    described = json.loads((finished / "run.json").read_text())
    assert described["task"] == "sudoku4"
    assert {key: described[key] for key in SMALL} == SMALL
    assert list((finished / "tb").iterdir())
    model = load_model(Backbone, finished, PACKAGED_DENOISERS, "denoiser")
    assert (model.vocab_size, model.length, model.dim, len(model.blocks)) == (4, 16, 16, 1)


def test_the_same_seed_gives_the_same_run(finished, tmp_path):
    torch.rand(7)  # whatever was drawn before
    returned = pretrain(small(tmp_path / "again"))
    assert_equal_runs(finished, tmp_path / "again")
    assert not returned.training
    for key, value in returned.state_dict().items():
        assert torch.equal(value, weights(tmp_path / "again")[key])
    pretrain(small(tmp_path / "other", seed=1))
    assert not torch.equal(weights(finished)["head.weight"], weights(tmp_path / "other")["head.weight"])


def reference(config: PretrainConfig, world: int) -> dict[str, torch.Tensor]:
    """The moving average that ``pretrain`` should reach with ``world`` processes, in a plain loop in this one."""
    task = tasks.get(config.task)
    torch.manual_seed(config.seed)
    model = Backbone(task.vocab_size, task.coordinates.tolist(), config.dim, config.layers, config.heads)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    optimizer = torch.optim.AdamW(decayed_groups(model, config.weight_decay), betas=(0.9, 0.99))
    for step in range(config.steps):
        losses = []
        for rank in range(world):
            generator = step_generator("cpu", config.seed, step, rank)
            clean = task.clean(config.batch // world, generator)
            losses.append(masked_diffusion_loss(model, clean, task.mask_id, generator))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        averaged.update_parameters(model)
    return averaged.module.state_dict()


def test_a_run_is_the_plain_loop(finished, tmp_path):
    expected = reference(small(tmp_path), world=1)
    for key, value in weights(finished).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at", [2, 4, 7, 11])
def test_ctrl_c_and_resume_end_with_the_same_weights(finished, tmp_path, at):
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"stopped at step {at + 1} of 12; the same command with --resume"):
        pretrain(small(out), task=Stopping(at))
    assert signal.getsignal(signal.SIGINT) is before, "the handler is given back"
    assert load_state(out / "state.safetensors")["step"] == at + 1
    load_model(Backbone, out, PACKAGED_DENOISERS, "denoiser")  # a stopped run leaves its model
    pretrain(small(out, resume="must"))
    assert_equal_runs(finished, out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_stop_a_run_as_ctrl_c_does(finished, tmp_path, number, capfd):
    out, before = tmp_path / "run", signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(Interrupted, match="stopped at step 5 of 12"):
            pretrain(small(out), task=Stopping(4, number))
        assert "stopping after this step and saving; once more stops without saving" in capfd.readouterr().err
        assert signal.getsignal(number) == signal.SIG_DFL
        pretrain(small(out, resume="must"))
        assert_equal_runs(finished, out)
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)  # as under nohup
            pretrain(small(tmp_path / "ignored"), task=Stopping(4, number))
            assert_equal_runs(finished, tmp_path / "ignored")
    finally:
        signal.signal(number, before)


def test_a_stopped_run_logs_the_means_of_all_its_steps(finished, tmp_path):
    """The mean of steps 1 to 10 is logged at step 10, also where the run was stopped at step 6."""
    logged = []
    for folder, at in (("whole", None), ("run", 5)):
        config = small(tmp_path / folder, log_every=10, save_every=100)
        if at is not None:
            with pytest.raises(Interrupted):
                pretrain(config, task=Stopping(at))
            config = replace(config, resume="must")
        pretrain(config)
        events = EventAccumulator(str(tmp_path / folder / "tb"))
        events.Reload()
        logged.append([(event.step, event.value) for event in events.Scalars("loss")])
    assert [step for step, _ in logged[0]] == [9, 11], "step 10, and the last one"
    assert logged[0] == logged[1]


def test_one_run_at_a_time_in_a_folder(tmp_path):
    out = tmp_path / "run"

    class Twice(Sudoku):
        def clean(self, n, generator):
            with pytest.raises(UnmaskError, match=r"another run is going on in .*; wait for it, or name another --out"):
                pretrain(small(out, resume="auto"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(small(out), task=Twice(2, 2))
    pretrain(small(out, resume="auto"))  # its lock died with it


class Killed(BaseException):
    """In place of SIGKILL: nothing after it runs."""


@pytest.mark.parametrize("save", [1, 2, 4])
@pytest.mark.parametrize("inside", ["pretrain.run.save_state", "pretrain.train.save_model"])
def test_a_run_killed_inside_a_save_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, save: int
) -> None:
    """Before or after the state was written, and in the first save as in the last: as if nobody had touched it."""
    module, name = inside.rsplit(".", 1)
    original, calls = getattr(sys.modules[module], name), []

    def killed(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == save:
            raise Killed
        original(*args, **kwargs)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(inside, killed)
        with pytest.raises(Killed):
            pretrain(small(out))
    pretrain(small(out, resume="auto"))
    assert_equal_runs(out, finished)


@pytest.mark.parametrize("what", ["init", "foreign", "weights"])
def test_a_model_of_another_origin_is_not_written_over(finished, tmp_path, what):
    out = tmp_path / "model"
    shutil.copytree(finished, out)
    if what != "init":
        (out / "state.safetensors").unlink()
    if what == "weights":
        (out / "config.json").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    message = "--init and --out are the same folder" if what == "init" else "holds a model that no run here made"
    for resume in ("never", "auto"):
        with pytest.raises(UnmaskError, match=message):
            pretrain(small(out, resume=resume, init=str(out) if what == "init" else None))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_resuming_twice_and_with_settings_that_may_change(finished, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        pretrain(small(out), task=Stopping(3))
    with pytest.raises(Interrupted):
        pretrain(small(out, resume="must", save_every=2, log_every=1), task=Stopping(3))
    assert load_state(out / "state.safetensors")["step"] == 8
    moved = out.rename(tmp_path / "moved")
    pretrain(small(moved, resume="must", threads=None))
    assert_equal_runs(finished, moved)


def test_resuming_a_finished_run_restores_its_weights(finished, tmp_path):
    out = tmp_path / "run"
    pretrain(small(out))
    (out / "model.safetensors").unlink()
    pretrain(small(out, resume="must"))
    assert_equal_runs(finished, out)


def test_kill_9_and_resume_end_with_the_same_weights(tmp_path):
    config = small(tmp_path / "killed", steps=300, save_every=10)
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys\nfrom pretrain.train import MDMConfig, pretrain\npretrain(MDMConfig(**{vars(config)!r}))\n"
    )
    state = Path(config.out) / "state.safetensors"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([sys.executable, str(script)], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if state.exists() and load_state(state)["step"] > 0:
                    break
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert 0 < load_state(state)["step"] < 300, "killed between its first and its last step"
    load_model(Backbone, config.out, PACKAGED_DENOISERS, "denoiser")
    pretrain(replace(config, resume="must"))
    pretrain(replace(config, out=str(tmp_path / "whole")))
    assert_equal_runs(tmp_path / "whole", Path(config.out))


def test_training_lowers_the_loss(tmp_path):
    task = tasks.get("sudoku4")
    config = small(tmp_path / "run", steps=150, batch=32, lr=1e-2, ema=0.9, save_every=1000)
    clean = task.clean(512, torch.Generator().manual_seed(9))

    def loss(model: Backbone) -> float:
        with torch.no_grad():
            return masked_diffusion_loss(model, clean, task.mask_id, torch.Generator().manual_seed(1)).item()

    assert loss(pretrain(config)) < 0.75 * math.log(4), "log 4 is the loss of knowing nothing"


def test_bfloat16_trains_in_float32_weights(tmp_path):
    model = pretrain(small(tmp_path / "run", bf16=True, steps=3))
    for value in model.state_dict().values():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
    assert not torch.equal(model.head.weight, pretrain(small(tmp_path / "full", steps=3)).head.weight)


# ---------------------------------------------------------------------- settings
def test_the_learning_rate_by_hand(tmp_path):
    cosine = MDMConfig("sudoku4", str(tmp_path), steps=1000, lr=1.0, warmup=10)
    constant = replace(cosine, schedule="constant")
    assert learning_rate(constant, 0) == pytest.approx(0.1)
    assert learning_rate(constant, 4) == pytest.approx(0.5)
    assert learning_rate(constant, 9) == learning_rate(constant, 999) == 1.0
    assert learning_rate(cosine, 0) == pytest.approx(0.1)
    assert learning_rate(cosine, 500) == pytest.approx(0.55)
    assert learning_rate(cosine, 250) == pytest.approx(0.55 + 0.45 * 0.5**0.5)
    assert learning_rate(cosine, 1000) == pytest.approx(0.1)
    assert learning_rate(replace(constant, warmup=0), 0) == 1.0


def test_only_matrices_decay():
    model = Backbone(3, [[0], [1]], dim=8, layers=1, heads=2)
    decayed, plain = decayed_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"])
    names = {name for name, p in model.named_parameters() if any(p is q for q in plain["params"])}
    norms = {f"{n}.{w}" for n in ("blocks.0.norm1", "blocks.0.norm2", "norm") for w in ("weight", "bias")}
    assert names == norms | {"head.bias"}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 10, "heads": 4}, "dim must be a multiple of heads; 10 is not one of 4"),
        ({"device": "gpu"}, "unknown device 'gpu'; use cpu, cuda or cuda:N"),
        ({"resume": "must"}, "nothing to resume"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(UnmaskError) as caught:
        pretrain(small(tmp_path / "run", **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists(), "nothing was written"


@pytest.mark.parametrize(
    "changes",
    [{"log_every": 0}, {"heads": 0}, {"dim": 0}, {"seed": -1}, {"threads": 0}, {"device": "meta"}],
    ids=lambda changes: next(iter(changes)),
)
def test_more_settings_that_do_not_fit(tmp_path, changes):
    with pytest.raises(UnmaskError) as caught:
        pretrain(small(tmp_path / "run", **changes))
    assert next(iter(changes)) in str(caught.value)
    assert not (tmp_path / "run").exists(), "nothing was written"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(tmp_path):
    with pytest.raises(UnmaskError, match="this machine has 0 CUDA devices, so no cuda; use --device cpu"):
        pretrain(small(tmp_path / "run", device="cuda"))


def test_an_unknown_task(tmp_path):
    with pytest.raises(UnknownNameError, match=r"unknown task 'sudoku5'; did you mean .* known: .*sudoku4"):
        pretrain(small(tmp_path / "run", task="sudoku5"))


def test_a_folder_that_already_holds_a_run(finished):
    before = (finished / "state.safetensors").read_bytes()
    with pytest.raises(UnmaskError, match="already holds a run; add --resume"):
        pretrain(small(finished))
    assert (finished / "state.safetensors").read_bytes() == before


def test_resuming_with_other_settings_names_them(finished):
    with pytest.raises(UnmaskError) as caught:
        pretrain(small(finished, resume="must", lr=0.5, seed=3))
    message = str(caught.value)
    assert "with other settings" in message
    assert "lr was 0.002, is 0.5" in message
    assert "seed was 0, is 3" in message
    assert "steps" not in message
    assert "\n" not in message


def test_resuming_a_truncated_or_foreign_state(finished, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    state = out / "state.safetensors"
    whole = (finished / "state.safetensors").read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated or not a training state"):
        pretrain(small(out, resume="must"))
    state.write_bytes((finished / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="not a training state"):
        pretrain(small(out, resume="must"))
    state.write_bytes(whole)
    with pytest.raises(CheckpointError) as caught:  # the same settings, but the task has other sizes
        pretrain(small(out, resume="must"), task=Sudoku(2, 3))
    assert "does not belong to this run" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resuming_a_state_of_another_program(tmp_path):
    (tmp_path / "run").mkdir()
    save_state(tmp_path / "run" / "state.safetensors", {"weights": torch.ones(3)})
    with pytest.raises(CheckpointError):
        pretrain(small(tmp_path / "run", resume="must"))


# ---------------------------------------------------------------------- several passes, and a start from others
def test_several_passes_resume_with_the_same_weights_and_are_saved(tmp_path: Path) -> None:
    pretrain(small(tmp_path / "whole", passes=3))
    with pytest.raises(Interrupted):
        pretrain(small(tmp_path / "run", passes=3), task=Stopping(4))
    pretrain(small(tmp_path / "run", passes=3, resume="auto"))
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    assert load_model(Backbone, tmp_path / "run", PACKAGED_DENOISERS, "denoiser").num_passes == 3


def test_each_pass_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []
    monkeypatch.setattr("pretrain.run.Run.log", lambda self, values, note="": logged.append(values))
    pretrain(small(tmp_path / "run", passes=2))
    assert len(logged) == 3
    for values in logged:
        assert values["loss"] == pytest.approx((values["loss/pass_1"] + values["loss/pass_2"]) / 2)
        assert values["loss/pass_1"] != values["loss/pass_2"]


def test_a_run_may_start_from_another_denoiser(finished: Path, tmp_path: Path) -> None:
    """At learning rate 0 it is that denoiser, of its own sizes, in its first pass."""
    trained = pretrain(small(tmp_path / "run", init=str(finished), passes=3, lr=0.0, dim=32, layers=3))
    assert (trained.dim, len(trained.blocks), trained.num_passes) == (16, 1, 3)
    for key, value in weights(finished).items():
        assert torch.equal(trained.state_dict()[key], value)
    tokens = tasks.get("sudoku4").heldout(5).tokens
    start = load_model(Backbone, finished, PACKAGED_DENOISERS, "denoiser")
    assert torch.equal(trained.trunk(tokens), start.trunk(tokens))
    further = pretrain(small(tmp_path / "further", init=str(tmp_path / "run")))
    assert further.num_passes == 1
    assert not torch.equal(further.head.weight, trained.head.weight)


@pytest.mark.parametrize("kind", ["ar", "lomdm", "udm", "audm"])
def test_every_objective_starts_from_its_own_kind(kind: str, tmp_path: Path) -> None:
    config = OBJECTIVES[kind](task="sudoku4", out=str(tmp_path / "first"), threads=1, **SMALL)
    first = pretrain(config)
    again = pretrain(replace(config, out=str(tmp_path / "again"), init=config.out, lr=0.0, seed=5))
    for key, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_a_start_that_does_not_fit_is_one_line(finished: Path, tmp_path: Path) -> None:
    pretrain(AUDMConfig(task="sudoku4", out=str(tmp_path / "uniform"), threads=1, **SMALL))
    pretrain(ARConfig(task="sudoku4", out=str(tmp_path / "blocks"), threads=1, **SMALL))
    pretrain(LoMDMConfig(task="sudoku4", out=str(tmp_path / "order"), threads=1, **SMALL))
    out = tmp_path / "run"
    plain = Sudoku(2, 2)
    # As many symbols and positions, which stand in a line.
    line = type("Line", (Sudoku,), {"coordinates": property(lambda self: torch.arange(16).unsqueeze(1))})(2, 2)
    for init, task, message in (
        ("sudoku6-tiny", plain, "sudoku4 has 4 symbols and 16 positions; this denoiser was trained for 6 symbols"),
        ("sudoku5", plain, "unknown denoiser 'sudoku5'; did you mean "),
        (tmp_path / "nothing" / "here", plain, "the folder does not exist"),
        (
            tmp_path / "uniform",
            plain,
            "another kind than this objective's (uniform noise, predicts absorbing",
        ),
        (tmp_path / "blocks", plain, "NoOrder, blocks of 1; wanted: mask noise, predicts denoiser, NoOrder)"),
        (tmp_path / "order", plain, "ContextOrder; wanted"),
        (finished, line, "stand elsewhere than those of"),
        (f"{tmp_path}/x/../run", plain, "--init and --out are the same folder"),
    ):
        with pytest.raises(UnmaskError) as caught:
            pretrain(small(out, init=str(init)), task=task)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not out.exists(), "nothing was written"


# ---------------------------------------------------------------------- two processes
def test_two_processes_train_one_model(tmp_path):
    """Under torchrun with gloo: both end with the same weights, those of one loop over both halves of each batch."""
    config = small(tmp_path / "run", steps=6)
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys\n"
        "from dataclasses import replace\n"
        "from safetensors.torch import save_file\n"
        "from pretrain.train import MDMConfig, pretrain\n"
        "from tasks import UnmaskError\n"
        f"config = MDMConfig(**{vars(config)!r})\n"
        "try:\n"
        "    pretrain(replace(config, batch=7))\n"
        "except UnmaskError as error:\n"
        "    assert 'batch 7 does not split over 2 processes' in str(error)\n"
        "else:\n"
        "    sys.exit('an odd batch was taken')\n"
        "model = pretrain(config)\n"
        f"save_file(model.state_dict(), {str(tmp_path)!r} + '/rank' + os.environ['RANK'])\n"
    )
    result = torchrun(str(script))
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [load_file(tmp_path / f"rank{rank}") for rank in range(2)]
    expected = reference(config, world=2)
    alone = reference(config, world=1)
    saved = weights(tmp_path / "run")
    for key in expected:
        assert torch.equal(ranks[0][key], ranks[1][key]), f"both processes agree on {key}"
        assert torch.equal(ranks[0][key], saved[key])
        torch.testing.assert_close(saved[key], expected[key], rtol=0, atol=1e-4)
    assert max((expected[key] - alone[key]).abs().max() for key in expected) > 1e-3, "the halves differ"
