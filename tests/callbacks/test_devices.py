"""A run whose model is on another device than the CPU, by which everything is read and decided."""

import pytest
import torch
from torch.utils.data import DataLoader

from dynmix import AdamDiagonal, DataInf, InRun, TiKMiXD
from dynmix.callbacks import MixtureHook
from dynmix.journal import Journal
from tests.elsewhere import ELSEWHERE, elsewhere, moved

RUNS = {
    "ekfac": {},
    "parts": {"layer_groups": 2, "offload": "cpu"},
    "adam": {"curvature": AdamDiagonal},
    "in_run": {"in_run": InRun(3, every=1)},
    "measured": {"mixer": {"name": "tikmix-m", "mixtures": 16, "rounds": 1}, "sample_sequences": 16},
    "automixer": {"mixer": "automixer", "curvature": DataInf()},
    "doremi": {"mixer": "doremi", "reference": True},
    "odm": {"mixer": "odm"},
    "ado": {"mixer": "ado"},
}


def decided(training, output, options, device):
    data, model = training.dataset(samples=80), training.model(dropout=0.0)
    model.set_attn_implementation("eager")
    if options.get("reference"):
        options = options | {"reference": training.model(dropout=0.0)}
    if device == ELSEWHERE:
        moved(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, foreach=False)
    if options.get("curvature") is AdamDiagonal:
        options = options | {"curvature": AdamDiagonal(optimizer)}
    options = {"mixer": TiKMiXD(confidence=0.0)} | options
    sizes = {"probe_sequences": 8, "curvature_sequences": 16, "task_sequences": 8}
    hook = MixtureHook(model, data, training.tasks(), stage_steps=5, output=output, **sizes | options)
    for batch in DataLoader(data, batch_size=8):
        ids = batch["input_ids"].to(device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        hook.step()
    hook.finish()
    rows = Journal(output / "journal.jsonl").rows()
    assert [row["error"] for row in rows] == [None] * len(rows)
    return [row["weights"] for row in rows], [row["task_loss"] for row in rows]


@pytest.mark.parametrize("name", RUNS)
def test_what_is_decided_does_not_depend_on_where_the_model_is(training, tmp_path, name):
    here = decided(training, tmp_path / "here", RUNS[name], torch.device("cpu"))
    with elsewhere():
        there = decided(training, tmp_path / "there", RUNS[name], ELSEWHERE)
    for weights, others in zip(here[0][:-1], there[0][:-1], strict=True):
        assert others == pytest.approx(weights, abs=1e-6)
    for losses, others in zip(here[1], there[1], strict=True):
        assert others == (None if losses is None else pytest.approx(losses, rel=1e-6))


def test_elsewhere_minds():
    with elsewhere():
        there, here = torch.ones(3, device=ELSEWHERE), torch.ones(3)
        assert (there + there).device == ELSEWHERE
        assert (there + 1).cpu().tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="on the CPU"):
            there + here
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device=ELSEWHERE, generator=torch.Generator())
        with pytest.raises(TypeError, match="call cpu"):
            there.numpy()
