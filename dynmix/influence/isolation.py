"""A model as if nobody had touched it: everything that a measurement changes in it is put back.

Knows torch and its wrappers; nothing of layers, batches or curvature.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import nn

_PLAIN = bool | int | float | str | None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, torch.compile and what Lightning's Fabric sets up."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", getattr(model, "_original_module", None)), nn.Module):
            model = inner
        else:
            return model


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Everything inside happens to a model in eval mode without trainable parameters, and leaves no trace.

    On exit, also after an exception, these are as they were: train/eval flag of every submodule and whatever else it
    counts in plain numbers and words, `requires_grad` and `.grad` of every parameter, every buffer, embeddings that
    renormalise what is looked up, the random states of python, numpy and torch (CPU, CUDA, MPS). Inside,
    dropout and gradient checkpointing are off, the latter also where it does not follow eval mode, and inference mode;
    compiled modules run eagerly, because a compiled graph does not see the hooks of this module. What FSDP2 has
    gathered of its parameters it frees.
    """
    modules = list(model.modules())
    _reshard(modules)
    plain = [{k: v for k, v in vars(module).items() if isinstance(v, _PLAIN)} for module in modules]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [dict(module._buffers) for module in modules]
    contents = [(b, b.clone()) for own in buffers for b in own.values() if b is not None]
    tables = [m.weight for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None]
    contents += [(table, table.detach().clone()) for table in tables]
    try:
        for module in modules:
            module.training = False  # not .eval(): adapters override it to merge weights
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
        with (
            random_state_kept(),
            torch.compiler.set_stance("force_eager"),
            torch.inference_mode(False),
            _checkpointing_off(),
        ):
            yield
    finally:
        _reshard(modules)
        for module, numbers, own in zip(modules, plain, buffers, strict=True):
            vars(module).update(numbers)
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, content in contents:
                if not torch.equal(buffer, content):  # copying bumps the version that autograd checks
                    buffer.copy_(content)
        for parameter, flag, grad in parameters:
            parameter.requires_grad_(flag)
            if parameter.grad is not grad:
                parameter.grad = grad


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside, and afterwards what it was: the owner's own, or none of its own."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _reshard(modules: list[nn.Module]) -> None:
    """A forward pass without a backward leaves FSDP2's root gathered, with the flags that its parameters had in it."""
    if not dist.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule  # which takes as long as torch itself

    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def _checkpointing_off() -> Iterator[None]:
    """What torch.utils.checkpoint is given runs as it is.

    torch has no switch for it, and a module in torch's checkpoint_wrapper would run again in the backward pass, where
    nobody looks at its layers any more.
    """

    def apply(function: Callable[..., object], preserve: bool, *args: object) -> object:
        return function(*args)

    def around(*args: object, **kwargs: object) -> Iterator[None]:
        yield

    generator = "_checkpoint_without_reentrant_generator"
    composable = sys.modules.get("torch.distributed._composable.checkpoint_activation")
    with ExitStack() as patches:
        patches.enter_context(replaced(torch.utils.checkpoint.CheckpointFunction, "apply", apply))
        for module in (torch.utils.checkpoint, composable):
            if module is not None:
                patches.enter_context(replaced(module, generator, around))
        yield


@contextmanager
def random_state_kept() -> Iterator[None]:
    """On exit the random states of python, numpy and torch (CPU, CUDA, MPS) are as they were."""
    python, legacy_numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy_numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)
