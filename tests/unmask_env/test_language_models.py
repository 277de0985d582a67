"""Models of transformers as denoisers: small random ones of each architecture, built here."""

import json
import sys
import types

import gymnasium
import pytest
import torch

import tasks
from agents.evaluate import compare
from tasks import IncompatibleDenoiserError, Lines, MathWord, UnmaskError
from tests.toys import rollout
from unmask_env.denoiser import load_denoiser
from unmask_env.language_models import HFDenoiser
from unmask_env.process import Unmasking
from unmask_env.reference import reference

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

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

# What LLaDA and Dream bring: a bidirectional Llama with rotary positions, in the repository's own code. As in LLaDA's
# release, the attention mask is taken and not heeded; as in Dream's, the logits at a position are of the next one.
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
        if self.config.model_type == "dream":
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


def build(name, path, vocab_size=10):
    """A small random model of an architecture, saved at ``path``."""
    torch.manual_seed(0)
    path.mkdir(exist_ok=True)
    if name in ("llada", "dream"):
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


ARCHITECTURES = ["bert", "albert", "roberta", "modernbert", "llada", "dream"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tmp_path_factory):
    return request.param, build(request.param, tmp_path_factory.mktemp(request.param))


def options(name):
    return {"trust_remote_code": name in ("llada", "dream")}


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_row_is_what_it_is_alone_whatever_is_beside_it(model, side):
    """Padding invariance: alone without padding, in one batch of all lengths, and padded on either side."""
    name, path = model
    task = Lines(LINES, tokenizer(), length=12, side=side)
    denoiser = HFDenoiser(path, task, hidden=True, **options(name))
    assert denoiser.masks_padding == (name not in ("llada", "dream"))
    instances = task.sample(16, torch.Generator().manual_seed(0))
    together = denoiser(instances.tokens)
    assert together.log_probs.shape == (16, 12, task.vocab_size)
    assert (together.log_probs[..., 3] == -torch.inf).all(), "the mask is no answer"
    for row, tokens in enumerate(instances.tokens):
        real = tokens != task.pad_id
        found = denoiser._forward(torch.where(tokens[real] == task.mask_id, 3, tokens[real]).unsqueeze(0), None)[0][0]
        found[:, 3] = -torch.inf
        expected = found.log_softmax(-1)
        finite = expected > -torch.inf
        torch.testing.assert_close(together.log_probs[row][real][finite], expected[finite], rtol=0, atol=1e-5)
    assert together.hidden.shape == (16, 12, 16)
    spread = together.log_probs[:, :, 5:].std()
    assert spread > 0.1, "the random model says something"


@pytest.mark.parametrize("name", ["bert", "llada", "dream"])
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
    assert denoised.hidden.shape == (8, 12, 16)
    for row, board in enumerate(tokens):
        real = board != task.pad_id
        alone = denoiser._forward(torch.where(board[real] == task.mask_id, 3, board[real]).unsqueeze(0), None)[0][0]
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
        expected = denoiser._forward(alone, None)[0][0, :, : task.vocab_size]
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
    plain = HFDenoiser(build("llada", tmp_path / "llada"), task, trust_remote_code=True)
    shifted = HFDenoiser(build("dream", tmp_path / "dream"), task, trust_remote_code=True)
    assert (plain.shifted, shifted.shifted) == (False, True)
    tokens = task.sample(4, torch.Generator().manual_seed(1)).tokens
    a, b = plain(tokens).log_probs, shifted(tokens).log_probs
    rows, columns = (tokens != task.pad_id).nonzero(as_tuple=True)
    rows, columns = rows[columns > 0], columns[columns > 0]  # nothing precedes the first
    torch.testing.assert_close(a[rows, columns], b[rows, columns])
    unshifted = HFDenoiser(str(tmp_path / "dream"), task, trust_remote_code=True, shifted=False)
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
    with pytest.raises(UnmaskError, match=r"cannot read the model .*safetensors") as raised:
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
        HFDenoiser(build("llada", tmp_path / "llada"), task)
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
