import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import dynmix.recipe.sources as sources
from dynmix.mixture.store import TokenStore
from dynmix.recipe.names import RecipeError
from dynmix.recipe.schema import Domain, TaskFile
from dynmix.recipe.sources import domain_sources, is_text, task_sources
from dynmix.tasks import Task


@pytest.fixture
def tokenizer(world):
    return AutoTokenizer.from_pretrained("tokenizer")


def test_text_is_tokenised_once_and_anew_when_it_changes(world, tokenizer, monkeypatch):
    domains = {"web": Domain("texts/web.jsonl", held_out=0.2), "all": Domain(["texts/*.jsonl"])}
    found, held_out = domain_sources(domains, tokenizer, Path("cache"))
    assert found["all"].num_tokens > found["web"].num_tokens > 0
    kept = TokenStore.open(held_out["web"])
    texts = [json.loads(line)["text"] for line in Path("texts/web.jsonl").read_text().splitlines()]
    assert len(found["web"]) + len(kept) == len(texts)
    assert len(kept) > 0
    with monkeypatch.context() as patched:
        patched.setattr(sources, "prepare", None)
        again, _ = domain_sources(domains, tokenizer, Path("cache"))
    assert again["web"].path == found["web"].path
    Path("texts").unlink()
    Path("texts").mkdir()
    Path("texts/web.jsonl").write_text('{"text": "another"}\n')
    changed, _ = domain_sources({"web": Domain("texts/web.jsonl")}, tokenizer, Path("cache"))
    assert tokenizer.decode(changed["web"].tokens.tolist()) == "another<eos>"


def test_token_files_stay_paths_and_their_held_out_store_is_beside_them(world, tokenizer):
    for name in ("stores/web", "stores/web.valid"):
        TokenStore.write(Path(name), [[1, 2, 3]])
    found, held_out = domain_sources({"web": Domain("stores/web.idx")}, None, Path("cache"))
    assert found == {"web": "stores/web.idx"}
    assert task_sources("tasks", {"t": TaskFile(held_out="web")}, None, held_out, 8) == {"t": "stores/web.valid"}
    assert not Path("cache").exists()


def test_what_is_text(world):
    TokenStore.write(Path("stores/web"), [[1]])
    Path("saved").mkdir()
    for name in ("dataset_info.json", "state.json"):
        Path("saved", name).touch()
    assert [is_text(path) for path in ("texts", "texts/web.jsonl", "a.parquet", "a.jsonl.zst")] == [True] * 4
    assert [is_text(path) for path in ("stores", "stores/web", "saved", "a.npy", "s3://a/b")] == [False] * 5


def test_a_task_is_a_file_with_its_limit_or_a_store(world, tokenizer):
    TokenStore.write(Path("valid"), [[1, 2, 3]])
    tasks = {"sums": TaskFile("tasks/sums.jsonl", limit=3), "web": TaskFile("valid")}
    found = task_sources("tasks", tasks, tokenizer, {}, 32)
    assert isinstance(found["sums"], Task)
    assert len(found["sums"].records) == 3
    assert found["web"] == "valid"


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        (Domain("texts/wbe.jsonl"), "domains.web.path: texts/wbe.jsonl: no such file"),
        (Domain([]), "a path, or a list of paths"),
        (Domain(3), "a path, or a list of paths"),
        (Domain(["texts/web.jsonl", "stores/web"]), "is text and others are tokens"),
        (Domain("stores/web", held_out=0.1), "held_out: it is for text"),
        (Domain("texts/web.jsonl", text_field="content"), "content"),
    ],
)
def test_domains_that_are_none(world, tokenizer, domain, message):
    with pytest.raises(ValueError, match=message):
        domain_sources({"web": domain}, tokenizer, Path("cache"))


def test_text_needs_a_tokenizer(world):
    with pytest.raises(RecipeError, match="tokenizer: domain 'web' is text"):
        domain_sources({"web": Domain("texts/web.jsonl")}, None, Path("cache"))
    with pytest.raises(RecipeError, match=r"tokenizer: tasks\.sums is text"):
        task_sources("tasks", {"sums": TaskFile("tasks/sums.jsonl")}, None, {}, 8)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TaskFile(), "give `path` or `held_out`"),
        (TaskFile("a", held_out="web"), "give `path` or `held_out`"),
        (TaskFile("tasks/nothing.jsonl"), "tasks.t.path: tasks/nothing.jsonl: no such file"),
        (TaskFile("stores/nothing"), "tasks.t.path: stores/nothing: no such token store"),
        (TaskFile(held_out="wbe"), "no domain 'wbe'; there are web"),
        (TaskFile(held_out="web"), "give domains.web.held_out=0.01"),
        (TaskFile("empty.jsonl"), "empty.jsonl: no examples"),
        (TaskFile("stores/web.valid", limit=3), "tasks.t: `limit` and `metric` are for questions in a .jsonl file"),
        (TaskFile(held_out="web", metric="acc"), "of a token store measurement.task_sequences sequences are used"),
    ],
)
def test_tasks_that_are_none(world, tokenizer, task, message):
    Path("empty.jsonl").touch()
    with pytest.raises(ValueError, match=message):
        task_sources("tasks", {"t": task}, tokenizer, {"web": Path("stores/web.valid")}, 8)
