"""Word problems: formats, what counts as right, prompts and answer regions."""

import copy
import json
import time

import pytest
import torch

import tasks
from tasks import MathWord, UnmaskError
from tasks.math_word import SAMPLE, is_right, read_problem
from tests.toys import sweep
from unmask_env.process import Unmasking
from unmask_env.reference import reference
from unmask_env.state import Denoised, Rules

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def tokenizer():
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<end>", "<mask>"]
    plain.train_from_iterator(
        SAMPLE.read_text().splitlines(),
        tokenizers.trainers.BpeTrainer(
            vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        ),
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", mask_token="<mask>"
    )


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("12 * 8 = 96 and 96 - 75 = 21", "21", True),
        ("so it is 22", "21", False),
        ("21 rolls, not 22. #### 21", "21", True),
        ("#### 1,250", "1250", True),
        ("it is $\\frac{6}{8}$", "\\frac{3}{4}", True),
        ("\\boxed{0.75}", "\\frac{3}{4}", True),
        ("$x^2-x-6$", "x^2 - x - 6", True),
        ("$\\pi 9$", "9\\pi", True),
        ("", "5", False),
        ("no idea", "5", False),
    ],
)
def test_answers_by_hand(text, answer, right):
    assert is_right(text, answer) == right


MALICIOUS = ["__import__('os')", "9**9**9", "9^{9^{9}}", "2^99999", "9999!", "5" * 5000, "\\frac{" * 50, "((((", "\x00"]


@pytest.mark.parametrize("text", sweep(MALICIOUS, lambda text: text[:2] not in ("9*", "9^")))
def test_malicious_answers_are_wrong_and_quick(text):
    is_right("1", "2")  # the first call loads grammars
    started = time.process_time()
    assert not is_right(text, "387420489")
    assert time.process_time() - started < 0.5  # here; others do the work


def test_the_samples_own_solutions_are_right(tokenizer):
    """Their arithmetic too: every step that is written out."""
    problems = [read_problem(json.loads(line)) for line in SAMPLE.read_text().splitlines()]
    assert len(problems) == len({p.question for p in problems}) == 30
    for problem in problems:
        assert is_right(problem.solution, problem.answer), problem
    task = MathWord("sample", tokenizer, answer_length=64)
    instances = task.heldout()
    assert len(instances) == 30
    assert task.reward(instances.answers, instances).mean() == 1
    with pytest.raises(
        UnmaskError, match=r"math has no train problems, only test; test=0\.1, or train=FILE, gives some"
    ):
        task.sample(1, torch.Generator())
    divided = MathWord("sample", tokenizer, answer_length=64, test=0.1)
    assert [len(divided.heldout(split=split)) for split in tasks.task.SPLITS] == [24, 3, 3]


def test_prompts_are_given_and_the_answer_region_is_hidden(tokenizer):
    task = MathWord("sample", tokenizer, answer_length=20, test=0.1)
    instances = task.sample(8, torch.Generator().manual_seed(0))
    hidden = instances.tokens == task.mask_id
    assert torch.equal(hidden, (torch.arange(task.length) >= task.prompt_length).expand(8, -1))
    assert task.draw(instances.tokens[0]).endswith("\nAnswer:" + "_" * 20)
    wrong = instances.answers.clone()
    wrong[:, task.prompt_length :] = torch.tensor(tokenizer.encode(" 12345")[:1] * 20)
    assert task.metrics(wrong, instances)["solved"].sum() == 0
    begun = instances.answers.clone()
    begun[:, -1] = task.mask_id
    assert task.metrics(begun, instances)["solved"].sum() == 0, "what is not finished is not solved"
    for row in instances.tokens:
        padding = row[: task.prompt_length] == task.pad_id
        assert not padding[int(padding.sum()) :].any(), "padding is on the left alone"


def test_a_chat_template_is_used(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}[model]"
    task = MathWord("sample", chat, answer_length=3)
    text = task.draw(task.heldout(1).tokens[0])
    assert text.startswith("[user] ")
    assert text.endswith("[model]___")


def end_of(task, *parts):
    """The reward of an answer of these parts: text, or a token."""
    ids = []
    for part in parts:
        ids += task.tokenizer.encode(part, add_special_tokens=False) if isinstance(part, str) else [part]
    instances = task.heldout(1, "train")
    tokens = instances.answers.clone()
    right = next(iter(task._problems.values())).answer
    assert right == "5"
    tokens[0, task.prompt_length :] = torch.tensor((ids + [ids[-1]] * 40)[: task.length - task.prompt_length])
    return float(task.reward(tokens, instances))


@pytest.fixture
def five(tmp_path):
    (tmp_path / "five.jsonl").write_text('{"question": "2 + 3?", "answer": "#### 5"}\n' * 3)
    return str(tmp_path / "five.jsonl")


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<stop>{% endfor %}[model]"


@pytest.mark.parametrize(
    ("special", "template"),
    [("<end>", None), ("<|eot_id|>", None), ("<|im_end|>", None), ("<stop>", TEMPLATE), ("<pad>", "no end")],
)
def test_an_answer_ends_at_its_first_end_token(tokenizer, five, special, template):
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": [special]})
    if template == "no end":
        own.eos_token = None
    else:
        own.chat_template = template
    end, task = own.convert_tokens_to_ids(special), MathWord(five, own, answer_length=20)
    assert end_of(task, "#### 5", end, " so 99") == 1
    assert end_of(task, "#### 1", end, " #### 5") == 0
    assert end_of(task, end, "#### 5") == 0
    assert end_of(task, "it is 5", end, end, "x") == 1


def test_a_template_that_fails_is_one_line(tokenizer, five):
    own = copy.deepcopy(tokenizer)
    for template in ("{{ raise_exception('no') }}", "{% if %}", "{{ messages[7].content + 1 }}"):
        own.chat_template = template
        with pytest.raises(UnmaskError, match="the tokenizer's chat template fails"):
            MathWord(five, own)


def test_code_of_a_tokenizer_is_run_where_it_is_asked_for_alone(tmp_path, five, monkeypatch, capfd):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question in the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 15)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "own"
    folder.mkdir()
    made = tmp_path / "made"
    (folder / "config.json").write_text('{"model_type": "unheard_of"}')
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    (folder / "own.py").write_text(f"open({str(made)!r}, 'w').close()\n")
    for name in (f"math:{five},tokenizer={folder}", f"lines:{five},tokenizer={folder}"):
        with pytest.raises(UnmaskError, match="trust_remote_code=True; is its source to be trusted") as raised:
            tasks.get(name)
        assert len(str(raised.value).splitlines()) == 1
    assert not made.exists()
    assert capfd.readouterr().out == ""
    with pytest.raises(UnmaskError, match="cannot read the tokenizer"):
        tasks.get(f"math:{five},tokenizer={folder},trust_remote_code=true")
    assert made.exists()


def test_files_and_datasets(tokenizer, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) for i in range(20)))
    task = tasks.MathWord(str(path), tokenizer, 5)
    assert [len(task.heldout(split=split)) for split in tasks.task.SPLITS] == [16, 2, 2]
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "test.jsonl").write_text(json.dumps({"problem": "1 + 1?", "solution": "2", "answer": "2"}))
    only = tasks.MathWord(f"hf:{folder}", tokenizer, 5)
    assert len(only.heldout()) == 1
    with pytest.raises(UnmaskError, match="has no train problems, only test"):
        only.sample(1, torch.Generator())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 problems; at least 3"),
        (b"\xff\xfe", "as UTF-8 text"),
        (b"{", "line 1: not JSON"),
        (b"[1]", "line 1: not a record"),
        (b'{"text": "a"}', "line 1: a problem needs 'question' or 'problem'"),
        (b'{"question": "a", "answer": "b ####"}', "ends in '####' without"),
        (b'{"problem": "a", "answer": " "}', "line 1: a problem needs"),
    ],
)
def test_bad_files_are_told_before_the_tokenizer_is_looked_for(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UnmaskError, match=message):
        MathWord(str(tmp_path / "bad.jsonl"), str(tmp_path / "no tokenizer"))


def test_wrong_settings(tokenizer):
    with pytest.raises(UnmaskError, match="name the model's tokenizer"):
        tasks.get("math")
    with pytest.raises(UnmaskError, match="answer_length must be a whole number of at least 1, not 0"):
        MathWord("sample", tokenizer, 0)
    with pytest.raises(UnmaskError, match=r"deadline must be a number between 0\.1 and 600, not 0"):
        MathWord("sample", tokenizer, deadline=0)
    with pytest.raises(UnmaskError, match="cannot read the tokenizer"):
        tasks.get("math:sample,tokenizer=/nowhere/at/all")
    with pytest.raises(UnmaskError, match="cannot read the dataset"):
        MathWord("hf:/nowhere/at/all", tokenizer)
    with pytest.raises(UnmaskError, match="has 30 test problems; cannot take 31"):
        MathWord("sample", tokenizer).heldout(31)
    with pytest.raises(
        UnmaskError, match=r"24 shots need more training problems than the 24 there are; name train=FILE"
    ):
        MathWord("sample", tokenizer, test=0.1, shots=24)
    with pytest.raises(UnmaskError, match="name train or test"):
        MathWord("sample", tokenizer, test=0.1, train="sample")
    with pytest.raises(UnmaskError, match="gym:chain_sum has splits of its own"):
        MathWord("gym:chain_sum", tokenizer, test=0.1)


def test_a_file_to_train_on_and_solved_examples(tokenizer, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) for i in range(20)))
    task = MathWord("sample", tokenizer, 5, train=str(path), shots=2)
    assert [len(task.heldout(split=split)) for split in tasks.task.SPLITS] == [16, 2, 30]
    shown = task.draw(task.heldout(1).tokens[0])
    assert shown.startswith("Question: 0 + 1?\nAnswer: #### 1\n\nQuestion: 1 + 1?\nAnswer: #### 2\n\nQuestion: A baker")
    assert "0 + 1?\nAnswer:_" not in task.draw(task.heldout(1, "train").tokens[0]), "examples are not asked"
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = TEMPLATE
    shown = MathWord("sample", chat, 3, train=str(path), shots=1)
    assert shown.draw(shown.heldout(1).tokens[0]).startswith(
        "[user] 0 + 1?<stop>[assistant] #### 1<stop>[user] A baker makes"
    )


class Says:
    """A denoiser that is certain of one text behind the prompt, and less of what stands further to the right."""

    calls, hidden_dim, device = 0, None, torch.device("cpu")

    def __init__(self, task: MathWord, said: list[int]) -> None:
        self.task, self.said = task, torch.tensor(said)

    def __call__(self, tokens, where=None):
        task = self.task
        logits = torch.zeros(*tokens.shape, task.vocab_size)
        sure = torch.linspace(30, 20, len(self.said)).unsqueeze(1)
        logits[:, task.prompt_length :] = torch.nn.functional.one_hot(self.said, task.vocab_size) * sure
        log_probs = logits.log_softmax(-1)

        def log_probs_at(rows, positions):
            return log_probs[rows, positions]

        return Denoised.at(
            torch.ones_like(tokens, dtype=torch.bool) if where is None else where, task.vocab_size, log_probs_at
        )


def test_an_answer_that_is_over_takes_no_more_forwards(tokenizer, five):
    task = MathWord(five, tokenizer, answer_length=12)
    end, instances = tokenizer.eos_token_id, task.heldout(1)
    said = tokenizer.encode(" 5", add_special_tokens=False)
    written = len(said)
    said = (said + [end] * 12)[:12]
    for rules, forwards in ((Rules(), written + 1), (Rules("set", block_length=4), None)):
        process = Unmasking(task, Says(task, said), rules)
        order = reference("max_confidence" if rules.actions == "single" else "fixed_k:k=1")
        played = process.rollout(order, instances)
        assert played.state.done.all()
        assert not (played.tokens == task.mask_id).any()
        assert played.reward.tolist() == [1.0]
        assert played.tokens[0, task.prompt_length :].tolist() == said
        assert int(played.state.steps) == (forwards or written + 1)

    open_before = instances.tokens.clone()
    open_before[0, task.prompt_length + 1] = end
    assert torch.equal(task.settled(open_before), open_before), "an end behind a hole may still move"
