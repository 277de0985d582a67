"""The model ``unmask`` of the lm-evaluation-harness (library ``lm_eval``): a masked language model filled in any order.

    python -m agents.lm_eval --model unmask --tasks gsm8k --batch_size 16 \\
        --model_args denoiser=hf:GSAI-ML/LLaDA-8B-Instruct,order=threshold:theta=0.9,block_length=32

This is the harness's own command with the model registered. Versions of the harness that look for plugins (not yet
0.4.13) find it by its entry point under ``lm_eval`` itself.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from agents.policy import LearnedPolicy, load_policy
from pretrain.masking import plackett_luce
from tasks import Instances, Task, UnmaskError
from tasks.errors import MissingLibraryError, first_line, optional
from tasks.math_word import ENDS_OF_TURN
from tasks.settings import AtLeast1, Seed, Temperature, checked
from tasks.tokenizers import all_tokens, load_tokenizer
from unmask_env.denoiser import HUGGING_FACE, load_denoiser
from unmask_env.language_models import HFDenoiser
from unmask_env.process import Unmasking
from unmask_env.reference import NO_ORDER, REFERENCES, Learned, LearnedGreedy, Policy, reference
from unmask_env.state import Rules, State

try:
    with optional("the model unmask of lm-evaluation-harness", "unmask[eval]"):
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
        from tqdm import tqdm
except MissingLibraryError as missing:
    if __name__ != "__main__":
        raise
    print(f"unmask: {missing}", file=sys.stderr)
    sys.exit(2)

Likelihood = Literal["bound", "left_to_right", "one_forward"]
GENERATED = 256  # tokens, where neither the task nor the user says how many
CONTEXT = 4096  # tokens, of models that do not say how many they take


class Prompts(Task):
    """Prompts, padded on their left to one length, and holes behind them."""

    name, pad_side, one_answer = "prompts", "left", False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.symbols, self.pad_id = tokenizer, all_tokens(tokenizer), int(tokenizer.pad_token_id)
        self.shape = (1, 32)  # a denoiser is tried out at this length when it is loaded

    def of(self, prompt_length: int, holes: int) -> Prompts:
        """The same task with prompts and answers of other lengths."""
        sized = copy.copy(self)
        sized.prompt_length, sized.shape = prompt_length, (1, prompt_length + holes)
        return sized

    def instances(self, prompts: Sequence[Sequence[int]]) -> Instances:
        """``prompts``, padded on the left, each with all of its answer masked: (N, L)."""
        rows = [[self.pad_id] * (self.prompt_length - len(prompt)) + [*prompt] for prompt in prompts]
        given = torch.tensor(rows, dtype=torch.int64).view(len(rows), -1)
        return self.behind_prompt(torch.nn.functional.pad(given, (0, self.length - given.shape[1])))

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        raise UnmaskError("the prompts are the harness's; none can be drawn")

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return torch.zeros(len(tokens), device=tokens.device)  # the harness judges


def masks_to_score(kind: Likelihood, length: int, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What to mask of ``length`` tokens to score them, (R, length) bool, and weights (R, length) float64: the score is
    the sum of weights times log-probabilities given what is not masked.

    ``bound``: minus the unbiased estimate of :func:`pretrain.likelihood.bound` of masked diffusion, of the same draws;
    LLaDA's evaluation (arXiv 2502.09992, algorithm 3) is of the same expectation. ``left_to_right``: each token given
    those before it, so the log-probability that filling from left to right draws them. ``one_forward``: all of them in
    one forward, each as if it were the only one; no log-probability of the whole.
    """
    if kind == "left_to_right":
        masked = torch.ones(length, length, dtype=torch.bool).triu()
        return masked, torch.eye(length, dtype=torch.float64)
    if kind == "one_forward":
        return torch.ones(1, length, dtype=torch.bool), torch.ones(1, length, dtype=torch.float64)
    rows = []
    for sample in range(samples):
        uniform = torch.rand(1, generator=generator)
        revealed = ((sample + uniform) * length / samples).long().clamp(max=length - 1)
        rows.append(plackett_luce(torch.ones(1, length, dtype=torch.float64), generator) >= revealed.unsqueeze(1))
    masked = torch.cat(rows)
    return masked, masked.double() * length / (samples * masked.sum(1, keepdim=True))


class Asked(NamedTuple):
    """One request to generate: where it stands among them, its prompt, and the seed of its draws."""

    number: int
    prompt: list[int]
    seed: int


class Row(NamedTuple):
    """One forward to score a continuation: of which request, what is given, what is masked, and the weights (k,)."""

    number: int
    given: list[int]
    answer: list[int]
    masked: Tensor
    weights: Tensor


@register_model("unmask")
class UnmaskLM(TemplateLM):
    """A masked (diffusion) language model of ``transformers``, filled by a reference or a trained policy.

    A request's answer does not depend on which requests it shares a batch with, up to the rounding of the model's
    precision: prompts are padded and the padding is hidden, and what is drawn is drawn per request. Rules that draw,
    and filling above temperature 0, are therefore played one request at a time.

    Args:
        denoiser: ``hf:`` and a folder or hub id, with options as everywhere (in JSON, where commas separate
            arguments). Its tokenizer is read from the same place, unless ``tokenizer`` names another.
        order: a reference policy with its options, or a trained one. One that is a network is for sequences of one
            length: prompts are padded to what it leaves beside the answer, and cut on their left where they are longer.
        block_length: the answer is filled block by block of so many tokens, and no further than the block in which it
            stops; None: as one.
        likelihood: see :func:`masks_to_score`. samples: masks per continuation, for ``bound``.
        temperature: of filling, for tasks that do not say.
        max_gen_toks: tokens of an answer, for tasks that do not say. max_length: of prompt and answer; default: the
            model's context. Longer prompts lose their beginning.
        seed: of all draws, together with what is asked.
        device, batch_size, max_batch_size: the harness's.

    Raises:
        UnmaskError: a denoiser without a tokenizer, an order that sees answers or does not fit, a setting that is not
            allowed.
    """

    @checked
    def __init__(
        self,
        denoiser: str,
        order: str = "max_confidence",
        block_length: AtLeast1 | None = None,
        likelihood: Likelihood = "bound",
        samples: AtLeast1 = 128,
        temperature: Temperature = 0.0,
        max_gen_toks: AtLeast1 = GENERATED,
        max_length: AtLeast1 | None = None,
        tokenizer: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        seed: Seed = 0,
        device: str | None = None,
        batch_size: Any = 1,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        if not denoiser.startswith(HUGGING_FACE):
            raise UnmaskError(f"denoiser must be hf:FOLDER_OR_ID, a model with a tokenizer, not {denoiser!r}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UnmaskError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
        source = denoiser.removeprefix(HUGGING_FACE).partition(",")[0].strip('"')
        self.tokenizer = load_tokenizer(tokenizer or source, trust_remote_code, pads=True)
        self.task = Prompts(self.tokenizer)
        more = {"dtype": dtype, "trust_remote_code": str(trust_remote_code).lower() if trust_remote_code else None}
        named = ",".join([denoiser, *(f"{name}={value}" for name, value in more.items() if value is not None)])
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            logging.getLogger(__name__).warning(
                "there is no CUDA here, which the harness's command asks for; using cpu"
            )
            device = "cpu"
        self.denoiser: HFDenoiser = load_denoiser(named, self.task, device or "cpu")
        self.policy = _order(order, self.task, self.denoiser)
        self.rules = Rules(actions=self.policy.actions, block_length=block_length)
        self.order, self.likelihood, self.samples, self.seed = order, likelihood, samples, seed
        self.temperature, self.max_gen_toks, self.batch_size = temperature, max_gen_toks, int(batch_size)
        context = self.denoiser.context or CONTEXT
        self.max_length = min(max_length or context, context)
        if isinstance(self.policy, LearnedPolicy):
            self.max_length = min(self.max_length, self.policy.length)
        self._device = self.denoiser.device
        self._ends = {self.eot_token_id, *map(self.task.symbols.index, {*ENDS_OF_TURN} & {*self.task.symbols})}
        alone, among = self.tokenizer.encode("a", add_special_tokens=False), self.tokenizer.encode("a")
        self._begins = next((among[:at] for at in range(len(among)) if among[at : at + len(alone)] == alone), [])
        self._forwards: list[int] = []  # of every answer so far

    # ------------------------------------------------------------------ text
    @property
    def eot_token_id(self) -> int:
        end = self.tokenizer.eos_token_id
        return self.task.pad_id if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context. Where it is the token of padding, nothing does."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of ``string``, behind those that the tokenizer begins a text with, unless it has them already."""
        begins = string.startswith(self.tokenizer.bos_token or "\0") or add_special_tokens is False
        return ([] if begins else self._begins) + self.tokenizer.encode(string, add_special_tokens=False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # templates are programs, in as many forms as there are models
            raise UnmaskError(f"the tokenizer's chat template fails: {first_line(error)}") from None

    def _text(self, tokens: Sequence[int], stops: Sequence[str]) -> tuple[str, bool]:
        """The text up to its first end token or stop string, without special tokens; and whether it has either."""
        kept = [*itertools.takewhile(lambda token: token not in self._ends, tokens)]
        text = self.tokenizer.decode([token for token in kept if token != self.task.mask_id])
        cut = min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))
        stopped = len(kept) < len(tokens) or cut < len(text)
        text = text[:cut]
        for special in self.tokenizer.all_special_tokens:
            text = text.replace(special, "")
        return text, stopped

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        forwards = sum(self._forwards) / len(self._forwards) if self._forwards else None
        likelihood = f"{self.likelihood}, {self.samples} samples" if self.likelihood == "bound" else self.likelihood
        return {"unmask_order": self.order, "unmask_forwards_per_answer": forwards, "unmask_likelihood": likelihood}

    # ------------------------------------------------------------------ filling
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text of each request's answer, up to where it stops."""
        groups: dict[tuple[int, float, tuple[str, ...]], list[Asked]] = {}
        repeats: Counter[str] = Counter()
        for number, (context, said) in enumerate(request.args for request in requests):
            options = normalize_gen_kwargs(said, self.max_gen_toks)
            warm = options["temperature"] if "temperature" in said or "do_sample" in said else self.temperature
            stops = handle_stop_sequences(options["until"], None)
            holes = options["max_gen_toks"]
            prompt = self._cut(self.tok_encode(context), holes)
            seed = self._seed("generate", prompt, repeats[context])  # a question that is asked again draws anew
            repeats[context] += 1
            groups.setdefault((holes, float(warm), tuple(stops)), []).append(Asked(number, prompt, seed))
        texts = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="unmask: generate_until")
        for (holes, temperature, stops), group in groups.items():
            group.sort(key=lambda asked: -len(asked.prompt))
            for some in _batched(group, 1 if self._draws(temperature) else self.batch_size):
                filled, steps = self._fill([asked.prompt for asked in some], holes, temperature, stops, some[0].seed)
                self._forwards += steps.tolist()
                for asked, tokens in zip(some, filled.tolist(), strict=True):
                    texts[asked.number] = self._text(tokens, stops)[0]
                    self.cache_hook.add_partial("generate_until", requests[asked.number].args, texts[asked.number])
                bar.update(len(some))
        bar.close()
        return texts

    def _cut(self, prompt: list[int], holes: int) -> list[int]:
        if holes >= self.max_length:
            raise UnmaskError(
                f"an answer of {holes} tokens leaves no room for a prompt in {self.max_length}; take a smaller "
                "max_gen_toks, in --gen_kwargs or the task"
            )
        return prompt[-(self.max_length - holes) :]

    def _seed(self, *what: Any) -> int:
        digest = hashlib.sha256(json.dumps([self.seed, *what]).encode()).digest()
        return int.from_bytes(digest[:7], "big")

    def _draws(self, temperature: float) -> bool:
        """Whether filling at ``temperature`` draws anything. Ties of a deterministic rule go to the lowest position."""
        return temperature > 0 or (self.policy.sampled and not self.policy.deterministic)

    @torch.no_grad()
    def _fill(
        self, prompts: Sequence[Sequence[int]], holes: int, temperature: float, stops: Sequence[str], seed: int
    ) -> tuple[Tensor, Tensor]:
        """(N, holes) tokens behind ``prompts``, and (N,) forwards. Rows end once they are complete, or stop within
        complete blocks: what is behind those is left as masks. Rows draw from one stream, so several may not."""
        learned = isinstance(self.policy, LearnedPolicy)
        width = self.policy.length - holes if learned else max(map(len, prompts))
        task = self.task.of(width, holes)
        rules = Rules(self.rules.actions, nfe_budget=2 * holes, block_length=self.rules.block_length)
        process = Unmasking(task, self.denoiser, rules, temperature)
        deciding, filling = (torch.Generator(self.device).manual_seed(seed + k) for k in range(2))
        generator = deciding if self._draws(0.0) else None
        state = process.reset(task.instances(prompts))
        rows = torch.arange(len(state), device=self.device)
        filled = torch.full((len(state), holes), task.mask_id, device=self.device)
        forwards, blocks = torch.zeros_like(rows), torch.zeros_like(rows)
        while len(state):
            seen = process.observe(state)
            state, _ = process.step(state, seen, self.policy(seen).act(generator), process.uniform(state, filling))
            blocks, stopped = self._stopped(state, width, blocks, stops)
            ended = state.done | stopped
            filled[rows[ended]], forwards[rows[ended]] = state.tokens[ended, width:], state.steps[ended]
            state, rows, blocks = state[~ended], rows[~ended], blocks[~ended]
        return filled, forwards

    def _stopped(self, state: State, width: int, before: Tensor, stops: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(N,) each: how many blocks are complete, ``before`` which step they were fewer, and whether those stop."""
        size = self.rules.block_length
        stopped = torch.zeros_like(state.done)
        if size is None:
            return before, stopped
        complete = (~state.masked[:, width:]).long().cumprod(1).sum(1) // size
        for row in (complete > before).nonzero().flatten().tolist():
            leading = state.tokens[row, width : width + int(complete[row]) * size].tolist()
            stopped[row] = self._text(leading, stops)[1]
        return complete, stopped

    # ------------------------------------------------------------------ scoring
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Per request the score of its continuation, and whether filling as many tokens gives just that."""
        pairs = [(self._kept(given, answer), answer) for _, given, answer in requests]
        totals = self._scores(pairs, disable_tqdm)
        greedy = self._would_fill(pairs)
        answers = [*zip(totals, greedy, strict=True)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _kept(self, given: list[int], answer: list[int]) -> list[int]:
        room = self.max_length - len(answer)
        if room < 0:
            raise UnmaskError(f"a continuation of {len(answer)} tokens does not fit into {self.max_length}")
        given = given[len(given) - min(room, len(given)) :]
        return given[next((at for at, token in enumerate(given) if token != self.task.pad_id), len(given)) :]

    def _rows(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[Row]:
        """The forwards that score ``pairs``, the longest first."""
        for number in sorted(range(len(pairs)), key=lambda number: -len(pairs[number][0] + pairs[number][1])):
            given, answer = pairs[number]
            if answer:
                generator = torch.Generator().manual_seed(self._seed("score", given, answer))
                masked, weights = masks_to_score(self.likelihood, len(answer), self.samples, generator)
                yield from (Row(number, given, answer, *row) for row in zip(masked, weights, strict=True))

    @torch.no_grad()
    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool = False) -> list[float]:
        totals = [0.0] * len(pairs)
        for some in _batched(tqdm(self._rows(pairs), disable=disable_tqdm, desc="unmask: forwards"), self.batch_size):
            width = max(len(row.given) + len(row.answer) for row in some)
            symbols = torch.full((len(some), width), self.task.pad_id)
            tokens, weights = symbols.clone(), torch.zeros(symbols.shape, dtype=torch.float64)
            for at, row in enumerate(some):
                text = torch.tensor(row.given + row.answer)
                symbols[at, width - len(text) :] = tokens[at, width - len(text) :] = text
                behind = slice(width - len(row.answer), width)
                tokens[at, behind] = text[len(row.given) :].masked_fill(row.masked, self.task.mask_id)
                weights[at, behind] = row.weights
            symbols, tokens, weights = (part.to(self.device) for part in (symbols, tokens, weights))
            log_probs = self.denoiser.log_prob_of(symbols, tokens, weights > 0)
            for row, score in zip(some, (weights * log_probs).sum(1).tolist(), strict=True):
                totals[row.number] += score
        return totals

    def _would_fill(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether the policy, drawing no symbols, fills each answer's positions with it."""
        greedy = [True] * len(pairs)
        by_length: dict[int, list[int]] = {}
        for number, (_, answer) in enumerate(pairs):
            if answer:
                by_length.setdefault(len(answer), []).append(number)
        for holes, numbers in by_length.items():
            for some in _batched(numbers, 1 if self._draws(0.0) else self.batch_size):
                seed = self._seed("greedy", *pairs[some[0]])
                filled, _ = self._fill([pairs[number][0] for number in some], holes, 0.0, (), seed)
                for number, tokens in zip(some, filled.tolist(), strict=True):
                    greedy[number] = tokens == pairs[number][1]
        return greedy

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The score of each text, in windows of ``max_length`` tokens where it is longer, as the harness cuts them."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, (string,) in enumerate(request.args for request in requests):
            cut = get_rolling_token_windows(
                self.tok_encode(string, add_special_tokens=False), self.prefix_token_id, self.max_length - 1, 1
            )
            pairs = [make_disjoint_window(window) for window in cut]
            windows += [(self._kept(given, answer), answer) for given, answer in pairs]
            owners += [number] * len(pairs)
        totals = [0.0] * len(requests)
        for number, score in zip(owners, self._scores(windows, disable_tqdm), strict=True):
            totals[number] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals


def _order(name: str, task: Task, denoiser: HFDenoiser) -> Policy:
    """Raises :class:`tasks.UnmaskError` where it sees answers, is the denoiser's own, or is for other symbols."""
    if name.partition(":")[0] in REFERENCES:
        policy: Policy = reference(name)
        if policy.sees_answers:
            raise UnmaskError(f"the order {name} sees the answers, which the harness keeps; take another")
        if isinstance(policy, Learned | LearnedGreedy):
            raise UnmaskError(NO_ORDER)
        return policy
    learned = load_policy(name, None, denoiser).to(denoiser.device)
    if learned.vocab_size != task.vocab_size:
        raise UnmaskError(
            f"order policy {name} is for {learned.vocab_size} symbols; the tokenizer has {task.vocab_size}"
        )
    return learned


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while some := [*itertools.islice(rest, size)]:
        yield some


def main() -> None:
    """The harness's command, with the model ``unmask``. A mistake in its settings is one line, and exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UnmaskError as error:
        print(f"unmask: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
