"""Snapshots of the model, a folder each with weights in safetensors, written and loaded.

Knows models and files; nothing of mixtures. A snapshot is whole or absent: it is written beside and renamed.
"""

import copy
import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel

from dynmix.influence.isolation import unwrap
from dynmix.influence.layers import plain_name
from dynmix.ranks import is_rank_0

logger = logging.getLogger("dynmix")


def write_snapshot(model: nn.Module, path: Path, facts: dict[str, Any]) -> None:
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
    try:
        beside.mkdir(parents=True)
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(beside, state_dict=state)
        else:
            # Cloned, because safetensors refuses tensors that share memory (tied weights).
            whole = {name: t.detach().clone().contiguous() for name, t in state.items()}
            save_file(whole, beside / "model.safetensors")
        (beside / "snapshot.json").write_text(json.dumps(facts, indent=1) + "\n")
        shutil.rmtree(path, ignore_errors=True)
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # on a full disk, half of it would be in the way of what comes next


def load_model(path: Path, kind: Any = AutoModelForCausalLM) -> nn.Module:
    """The causal LM in a folder, from safetensors; weights that pickle holds are not read, as that can run code.

    Args:
        path: the folder.
        kind: class of transformers whose `from_pretrained` loads it.

    Raises:
        ValueError: it does not load, or weights are missing, which transformers makes up at random.
    """
    try:
        loaded: Any = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True)
    except Exception as problem:  # of any kind: an ImportError where quantised weights need a package
        raise ValueError(f"checkpoint {path} does not load: {problem}") from problem
    model: nn.Module = loaded[0]
    if lacking := sorted(loaded[1]["missing_keys"]):
        raise ValueError(f"checkpoint {path}: its weights lack {lacking[:3]}")
    if extra := sorted(loaded[1]["unexpected_keys"]):
        logger.warning("checkpoint %s: a %s has no %s, which are left out", path, type(model).__name__, extra[:3])
    return model


def check_like(model: nn.Module) -> None:
    """Raise ValueError if `load_like` cannot load snapshots of a model."""
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        return
    try:
        with torch.device("meta"):
            twin = type(model)(copy.deepcopy(model.config))
    except Exception as failure:
        raise ValueError(
            f"snapshots of a {type(model).__name__} do not load, as it cannot be made from its configuration alone: "
            f"{type(failure).__name__}: {failure}"
        ) from failure
    here, there = ({plain_name(name) for name, _ in each.named_parameters()} for each in (model, twin))
    if here != there:
        raise ValueError(
            f"snapshots of this {type(model).__name__} do not load: made from its configuration, a model differs from "
            f"it in {sorted(here ^ there)[:3]}"
        )


def load_like(model: nn.Module, path: Path) -> nn.Module:
    """The model of a snapshot: a transformers model by its class and configuration, any other as a copy of `model`.

    What is frozen in `model` is frozen in it.
    """
    model = unwrap(model)
    if isinstance(model, PreTrainedModel):
        loaded = load_model(path, type(model))
        trains = {plain_name(name): parameter.requires_grad for name, parameter in model.named_parameters()}
        for name, parameter in loaded.named_parameters():
            parameter.requires_grad_(trains.get(name, True))  # under FSDP1 names are others
        return loaded
    twin = copy.deepcopy(model)
    for own, other in zip(model.modules(), twin.modules(), strict=True):
        if _calls(vars(other).get("forward"), own):
            del vars(other)["forward"]  # put around the model's own, as TRL's trainers do: a copy would call that
    twin.load_state_dict(load_file(path / "model.safetensors"))
    return twin


def _calls(forward: Any, module: nn.Module) -> bool:
    """Whether a function that replaces a module's forward has in it the bound one of this very module."""
    while forward is not None:
        closure = getattr(getattr(forward, "__func__", forward), "__closure__", None) or ()
        inside = [forward]
        for cell in closure:
            with suppress(ValueError):  # it is empty
                inside.append(cell.cell_contents)
        if any(each is module or getattr(each, "__self__", None) is module for each in inside):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False
