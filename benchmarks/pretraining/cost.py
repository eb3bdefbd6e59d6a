"""What a run spends, by purpose: floating-point operations counted by torch, and processor seconds.

Knows operators and clocks; nothing of what is run.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Purpose = Literal["training", "mixing", "before"]
"""Training steps; what mixing does while the run goes on; proxies and references trained beforehand."""

aten = torch.ops.aten


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> int:
    shapes = grad.shape, query.shape, key.shape, value.shape
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _eigh(matrix: Tensor, *rest: Any, **more: Any) -> int:
    """Of symmetric matrices with their vectors: 9 n^3 (Golub and Van Loan, Algorithm 8.3.3)."""
    return 9 * matrix.numel() * matrix.shape[-1]


OPERATORS = {
    **flop_registry,
    # Torch's table has no attention on processors, and no eigendecomposition.
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._linalg_eigh: _eigh,
}


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations of matrix products, attention and eigendecompositions that are run inside of it.

    As torch's `FlopCounterMode` does, but without attribution to modules and without taking apart every other operator,
    which slows a measurement down many times.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = OPERATORS.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


@dataclass
class Spent:
    """Operations and seconds by purpose; those of evaluation are nobody's and are not in it."""

    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("training", "mixing", "before"), 0.0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("training", "mixing", "before"), 0.0))

    @property
    def total(self) -> float:
        """Operations, all purposes together."""
        return sum(self.flops.values())

    @contextmanager
    def on(self, purpose: Purpose, flops: float | None = None) -> Iterator[None]:
        """What is done inside is for `purpose`; its operations are counted if they are not given."""
        start = clock()
        if flops is None:
            with Counter() as counter:
                yield
            flops = counter.total
        else:
            yield
        self.seconds[purpose] += clock() - start
        self.flops[purpose] += flops


def clock() -> float:
    """Seconds: of the processor, which others' work on the machine does not change; of the wall with a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
