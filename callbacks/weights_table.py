"""The weights of a whole run as one table in the Trainer's trackers, beside the curves they draw themselves.

Knows the trackers' own calls and a journal's rows; a tracker that the Trainer does not report to is never imported.
"""

import importlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dynmix.journal import Journal, Row

logger = logging.getLogger("dynmix")

NAME = "dynmix/weights"
COLUMNS = ("stage", "step", "domain", "weight", "tokens", "epochs")


def log_weights_table(journal: Path, callbacks: Iterable[TrainerCallback]) -> None:
    """Give the table to W&B, trackio and MLflow, those whose reporting is among the Trainer's `callbacks`.

    A line is a domain in a stage: its weight in it, and its tokens and epochs before it. TensorBoard has no tables. A
    tracker that refuses it is warned of and costs the run nothing.
    """
    writers = {"WandbCallback": _wandb, "TrackioCallback": _trackio, "MLflowCallback": _mlflow}
    for name in [type(callback).__name__ for callback in callbacks]:
        if name in writers:
            try:
                writers[name](_lines(Journal(journal).rows()))
            except Exception as refused:  # the run is over, and all of it is in the journal
                logger.warning("no table of the weights for %s: %s", name, refused)


def _lines(rows: Sequence[Row]) -> list[list[Any]]:
    return [
        [row["stage"], row["step"], domain, weight, row["tokens"].get(domain, 0), row["epochs"].get(domain, 0.0)]
        for row in rows
        for domain, weight in (row["weights"] or {}).items()
    ]


def _wandb(lines: list[list[Any]]) -> None:
    wandb: Any = importlib.import_module("wandb")
    wandb.run.log({NAME: wandb.Table(columns=list(COLUMNS), data=lines)})


def _trackio(lines: list[list[Any]]) -> None:
    trackio: Any = importlib.import_module("trackio")
    trackio.log({NAME: trackio.Table(columns=list(COLUMNS), data=lines)})


def _mlflow(lines: list[list[Any]]) -> None:
    columns = dict(zip(COLUMNS, map(list, zip(*lines, strict=True)), strict=True))
    importlib.import_module("mlflow").log_table(columns, f"{NAME}.json")
