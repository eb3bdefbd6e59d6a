"""AutoMixer as the whole integration: a Trainer run that regroups its own corpus at a boundary, killed and resumed."""

import json
import logging
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, TrainerCallback

import dynmix.mixture.late
import dynmix.sampling
from dynmix import AutoMixer, MixtureDataset
from dynmix.batches import collate
from dynmix.callbacks import MixtureHook
from dynmix.controller import MixtureController
from dynmix.journal import Journal
from dynmix.peaks import PeakSnapshots
from dynmix.report import write_report
from dynmix.scoring import read_losses
from dynmix.tables import stage_table
from dynmix.tasks import Record, Task
from tests.small import word_tokenizer

MIXER = {"name": "automixer", "every": 2, "keep": 0.8}
SAVING = {"save_strategy": "steps", "save_steps": 4}


class Interrupted(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(training, tmp_path_factory):
    """An uninterrupted run: its folder and its facts."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, training.facts(training.run(folder, mixer=MIXER, **SAVING))


def groups_of(folder):
    return Journal(folder / "dynmix/journal.jsonl").rows()[1]


def test_groups_take_the_domains_place_at_the_boundary(whole, training):
    folder, facts = whole
    rows = Journal(folder / "dynmix/journal.jsonl").rows()
    assert [row["error"] for row in rows] == [None] * 5
    assert rows[0]["domains"] == ["web", "code", "noise"]
    names = rows[1]["domains"]
    assert names[:3] == ["web", "code", "noise"]
    assert set(names[3:]) <= {"group:web", "group:code", "group:rest"}
    weights = rows[1]["weights"]
    assert all(weights[name] == 0 for name in names[:3])
    assert sum(weights.values()) == pytest.approx(1)
    assert [row["weights"] for row in rows[2:4]] == [weights] * 2
    assert "sequences regrouped" in rows[1]["message"]
    # What reaches the model from the boundary on are rows of the groups, and of no others.
    seen = {tuple(pair) for pair in facts["order"][training.BATCH * training.STAGE_STEPS :]}
    members = set()
    for name in names[3:]:
        if weights[name]:
            file = folder / f"dynmix/groups/{name.replace(':', '%3A')}.npy"
            numbers = np.lib.format.open_memmap(file, mode="r")
            members |= {divmod(int(number), training.ROWS) for number in numbers}
    assert seen <= members
    assert len(members) < 3 * training.ROWS


def test_journal_tables_and_report_have_the_groups(whole, tmp_path):
    folder, _ = whole
    rows = Journal(folder / "dynmix/journal.jsonl").rows()
    assert list(rows[1]["weights_before"]) == list(rows[1]["weights"]) == rows[1]["domains"]
    assert "group:web" in rows[1]["domains"]
    for row in rows:
        text = StringIO()
        Console(file=text, width=120).print(stage_table(row))
        assert ("group:web" in text.getvalue()) == (row["stage"] > 0)
    page = write_report(folder / "dynmix/journal.jsonl", tmp_path / "report.html")
    assert "group:web" in page.read_text()


def test_the_first_stage_is_that_of_a_run_without_it(whole, training, tmp_path):
    _, facts = whole
    plain = training.facts(training.run(tmp_path, mixer="static"))
    n = training.STAGE_STEPS
    assert facts["losses"][:n] == plain["losses"][:n]
    assert facts["order"][: n * training.BATCH] == plain["order"][: n * training.BATCH]
    assert facts["losses"][n + 1 :] != plain["losses"][n + 1 :]


@pytest.mark.parametrize("step", [5, 10])
def test_an_interrupted_run_goes_on_bit_for_bit(whole, training, tmp_path, step):
    with pytest.raises(KeyboardInterrupt):
        training.run(tmp_path, mixer=MIXER, extra=(Interrupted(step),), **SAVING)
    resumed = training.facts(training.run(tmp_path, mixer=MIXER, resume=True, **SAVING))
    assert_continued(resumed, whole, step // 4 * 4, training, tmp_path)


def test_a_run_that_is_killed_while_it_scores_goes_on_there(whole, training, tmp_path, monkeypatch):
    saving = SAVING | {"save_steps": 3}  # the boundary's work is done after step 4
    real = dynmix.sampling.score_corpus

    def killed(*args, **options):
        real(*args, **options)
        raise KeyboardInterrupt  # all is scored, nothing decided

    monkeypatch.setattr(dynmix.sampling, "score_corpus", killed)
    with pytest.raises(KeyboardInterrupt):
        training.run(tmp_path, mixer=MIXER, **saving)
    monkeypatch.setattr(dynmix.sampling, "score_corpus", real)
    scored = sorted((tmp_path / "dynmix/scores").rglob("*.parquet"))
    before = [path.stat().st_mtime_ns for path in scored]
    resumed = training.facts(training.run(tmp_path, mixer=MIXER, resume=True, **saving))
    assert scored
    assert [path.stat().st_mtime_ns for path in scored] == before
    assert_continued(resumed, whole, 3, training, tmp_path)


def assert_continued(resumed, whole, saved, training, folder):
    facts = whole[1]
    assert resumed["stages"] == facts["stages"]
    assert resumed["order"] == facts["order"][saved * training.BATCH :]
    assert resumed["losses"] == facts["losses"][saved:]
    assert resumed["parameters"] == facts["parameters"]
    ours, theirs = (PeakSnapshots(path / "dynmix/peaks").curves for path in (folder, whole[0]))
    assert ours == theirs


def test_workers_and_processes_do_not_change_it_and_a_kill_neither(whole, launch, training, tmp_path):
    facts = whole[1]
    workers = training.facts(training.run(tmp_path / "workers", mixer=MIXER, dataloader_num_workers=2, **SAVING))
    assert workers == facts
    assert launch(tmp_path / "killed", kill_at=9, mixer=MIXER, **SAVING) == -9
    launch(tmp_path / "killed", resume=True, mixer=MIXER, **SAVING)
    killed = json.loads((tmp_path / "killed/facts-0.json").read_text())
    assert killed["stages"] == [list(stage) for stage in facts["stages"]]
    assert killed["parameters"] == facts["parameters"]
    half = {"per_device_train_batch_size": training.BATCH // 2}
    launch(tmp_path / "two", ranks=2, mixer=MIXER, **half, **SAVING)
    two = [json.loads((tmp_path / f"two/facts-{rank}.json").read_text()) for rank in (0, 1)]
    assert two[0]["stages"] == two[1]["stages"]
    assert list(two[0]["stages"][1][2]) == list(facts["stages"][1][2])


def test_a_scoring_that_fails_keeps_the_weights_and_is_tried_again(training, tmp_path, monkeypatch, caplog):
    real, calls = dynmix.sampling.score_corpus, []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("disk full")
        real(*args, **options)

    monkeypatch.setattr(dynmix.sampling, "score_corpus", failing)
    with caplog.at_level(logging.WARNING):
        training.run(tmp_path, mixer=MIXER)
    rows = Journal(tmp_path / "dynmix/journal.jsonl").rows()
    assert rows[1]["error"] == "OSError: disk full"
    assert rows[1]["weights"] == pytest.approx({"web": 0.3, "code": 0.2, "noise": 0.5})
    assert rows[2]["error"] is None
    assert len(calls) == 2
    assert "disk full" in caplog.text


def test_what_is_scored_is_what_is_trained_on(training, tmp_path, monkeypatch):
    ignored, real, found = list(range(0, training.VOCAB, 3)), dynmix.sampling.score_corpus, []

    def scored(domains, tasks, sources, out, **options):
        real(domains, tasks, sources, out, **options)
        found.append((read_losses(out), LlamaForCausalLM.from_pretrained(sources[0].path)))

    monkeypatch.setattr(dynmix.sampling, "score_corpus", scored)
    options = {"ignore_token_ids": ignored, "boundaries": "position_ids"}
    dataset = training.run(tmp_path, mixer=MIXER, data_options=options).train_dataset
    (losses, model), items = found[0], [dataset.sequence(n, r) for n in training.DOMAINS for r in range(training.ROWS)]
    with torch.no_grad():
        plain = [model(**collate([item]), use_cache=False).loss.item() for item in items]
    np.testing.assert_allclose(losses.scores[:, 0], plain, rtol=1e-5)


def test_groups_too_small_for_the_run_are_seen_more_often_and_that_is_said(training, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        training.run(tmp_path, mixer=AutoMixer(every=2, keep=0.3, max_epochs=0.5))
    row = groups_of(tmp_path)
    assert row["error"] is None
    assert "the groups are too small for the 1920 tokens that are left" in caplog.text
    seen = Journal(tmp_path / "dynmix/journal.jsonl").rows()[-1]["epochs"]
    late = [epochs for name, epochs in seen.items() if name.startswith("group:")]
    assert max(late) - min(late) < 0.5


def test_padding_does_not_make_groups_too_small(training, tmp_path, monkeypatch, caplog):
    real, length = training.sequences, training.LENGTH

    def padded(*args, **options):
        mask = [1] * (length // 2) + [0] * (length - length // 2)
        return [item | {"attention_mask": mask} for item in real(*args, **options)]

    monkeypatch.setattr(training, "sequences", padded)
    with caplog.at_level(logging.WARNING):  # 120 of 180 sequences are left to train on, of half as many tokens
        training.run(tmp_path, mixer=AutoMixer(every=2, keep=1.0, max_epochs=1))
    assert groups_of(tmp_path)["error"] is None
    assert "groups" not in caplog.text
    seen = Journal(tmp_path / "dynmix/journal.jsonl").rows()[-1]["epochs"]
    assert max(epochs for name, epochs in seen.items() if name.startswith("group:")) <= 1


@pytest.mark.parametrize("place", ["data_options", "options"])
def test_the_run_s_own_limit_holds_for_groups_and_no_raw_domain_comes_back(training, tmp_path, place):
    training.run(tmp_path, mixer=AutoMixer(every=2, keep=0.5), **{place: {"max_epochs": 1.5}})
    rows = Journal(tmp_path / "dynmix/journal.jsonl").rows()
    assert [row["error"] for row in rows] == [None] * 5
    for row in rows[1:4]:
        assert all(row["weights"][name] == 0 for name in training.DOMAINS)
        assert min(row["weights"].values()) == 0 < row["weights"]["group:rest"]  # what the others cannot hold
    seen = {name: epochs for name, epochs in rows[-1]["epochs"].items() if name.startswith("group:")}
    assert max(seen.values()) <= 1.5
    assert min(epochs for name, epochs in seen.items() if name != "group:rest") > 1.4


def test_groups_too_small_for_the_run_s_own_limit_are_read_within_it(training, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        training.run(tmp_path, mixer=AutoMixer(every=2, keep=0.2), data_options={"max_epochs": 1})
    rows = Journal(tmp_path / "dynmix/journal.jsonl").rows()
    assert [row["error"] for row in rows] == [None] * 5
    assert "within the run's max_epochs=1 they hold" in caplog.text
    seen = rows[-1]["epochs"]
    assert max(seen.values()) <= 1
    assert min(epochs for name, epochs in seen.items() if name.startswith("group:")) > 0.9


def test_a_domain_that_joined_before_is_said_to_be_in_no_group(training, tmp_path, caplog):
    class Joining(TrainerCallback):
        def on_step_end(self, args, state, control, train_dataloader, **kwargs):
            if state.global_step == 2:
                train_dataloader.dataset.extend({"late": training.sequences(0, 12, salt=2)})

    training.run(tmp_path, mixer=AutoMixer(every=2, keep=0.8), extra=(Joining(),))
    assert groups_of(tmp_path)["error"] is None
    assert "domains ['late'] joined the run and are not scored" in caplog.text


def test_where_a_domain_is_gone_the_others_are_regrouped(training, tmp_path):
    def loop(weights):
        rows = {name: training.sequences(training.DOMAINS.index(name)) for name in weights}
        data = MixtureDataset(rows, weights, num_samples=96, block=8)
        output = tmp_path / "dynmix"
        return MixtureHook(training.model(), data, training.tasks(), AutoMixer(every=2), 5, output=output, batch_size=8)

    first = loop({"web": 0.5, "noise": 0.0, "code": 0.5})
    for _ in DataLoader(first.dataset, batch_size=8, sampler=range(24)):
        first.step()
    second = loop({"web": 0.5, "code": 0.5})
    second.load_state_dict(first.state_dict())
    for _ in DataLoader(second.dataset, batch_size=8, sampler=range(24, 72)):
        second.step()
    assert errors(tmp_path) == [None] * 3
    drawn = [second.dataset[i] for i in range(40, 72)]
    assert {second.dataset.domains[item["domain"]] for item in drawn} <= {"group:web", "group:code", "group:rest"}
    assert {item["input_ids"][0].item() for item in drawn} == {0, 1}  # which sequences tell


@pytest.mark.parametrize("checkpoints", ["last", 2])
def test_checkpoints_by_step_alone(training, tmp_path, checkpoints):
    training.run(tmp_path, mixer=AutoMixer(every=2, keep=0.8, checkpoints=checkpoints))
    row = groups_of(tmp_path)
    assert row["error"] is None
    config = json.loads((tmp_path / "dynmix/scores/step-0000004/scoring.json").read_text())
    assert [c["step"] for c in config["checkpoints"]] == ([4] if checkpoints == "last" else [2, 4])
    assert all(c["tasks"] == ["web", "code"] for c in config["checkpoints"])


def test_in_a_loop_of_your_own(training, tmp_path, caplog):
    def steps(hook, model, data, until):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in DataLoader(data, batch_size=training.BATCH, sampler=range(hook.position, len(data))):
            model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            hook.step()
            if hook.steps == until:
                break

    def parts(folder):
        model, data = training.model(dropout=0.0), training.dataset()
        hook = MixtureHook(model, data, training.tasks(), AutoMixer(every=2, keep=0.8), 5, output=folder,
                           batch_size=training.BATCH)  # fmt: skip
        return hook, model, data

    hook, model, data = parts(tmp_path / "whole")
    steps(hook, model, data, None)
    assert any(name.startswith("group:") for name in data.domains)
    assert "peaks.json is not there" not in caplog.text
    again, twin, _ = parts(tmp_path / "parts")
    steps(again, twin, again.dataset, 8)
    state = json.loads(json.dumps(again.state_dict()))
    resumed, _, late = parts(tmp_path / "parts")
    resumed.model = twin
    resumed.load_state_dict(state)
    steps(resumed, twin, late, None)
    assert late.schedule.stages == data.schedule.stages
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(ValueError, match="pass output="):
        MixtureHook(model, training.dataset(), training.tasks(), AutoMixer(), 5, batch_size=training.BATCH)


def test_refusals(training, tmp_path):
    for arguments, message in (
        ({"after": 0}, "after=0"),
        ({"keep": 0}, "keep=0"),
        ({"blend": "late"}, "blend='late'"),
        ({"every": 0}, "every=0"),
        ({"checkpoints": "first"}, "checkpoints='first'"),
        ({"max_epochs": 0}, "max_epochs=0"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoMixer(**arguments)
    with pytest.raises(ValueError, match="only a dynmix.Task has more than a loss"):
        training.run(tmp_path, mixer=AutoMixer(metric="accuracy"))


def test_groups_that_cannot_be_kept_change_nothing(training, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(dynmix.mixture.late, "written", full)
    training.run(tmp_path, mixer=MIXER)
    row = groups_of(tmp_path)
    assert row["error"] == "OSError: disk full"
    assert row["weights"] == pytest.approx({"web": 0.3, "code": 0.2, "noise": 0.5})


def errors(folder):
    return [row["error"] for row in Journal(folder / "dynmix/journal.jsonl").rows()]


def words(training, lengths):
    """A Task of texts of so many tokens."""
    records = [Record("here", "", " ".join(f"w{i}" for i in range(1, length))) for length in lengths]
    return Task("web", records, word_tokenizer((f"w{i}" for i in range(training.VOCAB)), "w0", bos_token="w0"))


def test_an_evaluation_that_fails_does_not_end_the_run(training, tmp_path, monkeypatch, caplog):
    real, calls = dynmix.sampling.task_losses, []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a kernel failed")
        return real(*args, **options)

    monkeypatch.setattr(dynmix.sampling, "task_losses", failing)
    training.run(tmp_path, mixer=AutoMixer(every=1, keep=0.8))
    assert "the tasks were not evaluated after step 2: RuntimeError: a kernel failed" in caplog.text
    assert errors(tmp_path) == [None] * 5
    assert len(calls) > 10


def test_an_evaluation_that_runs_out_of_memory_goes_on_in_smaller_batches(training, tmp_path, monkeypatch):
    real, asked = Task.evaluate, []

    def evaluate(self, model, *, batch_tokens=8192):
        asked.append(batch_tokens)
        if batch_tokens > 2 * training.LENGTH:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, model, batch_tokens=batch_tokens)

    monkeypatch.setattr(Task, "evaluate", evaluate)
    monkeypatch.setattr(training, "tasks", lambda: {"web": words(training, [9, 5])})
    training.run(tmp_path, mixer=AutoMixer(every=2, keep=0.8))
    assert errors(tmp_path) == [None] * 5
    assert asked[:3] == [8 * training.LENGTH, 4 * training.LENGTH, 2 * training.LENGTH]
    assert set(asked[3:]) == {2 * training.LENGTH}


def test_a_disk_that_is_full_costs_a_snapshot_and_not_the_run(training, tmp_path, monkeypatch, caplog):
    real, calls = dynmix.sampling.write_snapshot, []

    def full(*args, **options):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        real(*args, **options)

    monkeypatch.setattr(dynmix.sampling, "write_snapshot", full)
    training.run(tmp_path, mixer=AutoMixer(every=2, keep=0.8, checkpoints="last"))
    assert "step-0000002 was not saved and will not score: [Errno 28] No space left" in caplog.text
    assert errors(tmp_path) == [None] * 5


def test_a_task_that_does_not_fit_the_model_is_refused_at_the_start(training, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "tasks", lambda: {"web": words(training, [training.LENGTH + 1])})
    with pytest.raises(ValueError, match=f"the model takes {training.LENGTH} at most"):
        training.run(tmp_path, mixer=AutoMixer(every=2))
    assert not (tmp_path / "dynmix/journal.jsonl").exists()


class Counting(TrainerCallback):
    """The most snapshots that were on the disk after any step."""

    def __init__(self, folder):
        self.folder, self.most = folder, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.most = max(self.most, len(list(self.folder.glob("dynmix/checkpoints/step-*"))))


@pytest.mark.parametrize("saving", [{"save_strategy": "no"}, {"save_strategy": "steps", "save_steps": 2}])
@pytest.mark.parametrize(("checkpoints", "most"), [("last", 3), (2, 4), ("peak", 0)])
def test_snapshots_are_few_and_none_is_made_once_the_corpus_is_regrouped(training, tmp_path, checkpoints, most, saving):
    counting = Counting(tmp_path)
    training.run(tmp_path, mixer=AutoMixer(every=1, keep=0.8, checkpoints=checkpoints), extra=(counting,), **saving)
    assert errors(tmp_path) == [None] * 5
    assert (counting.most > 0) == (checkpoints != "peak")
    assert counting.most <= most
    assert not list(tmp_path.glob("dynmix/checkpoints/step-*"))
    assert len(list(tmp_path.glob("dynmix/peaks/step-*"))) <= 4  # where two tasks peak, now and when the last was saved


def test_snapshots_that_an_older_checkpoint_lacks_are_named(training, tmp_path, caplog):
    saved = {"mixer": AutoMixer(every=1, keep=0.8, checkpoints=2), "save_strategy": "steps", "save_steps": 3}
    training.run(tmp_path, **saved)
    training.run(tmp_path, resume=str(tmp_path / "checkpoint-6"), **saved)  # has its groups, and needs none
    assert "are not there" not in caplog.text
    training.run(tmp_path, resume=str(tmp_path / "checkpoint-3"), **saved)
    assert "snapshots of 3 steps are not there, the first that of step 1 (they go when a later" in caplog.text


def test_snapshots_that_cannot_be_deleted_end_no_run(training, tmp_path, monkeypatch, caplog):
    remove = shutil.rmtree

    def busy(path, ignore_errors=False, **options):
        if Path(path).parent.name == "checkpoints" and not ignore_errors:
            raise OSError(16, "Device or resource busy")
        remove(path, ignore_errors=ignore_errors, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    training.run(tmp_path, mixer=AutoMixer(every=1, keep=0.8, checkpoints=2), save_strategy="steps", save_steps=5)
    assert errors(tmp_path) == [None] * 5
    assert "checkpoints/step-0000001 was not deleted, training goes on: [Errno 16]" in caplog.text


def test_a_task_that_a_resumed_run_was_not_given_is_let_go(training, tmp_path, monkeypatch):
    saving = {"save_strategy": "steps", "save_steps": 2}
    mixer = AutoMixer(every=1, keep=0.8)
    with pytest.raises(KeyboardInterrupt):
        training.run(tmp_path, mixer=mixer, extra=(Interrupted(3),), **saving)
    monkeypatch.setattr(training, "tasks", lambda: {"web": training.sequences(0, 12, salt=1)})
    training.run(tmp_path, mixer=mixer, resume=True, **saving)
    rows = Journal(tmp_path / "dynmix/journal.jsonl").rows()
    assert [row["error"] for row in rows] == [None] * 5
    assert "group:web" in rows[1]["domains"]
    assert "group:code" not in rows[1]["domains"]


@pytest.mark.parametrize(("after", "said"), [(2, False), (3, True)])
def test_a_run_that_would_never_regroup_says_so(training, tmp_path, caplog, after, said):
    training.run(tmp_path, mixer=AutoMixer(after=after, every=5), steps=15)
    assert ("scored at no boundary of this run" in caplog.text) == said


@pytest.mark.parametrize("checkpoints", ["last", 2])
def test_a_run_that_ended_before_the_regrouping_regroups_when_it_is_extended(training, tmp_path, checkpoints):
    saving = {"save_strategy": "steps", "save_steps": 5}
    mixer = AutoMixer(after=2, every=1, keep=0.8, checkpoints=checkpoints)
    training.run(tmp_path, mixer=mixer, steps=10, **saving)
    training.run(tmp_path, mixer=mixer, resume=True, **saving)
    rows = Journal(tmp_path / "dynmix/journal.jsonl").rows()
    assert [row["error"] for row in rows] == [None] * len(rows)
    assert "sequences regrouped" in rows[2]["message"]


def test_whatever_fails_where_a_snapshot_is_written_parts_no_rank_from_the_others(
    training, tmp_path, monkeypatch, caplog
):
    """Rank 0 writes, and others wait for it: it must come back from there in any case."""

    def failing(*args, **options):
        raise ValueError("GenerationConfig is invalid")

    def full(file, content, **options):
        if content["tasks"]:  # that it can be written is seen as the run begins
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynmix.peaks.write_snapshot", failing)
    monkeypatch.setattr("dynmix.peaks.write_json", full)
    training.run(tmp_path, mixer=AutoMixer(every=2, keep=0.8))
    assert "was not saved and is no peak" in caplog.text
    assert "peaks.json was not written: [Errno 28]" in caplog.text
    assert "the tasks were not evaluated" not in caplog.text


def test_a_state_of_the_hook_counts_as_saved_when_the_next_step_is_done(training, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(MixtureController, "saved", lambda self, step: told.append(step))
    data = training.dataset()
    hook = MixtureHook(
        training.model(), data, training.tasks(), "static", 5, output=tmp_path, batch_size=training.BATCH
    )
    for batch in DataLoader(data, batch_size=training.BATCH):
        assert len(batch["domain"]) == training.BATCH
        hook.step()
        if hook.steps == 3:
            state = hook.state_dict()
            assert told == []
        if hook.steps == 4:
            assert told == [3]
            hook.state_dict()  # of which nothing becomes: the run goes back
            hook.load_state_dict(state)
            break
    hook.step()
    assert told == [3]


def test_without_checkpoints_of_its_own_a_run_may_still_go_back_to_the_one_it_began_from(
    training, tmp_path, monkeypatch
):
    mixer, told = AutoMixer(every=1, keep=0.8), []
    training.run(tmp_path, mixer=mixer, steps=10, save_strategy="steps", save_steps=10)
    monkeypatch.setattr(MixtureController, "saved", lambda self, step: told.append(step))
    training.run(tmp_path, mixer=mixer, resume=True)
    assert told == []
    training.run(tmp_path / "fresh", mixer=mixer)
    assert told == list(range(1, training.STEPS + 1))
