"""Models of transformers as denoisers: small random ones of each architecture, built here."""

import json
import re
import sys
import types
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import safetensors.torch
import torch

import tasks
from agents.evaluate import compare
from tasks import IncompatibleDenoiserError, Lines, MathWord, UnmaskError
from tests.toys import rollout
from unmask_env.denoiser import load_denoiser
from unmask_env.families import FAMILIES, configure
from unmask_env.language_models import HFDenoiser
from unmask_env.process import Unmasking
from unmask_env.reference import reference

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

OWN = ("own", "own-shifted")
FIXTURES = Path(__file__).parents[1] / "fixtures"
SPECIAL = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
LINES = ["a b c d e", "e d", "a a b", "c", "b c d e a b c", "d e a b", "a c e", "b d", "e e e e a a", "c b a"] * 8
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "vocab_size": 10,
    "max_position_embeddings": 24,
}

# A model of no known family brings its own code. It takes the attention mask and does not heed it; the second kind's
# logits at a position are of the next one.
OWN_CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class DiffusionConfig(PretrainedConfig):
    model_type = "MODEL_TYPE"

    def __init__(self, vocab_size=10, hidden_size=16, mask_token_id=3, max_sequence_length=24, **kwargs):
        self.vocab_size, self.hidden_size, self.mask_token_id = vocab_size, hidden_size, mask_token_id
        self.max_sequence_length = max_sequence_length
        super().__init__(**kwargs)


class DiffusionModel(PreTrainedModel):
    config_class = DiffusionConfig

    def __init__(self, config):
        super().__init__(config)
        d = config.hidden_size
        self.embed, self.qkv = nn.Embedding(config.vocab_size, d), nn.Linear(d, 3 * d, bias=False)
        self.mlp, self.head = nn.Linear(d, d, bias=False), nn.Linear(d, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        module.weight.data.normal_(std=0.5)

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False):
        x = self.embed(input_ids)
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[1])[:, None] * 0.5 ** torch.arange(half)
        q, k, v = self.qkv(x).chunk(3, -1)
        def turned(y):
            a, b = y[..., :half], y[..., half:]
            return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
        x = x + nn.functional.scaled_dot_product_attention(turned(q)[:, None], turned(k)[:, None], v[:, None])[:, 0]
        x = x + self.mlp(x).relu()
        logits = self.head(x)
        if self.config.model_type == "own-shifted":
            logits = torch.cat([logits[:, 1:], logits[:, :1]], 1)
        return MaskedLMOutput(logits=logits, hidden_states=(x,) if output_hidden_states else None)
"""


def tokenizer(path=None, more=0):
    """Of ten tokens, and ``more`` that no text holds."""
    words = {word: i for i, word in enumerate([*SPECIAL, *"abcde", *(f"w{i}" for i in range(more))])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", **names)
    if path is not None:
        made.save_pretrained(path)
    return made


def published(name, **changes):
    """The configuration of a published model of a family, made small."""
    if name == "llada":
        return json.loads((FIXTURES / "llada-tiny-gqa" / "config.json").read_text()) | changes
    config = json.loads((FIXTURES / "dream-tiny" / "config.json").read_text())
    return config | {"model_type": {"dream": "Dream"}.get(name, name)} | changes


def published_weights(family, model):
    """What the family calls the weights of the class of transformers."""
    backwards = {}
    for pattern, there in (family.weights or {}).items():
        here = pattern.removeprefix("^").replace(r"(\d+)", r"\1").replace("\\.", ".")
        backwards["^" + there.replace(".", "\\.").replace("\\\\", "\\").replace(r"\1", r"(\d+)")] = here
    names = {}
    for name in model.state_dict():
        names[name] = name
        for pattern, here in backwards.items():
            if re.search(pattern, name):
                names[name] = re.sub(pattern, here, name)
    return {names[name]: weight.clone() for name, weight in model.state_dict().items()}


def save_published(name, path, vocab_size, **sizes):
    small = {"vocab_size": vocab_size, "mask_token_id": 3, "pad_token_id": 0}
    small |= {"embedding_size": vocab_size, "d_model": 16, "mlp_hidden_size": 32, "n_heads": 2, "n_kv_heads": 1}
    small |= {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"max_sequence_length": 24, "max_position_embeddings": 24, **sizes}
    config, family = published(name, **small), FAMILIES[name]
    made = configure(family, config, name)
    made.initializer_range = 0.5
    model = getattr(transformers, family.architecture)(made)
    safetensors.torch.save_file(published_weights(family, model), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def build(name, path, vocab_size=10):
    """A small random model of an architecture, saved at ``path``."""
    torch.manual_seed(0)
    path.mkdir(exist_ok=True)
    if name in FAMILIES:
        return save_published(name, path, vocab_size)
    if name in OWN:
        (path / "modeling_own.py").write_text(OWN_CODE.replace("MODEL_TYPE", name))
        sys.path.insert(0, str(path))
        try:
            import modeling_own

            model = modeling_own.DiffusionModel(modeling_own.DiffusionConfig(vocab_size))
        finally:
            sys.path.remove(str(path))
            del sys.modules["modeling_own"]
        model.save_pretrained(path)
        config = json.loads((path / "config.json").read_text())
        config["auto_map"] = {
            "AutoConfig": "modeling_own.DiffusionConfig",
            "AutoModel": "modeling_own.DiffusionModel",
        }
        (path / "config.json").write_text(json.dumps(config))
        (path / "modeling_own.py").write_text(OWN_CODE.replace("MODEL_TYPE", name))
        return str(path)
    made = {
        "bert": (transformers.BertConfig, transformers.BertForMaskedLM, {}),
        "bert-long": (transformers.BertConfig, transformers.BertForMaskedLM, {"max_position_embeddings": 512}),
        "albert": (transformers.AlbertConfig, transformers.AlbertForMaskedLM, {"embedding_size": 8}),
        "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM, {}),
        "modernbert": (
            transformers.ModernBertConfig,
            transformers.ModernBertForMaskedLM,
            {"local_attention": 4, "initializer_cutoff_factor": 2.0},
        ),
    }
    config, model, more = made[name]
    model(config(**{**SMALL, "vocab_size": vocab_size, **more})).save_pretrained(path)
    return str(path)


ARCHITECTURES = ["bert", "albert", "roberta", "modernbert", *OWN, *FAMILIES]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tmp_path_factory):
    return request.param, build(request.param, tmp_path_factory.mktemp(request.param))


def logits_of(denoiser, ids, seen):
    return denoiser._logits(denoiser._body(ids, seen)[0])


def options(name):
    return {"trust_remote_code": name in OWN, "shifted": True if name == "own-shifted" else None}


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_row_is_what_it_is_alone_whatever_is_beside_it(model, side):
    """Padding invariance: alone without padding, in one batch of all lengths, and padded on either side."""
    name, path = model
    task = Lines(LINES, tokenizer(), length=12, side=side)
    denoiser = HFDenoiser(path, task, hidden=True, **options(name))
    assert denoiser.masks_padding == (name not in OWN)
    instances = task.sample(16, torch.Generator().manual_seed(0))
    together = denoiser(instances.tokens)
    assert together.log_probs.shape == (16, 12, task.vocab_size)
    assert (together.log_probs[..., 3] == -torch.inf).all(), "the mask is no answer"
    for row, tokens in enumerate(instances.tokens):
        real = tokens != task.pad_id
        found = logits_of(denoiser, torch.where(tokens[real] == task.mask_id, 3, tokens[real]).unsqueeze(0), None)[0]
        found[:, 3] = -torch.inf
        expected = found.log_softmax(-1)
        finite = expected > -torch.inf
        torch.testing.assert_close(together.log_probs[row][real][finite], expected[finite], rtol=0, atol=1e-5)
    assert together.hidden.shape == (16, 12, 16)
    spread = together.log_probs[:, :, 5:].std()
    assert spread > 0.1, "the random model says something"


@pytest.mark.parametrize("name", ["bert", "own", "own-shifted", "llada", "dream"])
def test_of_a_large_vocabulary_only_what_is_asked_for_is_made(name, tmp_path):
    """The shown symbols and the entropy are those of each row alone; elsewhere nothing is known."""
    task = Lines(LINES, tokenizer(more=190), length=12, side="left")
    assert task.vocab_size == 200
    denoiser = HFDenoiser(build(name, tmp_path, vocab_size=200), task, hidden=True, **options(name))
    tokens = task.sample(8, torch.Generator().manual_seed(0)).tokens
    where = tokens == task.mask_id
    assert where.any(1).all()
    denoised = denoiser(tokens, where)
    assert denoised.log_probs is None
    played = Unmasking(task, denoiser).rollout(reference("margin"), task.sample(4, torch.Generator().manual_seed(2)))
    assert not (played.tokens == task.mask_id).any()
    assert denoised.hidden.shape == (8, 12, 16)
    for row, board in enumerate(tokens):
        real = board != task.pad_id
        alone = logits_of(denoiser, torch.where(board[real] == task.mask_id, 3, board[real]).unsqueeze(0), None)[0]
        alone[:, 3] = -torch.inf
        log_probs = alone.log_softmax(-1)[where[row][real]]
        values, symbols = log_probs.topk(16, -1)
        torch.testing.assert_close(denoised.top_log_probs[row, where[row]], values, rtol=0, atol=1e-5)
        assert torch.equal(denoised.top_symbols[row, where[row]][:, 0], symbols[:, 0])
        entropy = -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1)
        torch.testing.assert_close(denoised.entropy[row, where[row]], entropy, rtol=0, atol=1e-4)
    assert (denoised.entropy[~where] == 0).all()
    everywhere = denoiser(tokens)
    torch.testing.assert_close(everywhere.top_log_probs[where], denoised.top_log_probs[where])
    real = tokens != task.pad_id
    assert (everywhere.entropy[real] > 0).all(), "without positions, of all of them"


def test_an_answer_may_hold_the_token_of_padding(tmp_path):
    """Where it is the token of the end, too: what is behind it is no padding, and stays where it is."""
    words = tokenizer()
    words.pad_token = words.eos_token
    task = MathWord("sample", words, answer_length=6)
    denoiser = HFDenoiser(build("bert-long", tmp_path / "bert"), task)
    instances = task.heldout()
    tokens = instances.tokens.clone()
    tokens[:, task.prompt_length + 2] = task.pad_id
    found = denoiser(tokens).log_probs
    for row, each in enumerate(tokens):
        start = int((each != task.pad_id).long().argmax())
        alone = torch.where(each[start:] == task.mask_id, denoiser.mask_id, each[start:]).unsqueeze(0)
        expected = logits_of(denoiser, alone, None)[0, :, : task.vocab_size]
        expected[:, denoiser.mask_id] = -torch.inf
        torch.testing.assert_close(found[row, start:], expected.log_softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["Camembert", "MPNet", "Esm", "Roberta"])
def test_the_context_of_models_that_count_positions_from_behind_the_paddings(kind, tmp_path):
    config, model = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}ForMaskedLM")
    model(config(**SMALL, mask_token_id=3)).save_pretrained(tmp_path)
    words = tokenizer()
    with pytest.raises(IncompatibleDenoiserError, match=r"have 24 positions, the context of .* 2[23]"):
        HFDenoiser(str(tmp_path), Lines(LINES, words, length=24))
    HFDenoiser(str(tmp_path), Lines(LINES, words, length=22))


def test_logits_of_the_next_position_are_shifted_back(tmp_path):
    """The Dream-type model is the LLaDA-type one with its logits rolled by one position."""
    task = Lines(LINES, tokenizer(), length=12)
    plain = HFDenoiser(build("own", tmp_path / "own"), task, trust_remote_code=True)
    shifted = HFDenoiser(build("own-shifted", tmp_path / "next"), task, trust_remote_code=True, shifted=True)
    assert (plain.shifted, shifted.shifted) == (False, True)
    tokens = task.sample(4, torch.Generator().manual_seed(1)).tokens
    a, b = plain(tokens).log_probs, shifted(tokens).log_probs
    rows, columns = (tokens != task.pad_id).nonzero(as_tuple=True)
    rows, columns = rows[columns > 0], columns[columns > 0]  # nothing precedes the first
    torch.testing.assert_close(a[rows, columns], b[rows, columns])
    unshifted = HFDenoiser(str(tmp_path / "next"), task, trust_remote_code=True, shifted=False)
    assert (unshifted(tokens).log_probs[rows, columns] - a[rows, columns]).nan_to_num().abs().max() > 0.1


def test_evaluation_does_not_depend_on_the_batch(model):
    name, path = model
    task = Lines(LINES, tokenizer())
    denoiser = HFDenoiser(path, task, **options(name))
    instances = task.sample(12, torch.Generator().manual_seed(2))
    orders = {name: reference(name) for name in ("max_confidence", "left_to_right")}
    single, many = (compare(Unmasking(task, denoiser), orders, instances, batch=batch) for batch in (1, 64))
    for a, b in zip(single, many, strict=True):
        assert all(torch.equal(a.metrics[key], b.metrics[key]) for key in a.metrics)
        assert a.nfe == b.nfe
    whole = rollout(task, denoiser, orders["max_confidence"], instances)
    for row in range(len(instances)):
        alone = rollout(task, denoiser, orders["max_confidence"], instances[row : row + 1])
        assert torch.equal(alone.state.tokens[0], whole.state.tokens[row])
    kept = instances.tokens != task.mask_id
    assert torch.equal(whole.state.tokens[kept], instances.tokens[kept]), "only holes are written to"


def test_by_name_in_an_environment(tmp_path):
    path = build("albert", tmp_path / "m")
    tokenizer(path)
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    env = gymnasium.make(
        "Unmask/Sudoku4x4-v0",
        task=f"lines:{tmp_path / 'lines.txt'},tokenizer={path},length=12",
        denoiser=f"hf:{path}",
    )
    _, info = env.reset(seed=0)
    done = False
    while not done:
        action = int(info["action_mask"].argmax())
        _, reward, done, _, info = env.step(action)
    assert 0 <= reward <= 1


def test_prompts_are_given_and_answers_hidden():
    task = Lines(["a b \tc d e"] * 20, tokenizer(), hide=1.0)
    instances = task.heldout(split="test")
    assert task.draw(instances.tokens[0]) == "<s> a b _ _ _ </s>"
    assert task.draw(instances.answers[0]) == "<s> a b c d e </s>"
    task = Lines(["a \tb\t c\t d \te"] * 20, tokenizer(), hide=1.0)
    assert task.draw(task.heldout(split="test").tokens[0]) == "<s> a _ c _ e </s>"


def test_the_mask_is_the_tokenizers(tmp_path, caplog):
    path = build("bert", tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())

    def denoiser(told, in_config):
        (tmp_path / "bert" / "config.json").write_text(json.dumps(config | {"mask_token_id": in_config}))
        words = tokenizer()
        words.mask_token = told
        return HFDenoiser(path, Lines(LINES, words))

    assert denoiser("<mask>", 0).mask_id == 3
    assert f"is 3 by the tokenizer and 0 by the configuration of {path}; 3 is used" in caplog.text
    caplog.clear()
    assert denoiser("<mask>", None).mask_id == denoiser("<mask>", 3).mask_id == denoiser(None, 3).mask_id == 3
    assert caplog.text == ""
    for wrong in (10, -1, 10**9):
        with pytest.raises(IncompatibleDenoiserError, match=f"None by the tokenizer and {wrong} by .* between 0 and 9"):
            denoiser(None, wrong)


def test_a_pickle_of_weights_is_not_read(tmp_path):
    path = build("bert", tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(
        UnmaskError, match=r"it has no model.safetensors, .* docs/models.md says how to convert"
    ) as raised:
        HFDenoiser(path, Lines(LINES, tokenizer()))
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *_, **__: {}["weights\nand more"], r"fails on 2 x 9 tokens: KeyError"),
        (lambda *_, **__: torch.ones(2) @ torch.ones(3), r"fails on 2 x 9 tokens: RuntimeError"),
        (lambda *_, **__: None, r"fails on 2 x 9 tokens: AttributeError"),
        (
            lambda *_, **__: types.SimpleNamespace(logits=torch.zeros(2, 9, 5)),
            r"shape \(2, 9, 5\); \(2, 9, at least 10",
        ),
        (lambda *_, **__: types.SimpleNamespace(logits=torch.zeros(1, 9, 10)), r"shape \(1, 9, 10\)"),
    ],
)
def test_errors_in_a_models_forward_are_one_line(tmp_path, monkeypatch, answer, message):
    path = build("bert", tmp_path / "bert")
    task = Lines(LINES, tokenizer())
    denoiser = HFDenoiser(path, task)
    monkeypatch.setattr(denoiser.model, "forward", answer)
    with pytest.raises(UnmaskError, match=message) as raised:
        denoiser(task.heldout(2).tokens)
    assert len(str(raised.value).splitlines()) == 1
    assert path in str(raised.value)


def test_tokenizers_without_offsets(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *"ABCDE", "<mask>"]))
    words = transformers.EsmTokenizer(str(tmp_path / "vocab.txt"))
    assert not words.is_fast
    task = Lines(["AB CD"] * 5, words, hide=1.0)
    assert task.draw(task.heldout(1).tokens[0]) == "<cls> _ _ _ _ <eos>"
    assert task.heldout(1).answers[0].tolist() == words("AB CD")["input_ids"]
    task = Lines(["AB \tCD\t E\tA"] * 5, words, hide=1.0)
    assert task.draw(task.heldout(1).tokens[0]) == "<cls> A B _ _ E _ <eos>"
    with pytest.raises(UnmaskError, match="line 2 has nothing to hide"):
        Lines(["A", "B\t", "C"], words)
    torch.manual_seed(0)
    sizes = {key: value for key, value in SMALL.items() if key != "initializer_range"}
    config = transformers.EsmConfig(**sizes, mask_token_id=9, position_embedding_type="rotary")
    transformers.EsmForMaskedLM(config).save_pretrained(tmp_path / "esm")
    task = Lines(["ABCD", "EEE", "AB"] * 5, words)
    played = rollout(task, HFDenoiser(str(tmp_path / "esm"), task), reference("margin"), task.heldout(1))
    assert (played.tokens != task.mask_id).all()


def test_wrong_input_is_one_clear_error(tmp_path, monkeypatch):
    path, words = build("bert", tmp_path / "bert"), tokenizer()
    task = Lines(LINES, words)
    with pytest.raises(IncompatibleDenoiserError, match=r"positions, the context of .* 24"):
        HFDenoiser(path, Lines(LINES, words, length=40))
    torch.manual_seed(0)
    bare = transformers.BertModel(transformers.BertConfig(**SMALL))
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(IncompatibleDenoiserError, match="lacks weights of a masked language model, cls"):
        HFDenoiser(str(tmp_path / "bare"), task)
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=10, n_embd=16, n_layer=1, n_head=2, n_positions=24)
    ).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(IncompatibleDenoiserError, match="gpt2 without a head for masked tokens"):
        HFDenoiser(str(tmp_path / "gpt2"), task)
    with pytest.raises(UnmaskError, match="trust_remote_code=True"):
        HFDenoiser(build("own", tmp_path / "own"), task)
    with pytest.raises(UnmaskError, match="cannot read the model"):
        HFDenoiser(str(tmp_path / "nothing"), task)
    with pytest.raises(UnmaskError, match="dtype must be"):
        HFDenoiser(path, task, dtype="int8")
    with pytest.raises(UnmaskError, match=r"takes source, .*not speed"):
        load_denoiser(f"hf:{path},speed=2", task)
    with pytest.raises(UnmaskError, match="must be hf:SOURCE"):
        load_denoiser("hf:dtype=float32", task)
    without = tokenizer()
    without.mask_token = None
    with pytest.raises(IncompatibleDenoiserError, match="no mask token"):
        HFDenoiser(path, Lines(LINES, without))
    unpadded = tokenizer()
    unpadded.pad_token = None
    with pytest.raises(UnmaskError, match="no padding token"):
        Lines(LINES, unpadded)
    with pytest.raises(UnmaskError, match="line 5 has 9 tokens, more than the length of 6"):
        Lines(LINES, words, length=6)
    with pytest.raises(UnmaskError, match="line 2 has nothing to hide"):
        Lines(["a", "b\t", "c", "d"], words)
    with pytest.raises(UnmaskError, match="task 'lines' needs source and tokenizer"):
        tasks.get("lines")
    with pytest.raises(UnmaskError, match="at least 3 lines"):
        Lines(["a", "b"], words)
    for content, message in ((b"", "is empty"), (b"\xff\xfe a", "UTF-8")):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(UnmaskError, match=message):
            Lines(str(tmp_path / "bad.txt"), str(tmp_path / "no tokenizer"))  # told before that is looked for
    (tmp_path / "bad.txt").write_text("a\n\n\nb\n\nc\nb\t\n")
    with pytest.raises(UnmaskError, match="line 7 has nothing to hide"):
        Lines(str(tmp_path / "bad.txt"), words)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnmaskError, match=r"pip install 'unmask\[text\]'"):
        HFDenoiser(path, task)


class Tokens:
    """A line of ``length`` tokens of a model, for what needs a task's sizes alone."""

    name = "tokens"

    def __init__(self, vocab_size, length):
        self.vocab_size, self.length, self.mask_id = vocab_size, length, vocab_size


@pytest.mark.parametrize("name", ["llada-tiny", "llada-tiny-gqa", "dream-tiny"])
def test_a_published_checkpoint_gives_the_logits_of_its_own_code(name):
    """Its own code is not run, which its configuration names and the folder does not hold."""
    known = {key: torch.tensor(value) for key, value in np.load(FIXTURES / name / "expected.npz").items()}
    logits, tokens = known["logits"], known["tokens"]
    vocab_size = logits.shape[-1]
    denoiser = HFDenoiser(FIXTURES / name, Tokens(vocab_size, tokens.shape[1]))
    assert denoiser.masks_padding
    if denoiser.shifted:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    torch.testing.assert_close(logits_of(denoiser, tokens, None), logits, rtol=0, atol=1e-5)
    logits[..., denoiser.mask_id] = -torch.inf
    seen = denoiser(torch.where(tokens == denoiser.mask_id, vocab_size, tokens), torch.ones_like(tokens, dtype=bool))
    values, _ = logits.log_softmax(-1).topk(16, -1)
    torch.testing.assert_close(seen.top_log_probs, values, rtol=0, atol=1e-5)
    short = known["short_tokens"]
    padded = torch.cat([short, torch.zeros(1, tokens.shape[1] - short.shape[1], dtype=torch.int64)], 1)
    real = torch.arange(tokens.shape[1]).unsqueeze(0) < short.shape[1]
    expected = known["short_logits"]
    if denoiser.shifted:
        expected = torch.cat([expected[:, :1], expected[:, :-1]], 1)
    found = logits_of(denoiser, padded, real)[:, : short.shape[1]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_attention_in_blocks_sees_its_own_block_and_those_before(tmp_path):
    denoiser = HFDenoiser(build("sdar", tmp_path), Tokens(10, 12))
    ids = torch.randint(4, 10, (1, 12), generator=torch.Generator().manual_seed(1))
    later, within = ids.clone(), ids.clone()
    later[0, 8:] = 3
    within[0, 7] = 3
    before = logits_of(denoiser, ids, None)
    assert torch.equal(logits_of(denoiser, later, None)[:, :8], before[:, :8])
    assert not torch.allclose(logits_of(denoiser, within, None)[:, 4], before[:, 4])
    assert torch.equal(logits_of(denoiser, within, None)[:, :4], before[:, :4])


LLADA_8B = {
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
}
DREAM_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
}


@pytest.mark.parametrize(
    ("name", "sizes", "parameters", "weights"),
    [("llada", LLADA_8B, 8_015_581_184, 3 + 32 * 9), ("dream", DREAM_7B, 7_615_616_512, 3 + 28 * 12)],
)
def test_the_published_sizes_have_the_published_weights(name, sizes, parameters, weights):
    """Built without memory: names and shapes of all weights of LLaDA-8B and Dream-7B."""
    config, family = published(name, **sizes), FAMILIES[name]
    with torch.device("meta"):
        model = getattr(transformers, family.architecture)(configure(family, config, name))
    shapes = {key: tuple(weight.shape) for key, weight in published_weights(family, model).items()}
    assert (len(shapes), sum(p.numel() for p in model.parameters())) == (weights, parameters)
    wide, inner, vocab_size = (4096, 12288, 126464) if name == "llada" else (3584, 18944, 152064)
    if name == "llada":
        assert shapes["model.transformer.blocks.31.ff_proj.weight"] == (inner, wide)
        assert shapes["model.transformer.blocks.0.ff_out.weight"] == (wide, inner)
        assert shapes["model.transformer.wte.weight"] == shapes["model.transformer.ff_out.weight"] == (vocab_size, wide)
        assert {re.sub(r"\.\d+\.", ".0.", key) for key in shapes} == set(llada_names())
    else:
        assert shapes["model.layers.27.self_attn.k_proj.bias"] == (512,)
        assert shapes["model.layers.0.mlp.down_proj.weight"] == (wide, inner)
        assert shapes["lm_head.weight"] == (vocab_size, wide)


def llada_names():
    with safetensors.safe_open(FIXTURES / "llada-tiny" / "model.safetensors", "pt") as file:
        return [key for key in file.keys() if ".blocks." not in key or ".blocks.0." in key]  # noqa: SIM118


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alibi": True}, "alibi=True"),
        ({"block_type": "sequential"}, "block_type='sequential'"),
        ({"d_model": None}, "configuration"),
        ({"n_heads": "many"}, "configuration"),
        ({"num_experts": 64}, "trust_remote_code"),
    ],
)
def test_variants_that_cannot_be_computed_are_one_line(change, message, tmp_path):
    path = Path(build("llada", tmp_path / "model"))
    config = json.loads((path / "config.json").read_text()) | change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnmaskError, match=message) as refused:
        HFDenoiser(path, Tokens(10, 12))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("fault", ["missing", "left over", "shape"])
def test_every_weight_has_its_place(fault, tmp_path):
    path = Path(build("llada", tmp_path / "model"))
    weights = safetensors.torch.load_file(path / "model.safetensors")
    if fault == "missing":
        del weights["model.transformer.blocks.1.k_proj.weight"]
    elif fault == "left over":
        weights["model.transformer.blocks.1.k_proj.bias"] = torch.zeros(8)
    else:
        weights["model.transformer.wte.weight"] = torch.zeros(11, 16)
    safetensors.torch.save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnmaskError, match=r"k_proj|wte|embed_tokens|size") as refused:
        HFDenoiser(path, Tokens(10, 12))
    assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by a name that it will drop
def test_an_adapter_is_merged(tmp_path):
    peft = pytest.importorskip("peft")
    path = build("llada", tmp_path / "model")
    base = HFDenoiser(path, Tokens(10, 12))
    ids = torch.randint(4, 10, (2, 12), generator=torch.Generator().manual_seed(1))
    plain = logits_of(base, ids, None)
    adapted = peft.get_peft_model(base.model, peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    expected = adapted(input_ids=ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    found = logits_of(HFDenoiser(path, Tokens(10, 12), adapter=str(tmp_path / "adapter")), ids, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, plain)
    with pytest.raises(UnmaskError, match="cannot read the adapter"):
        HFDenoiser(path, Tokens(10, 12), adapter=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("bert", {"num_hidden_layers": 10**6}, "has num_hidden_layers=1000000; at most 1000 is read"),
        ("bert", {"num_labels": 10**9}, "has num_labels=1000000000; at most 1000"),
        ("bert", {"inner": {"n_experts": 1e300}}, "has n_experts=1e+300; at most 1000"),
        ("bert", {"num_attention_heads": 10**9}, "num_attention_heads=1000000000; at most"),
        ("bert", {"num_hidden_layers": float("nan")}, "has num_hidden_layers=nan; at most"),
        ("llada", {"n_layers": 10**6}, "has n_layers=1000000; at most 1000"),
        ("llada", {"d_model": 10**9}, "its weights are not of the sizes that its configuration says"),
        ("llada", {"d_model": 2**40}, "cannot read the model"),
        ("llada", {"n_heads": 0}, "is not valid"),
        ("sdar", {"block_size": 0}, "has block_size=0 in its configuration"),
        ("sdar", {"block_size": "4"}, "has block_size='4' in its configuration"),
        ("sdar", {"rope_scaling": [1]}, "is not valid: 'list' object is not a mapping"),
        ("dream", {"num_hidden_layers": "2"}, "is not valid"),
    ],
)
def test_crafted_configurations_are_refused_at_once(tmp_path: Path, name: str, changes: dict, said: str) -> None:
    folder = Path(build(name, tmp_path))
    published = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(published | changes))
    with pytest.raises(UnmaskError) as caught:
        HFDenoiser(folder, Lines(LINES, tokenizer(), length=12))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"[" * 10**5, b"[]", b"5", b"null", b"{", b"\xff\xfe", b'{"a":' + b"9" * 5000 + b"}"]
)
def test_damaged_configurations_are_one_line(tmp_path: Path, content: bytes) -> None:
    folder = Path(build("bert", tmp_path))
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UnmaskError, match="cannot read the model"):
        HFDenoiser(folder, Lines(LINES, tokenizer(), length=12))


@pytest.mark.parametrize("name", ["bert", "llada"])
def test_weights_that_are_no_finite_numbers_are_refused(tmp_path: Path, name: str) -> None:
    folder = Path(build(name, tmp_path))
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    largest = max(stored, key=lambda key: stored[key].numel())
    damaged = {"nan": stored[largest] * float("nan"), "inf": stored[largest] / 0}
    for value in damaged.values():
        safetensors.torch.save_file(stored | {largest: value}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UnmaskError, match="holds values that are no finite numbers"):
            HFDenoiser(folder, Lines(LINES, tokenizer(), length=12))
    for kind, called in ((torch.int32, "I32"), (torch.bool, "BOOL")):
        value = stored[largest].to(kind)
        safetensors.torch.save_file(stored | {largest: value}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UnmaskError, match=f"holds {called}, no floating numbers"):
            HFDenoiser(folder, Lines(LINES, tokenizer(), length=12))
