import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dynmix import MixtureDataset, TokenStore
from dynmix.groups import open_groups, write_groups
from dynmix.mixers.regroup import group_weights, regroup
from dynmix.scores import Column, SampleScores


@pytest.fixture
def corpus(tmp_path):
    """Two stores of documents of different lengths, whose tokens say where they are from."""
    rng = np.random.default_rng(0)
    stores = {}
    for number, name in enumerate(("web", "code")):
        documents = [1000 * number + 10 * i + np.arange(rng.integers(1, 9)) for i in range(30)]
        stores[name] = TokenStore.write(tmp_path / "stores" / name, documents).path
    return stores


def scored(domain, row, tokens):
    values = np.random.default_rng(1).standard_normal((len(row), 2))
    return SampleScores(("web", "code"), domain, row, tokens, (Column("a", "x", 5), Column("b", "x", 5)), values)


@pytest.mark.parametrize("unit", ["document", "sequence"])
def test_groups_come_back_as_views_on_the_stores(corpus, tmp_path, unit):
    opened = [TokenStore.open(path) for path in corpus.values()]
    n = [len(store) if unit == "document" else len(store.tokens) // 4 for store in opened]
    domain, row = np.repeat([0, 1], n), np.concatenate([np.arange(k) for k in n])
    tokens = np.full(len(row), 4)
    if unit == "document":
        tokens = np.array([len(opened[d][r]) for d, r in zip(domain, row, strict=True)])
    scores = scored(domain, row, tokens)
    groups = regroup(scores)
    weights = group_weights(groups)
    write_groups(tmp_path / "groups", groups, weights, scores, corpus, unit=unit, sequence_length=4)
    views, found = open_groups(tmp_path / "groups")
    assert found == {name: weight for name, weight in weights.items() if weight}
    assert list(views) == list(found) == ["a", "b"]
    dataset = MixtureDataset(views, found, num_samples=50, sequence_length=4, block=5)
    for group in groups[:2]:
        if unit == "document":
            content = sorted(token for m in group.members for token in opened[domain[m]][row[m]].tolist())
            assert views[group.name].num_tokens == group.tokens
        else:
            content = sorted(
                token for m in group.members for token in opened[domain[m]].tokens[4 * row[m] : 4 * row[m] + 4].tolist()
            )
        rows = [dataset.sequence(group.name, r)["input_ids"].tolist() for r in range(dataset.sizes[group.name])]
        held = sorted(token for tokens in rows for token in tokens)
        assert set(held) <= set(content)
        assert len(content) - len(held) < 4
    assert len(dataset[0]["input_ids"]) == 4


@pytest.mark.parametrize("unit", ["document", "sequence"])
def test_a_dataset_of_groups_keeps_documents_apart_where_one_of_the_stores_does(corpus, tmp_path, unit):
    opened = [TokenStore.open(path) for path in corpus.values()]
    n = [len(store) if unit == "document" else len(store.tokens) // 4 for store in opened]
    scores = scored(np.repeat([0, 1], n), np.concatenate([np.arange(k) for k in n]), np.full(sum(n), 4))
    groups = regroup(scores)
    write_groups(tmp_path / "g", groups, group_weights(groups), scores, corpus, unit=unit, sequence_length=4)
    views, weights = open_groups(tmp_path / "g")
    dataset = MixtureDataset(views, weights, num_samples=50, sequence_length=4, boundaries="position_ids")
    for item in (dataset[g] for g in range(50)):
        of = item["input_ids"] // 10  # the document that a token is of
        assert item["position_ids"][1:].eq(0).tolist() == (of.diff() != 0).tolist()


def test_stores_that_moved_or_changed(corpus, tmp_path):
    scores = scored(np.zeros(20, int), np.arange(20), np.full(20, 3))
    groups = regroup(scores)
    settings = {"unit": "document", "sequence_length": 4}
    with pytest.raises(ValueError, match="no store for domain 'code'"):
        write_groups(tmp_path / "g", groups, {}, scores, {"web": corpus["web"]}, **settings)
    with pytest.raises(ValueError, match=r"groups\.json: no such file"):
        open_groups(tmp_path / "g")
    write_groups(tmp_path / "g", groups, group_weights(groups), scores, corpus, **settings)
    (tmp_path / "stores").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="no such file"):
        open_groups(tmp_path / "g")
    assert open_groups(tmp_path / "g", stores=tmp_path / "moved")[0]
    TokenStore.write(tmp_path / "moved/web", [np.arange(5)] * 40)
    with pytest.raises(ValueError, match="not the store of domain 'web' that was regrouped"):
        open_groups(tmp_path / "g", stores=tmp_path / "moved")
    assert not [path for path in (tmp_path / "g").iterdir() if path.suffix == ".tmp"]
    assert json.loads((tmp_path / "g/groups.json").read_text())["unit"] == "document"


def flipped(file: Path) -> bytes:
    """The last bit of the first column is another."""
    column, whole = pq.ParquetFile(file).metadata.row_group(0).column(0), bytearray(file.read_bytes())
    first = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    whole[first + column.total_compressed_size - 1] ^= 1
    return bytes(whole)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("groups.parquet", lambda file: file.read_bytes()[:-9]),
        ("groups.parquet", flipped),
        ("groups.json", lambda file: file.read_bytes()[:-9]),
    ],
)
def test_damaged_groups_are_named_with_what_to_do(corpus, tmp_path, name, damage):
    scores = scored(np.zeros(20, int), np.arange(20), np.full(20, 3))
    groups = regroup(scores)
    write_groups(tmp_path / "g", groups, group_weights(groups), scores, corpus, unit="document", sequence_length=4)
    file = tmp_path / "g" / name
    file.write_bytes(damage(file))
    with pytest.raises(ValueError, match=r"(?s)/g: its groups are damaged .*write them anew: dynmix regroup"):
        open_groups(tmp_path / "g")
