"""Tasks of lm-evaluation-harness, run on the model that trains (an optional extra: `dynmix[lm-eval]`).

Knows the harness and the model; the harness reseeds every random generator and changes modes, so it runs isolated.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynmix.influence.isolation import isolated, unwrap
from dynmix.ranks import from_rank_0, on_every_rank


class HarnessTasks:
    """Tasks of lm-evaluation-harness, to be evaluated again and again on a live transformers model.

    Args:
        names: tasks or groups by name, or their configurations, as `simple_evaluate` takes them.
        tokenizer: a transformers tokenizer, or the folder or name of one.
        batch_size: sequences of a forward pass.
        options: further arguments of `lm_eval.simple_evaluate`: `num_fewshot`, `limit`, `task_manager` (for tasks of
            your own: `lm_eval.tasks.TaskManager(include_path=...)`), ...

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        ValueError: no names, or a single string in place of a list.
    """

    def __init__(
        self,
        names: Sequence[str | dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str],
        *,
        batch_size: int = 8,
        **options: Any,
    ):
        try:
            import lm_eval  # noqa: F401
        except ImportError as problem:
            raise ImportError("HarnessTasks needs lm-evaluation-harness: pip install 'dynmix[lm-eval]'") from problem
        if isinstance(names, str) or not names:
            raise ValueError(f"names={names!r}: give a list of at least one task")
        self.names, self.batch_size, self.options = list(names), batch_size, options
        self.tokenizer = os.fspath(tokenizer) if isinstance(tokenizer, os.PathLike) else tokenizer

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return "task/metric" -> value, standard errors ("task/metric_stderr") included; leaves no trace in the model.

        A metric that the harness takes after a filter of its own is "task/metric,filter". In a distributed run every
        process must call this, and where it fails in one, all raise.

        Raises:
            ValueError: `model` is no transformers model.
        """
        return from_rank_0(on_every_rank(lambda: self._evaluated(unwrap(model))))

    def _evaluated(self, model: nn.Module) -> dict[str, float]:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"lm-evaluation-harness takes transformers models, got {type(model).__name__}")
        with isolated(model), torch.no_grad():
            # Inside, because importing and indexing tasks may draw from the random state as well.
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager

            if "task_manager" not in self.options:
                self.options["task_manager"] = TaskManager()  # reads thousands of files, once
            harness = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size)
            found = simple_evaluate(harness, tasks=self.names, **{"log_samples": False} | self.options)
        # The harness returns nothing on other ranks than the first.
        return {} if found is None else _figures(found["results"])


def _figures(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {
        f"{task}/{key.removesuffix(',none')}": float(value)
        for task, found in results.items()
        for key, value in found.items()
        if "," in key and isinstance(value, int | float)
    }
