"""Which multiple of the tokens' summed losses is differentiated in a training step, as the logits' gradient says.

For a loss s * sum of the tokens' cross entropies the gradient of token t's logits is s (p_t - onehot(y_t)), so that at
its label it is s (p - 1). Knows arrays of one batch; nothing of models, accumulation or processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dynmix.influence.batch import next_token_labels

_TOKENS = 64  # that are looked at, of each micro-batch
_GOLDEN = 2654435769  # 2**32 over the golden ratio
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_TOLERANCE_ELSE = 3e-2


class Scale:
    """s of one micro-batch: of its logits [B, T, V], then of their gradient. Nothing waits for the device until asked.

    Where a batch has no `labels` the loss is made elsewhere, and a token counts as scored that has a gradient.
    """

    def __init__(self, logits: Tensor, batch: Mapping[str, Any]) -> None:
        self._given = batch.get("labels") is not None
        labels = next_token_labels(batch).to(logits.device)
        if labels.shape != (logits.shape[0], logits.shape[1] - 1):
            raise ValueError(
                f"logits of shape {list(logits.shape)} are not those of labels of shape {list(labels.shape)}, of the "
                "next tokens: in-run influence does not know which of them the loss is made of; leave in_run= out"
            )
        self._labels = F.pad(labels, (0, 1), value=-100)
        self._scored = self._labels != -100
        # Scored ones first, spread over the micro-batch, without asking the device how many there are.
        number = torch.arange(self._labels.numel(), device=logits.device)
        order = self._scored.flatten() * 2**32 + number * _GOLDEN % 2**32
        self._index = order.topk(min(_TOKENS, len(order))).indices
        rows = logits.flatten(0, 1)[self._index]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).log_softmax(-1)
        self._miss = -torch.expm1(rows.gather(1, self._labels.flatten()[self._index, None].clamp(min=0))[:, 0])  # 1 - p
        self._found: Tensor | None = None

    def arrived(self, gradient: Tensor) -> None:
        """Take the gradient of the logits, [B, T, V]."""
        self._tolerance = _TOLERANCE.get(gradient.dtype, _TOLERANCE_ELSE)  # whatever the logits were copied to later
        labels = self._labels.clamp(min=0)
        if not self._given:
            self._scored = self._scored & (gradient.gather(2, labels[..., None])[..., 0] != 0)
        at = gradient.flatten(0, 1)[self._index, labels.flatten()[self._index]].to(self._miss.dtype)
        chosen = self._scored.flatten()[self._index]
        miss = self._miss * chosen
        # Least squares: tokens that were predicted well say little.
        scale = -(at * miss).sum() / miss.square().sum()
        apart = ((at + scale * self._miss) * chosen).abs().max() / (scale.abs() * miss.max())
        self._found = torch.stack([scale, apart])

    def tokens(self) -> Tensor:
        """Scored tokens of each sequence, float64[B] on the CPU."""
        return self._scored.sum(1).cpu().double()

    def value(self) -> float | None:
        """s; None if it is not finite or 0.

        Raises:
            ValueError: the gradients are not those of one multiple of the tokens' losses.
        """
        assert self._found is not None
        scale, apart = self._found.tolist()
        if not (scale and torch.isfinite(self._found).all()):
            return None
        if apart > self._tolerance:
            raise ValueError(
                f"the tokens' gradients are up to {apart:.1%} off those of a loss that is one multiple of the sum of "
                "their cross entropies (label smoothing, or tokens that weigh differently?): in-run influence cannot "
                "undo such a loss; leave in_run= out"
            )
        return float(scale)
