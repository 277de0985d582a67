"""Caches of keys and values, held against forwards written out by hand, and against no cache where they are exact."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tasks import Instances, Task, UnmaskError
from tests.toys import random_order, sweep
from tests.unmask_env.test_language_models import LINES, build, save_published, tokenizer
from unmask_env.denoiser import load_denoiser
from unmask_env.language_models import HFDenoiser
from unmask_env.process import Unmasking
from unmask_env.reference import reference
from unmask_env.state import Rules, State
from unmask_env.vector_env import UnmaskVectorEnv

transformers = pytest.importorskip("transformers")
from agents.belief import BeliefDenoiser  # noqa: E402
from tasks import Lines  # noqa: E402

LAYOUTS, MODES = ("llada", "dream", "sdar"), ("prefix", "dual")
PAD, MASK = 0, 3


class Prompts(Task):
    """Answers behind prompts of unlike lengths, padded on their left; the reward is a constant."""

    name = "prompts"

    def __init__(self, prompt=9, answer=10, vocab_size=10, pad_side="left"):
        self.symbols, self.shape = tuple(map(str, range(vocab_size))), (1, prompt + answer)
        self.prompt_length, self.pad_id, self.pad_side = prompt, PAD, pad_side

    def sample(self, n, generator):
        tokens = torch.randint(4, self.vocab_size, (n, self.length), generator=generator)
        missing = torch.randint(self.prompt_length - 1, (n, 1), generator=generator)
        tokens[torch.arange(self.length) < missing] = PAD
        return self.behind_prompt(tokens)

    def reward(self, tokens, instances):
        return torch.ones(len(tokens))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    made = {}
    for name in LAYOUTS:
        torch.manual_seed(1)
        folder = tmp_path_factory.mktemp(name)
        made[name] = save_published(name, folder, 10, n_layers=2, num_hidden_layers=2)
    return made


def rules(**more):
    return Rules(**{"block_length": 4, "actions": "set", **more})


def played(process, instances, policy="soft_threshold:theta=0.5", seed=0):
    """Of a rollout every state, with what was observed of it."""
    state, g, generator = process.reset(instances), reference(policy), torch.Generator().manual_seed(seed)
    while not bool(state.done.all()):
        seen = process.observe(state)
        yield state, seen
        state, _ = process.step(state, seen, g(seen).sample(generator))
    yield state, process.observe(state)


def by_hand(model, ids, window=None, frozen=None):
    """Last hidden states (n, D) of the tokens (n,) of one row with bidirectional attention, and each layer's keys and
    values (H, n, D'); outside the ``window`` (n,) bool they are the ``frozen`` ones."""
    base = model.base_model
    x = base.embed_tokens(ids)
    cos, sin = (part[0] for part in base.rotary_emb(x[None], torch.arange(len(ids))[None]))
    kept = []

    def turned(y):  # (H, n, D')
        a, b = y.chunk(2, -1)
        return y * cos + torch.cat([-b, a], -1) * sin

    for i, layer in enumerate(base.layers):
        attention, h = layer.self_attn, layer.input_layernorm(x)
        parts = (projection(h) for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k, v = (part.view(len(ids), -1, attention.head_dim).transpose(0, 1) for part in parts)
        q, k = turned(q), turned(k)
        if frozen is not None:
            k, v = (torch.where(window[:, None], new, old) for new, old in zip((k, v), frozen[i], strict=True))
        kept.append((k, v))
        k, v = (part.repeat_interleave(len(q) // len(part), 0) for part in (k, v))
        weights = (q @ k.transpose(1, 2) / math.sqrt(attention.head_dim)).softmax(-1)
        x = x + attention.o_proj((weights @ v).transpose(0, 1).reshape(len(ids), -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return base.norm(x), kept


class Straight:
    """Fast-dLLM of one row, alone and without padding: it remembers what its block began with."""

    def __init__(self, denoiser, task, mode, block_length):
        self.denoiser, self.task, self.mode, self.size, self.began = denoiser, task, mode, block_length, None

    def __call__(self, tokens):
        """Log-probabilities (L, V)."""
        masked = tokens == self.task.mask_id
        answer = torch.arange(self.task.length) - self.task.prompt_length
        block = int(answer[masked].min()) // self.size
        begins = self.task.prompt_length + block * self.size
        padding = int((tokens == PAD).long().cumprod(0).sum())
        ids, start = tokens.masked_fill(masked, MASK)[padding:], begins - padding
        position = torch.arange(len(ids))
        if self.began is None or self.began[0] != block:
            states, kept = by_hand(self.denoiser.model, ids)
            self.began = (block, kept, states)
        else:
            stop = len(ids) if self.mode == "prefix" else start + self.size
            window = (position >= start - int(self.denoiser.shifted)) & (position < stop)
            states = by_hand(self.denoiser.model, ids, window, self.began[1])[0]
            states = torch.where(window[:, None], states, self.began[2])
        if self.denoiser.shifted:
            states = torch.cat([states[:1], states[:-1]])
        logits = self.denoiser.model.lm_head(states)
        logits[:, MASK] = -torch.inf
        return torch.cat([torch.zeros(padding, logits.shape[1]), logits.log_softmax(-1)])


def far(a, b):
    """The largest difference of log-probabilities; those of the mask are -infinity."""
    return float((a - b).nan_to_num(0.0).abs().max())


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sweep(["llada", "dream"], "llada".__eq__))
def test_the_approximation_is_that_of_fast_dllm_written_out(paths, name, mode):
    """Whatever blocks the rows are in, each is what it is alone; and it is an approximation."""
    task = Prompts()
    plain, cached = HFDenoiser(paths[name], task), HFDenoiser(paths[name], task, cache=mode)
    instances = task.sample(5, torch.Generator().manual_seed(3))
    by_row = [Straight(plain, task, mode, 4) for _ in range(5)]
    blocks, error, approximation = set(), 0.0, 0.0
    for state, seen in played(Unmasking(task, cached, rules()), instances):
        whole = plain(state.tokens).log_probs
        for row in (~state.done).nonzero().flatten().tolist():
            real = state.tokens[row] != PAD
            found = seen.denoised.log_probs[row][real]
            error = max(error, far(found, by_row[row](state.tokens[row])[real]))
            approximation = max(approximation, far(found, whole[row][real]))
        blocks.add(tuple(seen.history.block[~state.done].unique().tolist()))
    assert error < 1e-4
    assert approximation > 0.05
    assert any(len(together) > 1 for together in blocks), "rows in different blocks"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_first_forward_of_a_block_is_the_one_without_a_cache(paths, name, mode):
    task = Prompts()
    plain, cached = (HFDenoiser(paths[name], task, hidden=True, cache=cache) for cache in ("none", mode))
    process = Unmasking(task, cached, rules(actions="single"))
    instances, begun = task.sample(4, torch.Generator().manual_seed(3)), 0
    for state, seen in played(process, instances, "softmax_confidence"):
        if int(state.steps[0]) in (0, 4, 8):
            begun += 1
            whole = plain(state.tokens)
            where = seen.fillable if name == "sdar" else torch.ones_like(seen.fillable)
            if name == "sdar" and begun > 1:  # exact, of fewer positions: to rounding
                assert far(whole.log_probs[where], seen.denoised.log_probs[where]) < 1e-5
            else:
                assert torch.equal(whole.log_probs[where], seen.denoised.log_probs[where])
                assert torch.equal(whole.hidden[where], seen.denoised.hidden[where])
    assert begun == 3


@pytest.mark.parametrize("remask", [False, True])
@pytest.mark.parametrize("pad_side", ["left", None])  # None: a symbol of padding that is filled in moves the row
@pytest.mark.parametrize("mode", MODES)
def test_attention_in_blocks_is_exact(paths, mode, pad_side, remask):
    task = Prompts(pad_side=pad_side)
    plain, cached = (
        HFDenoiser(paths["sdar"], task, hidden=True),
        HFDenoiser(paths["sdar"], task, cache=mode, hidden=True),
    )
    computed = {denoiser: count_positions(denoiser) for denoiser in (plain, cached)}
    how = rules(actions="set+remask", nfe_budget=14) if remask else rules()
    policy = "remdm" if remask else "soft_threshold:theta=0.5"
    instances = task.sample(6, torch.Generator().manual_seed(4))
    ends, lengths = [], set()
    runs = [played(Unmasking(task, denoiser, how), instances, policy) for denoiser in (plain, cached)]
    for (state, seen), (other, found) in zip(*runs, strict=True):
        assert torch.equal(state.tokens, other.tokens)
        position, start = torch.arange(task.length), task.prompt_length + 4 * seen.history.block.unsqueeze(1)
        real = state.tokens != PAD
        upto = real if mode == "prefix" else real & (position < start + 4)
        assert far(seen.denoised.log_probs[upto], found.denoised.log_probs[upto]) < 1e-5
        assert float((seen.denoised.hidden[upto] - found.denoised.hidden[upto]).abs().max()) < 1e-5
        lengths |= set(real[:, : task.prompt_length].sum(1).tolist())
        ends.append(other.done)
    assert bool(ends[-1].all())
    assert len(lengths) > 2
    assert sum(computed[cached]) < 0.8 * sum(computed[plain])


def count_positions(denoiser):
    """A list to which every forward of the model adds how many positions it computes."""
    counts = []
    denoiser.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return counts


@pytest.mark.parametrize("pad_side", sweep(["left", None], bool))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sweep(LAYOUTS, "llada".__eq__))
def test_no_cache_of_another_board_is_ever_used(paths, name, mode, pad_side):
    """An answer is a function of the state alone: without what is carried it is the same, or with that of others, after
    rows began anew, and in turns with another rollout."""
    task = Prompts(pad_side=pad_side)
    denoiser = HFDenoiser(paths[name], task, cache=mode)
    process, draws = Unmasking(task, denoiser, rules()), torch.Generator().manual_seed(5)
    first, second = (played(process, task.sample(4, draws), seed=seed) for seed in (1, 2))
    other = None
    for (state, seen), (state_2, seen_2) in zip(first, second, strict=False):  # in turns
        strangers = [None, state_2.carried, seen_2.denoised.carried, other]
        if state.carried is not None:
            strangers.append(replace(state[torch.tensor([3, 0, 2, 2])]).carried)
        for carried in strangers:
            found = process.observe(replace(state, carried=carried)).denoised.log_probs
            assert far(found, seen.denoised.log_probs) < 1e-5
        other = seen.denoised.carried
        if state.carried is not None:  # rows begin anew beside others in mid-play
            rows, new = torch.tensor([1, 3]), process.reset(task.sample(2, draws))
            mixed = state.put(rows, new)
            assert mixed.carried is not None
            found = process.observe(mixed).denoised.log_probs
            assert far(found[rows], process.observe(new).denoised.log_probs) < 1e-5
            assert far(found[[0, 2]], seen.denoised.log_probs[[0, 2]]) < 1e-5
            joined = State.join([state[:2], state_2[2:]], torch.cat)
            found = process.observe(joined).denoised.log_probs
            assert far(found[:2], seen.denoised.log_probs[:2]) < 1e-5
            assert far(found[2:], seen_2.denoised.log_probs[2:]) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_vector_environments_play_as_without_a_cache_where_it_is_exact(paths, mode):
    """Rows end at different times and begin anew, in the same step."""
    task = Prompts()
    names = [f"hf:{paths['sdar']},cache={cache}" for cache in ("none", mode)]
    envs = [UnmaskVectorEnv(num_envs=3, task=task, denoiser=name, block_length=4, actions="set") for name in names]
    states = [env.reset(seed=0)[0] for env in envs]
    draws = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert (states[0]["tokens"] == states[1]["tokens"]).all()
        coins = torch.rand(3, task.length, generator=draws) < 0.4
        action = (coins.numpy() & (states[0]["action_mask"] > 0)).astype("int8")
        states = [env.step(action)[0] for env in envs]


def test_what_is_kept_of_a_rollout_carries_nothing(paths):
    task = Prompts()
    denoiser = HFDenoiser(paths["llada"], task, cache="dual", hidden=True)
    process, instances = Unmasking(task, denoiser, rules()), task.sample(3, torch.Generator().manual_seed(0))
    rollout = process.rollout(reference("soft_threshold"), instances, torch.Generator().manual_seed(0), record=True)
    assert rollout.state.carried is None
    for step in rollout.steps:
        assert step.observation.denoised.carried is None
        assert step.observation.history.previous is None or step.observation.history.previous.carried is None


def test_a_belief_fills_with_the_same_cache(paths):
    """Where no policy steps in (nothing is uncertain to it) it is the denoiser with its cache."""
    task = Prompts()
    denoiser = HFDenoiser(paths["llada"], task, cache="dual")
    computed = count_positions(denoiser)
    spent = []
    for made in (denoiser, BeliefDenoiser(denoiser, random_order(task, defer_above=0.0))):
        before = sum(computed)
        process, instances = Unmasking(task, made, rules()), task.sample(3, torch.Generator().manual_seed(0))
        tokens = process.rollout(reference("max_confidence"), instances).tokens
        spent.append((tokens.tolist(), sum(computed) - before))
    assert spent[0] == spent[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_cache_saves_at_least_half_of_the_flops(name, tmp_path):
    """Counted: 256 tokens of an answer in blocks of 32, two positions per forward, behind a prompt of 96."""
    vocab_size = 130  # more than are shown whole
    sizes = {"d_model": 32, "hidden_size": 32, "mlp_hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    longest = {"max_sequence_length": 352, "max_position_embeddings": 352}
    torch.manual_seed(0)
    path = save_published(name, tmp_path, vocab_size, n_layers=1, num_hidden_layers=1, **sizes, **longest)
    task = Prompts(96, 256, vocab_size)
    answers = torch.randint(4, vocab_size, (1, task.length), generator=torch.Generator().manual_seed(0))
    instances, flops = task.behind_prompt(answers), {}
    for mode in ("none", *MODES):
        # Of written-out attention every product is counted.
        denoiser = HFDenoiser(path, task, cache=mode, load={"attn_implementation": "eager"})
        process = Unmasking(task, denoiser, Rules(actions="set", block_length=32))
        with FlopCounterMode(display=False) as counter:
            process.rollout(reference("fixed_k:k=2"), instances)
        assert denoiser.calls == 128
        flops[mode] = counter.get_total_flops()
    assert flops["none"] > 2 * flops["prefix"]
    assert flops["none"] > 6 * flops["dual"]


def test_a_cache_is_an_option_by_name(paths, tmp_path):
    task = Prompts()
    assert load_denoiser(f"hf:{paths['llada']},cache=dual", task).carries
    assert not load_denoiser(f"hf:{paths['llada']}", task).carries
    with pytest.raises(UnmaskError, match="none or prefix or dual"):
        load_denoiser(f"hf:{paths['llada']},cache=all", task)
    with pytest.raises(UnmaskError, match="cache must be none or prefix or dual"):
        HFDenoiser(paths["llada"], task, cache=True)
    with pytest.raises(UnmaskError, match=r"cache=prefix takes a model of the families llada, dream, sdar"):
        HFDenoiser(build("bert", tmp_path), Lines(LINES, tokenizer()), cache="prefix")


def test_without_blocks_the_answer_is_one(paths):
    """The prompt's keys and values are those of the beginning."""
    task = Prompts()
    denoiser = HFDenoiser(paths["llada"], task, cache="prefix")
    instances = task.sample(3, torch.Generator().manual_seed(0))
    one, none = (Unmasking(task, denoiser, rules(block_length=size)) for size in (10, None))
    tokens = [process.rollout(reference("max_confidence"), instances).tokens for process in (one, none)]
    assert torch.equal(*tokens)
    assert isinstance(instances, Instances)
