"""The bar: bytes of all inputs, tokens so far, their rate, and the time left."""

import time

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from dynmix.shown import stderr_console


class Bar(Progress):
    """One bar on stderr over all domains, or nothing if not `visible`."""

    def __init__(self, total: int, visible: bool) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[tokens]}"),
            TimeRemainingColumn(),
            console=stderr_console(),
            disable=not visible,
        )
        self._bar = self.add_task("", total=total, start=False, tokens="")
        self._begun: float | None = None
        self._before = self._tokens = 0

    def reading(self, domain: str) -> None:
        """Name what is being read."""
        self.update(self._bar, description=domain)

    def found(self, size: int, tokens: int) -> None:
        """Count what an earlier call has done: it says nothing of the rate."""
        self._before += tokens
        self._show(size)

    def done(self, size: int, tokens: int) -> None:
        """Count what was done now."""
        self._tokens += tokens
        self._show(size)

    def working(self) -> None:
        """From here on time counts."""
        if self._begun is None:
            self._begun = time.perf_counter()
            self.reset(self._bar, start=True, completed=int(self.tasks[0].completed))

    def _show(self, size: int) -> None:
        seconds = 0.0 if self._begun is None else time.perf_counter() - self._begun
        rate = f", {self._tokens / seconds:,.0f}/s" if seconds else ""
        self.update(self._bar, advance=size, tokens=f"{self._before + self._tokens:,} tokens{rate}")
