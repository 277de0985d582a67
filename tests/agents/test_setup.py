"""The learners of an order side by side: their settings and files, exact resumption, and what each of them climbs."""

import contextlib
import dataclasses
import itertools
import json
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torchrl.modules import MaskedCategorical

import tasks
from agents import sb3_ppo, torchrl_ppo, upo
from agents import setup as learner_setup
from agents.policy import OrderPolicy, PolicyConfig, load_policy
from agents.sb3_ppo import SB3PPOConfig
from agents.setup import RLConfig, seeded, setup
from agents.torchrl_ppo import TorchRLGRPOConfig, TorchRLPPOConfig
from agents.upo import UPOConfig
from pretrain.backbone import Backbone
from pretrain.checkpoint import load_state
from pretrain.run import Interrupted
from tasks import Instances, UnmaskError
from tests.oracles.enumeration import TableTask
from tests.toys import JOINT, SEQUENCE_REWARD, FreePolicy, one_of
from tests.toys import observation as observation_of
from unmask_env import exact
from unmask_env.denoiser import FrozenDenoiser, TableDenoiser
from unmask_env.distributions import Categorical
from unmask_env.process import Unmasking
from unmask_env.reference import Learned, Margin, Policy, SoftmaxConfidence
from unmask_env.state import Observation

pytestmark = pytest.mark.trains
CONFIGS = {
    "ppo-sb3": SB3PPOConfig,
    "ppo-torchrl": TorchRLPPOConfig,
    "grpo-torchrl": TorchRLGRPOConfig,
    "upo": UPOConfig,
}
LEARNERS = list(CONFIGS)
BY_LIBRARY = LEARNERS[:3]
REWARD = dict.fromkeys(BY_LIBRARY, "reward") | {"upo": "reward/fresh"}  # as TensorBoard calls it
EARLY = dict.fromkeys(BY_LIBRARY, 12) | {"upo": 1}  # a draw of instances, of each board or all, in the first iterations


def train(config: RLConfig, process: Unmasking | None = None) -> OrderPolicy:
    by_config = {SB3PPOConfig: sb3_ppo.train, UPOConfig: upo.train}
    return by_config.get(type(config), torchrl_ppo.train)(config, process)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def scalars(folder: Path) -> dict[str, list[float]]:
    """What TensorBoard shows of a run."""
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


# ---------------------------------------------------------------------- a problem on which the reference is wrong
class Misled(TableTask):
    """Two symbols, three positions; rewarded is symbol 1 at position 0, which greedy filling writes only if it begins
    there. The denoiser is less sure of it (.6) than of the others (.7), so the most confident order does not."""

    def __init__(self) -> None:
        joint = torch.zeros(2, 2, 2)
        joint[0, 0, 0], joint[1, 0, 1], joint[1, 1, 0] = 0.4, 0.3, 0.3
        super().__init__(joint)

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return tokens[:, 0].float()


class Stopping(Misled):
    """Presses Ctrl-C in the given draw of instances."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        self.left -= 1
        return super().sample(n, generator)


MISLED = Unmasking(Misled(), TableDenoiser(Misled().joint))


def misled(name: str, out: Path | str, **changes: object) -> RLConfig:
    """Settings of a few seconds for ``Misled``."""
    groups = {"puzzles": 2, "group": 4} if name in ("grpo-torchrl", "upo") else {"num_envs": 8}
    shape = PolicyConfig(copy=False, dim=16, layers=1, defer_above=2.0, num_passes=1)
    groups |= {"imitation": 0} if name == "upo" else {}
    shared = {"iterations": 6, "minibatches": 2, "beta": 0.25, "lr": 1e-2, "anneal": True, "threads": 1}
    return CONFIGS[name](out=str(out), **{"policy": shape} | groups | shared | changes)


def run_misled(name: str, out: Path, process: Unmasking = MISLED, **changes: object) -> OrderPolicy:
    return train(misled(name, out, **changes), process)


def stopping(at: int) -> Unmasking:
    return Unmasking(Stopping(at), MISLED.denoiser)


# ---------------------------------------------------------------------- files, seeds, resumption
@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Per learner the folder of an uninterrupted run."""
    root = tmp_path_factory.mktemp("finished")
    for name in LEARNERS:
        run_misled(name, root / name)
    return {name: root / name for name in LEARNERS}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_run_leaves_its_files(finished: dict[str, Path], name: str) -> None:
    out = finished[name]
    assert {path.name for path in out.iterdir()} == {
        "README.md", "run.json", "config.json", "model.safetensors", "state.safetensors", "tb", "best",
    }  # fmt: skip
    settings = json.loads((out / "run.json").read_text())
    config = misled(name, out)
    given = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    filled_in = {"kind": type(config).__name__, "reference": "softmax_confidence", "fill_temperature": 0.0}
    assert settings == given | filled_in
    policy = load_policy(out, MISLED.task, MISLED.denoiser)
    assert policy.trained == load_policy(out / "best", MISLED.task, MISLED.denoiser).trained == "rewards"
    begun = setup(misled(name, out), MISLED).policy
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), begun.parameters(), strict=True))
    assert not policy.training
    logged = scalars(out)
    assert all(np.isfinite(values).all() for values in logged.values())
    reward = logged[REWARD[name]]
    assert len(reward) == 6
    assert 0 <= min(reward) < max(reward) <= 1


@pytest.mark.parametrize("name", BY_LIBRARY)
def test_a_run_starts_at_the_reference(finished: dict[str, Path], name: str) -> None:
    divergence = scalars(finished[name])["divergence/trajectory_kl"]
    assert divergence[0] == pytest.approx(0, abs=1e-5)
    assert all(abs(value) > 1e-3 for value in divergence[1:]), "an estimate, and so of either sign"


@pytest.mark.parametrize("name", LEARNERS)
def test_the_seed_decides_the_run(finished: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Whatever was drawn before it in the process."""
    torch.manual_seed(99)
    np.random.seed(99)
    returned = run_misled(name, tmp_path / "same")
    assert weights(tmp_path / "same") == weights(finished[name])
    saved = load_policy(tmp_path / "same").state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in returned.state_dict().items())
    assert not returned.training
    # The weights start elsewhere with another seed, so only the scores of the first rollout tell that draws differ too.
    run_misled(name, tmp_path / "other", seed=1)
    assert weights(tmp_path / "other") != weights(finished[name])
    assert scalars(tmp_path / "other")[REWARD[name]] != scalars(finished[name])[REWARD[name]]


@pytest.mark.parametrize("name", LEARNERS)
def test_every_iteration_plays_anew(tmp_path: Path, name: str) -> None:
    """A policy that a learning rate of 0 keeps as it is earns something else each time."""
    run_misled(name, tmp_path / "run", lr=0.0, reference="random", epochs=1, iterations=8)
    assert len(set(scalars(tmp_path / "run")[REWARD[name]])) > 1
    begun = setup(misled(name, tmp_path, reference="random"), MISLED).policy
    saved = load_policy(tmp_path / "run").state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in begun.state_dict().items())


@pytest.mark.parametrize("name", LEARNERS)
def test_ctrl_c_and_resume_end_with_the_same_weights(finished: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Twice, also with settings that may change."""
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="of 6; the same command with --resume auto goes on"):
        run_misled(name, out, stopping(EARLY[name]))
    assert signal.getsignal(signal.SIGINT) is before, "the handler is given back"
    first = load_state(out / "state.safetensors")["step"]
    assert 1 <= first <= 3
    assert load_policy(out, MISLED.task, MISLED.denoiser).trained == "rewards", "a stopped run leaves its policy"
    with pytest.raises(Interrupted):
        run_misled(name, out, stopping(EARLY[name]), resume="must", save_every=2)
    assert first < load_state(out / "state.safetensors")["step"] < 6
    run_misled(name, out, resume="must")
    assert weights(out) == weights(finished[name])
    parts = [load_state(folder / "state.safetensors")["parts"] for folder in (out, finished[name])]
    for part in parts[0].keys() - {"optimizer"}:
        for key, value in parts[0][part].items():
            assert value == parts[1][part][key] if part == "validation" else torch.equal(value, parts[1][part][key])
    slots = [part["optimizer"]["state"] for part in parts]
    for index, slot in slots[0].items():
        for key, value in slot.items():
            assert torch.equal(value, slots[1][index][key]), (index, key)
    assert scalars(out)[REWARD[name]] == scalars(finished[name])[REWARD[name]], "each step is logged once"


@pytest.mark.parametrize("name", LEARNERS)
def test_a_run_leaves_the_global_random_streams_alone(tmp_path: Path, name: str) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1:], random.getstate()
    run_misled(name, tmp_path / "run", iterations=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    for now, then in zip(np.random.get_state()[1:], before[1], strict=True):
        np.testing.assert_array_equal(now, then)
    assert random.getstate() == before[2]


def test_seeded_puts_the_streams_back_after_an_error_too() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        np.random.seed(3)
        with contextlib.suppress(KeyError), seeded(torch.Generator().manual_seed(8)) as seed:
            draws.append((seed, float(torch.rand(())), np.random.rand()))
            raise KeyError
        draws.append((torch.rand(()), np.random.rand()))
    assert draws[0] == draws[2]
    torch.manual_seed(3)
    np.random.seed(3)
    assert draws[1] == draws[3] == (torch.rand(()), np.random.rand())
    with seeded(torch.Generator().manual_seed(9)) as other:
        assert (other, float(torch.rand(())), np.random.rand()) != draws[0]


# ---------------------------------------------------------------------- what one step of each learner is
class Tabular(FreePolicy, PyTorchModelHubMixin):
    """A free policy as the learners take it."""

    trained = ""

    def __init__(self, vocab_size: int, length: int) -> None:
        super().__init__(vocab_size, length)
        self.vocab_size, self.length = vocab_size, length

    def mark_trained(self, how: str) -> None:
        """Not of interest here."""

    def take(self, graph: exact.Graph, table: exact.Table) -> "Tabular":
        """Chooses by a policy table from now on."""
        for level, log_prob in zip(graph.levels, table, strict=True):
            fillable, tokens = level.observation.fillable, level.observation.tokens
            codes = (tokens * self.base ** torch.arange(self.length)).sum(1)
            self.table.data[codes] = torch.where(fillable, log_prob, 0.0).float()
        return self


class Known(Policy):
    """A reference from a free policy."""

    def __init__(self, policy: Tabular) -> None:
        self.policy = policy

    def __call__(self, observation: Observation) -> Categorical:
        return Categorical(self.policy(observation).log_probs.detach())


class Rewarded(TableTask):
    """A reward of its own for each complete sequence; every instance is the empty board."""

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return SEQUENCE_REWARD[tuple(tokens.T)]


PROCESS = Unmasking(Rewarded(JOINT), TableDenoiser(JOINT))
GRAPH = exact.enumerate_boards(PROCESS, PROCESS.task.sample(1, torch.Generator()))
# By the number of open positions, of which the first counts first. Sixteen trajectories have the six orders in exactly
# the proportions of their probabilities, so that a mean over them is an expectation.
CHOICES = {3: (0.5, 0.25, 0.25), 2: (0.25, 0.75), 1: (1.0,)}
ORDERS = torch.tensor(
    [
        order
        for order in itertools.permutations(range(3))
        for _ in range(round(16 * CHOICES[3][order[0]] * CHOICES[2][int(order[1] > order[2])]))
    ]
)
PAIRS = torch.cartesian_prod(torch.arange(16), torch.arange(16)).flatten()  # groups of two, in proportion as well
BETA = 0.3


def rational() -> Tabular:
    """The policy whose trajectories are ``ORDERS``."""
    table = []
    for level in GRAPH.levels:
        log_prob = torch.full(level.observation.fillable.shape, -torch.inf, dtype=torch.float64)
        for row, fillable in enumerate(level.observation.fillable):
            if fillable.any():
                log_prob[row, fillable] = torch.tensor(CHOICES[int(fillable.sum())], dtype=torch.float64).log()
        table.append(log_prob)
    return Tabular(3, 3).take(GRAPH, table)


def test_the_orders_are_in_proportion() -> None:
    assert len(ORDERS) == 16
    policy = rational()
    for order, count in zip(*ORDERS.unique(dim=0, return_counts=True), strict=True):
        board, p = torch.full((1, 3), 3), 1.0
        for position in order.tolist():
            denoised = PROCESS.denoiser(board)
            with torch.no_grad():
                p *= float(policy(observation_of(board, board == 3, denoised)).log_probs[0, position].exp())
            board[0, position] = denoised.log_probs[0, position].argmax()
        assert p == pytest.approx(int(count) / 16)


@pytest.fixture
def step_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Tensor, Path]]:
    """One iteration of a learner as a whole, by plain gradient ascent on the trajectories above: the expected change of
    the policy's logits, per trajectory and unit of learning rate; and the run's folder."""

    def run(name: str, policy: Tabular, target: Policy, **changes: object) -> tuple[Tensor, Path]:
        groups = name in ("grpo-torchrl", "upo")
        orders = ORDERS[PAIRS] if groups else ORDERS

        def act(mask: Tensor) -> Tensor:
            if len(mask) != len(orders):  # a library trying the policy out
                return mask.int().argmax(1)
            return orders.gather(1, (~mask).sum(1, keepdim=True).clamp(max=2)).squeeze(1)

        begun = Tabular(3, 3)
        begun.load_state_dict(policy.state_dict())
        monkeypatch.setattr(MaskableCategoricalDistribution, "sample", lambda self: act(self.distribution.masks))
        monkeypatch.setattr(MaskedCategorical, "sample", lambda self, sample_shape=None: act(self._mask))
        monkeypatch.setattr(Categorical, "sample", lambda self, generator: one_of(act(self.log_probs > -torch.inf), 3))
        monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, betas: torch.optim.SGD(groups, lr))
        monkeypatch.setattr(learner_setup, "_start", lambda *_, **start: begun)
        monkeypatch.setattr(learner_setup, "reference", lambda _: target)
        sizes = {"puzzles": 256, "group": 2} if groups else {"num_envs": 16, "gae_lambda": 1.0}
        sizes |= {"imitation": 0} if name == "upo" else {}
        settings = {
            "beta": BETA, "iterations": 1, "epochs": 1, "minibatches": 1, "grad_clip": 1e9, "lr": 5.0, "threads": 1,
        } | sizes | changes  # fmt: skip
        config = CONFIGS[name](out=str(tmp_path / name), **settings)
        trained = train(config, PROCESS)
        change = (trained.table - policy.table).detach() / config.learning_rate(0)
        # The libraries average over steps, UPO over trajectories.
        return change * (1 if name == "upo" else 3), tmp_path / name

    return run


def exact_gradient(policy: Tabular, target: Policy, beta: float, terminal: bool = False) -> Tensor:
    """Of J in the policy's logits."""
    values = exact.evaluate(GRAPH, exact.tabulate(GRAPH, policy), exact.tabulate(GRAPH, target))
    divergence = values.terminal_kl if terminal else values.trajectory_kl
    return torch.autograd.grad((values.reward - beta * divergence).sum(), policy.table)[0]


VARIANTS = [
    ("ppo-sb3", {}), ("ppo-torchrl", {}), ("grpo-torchrl", {}), ("upo", {"regulariser": "step_kl"}),
    ("upo", {"regulariser": "trajectory_kl"}), ("upo", {"regulariser": "terminal_kl"}),
]  # fmt: skip
VARIANT_NAMES = [" ".join([name, *changes.values()]) for name, changes in VARIANTS]


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=VARIANT_NAMES)
def test_the_expected_step_is_the_gradient_of_the_objective(step_of, name: str, changes: dict) -> None:
    """E[r] - beta * KL, by autograd through the enumerated problem. In groups of two, a baseline that contained the
    trajectory itself would halve the reward's part."""
    policy, target = rational(), SoftmaxConfidence(0.1)
    change, folder = step_of(name, policy, target, **changes)
    expected = exact_gradient(policy, target, BETA, changes.get("regulariser") == "terminal_kl")
    torch.testing.assert_close(change, expected, atol=3e-6, rtol=1e-4)
    reward_alone = exact_gradient(policy, target, 0.0)
    assert (expected - reward_alone).abs().max() > 0.02, "the divergence has a part in it"
    if name != "upo":
        with torch.no_grad():
            values = exact.evaluate(GRAPH, policy, target)
        logged = scalars(folder)
        assert logged["reward"] == pytest.approx([float(values.reward)], rel=1e-5)
        assert logged["divergence/trajectory_kl"] == pytest.approx([float(values.trajectory_kl)], rel=1e-4)


@pytest.mark.parametrize("name", LEARNERS)
def test_without_beta_it_is_the_rewards(step_of, name: str) -> None:
    """And a deterministic reference is then allowed."""
    policy = rational()
    change, _ = step_of(name, policy, Margin(), beta=0.0)
    torch.testing.assert_close(change, exact_gradient(policy, Known(policy), 0.0), atol=3e-6, rtol=1e-4)


def made_optimal(policy: Tabular) -> Known:
    """The reference for which ``policy`` is soft-optimal: pi e^(-r / beta), renormalised over paths."""
    levels = [dataclasses.replace(level, reward=-level.reward) for level in GRAPH.levels]
    inverse = exact.soft_optimal(dataclasses.replace(GRAPH, levels=levels), policy, BETA)
    return Known(Tabular(3, 3).take(GRAPH, inverse.policy))


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=VARIANT_NAMES)
def test_the_soft_optimum_is_a_fixed_point(step_of, name: str, changes: dict) -> None:
    """The expected step from the policy that is soft-optimal is zero, so reward and divergence weigh as J says."""
    policy = rational()
    target = made_optimal(policy)
    optimum = exact.soft_optimal(GRAPH, target, BETA)
    for ours, theirs in zip(exact.tabulate(GRAPH, policy), optimum.policy, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert exact_gradient(policy, target, 0.0).abs().max() > 0.02
    change, _ = step_of(name, policy, target, **changes)
    assert change.abs().max() < 5e-6


@pytest.mark.parametrize(
    ("name", "module", "function", "changes"),
    [
        ("upo", upo, "group_advantage", {"regulariser": "trajectory_kl"}),
        ("upo", upo, "group_advantage", {"regulariser": "terminal_kl"}),
        ("upo", upo, "regularised_advantage", {"regulariser": "step_kl"}),
    ],
    ids=["trajectory_kl", "terminal_kl", "step_kl"],
)
def test_the_fixed_point_needs_the_leave_one_out_factor(
    step_of, monkeypatch: pytest.MonkeyPatch, name: str, module, function: str, changes: dict
) -> None:
    original = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *arguments: original(*arguments) / 2)  # G / (G - 1) = 2
    policy = rational()
    change, _ = step_of(name, policy, made_optimal(policy), **changes)
    assert change.abs().max() > 0.01


# ---------------------------------------------------------------------- training against the exact optimum
@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=VARIANT_NAMES)
def test_training_comes_near_the_exact_optimum(tmp_path: Path, name: str, changes: dict) -> None:
    """J* is .3 here, of which a policy that is always rewarded has .17 and the reference, the start, .06."""
    settings = {"iterations": 16, "epochs": 3, "minibatches": 2, "beta": 0.3}
    sizes = {"puzzles": 8, "group": 8} if name in ("grpo-torchrl", "upo") else {"num_envs": 64}
    trained = run_misled(name, tmp_path / "run", **settings, **sizes, **changes)
    graph = exact.enumerate_boards(MISLED, MISLED.task.sample(1, torch.Generator()))
    target = SoftmaxConfidence()
    with torch.no_grad():
        values = exact.evaluate(graph, trained, target)
    divergence = values.terminal_kl if changes.get("regulariser") == "terminal_kl" else values.trajectory_kl
    best = float(exact.soft_optimal(graph, target, 0.3).value)  # with greedy filling also the terminal optimum
    assert float(exact.evaluate(graph, target).reward) < 0.25 * best
    assert float(values.reward - 0.3 * divergence) > 0.9 * best


# ---------------------------------------------------------------------- settings
def test_the_learning_rate_by_hand() -> None:
    plain = RLConfig(out="", lr=0.1, iterations=10)
    assert [plain.learning_rate(i) for i in range(7)] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1])
    falling = dataclasses.replace(plain, anneal=True)
    expected = [0.02, 0.9 * 0.04, 0.8 * 0.06, 0.7 * 0.08, 0.6 * 0.1, 0.05, 0.04, 0.03, 0.02, 0.01]
    assert [falling.learning_rate(i) for i in range(10)] == pytest.approx(expected)


@pytest.mark.parametrize("name", LEARNERS)
def test_the_learning_rate_reaches_the_optimizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    used = []

    class Noting(torch.optim.AdamW):
        def step(self, closure: None = None) -> None:
            used.append({group["lr"] for group in self.param_groups})
            super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Noting)
    config = misled(name, tmp_path / "run", iterations=3, epochs=1, minibatches=1)
    train(config, MISLED)
    assert all(len(rates) == 1 for rates in used), "one for all groups"
    assert [rates.pop() for rates in used] == pytest.approx([config.learning_rate(i) for i in range(3)])


@pytest.mark.parametrize(("init", "lr"), [(False, 1e-3), (True, 3e-5)])
def test_the_default_learning_rate_depends_on_the_start(
    finished: dict[str, Path], tmp_path: Path, init: bool, lr: float
) -> None:
    config = misled("upo", tmp_path, lr=None, init=str(finished["upo"]) if init else None)
    ready = setup(config, MISLED)
    assert ready.config.lr == lr
    saved = load_policy(finished["upo"]).state_dict()
    same = all(torch.equal(value, saved[key]) for key, value in ready.policy.state_dict().items())
    assert same == init


def test_shared_settings_are_the_same_everywhere() -> None:
    """A setting that two learners have has one type and default; what they inherit, none describes anew."""
    seen: dict[str, tuple] = {}
    for config in CONFIGS.values():
        assert issubclass(config, RLConfig)
        for field in dataclasses.fields(config):
            described = (field.type, field.default, field.default_factory)
            assert seen.setdefault(field.name, described) == described, field.name
        for base in config.__mro__[1:-1]:
            assert not config.__annotations__.keys() & base.__annotations__.keys() or config.__annotations__ is (
                base.__annotations__
            )
    assert seen.keys() > {field.name for field in dataclasses.fields(RLConfig)}
    assert {"puzzles", "group", "steps", "num_envs"} <= seen.keys()


# ---------------------------------------------------------------------- mistakes
def refused(config: RLConfig, *given: object) -> str:
    with pytest.raises(UnmaskError) as error:
        train(config, *given)
    assert "\n" not in str(error.value)
    assert not Path(config.out).exists(), "nothing was written"
    return str(error.value)


@pytest.mark.parametrize("name", BY_LIBRARY)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "margin"}, "KL to the deterministic reference margin is infinite"),
        ({"reference": "left_to_right"}, "KL to the deterministic reference left_to_right is infinite"),
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"steps": 3, "minibatches": 7}, "8 boards x 3 steps do not divide into 7 minibatches"),
        ({"fill_temperature": -0.5}, "fill_temperature must be a number of at least 0, not -0.5"),
        ({"beta": -0.1}, "beta must be a number of at least 0, not -0.1"),
        ({"beta": float("nan")}, "beta must be a number of at least 0, not nan"),
        ({"clip": -0.1}, "clip must be a number of at least 0 and below 1, not -0.1"),
        ({"lr": -1.0}, "lr must be a number of at least 0, not -1.0"),
        ({"iterations": 0}, "iterations must be a whole number of at least 1, not 0"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, not 0"),
        ({"minibatches": 0}, "minibatches must be a whole number of at least 1, not 0"),
        ({"save_every": 0}, "save_every must be a whole number of at least 1, not 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0 and below 2**63, not -1"),
        ({"reference": "softmax_confidence:tau=0"}, "tau must be a number above 0, not 0"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"resume": "must"}, "nothing to resume"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit(tmp_path: Path, name: str, changes: dict, message: str) -> None:
    said = refused(misled(name, tmp_path / "run", **changes), MISLED)
    assert message in said


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ppo-sb3", {"num_envs": 0}, "num_envs must be a whole number of at least 1, not 0"),
        ("ppo-torchrl", {"num_envs": 0}, "num_envs must be a whole number of at least 1, not 0"),
        ("grpo-torchrl", {"puzzles": 0}, "puzzles must be a whole number of at least 1, not 0"),
        ("grpo-torchrl", {"group": 1}, "group must be a whole number of at least 2, not 1"),
        ("upo", {"fill_temperature": -0.5}, "fill_temperature must be a number of at least 0, not -0.5"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(tmp_path: Path, name: str, changes: dict, message: str) -> None:
    said = refused(misled(name, tmp_path / "run", **changes), MISLED)
    assert message in said


@pytest.mark.parametrize("name", ["ppo-sb3", "ppo-torchrl"])
@pytest.mark.parametrize("changes", [{"gae_lambda": 1.5}, {"gae_lambda": -0.1}, {"critic_weight": -1.0}], ids=str)
def test_settings_of_the_critic_that_do_not_fit(tmp_path: Path, name: str, changes: dict) -> None:
    config = misled(name, tmp_path / "run", iterations=1, **changes)
    assert next(iter(changes)) in refused(config, MISLED)


def test_normalising_minibatches_of_one_is_refused(tmp_path: Path) -> None:
    config = misled("ppo-sb3", tmp_path / "run", num_envs=2, steps=1, minibatches=2, normalise=True)
    assert "normalise" in refused(config, MISLED)


def test_groups_need_steps_for_an_episode(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match=r"no episode ends within 2 steps.*raise --steps") as error:
        run_misled("grpo-torchrl", tmp_path / "run", steps=2)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", LEARNERS)
def test_a_run_is_not_resumed_with_other_settings(tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        run_misled(name, out, stopping(EARLY[name]))
    with pytest.raises(UnmaskError, match="already holds a run; add --resume auto"):
        run_misled(name, out)
    size = {"puzzles": 4} if name in ("grpo-torchrl", "upo") else {"num_envs": 16}
    for changes in (size, {"seed": 1}, {"beta": 0.5}, {"iterations": 5}, {"lr": 0.5}, {"anneal": False}):
        [key] = changes
        with pytest.raises(UnmaskError, match=f"cannot resume .* with other settings: {key} was ") as error:
            run_misled(name, out, resume="must", **changes)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_finished_run_can_be_extended(tmp_path: Path, name: str) -> None:
    """Where nothing depends on its length, to what the longer run would have been."""
    for folder, iterations in (("run", 2), ("run", 3), ("whole", 3)):
        run_misled(name, tmp_path / folder, resume="auto", iterations=iterations, anneal=False)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.parametrize("name", BY_LIBRARY)
def test_a_policy_that_leaves_the_reference_is_refused(finished: dict[str, Path], tmp_path: Path, name: str) -> None:
    """One that chooses anywhere, against a reference of one candidate: the KL is infinite."""
    with pytest.raises(UnmaskError, match="probability 0 under the reference") as error:
        run_misled(name, tmp_path / "run", reference="top_k:k=1", init=str(finished[name]))
    assert "\n" not in str(error.value)


def test_the_default_reference_is_upos() -> None:
    ready = setup(RLConfig(out=""), MISLED)
    assert ready.reference == SoftmaxConfidence(0.05)
    assert ready.config.reference == "softmax_confidence"


# ---------------------------------------------------------------------- what only some denoisers tell
@pytest.mark.parametrize("name", LEARNERS)
def test_policies_that_read_hidden_states_learn(tmp_path: Path, name: str) -> None:
    """And names are looked up."""
    sizes = {"puzzles": 2, "group": 4} if name in ("grpo-torchrl", "upo") else {"num_envs": 4}
    shape = PolicyConfig(read_hidden=True, dim=16, layers=1, defer_above=2.0)
    config = CONFIGS[name](
        out=str(tmp_path / "run"), env="Unmask/Sudoku4x4-v0", policy=shape, iterations=4, minibatches=2, threads=1,
        reference="random", lr=1e-2, **sizes,
    )  # fmt: skip
    begun, trained = setup(config).policy, train(config)
    assert begun.reads_hidden
    reading = {key for key in begun.state_dict() if "hidden" in key}
    assert any(not torch.equal(begun.state_dict()[key], trained.state_dict()[key]) for key in reading)


def lomdm() -> Unmasking:
    """4x4 Sudoku with a denoiser whose order is far from uniform."""
    task = tasks.get("sudoku4")
    torch.manual_seed(0)
    model = Backbone(4, task.coordinates.tolist(), 16, 1, 2, order="context")
    for weight in (model.symbols.weight, model.positions.tables[0].weight, model.order.revealing[-1].weight):
        torch.nn.init.normal_(weight)
    return Unmasking(task, FrozenDenoiser(model, task))


def test_upo_starts_at_the_learned_order_and_goes_on_from_there(tmp_path: Path) -> None:
    process = lomdm()
    task, denoiser = process.task, process.denoiser
    config = UPOConfig(
        out=str(tmp_path / "run"), denoiser="given", reference="learned", beta=0.1, iterations=2, puzzles=4, group=4,
        regulariser="step_kl", threads=1,
    )  # fmt: skip
    policy = setup(config, process).policy
    boards = task.heldout(20).tokens
    observation = observation_of(boards, boards == task.mask_id, denoiser(boards))
    theirs = Learned()(observation).log_probs
    torch.testing.assert_close(policy(observation).log_probs, theirs)
    expected = denoiser(boards).order_weights.where(boards == task.mask_id, 0)
    torch.testing.assert_close(theirs.exp(), expected / expected.sum(1, keepdim=True))
    assert float((theirs.exp() * (boards == task.mask_id).sum(1, keepdim=True)).max()) > 1.05, "not uniform"
    trained = upo.train(config, process)
    assert abs(scalars(tmp_path / "run")["divergence/step_kl"][0]) < 0.05
    assert not torch.allclose(trained(observation).log_probs, theirs)
    again = load_policy(tmp_path / "run", task, denoiser)
    assert torch.equal(again(observation).log_probs, trained(observation).log_probs)


@pytest.mark.parametrize("name", BY_LIBRARY)
def test_the_libraries_start_at_the_learned_order_too(tmp_path: Path, name: str) -> None:
    sizes = {"puzzles": 2, "group": 2} if name == "grpo-torchrl" else {"num_envs": 4}
    config = CONFIGS[name](
        out=str(tmp_path / "run"), denoiser="given", reference="learned", beta=0.1, lr=1e-2, iterations=2, threads=1,
        **sizes,
    )  # fmt: skip
    train(config, lomdm())
    divergence = scalars(tmp_path / "run")["divergence/trajectory_kl"]
    assert divergence[0] == pytest.approx(0, abs=1e-4)
    assert abs(divergence[1]) > 1e-5


@pytest.mark.parametrize("name", LEARNERS)
def test_a_denoiser_without_an_order_has_no_learned_reference(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name](out=str(tmp_path / "run"), env="Unmask/Sudoku4x4-v0", reference="learned", threads=1)
    with pytest.raises(UnmaskError, match="this denoiser has learned no order"):
        train(config)
    assert not (tmp_path / "run").exists()
