"""What is written down of a boundary: the journal's row, and the same figures under a tracker's log keys.

Knows the shape of what was measured and decided; nothing of how.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

from dynmix.journal import Row
from dynmix.measurement import Measurement
from dynmix.mixers.base import Proposal
from dynmix.mixture.accounting import NewEpoch, as_rows
from dynmix.mixture.stream import Mixture
from dynmix.observation import Influence, Weights
from dynmix.ranks import gathered
from dynmix.run_folder import RunFolder

Losses = tuple[dict[str, float], dict[str, float]]
"""Task -> loss in nats per token, and task -> its standard error."""


class Recorder:
    """Writes the rows of one run, with what was warned of since the row before and what the training took."""

    def __init__(self, dataset: Mixture, measurement: Measurement, mixer: str):
        self.dataset, self.measurement, self.mixer = dataset, measurement, mixer
        self._warnings: list[str] = []
        self._clock: float | None = None  # when this process wrote the row before

    def listening(self) -> AbstractContextManager[None]:
        """While this is entered, what dynmix warns of is kept for the next row."""
        return warnings_heard(self._warnings)

    def write(
        self,
        folder: RunFolder | None,
        kind: Literal["stage", "final"],
        *,
        step: int,
        position: int,
        loss: Losses | None,
        seconds: Mapping[str, float],
        influence: Influence | None = None,
        proposal: Proposal | None = None,
        prior: Weights | None = None,
        error: str | None = None,
        message: str = "",
        again: Sequence[NewEpoch] = (),
    ) -> dict[str, float]:
        """Write the row of the last published stage, or the final one, into the folder, if there is one.

        Every rank calls it. `position`: samples trained on before it. Returns what a tracker should log.
        """
        dataset, schedule, final = self.dataset, self.dataset.schedule, kind == "final"
        tasks = list(self.measurement.sets if influence is None else influence.tasks)
        heard = dict.fromkeys(words for own in gathered(self._warnings) for words in own)
        self._warnings.clear()
        drawn = dict(zip(dataset.domains, schedule.counts(position).tolist(), strict=True))
        decided = proposal.decided_on if proposal else None
        row = Row(
            kind=kind,
            stage=schedule.num_stages - 1,
            step=step,
            start=position,
            end=None if final else schedule.end,
            weights_before=None if prior is None else dict(prior),
            weights=None if final else dict(schedule.stages[-1].weights),
            tasks=tasks,
            guards=[name for name in tasks if name in self.measurement.guards],
            domains=list(dataset.domains),
            influence=_plain(influence, "scores"),
            standard_error=_plain(influence, "standard_error"),
            task_loss=None if loss is None else dict(loss[0]),
            task_loss_standard_error=None if loss is None else dict(loss[1]),
            tokens={name: n * dataset.sequence_length for name, n in drawn.items()},
            new_epochs=as_rows(again),
            epochs={name: n / dataset.sizes[name] for name, n in drawn.items()},
            predicted_gain=dict(proposal.predicted_gain) if proposal else None,
            predicted_gain_standard_error=dict(proposal.predicted_gain_standard_error) if proposal else None,
            multipliers=dict(proposal.multipliers) if proposal else None,
            mixer=self.mixer,
            solver=proposal.solver if proposal else None,
            message=proposal.message if proposal else message,
            error=error,
            seconds={
                "measure": seconds.get("measure", 0.0),
                "propose": seconds.get("propose", 0.0),
                "snapshot": seconds.get("snapshot", 0.0),
            },
            scored_tokens=_by_name(dataset.domains, _plain(influence, "scored_tokens")),
            decided_influence=_plain(decided, "scores"),
            decided_standard_error=_plain(decided, "standard_error"),
            left_out=_by_name(tasks, _plain(influence, "left_out")),
            left_out_bound=_plain(influence, "left_out_bound"),
            warnings=[words for words in heard if not (error and words.endswith(error))],  # told once in a row
        )
        if self._clock is not None:
            row["seconds"]["training"] = time.perf_counter() - self._clock - sum(seconds.values())
        if folder is not None:
            folder.append(row)
        self._clock = None if final else time.perf_counter()
        return log_keys(row)


def losses_of(influence: Influence) -> Losses | None:
    """Return the task losses that came with an influence."""
    loss = _by_name(influence.tasks, _plain(influence, "task_loss"))
    error = _by_name(influence.tasks, _plain(influence, "task_loss_standard_error"))
    return None if loss is None or error is None else (loss, error)


def _plain(influence: Influence | None, name: str) -> Any:
    """One of an influence's arrays as lists; None if it does not have it."""
    values = None if influence is None else getattr(influence, name)
    return None if values is None else values.tolist()


def _by_name(names: Sequence[str], values: list[float] | None) -> dict[str, Any] | None:
    return None if values is None else dict(zip(names, values, strict=True))


def log_keys(row: Row) -> dict[str, float]:
    """Return a row's numbers under the keys that trackers get: `dynmix/weight/<domain>` and so on."""
    logs: dict[str, float] = {"dynmix/stage": row["stage"], "dynmix/seconds/measure": row["seconds"]["measure"]}
    logs |= {f"dynmix/weight/{name}": weight for name, weight in (row["weights"] or {}).items()}
    logs |= {f"dynmix/tokens/{name}": tokens for name, tokens in row["tokens"].items()}
    logs |= {f"dynmix/task_loss/{name}": loss for name, loss in (row["task_loss"] or {}).items() if loss is not None}
    for task, scores in zip(row["tasks"], row["influence"] or [], strict=False):
        for domain, score in zip(row["domains"], scores, strict=True):
            if score is not None:
                logs[f"dynmix/influence/{task}/{domain}"] = score
    return logs


@contextmanager
def warnings_heard(into: list[str]) -> Iterator[None]:
    """Add every warning or error that dynmix logs meanwhile to `into`, each text once. The log gets them as ever."""
    log = logging.getLogger("dynmix")
    handlers: list[logging.Handler] = [_Listener(into)]
    if not log.hasHandlers() and logging.lastResort is not None:
        handlers.append(logging.lastResort)  # which Python leaves out where there is any handler, as the listener is
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)


class _Listener(logging.Handler):
    def __init__(self, into: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._into = into

    def emit(self, record: logging.LogRecord) -> None:
        try:
            words = record.getMessage()
        except Exception:
            self.handleError(record)  # arguments that do not fit the text: the caller must not suffer
            return
        if words not in self._into:
            self._into.append(words)
