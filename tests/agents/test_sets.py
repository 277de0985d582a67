"""Policies over sets: distributions by enumeration, starting points, gradients, and that every learner trains them."""

import dataclasses
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import tasks
from agents import imitation, upo
from agents import states as agents_states
from agents.decoding import Thresholds, most_likely_set
from agents.imitation import ImitationConfig, set_imitation_loss
from agents.policy import REFILL_PENALTY, OrderPolicy, PolicyConfig, load_policy, new_policy
from agents.remask_policy import REMASK_AGAIN_PENALTY, RemaskPolicy
from agents.sb3_ppo import SB3PPOConfig
from agents.states import States
from agents.torchrl_ppo import TorchRLGRPOConfig, TorchRLPPOConfig
from agents.upo import UPOConfig
from pretrain.checkpoint import save_model
from tasks import Instances, UnmaskError
from tests.oracles.enumeration import TableTask, random_joint
from tests.toys import observation as observation_of
from tests.toys import rollout, stepped
from unmask_env.denoiser import TableDenoiser, load_denoiser
from unmask_env.process import Unmasking
from unmask_env.reference import SoftThreshold, Threshold
from unmask_env.state import Denoised, History, Observation, Rules

L, V = 3, 3
SET, REMASK = Rules("set", nfe_budget=8), Rules("set+remask", nfe_budget=8)


def policy_of(distribution: str, base: str = "none", jiggle: bool = True) -> OrderPolicy:
    torch.manual_seed(0)
    policy = OrderPolicy(V, [[i] for i in range(L)], base=base, dim=8, layers=1, heads=2, distribution=distribution)
    if jiggle:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape))
    return policy.eval()


def observation(n: int = 5, remask: bool = False) -> Observation:
    g = torch.Generator().manual_seed(1)
    is_open = torch.rand(n, L, generator=g) < 0.6
    is_open[0] = True
    tokens = torch.randint(V, (n, L), generator=g).masked_fill(is_open, V)
    log_probs = torch.randn(n, L, V, generator=g).log_softmax(-1)
    if not remask:
        return observation_of(tokens, is_open, Denoised.of(log_probs))
    return observation_of(tokens, is_open, Denoised.of(log_probs), ~is_open, torch.randint(3, (n, L), generator=g))


def every_set(entries: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=entries)))


@pytest.mark.parametrize("remask", [False, True])
@pytest.mark.parametrize("distribution", ["bernoulli", "plackett_luce"])
@torch.no_grad()
def test_probabilities_of_all_sets_sum_to_one(distribution: str, remask: bool) -> None:
    policy, seen = policy_of(distribution), observation(remask=remask)
    sets = every_set(seen.action_mask.shape[1])
    each = torch.stack([policy(seen).log_prob(s.expand(len(seen.tokens), -1)) for s in sets])
    torch.testing.assert_close(each.logsumexp(0), torch.zeros(len(seen.tokens)), atol=2e-4, rtol=0)


@torch.no_grad()
def test_a_policy_tells_what_was_given_from_what_play_filled_in() -> None:
    policy, seen = policy_of("bernoulli"), observation(remask=True)
    nothing = dataclasses.replace(seen, remaskable=torch.zeros_like(seen.fillable))
    rows = seen.remaskable.any(1)
    assert rows.any()
    filled, given = (policy.log_odds(o)[rows, :L] for o in (seen, nothing))
    assert (filled - given).abs().amax(1).min() > 1e-4
    plain = dataclasses.replace(seen, remaskable=None, remask_count=None)
    nothing = dataclasses.replace(nothing, remask_count=torch.zeros_like(seen.tokens))
    assert torch.equal(policy.log_odds(plain), policy.log_odds(nothing)[:, :L]), "as where nothing may be masked again"


@torch.no_grad()
def test_a_policy_remembers_what_it_masked_again_up_to_three_times() -> None:
    policy, seen = policy_of("bernoulli"), observation(remask=True)

    def odds(times: int) -> torch.Tensor:
        counts = torch.zeros_like(seen.tokens)
        counts[:, 2] = times
        return policy.log_odds(dataclasses.replace(seen, remask_count=counts))

    assert (odds(1) - odds(0)).abs().min() > 1e-6, "the whole board is read with it"
    assert torch.equal(odds(3), odds(4))
    assert not torch.equal(odds(2), odds(3))
    policy.remask_count_embedding.zero_()
    before = odds(0)
    policy.head.refill_penalty.fill_(2.0)
    expected = torch.zeros_like(before)
    expected[:, 2] = 2.0 * 3
    torch.testing.assert_close(odds(0) - odds(3), expected, msg="by hand: the odds of filling it fall by so much each")


@torch.no_grad()
def test_a_remask_policy_says_what_to_mask_again_and_leaves_filling_alone(tmp_path) -> None:
    policy, seen = policy_of("bernoulli"), observation(remask=True)
    fresh = dataclasses.replace(seen, remask_count=torch.zeros_like(seen.tokens))
    plain = policy.log_odds(dataclasses.replace(seen, remaskable=None, remask_count=None))
    both = RemaskPolicy.start(policy).eval()
    assert both.refill_penalty == REFILL_PENALTY
    before = both.log_odds(fresh)
    assert torch.equal(before[:, :L], plain)
    assert torch.equal(both.log_odds(dataclasses.replace(seen, remaskable=None, remask_count=None)), plain)
    for parameter in both.remask.parameters():
        parameter.add_(0.5)
    after = both.log_odds(fresh)
    assert torch.equal(after[:, :L], plain)
    assert (after[:, L:] - before[:, L:]).abs().min() > 1e-3
    # What was masked again once is neither filled nor masked once more as easily: by hand.
    both.remask.remask_count_embedding.zero_()
    both.remask.head.refill_penalty.zero_()
    twice = fresh.tokens.new_full(fresh.tokens.shape, 2)
    expected = both.log_odds(fresh) - 2 * torch.tensor([REFILL_PENALTY] * L + [REMASK_AGAIN_PENALTY] * L)
    torch.testing.assert_close(both.log_odds(dataclasses.replace(fresh, remask_count=twice)), expected)
    save_model(both, tmp_path)
    loaded = load_policy(tmp_path)
    assert isinstance(loaded, RemaskPolicy)
    assert torch.equal(loaded.log_odds(seen), both.log_odds(seen))
    passes = loaded.fill.config.num_passes
    assert loaded.remask.config.num_passes == 2 * passes, "nothing but its own time is at stake"
    assert len(loaded.remask.read(seen)[0]) == 2 * passes


@pytest.mark.trains
def test_from_a_policy_only_the_remasking_half_is_trained(tmp_path) -> None:
    process = Unmasking(*board())
    small = ImitationConfig(
        out=str(tmp_path / "first"), rules=SET, puzzles=50, steps=5, batch=8, policy=PolicyConfig(copy=False, dim=16)
    )
    imitation.train(small, process)
    again = dataclasses.replace(small, out=str(tmp_path / "second"), init=small.out, rules=REMASK)
    with pytest.warns(UserWarning, match="no board of 50 puzzles came to hold a wrong symbol"):
        policy = imitation.train(again, process)
    first = load_policy(small.out).state_dict()
    assert all(torch.equal(policy.fill.state_dict()[name], value) for name, value in first.items())
    assert any(not torch.equal(policy.remask.state_dict()[name], value) for name, value in first.items())
    assert policy.remask.state_dict().keys() == policy.fill.state_dict().keys() == first.keys()

    one = dataclasses.replace(small, out=str(tmp_path / "one"), rules=REMASK)
    with pytest.warns(UserWarning, match="no board of 50"):
        imitation.train(one, process)
    both = dataclasses.replace(again, out=str(tmp_path / "both"), init=one.out)
    with pytest.raises(UnmaskError, match="masks positions again with the network that fills them"):
        imitation.train(both, process)
    budget = dataclasses.replace(one, out=str(tmp_path / "budget"), rules=Rules("set+remask", remask_budget=2))
    with pytest.raises(UnmaskError, match="does not count a remask_budget"):
        imitation.train(budget, process)


@torch.no_grad()
def test_a_new_policy_is_its_base() -> None:
    policy, seen = policy_of("bernoulli", "soft_threshold", jiggle=False), observation(remask=True)
    base = SoftThreshold()(seen)
    torch.testing.assert_close(policy(seen).entry_log_probs(), base.entry_log_probs())
    torch.testing.assert_close(policy(seen).kl(base), torch.zeros(5))


@torch.no_grad()
def test_the_most_likely_set_follows_the_threshold_and_is_never_empty() -> None:
    policy, seen = policy_of("bernoulli"), observation()
    chance = policy(seen).entry_log_probs().exp()
    sizes = []
    for threshold in (0.05, 0.5, 0.95, 0.9999):
        chosen = policy.at(threshold)(seen).mode()
        best = chance.masked_fill(~seen.fillable, -1.0).argmax(1)
        for row in range(len(chosen)):
            if seen.fillable[row].any():
                assert chosen[row, best[row]]
            likely = chance[row] > threshold
            likely[best[row]] |= bool(seen.fillable[row].any())
            assert torch.equal(chosen[row], likely & seen.action_mask[row])
        sizes.append(int(chosen.sum()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


@torch.no_grad()
def test_one_sure_mistake_masks_all_that_are_suspected_and_holds_the_rest() -> None:
    """By hand. Rows: sure of a mistake and suspicious of another; suspicious alone; sure of what may not be masked."""
    masked = torch.tensor([[True, True, False, False, False]] * 3)
    again = torch.tensor([[False, False, True, True, True]] * 2 + [[False, False, False, True, True]])
    tokens = torch.where(masked, 3, 0)
    seen = observation_of(tokens, masked, Denoised.of(torch.zeros(3, 5, 3)), again, torch.zeros(3, 5).long())
    remask = torch.tensor([[0.9, 0.9, 0.55, 0.3, 0.2], [0.9, 0.9, 0.45, 0.3, 0.2], [0.9, 0.9, 0.9, 0.4, 0.1]])
    odds = torch.cat([torch.tensor([[0.8, 0.9, 0.99, 0.99, 0.99]] * 3), remask], 1).logit()

    def chosen(seen: Observation, thresholds: Thresholds) -> list[list[int]]:
        return most_likely_set(seen, odds, thresholds).int().tolist()

    half = Thresholds()
    assert chosen(seen, half)[0] == [0, 1, 0, 0, 0, 0, 0, 1, 1, 0], "of what is masked, the likeliest alone"
    assert chosen(seen, half)[1] == chosen(seen, half)[2] == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert chosen(seen, Thresholds(0.85, 0.95))[0] == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert chosen(seen, Thresholds(0.5, 0.44))[1] == [0, 1, 0, 0, 0, 0, 0, 1, 1, 0]
    # What a budget leaves goes to the likeliest; where it leaves nothing, play goes on as if nothing were suspected.
    history = History(torch.zeros(3, dtype=torch.long), torch.ones(3, 5), None, torch.tensor([1, 5, 0]))
    assert chosen(dataclasses.replace(seen, history=history), half)[0] == [0, 1, 0, 0, 0, 0, 0, 1, 0, 0]
    history = dataclasses.replace(history, remasks_left=torch.zeros(3, dtype=torch.long))
    assert chosen(dataclasses.replace(seen, history=history), half)[0] == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_a_policy_keeps_to_a_remask_budget() -> None:
    """It would mask more: where nothing is left to mask, what asked for more would be illegal and asked for again."""
    task = tasks.get("sudoku4")
    denoiser, instances = load_denoiser("sudoku4", task), task.heldout(20)
    policy = new_policy(PolicyConfig(), task, denoiser, 0, "soft_threshold", sets=True)
    for budget in (0, 2):
        rules = Rules("set+remask", remask_budget=budget, nfe_budget=12)
        for sampled in (False, True):
            generator = torch.Generator().manual_seed(0) if sampled else None
            decoded = policy.at(0.5, 1e-6)  # whatever may be masked again is
            played = rollout(task, denoiser, decoded, instances, rules=rules, record=True, generator=generator)
            masked_again = torch.stack([step.observation.remask_count.sum(1) for step in played.steps]).amax(0)
            assert int(masked_again.max()) <= budget
            if not sampled:
                assert set(masked_again.tolist()) <= {0, budget}, "boards that one forward fills mask nothing"
                assert int(masked_again.max()) == budget
            assert not played.state.masked.any(), "nothing illegal was asked for, over and over"


def test_filling_is_no_part_of_what_the_remasking_half_learns(monkeypatch) -> None:
    policy, seen = policy_of("bernoulli"), observation(remask=True)
    generator = torch.Generator().manual_seed(0)
    odds = torch.randn(5, 2 * L, generator=generator)
    others = torch.cat([torch.randn(5, L, generator=generator), odds[:, L:]], 1)
    answers = torch.randint(V, (5, L), generator=generator)

    def loss(odds: torch.Tensor, **options: object) -> float:
        monkeypatch.setattr(policy.head, "log_odds", lambda *_: odds)
        return float(set_imitation_loss(policy, seen, answers, **options).detach())

    assert loss(odds, fills=False) == loss(others, fills=False)
    assert loss(odds, fills=False) != loss(odds.flip(1), fills=False)
    right = torch.where(seen.fillable, answers, seen.tokens)  # no mistake on the board, so filling can be learned
    answers = right
    assert loss(odds) != loss(others)


def board() -> tuple[TableTask, TableDenoiser]:
    task = TableTask(random_joint(V, L, seed=4))
    return task, TableDenoiser(task.joint, task)


def test_the_gradient_of_upo_over_sets_is_that_of_the_enumerated_objective() -> None:
    """One forward fills everything or not: on a budget of one, E[r] is a sum over sets, and so is its gradient."""
    task, denoiser = board()
    policy, process = policy_of("bernoulli"), Unmasking(task, denoiser, Rules("set", nfe_budget=1))
    empty = torch.full((1, L), V)
    start = Instances(empty, denoiser(empty).best)
    state = process.reset(start)
    seen = process.observe(state)
    expected = torch.zeros(())
    for s in every_set(L):
        _, reward = stepped(process, state, s[None])
        expected = expected + policy(seen).log_prob(s[None]).exp().sum() * reward.sum()
    assert float(expected.detach()) > 0
    exact = torch.autograd.grad(expected, list(policy.parameters()), allow_unused=True)

    config = UPOConfig(out="unused", rules=process.rules)
    played = process.rollout(policy, start.repeat(20_000), torch.Generator().manual_seed(0), record=True)
    batch = upo.flatten(played, upo.group_advantage(played.reward, 20_000, config.normalise))
    loss, _ = upo.upo_loss(upo.Tempered(policy, 1.0), SoftThreshold(), batch, "none", 0.0, 0.2)
    found = torch.autograd.grad(-loss, list(policy.parameters()), allow_unused=True)
    flat = [torch.cat([g.flatten() for g in part if g is not None]) for part in (exact, found)]
    assert float((flat[0] - flat[1]).norm() / flat[0].norm()) < 0.15
    assert float(torch.nn.functional.cosine_similarity(*flat, dim=0)) > 0.99


def test_divergences_over_sets_against_sums_over_all_sets() -> None:
    seen, g = observation(), SoftThreshold(0.5, 0.3)
    policy = policy_of("bernoulli")
    with torch.no_grad():
        total = torch.zeros(5)
        for s in every_set(L):
            action = s.expand(5, -1)
            log_p, log_q = policy(seen).log_prob(action), g(seen).log_prob(action)
            total += torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
        torch.testing.assert_close(policy(seen).kl(g(seen)), total, atol=1e-4, rtol=1e-4)
        rule = Threshold(0.5)
        wanted = -policy(seen).log_prob(rule(seen).mode())
        torch.testing.assert_close(policy(seen).cross_entropy(rule(seen)), wanted)


SMALL = {"iterations": 2, "env": "Unmask/Sudoku4x4-v0", "beta": 1e-3, "threads": 1}


@pytest.mark.trains
@pytest.mark.parametrize("rules", [Rules("set", speed=1.0, nfe_budget=16), Rules("set+remask", nfe_budget=16)], ids=str)
@pytest.mark.parametrize("learner", ["upo", "plackett_luce", "ppo-sb3", "ppo-torchrl", "grpo-torchrl"])
def test_every_learner_trains_them(learner: str, rules: Rules, tmp_path) -> None:
    from agents import sb3_ppo, torchrl_ppo

    common = SMALL | {"rules": rules, "out": str(tmp_path)}
    if learner in ("upo", "plackett_luce"):
        distribution = "bernoulli" if learner == "upo" else learner
        trained = upo.train(UPOConfig(puzzles=4, group=4, policy=PolicyConfig(distribution=distribution), **common))
    elif learner == "ppo-sb3":
        trained = sb3_ppo.train(SB3PPOConfig(num_envs=8, steps=8, **common))
    elif learner == "ppo-torchrl":
        trained = torchrl_ppo.train(TorchRLPPOConfig(num_envs=8, steps=8, **common))
    else:
        trained = torchrl_ppo.train(TorchRLGRPOConfig(puzzles=2, group=4, steps=16, **common))
    task = tasks.get("sudoku4")
    loaded = load_policy(tmp_path, task)
    fresh = new_policy(
        PolicyConfig(distribution=loaded.config.distribution),
        task,
        load_denoiser("sudoku4", task),
        0,
        "soft_threshold",
        sets=True,
    )
    moved = [not torch.equal(a, b) for a, b in zip(loaded.parameters(), fresh.parameters(), strict=True)]
    assert any(moved)
    assert all(p.isfinite().all() for p in trained.parameters())


def test_both_libraries_see_the_distribution_of_the_policy() -> None:
    from gymnasium import spaces
    from tensordict import TensorDict

    from agents.critic import new_critic
    from agents.sb3_ppo import OrderActorCritic
    from agents.torchrl_ppo import make_actor
    from unmask_env.encoding import as_numpy, decode
    from unmask_env.vector_env import UnmaskVectorEnv

    task, denoiser = board()
    policy = policy_of("bernoulli")
    envs = UnmaskVectorEnv(6, task=task, denoiser=denoiser, actions="set+remask")
    envs.reset(seed=0)
    envs.step(np.eye(6, 2 * L, dtype=np.int8) * (np.arange(2 * L) < L))
    envs.step(np.eye(6, 2 * L, k=L, dtype=np.int8))  # mask it again
    arrays = envs._seen.arrays
    assert arrays["remask_count"].sum() > 0
    action = torch.rand(6, 2 * L, generator=torch.Generator().manual_seed(0)) < 0.5
    action &= arrays["action_mask"]
    wanted = policy(decode(arrays, V)).log_prob(action)
    actor_critic = OrderActorCritic(
        envs.single_observation_space, envs.single_action_space, lambda _: 1e-3, policy, new_critic(task, 0)
    )
    assert isinstance(envs.single_action_space, spaces.MultiBinary)
    shown = {key: torch.as_tensor(value) for key, value in as_numpy(arrays).items()}
    _, log_prob, _ = actor_critic.evaluate_actions(shown, action.float(), torch.as_tensor(envs.action_masks()))
    torch.testing.assert_close(log_prob, wanted, atol=1e-4, rtol=1e-4)

    keys = [key for key in arrays if key != "log_reference"]
    distribution = make_actor(policy, keys).get_dist(TensorDict({key: arrays[key] for key in keys}, batch_size=[6]))
    torch.testing.assert_close(distribution.log_prob(action), wanted, atol=1e-4, rtol=1e-4)
    assert distribution.sample().dtype == torch.bool
    assert not (distribution.sample() & ~arrays["action_mask"]).any()
    likely = (policy.log_odds(decode(arrays, V)) > 0) & arrays["action_mask"]
    assert torch.equal(distribution.deterministic_sample, likely)


def test_boards_to_learn_remasking_on_show_mistakes_and_what_was_masked_again() -> None:
    task = tasks.get("sudoku6")
    denoiser, states = load_denoiser("sudoku6-tiny", task), States(task)
    instances = task.heldout(40, "validation")
    player = load_policy("sudoku6-tiny-sets-rewards", task, denoiser)
    generator = torch.Generator().manual_seed(11)  # draws a low threshold
    states.collect_sets(Unmasking(task, denoiser, Rules("set+remask")), instances, generator, player)
    holes, filled = states.given == task.mask_id, states.tokens != task.mask_id
    wrong = (states.tokens != states.answers) & filled
    assert 0.05 < wrong.any(1).float().mean() < 0.95
    assert torch.equal(states.uncertain, wrong.any(1))
    assert states.remask_count.sum() > 10
    assert states.remask_count[~holes].sum() == 0


def test_an_intervention_masks_its_share_of_the_wrong_symbols_and_fills_nothing_beside(monkeypatch) -> None:
    answers = torch.zeros(300, 6, dtype=torch.long)
    tokens = torch.tensor([[0, 0, 1, 1, 1, 2]]).repeat(300, 1)  # two right, three wrong, one masked
    masked = tokens == 2
    seen = observation_of(tokens, masked, Denoised.of(torch.zeros(300, 6, 2)), ~masked, torch.zeros_like(tokens))
    rates = torch.tensor([0.0, 0.3, 1.0]).repeat_interleave(100).unsqueeze(1)
    monkeypatch.setattr(agents_states, "FALSE_REMASK_RATE", 0.0)
    action = torch.cat([masked, torch.zeros_like(masked)], 1)
    changed = agents_states._intervene(action, seen, answers, rates, torch.Generator().manual_seed(0))
    fill, again = changed.split(6, 1)
    assert not again[:, :2].any()
    none, some, every = again[:, 2:5].split(100)
    assert not none.any()
    assert every.all()
    assert 0.2 < some.float().mean() < 0.4
    assert torch.equal(fill[:, 5], ~again.any(1))


def test_an_intervention_keeps_what_the_player_masks_again(monkeypatch) -> None:
    tokens = torch.tensor([[0, 0, 0, 2]])
    seen = observation_of(tokens, tokens == 2, Denoised.of(torch.zeros(1, 4, 2)), tokens != 2, torch.zeros_like(tokens))
    monkeypatch.setattr(agents_states, "FALSE_REMASK_RATE", 0.0)
    action = torch.tensor([[0, 0, 0, 1, 0, 1, 0, 0]], dtype=torch.bool)
    changed = agents_states._intervene(
        action, seen, torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 1), torch.Generator().manual_seed(0)
    )
    assert changed.int().tolist() == [[0, 0, 0, 0, 0, 1, 0, 0]]


def test_remask_counts_follow_a_board_under_its_symmetries() -> None:
    task = tasks.get("sudoku6")
    instances = task.heldout(20, "validation")
    states = States(task)
    states.tokens, states.answers, states.given = instances.tokens, instances.answers, instances.tokens
    states.remask_count = instances.answers  # 0 to 5 times, by symbol: more than three are three
    states.uncertain = torch.ones(20, dtype=torch.bool)
    boards = states.sample(task, 64, 0.0, torch.Generator().manual_seed(0))
    remask_count = boards.remask_count
    assert torch.equal(boards.given, boards.tokens)
    assert not (remask_count == boards.answers.clamp(max=3)).all(), "symbols have other names now"
    for row in range(64):
        times = [remask_count[row][boards.answers[row] == symbol].unique().tolist() for symbol in range(6)]
        assert sorted(times) == [[0], [1], [2], [3], [3], [3]]


@pytest.mark.trains
@pytest.mark.filterwarnings("ignore:no board of 400")  # whatever is filled here may be right
def test_imitation_learns_what_is_right_and_what_is_wrong(tmp_path) -> None:
    task, denoiser = board()
    config = ImitationConfig(
        out=str(tmp_path),
        rules=REMASK,
        puzzles=400,
        steps=60,
        batch=64,
        policy=PolicyConfig(copy=False, dim=16, layers=1),
    )
    process = Unmasking(task, denoiser, REMASK)
    policy = imitation.train(config, process)
    states = States(task)
    instances = task.sample(400, torch.Generator().manual_seed(5))
    states.collect_sets(process, instances, torch.Generator().manual_seed(6))
    is_open = states.tokens == V
    again = ~is_open & (states.given == V)
    assert (states.given[~is_open & ~again] == states.tokens[~is_open & ~again]).all()
    seen = observation_of(states.tokens, is_open, denoiser(states.tokens), again, states.remask_count)
    with torch.no_grad():
        trained = set_imitation_loss(policy, seen, states.answers)
        untrained = set_imitation_loss(
            new_policy(config.policy, task, denoiser, 0, belief_weight=1.0, sets=True), seen, states.answers
        )
    assert float(trained) < 0.8 * float(untrained)
    with pytest.raises(UnmaskError, match="over sets the oracle is what can be imitated, not margin"):
        imitation.train(dataclasses.replace(config, reference="margin", out=str(tmp_path / "b")), process)


def test_what_does_not_go_with_sets(tmp_path) -> None:
    process = Unmasking(*board())
    single, sets = tmp_path / "single", tmp_path / "sets"
    save_model(OrderPolicy(V, [[0], [1], [2]], dim=8, layers=1, heads=2), single)
    save_model(policy_of("bernoulli"), sets)
    config = UPOConfig(out=str(tmp_path / "out"), rules=SET, iterations=1)
    plackett_luce = PolicyConfig(distribution="plackett_luce")
    for options, message in (
        ({"temperature": 0.8}, "policies over sets are sampled at temperature 1, not 0.8"),
        ({"regulariser": "terminal_kl"}, "terminal_kl enumerates single positions"),
        ({"regulariser": "step_kl", "policy": plackett_luce}, "has no closed form"),
        ({"reference": "margin"}, "margin is no reference for actions 'set'"),
        ({"reference": "threshold", "regulariser": "step_kl"}, "the KL to the deterministic reference threshold"),
        ({"init": str(single)}, "is for actions 'single', not 'set'"),
        ({"init": str(sets), "rules": Rules()}, "is for actions 'set', not 'single'"),
    ):
        with pytest.raises(UnmaskError, match=message):
            upo.train(dataclasses.replace(config, **options), process)
    from agents import sb3_ppo

    with pytest.raises(UnmaskError, match="know no Plackett-Luce sets"):
        sb3_ppo.train(SB3PPOConfig(out=str(tmp_path / "o"), rules=SET, policy=plackett_luce), process)


@pytest.mark.trains
def test_a_remask_policy_learns_to_fill_where_nothing_is_masked_again(tmp_path) -> None:
    process = Unmasking(*board())
    begun = RemaskPolicy.start(policy_of("bernoulli"))
    save_model(begun, tmp_path / "both")
    config = ImitationConfig(
        out=str(tmp_path / "run"), init=str(tmp_path / "both"), rules=SET, puzzles=50, steps=5, batch=8
    )
    trained = imitation.train(config, process)
    before, after = begun.state_dict(), trained.state_dict()
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"fill"}


@torch.no_grad()
def test_the_loss_of_imitation_over_sets_by_hand(monkeypatch) -> None:
    """Row 0 has no mistake, and one of two top symbols is right; row 1 has one, so filling it teaches nothing."""
    policy = policy_of("bernoulli")
    tokens = torch.tensor([[0, 3, 3], [1, 3, 2]])
    remaskable = torch.tensor([[True, False, False]] * 2)
    answers, best = torch.tensor([[0, 1, 2]] * 2), torch.tensor([[0, 1, 0], [0, 1, 0]])
    log_probs = torch.nn.functional.one_hot(best, V).float().log_softmax(-1)
    seen = observation_of(tokens, tokens == V, Denoised.of(log_probs), remaskable, torch.zeros(2, L).long())
    fill, remask = torch.tensor([[9.0, 0.5, -1.0], [9.0, 2.0, 9.0]]), torch.tensor([[-2.0, 9, 9], [0.3, 9, 9]])
    monkeypatch.setattr(policy, "read", lambda _: ([torch.full((2, L, V), 1 / V).log()] * 2, torch.zeros(2, L, 8)))
    monkeypatch.setattr(policy.head, "log_odds", lambda *_: torch.cat([fill, remask], 1))

    def surprise(log_odds: float) -> float:
        """-log of the probability with these log-odds."""
        return math.log1p(math.exp(-log_odds))

    filling = (surprise(0.5 + math.log(4)) + surprise(1.0 - math.log(4))) / 2
    remasking = (surprise(2.0) + surprise(0.3)) / 2
    loss = set_imitation_loss(policy, seen, answers, error_cost=4.0)
    assert float(loss) == pytest.approx(filling + remasking + math.log(V), rel=1e-5)
    loss = set_imitation_loss(policy, seen, answers, error_cost=4.0, fills=False)
    assert float(loss) == pytest.approx(remasking + math.log(V), rel=1e-5)


@torch.no_grad()
def test_a_symbol_that_the_belief_likes_is_masked_again_less_by_hand() -> None:
    policy, seen = policy_of("bernoulli"), observation(remask=True)
    policy.head.remask_belief_weight.zero_()
    before = policy.log_odds(seen)
    policy.head.remask_belief_weight.fill_(0.7)
    p = policy.read(seen)[0][-1].exp().gather(-1, seen.tokens.clamp(max=V - 1).unsqueeze(-1)).squeeze(-1)
    moved = policy.log_odds(seen) - before
    assert not moved[:, :L].any()
    expected = -0.7 * (p / (1 - p)).log()
    torch.testing.assert_close(moved[:, L:][seen.remaskable], expected[seen.remaskable], atol=1e-5, rtol=1e-4)


def test_when_a_policy_reads() -> None:
    """Unread boards fill what is certain; a board that is read fills that and its own set; passes are counted."""
    task = tasks.get("sudoku6")
    process = Unmasking(task, load_denoiser("sudoku6-tiny", task), Rules("set"))
    high = PolicyConfig(defer_above=0.9997)
    policy = new_policy(high, task, process.denoiser, 0, belief_weight=1.0, sets=True).eval()
    state = process.reset(task.heldout(40, "validation"))
    seen = process.observe(state)
    certain = (seen.confidence >= 0.9997) & seen.fillable
    some = certain.any(1)
    assert 0 < int(some.sum()) < 40
    always, first, unsure = (policy.at(0.7, read=read)(seen) for read in ("always", "first", "unsure"))
    assert torch.equal(unsure.mode()[some], certain[some])
    assert torch.equal(unsure.mode()[~some], always.mode()[~some])
    assert torch.equal(first.mode(), always.mode() | certain)
    assert always.passes.tolist() == first.passes.tolist() == [2] * 40
    assert unsure.passes.tolist() == (2 * ~some).tolist()
    state, _ = process.step(state, seen, first.mode())
    seen = process.observe(state)
    later = policy.at(0.7, read="first")(seen).passes
    assert torch.equal(later, policy.at(0.7, read="unsure")(seen).passes), "the first forward is over"
    played = process.rollout(policy.at(0.7, read="unsure"), task.heldout(40, "validation"), record=True)
    taken = sum(step.alive * 2 * policy.uncertain(step.observation) for step in played.steps)
    assert torch.equal(played.policy_passes, taken)
    assert torch.equal(played.denoiser_passes, played.nfe)
    remask = replace(process, rules=Rules("set+remask"))
    again = remask.observe(remask.reset(task.heldout(2, "validation")))
    with pytest.raises(UnmaskError, match="a policy that masks positions again reads always, not 'first'"):
        policy.at(0.7, read="first")(again)


def test_a_policy_reads_from_another_confidence_on() -> None:
    """At another ``defer_above`` it is the policy that was made with it."""
    task = tasks.get("sudoku6")
    process = Unmasking(task, load_denoiser("sudoku6-tiny", task), Rules("set"))
    seen = process.observe(process.reset(task.heldout(40, "validation")))
    low, high = (
        new_policy(PolicyConfig(defer_above=above), task, process.denoiser, 0, belief_weight=1.0, sets=True).eval()
        for above in (0.9, 0.9997)
    )
    for read in ("first", "unsure"):
        expected, found = high.at(0.7, read=read)(seen), low.at(0.7, read=read, defer_above=0.9997)(seen)
        assert torch.equal(found.mode(), expected.mode())
        assert torch.equal(found.passes, expected.passes)
        assert not torch.equal(found.mode(), low.at(0.7, read=read)(seen).mode())
    with pytest.raises(UnmaskError, match="defer_above is of boards that are not read"):
        low.at(0.7, defer_above=0.99)
    with pytest.raises(UnmaskError, match="defer_above"):
        low.at(0.7, read="unsure", defer_above=1.5)
