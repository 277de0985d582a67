"""Everything that runs on CUDA: nothing stays on the CPU, and where CUDA is pretended the results are the CPU's.

A machine without a GPU pretends to have one, which draws and rounds as the CPU does. A GPU draws other random numbers,
so that most results are there held to their device, shape and kind alone.
"""

import copy
import importlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

import tasks
import unmask_env
from agents import cli
from agents.evaluate import add_exact, compare, load_order
from agents.policy import PACKAGED_POLICIES, PolicyConfig
from pretrain import likelihood, samplers, uniform_samplers
from pretrain.backbone import Backbone
from pretrain.checkpoint import PACKAGED_DENOISERS, load_model, packaged
from pretrain.train import OBJECTIVES, pretrain
from tasks import Instances, UnmaskError
from tests.accelerator import pretended_cuda
from tests.toys import sweep
from unmask_env import exact, exact_sets, make_process
from unmask_env.reference import REFERENCES, reference
from unmask_env.sb3_env import SB3VecEnv
from unmask_env.state import Rules
from unmask_env.torchrl_env import UnmaskTorchEnv
from unmask_env.vector_env import RegularisedReward, UnmaskVectorEnv

SMALL = "Unmask/Sudoku4x4-v0"
DEVICES = ("cpu", "cuda")
ACTIONS = ("single", "set", "set+remask")
TINY = {"dim": 16, "layers": 1, "heads": 2}


REAL = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with nullcontext() if REAL else pretended_cuda():
        yield


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A denoiser that has learned an order, if hardly anything else."""
    out = str(tmp_path_factory.mktemp("ordered"))
    pretrain(OBJECTIVES["lomdm"]("sudoku4", out, steps=2, batch=4, **TINY))
    return out


def drawing(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def alike(a: Tensor, b: Tensor, drawn: bool = True) -> None:
    """One on the CPU, the other on CUDA, of the same values; of ``drawn`` ones where CUDA is pretended."""
    assert (a.device.type, b.device.type, a.dtype, a.shape) == (*DEVICES, b.dtype, b.shape)
    if not REAL:
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=0)
    elif not drawn:
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- the pretence
@pytest.mark.parametrize(
    "mixed",
    [
        lambda here, there: there + here,
        lambda here, there: here.add_(there),
        lambda here, there: here[there > 1],
        lambda here, there: torch.cat([here, there]),
        lambda here, there: there.gather(0, here.long()),
        lambda here, there: torch.where(there > 1, here, there),
        lambda here, there: torch.nn.functional.embedding(here.long(), there.view(3, 1)),
        lambda here, there: there.view(1, 3).long() @ there.view(3, 1).long(),
        lambda here, there: there.numpy(),
        lambda here, there: np.asarray(there),
        lambda here, there: torch.rand(3, generator=drawing("cuda")),
        lambda here, there: torch.rand(3, generator=drawing("cpu"), device="cuda"),
        lambda here, there: there.uniform_(generator=drawing("cpu")),
        lambda here, there: torch.multinomial(there, 1, generator=drawing("cpu")),
    ],
)
def test_what_cuda_refuses_is_refused(mixed: Any) -> None:
    here = torch.tensor([0.0, 1.0, 2.0])
    with pytest.raises((RuntimeError, TypeError), match=r"same device|device type|not implemented for|numpy"):
        mixed(here, here.to("cuda"))


def test_what_cuda_allows_is_allowed() -> None:
    here, there = torch.tensor([2, 0]), torch.tensor([1.0, 2.0, 3.0], device="cuda")
    assert there[here].tolist() == [3, 1]
    assert (there * torch.tensor(2.0)).tolist() == [2, 4, 6]
    assert there.cpu().numpy().tolist() == there.numpy(force=True).tolist() == there.tolist()
    there[0], there[1:] = torch.tensor(5.0), torch.tensor([6.0, 7.0])
    assert there.tolist() == [5, 6, 7]
    for like in (torch.zeros_like(there), there.new_ones(2), torch.arange(3, device=there.device), there.long()):
        assert like.device == torch.device("cuda:0")
        assert like.is_cuda
    assert there.to("cuda") is there
    assert torch.zeros_like(there, device="cpu").device.type == "cpu"


def test_networks_move_learn_and_stay_who_they_are() -> None:
    def steps(device: str) -> Tensor:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.GELU(), torch.nn.Linear(4, 1))
        weight = net[0].weight
        net = copy.deepcopy(net.to(device))
        assert isinstance(net[0].weight, torch.nn.Parameter)
        assert weight.device.type == device
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(2, 3, device=device)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        return net[0].weight

    alike(*map(steps, DEVICES), drawn=False)


# ---------------------------------------------------------------------- the process
@pytest.mark.parametrize("name", sweep(REFERENCES, {"margin", "learned", "remdm", "oracle_sets"}.__contains__))
def test_every_reference(name: str, ordered: str) -> None:
    played = []
    for device in DEVICES:
        denoiser = ordered if "learned" in name else "sudoku4"
        process = make_process("sudoku4:blanks=6", denoiser, device=device, actions=REFERENCES[name].actions)
        played.append(process.rollout(reference(name), process.task.heldout(6), drawing(device), record=True))
    alike(*(rollout.tokens for rollout in played))
    alike(*(rollout.reward for rollout in played))
    alike(*(rollout.steps[0].log_prob for rollout in played))


RULES = [
    ("schedule", {"actions": "set", "block_length": 4}),
    ("softmax_margin", {"nfe_budget": 3, "on_illegal": "terminate"}),
    ("factor", {"actions": "set", "speed": 1.0}),
    ("remdm", {"actions": "set+remask", "remask_budget": 2, "block_length": 4}),
]


@pytest.mark.parametrize("temperature", sweep([0.0, 1.0], bool))
@pytest.mark.parametrize(("name", "rules"), sweep(RULES, lambda name, rules: "nfe_budget" in rules))
def test_every_rule(name: str, rules: dict, temperature: float) -> None:
    played = []
    for device in DEVICES:
        process = make_process("sudoku4:blanks=6", "sudoku4", device=device, temperature=temperature, **rules)
        fill = drawing(device, 1) if temperature else None
        played.append(process.rollout(reference(name), process.task.heldout(6), drawing(device), fill))
    alike(*(rollout.tokens for rollout in played))
    alike(*(rollout.reward for rollout in played))


TASKS = {"countdown3": "countdown", "text": "text:hide=0.25,span=4", "zebra3": "zebra:houses=3", "text-ar": "free_text"}


def task_of(denoiser: str) -> str:
    """The task that a packaged denoiser was trained on."""
    return TASKS.get(denoiser, denoiser.partition("-")[0])


@pytest.mark.parametrize("name", sweep(packaged(PACKAGED_DENOISERS), {"sudoku4", "text"}.__contains__))
def test_every_packaged_denoiser(name: str) -> None:
    """And the samples, augmentations, rewards and metrics of their tasks."""
    task = tasks.get(task_of(name))
    seen, measured = [], []
    for device in DEVICES:
        process = make_process(task, name, device=device)
        drawn = task.augment(task.sample(3, drawing(device)), drawing(device))
        assert {drawn.tokens.device.type, task.clean(2, drawing(device)).device.type} == {device}
        instances = task.augment(task.heldout(3).to(device), drawing(device))
        state = process.reset(instances)
        seen.append(process.observe(state))
        luck = torch.rand(instances.tokens.shape, generator=drawing(device), device=device) if process.draws else None
        state, _ = process.step(state, seen[-1], reference("margin")(seen[-1]).mode(), luck)
        measured.append(task.metrics(instances.answers, instances))
    for part in ("top_symbols", "top_log_probs", "entropy"):
        alike(*(getattr(observation, part) for observation in seen))
    for metric in measured[0]:
        alike(*(values[metric] for values in measured))


@pytest.mark.slow
@pytest.mark.parametrize("name", packaged(PACKAGED_POLICIES))
def test_every_packaged_policy(name: str) -> None:
    rows, denoiser = [], name.removesuffix("-rewards").removesuffix("-sets")
    for device in DEVICES:
        process = make_process(task_of(denoiser), denoiser, device=device)
        policy = load_order(name, process.task, process.denoiser)
        policies = {"margin": reference("margin"), "learned": policy}
        if policy.actions == "single":
            policies["belief"] = load_order(f"belief:{name}", process.task, process.denoiser)
        else:
            policies |= {read: policy.at(0.5, read=read) for read in ("always", "first", "unsure")}
        rows.append(compare(process, policies, process.task.heldout(3)))
    for here, there in zip(*rows, strict=True):
        assert replace(here, seconds=0).row() == replace(there, seconds=0).row()


def test_exact_solutions() -> None:
    found = []
    for device in DEVICES:
        process = make_process("sudoku4:blanks=4", "sudoku4", device=device)
        instances, g = process.task.heldout(2), reference("softmax_margin")
        graph = exact.enumerate_boards(process, instances.to(device))
        optimum, terminal = exact.soft_optimal(graph, g, 0.1), exact.terminal_optimal(graph, g, 0.1)
        values = exact.evaluate(graph, g, reference("random"))
        found.append([exact.best_reward(graph), *optimum[1:], *terminal[1:5]])
        found[-1] += [values.reward, exact_sets.fewest_forwards(process, instances)]
        policies = {"margin": reference("margin"), "oracle": reference("oracle")}
        add_exact(compare(process, policies, instances), process, policies, instances, g)
    for here, there in zip(*found, strict=True):
        alike(here, there, drawn=False)


@pytest.mark.parametrize("command", sweep(["evaluate", "frontier", "likelihood"], "likelihood".__eq__))
def test_commands(command: str, tmp_path: Path) -> None:
    board = ["--task", "sudoku4", "--denoiser", "sudoku4", "--limit", "4"]
    arguments = {
        "evaluate": [*board, "--orders", "random", "margin", "oracle", "--blanks", "4", "--exact"],
        "frontier": [*board, "--orders", "threshold", "--out", str(tmp_path / "f.png")],
        "likelihood": ["--task", "text", "--denoiser", "text", "--limit", "3", "--samples", "2", "--truncated"],
    }
    cli.main([command, *arguments[command], "--device", "cuda"])


class Words(tasks.Task):
    """Twelve of forty words."""

    name, symbols, shape = "words", tuple(map(str, range(40))), (1, 12)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        raise NotImplementedError

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return torch.zeros(len(tokens), device=tokens.device)


def test_models_of_transformers() -> None:
    pytest.importorskip("transformers")
    task, fixtures = Words(), Path(__file__).parent / "fixtures"
    tokens = torch.randint(len(task.symbols), (2, 12), generator=drawing("cpu"))
    given = Instances(torch.where(torch.arange(12) % 3 == 0, task.mask_id, tokens), tokens)
    for folder in sorted(path.parent for path in fixtures.glob("*/config.json")):
        played = []
        for device in DEVICES:
            process = make_process(task, f"hf:{folder}", device=device, actions="set")
            played.append(process.rollout(reference("kl_stability"), given, record=True))
        alike(*(rollout.tokens for rollout in played), drawn=False)
        alike(*(rollout.steps[-1].observation.top_log_probs for rollout in played), drawn=False)


# ---------------------------------------------------------------------- the interfaces
@pytest.mark.parametrize("temperature", sweep([0.0, 1.0], bool))
@pytest.mark.parametrize("actions", sweep(ACTIONS, "set+remask".__eq__))
def test_every_interface(actions: str, temperature: float) -> None:
    """With illegal actions, truncations and resets, all of which give what they give on the CPU."""
    options = {"actions": actions, "temperature": temperature, "nfe_budget": 6, "show": ("hidden",)}
    seen = {device: interfaces(options | {"device": device}) for device in DEVICES}
    for here, there in zip(*seen.values(), strict=True):
        assert not (isinstance(here, Tensor) and here.is_cuda)
        there = there.cpu() if isinstance(there, Tensor) else there
        assert np.shape(here) == np.shape(there)
        if not REAL:
            np.testing.assert_array_equal(here, there)


def interfaces(options: dict[str, Any]) -> list[Any]:
    """What eight steps behind each interface show."""
    rng, shown, single = np.random.default_rng(0), [], options["actions"] == "single"

    def choose(mask: np.ndarray) -> np.ndarray:
        odds = rng.random(mask.shape) * (mask + 0.05)
        return odds.argmax(-1) if single else (odds > 0.6).astype(np.int8)

    env = gym.make(SMALL, render_mode="ansi", **options)
    last = env.reset(seed=0)[0]
    for _ in range(8):
        last, reward, terminated, truncated, _ = env.step(choose(last["action_mask"]))
        shown += [reward, last["tokens"], last["log_reference"], env.unwrapped.action_masks()]
        env.render()
        if terminated or truncated:
            last = env.reset()[0]
    for mode in AutoresetMode:
        envs = UnmaskVectorEnv(3, SMALL, autoreset_mode=mode, **options)
        last = envs.reset(seed=0)[0]
        for _ in range(8):
            last, reward, terminated, truncated, _ = envs.step(choose(last["action_mask"]))
            shown += [reward, last["tokens"], last["hidden"]]
            if mode == AutoresetMode.DISABLED and (terminated | truncated).any():
                last = envs.reset(options={"reset_mask": terminated | truncated})[0]
    stable = SB3VecEnv(UnmaskVectorEnv(3, SMALL, **options))
    stable.seed(0)
    last = stable.reset()
    for _ in range(8):
        last, reward, *_ = stable.step(choose(last["action_mask"]))
        shown += [reward, last["top_log_probs"]]
    regularised = RegularisedReward(UnmaskVectorEnv(3, SMALL, **options), 0.1)
    mask = regularised.reset(seed=0)[0]["action_mask"]
    shown.append(regularised.step(mask.argmax(1) if single else mask, np.zeros(3))[1])
    rl = UnmaskTorchEnv(SMALL, num_envs=4, group=2, seed=0, **options)
    assert rl.to(options["device"]) is rl
    td = rl.reset()
    for _ in range(8):
        td["action"] = torch.as_tensor(choose(td["action_mask"].numpy(force=True).astype(np.int8)))  # of the CPU
        taken, td = rl.step_and_maybe_reset(td)
        shown += [taken["next", "reward"], td["tokens"], td["state", "fill_prob"]]
    forks = rl.reset(td.clone(), set_state=True)
    shown.append(forks["top_log_probs"])
    assert {value.device.type for value in forks.values(True, True)} == {options["device"]}
    return shown


@pytest.mark.parametrize("id", sweep(unmask_env.ids(), SMALL.__eq__))
def test_every_environment_is_made_on_cuda(id: str) -> None:
    env = gym.make(id, device="cuda")
    assert env.unwrapped.process.device.type == "cuda"
    last, _ = env.reset(seed=0)
    assert env.observation_space.contains(env.step(last["action_mask"].argmax())[0])


# ---------------------------------------------------------------------- training
def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.trains
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_sampler_and_bound(name: str, tmp_path: Path) -> None:
    """The model has the CPU's weights, and samples what it samples there; the run goes on."""
    trained, made = [], []
    for device in DEVICES:
        out = str(tmp_path / device)
        config = OBJECTIVES[name]("sudoku4", out, steps=2, batch=4, device=device, save_every=1, **TINY)
        trained.append(weights(pretrain(config)))
        model = load_model(Backbone, out, PACKAGED_DENOISERS, "denoiser").to(device).eval()
        instances = tasks.get("sudoku4:blanks=6").heldout(2).to(device)
        made.append([likelihood.bound(model, instances.answers, drawing(device), 1).path])
        made[-1] += samples(model, instances.tokens, device)
    pretrain(replace(config, steps=3, resume="auto"))
    if name == "mdm":
        pretrain(replace(config, out=str(tmp_path / "bf16"), bf16=True, half=True))
    alike(*trained)
    assert len(made[0]) == len(made[1]) > 1
    for here, there in zip(*made, strict=True):
        alike(here, there)


def samples(model: Backbone, prompts: Tensor, device: str) -> list[Tensor]:
    """By every sampler that takes the model."""
    found = []
    if model.noise == "mask":
        calls = [(samplers.sample, (method, 3), {"top_p": 0.9}) for method in get_args(samplers.Method)]
        for strategy in get_args(samplers.Strategy):
            calls.append((samplers.sample, ("ancestral", 3), {"remasking": samplers.Remasking(strategy)}))
    else:
        selections = get_args(uniform_samplers.Selection)
        correctors = [None, *(uniform_samplers.Corrector(1, selection) for selection in selections)]
        correctors.append(uniform_samplers.Corrector(1, "margin", metropolis=True))
        calls = [
            (uniform_samplers.sample_uniform, (4, method, corrector), {})
            for method in get_args(uniform_samplers.Method)
            for corrector in correctors
        ]
    for sample, arguments, more in calls:
        try:
            found.append(sample(model, prompts, drawing(device), *arguments, **more).tokens)
        except UnmaskError:  # this sampler is for another kind of model
            continue
    return found


SHALLOW = PolicyConfig(copy=False, num_passes=1, **TINY)
LEARNERS = {
    "policy-iteration": {"iterations": 1, "puzzles": 4, "steps": 2, "candidates": 3, "levels": 2, "retries": 2},
    "imitation": {"steps": 2, "puzzles": 8},
    "upo": {"iterations": 1, "puzzles": 2, "group": 3},
    "ppo-sb3": {"iterations": 1, "num_envs": 4, "epochs": 1, "steps": 8, "minibatches": 2, "policy": SHALLOW},
    "ppo-torchrl": {"iterations": 1, "num_envs": 4, "epochs": 1, "steps": 8, "minibatches": 2, "policy": SHALLOW},
    "grpo-torchrl": {"iterations": 1, "puzzles": 2, "group": 2, "epochs": 1, "minibatches": 2, "policy": SHALLOW},
}
MORE = [
    ("upo", {"imitation": 1, "reference": "margin", "replay_fraction": 0.5}),
    ("upo", {"imitation": 0, "regulariser": "terminal_kl", "env": "sudoku4:blanks=3"}),
    ("upo", {"branch": True, "rules": Rules("set"), "fill_temperature": 1.0}),
    ("upo", {"rules": Rules("set"), "policy": PolicyConfig(distribution="plackett_luce", copy=False)}),
    ("policy-iteration", {"fill_temperature": 1.0, "continuations": 2, "sampled": True}),
    ("policy-iteration", {"labels": "values", "rules": Rules("set", block_length=8)}),
    ("imitation", {"reference": "softmax_margin", "policy": PolicyConfig(read_hidden=True)}),
    ("ppo-sb3", {"fill_temperature": 1.0, "beta": 0.0}),
    ("ppo-torchrl", {"fill_temperature": 1.0, "beta": 0.0}),
]
CASES = [(name, {"rules": Rules(actions)}) for name in LEARNERS for actions in ACTIONS] + MORE


@pytest.mark.trains
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_every_learner(name: str, settings: dict, tmp_path: Path, ordered: str) -> None:
    module, _, kind = cli.COMMANDS[f"train {name}"].settings.partition(":")
    learner, policies = importlib.import_module(module), []
    # This denoiser makes mistakes, which is what there is to learn from.
    small = {"env": "sudoku4:blanks=5", "denoiser": ordered, "save_every": 1, "validation_puzzles": 4}
    small |= {"validate_every": 1} | LEARNERS[name] | settings
    if name == "upo" and small.get("rules", Rules()).actions == "single":
        small.setdefault("imitation", 1)
    for device in DEVICES if "ppo" not in name else ("cuda",):  # those libraries draw from each device's global stream
        config = getattr(learner, kind)(out=str(tmp_path / device), device=device, **small)
        policies.append(weights(learner.train(config)))
        if device == "cuda" and settings == {"rules": Rules("set")}:
            length = "iterations" if "iterations" in small else "steps"
            learner.train(replace(config, resume="auto", **{length: small[length] + 1}))
    assert policies[-1].device.type == "cuda"
    if len(policies) == 2:
        alike(*policies)
