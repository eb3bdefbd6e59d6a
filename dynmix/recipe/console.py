"""What a run shows in a terminal: the Trainer's bar, its losses, and each stage as a table.

Knows the Trainer's events and the journal's rows; a tracker gets all figures, a terminal those that are read there.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerState

from dynmix.journal import Journal
from dynmix.tables import stage_table

logger = logging.getLogger("dynmix")


class QuietProgress(ProgressCallback):
    """The Trainer's bar without its echo of the mixture's figures, which the tables show better."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Echo what is left of them."""
        left = {name: value for name, value in (logs or {}).items() if not name.startswith("dynmix/")}
        if left.keys() - {"epoch"}:
            with _only_shown():
                super().on_log(args, state, control, logs=left, **kwargs)  # type: ignore[no-untyped-call]


class PrintStages(TrainerCallback):
    """Prints each row of the journal once, as a table; those of an earlier call are left out."""

    def __init__(self, journal: Journal, console: Console):
        self.journal, self.console = journal, console
        self.printed = 0
        self._size = -1  # of the journal, when it was read last

    def on_train_begin(self, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        """Print the rows of this call so far."""
        self.printed = len(self.journal.rows()) if state.global_step else 0
        self.on_step_end()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Print what is new."""
        with _only_shown():
            file = self.journal.path
            size = file.stat().st_size if file.exists() else 0
            if size == self._size:
                return  # asked at every step, and a long journal takes long to read
            self._size, rows = size, self.journal.rows()
            new, self.printed = rows[self.printed :], len(rows)
            for row in new:
                with tqdm.external_write_mode():  # or the table would start on the bar's line
                    self.console.print(stage_table(row))

    on_train_end = on_step_end


@contextmanager
def _only_shown() -> Iterator[None]:
    """Let no failure to show something end a run, such as that of a terminal which was closed."""
    try:
        yield
    except (Exception, SystemExit) as failure:  # rich exits where a pipe is closed
        logger.warning("what is in the journal and the log was not shown: %s: %s", type(failure).__name__, failure)
