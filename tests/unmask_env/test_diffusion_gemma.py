"""DiffusionGemma's canvases: tokens and forwards of the ``generate`` of transformers, on small random models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import imitation, upo
from agents.imitation import ImitationConfig
from tasks import Instances, Task, UnmaskError
from tests.oracles.enumeration import random_joint
from tests.toys import RewardTask, generator, sweep
from tests.toys import generator as seeded
from unmask_env.denoiser import TableDenoiser, load_denoiser
from unmask_env.diffusion_gemma import DiffusionGemma
from unmask_env.process import Unmasking
from unmask_env.reference import EntropyBounded, SoftThreshold
from unmask_env.state import Denoised, Rollout, Rules, State
from unmask_env.streams import Streams

transformers = pytest.importorskip("transformers")

# What generate imports of torch on its first call.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

CANVAS, PAD = 4, 0


class Continue(Task):
    """A prompt of random symbols, and canvases; the reward is the share of symbol 1."""

    name, one_answer = "continue", False

    def __init__(self, vocab_size: int, prompt: int, canvases: int) -> None:
        self.symbols, self.prompt_length = tuple(f"w{i}" for i in range(vocab_size)), prompt
        self.shape = (1, prompt + canvases * CANVAS)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        return self.behind_prompt(torch.randint(1, self.vocab_size, (n, self.length), generator=generator))

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return (tokens == 1).float().mean(1)


class PaddedLeft(Continue):
    """Row i has i positions of padding left of its prompt."""

    pad_id, pad_side = PAD, "left"

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        drawn = super().sample(n, generator)
        padding = torch.arange(self.length) < torch.arange(n).unsqueeze(1)
        return Instances(drawn.tokens.masked_fill(padding, PAD), drawn.answers)


def model(vocab_size: int = 24, seed: int = 0, spread: float = 0.3, **generation: Any) -> Any:
    """Two layers, one that attends to a window and one to all; ``spread`` of the weights makes its answers certain."""
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": 8,
        "num_global_key_value_heads": 1,
        "num_experts": 2,
        "top_k_experts": 1,
        "moe_intermediate_size": 16,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 64,
    }
    vision = {"model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 4}
    ids = dict.fromkeys(("boi_token_id", "eoi_token_id", "image_token_id"), vocab_size)
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=CANVAS, initializer_range=spread, **ids
    )
    torch.manual_seed(seed)
    made = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    for name, value in generation.items():
        setattr(made.generation_config, name, value)
    return made


def generated(made: Any, prompts: Tensor, new: int, seed: int) -> tuple[Tensor, Tensor]:
    """(N, L) tokens and (N,) tokens per forward, of transformers itself."""
    torch.manual_seed(seed)
    out = made.generate(prompts, max_new_tokens=new)
    return out.sequences, torch.as_tensor(out.tokens_per_forward)


def played(made: Any, task: Task, instances: Instances, seed: int, record: bool = False) -> Rollout:
    """By its own sampler in this package."""
    denoiser = DiffusionGemma(made, task)
    rules, bound = denoiser.sampler()
    process = Unmasking(task, denoiser, rules, temperature=1.0)
    return process.rollout(bound, instances, fill_generator=generator(seed), record=record)


def per_forward(task: Task, rollout: Rollout) -> Tensor:
    return (rollout.tokens[:, task.prompt_length :] != PAD).sum(1) / rollout.nfe


def sampler_config(bound: float) -> Any:
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

    return EntropyBoundSamplerConfig(entropy_bound=bound)


# Many canvases end by themselves.
ADAPTIVE = {
    "max_denoising_steps": 10,
    "confidence_threshold": 1.0,
    "stability_threshold": 1,
    "pad_token_id": PAD,
    "t_min": 0.1,
    "t_max": 0.3,
    "sampler_config": sampler_config(1.0),
}
# Such a model makes chaos of rounding; this one does not, for comparisons in which the shapes of tensors differ.
CALM = ADAPTIVE | {"spread": 0.15, "t_min": 0.4, "t_max": 0.8, "confidence_threshold": 5.0}
CALM["sampler_config"] = sampler_config(8.0)


# ---------------------------------------------------------------------- against generate
SETTINGS = {
    "one": {},
    "two": {"stability_threshold": 2, "confidence_threshold": 0.8},
    "warm": {"stability_threshold": 0, "t_min": 0.2, "t_max": 0.9, "sampler_config": sampler_config(0.1)},
    "ends": {"eos_token_id": [3, 5, 7]},
    "large": {"vocab_size": 300, "t_min": 0.05, "t_max": 0.1, "sampler_config": sampler_config(3.0)},
}


@pytest.mark.parametrize("settings", sweep(SETTINGS, {"ends", "large"}.__contains__))
def test_one_prompt_as_generate(settings: str) -> None:
    """Prompts of several lengths, seeds, three canvases; the large vocabulary is seen where a canvas is, in chunks."""
    made, forwards = model(**ADAPTIVE | SETTINGS[settings]), set()
    vocab_size = SETTINGS[settings].get("vocab_size", 24)
    for seed, length in enumerate((1, 3, 5, 9, 5, 5)):
        task = Continue(vocab_size, length, canvases=3)
        instances = task.sample(1, generator(100 + seed))
        tokens, tokens_per_forward = generated(made, instances.tokens[:, :length], 3 * CANVAS, seed)
        ours = played(made, task, instances, seed)
        assert torch.equal(ours.tokens[:, : tokens.shape[1]], tokens)
        assert bool((ours.tokens[:, tokens.shape[1] :] == PAD).all())  # generate stops; a sequence has its length
        assert torch.equal(per_forward(task, ours), tokens_per_forward)
        assert bool(ours.state.terminated.all())
        forwards.add(int(ours.nfe))
    assert len(forwards) > 2  # they ended by themselves


def test_every_canvas_and_draft_as_generate() -> None:
    """Each forward's canvas before it, and its most likely symbols, which generate hands to its streamer."""
    made, task = model(**ADAPTIVE), Continue(24, prompt=5, canvases=3)
    instances, canvases, drafts = task.sample(1, generator(1)), [], []
    hook = made.model.decoder.register_forward_pre_hook(
        lambda _, args, given: canvases.append(given["decoder_input_ids"].clone()), with_kwargs=True
    )

    class Drafts:
        def put(self, value: Tensor) -> None: ...

        def end(self) -> None: ...

        def put_draft(self, value: Tensor) -> None:
            drafts.append(value)

    torch.manual_seed(3)
    made.generate(instances.tokens[:, :5], max_new_tokens=3 * CANVAS, streamer=Drafts())
    hook.remove()
    ours = played(made, task, instances, seed=3, record=True).steps
    assert len(ours) == len(drafts) == len(canvases) > 6
    for step, canvas, draft in zip(ours, canvases, drafts, strict=True):
        seen = step.observation
        assert torch.equal(seen.tokens[seen.fillable], canvas[0])
        assert torch.equal(seen.denoised.best[seen.fillable], draft[0])


def test_a_batch_as_generate() -> None:
    """Canvases that all take their forwards; and one canvas, where rows that ended earlier wait for the others."""
    for canvases, settings in ((3, {"confidence_threshold": 1e-9}), (1, {})):
        made, task = model(**ADAPTIVE | settings), Continue(24, prompt=5, canvases=canvases)
        for seed in range(3):
            instances = task.sample(6, generator(seed))
            tokens, tokens_per_forward = generated(made, instances.tokens[:, :5], canvases * CANVAS, seed)
            ours = played(made, task, instances, seed)
            assert torch.equal(ours.tokens, tokens)
            assert torch.equal(per_forward(task, ours), tokens_per_forward)
            assert (len(set(ours.nfe.tolist())) > 1) == (canvases == 1)


def test_padding_left_of_a_prompt_as_generate() -> None:
    made, task = model(**CALM), PaddedLeft(24, prompt=5, canvases=2)
    instances = task.sample(4, generator())
    for row in range(4):
        prompt = instances.tokens[row : row + 1, :5]
        torch.manual_seed(row)
        out = made.generate(prompt, attention_mask=prompt != PAD, max_new_tokens=2 * CANVAS)
        ours = played(made, task, instances[slice(row, row + 1)], row)
        assert torch.equal(ours.tokens, out.sequences)
        assert torch.equal(per_forward(task, ours), out.tokens_per_forward)


def test_a_saved_model_is_read_by_its_name(tmp_path: Path) -> None:
    made, task = model(**ADAPTIVE), Continue(24, prompt=3, canvases=2)
    made.save_pretrained(tmp_path)
    denoiser = load_denoiser(f"hf:{tmp_path},t_max=0.5", task)
    rules, bound = denoiser.sampler()
    assert (denoiser.t_min, denoiser.t_max, denoiser.pad_id) == (0.1, 0.5, PAD)
    assert (rules.canvas_steps, rules.stop_entropy, rules.stop_stable, bound.gamma) == (10, 1.0, 1, 1.0)
    bare = DiffusionGemma(model(), task)
    assert bare.sampler() == (Rules("accept"), EntropyBounded(0.1))
    assert (bare.t_min, bare.t_max) == (0.4, 0.8)
    defaults = made.generation_config._get_default_generation_params()  # those of transformers
    assert (Rules().canvas_steps, Rules().stop_entropy) == (
        defaults["max_denoising_steps"],
        defaults["confidence_threshold"],
    )
    process = Unmasking(task, denoiser, rules, 1.0)
    assert bool(process.rollout(bound, task.sample(2, generator()), fill_generator=generator()).state.done.all())


# ---------------------------------------------------------------------- what is carried is in the state
class OwnNoise(Unmasking):
    """Noise that depends on a row's prompt and forwards alone."""

    def uniform(self, state: State, generator: torch.Generator | None) -> Tensor:
        seeds = state.instances.answers.sum(1) * 1000 + state.steps
        return torch.stack([torch.randint(24, (self.task.length,), generator=seeded(int(seed))) for seed in seeds])


def test_rows_go_on_alone_from_their_state() -> None:
    """Rows that stand at different canvases, with prompts of different lengths, are cut apart on the way and joined
    again; another denoiser, which has encoded nothing, goes on with them."""
    made, task = model(**CALM), PaddedLeft(24, prompt=5, canvases=3)
    rules, bound = DiffusionGemma(made, task).sampler()
    process, instances = OwnNoise(task, DiffusionGemma(made, task), rules), task.sample(5, generator(2))
    whole = process.rollout(bound, instances, fill_generator=generator())
    assert len(set(whole.nfe.tolist())) > 2
    state = process.reset(instances)
    for _ in range(9):
        seen = process.observe(state, generator())
        state, _ = process.step(state, seen, bound(seen).mode(), process.uniform(state, generator()))
    again = replace(process, denoiser=DiffusionGemma(made, task))
    alone = [
        again.rollout(bound, instances[row : row + 1], fill_generator=generator(), start=state[row : row + 1])
        for row in range(5)
    ]
    assert torch.equal(torch.cat([one.tokens for one in alone]), whole.tokens)
    assert torch.equal(torch.cat([one.nfe for one in alone]), whole.nfe)
    mixed = State.join([state[3:], state[:3]], torch.cat)
    joined = again.rollout(bound, mixed.instances, fill_generator=generator(), start=mixed)
    assert torch.equal(joined.tokens, whole.tokens[[3, 4, 0, 1, 2]])
    begun = state.put(torch.tensor([1]), process.reset(instances[1:2]))
    assert torch.equal(again.rollout(bound, instances, fill_generator=generator(), start=begun).tokens, whole.tokens)


def test_a_prefix_is_encoded_once() -> None:
    made, task = model(**ADAPTIVE), Continue(24, prompt=5, canvases=3)
    encoded = []
    made.model.encoder.register_forward_pre_hook(
        lambda _, args, given: encoded.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    instances = task.sample(4, generator())
    rollout = played(made, task, instances, 0)
    assert encoded[0] == (4, 5)
    assert {length for _, length in encoded[1:]} == {CANVAS}
    assert sum(count for count, _ in encoded) == 4 * 3  # a prompt and two canvases of each row
    assert int(rollout.nfe.sum()) > 4 * 3


def test_nothing_of_the_vocabulary_is_kept() -> None:
    made, task = model(vocab_size=300, **ADAPTIVE), Continue(300, prompt=5, canvases=2)
    process = Unmasking(task, DiffusionGemma(made, task), Rules("accept"), 1.0)
    state = process.reset(task.sample(3, generator()))
    seen = process.observe(state, generator())
    state, _ = process.step(state, seen, seen.fillable, process.uniform(state, generator()))
    assert state.canvas.carried.shape == (3, CANVAS, 16)
    assert state.previous.carried is state.previous.drawn is None
    recorded = process.rollout(EntropyBounded(), task.sample(3, generator()), fill_generator=generator(), record=True)
    assert all(step.observation.denoised.carried is None for step in recorded.steps)


@pytest.mark.trains
def test_upo_trains_which_symbols_are_accepted(tmp_path: Path) -> None:
    made, task = model(**CALM), Continue(24, prompt=3, canvases=1)
    rules = Rules("accept", canvas_steps=4)
    process = Unmasking(task, DiffusionGemma(made, task), rules)
    config = upo.UPOConfig(
        out=str(tmp_path), rules=rules, fill_temperature=1.0, puzzles=4, group=4, iterations=2, validation_puzzles=8
    )
    policy = upo.train(config, process)
    played = replace(process, temperature=1.0).rollout(policy, task.heldout(4), fill_generator=generator())
    assert policy.actions == "set"
    assert bool(played.state.terminated.all())


# ---------------------------------------------------------------------- the rules, by hand
class Counting:
    """Proposes symbol 10 f at its f-th forward, drawn as 10 f + 1, and is as certain as ``entropies`` says."""

    device, hidden_dim, calls, canvas_length, ends, pad_id = torch.device("cpu"), None, 0, 2, (30,), 0

    def __init__(self, best: list[int] | None = None, certain: float = 0.5) -> None:
        self.said, self.certain, self.left = best or [10 * f for f in range(1, 100)], certain, []

    def begin(self, n: int) -> Tensor:
        return torch.zeros(n, 1)

    def __call__(
        self, tokens: Tensor, where: Tensor, left: Tensor, carried: Tensor, generator: torch.Generator | None = None
    ) -> Denoised:
        self.left.append(left.tolist())
        p = torch.full((*tokens.shape, 99), (1 - self.certain) / 98)
        p[..., self.said[self.calls]] = self.certain
        self.calls += 1
        drawn = None if generator is None else torch.full_like(tokens, self.said[self.calls - 1] + 1)
        return replace(Denoised.of(p.log()), drawn=drawn, carried=carried + 1)


def stepped(process: Unmasking, state: State, accepted: list[int], noise: int) -> State:
    seen = process.observe(state, generator())
    action = torch.zeros_like(seen.fillable)
    action[0, accepted] = True
    return process.step(state, seen, action, torch.full_like(state.tokens, noise))[0]


def hand(denoiser: Counting, canvases: int = 2, given: int | None = None, **rules: Any) -> tuple[Unmasking, State]:
    """A process of one row, prompt [5], and its first state."""
    task = Continue(99, prompt=1, canvases=0)
    task.shape = (1, 1 + 2 * canvases)
    tokens = torch.tensor([[5] + [task.mask_id] * (2 * canvases)])
    if given is not None:
        tokens[0, given] = 77
    process = Unmasking(task, denoiser, Rules("accept", **rules), temperature=1.0)
    return process, process.reset(Instances(tokens, torch.ones_like(tokens)))


def test_what_is_not_accepted_is_noise_again_and_the_end_is_the_most_likely() -> None:
    process, state = hand(denoiser := Counting(), canvas_steps=3)
    assert process.horizon == 6
    state = stepped(process, state, [1, 2], noise=90)
    assert state.tokens.tolist() == [[5, 11, 11, 99, 99]]
    state = stepped(process, state, [2], noise=91)  # position 1 was accepted before
    assert state.tokens.tolist() == [[5, 91, 21, 99, 99]]
    assert state.masked.tolist() == [[False, True, True, True, True]]
    assert state.canvas.carried.tolist() == [[2.0]]
    denoiser.said[2] = 40
    state = stepped(process, state, [], noise=92)
    assert state.tokens.tolist() == [[5, 40, 40, 99, 99]]
    assert state.masked.tolist() == [[False, False, False, True, True]]
    assert (state.canvas.steps.tolist(), state.canvas.carried.tolist()) == ([0], [[0.0]])
    seen = process.observe(state, generator())
    assert seen.fillable.tolist() == [[False, False, False, True, True]]
    assert bool((seen.tokens[0, 3:] < 99).all())  # noise, where the state is blank
    torch.testing.assert_close(denoiser.left, [[1.0], [2 / 3], [1 / 3], [1.0]])


def test_a_canvas_ends_where_it_is_stable_and_confident() -> None:
    """The mean entropy of 0.99 and 98 others is 0.102 nats."""
    said = [1, 2, 2, 2, 2, 7, 7]
    for stable, forwards in ((0, 1), (1, 3), (2, 4)):
        process, state = hand(Counting(said, 0.99), canvases=1, stop_entropy=0.11, stop_stable=stable)
        rollout = process.rollout(SoftThreshold(), state.instances, generator(), generator())
        assert rollout.nfe.tolist() == [forwards]
    for options in ({"stop_entropy": 0.1}, {"stop_entropy": None}):
        process, state = hand(Counting([3] * 9, 0.99), canvases=1, canvas_steps=8, **options)
        assert process.rollout(SoftThreshold(), state.instances, generator(), generator()).nfe.tolist() == [8]


def test_an_end_token_ends_the_sequence_and_what_is_given_stays() -> None:
    process, state = hand(Counting([30]), canvas_steps=1, given=4)
    state = stepped(process, state, [1], noise=3)
    assert state.tokens.tolist() == [[5, 30, 0, 0, 77]]
    assert state.done.tolist() == [True]
    process, state = hand(Counting(), canvas_steps=2, given=2)
    state = stepped(process, state, [], noise=3)
    assert state.tokens.tolist() == [[5, 3, 77, 99, 99]]


def test_an_illegal_action_changes_nothing_and_costs_its_forward() -> None:
    process, state = hand(Counting())
    state = stepped(process, state, [1], noise=4)
    after = stepped(process, state, [1, 3], noise=6)
    assert torch.equal(after.tokens, state.tokens)
    assert (after.illegal.tolist(), after.steps.tolist()) == ([True], [2])


def process_of_masks() -> Unmasking:
    return Unmasking(RewardTask(3, 3), TableDenoiser(random_joint(3, 3, seed=0)), Rules("accept"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hand(Counting(), block_length=3), "block_length is that of the denoiser's canvas, 2, not 3"),
        (lambda: Unmasking(Continue(99, 1, 1), Counting()), "Counting fills canvases; play it with actions 'accept'"),
        (
            lambda: Unmasking(Continue(9, 4, 1), Counting(), Rules("accept"), 0.5),
            "temperature must be 0 or 1, not 0.5",
        ),
        (
            process_of_masks,
            "denoisers of canvases, such as DiffusionGemma; TableDenoiser fills masks",
        ),
        (lambda: Streams(1, task=Continue(9, 2, 1), denoiser=Counting(), actions="accept"), "Unmasking.rollout"),
        (lambda: DiffusionGemma(model(), Continue(24, 0, 1)), "continues a prompt, and task continue has none"),
        (lambda: DiffusionGemma(model(), Continue(25, 1, 1)), "25 symbols, the model only 24 tokens"),
        (lambda: DiffusionGemma(model(), Continue(24, 1, 1), t_min=0.9), "t_min must be above 0 and at most t_max"),
        (lambda: hand(Counting())[0].observe(hand(Counting())[1]), "a canvas holds noise"),
        (lambda: hand(Counting())[0].rollout(EntropyBounded(), hand(Counting())[1].instances), "give a fill_generator"),
        (
            lambda: imitation.check(ImitationConfig(rules=Rules("accept"), out="")),
            "are trained with upo",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnmaskError, match=re.escape(message)):
        make()


def test_canvases_fill_what_is_behind_the_prompt() -> None:
    task = Continue(99, prompt=1, canvases=1)
    task.shape = (1, 4)
    with pytest.raises(UnmaskError, match="3 positions behind its prompt, which are no whole number of canvases of 2"):
        Unmasking(task, Counting(), Rules("accept"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**6}, "has num_hidden_layers=1000000; at most 1000 is read"),
        ({"num_experts": 10**6}, "has num_experts=1000000; at most 1000 is read"),
        ({"num_hidden_layers": "2"}, "cannot read the model"),
        ({"hidden_size": 10**9}, "cannot read the model"),
        ({"layer_types": ["x"]}, "cannot read the model"),
        ({"sliding_window": 0}, "the model failed"),
        ({"top_k_experts": 5}, "the model failed"),
        ({"final_logit_softcapping": "x"}, "the model failed|cannot read the model"),
    ],
)
def test_crafted_configurations_are_one_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    model().save_pretrained(tmp_path)
    published = json.loads((tmp_path / "config.json").read_text())
    published["text_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(published))
    task = Continue(24, 3, 2)

    def played() -> Rollout:
        process = Unmasking(task, DiffusionGemma(tmp_path, task), Rules("accept", canvas_steps=2))
        return process.rollout(EntropyBounded(), task.sample(2, seeded(0)), None, seeded(1))

    with pytest.raises(UnmaskError, match=said) as caught:
        played()
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_finite_numbers_are_refused(tmp_path: Path) -> None:
    made = model()
    with torch.no_grad():
        next(made.parameters())[0] = float("nan")
    made.save_pretrained(tmp_path)
    with pytest.raises(UnmaskError, match="holds values that are no finite numbers"):
        DiffusionGemma(tmp_path, Continue(24, 3, 2))
