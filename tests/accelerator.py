"""A pretended CUDA device: its tensors say ``cuda:0``, compute on the CPU, and refuse to mix with the CPU's.

It finds what a machine without a GPU does not show: a tensor, an index or a generator that was left on the CPU,
``.numpy()`` without ``.cpu()``, a matrix product of whole numbers. It says nothing of speed, memory or rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy, aten._copy_from, aten._copy_from_and_resize}  # from one device to another
INDEXES = {aten.index: (0,), aten.index_put_: (0, 2), aten.index_put: (0, 2), aten._unsafe_index: (0,)}
"""Operations whose indices may be the CPU's, where those of the other arguments that count are CUDA's."""
SCALARS = {aten.where, aten.masked_fill, aten.masked_fill_, aten.fill_, aten.index_fill, aten.index_fill_}
"""Operations beside the pointwise ones that take a CPU tensor of no dimensions as a number."""
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot}


class CudaTensor(Tensor):
    """``inner`` on the CPU, as if it were on CUDA."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> CudaTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CPU,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        require_one_device(func, args, kwargs)
        with default_generator(torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None):
            out = func(*tree_map(inner_of, args), **tree_map(inner_of, kwargs))
        if func.overloadpacket is aten.copy_ and not isinstance(args[0], CudaTensor):
            return args[0]
        out = tree_map(lambda value: CudaTensor(value) if isinstance(value, Tensor) else value, out)
        return return_and_correct_aliasing(func, args, kwargs, out)

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def get_device(self) -> int:
        return 0

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        return self.detach().inner.numpy()

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.detach().inner.tolist()

    def __repr__(self) -> str:
        return f"{self.detach().inner!r} on cuda:0"

    def __deepcopy__(self, memo: dict) -> CudaTensor:
        if id(self) not in memo:
            made = self.detach().clone().requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                made._is_param = True
            memo[id(self)] = made
        return memo[id(self)]


class CudaGenerator(torch.Generator):
    """A generator that knows for which device it draws."""

    def __new__(cls, device: Any = "cpu") -> CudaGenerator:
        made = super().__new__(cls, "cpu")
        made.of = CUDA if is_cuda(device) else CPU
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return self.of


class Move(torch.autograd.Function):
    """A copy on the other device; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cuda: bool) -> Tensor:
        ctx.back = isinstance(tensor, CudaTensor)
        copy = inner_of(tensor).detach().clone()
        return CudaTensor(copy) if cuda else copy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Move.apply(gradient, ctx.back), None


def inner_of(value: Any) -> Any:
    return value.inner if isinstance(value, CudaTensor) else value


def is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.partition(":")[0] == "cuda"


def require_one_device(func: Any, args: tuple, kwargs: dict) -> None:
    """Raises what CUDA raises where tensors or generators of two devices meet."""
    packet = func.overloadpacket
    counted = [args[at] for at in INDEXES[packet] if at < len(args)] if packet in INDEXES else (args, kwargs)
    tensors = [leaf for leaf in tree_leaves(counted) if isinstance(leaf, Tensor)]
    if packet not in COPIES:
        numbers = packet in SCALARS or packet in INDEXES or torch.Tag.pointwise in func.tags
        cuda = any(isinstance(tensor, CudaTensor) for tensor in tensors)
        left = [t for t in tensors if not isinstance(t, CudaTensor) and not (numbers and cuda and t.ndim == 0)]
        if left:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({func})")
    if packet in PRODUCTS and not tensors[0].dtype.is_floating_point:
        raise RuntimeError(f"{func} not implemented for {tensors[0].dtype} on CUDA")
    generator = kwargs.get("generator")
    if generator is not None and not is_cuda(generator.device):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")


@contextmanager
def default_generator(draws: bool) -> Iterator[None]:
    """CUDA's global stream in place of the CPU's, for what ``draws`` without a generator."""
    if not draws:
        yield
        return
    kept, cuda = torch.default_generator.get_state(), torch.cuda.default_generators[0]
    torch.default_generator.set_state(cuda.get_state())
    try:
        yield
    finally:
        cuda.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(kept)


class Factories(TorchDispatchMode):
    """Within an operation on CUDA tensors, and its gradient, what is made of nothing is on CUDA, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        given = any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        return CudaTensor(made) if isinstance(made, Tensor) and not given else made


class Devices(TorchFunctionMode):
    """Makes ``device="cuda"``, ``.to``, ``.cpu`` and ``.cuda`` mean the pretended device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("to", "cpu", "cuda") and isinstance(args[0], Tensor):
            return self.moved(name, func, args, kwargs)
        given, device = any(isinstance(value, CudaTensor) for value in args), kwargs.pop("device", None)
        cuda, generator = is_cuda(device) or (device is None and given), kwargs.get("generator")
        if generator is not None and is_cuda(generator.device) != cuda:
            raise RuntimeError(f"Expected a {'cuda' if cuda else 'cpu'!r} device type for generator ({name})")
        if device is None or (cuda and given):  # where the arguments are
            with Factories() if given else nullcontext():
                return func(*args, **kwargs)
        if not cuda:
            return func(*map(inner_of, args), **kwargs, device=device)
        requires_grad = kwargs.pop("requires_grad", False)
        with default_generator(name in FACTORIES_THAT_DRAW and generator is None):
            made = func(*args, **kwargs)
        return self.on(made, True).requires_grad_(requires_grad)

    @staticmethod
    def on(tensor: Tensor, cuda: bool) -> Tensor:
        return tensor if isinstance(tensor, CudaTensor) == cuda else Move.apply(tensor, cuda)

    def moved(self, name: str, func: Any, args: tuple, kwargs: dict) -> Tensor:
        """What ``.to``, ``.cpu`` and ``.cuda`` give: the tensor itself where there is nothing to do."""
        tensor, named = args[0], [*args[1:], *(kwargs.get(key) for key in ("device", "dtype", "other"))]
        if name in ("cpu", "cuda"):
            return self.on(tensor, name == "cuda")
        device = dtype = None
        for value in named:
            if isinstance(value, Tensor):
                device, dtype = value.device, value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, str | torch.device):
                device = torch.device(value)
        if device is not None and device.type == "meta":
            return func(inner_of(tensor), *args[1:], **kwargs)
        moved = tensor if device is None else self.on(tensor, is_cuda(device))
        moved = moved if dtype is None else func(moved, dtype)
        return moved.clone() if moved is tensor and kwargs.get("copy") else moved


FACTORIES_THAT_DRAW = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal"}


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Inside, this machine has one CUDA device."""
    draws = CudaGenerator("cuda").manual_seed(0)
    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "synchronize": lambda *_: None,
        "_lazy_init": lambda: None,
        "default_generators": (draws,),
    }
    autocast = torch.autocast
    imported = ("current_device", "device_count", "_lazy_init")  # by name, into the module of the generators
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that parameters stay who they are, as on CUDA
    try:
        with (
            patch.multiple(torch.cuda, **cuda),
            patch.multiple(torch.cuda.random, **{name: cuda[name] for name in imported}),
            patch.object(torch, "Generator", CudaGenerator),
            patch.object(torch, "autocast", lambda _, *args, **kwargs: autocast("cpu", *args, **kwargs)),
            Devices(),
        ):
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
