import pickle
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.documents import Documents, Ints
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.store import TokenStore
from dynmix.mixture.view import DocumentView, RowView

BOS, PAD = 1, 0


class Listed(Documents):
    """Documents of these lengths, whose tokens are 2, 3, 4... through all of them."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.ends = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.ends[-1])

    @property
    def fingerprint(self) -> str:
        return str(self.ends.tolist())

    def starts(self, documents: Ints) -> Ints:
        found: Ints = self.ends[documents]
        return found

    def read(self, starts: Ints, length: int) -> Ints:
        assert len(starts)
        assert starts.min() >= 0
        assert starts.max() + length <= self.num_tokens
        found: Ints = starts[:, None] + np.arange(length) + 2
        return found


def everything(packed: PackedSequences, order: Sequence[int] | None = None) -> tuple[list[list[int]], list[list[int]]]:
    """All sequences and their documents' numbers, read in any order and in requests of any size."""
    rows = np.arange(len(packed)) if order is None else np.array(order)
    asked = [part for part in np.array_split(rows, 3) if len(part)]
    back = np.argsort(rows)
    ids = np.concatenate([packed.gather(part) for part in asked])[back]
    return ids.tolist(), np.concatenate([packed.documents(part) for part in asked])[back].tolist()


def renumbered(owners: Sequence[int]) -> list[int]:
    """Numbers from 0 in the order in which they are met."""
    return [list(dict.fromkeys(owners)).index(owner) for owner in owners]


def end_to_end(lengths: Sequence[int], length: int, bos: int | None, each: bool) -> tuple[list[list[int]], Any]:
    """Concatenation token by token."""
    tokens = iter(range(2, 2 + sum(lengths)))
    stream = [
        (token, number)
        for number, n in enumerate(lengths)
        for token in [*([bos] if bos is not None and each else []), *(next(tokens) for _ in range(n))]
    ]
    lead = [(bos, None)] if bos is not None and not each else []
    step = length - len(lead)
    rows = [[*lead, *stream[i : i + step]] for i in range(0, len(stream) - step + 1, step)]
    ids = [[int(token or 0) for token, _ in row] for row in rows]
    return ids, [renumbered([owner or 0 for _, owner in row]) if each else [0] * length for row in rows]


documents = st.lists(st.integers(0, 30), min_size=1, max_size=25).filter(any)


@settings(max_examples=25)
@given(
    lengths=documents, length=st.integers(2, 20), bos=st.sampled_from([None, BOS]), each=st.booleans(), data=st.data()
)
def test_concatenation_is_that_of_token_by_token(
    lengths: list[int], length: int, bos: int | None, each: bool, data: st.DataObject
) -> None:
    packed = PackedSequences(Listed(lengths), length, bos_token_id=bos, each_document=each)
    ids, owners = end_to_end(lengths, length, bos, each)
    assert len(packed) == len(ids)
    if ids:
        order = data.draw(st.permutations(range(len(ids))))
        assert everything(packed, order) == (ids, owners)


@settings(max_examples=25)
@given(lengths=documents, length=st.integers(2, 20), bos=st.sampled_from([None, BOS]), data=st.data())
def test_best_fit_holds_every_document_once_and_whole(
    lengths: list[int], length: int, bos: int | None, data: st.DataObject
) -> None:
    packed = PackedSequences(Listed(lengths), length, packing="best_fit", bos_token_id=bos, pad_token_id=PAD)
    lead, room = [] if bos is None else [bos], length - (bos is not None)
    order = data.draw(st.permutations(range(len(packed))))
    rows = list(zip(*everything(packed, order), strict=True))
    found: list[list[int]] = []
    for ids, owners in rows:
        padding = owners.count(-1)
        assert owners == [*sorted(owners[: length - padding]), *[-1] * padding]
        assert ids[length - padding :] == [PAD] * padding
        pieces = [[t for t, o in zip(ids, owners, strict=True) if o == number] for number in range(max(owners) + 1)]
        assert all(pieces)
        assert pieces == sorted(pieces, key=lambda piece: piece[-1])  # in the order of the documents
        found += pieces
    ends = np.cumsum([0, *lengths])
    whole = [list(range(start + 2, stop + 2)) for start, stop in pairwise(ends)]
    cut = [[*lead, *tokens[i : i + room]] for tokens in whole for i in range(0, len(tokens), room)]
    assert sorted(found, key=lambda piece: piece[-1]) == cut
    # No two sequences would go into one, and the plan is the same each time.
    filled = sorted(length - owners.count(-1) for _, owners in rows)
    assert len(filled) < 2 or filled[0] + filled[1] > length
    again = PackedSequences(Listed(lengths), length, packing="best_fit", bos_token_id=bos, pad_token_id=PAD)
    assert everything(again) == everything(packed)


@given(lengths=documents, tokens=st.lists(st.integers(0, 10**6), min_size=1, max_size=20), coarse=st.integers(1, 30))
def test_a_document_is_found_by_halving_between_those_that_are_kept(
    lengths: list[int], tokens: list[int], coarse: int
) -> None:
    packed = PackedSequences(Listed(lengths), 1, each_document=True)
    step = 1 + len(lengths) // coarse
    packed.__dict__["_coarse"] = step, packed._bounds(np.arange(0, len(lengths), step))
    owner = list(chain.from_iterable([number] * n for number, n in enumerate(lengths)))
    asked = np.array(tokens) % len(owner)
    assert packed._documents_at(asked).tolist() == [owner[token] for token in asked.tolist()]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    rng = np.random.default_rng(1)
    texts = [rng.integers(2, 40_000, n) for n in rng.geometric(0.03, 300)]
    return TokenStore.write(tmp_path_factory.mktemp("store") / "a", texts)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bos_token_id": BOS},
    {"each_document": True},
    {"bos_token_id": BOS, "each_document": True},
    {"packing": "best_fit"},
    {"packing": "best_fit", "bos_token_id": BOS, "pad_token_id": 5},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_stores_views_and_rows_of_views_are_packed_alike(store: TokenStore, options: dict[str, Any]) -> None:
    packed = PackedSequences(store, 64, **options)
    half = len(store) // 2
    view = DocumentView([store, store], [0] * half + [1] * (len(store) - half), range(len(store)))
    expected = everything(packed)
    assert everything(PackedSequences(view, 64, **options)) == expected
    assert everything(pickle.loads(pickle.dumps(packed))) == expected
    rows = np.random.default_rng(0).integers(0, len(packed), 50)
    part = np.arange(50) % 2
    of_view = RowView([packed, PackedSequences(view, 64, **options)], part, rows)
    assert of_view.padded == packed.padded == (options.get("packing") == "best_fit")
    assert of_view.gather(np.arange(50)).tolist() == [expected[0][row] for row in rows]
    assert of_view.documents(np.arange(50)).tolist() == [expected[1][row] for row in rows]
    assert packed[-1]["input_ids"].tolist() == expected[0][-1]


def test_what_is_packed_in_another_way_is_other_data(store: TokenStore) -> None:
    known = [PackedSequences(store, 64, **options).fingerprint for options in OPTIONS]
    known += [PackedSequences(store, 65, **options).fingerprint for options in OPTIONS[3:]]
    assert known[0] == known[2] == store.fingerprint  # the same rows, of which other things are told
    assert len({*known}) == len(known) - 1
    assert PackedSequences(store, 64, packing="best_fit").fingerprint == known[4]


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (0, {}, "sequence_length must be at least 1, not 0"),
        (1, {"bos_token_id": 3}, "at least 2, a BOS and a token, not 1"),
        (8, {"packing": "best-fit"}, "packing='best-fit'"),
    ],
)
def test_what_cannot_be_packed_is_refused(store: TokenStore, length: int, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedSequences(store, length, **options)


def test_documents_without_tokens_are_no_sequence() -> None:
    assert not len(PackedSequences(Listed([0, 0]), 8, packing="best_fit"))


def test_a_bos_that_documents_have_already_is_refused(tmp_path: Path) -> None:
    store = TokenStore.write(tmp_path / "a", [[BOS, 5, 6], [], [BOS, 7]])
    choices: list[dict[str, Any]] = [{"packing": "best_fit"}, {"each_document": True}]
    for options in choices:
        with pytest.raises(ValueError, match="bos_token_id=1: the documents of .* begin with it already"):
            PackedSequences(store, 4, bos_token_id=BOS, **options)
    assert PackedSequences(store, 4, bos_token_id=BOS).gather(np.array([0])).tolist() == [[BOS, BOS, 5, 6]]


def dataset(store: TokenStore, **options: Any) -> MixtureDataset:
    return MixtureDataset({"a": store}, num_samples=20, sequence_length=64, **options)


CHOICES: list[dict[str, Any]] = [
    {},
    {"packing": "best_fit"},
    {"packing": "best_fit", "pad_token_id": 9},
    {"packing": "best_fit", "bos_token_id": BOS},
    {"bos_token_id": BOS},
    {"boundaries": "position_ids"},
    {"boundaries": "mask"},
    {"boundaries": "position_ids", "bos_token_id": BOS},
    {"ignore_token_ids": [3, 4]},
]


def test_a_state_made_under_other_options_is_refused(store: TokenStore) -> None:
    made = [dataset(store, **options) for options in CHOICES]
    states = [each.state_dict() for each in made]
    for number, each in enumerate(made):
        for other, state in enumerate(states):
            if number == other:
                each.load_state_dict(state)
            else:
                with pytest.raises(ValueError, match="other data: .* was .* and is"):
                    each.load_state_dict(state)
    with pytest.raises(ValueError, match="packing was 'best_fit' and is 'concat'"):
        made[0].load_state_dict(states[1])
    del states[0]["options"]  # of the time before there were any
    made[0].load_state_dict(states[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "greedy"}, "packing='greedy'"),
        ({"boundaries": "cu_seqlens"}, "boundaries='cu_seqlens'"),
        ({"pad_token_id": 3}, "pad_token_id=3: .*use ignore_token_ids"),
        ({"bos_token_id": -1}, "bos_token_id has -1"),
        ({"ignore_token_ids": [2, -100]}, "ignore_token_ids has -100"),
    ],
)
def test_options_that_are_none_are_refused(store: TokenStore, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(store, **options)


def test_packing_of_rows_that_are_packed_is_refused() -> None:
    rows = [{"input_ids": [1, 2, 3]}]
    choices: list[dict[str, Any]] = [{"packing": "best_fit"}, {"bos_token_id": 1}]
    for options in choices:
        with pytest.raises(ValueError, match="no domain has such"):
            MixtureDataset({"a": rows}, num_samples=1, **options)


def test_labels_of_padding_that_is_in_the_data_are_masked() -> None:
    rows = [{"input_ids": [5, 6, 2, 0], "attention_mask": [1, 1, 1, 0]}, {"input_ids": [7, 2, 8, 9]}]
    by_mask = MixtureDataset({"a": rows}, num_samples=8)
    labels = {tuple(one["input_ids"].tolist()): one["labels"].tolist() for one in map(by_mask.__getitem__, range(8))}
    assert labels == {(5, 6, 2, 0): [5, 6, 2, -100], (7, 2, 8, 9): [7, 2, 8, 9]}
    given: list[Any] = [[0, 2], np.array([0, 2]), iter([0, 2])]
    for ignored in given:
        by_id = MixtureDataset({"a": rows}, num_samples=8, ignore_token_ids=ignored)
        labels = {tuple(one["input_ids"].tolist()): one["labels"].tolist() for one in map(by_id.__getitem__, range(8))}
        assert labels == {(5, 6, 2, 0): [5, 6, -100, -100], (7, 2, 8, 9): [7, -100, 8, 9]}
    damaged = [{"input_ids": [5, 6], "attention_mask": [1]}]
    with pytest.raises(ValueError, match=r"attention_mask of item 0 of domain 'a' has shape \(1,\)"):
        MixtureDataset({"a": damaged}, num_samples=1)[0]


def test_padding_in_front_is_refused_where_the_text_would_attend_to_it() -> None:
    rows = [{"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1]}]
    for domain in (rows, RowView([rows], [0], [0])):
        with pytest.raises(ValueError, match=r"sequence 0 of domain 'a' begins with padding .*pad at the end, or pass"):
            MixtureDataset({"a": domain}, num_samples=1)[0]
        apart = MixtureDataset({"a": domain}, num_samples=1, boundaries="position_ids")[0]
        assert (apart["labels"].tolist(), apart["position_ids"].tolist()) == ([-100, -100, 6], [0, 0, 1])
    blank = [{"input_ids": [0, 0], "attention_mask": [0, 0]}]  # as fills a data set up: there is no text behind
    assert MixtureDataset({"a": blank}, num_samples=1)[0]["labels"].tolist() == [-100, -100]


def test_labels_and_masks_of_items_count_wherever_there_are_some() -> None:
    first, second = {"input_ids": [5, 6, 2]}, {"input_ids": [7, 8, 9], "labels": [-100, 8, 1]}
    third = {"input_ids": [4, 0, 3], "labels": np.array([4, 5, 6]), "attention_mask": [1, 0, 1]}
    expected = {5: [5, 6, 2], 7: [-100, 8, 1], 4: [4, -100, 6]}
    rows: list[dict[str, Any]] = [first, second, third]
    asked: list[int] = []

    class Lazy(Sequence[Any]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, row: Any) -> Any:
            asked.append(row)
            return rows[row]

    for data in (rows, Lazy(), RowView([rows], [0, 0, 0], [2, 1, 0])):
        made = MixtureDataset({"a": data}, num_samples=3)
        asked.clear()
        found = made.__getitems__([0, 1, 2])
        assert {item["input_ids"][0].item(): item["labels"].tolist() for item in found} == expected
        assert sorted(asked) == ([0, 1, 2] if isinstance(data, Lazy) else [])  # each once
    made = MixtureDataset({"a": rows}, num_samples=3, boundaries="position_ids")
    apart = {item["input_ids"][0].item(): item["labels"].tolist() for item in made.__getitems__([0, 1, 2])}
    assert apart == {5: [-100, 6, 2], 7: [-100, 8, 1], 4: [-100, -100, -100]}
    for labels in ([1], [0.5, 1.0], 3):
        with pytest.raises(ValueError, match=r"labels of item 0 of domain 'a' are .* not 2 integers"):
            MixtureDataset({"a": [{"input_ids": [5, 6], "labels": labels}]}, num_samples=1)[0]


def tokenizer(bos: bool) -> Any:
    made: Any = PreTrainedTokenizerFast
    found = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": BOS, "a": 2}, unk_token="a"))
    if bos:
        template: Any = processors.TemplateProcessing
        found.post_processor = template(single="<s> $A", special_tokens=[("<s>", BOS)])
    return made(tokenizer_object=found, bos_token="<s>", eos_token="<s>", pad_token="<pad>")


def test_a_bos_that_the_tokenizer_puts_is_put_where_documents_have_none(tmp_path: Path) -> None:
    bare = TokenStore.write(tmp_path / "bare", [[2, 2, 2, 2, 2, 2]])
    led = TokenStore.write(tmp_path / "led", [[BOS, 2, 2], [BOS, 2, 2]])
    for options, expected in (
        ({"tokenizer": tokenizer(True)}, {"bare": [BOS, 2, 2], "led": [BOS, 2, 2]}),
        ({"tokenizer": tokenizer(True), "bos_token_id": None}, {"bare": [2, 2, 2], "led": [BOS, 2, 2]}),
        ({"tokenizer": tokenizer(False)}, {"bare": [2, 2, 2], "led": [BOS, 2, 2]}),
        ({"tokenizer": tokenizer(True), "packing": "best_fit"}, {"bare": [BOS, 2, 2], "led": [BOS, 2, 2]}),
        ({}, {"bare": [2, 2, 2], "led": [BOS, 2, 2]}),
    ):
        made = MixtureDataset({"bare": bare, "led": led}, num_samples=4, sequence_length=3, **options)
        assert {name: made.sequence(name, 0)["input_ids"].tolist() for name in expected} == expected
        made.load_state_dict(made.state_dict())
    rows = [{"input_ids": [2, 2, 2]}]
    assert MixtureDataset({"a": rows}, num_samples=1, tokenizer=tokenizer(True))[0]["input_ids"].tolist() == [2, 2, 2]


def test_a_dataset_of_several_packings_gives_what_its_domains_hold(store: TokenStore) -> None:
    made = MixtureDataset(
        {"a": store, "b": [{"input_ids": [7] * 64}]}, {"a": 0.9, "b": 0.1}, num_samples=60, sequence_length=64,
        packing="best_fit", boundaries="position_ids", bos_token_id=BOS, pad_token_id=5,
    )  # fmt: skip
    packed = PackedSequences(store, 64, packing="best_fit", bos_token_id=BOS, pad_token_id=5)
    ids, owners = everything(packed)
    domain, row, _ = made.schedule.assign(0, 60)
    assert {*domain.tolist()} == {0, 1}
    for item, d, r in zip(made.__getitems__(list(range(60))), domain.tolist(), row.tolist(), strict=True):
        assert item["input_ids"].tolist() == (ids[r] if d == 0 else [7] * 64)
        expected = owners[r] if d == 0 else [0] * 64
        firsts = [t == 0 or expected[t] != expected[t - 1] for t in range(64)]
        masked = [first or owner == -1 for first, owner in zip(firsts, expected, strict=True)]
        assert item["labels"].tolist() == [
            -100 if m else t for m, t in zip(masked, item["input_ids"].tolist(), strict=True)
        ]
        assert [position == 0 for position in item["position_ids"].tolist()] == firsts
