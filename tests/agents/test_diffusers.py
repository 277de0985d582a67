"""The scheduler of diffusers, in diffusers' own pipelines on small random models."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra diffusers")
transformers = pytest.importorskip("transformers", reason="needs the extra text")

from agents.diffusers import UnmaskScheduler  # noqa: E402
from agents.policy import PolicyConfig, load_policy, new_policy  # noqa: E402
from tasks import Instances, Task, UnmaskError  # noqa: E402
from tests.toys import generator, observation  # noqa: E402
from unmask_env import make_process  # noqa: E402
from unmask_env.language_models import HFDenoiser  # noqa: E402
from unmask_env.process import Unmasking  # noqa: E402
from unmask_env.reference import EntropyBounded, reference  # noqa: E402
from unmask_env.state import Denoised, Rules  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the library
V, MASK = 40, 39


class Pages(torch.nn.Module):
    """A small bidirectional model: logits that depend on the whole block, never the mask."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, vocab_size=V, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(vocab_size, 16)
        self.place = torch.nn.Embedding(64, 16)
        self.mix, self.head = torch.nn.Linear(16, 16), torch.nn.Linear(16, vocab_size)
        torch.nn.init.normal_(self.head.weight, std=2.0)

    def forward(self, ids, attention_mask=None, position_ids=None):
        x = self.embed(ids) + self.place(position_ids)
        mean = (x * attention_mask.unsqueeze(-1)).sum(1, keepdim=True) / attention_mask.sum(1)[:, None, None]
        logits = self.head((x + 2 * self.mix(mean)).tanh())
        logits[..., MASK] = -1e4
        return SimpleNamespace(logits=logits)


def generated(model, scheduler, prompts, mask=MASK, **options):
    pipe = diffusers.LLaDA2Pipeline(model=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    options = {"editing_threshold": None, "eos_early_stop": False, "sampling_method": "auto"} | options
    return pipe(input_ids=prompts, mask_token_id=mask, output_type="seq", **options).sequences


PROMPTS = torch.randint(38, (3, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("order", "threshold", "steps"),
    [
        ("threshold:theta=0.25", 0.25, 8),
        ("threshold:theta=0.9", 0.9, 8),
        ("threshold:theta=0.25,at_least=2", 0.25, 4),
        ("fixed_k:k=2,score=confidence", 2.0, 4),
        ("max_confidence", 2.0, 8),
    ],
)
def test_the_same_rule_gives_what_diffusers_own_scheduler_gives(order, threshold, steps) -> None:
    common = {"gen_length": 19, "block_length": 8, "num_inference_steps": steps, "threshold": threshold}
    own = generated(Pages(), diffusers.BlockRefinementScheduler(), PROMPTS, **common)
    ours = generated(Pages(), UnmaskScheduler(order), PROMPTS, **common)
    assert torch.equal(own, ours)
    assert not bool((ours == MASK).any())
    assert len(own.unique()) > 3


def test_symbols_are_the_same_draws() -> None:
    # A threshold of nearly 0 fills all at once, whatever is drawn.
    common = {"gen_length": 11, "block_length": 8, "num_inference_steps": 8, "threshold": 1e-9, "temperature": 1.0}
    common |= {"top_k": 9, "top_p": 0.95}
    own = generated(Pages(), diffusers.BlockRefinementScheduler(), PROMPTS, generator=generator(4), **common)
    ours = generated(Pages(), UnmaskScheduler("threshold:theta=1e-9"), PROMPTS, generator=generator(4), **common)
    assert torch.equal(own, ours)
    other = generated(Pages(), UnmaskScheduler("threshold:theta=1e-9"), PROMPTS, generator=generator(5), **common)
    assert not torch.equal(other, ours)


def test_end_tokens_stop_as_they_do_there() -> None:
    common = {"gen_length": 24, "block_length": 8, "num_inference_steps": 8, "threshold": 0.25, "eos_early_stop": True}
    free = generated(Pages(), diffusers.BlockRefinementScheduler(), PROMPTS, **common)
    end = int(free[0, 2])
    own = generated(Pages(), diffusers.BlockRefinementScheduler(), PROMPTS, eos_token_id=end, **common)
    ours = generated(Pages(), UnmaskScheduler("threshold:theta=0.25"), PROMPTS, eos_token_id=end, **common)
    assert torch.equal(own, ours)
    assert not torch.equal(own, free)


# ---------------------------------------------------------------------- against the process
class Board(torch.nn.Module):
    """A packaged denoiser as pipelines call models."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, denoiser):
        super().__init__()
        self.backbone = denoiser.model

    def forward(self, ids, attention_mask=None, position_ids=None):
        return SimpleNamespace(logits=self.backbone(ids)[0])


@pytest.mark.parametrize("name", ["sudoku6-tiny-sets-rewards", "sudoku6-tiny-rewards"])
def test_a_packaged_policy_fills_as_in_the_process(name) -> None:
    policy = load_policy(name)
    process = make_process("sudoku6", denoiser="sudoku6-tiny", actions=policy.actions)
    answers, given = process.task.heldout(12).answers, 18  # half a board is the prompt
    instances = Instances(torch.where(torch.arange(36) < given, answers, process.task.mask_id), answers)
    played = process.rollout(policy, instances)
    sequences = generated(
        Board(process.denoiser),
        UnmaskScheduler(name, block_length=36),
        instances.tokens[:, :given],
        mask=6,
        gen_length=36 - given,
        num_inference_steps=36,
    )
    assert int(played.nfe.max()) <= 36 - given
    assert torch.equal(sequences, played.tokens[:, given:])


@pytest.mark.parametrize(
    "order",
    ["entropy_bounded:gamma=0.4", "kl_stability", "schedule:steps=6", "factor", "self_planning:steps=7", "margin"],
)
def test_step_by_step_it_is_the_process(order) -> None:
    policy = reference(order)
    process = make_process("sudoku6", denoiser="sudoku6-tiny", actions=policy.actions)
    instances = process.task.heldout(6)
    played = process.rollout(policy, instances)
    model, scheduler = Board(process.denoiser), UnmaskScheduler(order, num_inference_steps=72)
    for _ in range(2):  # a new block forgets the last one
        sample = instances.tokens
        for step in range(int(played.nfe.max())):
            assert bool((sample == 6).any())
            out = scheduler.step(model(sample).logits, step, sample, mask_token_id=6)
            assert torch.equal(out.transfer_index, (sample == 6) & (out.prev_sample != 6))
            assert torch.equal(out.editing_transfer_index, (sample != 6) & (out.prev_sample == 6))
            sample = out.prev_sample
        assert torch.equal(sample, played.tokens)


class Line(Task):
    """Sequences over the 512 tokens of the tiny model."""

    def __init__(self, length, prompt_length):
        self.name, self.symbols, self.shape = "line", tuple(map(str, range(512))), (1, length)
        self.prompt_length = prompt_length

    def sample(self, n, generator):
        raise NotImplementedError

    def reward(self, tokens, instances):
        return torch.zeros(len(tokens))


def test_a_new_policy_of_a_large_vocabulary(tmp_path) -> None:
    task = Line(length=24, prompt_length=8)
    denoiser = HFDenoiser(Path(__file__).parents[1] / "fixtures" / "llada-tiny", task)
    policy = new_policy(PolicyConfig(dim=16, layers=1), task, denoiser, 0, base="soft_threshold", sets=True)
    torch.nn.init.normal_(policy.head.state_head.weight, generator=generator(), std=2.0)
    policy.save_pretrained(tmp_path)
    prompts = torch.randint(500, (4, 8), generator=generator(2))
    instances = task.behind_prompt(torch.cat([prompts, torch.zeros(4, 16, dtype=torch.long)], 1))
    played = Unmasking(task, denoiser, Rules("set")).rollout(policy, instances)
    scheduler = UnmaskScheduler(str(tmp_path), block_length=24)
    sequences = generated(denoiser.model, scheduler, prompts, mask=509, gen_length=16)
    assert torch.equal(sequences, played.tokens[:, 8:])
    assert int(played.nfe.max()) > 1


# ---------------------------------------------------------------------- without a mask token
class Chat:
    """As much of a processor as the pipeline asks for."""

    eos_token_id = None

    def apply_chat_template(self, messages, **options):
        ids = torch.tensor([[2 + ord(letter) % 20 for letter in message[0]["content"]] for message in messages])
        return {"input_ids": ids}


@pytest.fixture(scope="module")
def gemma():
    text = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": 8,
        "num_experts": 2,
        "top_k_experts": 1,
        "moe_intermediate_size": 16,
        "sliding_window": 16,
        "initializer_range": 0.5,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    torch.manual_seed(0)
    config = transformers.DiffusionGemmaConfig(text_config=text, vision_config=None, canvas_length=8)
    return transformers.DiffusionGemmaForBlockDiffusion(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["fixed_k:k=1,score=confidence", "fixed_k:k=2,score=confidence"])
def test_what_is_not_committed_is_noise_again(gemma, order) -> None:
    def generated(scheduler):
        pipe = diffusers.DiffusionGemmaPipeline(model=gemma, scheduler=scheduler, processor=Chat())
        pipe.set_progress_bar_config(disable=True)
        options = {"gen_length": 16, "num_inference_steps": 8 // reference(order).k, "confidence_threshold": None}
        return pipe(prompt=["abcd", "efgh"], output_type="seq", generator=generator(7), **options).sequences

    own = generated(diffusers.BlockRefinementScheduler(threshold=2.0))
    assert torch.equal(generated(UnmaskScheduler(order)), own)
    assert len(own.unique()) > 3


@pytest.mark.parametrize(("bound", "hot"), [(0.1, 0.8), (6.0, 1.0)])
def test_entropy_bound_in_the_pipeline_is_diffusers_own(gemma, bound, hot) -> None:
    """The same draws, every position decided anew at every step, and the same end of a canvas."""

    def generated(scheduler, seed=7):
        pipe = diffusers.DiffusionGemmaPipeline(model=gemma, scheduler=scheduler, processor=Chat())
        pipe.set_progress_bar_config(disable=True)
        options = {"gen_length": 16, "num_inference_steps": 6, "confidence_threshold": 2.5, "stability_threshold": 1}
        return pipe(prompt=["abcd", "efgh"], output_type="seq", generator=generator(seed), **options).sequences

    own = generated(diffusers.EntropyBoundScheduler(entropy_bound=bound, t_max=hot))
    ours = UnmaskScheduler(f"entropy_bounded:gamma={bound}", commits=False, t_max=hot)
    assert torch.equal(generated(ours), own)
    assert not torch.equal(generated(ours, seed=8), own)
    assert not torch.equal(generated(UnmaskScheduler(f"entropy_bounded:gamma={bound}")), own)


def test_every_rule_ends_within_the_steps(gemma) -> None:
    logits, sample = torch.randn(2, 8, 32, generator=generator()), torch.zeros(2, 8, dtype=torch.long)
    for order in ("random", "soft_threshold", "max_confidence", "remdm:steps=3"):
        scheduler, canvas = UnmaskScheduler(order, num_inference_steps=3), sample
        committed = torch.zeros_like(sample)
        for step in range(3):
            out = scheduler.step(logits, step, canvas, generator=generator(step))
            canvas = out.prev_sample
            committed = committed + out.transfer_index.long() - out.editing_transfer_index.long()
        assert bool((committed == 1).all())
        assert torch.equal(out.prev_sample, logits.argmax(-1))


# ---------------------------------------------------------------------- their rules as references
def test_entropy_bound_accepts_what_the_reference_fills() -> None:
    logits = 4 * torch.randn(64, 12, 20, generator=generator())
    scheduler = diffusers.EntropyBoundScheduler(entropy_bound=0.7, t_max=1.0, t_min=1.0)
    accepted = scheduler.step(logits, 0, torch.zeros(64, 12, dtype=torch.long), generator=generator()).accepted_index
    everywhere = torch.ones(64, 12, dtype=torch.bool)
    seen = observation(torch.full((64, 12), 20), everywhere, Denoised.of(logits.log_softmax(-1)))
    fills = EntropyBounded(gamma=0.7).fills(seen)
    assert torch.equal(fills, accepted)
    assert 1 < float(fills.sum(1).float().mean()) < 12


# ---------------------------------------------------------------------- files and mistakes
def test_settings_and_policy_are_saved(tmp_path) -> None:
    scheduler = UnmaskScheduler("schedule:steps=4,shape=linear", block_length=16, vocab_size=30)
    scheduler.save_pretrained(tmp_path / "rule")
    again = UnmaskScheduler.from_pretrained(tmp_path / "rule")
    assert again.policy == scheduler.policy
    assert all(again.config[name] == scheduler.config[name] for name in ("order", "block_length", "vocab_size"))
    UnmaskScheduler("sudoku6-tiny-sets-rewards", block_length=36).save_pretrained(tmp_path / "all" / "scheduler")
    trained = UnmaskScheduler.from_pretrained(tmp_path / "all", subfolder="scheduler")
    assert trained.config.order == str(tmp_path / "all" / "scheduler" / "order")
    for mine, packaged in zip(
        trained.policy.parameters(), load_policy("sudoku6-tiny-sets-rewards").parameters(), strict=True
    ):
        assert torch.equal(mine, packaged)


def test_tokens_beyond_the_tokenizer_are_never_drawn() -> None:
    logits = torch.zeros(2, 6, 20)
    logits[..., 15:] = 9.0
    sample = torch.full((2, 6), 19)
    out = UnmaskScheduler("threshold:theta=0.01", vocab_size=15).step(
        logits, 0, sample, mask_token_id=19, temperature=1.0, generator=generator()
    )
    assert int(out.prev_sample.max()) < 15


def test_mistakes() -> None:
    with pytest.raises(UnmaskError, match="reads the answers"):
        UnmaskScheduler("oracle")
    with pytest.raises(UnmaskError, match="unknown order policy"):
        UnmaskScheduler("best")
    scheduler = UnmaskScheduler("sudoku6-tiny-sets-rewards")
    with pytest.raises(UnmaskError, match="take block_length=36, not 32"):
        scheduler.step(torch.zeros(1, 32, 6), 0, torch.full((1, 32), 6), mask_token_id=6)
    with pytest.raises(UnmaskError, match="is for 6 symbols; the model has 5 logits"):
        scheduler.step(torch.zeros(1, 36, 5), 0, torch.full((1, 36), 6), mask_token_id=6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"order": 5}, "order must be text, not 5"),
        ({"order": None}, "order must be text"),
        ({"order": "nothere"}, "unknown order policy"),
        ({"block_length": 0}, "block_length must be a whole number"),
        ({"block_length": "8"}, "block_length must be a whole number"),
        ({"num_inference_steps": 10**12}, "num_inference_steps must be a whole number between"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number"),
        ({"num_inference_steps": True}, "num_inference_steps must be a whole number"),
        ({"vocab_size": 0}, "vocab_size must be a whole number"),
        ({"vocab_size": "x"}, "vocab_size must be a whole number"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(tmp_path, settings, said) -> None:
    with pytest.raises(UnmaskError, match=said):
        UnmaskScheduler(**settings)
    UnmaskScheduler().save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(UnmaskError, match=said):
        UnmaskScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 10**5, b"9" * 5000, b"\xff\xfe", b"[]", b"5", b"null"])
def test_a_damaged_file_of_settings_is_one_line(tmp_path, content) -> None:
    (tmp_path / "scheduler_config.json").write_bytes(content)
    with pytest.raises(UnmaskError, match="scheduler_config"):
        UnmaskScheduler.from_pretrained(tmp_path)
