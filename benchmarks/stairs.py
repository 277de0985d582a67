"""A task with many right answers: eight digits that never fall and whose sum is given, two of them known. stairs.sh
trains a denoiser and order policies for it.
"""

import torch
from torch import Tensor

import tasks


class Stairs(tasks.Task):
    """``36:`` and then, for example, ``12245589``."""

    name, symbols, shape, prompt_length, one_answer = "stairs", (*"0123456789", ":"), (1, 11), 3, False

    def sample(self, n: int, generator: torch.Generator) -> tasks.Instances:
        digits = torch.randint(10, (n, 8), generator=generator, device=generator.device).sort(1).values
        total = digits.sum(1)
        prompt = torch.stack([total // 10, total % 10, torch.full_like(total, 10)], 1)
        answers = torch.cat([prompt, digits], 1)
        known = torch.rand(n, 8, generator=generator, device=generator.device).argsort(1) < 2
        given = torch.cat([torch.ones_like(prompt, dtype=torch.bool), known], 1)
        return tasks.Instances(answers.where(given, self.mask_id), answers)

    def reward(self, tokens: Tensor, instances: tasks.Instances) -> Tensor:
        digits, total = tokens[:, 3:], tokens[:, 0] * 10 + tokens[:, 1]
        return ((digits.diff(dim=1) >= 0).all(1) & (digits.sum(1) == total) & (digits < 10).all(1)).float()
