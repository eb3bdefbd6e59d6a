"""What a model's own steps may do to what is caught; each kind of layer is checked in test_capture and test_layers."""

import pytest
import torch
from torch import Tensor, nn

from dynmix.influence.batch import next_token_loss
from dynmix.influence.capture import Capture
from dynmix.influence.isolation import isolated
from dynmix.influence.layers import Layers
from tests.influence.conftest import Batcher


class Positions(nn.Module):
    """Adds its positions in place, before the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.norm = nn.Embedding(97, 8), nn.Embedding(32, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 97)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        x += self.positions(torch.arange(input_ids.shape[1])[None])
        logits: Tensor = self.head(self.norm(x))
        return logits


def test_what_was_changed_in_place_before_a_norm_is_its_input(token_batches: Batcher) -> None:
    model, found = Positions(), dict[str, Tensor]()
    batch = {"input_ids": token_batches(3)[0]["input_ids"]}
    capture = Capture(model, layers=Layers(embeddings=True, norms=True))
    with isolated(model):
        capture.run(
            batch, lambda layer, a, g, mask: found.update({layer: g.flatten(0, 1).mT @ a.flatten(0, 1).float()})
        )
    next_token_loss(model, batch)[0].sum().backward()  # type: ignore[no-untyped-call]
    norm = torch.cat([model.norm.weight.grad, model.norm.bias.grad])  # type: ignore[list-item]
    torch.testing.assert_close(found["norm"][:, 0], norm)


@pytest.mark.parametrize("uses", [1, 2])
def test_an_input_that_is_changed_in_place_after_any_of_its_uses_is_an_error(token_batches: Batcher, uses: int) -> None:
    class Sneaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.one, self.head = nn.Embedding(97, 8), nn.Linear(8, 8), nn.Linear(8, 97)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            y = torch.zeros_like(x)
            for _ in range(uses):
                y = y + self.one(x)
                x += 1
            return self.head(x + y)  # type: ignore[no-any-return]

    model, [batch] = Sneaky(), token_batches(2)
    capture = Capture(model)
    with isolated(model), pytest.raises(ValueError, match="'one': its input is changed in place"):
        capture.run({"input_ids": batch["input_ids"]}, lambda *_: None)


def test_a_table_that_is_used_in_an_odd_way_is_left_out_of_every_batch_and_its_head_is_not(
    token_batches: Batcher, caplog: pytest.LogCaptureFixture
) -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(97, 8), nn.Linear(8, 97, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.embedding(input_ids[..., None].expand(-1, -1, 3)).sum(2))  # type: ignore[no-any-return]

    model, met = Bags(), list[str]()
    capture = Capture(model, layers=Layers(embeddings=True))
    with isolated(model):
        for batch in token_batches(8):
            capture.run({"input_ids": batch["input_ids"]}, lambda layer, *_: met.append(layer))
    assert met == ["head", "head"]
    assert "1 linear layers are not measured: embedding" in caplog.text


def test_of_a_layer_of_whose_uses_one_is_no_part_of_the_loss_the_others_count(token_batches: Batcher) -> None:
    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.one, self.head = nn.Embedding(97, 8), nn.Linear(8, 8), nn.Linear(8, 97)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            self.one(x + 1)
            return self.head(self.one(x))  # type: ignore[no-any-return]

    model, found = Wasteful(), dict[str, Tensor]()
    batch = {"input_ids": token_batches(3)[0]["input_ids"]}
    capture = Capture(model)
    with isolated(model):
        capture.run(batch, lambda layer, a, g, mask: found.update({layer: g.flatten(0, 1).mT @ a.flatten(0, 1)}))
    next_token_loss(model, batch)[0].sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found["one"][:, :-1], model.one.weight.grad)
