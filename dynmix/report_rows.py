"""The rows of a journal as the report reads them.

It knows the shape of a row; it must not know how anything is drawn.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from dynmix.journal import Journal, Row

PARTS: Final = ("measure", "propose", "snapshot")  # of what a boundary takes


@dataclass(frozen=True)
class RunRows:
    """The rows of one journal, and what several figures ask of them."""

    rows: list[Row]

    @classmethod
    def read(cls, path: Path) -> "RunRows":
        """Raises ValueError where there is no whole row to draw."""
        rows = Journal(path).rows()
        if not rows:
            raise ValueError(f"{path}: no journal with at least one whole row; a run writes it in its run folder")
        return cls(rows)

    @property
    def stages(self) -> list[Row]:
        """The rows that set weights."""
        return [row for row in self.rows if row["weights"] is not None]

    @property
    def finished(self) -> bool:
        """Whether the run wrote its final row."""
        return self.rows[-1]["kind"] == "final"

    @property
    def domains(self) -> list[str]:
        """Names, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row["domains"]))

    @property
    def tasks(self) -> list[str]:
        """Names of what is optimised for, in order of first appearance."""
        return [name for name in self.sets if name not in self.guards]

    @property
    def guards(self) -> list[str]:
        """Names of what only holds the mixture back, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row["guards"]))

    @property
    def sets(self) -> list[str]:
        """Names of tasks and guards whose losses are measured throughout, on the same sequences each time.

        The domains' held-out text is others at every boundary: its losses are not put beside each other.
        """
        later = (name for row in self.rows for name in row["tasks"] if name not in row["guards"])
        return list(dict.fromkeys([*self.rows[0]["tasks"], *later]))

    @property
    def tokens_per_sample(self) -> float | None:
        """None while nothing has been trained on; sequences all have one length, so the last row's mean is exact."""
        tokens, start = sum(self.rows[-1]["tokens"].values()), self.rows[-1]["start"]
        return tokens / start if tokens and start else None

    @property
    def overhead(self) -> float | None:
        """Share of the wall-clock time that boundaries took, over the stages whose training time is known; or None."""
        known = [row["seconds"] for row in self.rows if "training" in row["seconds"]]
        boundaries = sum(seconds[part] for seconds in known for part in PARTS)
        whole = boundaries + sum(seconds["training"] for seconds in known)
        return boundaries / whole if whole > 0 else None

    def losses(self, task: str) -> list[tuple[int, float, float]]:
        """(position in samples, loss, standard error) of every measurement of the task that gave a number."""
        points = [(row["start"], *_pair(row["task_loss"], row["task_loss_standard_error"], task)) for row in self.rows]
        return [point for point in points if math.isfinite(point[1])]

    def gains(self, task: str) -> list[dict[str, Any]]:
        """What each stage was predicted to gain on the task, and by how much the task's loss fell over it."""
        gains = []
        for row, after in pairwise(self.rows):
            if after["stage"] != row["stage"] + (after["kind"] == "stage"):
                continue  # a row is missing: the loss fell over several stages
            predicted = _pair(row["predicted_gain"], row["predicted_gain_standard_error"], task)
            loss, loss_error = _pair(row["task_loss"], row["task_loss_standard_error"], task)
            later, later_error = _pair(after["task_loss"], after["task_loss_standard_error"], task)
            if math.isfinite(predicted[0]) and math.isfinite(loss - later):
                realised = (loss - later, math.hypot(loss_error, later_error))
                gains.append({"stage": row["stage"], "predicted": predicted, "realised": realised})
        return gains


def _pair(values: Any, errors: Any, key: str) -> tuple[float, float]:
    """(value, standard error) of one name; NaN where the journal has none."""
    value, error = ((numbers or {}).get(key) for numbers in (values, errors))
    return (math.nan if value is None else float(value), math.nan if error is None else float(error))
