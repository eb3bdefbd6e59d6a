"""Shared fixtures: where the reference numbers and the test corpora are, if this machine has them."""

import os

# Before torch is imported: the models are tiny, and threads that wait for each other in them cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import logging
import multiprocessing
import runpy
import signal
import socket
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# No deadlines: tests never depend on the speed of a machine. What a change must pass is the same every time; new
# examples are looked for where somebody is there to look at them: HYPOTHESIS_PROFILE=thorough takes ten times as many.
settings.register_profile("here", deadline=None, max_examples=30)
settings.register_profile("ci", deadline=None, max_examples=30, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "here"))


# What has been imported is no garbage, and so much that the collector takes half a second to look through it, as every
# Trainer asks it to. So it waits until all is imported, and does not look at it again.
@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Import the tests, and what they test, without looking for garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def little_to_look_through() -> None:
    """Hide from the collector what is there before a file's first test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference numbers and test corpora: `$DYNMIX_SHARED`, else `../shared` from the project's root."""
    root = Path(os.environ.get("DYNMIX_SHARED", Path(__file__).parents[2] / "shared"))
    if not root.is_dir():
        pytest.skip(f"no reference data at {root}: set $DYNMIX_SHARED to the folder that has it")
    return root


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """What the command line logs is for its own process: in that of the tests it is as before."""
    log = logging.getLogger("dynmix")
    level = log.level
    yield
    log.setLevel(level)


# What a shell puts in the background does not hear Ctrl-C, which tests send to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before the server starts, which the first test of any that asks for "forkserver" does.
multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "transformers.trainer", "dynmix.callbacks"])


class Processes:
    """Runs scripts in processes of their own, which come with torch and transformers imported.

    A fork server imports them once, where every fresh interpreter would take seconds for it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        self.context: Any = multiprocessing.get_context("forkserver")

    def run(self, script: Path | str, *arguments: Any, ranks: int = 1, timeout: float = 300) -> tuple[int, str]:
        """Run `script` as one process, or as so many ranks of `torch.distributed`.

        Returns the exit status, that of a rank that failed if one did (-9: killed), and what all of them printed. Where
        a rank fails the others are killed, and at the end what any has started: the loader's workers of a killed one
        come from a fork server of its own, and keep that and so themselves alive.
        """
        environments: Sequence[dict[str, str]] = [{}]
        if ranks > 1:
            with socket.socket() as some:
                some.bind(("127.0.0.1", 0))
                port = some.getsockname()[1]
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
            common |= {"LOCAL_WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"}
            environments = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        processes, logs = [], []
        for environment in environments:
            self.started += 1
            logs.append(self.folder / f"{self.started}.log")
            given = {"script": str(script), "arguments": [*map(str, arguments)], "environment": environment}
            processes.append(
                self.context.Process(
                    target=runpy.run_path,
                    args=(str(Path(__file__).with_name("as_script.py")), given | {"log": str(logs[-1])}),
                )
            )
            processes[-1].start()
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
                if any(process.exitcode for process in processes):
                    break
                time.sleep(0.02)
            status = next((process.exitcode for process in processes if process.exitcode), None)
        finally:
            for process in processes:
                process.kill()
                process.join()
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        if status is None:
            status = next((process.exitcode for process in processes if process.exitcode), 0)
        return status, "".join(log.read_text() for log in logs if log.exists())


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Processes:
    """Processes of their own for scripts."""
    return Processes(tmp_path_factory.mktemp("processes"))
