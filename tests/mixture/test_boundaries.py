"""A model that reads packed sequences says of each document what it says of that document alone."""

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, default_collate
from transformers import (
    AttentionInterface,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    default_data_collator,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.trainer_utils import RemoveColumnsCollator

from dynmix.batches import collate
from dynmix.influence.batch import next_token_loss
from dynmix.mixture.boundaries import block_mask, firsts, mask_labels, position_ids, varlen_collate
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.store import TokenStore
from dynmix.scoring.corpus import Corpus
from tests.small import word_tokenizer

LENGTH, VOCAB, BOS, PAD = 24, 50, 1, 0


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    found: Any = LlamaForCausalLM(config)
    return found.eval()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    rng = np.random.default_rng(0)
    lengths = [5, 9, 1, 30, 7, 24, 3, 3, 11, 2, 48, 6]
    return TokenStore.write(tmp_path_factory.mktemp("store") / "a", [rng.integers(2, VOCAB, n) for n in lengths])


def batch_of(store: TokenStore, collate_fn: Any = None, **options: Any) -> dict[str, Any]:
    """Every sequence of the store."""
    rows = len(MixtureDataset({"a": store}, num_samples=1, sequence_length=LENGTH, **options).sequences["a"])
    dataset = MixtureDataset({"a": store}, num_samples=rows, sequence_length=LENGTH, **options)
    batch: dict[str, Any] = next(iter(DataLoader(dataset, batch_size=rows, collate_fn=collate_fn)))
    return batch


def pieces(batch: dict[str, Any]) -> Iterator[tuple[int, int, int]]:
    """Row, start and stop of what stands apart in it, by its positions alone."""
    for row, positions in enumerate(batch["position_ids"].tolist()):
        starts = [t for t, position in enumerate(positions) if position == 0]
        for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True):
            assert positions[start:stop] == list(range(stop - start))
            yield row, start, stop


def alone(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Logits of each piece of a batch in a forward of its own."""
    ids = batch["input_ids"]
    found = torch.zeros(*ids.shape, VOCAB)
    with torch.no_grad():
        for row, start, stop in pieces(batch):
            found[row, start:stop] = model(input_ids=ids[row : row + 1, start:stop]).logits[0]
    return found


def together(model: Any, attention: str, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "domain")}
    model.set_attn_implementation(attention)
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(**inputs, use_cache=False).logits
    finally:
        model.set_attn_implementation("eager")
    return logits


@pytest.mark.parametrize(
    ("packing", "attention", "collate_fn"),
    [("concat", "eager", None), ("concat", "sdpa", default_data_collator), ("best_fit", "sdpa", None)],
)
def test_positions_keep_documents_apart_in_a_transformers_model(
    model: Any, store: TokenStore, packing: Any, attention: str, collate_fn: Any
) -> None:
    batch = batch_of(store, boundaries="position_ids", packing=packing, collate_fn=collate_fn, bos_token_id=BOS)
    assert len(list(pieces(batch))) > 10
    torch.testing.assert_close(together(model, attention, batch), alone(model, batch))
    mixed = together(model, attention, {"input_ids": batch["input_ids"]})
    assert not torch.allclose(mixed, alone(model, batch), atol=1e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_keeps_documents_apart(model: Any, store: TokenStore, attention: str, dtype: torch.dtype) -> None:
    # Rotary positions are relative: a model that has no other ones needs no positions that restart.
    batch = batch_of(store, boundaries="mask", packing="best_fit")
    other = batch_of(store, boundaries="position_ids", packing="best_fit")
    assert batch["attention_mask"].shape == (len(batch["input_ids"]), 1, LENGTH, LENGTH)
    assert batch["input_ids"].equal(other["input_ids"])
    assert batch["labels"].equal(other["labels"])
    cast = copy.deepcopy(model).to(dtype)
    tolerance: dict[str, Any] = {} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.05}
    torch.testing.assert_close(together(cast, attention, batch).float(), alone(model, other), **tolerance)


def test_lengths_keep_documents_apart_where_kernels_take_runs_of_tokens(model: Any, store: TokenStore) -> None:
    def varlen(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        """What a variable-length kernel computes, of the arguments that transformers hands to one."""
        ends = options["cu_seq_lens_q"].tolist()
        assert ends == options["cu_seq_lens_k"].tolist()
        assert options["max_length_q"] == options["max_length_k"] == int(np.diff(ends).max())
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # rows end to end
        attend: Any = sdpa_attention_forward
        runs = [
            attend(module, *(x[start:stop].transpose(0, 1)[None] for x in (q, k, v)), None, is_causal=True)[0][0]
            for start, stop in pairwise(ends)
        ]
        return torch.cat(runs).view(*query.transpose(1, 2).shape), None

    AttentionInterface.register("varlen", varlen)
    batch = batch_of(store, boundaries="position_ids", packing="best_fit", collate_fn=varlen_collate)
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    torch.testing.assert_close(together(model, "varlen", batch), alone(model, batch))
    with pytest.raises(ValueError, match='boundaries="position_ids"'):
        batch_of(store, collate_fn=varlen_collate)


def test_the_first_token_of_a_document_is_not_learnt_and_padding_neither(store: TokenStore) -> None:
    for packing in ("concat", "best_fit"):
        batch = batch_of(store, boundaries="position_ids", packing=packing)
        first = batch["position_ids"] == 0
        assert (batch["labels"][first] == -100).all()
        learnt = batch["labels"] != -100
        assert batch["labels"][learnt].equal(batch["input_ids"][learnt])
        # Padding is the only other thing that is not.
        padded = ~(learnt | first)
        assert padded.any() == (packing == "best_fit")
        assert (batch["input_ids"][padded] == PAD).all()


def test_what_documents_come_to() -> None:
    documents = np.array([[0, 0, 0, 1, 2, 2, -1, -1], [0, 0, 1, 1, 1, 1, 1, 1], [0] * 8])
    assert firsts(documents).astype(int).tolist() == [
        [1, 0, 0, 1, 1, 0, 1, 0], [1, 0, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert position_ids(documents).tolist() == [
        [0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7],
    ]  # fmt: skip
    ids = np.arange(24).reshape(3, 8)
    for apart, expected in ((True, [-100, 1, 2, -100, -100, -100]), (False, [0, 1, 2, 3, 4, -100])):
        labels = ids.copy()
        mask_labels(labels, documents, [5, 99], apart)
        assert labels[0].tolist() == [*expected, -100, -100]
    mask = block_mask(documents)
    assert mask.shape == (3, 1, 8, 8)
    for row, query, key in np.ndindex(3, 8, 8):
        seen = documents[row, query] == documents[row, key] and key <= query
        assert mask[row, 0, query, key] == (0 if seen else -torch.inf)


def test_measurements_see_what_the_training_sees(model: Any, store: TokenStore) -> None:
    for boundaries in ("position_ids", "mask"):
        options: dict[str, Any] = {"packing": "best_fit", "boundaries": boundaries}
        dataset = MixtureDataset({"a": store}, num_samples=1, sequence_length=LENGTH, **options)
        items = [dataset.sequence("a", row) for row in range(dataset.sizes["a"])]
        batch = collate(items)
        expected = default_collate(items)
        del expected["domain"]
        assert batch.keys() == expected.keys()
        assert all(batch[name].equal(values) for name, values in expected.items())
        losses, tokens = next_token_loss(model, batch)
        labels = expected["labels"][:, 1:]
        assert tokens.tolist() == (labels != -100).sum(1).tolist()
        apart = batch_of(store, packing="best_fit", boundaries="position_ids")
        order = [next(r for r, ids in enumerate(apart["input_ids"]) if ids.equal(row)) for row in batch["input_ids"]]
        logits = alone(model, apart)[order][:, :-1]
        one_by_one = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
        torch.testing.assert_close(losses, one_by_one)


def test_scores_are_of_tokens_and_not_of_padding(store: TokenStore) -> None:
    packed = PackedSequences(store, LENGTH, packing="best_fit")
    corpus = Corpus({"a": packed, "b": [{"input_ids": [5] * LENGTH, "attention_mask": [0] * 4 + [1] * (LENGTH - 4)}]})
    samples = corpus.read(0, len(corpus))
    assert sum(map(len, samples[:-1])) == store.num_tokens
    assert samples[-1].tolist() == [5] * (LENGTH - 4)


def test_the_mask_keeps_documents_apart_in_a_model_of_learnt_positions(store: TokenStore) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=LENGTH)
    gpt: Any = GPT2LMHeadModel(config)
    batch = batch_of(store, boundaries="mask", packing="best_fit")
    torch.testing.assert_close(together(gpt.eval(), "sdpa", batch), alone(gpt, batch))


def tokenizer() -> Any:
    return word_tokenizer((f"w{i}" for i in range(VOCAB)), "w2", pad_token="w0", eos_token="w2", unk_token="w2")


class Shifting:
    """A collate function of one's own, which hands on what it is given in another form."""

    def __call__(self, items: list[Any]) -> dict[str, torch.Tensor]:
        batch = varlen_collate(items)
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return {"input_ids": batch["input_ids"], "labels": labels, "cu_seqlens": batch["cu_seq_lens_q"]}


def test_collate_functions_that_lose_boundaries_or_labels_are_refused(store: TokenStore) -> None:
    language, padding = DataCollatorForLanguageModeling(tokenizer(), mlm=False), DataCollatorWithPadding(tokenizer())
    flattening: Any = DataCollatorWithFlattening
    apart: dict[str, Any] = {"boundaries": "position_ids"}
    # What TRL's SFTTrainer keeps, whatever the model's forward takes.
    dropping = RemoveColumnsCollator(default_data_collator, signature_columns=["input_ids", "labels"])
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (padding, apart, "DataCollatorWithPadding.* adds a 2-D attention_mask.*default_data_collator.*varlen_collate"),
        (language, apart, "makes its own labels and adds a 2-D attention_mask"),
        (language, {"boundaries": "mask"}, "makes its own labels"),
        (flattening(), apart, "makes its own position_ids"),
        (lambda items: {"input_ids": [item["input_ids"] for item in items]}, apart, "drops the position_ids"),
        (dropping, apart, "default_data_collator. drops the position_ids.*remove_unused_columns=False"),
        (lambda items: {"input_ids": [0] * len(items)}, {"boundaries": "mask"}, "drops the attention_mask"),
        (language, {"packing": "best_fit"}, "makes its own labels"),
        (language, {"ignore_token_ids": range(2, 9)}, "makes its own labels"),
    ]
    for collate_fn, options, message in refused:
        with pytest.raises(ValueError, match=message):
            batch_of(store, collate_fn, **options)
    taken: list[tuple[Any, dict[str, Any]]] = [
        (padding, {"packing": "best_fit"}),
        (padding, {}),
        (language, {}),
        (Shifting(), apart),
        (varlen_collate, apart),
        (default_data_collator, {"boundaries": "mask", "packing": "best_fit"}),
        (list, apart),
        (lambda items: {name: [item[name] for item in items] for name in items[0]}, apart),
    ]
    for collate_fn, options in taken:
        batch_of(store, collate_fn, **options)


def test_they_are_refused_through_subsets_and_in_workers_too(store: TokenStore) -> None:
    dataset = MixtureDataset({"a": store}, num_samples=8, sequence_length=LENGTH, boundaries="position_ids")
    loaders: list[DataLoader[Any]] = [
        DataLoader(part, batch_size=4, num_workers=workers, collate_fn=DataCollatorWithPadding(tokenizer()))
        for part, workers in ((Subset(dataset, range(4, 8)), 0), (dataset, 1))
    ]
    for loader in loaders:
        with pytest.raises(ValueError, match="adds a 2-D attention_mask"):
            next(iter(loader))
