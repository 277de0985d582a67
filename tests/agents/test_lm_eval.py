"""The model of lm-evaluation-harness, on the harness's own code: local tasks and a tiny model in LLaDA's layout."""

import importlib
import json
import math
import sys
import tomllib
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import safetensors.torch
import torch

harness = pytest.importorskip("lm_eval", reason="needs the extra eval")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra text")
transformers = pytest.importorskip("transformers", reason="needs the extra text")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from agents.lm_eval import Prompts, UnmaskLM, main, masks_to_score  # noqa: E402
from agents.policy import PolicyConfig, new_policy  # noqa: E402
from pretrain.backbone import Backbone  # noqa: E402
from pretrain.likelihood import bound  # noqa: E402
from tasks import UnmaskError  # noqa: E402
from tests.toys import generator  # noqa: E402
from unmask_env.denoiser import load_denoiser  # noqa: E402
from unmask_env.process import Unmasking  # noqa: E402
from unmask_env.reference import reference  # noqa: E402
from unmask_env.state import Rules  # noqa: E402

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
TASKS = FIXTURES / "lm_eval"
TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and its many libraries


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model, less timid than random weights of its size are, with a tokenizer of bytes and a chat template."""
    path = tmp_path_factory.mktemp("model")
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>", "<mask>", "<u>", "<a>"], show_progress=False
    )
    plain.train_from_iterator((TASKS / "sums.jsonl").read_text().splitlines(), trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<end>", eos_token="<end>", mask_token="<mask>"
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(path)
    config = json.loads((FIXTURES / "llada-tiny" / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"mask_token_id": made.mask_token_id}))
    weights = safetensors.torch.load_file(FIXTURES / "llada-tiny" / "model.safetensors")
    weights["model.transformer.ff_out.weight"] *= 6
    safetensors.torch.save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def made(folder, **options):
    return UnmaskLM(f"hf:{folder}", **{"order": "threshold:theta=0.3", "block_length": 8, "samples": 4} | options)


def evaluated(lm, tasks, **options):
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return harness.simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)


def answers(results, task):
    return [sample["resps"] for sample in results["samples"][task]]


def asked(kind, *arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def results(folder):
    return {size: evaluated(made(folder, batch_size=size), ["unmask_sums", "unmask_colours"]) for size in (1, 3)}


@pytest.mark.slow
def test_the_harness_runs_and_the_batch_size_does_not_matter(results) -> None:
    assert set(results[1]["results"]) == {"unmask_sums", "unmask_colours"}
    assert answers(results[1], "unmask_sums") == answers(results[3], "unmask_sums")
    assert len({str(answer) for answer in answers(results[1], "unmask_sums")}) > 1
    for one, three in zip(*(answers(results[size], "unmask_colours") for size in (1, 3)), strict=True):
        for ((score, greedy),), ((same, as_greedy),) in zip(one, three, strict=True):
            assert score == pytest.approx(same, abs=1e-4)
            assert greedy == as_greedy
    assert results[1]["results"] == results[3]["results"]
    config = results[3]["config"]
    assert config["unmask_likelihood"] == "bound, 4 samples"
    assert 1 <= config["unmask_forwards_per_answer"] <= 24


def test_generation_is_the_process_played_on_the_prompt_alone(folder) -> None:
    lm = made(folder, batch_size=4)
    prompts = ["Ann has 3", "How many do two hold? And", "5"]
    whole = {"until": [], "max_gen_toks": 20}
    texts = lm.generate_until(asked("generate_until", *((prompt, whole) for prompt in prompts)), disable_tqdm=True)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = lm.tok_encode(prompt)
        task = Prompts(lm.tokenizer).of(len(ids), 20)
        process = Unmasking(task, load_denoiser(f"hf:{folder}", task), Rules("set", block_length=8))
        played = process.rollout(reference("threshold:theta=0.3"), task.instances([ids]))
        written = played.tokens[0, len(ids) :].tolist()
        end = written.index(lm.eot_token_id) if lm.eot_token_id in written else len(written)
        assert text == lm.tokenizer.decode(written[:end], skip_special_tokens=True)


def test_it_stops_at_the_first_stop_string_and_fills_no_further_block(folder) -> None:
    lm = made(folder, batch_size=2)
    ask = {"until": [], "max_gen_toks": 40}
    (text,) = lm.generate_until(asked("generate_until", ("Ann has", ask)), disable_tqdm=True)
    whole = lm._forwards[-1]
    stop, later = text[3:5], text[9:12]
    assert stop
    cut = lm.generate_until(asked("generate_until", ("Ann has", ask | {"until": [later, stop]})), disable_tqdm=True)
    assert cut == [text[: text.index(stop)]]
    assert lm._forwards[-1] < whole


def test_chat_templates(folder) -> None:
    lm = made(folder, batch_size=2)
    assert lm.apply_chat_template([{"role": "user", "content": "5?"}]) == "<u>5?<end><a>"
    chatted = evaluated(lm, ["unmask_sums"], apply_chat_template=True, limit=2)
    assert all(sample["arguments"][0][0].endswith("<a>") for sample in chatted["samples"]["unmask_sums"])


@pytest.mark.parametrize("order", ["random", "soft_threshold:theta=0.3,tau=0.2"])
def test_what_is_drawn_is_drawn_per_request(folder, order) -> None:
    prompts = ["Ann has 3", "How many do two hold? And", "5"]
    ask = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    lm = made(folder, order=order, batch_size=3)
    together = lm.generate_until(asked("generate_until", *((prompt, ask) for prompt in prompts)), disable_tqdm=True)
    alone = [lm.generate_until(asked("generate_until", (p, ask)), disable_tqdm=True)[0] for p in reversed(prompts)]
    assert together == alone[::-1]
    twice = lm.generate_until(asked("generate_until", ("5", ask), ("5", ask)), disable_tqdm=True)
    assert twice[0] == together[2] != twice[1]  # a question that is repeated draws anew
    other = made(folder, order=order, seed=1)
    assert other.generate_until(asked("generate_until", ("5", ask)), disable_tqdm=True) != twice[:1]


def test_a_trained_policy_of_one_length(folder) -> None:
    lm = made(folder)
    task = Prompts(lm.tokenizer).of(20, 12)
    denoiser = load_denoiser(f"hf:{folder}", task)
    policy = new_policy(PolicyConfig(dim=16, layers=1), task, denoiser, 0, base="soft_threshold", sets=True)
    torch.nn.init.normal_(policy.head.state_head.weight, generator=generator(), std=2.0)
    policy.save_pretrained(folder / "policy")
    lm = made(folder, order=str(folder / "policy"), batch_size=2)
    prompts = ["Ann has 3", "How many do two hold? And how many more than twenty tokens is this?"]
    ask = {"until": [], "max_gen_toks": 12}
    texts = lm.generate_until(asked("generate_until", *((prompt, ask) for prompt in prompts)), disable_tqdm=True)
    ids = [lm.tok_encode(prompt)[-20:] for prompt in prompts]
    played = Unmasking(task, denoiser, Rules("set", block_length=8)).rollout(policy, task.instances(ids))
    assert texts == [lm._text(row, ())[0] for row in played.tokens[:, 20:].tolist()]


# ---------------------------------------------------------------------- scores
def log_probs(folder, lm, tokens, masked):
    """(L, V) by the model of transformers itself."""
    model = lm.denoiser.model
    ids = torch.tensor([tokens]).masked_fill(torch.tensor([masked]), lm.tokenizer.mask_token_id)
    logits = model(ids).logits[0, :, : len(lm.tokenizer)].float()
    logits[:, lm.tokenizer.mask_token_id] = -torch.inf
    return logits.log_softmax(-1)


@torch.no_grad()
@pytest.mark.slow
def test_scores_by_hand(folder) -> None:
    context, continuation = "Question: 5 + 5?\nAnswer:", " 10"
    lm = made(folder)
    given, answer = lm._encode_pair(context, continuation)
    size, text = len(answer), given + answer

    def of(masked):
        where = [False] * len(given) + [i in masked for i in range(size)]
        return log_probs(folder, lm, text, where)[range(len(given), len(text)), answer]

    forward = sum(float(of(range(at, size))[at]) for at in range(size))
    apart = float(of(range(size)).sum())
    exact = sum(
        float(of(some)[list(some)].sum()) / count / math.comb(size, count)
        for count in range(1, size + 1)
        for some in combinations(range(size), count)
    )
    ask = asked("loglikelihood", (context, continuation))

    def scored(**options):
        return made(folder, batch_size=64, **options).loglikelihood(ask, disable_tqdm=True)[0][0]

    assert scored(likelihood="left_to_right") == pytest.approx(forward, abs=1e-4)
    assert scored(likelihood="one_forward") == pytest.approx(apart, abs=1e-4)
    estimates = torch.tensor([scored(samples=2, seed=seed) for seed in range(60)])
    assert float((estimates.mean() - exact).abs()) < 4 * float(estimates.std()) / 60**0.5
    assert float(estimates.std()) > 0


def test_the_bound_is_that_of_pretraining_of_the_same_draws() -> None:
    torch.manual_seed(0)
    model = Backbone(vocab_size=5, coordinates=[[i] for i in range(6)], dim=16, layers=1, heads=2).eval()
    clean = torch.randint(5, (1, 6), generator=generator())
    masked, weights = masks_to_score("bound", 6, 8, generator(3))
    with torch.no_grad():
        given = torch.where(masked, model.mask_id, clean)
        log_prob = model.order.reverse(*model(given))[0].double().log_softmax(-1)
    score = (weights * log_prob.gather(-1, clean.expand(8, -1).unsqueeze(-1)).squeeze(-1)).sum()
    assert float(-score) == pytest.approx(float(bound(model, clean, generator(3), 8).order), rel=1e-6)


@pytest.mark.slow
def test_rolling_scores_are_those_of_the_windows(folder) -> None:
    lm = made(folder, likelihood="left_to_right", max_length=16, batch_size=8)
    text = (TASKS / "sums.jsonl").read_text()[:70]
    ids = lm.tokenizer.encode(text)
    assert len(ids) > 16
    (total,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), disable_tqdm=True)
    first, rest = lm._scores([([], ids[:15])])[0], 0.0
    for start in range(15, len(ids), 15):
        end = min(start + 15, len(ids))
        rest += lm._scores([(ids[max(0, end - 16) : start], ids[start:end])])[0]
    assert total == pytest.approx(first + rest, abs=1e-3)
    results = evaluated(made(folder, samples=2, batch_size=4), ["unmask_text"])
    assert results["results"]["unmask_text"]["bits_per_byte,none"] > 0


def test_whether_filling_gives_the_continuation(folder) -> None:
    lm = made(folder, order="max_confidence", likelihood="one_forward", batch_size=3)
    ids, _ = lm._fill([lm.tok_encode("5 + 5")], 3, 0.0, (), 0)
    pairs = [("", lm.tok_encode("5 + 5"), ids[0].tolist()), ("", lm.tok_encode("5 + 5"), [9, 9, 9])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(pairs, disable_tqdm=True)] == [True, False]


# ---------------------------------------------------------------------- how it is found, and mistakes
@pytest.mark.slow
def test_the_command_and_the_entry_point(folder, tmp_path, monkeypatch, capsys) -> None:
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]["unmask"]
    module, _, name = entry.partition(":")
    assert getattr(importlib.import_module(module), name) is UnmaskLM
    arguments = f"--model unmask --tasks unmask_sums --include_path {TASKS} --limit 2 --batch_size 2 --model_args "
    words = [*arguments.split(), f"denoiser=hf:{folder},order=threshold:theta=0.3,block_length=8"]
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # in seconds
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words, "--output_path", str(tmp_path)])
    main()
    (written,) = tmp_path.rglob("results_*.json")
    assert json.loads(written.read_text())["config"]["unmask_order"] == "threshold:theta=0.3"
    assert "unmask_sums" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": "auto"}, "batch_size must be a whole number"),
        ({"order": "best"}, "unknown order policy 'best'"),
        ({"order": "oracle"}, "the order oracle sees the answers"),
        ({"order": "learned"}, "has learned no order"),
        ({"likelihood": "mean"}, "likelihood must be bound or left_to_right or one_forward"),
        ({"samples": 0}, "samples must be"),
        ({"dtype": "int8"}, "dtype"),
        ({"order": 5}, "order must be text, not 5"),
        ({"order": None}, "order must be text"),
        ({"tokenizer": 5}, "tokenizer must be text"),
        ({"device": 5}, "device must be text"),
        ({"block_length": 2.5}, "block_length must be a whole number"),
        ({"block_length": True}, "block_length must be a whole number"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"likelihood": ["bound"]}, "likelihood must be bound"),
        ({"seed": 2**64}, "seed must be a whole number"),
        ({"trust_remote_code": "yes"}, "trust_remote_code must be true or false"),
        ({"batch_size": "²"}, "batch_size must be a whole number"),
        ({"tokenizer": "/nowhere"}, "cannot read the tokenizer /nowhere"),
    ],
)
def test_mistakes(folder, options, said) -> None:
    with pytest.raises(UnmaskError, match=said):
        made(folder, **options)


def test_more_mistakes(folder) -> None:
    with pytest.raises(UnmaskError, match="denoiser must be hf:"):
        UnmaskLM("sudoku6-tiny")
    for odd in (5, None, ["hf:a"]):
        with pytest.raises(UnmaskError, match="denoiser must be text"):
            UnmaskLM(odd)
    with pytest.raises(UnmaskError, match="leaves no room for a prompt"):
        made(folder, max_length=8).generate_until(asked("generate_until", ("5", {"max_gen_toks": 8})))
    with pytest.raises(UnmaskError, match="does not fit into 4"):
        made(folder, max_length=4).loglikelihood(asked("loglikelihood", ("5", "Ann has three apples")))
