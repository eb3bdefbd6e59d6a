"""Shared fixtures: where the reference numbers and the test corpora are, if this machine has them."""

import os

# Before torch is imported: the models are tiny, and threads that wait for each other in them cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
from hypothesis import settings

# No deadlines: tests never depend on the speed of a machine. What a change must pass is the same every time; new
# examples are looked for where somebody is there to look at them: HYPOTHESIS_PROFILE=thorough takes ten times as many.
settings.register_profile("here", deadline=None, max_examples=30)
settings.register_profile("ci", deadline=None, max_examples=30, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "here"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference numbers and test corpora: `$DYNMIX_SHARED`, else `../shared` from the project's root."""
    root = Path(os.environ.get("DYNMIX_SHARED", Path(__file__).parents[2] / "shared"))
    if not root.is_dir():
        pytest.skip(f"no reference data at {root}: set $DYNMIX_SHARED to the folder that has it")
    return root
