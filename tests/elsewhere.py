"""Tensors that say that they are on another device, and computation that minds: a GPU for machines that have none.

Within `elsewhere()`, what is moved to the device "meta" keeps its numbers, as a tensor that claims to be there. As on a
GPU, an operation with such a tensor and one of the CPU is an error, and so is `numpy()`, or a generator of the CPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

# The one device that is not the CPU and whose backward pass autograd runs without a driver.
ELSEWHERE = torch.device("meta")
# What takes tensors of both: a copy, and indices.
MIXED = {"copy_", "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
PLAIN = {"_local_scalar_dense", "equal"}  # what returns numbers
AUTOCAST = torch.autocast.__init__


class Elsewhere(Tensor):
    """A tensor that claims to be elsewhere; `here` is what it holds."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> "Elsewhere":
        about: dict[str, Any] = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, here.size(), dtype=here.dtype, device=ELSEWHERE, **about)
        made.here = here
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.here})"

    def __deepcopy__(self, memo: Any) -> "Elsewhere":
        return Elsewhere(self.here.detach().clone()).requires_grad_(self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    name = operation.overloadpacket.__name__
    given, spec = tree_flatten((args, kwargs))
    tensors = [x for x in given if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    others = [x for x in tensors if not isinstance(x, Elsewhere) and x.ndim]  # a number may come from anywhere
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if there and others and name not in MIXED:
        raise RuntimeError(f"{name}: {[*there[0].shape]} is elsewhere, {[*others[0].shape]} on the CPU")
    if kwargs.get("generator") is not None and (there or target == ELSEWHERE):
        raise RuntimeError(f"{name}: the generator is on the CPU")
    args_here, kwargs_here = tree_unflatten([x.here if isinstance(x, Elsewhere) else x for x in given], spec)
    if target is not None:
        kwargs_here |= {"device": torch.device("cpu")}
    found = operation(*args_here, **kwargs_here)
    if name in PLAIN or not (target == ELSEWHERE or (there and target is None)):
        return found
    if name.endswith("_") and isinstance(args[0], Tensor):  # in place
        return args[0]
    return tree_map(lambda x: Elsewhere(x) if isinstance(x, Tensor) else x, found)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What is no operation: tensors of numbers, and numbers of tensors."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == ELSEWHERE:
            return function(*args, **kwargs | {"device": "cpu"}).to(ELSEWHERE)
        if function is Tensor.numpy and isinstance(args[0], Elsewhere):
            raise TypeError("numpy() of a tensor that is elsewhere: call cpu() first")
        if function is Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].here.tolist()
        return function(*args, **kwargs)


def _autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
    AUTOCAST(self, "cpu" if device_type == ELSEWHERE.type else device_type, *args, **kwargs)


@contextmanager
def elsewhere() -> Iterator[None]:
    """Within this there is the device `ELSEWHERE`."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", _autocast))  # knows no such device
        stack.enter_context(_Functions())
        stack.enter_context(_Operations())
        yield


def moved(model: nn.Module) -> nn.Module:
    """The model with all that it holds elsewhere; what is tied stays tied."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None and id(value) not in found:
                    there = Elsewhere(value.detach().clone())
                    found[id(value)] = nn.Parameter(there) if isinstance(value, nn.Parameter) else there
                if value is not None:
                    held[name] = found[id(value)]  # type: ignore[index]
    return model
