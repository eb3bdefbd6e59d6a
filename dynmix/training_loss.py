"""The training loss of each step by domain, seen in passing, for the mixers that learn from it.

A forward hook takes the logits of each training forward pass; which domain a sequence is of is found by its content
among the samples of the step, so it does not matter how a loader shards, batches or accumulates them. The model trains
on bit for bit as without it. Knows the dataset, the model and a reference model; nothing of what is learnt from it.
"""

import logging
import os
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from dynmix.influence.batch import logits_of, next_token_labels, next_token_logits
from dynmix.mixture.dataset import MixtureDataset
from dynmix.observation import Observation
from dynmix.step_samples import StepSamples

logger = logging.getLogger("dynmix")


class TrainingLoss:
    """Collects the loss of every training sequence of a step, and if there is one a reference model's on the same.

    Args:
        dataset: what is trained on.
        reference: a causal LM on the same tokens, or the path of one that transformers loads; None: no reference loss.

    Raises:
        ValueError: a path that holds no model.
    """

    _hook: torch.utils.hooks.RemovableHandle | None = None

    def __init__(self, dataset: MixtureDataset, reference: nn.Module | str | os.PathLike[str] | None = None):
        self.dataset = dataset
        self.reference = _loaded(reference) if isinstance(reference, str | os.PathLike) else reference
        if self.reference is not None:
            self.reference = self.reference.eval().requires_grad_(False)
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._device = torch.device("cpu")
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model, as for an average of its weights, has a copy of the hook: it takes neither the dataset
        # nor the reference model with it, and watches nothing.
        return {}

    def attach(self, model: nn.Module) -> None:
        """Watch this model from now on; a second call changes nothing."""
        if self._hook is None:
            self._device = next(model.parameters()).device
            self._hook = model.register_forward_hook(self._forward_ended, with_kwargs=True)

    def detach(self) -> None:
        """Watch no longer, and forget what was not taken."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._seen = []

    def _forward_ended(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._hook is None or not model.training or not torch.is_grad_enabled():
            return  # a copy of the model, an evaluation or a measurement
        batch = {"input_ids": args[0]} | kwargs if args else kwargs
        if "labels" not in batch and self.dataset.masks_labels and not self._warned:
            self._warned = True
            logger.warning(
                "the model is called without labels (the Trainer keeps them back with label_smoothing_factor or "
                "compute_loss_func): losses by domain may count tokens whose label is -100"
            )
        with torch.no_grad():
            labels = next_token_labels(batch) if "input_ids" in batch else None
            loss = None if labels is None else _losses(output, labels)
            if labels is None or loss is None:
                raise ValueError(
                    "this mixer needs the training loss of each sequence, but the model was not called with input_ids "
                    "or returned no logits (a fused loss, such as Liger's, keeps none): switch that off, or take "
                    "another mixer"
                )
            sums = [(labels != -100).sum(1).double(), loss.sum(1).double()]
            if self.reference is not None:
                inputs: dict[str, Any] = {
                    key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch
                }
                reference = token_losses(next_token_logits(self.reference.to(loss.device), inputs), labels)
                sums += [reference.sum(1).double(), (loss - reference).clamp(min=0).sum(1).double()]
            self._seen.append((batch["input_ids"], torch.stack(sums, dim=1)))

    def take(self, step: int, batch_size: int) -> Observation | None:
        """Return what was seen since the last call, as optimizer step `step`, and forget it; None: nothing was.

        Every process calls it: their sums are added. Where one raises, all of them do.

        Raises:
            ValueError: a sequence that is no sample of this step.
            RuntimeError: another process has such a one.
        """
        seen, self._seen = self._seen, []
        sums = torch.zeros(len(self.dataset.domains), 4, dtype=torch.float64)
        problem: Exception | None = None
        try:
            if seen:
                samples = StepSamples(self.dataset, step, batch_size)
                for ids, values in seen:
                    for (domain, *_), part in zip(samples.domains(ids.cpu()), values.cpu(), strict=True):
                        sums[domain, : len(part)] += part
        except Exception as failure:
            problem = failure
        if torch.distributed.is_initialized():
            # A problem goes with the sums, as one more row: the others are to hear of it, and not to wait.
            shared = torch.cat([sums, torch.full((1, 4), float(problem is not None))]).to(self._device)
            torch.distributed.all_reduce(shared)
            sums, failed = shared[:-1].cpu(), bool(shared[-1].any())
            if problem is None and failed:
                problem = RuntimeError("another process was given a sequence that is no sample of this step")
        if problem is not None:
            raise problem
        present = {name: row for name, row in zip(self.dataset.domains, sums.tolist(), strict=True) if row[0]}
        if not present:
            return None
        with_reference = self.reference is not None
        return Observation(
            step=step,
            tokens={name: int(row[0]) for name, row in present.items()},
            loss={name: row[1] / row[0] for name, row in present.items()},
            reference_loss={name: row[2] / row[0] for name, row in present.items()} if with_reference else {},
            excess_loss={name: row[3] / row[0] for name, row in present.items()} if with_reference else {},
        )


def detach_earlier(model: nn.Module) -> None:
    """Take off a model what runs before this one attached and never detached, as one that was interrupted does not.

    It would keep every batch from here on, for nobody.
    """
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    for watch in (getattr(hook, "__self__", None) for hook in hooks):
        if isinstance(watch, TrainingLoss):
            watch.detach()


def _losses(output: Any, labels: Tensor) -> Tensor | None:
    """Of each token, as `token_losses`; None where the model returned nothing that says it.

    The models of TRL's trainers return the tokens' log probabilities, 0 where the label is -100, in place of logits.
    """
    if (logits := logits_of(output)) is not None:
        return token_losses(logits, labels)
    found = getattr(output, "log_probs", None)
    return -found.float() if isinstance(found, Tensor) and found.shape == labels.shape else None


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of each token, float32[B, T - 1], 0 where the label is -100, of labels [B, T - 1].

    A sequence at a time, because the float32 logits of a whole batch may not fit.
    """
    rows = [
        F.cross_entropy(one[: len(label)].float(), label.to(one.device), ignore_index=-100, reduction="none")
        for one, label in zip(logits, labels, strict=True)
    ]
    return torch.stack(rows)


def _loaded(path: str | os.PathLike[str]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(path)
    except (OSError, ValueError) as problem:
        raise ValueError(f"reference={str(path)!r} is no model that transformers can load: {problem}") from problem
    assert isinstance(model, nn.Module)
    return model
