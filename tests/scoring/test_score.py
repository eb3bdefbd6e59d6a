import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from contextlib import nullcontext
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from dynmix.batches import collate
from dynmix.influence.curvature import Identity
from dynmix.influence.sample import last_layers, sample_influence
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.store import TokenStore
from dynmix.mixture.view import DocumentView, RowView
from dynmix.scores import Column
from dynmix.scoring import Corpus, Source, discard, read_losses, read_scores, score_corpus
from dynmix.scoring.score import TokenBar

from .conftest import LENGTH, VOCABULARY, Setting, contents

COLUMNS = (
    Column("arc", "step-3", 3), Column("math.valid", "step-3", 3),
    Column("math.valid", "step-8", 8), Column("code", "step-8", 8),
)  # fmt: skip


@pytest.fixture(scope="module", params=["sequence", "document"])
def unit(request):
    return request.param


@pytest.fixture(scope="module")
def finished(setting, unit, tmp_path_factory):
    """A folder that was scored in one go."""
    out = tmp_path_factory.mktemp("finished") / "out"
    score_corpus(**setting.arguments(out=out, unit=unit))
    return out


def test_rows_have_the_scores_of_sample_influence(setting: Setting, tmp_path):
    arguments = setting.arguments(unit="sequence", out=tmp_path)
    score_corpus(**arguments)
    found, losses = read_scores(tmp_path), read_losses(tmp_path)
    assert found.columns == COLUMNS
    assert found.domains == ("web", "code")
    assert found.scores.dtype == np.float32
    rows = {name: PackedSequences(TokenStore.open(path), LENGTH) for name, path in setting.domains.items()}
    assert found.row.tolist() == [i for name in rows for i in range(len(rows[name]))]
    assert found.domain.tolist() == [k for k, name in enumerate(rows) for _ in range(len(rows[name]))]
    assert set(found.tokens.tolist()) == {LENGTH}
    samples = [{"input_ids": row["input_ids"][None]} for name in rows for row in rows[name]]
    spread = Corpus(setting.domains, "sequence", LENGTH).spread(9)
    fitted_on = [{"input_ids": item["input_ids"][None]} for item in spread]
    for number, source in enumerate(setting.sources):
        tasks = {name: [{k: v[None] for k, v in one.items()} for one in setting.tasks[name]] for name in source.tasks}
        model = LlamaForCausalLM.from_pretrained(source.path)
        want = sample_influence(model, samples, tasks, curvature_batches=fitted_on)
        columns = [i for i, column in enumerate(COLUMNS) if column.checkpoint == source.name]
        np.testing.assert_allclose(found.scores[:, columns], want.scores, rtol=2e-3, atol=1e-3 * want.scores.std())
        np.testing.assert_allclose(losses.scores[:, number], want.loss, rtol=1e-5)


def chats(n: int) -> list[dict[str, list[int]]]:
    """Rows with a prompt that is not learnt and padding; the last has nothing to learn."""
    rng, found = np.random.default_rng(0), []
    for size in rng.integers(4, LENGTH, n).tolist():
        ids, fill = rng.integers(1, VOCABULARY, size).tolist(), [0] * (LENGTH - size)
        labels = [-100] * 3 + ids[3:] + [-100] * len(fill)
        found.append({"input_ids": ids + fill, "labels": labels, "attention_mask": [1] * size + fill})
    found[-1]["labels"] = [-100] * LENGTH
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"boundaries": "position_ids"},
        {"boundaries": "mask", "packing": "best_fit", "ignore_token_ids": [5, 50]},
    ],
)
def test_rows_of_a_dataset_are_scored_as_they_are_trained_on(setting: Setting, tmp_path, options):
    domains = {"chats": chats(9), **setting.domains}
    dataset = MixtureDataset(domains, num_samples=1, sequence_length=LENGTH, **options)
    score_corpus(**setting.arguments(out=tmp_path, domains=dataset, curvature=Identity()))
    found, losses = read_scores(tmp_path), read_losses(tmp_path)
    assert set(found.tokens.tolist()) == {LENGTH}  # of a run, whatever is padding
    items = [dataset.sequence(name, row) for name, size in dataset.sizes.items() for row in range(size)]
    model = LlamaForCausalLM.from_pretrained(setting.sources[0].path)
    batches = [collate([item]) for item in items]
    tasks = {name: [collate([one]) for one in setting.tasks[name]] for name in setting.sources[0].tasks}
    want = sample_influence(model, batches, tasks, Identity())
    assert 1 <= np.isnan(want.scores).any(axis=1).sum() < 5  # nothing to learn, or a document of one token
    np.testing.assert_allclose(found.scores[:, :2], want.scores, rtol=1e-3, atol=1e-4 * np.nanstd(want.scores))
    with torch.no_grad():
        plain = [model(**batch, use_cache=False).loss.item() for batch in batches]
    np.testing.assert_allclose(losses.scores[:, 0], plain, rtol=1e-5)


def gradient(model, names, sequences):
    """Of the mean loss per scored token of sequences (ids, labels), each read on its own; by autograd, flat."""
    model.zero_grad()
    nats, scored = 0.0, 0
    for ids, labels in sequences:
        logits = model(ids[None]).logits[0, :-1]
        nats += F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
        scored += int((labels[1:] != -100).sum())
    (nats / scored).backward()
    parameters = dict(model.named_parameters())
    return torch.cat([parameters[f"{name}.weight"].grad.flatten() for name in names]).double(), (nats / scored).item()


def test_scores_are_the_products_of_gradients_by_brute_force(setting: Setting, unit, tmp_path):
    score_corpus(**setting.arguments(out=tmp_path, unit=unit, curvature=Identity()))
    found, losses = read_scores(tmp_path), read_losses(tmp_path)
    source = setting.sources[0]
    model = LlamaForCausalLM.from_pretrained(source.path)
    chosen = last_layers(model)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and chosen(name)]
    towards = [
        gradient(model, names, [(one["input_ids"], one["labels"]) for one in setting.tasks[task]])[0]
        for task in source.tasks
    ]
    stores = [TokenStore.open(path) for path in setting.domains.values()]
    checked = 0
    for i in range(0, len(found.row), 3):
        store, row = stores[found.domain[i]], int(found.row[i])
        sample = store[row] if unit == "document" else store.tokens[row * LENGTH : (row + 1) * LENGTH]
        assert found.tokens[i] == len(sample)
        if len(sample) < 2:
            assert np.isnan(found.scores[i]).all()
            assert np.isnan(losses.scores[i]).all()
            continue
        pieces = [torch.tensor(sample[k : k + LENGTH].astype(np.int64)) for k in range(0, len(sample), LENGTH)]
        own, loss = gradient(model, names, [(piece, piece) for piece in pieces])
        want = [float(own @ task) for task in towards]
        np.testing.assert_allclose(found.scores[i, :2], want, rtol=1e-3, atol=1e-4)
        assert losses.scores[i, 0] == pytest.approx(loss, rel=1e-5)
        checked += len(pieces) > 1 or unit == "sequence"
    assert checked > 1


@pytest.mark.parametrize("unit", ["document"], indirect=True)
def test_documents_without_a_token_to_score_stay_in_the_table(finished):
    whole = pa.concat_tables(pq.read_table(finished / f"scores-0000{shard}.parquet") for shard in (0, 1))
    assert whole["tokens"].to_pylist().count(0) == 1
    found = read_scores(finished)
    assert len(found.row) == len(whole) - 1  # and is nothing to train on
    short = found.tokens == 1
    assert short.sum() == 2
    assert np.isnan(found.scores[short]).all()
    assert np.isfinite(found.scores[~short]).all()


def test_files_have_the_declared_columns(finished, setting):
    table = pq.read_table(finished / "scores-00000.parquet")
    names = [
        "id",
        "domain",
        "tokens",
        *(f"score/{c.task}/{c.checkpoint}" for c in COLUMNS),
        "loss/step-3",
        "loss/step-8",
    ]
    assert table.column_names == names
    kinds = [str(field.type) for field in table.schema]
    assert kinds == ["int64", "dictionary<values=string, indices=int32, ordered=0>", "int64", *["float"] * 6]
    assert set(table["domain"].to_pylist()) <= set(setting.domains)
    assert {path.name for path in finished.iterdir()} == {
        "scoring.json", *(f"scores-{s:05d}.parquet" for s in range(len(list(finished.glob("scores-*")))))
    }  # fmt: skip


def in_child(what, *args):
    """Start `what` in a process of its own, which has all imports already."""
    process = multiprocessing.get_context("fork").Process(target=what, args=args)
    process.start()
    return process


def score_and_die(arguments, moment):
    """Kill this process, as the kernel would, at the moment-th of all ticks, syncs (with half a file) and renames."""
    events = count()

    def event(handle=None):
        if next(events) == moment:
            if handle is not None:
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    replace = os.replace

    def renamed(source, target):
        event()
        replace(source, target)
        event()

    os.fsync, os.replace = event, renamed
    score_corpus(**arguments, tick=event)


def test_killed_again_and_again_it_ends_with_the_same_bytes(setting: Setting, unit, finished, tmp_path):
    arguments = setting.arguments(out=tmp_path / "out", unit=unit)
    kills = 0
    for moment in [0, 1, 2, 5, 3, 4, 6, 1, 7, 2, 9, 3, 8, 0, 4, 1, 11, 6, 2, 13, *[40] * 10]:
        process = in_child(score_and_die, arguments, moment)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        if len([*(tmp_path / "out").glob("scores-*.parquet")]) < len([*finished.glob("scores-*.parquet")]):
            with pytest.raises(ValueError, match="missing|no such file"):
                read_scores(tmp_path / "out")
    assert process.exitcode == 0
    assert kills > 5
    assert contents(tmp_path / "out") == contents(finished)


@pytest.mark.parametrize("parts", [[(0, 2), (1, 2)], [(0, 1), (0, 1)]], ids=["shared", "the same"])
def test_processes_in_one_folder_do_not_disturb_each_other(setting: Setting, unit, finished, parts, tmp_path):
    out = tmp_path / "out"
    processes = [
        in_child(lambda part: score_corpus(**setting.arguments(out=out, unit=unit, part=part)), part) for part in parts
    ]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert contents(out) == contents(finished)


def test_shards_of_nothing_but_empty_documents_are_scored_too(setting: Setting, tmp_path):
    TokenStore.write(tmp_path / "sparse", [[]] * 30 + [[1, 2]])
    arguments = setting.arguments(out=tmp_path / "out", domains={"sparse": tmp_path / "sparse"}, unit="document")
    score_corpus(**arguments)
    assert read_scores(tmp_path / "out").row.tolist() == [30]


def test_a_second_call_loads_nothing(setting: Setting, unit, finished):
    before = contents(finished)
    score_corpus(**setting.arguments(out=finished, unit=unit, load=lambda path: pytest.fail("a model was loaded")))
    assert contents(finished) == before


def test_a_part_leaves_the_others_to_be_done(setting: Setting, tmp_path):
    score_corpus(**setting.arguments(out=tmp_path, part=(1, 2)))
    with pytest.raises(ValueError, match=r"2 of 3 shards are missing \(0, 2\); run the same scoring again"):
        read_scores(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": "lm_head"}, "layers was None and is 'lm_head'"),
        ({"curvature": Identity()}, r"curvature was 'DataInf\(damping=0.1\)' and is 'Identity\(\)'"),
        ({"batch_tokens": 24}, "batch_tokens was 60 and is 24"),
        ({"tasks": "other examples"}, "task.math.valid.fingerprint was"),
        ({"checkpoints": "other weights"}, "checkpoint.step-8.fingerprint was"),
        ({"domains": "other tokens"}, "domain.code.fingerprint was"),
        ({"domains": "other order"}, "domains was 'web, code' and is 'code, web'"),
        ({"domains": "other boundaries"}, "domain.web.fingerprint was"),
    ],
)
def test_another_configuration_is_refused(setting: Setting, tmp_path, change, said):
    score_corpus(**setting.arguments(out=tmp_path / "out", part=(0, 3)))
    if change == {"tasks": "other examples"}:
        change = {"tasks": setting.tasks | {"math.valid": setting.tasks["math.valid"][1:]}}
    elif "checkpoints" in change:
        first, second = setting.sources
        change = {"checkpoints": [first, Source(second.name, second.step, first.path, second.tasks)]}
    elif change == {"domains": "other tokens"}:
        store = TokenStore.open(setting.domains["code"])
        changed = TokenStore.write(tmp_path / "code", [(document + 1) % VOCABULARY for document in store])
        change = {"domains": setting.domains | {"code": changed}}
    elif change == {"domains": "other boundaries"}:
        options = {"sequence_length": LENGTH, "boundaries": "position_ids"}
        change = {"domains": MixtureDataset(setting.domains, num_samples=1, **options)}
    elif "domains" in change:
        change = {"domains": dict(reversed(setting.domains.items()))}
    arguments = setting.arguments(out=tmp_path / "out", load=lambda path: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=said) as refusal:
        score_corpus(**arguments | change)
    assert re.search(r"another folder \(--out\).*--overwrite", str(refusal.value))
    discard(tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_a_configuration_that_nothing_was_scored_for_may_change(setting: Setting, tmp_path):
    with pytest.raises(ValueError, match="selects no trainable linear layer"):
        score_corpus(**setting.arguments(out=tmp_path, layers="nothing", part=(2, 3)))
    score_corpus(**setting.arguments(out=tmp_path, layers="lm_head", part=(2, 3)))


def test_a_moved_checkpoint_is_still_the_same(setting: Setting, tmp_path):
    score_corpus(**setting.arguments(out=tmp_path / "out", part=(0, 3)))
    moved = []
    for source in setting.sources:
        (tmp_path / source.name).symlink_to(source.path)
        moved.append(Source(source.name, source.step, tmp_path / source.name, source.tasks))
    score_corpus(**setting.arguments(out=tmp_path / "out", checkpoints=moved))
    assert len(read_scores(tmp_path / "out").row) == len(Corpus(setting.domains, "sequence", LENGTH))


def test_a_file_of_another_scoring_is_found_out(setting: Setting, tmp_path):
    for name, layers in (("a", None), ("b", "lm_head")):
        score_corpus(**setting.arguments(out=tmp_path / name, layers=layers))
    (tmp_path / "b" / "scores-00001.parquet").replace(tmp_path / "a" / "scores-00001.parquet")
    with pytest.raises(ValueError, match=r"scores-00001.parquet is of another configuration"):
        read_scores(tmp_path / "a")
    (tmp_path / "a" / "scores-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"scores-00001.parquet is damaged .*remove it and run the same scoring again"):
        read_scores(tmp_path / "a")
    (tmp_path / "b" / "scoring.json").unlink()
    with pytest.raises(ValueError, match=r"scoring.json: no such file"):
        read_scores(tmp_path / "b")
    with pytest.raises(ValueError, match=r"is there without scoring.json: give an empty folder"):
        score_corpus(**setting.arguments(out=tmp_path / "b"))


def test_domains_may_be_views_and_lists_and_models_any_module(setting: Setting, tmp_path):
    stores = {name: TokenStore.open(path) for name, path in setting.domains.items()}
    rows = PackedSequences(stores["web"], LENGTH)
    domains = {
        "documents": DocumentView([stores["code"]], [0, 0, 0], [2, 0, 4]),
        "rows": RowView([rows], [0, 0], [3, 1]),
        "list": [{"input_ids": row["input_ids"].tolist()} for row in rows],
    }

    def load(path):
        model = LlamaForCausalLM.from_pretrained(path)

        class Bare(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, input_ids):
                return self.model(input_ids).logits

        return Bare()

    score_corpus(**setting.arguments(out=tmp_path / "views", domains=domains, load=load))
    score_corpus(**setting.arguments(out=tmp_path / "stores"))
    for read in (read_scores, read_losses):
        found, want = read(tmp_path / "views"), read(tmp_path / "stores")
        assert found.domains == tuple(domains)
        listed = found.scores[found.domain == 2]
        np.testing.assert_allclose(found.scores[found.domain == 1], listed[[3, 1]], rtol=1e-5)
        if read is read_losses:  # the scores have another curvature
            np.testing.assert_allclose(listed, want.scores[want.domain == 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"domains": {}}, "domains is empty"),
        ({"tasks": {}}, "is to score task 'arc'; there are"),
        ({"checkpoints": []}, "checkpoints is empty"),
        ({"part": (2, 2)}, r"part=\(2, 2\)"),
        ({"actors": 1, "part": (0, 2)}, "with actors no part"),
        ({"unit": "page"}, "unit='page'"),
        ({"sequence_length": 1}, "sequence_length=1: at least 2"),
        ({"sequence_length": None}, "sequence_length is missing"),
        ({"device": "warp"}, "device='warp' is none"),
        ({"layers": "("}, r"layers='\(' is no regular expression"),
        ({"batch_tokens": 0}, "batch_tokens=0: at least 1"),
        ({"shard_samples": 0}, "shard_samples=0: at least 1"),
        ({"curvature_sequences": 0}, "curvature_sequences=0: at least 1"),
        ({"domains": {"list": [{"input_ids": [1, 2]}]}, "unit": "document"}, "'list' is a list: with unit='document'"),
        ({"sequence_length": 500}, "domain 'web' has not one whole sequence"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(setting: Setting, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        score_corpus(**setting.arguments(out=tmp_path / "out") | change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([], r"tasks\['arc'\] is empty"),
        ([{"input_ids": []}], r"tasks\['arc'\] is empty"),
        ([{"input_ids": [5]}], r"tasks\['arc'\] has no token to score"),
        ([{"input_ids": [[1, 2]]}], r"tasks\['arc'\]: example 0 is no dict with input_ids \[tokens\]"),
        ([{"text": "one"}], r"tasks\['arc'\]: example 0 is no dict"),
        ([{"input_ids": [1, VOCABULARY]}], "task 'arc' has token 97, the vocabulary of checkpoint 'step-3' has 97"),
        ([{"input_ids": [1] * 65}], "task 'arc' has a sequence of 65 tokens, checkpoint 'step-3' takes 64 at most"),
    ],
)
def test_bad_tasks_are_refused(setting: Setting, tmp_path, examples, said):
    with pytest.raises(ValueError, match=said):
        score_corpus(**setting.arguments(out=tmp_path / "out", tasks=setting.tasks | {"arc": examples}))


@pytest.mark.parametrize("kind", [LlamaForCausalLM, GPT2LMHeadModel])
def test_a_model_that_is_given_may_read_longer_sequences_if_it_computes_positions(setting: Setting, tmp_path, kind):
    def load(path):
        return kind(kind.config_class(**sizes)).eval()

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": LENGTH - 1, "bos_token_id": 1, "eos_token_id": 2}
    arguments = setting.arguments(out=tmp_path / "out", load=load)
    with nullcontext() if kind is LlamaForCausalLM else pytest.raises(ValueError, match="takes 11 at most"):
        score_corpus(**arguments)


def test_a_corpus_that_a_model_cannot_score_is_refused(setting: Setting, tmp_path):
    TokenStore.write(tmp_path / "big", [[200] * 40])
    with pytest.raises(ValueError, match="the corpus has token 200, the vocabulary of checkpoint 'step-3' has 97"):
        score_corpus(**setting.arguments(out=tmp_path / "out", domains={"big": tmp_path / "big"}))
    TokenStore.write(tmp_path / "mixed", [[1] * 10_000, [200] * 12])  # not in what the curvature is fitted on
    with pytest.raises(ValueError, match="the corpus has token 200"):
        score_corpus(**setting.arguments(out=tmp_path / "out", domains={"mixed": tmp_path / "mixed"}, part=(69, 70)))
    TokenStore.write(tmp_path / "ones", [[1]] * 40)
    with pytest.raises(ValueError, match="the corpus has no sequence with a token to score"):
        score_corpus(**setting.arguments(out=tmp_path / "out", domains={"ones": tmp_path / "ones"}, unit="document"))


def test_weights_that_lack_something_are_refused(setting: Setting, tmp_path):
    from safetensors.torch import load_file, save_file

    source = setting.sources[0]
    (tmp_path / "model").mkdir()
    weights = load_file(source.path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model" / "config.json").write_text((source.path / "config.json").read_text())
    broken = Source("broken", 1, tmp_path / "model", tuple(setting.tasks))
    with pytest.raises(ValueError, match=r"its weights lack \['model.norm.weight'\]"):
        score_corpus(**setting.arguments(out=tmp_path / "out", checkpoints=[broken]))


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_size": 64},  # weights of other shapes
        {"hidden_act": "none"},  # unknown
        {"num_attention_heads": 5},  # impossible
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},  # needs a package that is not here
    ],
)
def test_weights_that_do_not_fit_their_configuration_are_named(setting: Setting, tmp_path, changed):
    shutil.copytree(setting.sources[0].path, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | changed))
    broken = Source("broken", 1, tmp_path / "model", tuple(setting.tasks))
    with pytest.raises(ValueError, match=f"checkpoint {tmp_path / 'model'} does not load"):
        score_corpus(**setting.arguments(out=tmp_path / "out", checkpoints=[broken]))


def test_the_checkpoint_that_has_no_finite_gradient_is_named(setting: Setting, tmp_path):
    model = LlamaForCausalLM.from_pretrained(setting.sources[0].path)
    model.lm_head.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    broken = Source("diverged", 9, tmp_path / "model", ("arc",))
    with pytest.raises(ValueError, match="checkpoint 'diverged': curvature: no sequence has a finite gradient"):
        score_corpus(**setting.arguments(out=tmp_path / "out", checkpoints=[*setting.sources, broken]))


def test_the_configuration_is_written_for_people(setting: Setting, finished):
    config = json.loads((finished / "scoring.json").read_text())
    assert [domain["name"] for domain in config["domains"]] == ["web", "code"]
    assert config["checkpoints"][1]["tasks"] == ["math.valid", "code"]
    assert config["checkpoints"][1]["path"] == str(setting.sources[1].path)
    assert config["sequence_length"] == LENGTH


def test_it_says_what_it_costs_and_restores_the_threads(setting: Setting, tmp_path, capsys):
    before, inside = torch.get_num_threads(), set()
    arguments = setting.arguments(out=tmp_path, progress=True, threads=1, part=(2, 3))
    torch.set_num_threads(2)
    try:
        score_corpus(**arguments, tick=lambda: inside.add(torch.get_num_threads()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert inside == {1}
    tokens = 2 * LENGTH * (len(Corpus(setting.domains, "sequence", LENGTH)) - 2 * arguments["shard_samples"])
    said = capsys.readouterr().err
    assert re.search(rf"{tokens} tokens to score, about [\d.e+]+ FLOPs; at [\d,]+ tokens/s \d:\d\d:\d\d", said)
    assert "100%" in said


def test_a_terminal_that_is_gone_ends_no_scoring(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    with TokenBar(10, visible=True) as bar:
        bar.begin(1)
        bar.add("checkpoint", 10)
