"""Snapshots of the model: a folder each, weights in safetensors; at stage boundaries the newest few are kept.

Knows models and files; nothing of mixtures. A snapshot is whole or absent: it is written beside and renamed.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel

from dynmix.influence.capture import unwrap
from dynmix.ranks import is_rank_0

logger = logging.getLogger("dynmix")


def save_snapshot(model: torch.nn.Module, folder: Path, stage: int, facts: dict[str, Any], keep: int) -> Path:
    """Write the model to `folder/stage-NNNN` and drop all but the `keep` newest; return the path.

    Every rank calls it; see `write_snapshot`.
    """
    path = folder / f"stage-{stage:04d}"
    write_snapshot(model, path, facts)
    if is_rank_0():
        for old in sorted(folder.glob("stage-[0-9]*"))[:-keep]:
            shutil.rmtree(old)
    return path


def write_snapshot(model: torch.nn.Module, path: Path, facts: dict[str, Any]) -> None:
    """Write the model to the folder `path`, replacing one that is there.

    A transformers model is saved as `from_pretrained` reads it, any other module as `model.safetensors` of its state
    dict. `facts` go to `snapshot.json`. Every rank calls it (sharded parameters are gathered); rank 0 writes.
    """
    model = unwrap(model)
    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if not is_rank_0():
        return
    beside = path.with_name(f".{path.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(beside, state_dict=state)
    else:
        # Cloned, because safetensors refuses tensors that share memory (tied weights).
        save_file({name: t.detach().clone().contiguous() for name, t in state.items()}, beside / "model.safetensors")
    (beside / "snapshot.json").write_text(json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(path, ignore_errors=True)
    os.replace(beside, path)


def load_model(path: Path, kind: Any = AutoModelForCausalLM) -> torch.nn.Module:
    """The causal LM in a folder, from safetensors; weights that pickle holds are not read, as that can run code.

    Args:
        path: the folder.
        kind: class of transformers whose `from_pretrained` loads it.

    Raises:
        ValueError: it does not load, or weights are missing, which transformers makes up at random.
    """
    try:
        loaded: Any = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as problem:
        # A RuntimeError: the weights have other shapes; a KeyError: the configuration has a name that is not known.
        raise ValueError(f"checkpoint {path} does not load: {problem}") from problem
    model: torch.nn.Module = loaded[0]
    if lacking := sorted(loaded[1]["missing_keys"]):
        raise ValueError(f"checkpoint {path}: its weights lack {lacking[:3]}")
    if extra := sorted(loaded[1]["unexpected_keys"]):
        logger.warning("checkpoint %s: a %s has no %s, which are left out", path, type(model).__name__, extra[:3])
    return model
