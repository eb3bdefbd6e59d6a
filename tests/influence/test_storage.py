"""Less memory, the same influence: held elsewhere, in parts of the layers, or by fewer singular vectors."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dynmix import EKFAC, KFAC, DataInf, Identity, Layers, group_influence
from dynmix.influence import storage
from dynmix.influence.capture import Capture, layer_parts
from dynmix.influence.carried import Carried
from dynmix.influence.curvature import GaussNewton
from dynmix.influence.group import scored_groups
from dynmix.influence.memory import peak_memory

CURVATURES = [EKFAC(), KFAC(), DataInf(), Identity()]


@pytest.fixture(scope="module")
def sets(token_batches):
    domains = {"a": token_batches(3, seed=1), "b": token_batches(5, seed=2, ragged=True)}
    return domains, {"t": token_batches(2, seed=3), "u": token_batches(3, seed=4)}


def same(one, other, **tolerance):
    for name in ("scores", "standard_error", "task_loss"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), **tolerance)


@pytest.mark.parametrize("curvature", CURVATURES, ids=lambda curvature: type(curvature).__name__)
def test_where_it_is_held_and_in_how_many_parts_changes_nothing(tiny_lm, sets, curvature):
    model, layers = tiny_lm("llama", tied=True), Layers(embeddings=True, norms=True)
    plain = group_influence(model, *sets, curvature, layers=layers)
    for offload in ("cpu", "disk"):
        same(group_influence(model, *sets, curvature, layers=layers, offload=offload), plain, rtol=0)
    split = group_influence(model, *sets, curvature, layers=layers, offload="disk", layer_groups=3)
    same(split, plain, rtol=1e-5)


def test_scores_of_sequences_add_up_over_parts(tiny_lm, sets):
    model = tiny_lm("qwen2")
    plain, split = (scored_groups(model, *sets, EKFAC(), layer_groups=n) for n in (1, 2))
    for name in plain.scores:
        np.testing.assert_allclose(split.scores[name], plain.scores[name], rtol=1e-6)
        np.testing.assert_array_equal(split.tokens[name], plain.tokens[name])


def test_parts_have_every_layer_once(tiny_lm):
    model, layers = tiny_lm("llama", tied=True), Layers(exclude="down_proj", embeddings=True)
    everything = Capture(model, layers=layers)
    for count in (1, 2, 3, 5, 1000):
        parts = [Capture(model, layers=part) for part in layer_parts(model, layers, count)]
        assert [name for part in parts for name in part.layers] == list(everything.layers)
        assert [name for part in parts for name in part.tied] == list(everything.tied)
        assert len(parts) == min(count, len(everything.layers)) or count > 3
    with pytest.raises(ValueError, match="layer_groups=0"):
        layer_parts(model, layers, 0)


@pytest.mark.parametrize("large", ["embed_tokens", "lm_head"])
def test_a_layer_that_is_most_of_the_model_has_a_part_of_its_own(tiny_lm, large):
    model, layers = tiny_lm("llama"), Layers(rf"1\.self_attn\.[qk]|{large}", embeddings=True)
    for count in (2, 4):
        parts = [list(Capture(model, layers=part).layers) for part in layer_parts(model, layers, count)]
        assert [name for part in parts for name in part] == list(Capture(model, layers=layers).layers)
        assert [len(part) for part in parts if large in " ".join(part)] == [1]


def test_a_low_rank_is_wrong_by_no_more_than_it_says(tiny_lm, sets):
    model, curvature = tiny_lm("llama"), EKFAC(damping=1.0)
    plain = group_influence(model, *sets, curvature)
    assert plain.left_out is None
    before = 1.0
    for rank, offload in ((2, None), (8, "disk")):
        low = group_influence(model, *sets, curvature, rank=rank, offload=offload)
        apart = np.abs(low.scores - plain.scores)
        assert (apart <= low.left_out_bound * (1 + 1e-3)).all()
        assert (apart > 0).all()
        assert (low.left_out < before).all()
        before = low.left_out
    whole = group_influence(model, *sets, curvature, rank=32)
    same(whole, plain, rtol=1e-6)
    np.testing.assert_array_equal(whole.left_out, 0)
    split = group_influence(model, *sets, curvature, rank=8, layer_groups=2)
    np.testing.assert_allclose(split.left_out, before, rtol=1e-4)
    np.testing.assert_allclose(split.left_out_bound, low.left_out_bound, rtol=1e-4)


def test_the_rank_leaves_no_trace_in_the_random_state(tiny_lm, sets):
    state = torch.get_rng_state()
    group_influence(tiny_lm("llama"), *sets, Identity(), rank=2)
    torch.manual_seed(5)
    one = group_influence(tiny_lm("llama"), *sets, Identity(), rank=2)
    torch.manual_seed(6)
    other = group_influence(tiny_lm("llama"), *sets, Identity(), rank=2)
    same(one, other, rtol=0)
    torch.set_rng_state(state)


def test_a_file_is_gone_with_its_tensor_and_a_change_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path))
    held = storage.zeros("disk", (3, 4, 5), torch.float32, torch.device("cpu"))
    with storage.on(held[1], torch.device("cpu")) as there:
        there += 2
    storage.let_go(held)
    assert held.sum() == 40
    assert not list(tmp_path.iterdir())  # it has no name, and nothing to leave behind
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert maps.read_text().count(str(tmp_path)) == 1
        del held, there
        assert maps.read_text().count(str(tmp_path)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "gpu"}, "offload='gpu'"),
        ({"layer_groups": 0}, "layer_groups=0"),
        ({"rank": 0}, "rank=0"),
        ({"layer_groups": 2, "curvature": GaussNewton()}, "GaussNewton is one matrix over all layers"),
        ({"layer_groups": 2, "curvature": Carried(EKFAC(ema=0.5))}, "carried on are of all layers"),
    ],
)
def test_what_cannot_be_is_refused(tiny_lm, sets, options, message):
    with pytest.raises(ValueError, match=message):
        group_influence(tiny_lm("llama"), *sets, **options)


class Towered(torch.nn.Module):
    """A language model with a tower that text does not reach."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(7, 4)
        self.vision = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(6)])
        self.inner, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 7)

    def forward(self, input_ids):
        return self.head(self.inner(self.embedding(input_ids)))


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_part_that_no_batch_reaches_is_left_out(parts, caplog):
    model, batch = Towered(), [{"input_ids": torch.arange(10).view(2, 5) % 7}]
    whole, split = (group_influence(model, {"d": batch}, {"t": batch}, EKFAC(), layer_groups=n) for n in (1, parts))
    same(split, whole, rtol=1e-5)
    assert "vision" in caplog.text
    sequence = {"input_ids": batch[0]["input_ids"][:1]}
    assert peak_memory(model, sequence, domains=1, tasks=1, micro_batch=1, layer_groups=parts).total > 0
    with pytest.raises(ValueError, match=r"no linear layer can be measured: vision\.\d.* \({'never called': \d}\)"):
        group_influence(model, {"d": batch}, {"t": batch}, EKFAC(), layers="vision", layer_groups=parts)
