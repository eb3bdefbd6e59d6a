"""Safetensors files with facts beside the tensors, which are there whole or not at all.

Knows files and JSON; nothing of what is in them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dynmix.whole_file import whole_file


def write_tensors(path: Path, what: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a file; `what` says what is in it, and its format, and `facts` are JSON-able."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as beside:
        save_file(contiguous, beside, metadata={"format": what, "facts": json.dumps(facts)})


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a file. Raises ValueError if it is missing, or holds something else than `what`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != what:
                raise ValueError(f"{path} holds no {what}")
            # As memory is aligned, so are sums in float32 split up: what is loaded is to give the same bit for bit.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as problem:
        raise ValueError(f"{path}: the {what} cannot be read: {problem}") from problem
    return tensors, json.loads(metadata["facts"])
