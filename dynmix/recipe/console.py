"""What a run shows in a terminal: the Trainer's bar, its losses, and each stage as a table.

Knows the Trainer's events and the journal's rows; a tracker gets all figures, a terminal those that are read there.
"""

from typing import Any

from rich.console import Console
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynmix.journal import Journal, Row
from dynmix.tables import stage_table


class QuietProgress(ProgressCallback):
    """The Trainer's bar without its echo of the mixture's figures, which the tables show better."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Echo what is left of them."""
        left = {name: value for name, value in (logs or {}).items() if not name.startswith("dynmix/")}
        if left.keys() - {"epoch"}:
            super().on_log(args, state, control, logs=left, **kwargs)  # type: ignore[no-untyped-call]


class PrintStages(TrainerCallback):
    """Prints each row of the journal once, as a table; those of an earlier call are left out."""

    def __init__(self, journal: Journal, console: Console):
        self.journal, self.console = journal, console
        self.printed: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        """Print the rows of this call so far."""
        self.printed = len(self.journal.rows()) if state.global_step else 0
        self._print()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Print what is new."""
        self._print()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Print what is new."""
        self._print()

    def _print(self) -> None:
        rows: list[Row] = self.journal.rows()
        for row in rows[self.printed :]:
            with tqdm.external_write_mode():  # or the table would start on the bar's line
                self.console.print(stage_table(row))
        self.printed = len(rows)
