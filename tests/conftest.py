"""Settings for all tests."""

import gc

import torch
from hypothesis import settings

torch.set_num_threads(1)  # the tests' tensors are tiny, and the machine may be busy
settings.register_profile("unmask", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("check", settings.get_profile("unmask"), max_examples=15)  # of make check
settings.load_profile("unmask")


def pytest_collection_finish() -> None:
    """What the libraries have brought stays, so garbage is not looked for in it again."""
    gc.collect()
    gc.freeze()
