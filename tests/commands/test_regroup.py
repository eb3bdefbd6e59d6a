import json
from importlib import import_module

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from tqdm import tqdm
from typer.testing import CliRunner

from dynmix import TokenStore, open_groups
from dynmix.commands.regroup import regroup
from dynmix.scoring import Source, read_scores, score_corpus

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(regroup)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder of two stores and of their scores for two tasks, by a model that was never trained."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("scored")
    rng = np.random.default_rng(0)
    stores = {name: TokenStore.write(folder / "stores" / name, [rng.integers(0, 20, 90)]).path for name in ("a", "b")}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    model.save_pretrained(folder / "model")
    tasks = {name: [{"input_ids": torch.tensor(rng.integers(0, 20, 8))} for _ in range(3)] for name in ("t", "u")}
    source = Source("model", 5, folder / "model", ("t", "u"))
    score_corpus(stores, tasks, [source], folder / "scores", sequence_length=9, progress=False)
    return folder


def call(scored, out, *more):
    words = [str(scored / "scores"), "--data", str(scored / "stores"), "--out", str(out), *more]
    return CliRunner().invoke(app, words)


def test_groups_are_written_with_their_weights(scored, tmp_path):
    done = call(scored, tmp_path, "--keep", "0.6")
    assert done.exit_code == 0, done.output
    domains, weights = open_groups(tmp_path)
    assert sum(weights.values()) == pytest.approx(1)
    table = pq.read_table(tmp_path / "groups.parquet").to_pylist()
    assert set(domains) == {"t", "u"}
    assert {row["group"] for row in table} == {"t", "u", "rest"}
    assert len({(row["domain"], row["id"]) for row in table}) == len(table) <= len(read_scores(scored / "scores").row)
    for name in domains:
        own = [row["influence"] for row in table if row["group"] == name]
        assert own == sorted(own, reverse=True)
        assert f"{name}: weight {weights[name]:.4f}, {len(own):,} samples" in done.output


def test_it_shows_how_far_it_is(scored, tmp_path, monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "disable": False})
            bars.append(self)

    for name in ("dynmix.scoring.folder", "dynmix.mixers.regroup", "dynmix.groups"):
        monkeypatch.setattr(import_module(name), "Bar", Bar)
    assert call(scored, tmp_path).exit_code == 0
    assert [bar.desc for bar in bars] == ["reading scores", "blending scores", "grouping", "writing groups"]
    assert all(0 < bar.n == bar.total for bar in bars)


def test_by_perplexity_there_is_one_group(scored, tmp_path):
    assert call(scored, tmp_path, "--perplexity").exit_code == 0
    assert json.loads((tmp_path / "groups.json").read_text())["weights"].keys() == {"perplexity", "rest"}


def test_epochs_bound_the_weights(scored, tmp_path):
    assert call(scored, tmp_path, "--max-epochs", "1", "--tokens", "150", "--keep", "1").exit_code == 0
    facts = json.loads((tmp_path / "groups.json").read_text())
    for name, weight in facts["weights"].items():
        assert weight * 150 <= facts["tokens"][name] + 1e-6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keep", "0"], "keep=0"),
        (["--blend", "late"], "blend='late'"),
        (["--max-epochs", "2"], "give both, or neither"),
        (["--max-epochs", "1", "--tokens", "100000"], "raise keep or max_epochs"),
        (["--budget", "0"], "at least 1 token"),
    ],
)
def test_refusals_name_the_argument(scored, tmp_path, more, message):
    done = call(scored, tmp_path / "out", *more)
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_there(scored, tmp_path):
    words = [str(tmp_path), "--data", str(scored / "stores"), "--out", str(tmp_path / "out")]
    assert "is no folder of scores" in CliRunner().invoke(app, words).output
    words = [str(scored / "scores"), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, words).exit_code == 1


def test_other_stores_than_those_that_were_scored_are_refused(scored, tmp_path):
    a, b = (TokenStore.open(scored / "stores" / name) for name in ("a", "b"))
    TokenStore.write(tmp_path / "stores/a", list(b))
    TokenStore.write(tmp_path / "stores/b", list(a))
    words = [str(scored / "scores"), "--data", str(tmp_path / "stores"), "--out", str(tmp_path / "out")]
    assert "is not the store 'a' that was scored" in " ".join(CliRunner().invoke(app, words).output.split())
    one = [str(scored / "scores"), "--data", str(a.path), "--out", str(tmp_path / "out")]
    assert "no store 'b'" in CliRunner().invoke(app, one).output
    both = [*one, "--data", str(b.path)]
    assert CliRunner().invoke(app, both).exit_code == 0
