"""DoGE's proxy as its authors' code trains it (arXiv 2310.15393, Olivia-fsm/DoGE): all domains and tasks at each step.

The package's mixer measures at boundaries and takes gradients as they are, which a run of any user can afford. With
few and short steps that is another method: tasks of short answers have large gradients, and decide for all others.
Knows a model, batches and tasks; not what becomes of the weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dynmix import Task
from dynmix.batches import as_batches

from .training import LARGEST_NORM, Size, Training

MU = 0.05
LARGEST = 5.0  # score of a domain; none is below 0


class DogeProxy(Training):
    """A model whose loss is weighted by what the domains' gradients do for the tasks'.

    At each step alpha_j is multiplied by exp(lr / mu W_j) and renormalised; W_j is the product of domain j's gradient
    with the sum of the tasks', each clipped to a norm of 1 as in any step, over the mean norm of the domains', within
    0 and 5. The gradient that the optimizer takes is the sum of alpha_j times that of domain j.

    Args:
        size: whose batches hold every domain.
        vocabulary, seed, device: as of `Training`.
        domains: how many there are.
        tasks: those that are optimised; a step reads as many of their examples, about, as sequences of the domains.

    Attributes:
        mean: float64[n_domains], of alpha over the steps: what the target run is trained on.
    """

    def __init__(
        self, size: Size, vocabulary: int, seed: int, device: str, domains: int, tasks: Mapping[str, Task]
    ) -> None:
        super().__init__(size, vocabulary, seed, device)
        self.alpha = torch.full((domains,), 1 / domains, dtype=torch.float64)
        self.mean = torch.zeros(domains, dtype=torch.float64)
        self._each = max(1, size.batch // len(tasks))
        self._tasks = [self._padded(name, task) for name, task in tasks.items()]

    def _backward(self, batch: dict[str, Tensor]) -> float:
        ids, labels, domain = (batch[key].to(self.device) for key in ("input_ids", "labels", "domain"))
        rows = [domain == j for j in range(len(self.alpha))]
        losses, own = zip(*(self._gradient(ids[row], labels[row]) for row in rows), strict=True)
        aims = [self._gradient(*self._examples(*task))[1] for task in self._tasks]
        products = torch.stack(own) @ torch.stack(aims).sum(0)
        scores = products / (torch.stack([g.norm() for g in own]).mean() + 1e-6)
        rate = self.optimizer.param_groups[0]["lr"]
        moved = self.alpha.log() + rate / MU * scores.clamp(0, LARGEST).double().cpu()
        self.alpha = moved.softmax(0)
        self.mean += (self.alpha - self.mean) / (self.steps + 1)
        whole = self.alpha.to(own[0]) @ torch.stack(own)
        parameters = list(self.model.parameters())
        parts = torch.split(whole, [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
        return float(torch.stack(losses).mean())

    def _gradient(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of some sequences and its gradient, in a row, clipped."""
        loss = self.model(input_ids=ids, labels=labels).loss
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.model.parameters()))])
        return loss.detach(), gradient / (gradient.norm() / LARGEST_NORM).clamp(min=1)

    def _padded(self, name: str, task: Task) -> tuple[Tensor, Tensor]:
        """All examples of a task, as long as any: a step costs as much as the first."""
        [batch] = as_batches(task, name=name, sequence_length=self.size.length, micro_batch=10**9)
        room = (0, self.size.length - batch["input_ids"].shape[1])
        return pad(batch["input_ids"], room).to(self.device), pad(batch["labels"], room, value=-100).to(self.device)

    def _examples(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Those of this step, in turn."""
        rows = torch.arange(self.steps * self._each, (self.steps + 1) * self._each) % len(ids)
        return ids[rows], labels[rows]

    def save(self, file: Path, more: Any = None) -> None:
        """Write everything, as `Training` does."""
        super().save(file, {"alpha": self.alpha.tolist(), "mean": self.mean.tolist(), "more": more})

    def load(self, file: Path) -> Any:
        """Take up what `save` wrote."""
        state = super().load(file)
        self.alpha, self.mean = (torch.tensor(state[key], dtype=torch.float64) for key in ("alpha", "mean"))
        return state["more"]
