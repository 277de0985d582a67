"""Settings for all tests."""

import torch
from hypothesis import settings

torch.set_num_threads(1)  # the tests' tensors are tiny, and the machine may be busy
settings.register_profile("unmask", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("unmask")
