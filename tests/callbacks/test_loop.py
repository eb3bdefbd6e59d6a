import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.distributed import checkpoint
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

import dynmix.callbacks.loop
import dynmix.mixture.progress
from dynmix import EKFAC, AdamDiagonal, Identity, InRun, Static, TiKMiXD
from dynmix.callbacks import MixtureHook
from dynmix.callbacks.loop import check_read
from dynmix.journal import Journal
from dynmix.mixture.schedule import Undecided

OPTIONS = {"probe_sequences": 8, "curvature_sequences": 16, "task_sequences": 12, "keep": 0}


class Loop:
    """A plain training loop, its hook, and what it saw."""

    def __init__(self, training, mixer=None, batch=8, samples=160, **options):
        self.training = training
        self.dataset = training.dataset(samples=samples)
        self.model = training.model(dropout=0.0)  # its random state would be the loop's to restore
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.batch = batch
        self.hook = MixtureHook(
            self.model,
            self.dataset,
            tasks=training.tasks(),
            mixer=mixer or TiKMiXD(),
            **{"stage_steps": training.STAGE_STEPS} | OPTIONS | options,
        )
        self.order: list[list[int]] = []
        self.logs: list[dict[str, float]] = []

    def run(self, steps=20, workers=0, accumulate=1, batches=None):
        loader = DataLoader(
            self.dataset,
            batch_size=self.batch,
            sampler=range(self.hook.position, len(self.dataset)),
            num_workers=workers,
        )
        for number, batch in enumerate(loader if batches is None else batches, 1):
            self.order += batch["input_ids"][:, :2].tolist()
            self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
            if number % accumulate:
                continue
            self.optimizer.step()
            self.optimizer.zero_grad()
            if logs := self.hook.step():
                self.logs.append(logs)
            if self.hook.steps == steps:
                break
        return self

    def state(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def expected(loop) -> list[list[int]]:
    domain, row, _ = loop.dataset.schedule.assign(0, len(loop.order))
    return np.stack([domain, row], axis=1).tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [None, 8])
def test_swaps_at_declared_samples(training, tmp_path, workers, batch_size):
    loop = Loop(training, TiKMiXD(confidence=0.0), output=tmp_path, batch_size=batch_size).run(workers=workers)
    loop.hook.finish()
    assert loop.order == expected(loop)
    assert [stage.start for stage in loop.dataset.schedule.stages] == [0, 40, 80, 120]
    assert len({str(stage.weights) for stage in loop.dataset.schedule.stages}) >= 3
    assert [logs["dynmix/stage"] for logs in loop.logs] == [0, 1, 2, 3]
    assert [row["kind"] for row in Journal(tmp_path / "journal.jsonl").rows()] == ["stage"] * 4 + ["final"]


def test_stages_that_came_from_another_process_stay_as_they_are(training, sent):
    """As where ranks are started by fork or spawn: they would all decide in one memory."""
    shared, loop = sent.schedule, Loop(training).run(workers=1)
    assert loop.order == expected(loop)
    assert (sent.schedule.num_stages, shared.num_stages, shared.end) == (4, 1, None)


def test_gradient_accumulation_is_told_by_batch_size(training):
    plain = Loop(training, mixer=Static(), batch_size=8).run()
    accumulated = Loop(training, mixer=Static(), batch=4, batch_size=8).run(accumulate=2)
    assert accumulated.order == plain.order == expected(plain)


def test_gradient_accumulation_that_was_not_told_is_no_silent_drift(training):
    loop = Loop(training, batch=4)
    with pytest.raises(Undecided, match="not decided yet.* with gradient accumulation pass batch_size to MixtureHook"):
        loop.run(accumulate=2)


@pytest.mark.parametrize("read", [lambda data: data.__getitems__([40, 41]), lambda data: data[40]])
def test_who_reads_ahead_in_the_main_process_is_told_of_workers(training, read):
    """As a thread does; that of torchdata's Prefetcher asks for single items."""
    loop = Loop(training, batch_size=8)
    with pytest.raises(Undecided, match="position 40 is not decided yet: .* workers and not in a thread"):
        read(loop.dataset)


def test_workers_that_wait_in_vain_say_why_and_give_up(training, monkeypatch, caplog):
    """Accumulation that was not told: the loader is at the boundary when the hook believes to be half-way."""
    monkeypatch.setattr(dynmix.mixture.progress, "_WARN_SECONDS", 0.2)
    monkeypatch.setattr(dynmix.mixture.progress, "_GIVE_UP_SECONDS", 1.5)
    loop = Loop(training, batch=2, stage_steps=20, samples=400)
    with pytest.raises(Undecided, match="with gradient accumulation pass batch_size"):
        loop.run(accumulate=2, workers=1)


def test_a_batch_size_smaller_than_what_the_loader_reads_is_refused(training):
    with pytest.raises(ValueError, match="the loader reads 8 samples at once"):
        Loop(training, batch=8, batch_size=4).run(workers=1)


def test_a_look_at_the_data_before_does_not_mislead(training):
    loop = Loop(training)
    next(iter(DataLoader(loop.dataset, batch_size=2)))
    loop.run()
    assert loop.order == expected(loop)
    assert loop.hook.batch_size == 8


def test_state_resumes_bit_for_bit(training, tmp_path):
    whole = Loop(training).run()
    first = Loop(training).run(steps=12)
    saved = json.loads(json.dumps(first.hook.state_dict()))
    second = Loop(training)
    second.model.load_state_dict(first.state())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.hook.load_state_dict(saved)
    second.run()
    assert first.order + second.order == whole.order
    assert second.dataset.schedule.state_dict() == whole.dataset.schedule.state_dict()
    assert all(torch.equal(value, whole.state()[name]) for name, value in second.state().items())


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # a checkpoint of one process
@pytest.mark.parametrize("given", [{"mixer": "tikmix-d"}, {"in_run": InRun(3, every=1)}])
def test_a_distributed_checkpoint_holds_what_a_fresh_hook_has_not_yet(given, training, tmp_path):
    first = Loop(training, output=tmp_path / "run", batch_size=8, **given).run(steps=12)
    checkpoint.save({"hook": first.hook}, checkpoint_id=tmp_path / "checkpoint")
    second = Loop(training, output=tmp_path / "run", batch_size=8, **given)
    checkpoint.load({"hook": second.hook}, checkpoint_id=tmp_path / "checkpoint")
    assert second.hook.state_dict() == first.hook.state_dict()


@pytest.mark.parametrize("given", [{"mixer": "odm"}, {"curvature": EKFAC(ema=0.5)}, {"in_run": InRun(2, every=1)}])
def test_a_run_that_is_interrupted_in_a_step_goes_on_in_the_same_process(given, training, tmp_path):
    """As in a notebook: nothing stays of what was seen after the state, and no hook either."""
    whole = Loop(training, output=tmp_path / "whole", batch_size=8, **given).run()
    loop = Loop(training, output=tmp_path / "cut", batch_size=8, **given).run(steps=1)
    saved = [json.loads(json.dumps(loop.hook.state_dict())), loop.state(), copy.deepcopy(loop.optimizer.state_dict())]
    loop.run(steps=8)
    loop.model(input_ids=torch.tensor([loop.dataset[64]["input_ids"].tolist()])).logits.sum()  # and is interrupted
    loop.model.load_state_dict(saved[1])
    loop.optimizer.load_state_dict(saved[2])
    del loop.order[8:]
    loop.hook.load_state_dict(saved[0])
    hooks = [module for module in loop.model.modules() if module._forward_hooks]
    assert len(hooks) == ("mixer" in given)
    loop.run()
    assert loop.order == whole.order
    assert all(torch.equal(value, whole.state()[name]) for name, value in loop.state().items())
    rows = [Journal(tmp_path / name / "journal.jsonl").rows() for name in ("whole", "cut")]
    assert [row["influence"] for row in rows[0]] == [row["influence"] for row in rows[1]]


def test_what_is_decided_as_a_state_is_loaded_is_logged_with_the_next_step(training):
    ended = Loop(training, Static(), max_steps=10, batch_size=8).run(steps=10)
    assert ended.dataset.schedule.num_stages == 2
    longer = Loop(training, Static(), batch_size=8)
    longer.hook.load_state_dict(ended.hook.state_dict())
    assert longer.dataset.schedule.num_stages == 3
    longer.run(steps=15)
    assert [logs["dynmix/stage"] for logs in longer.logs] == [2, 3]


def test_what_the_first_step_logs_is_not_lost_where_the_tasks_are_evaluated_after_it(training, monkeypatch):
    loop = Loop(training, Static())
    monkeypatch.setattr(loop.hook.controller, "step_ended", lambda model, step: {"dynmix/task_accuracy/x": 0.5})
    logs = loop.run(steps=1).logs[0]
    assert logs["dynmix/task_accuracy/x"] == 0.5
    assert logs["dynmix/stage"] == 0


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)])
def test_a_run_goes_on_with_other_ranks_workers_and_batches(training, ranks):
    """Ranks that know nothing of each other, with a mixer that needs nothing of them."""

    def part(world, steps, saved=None, **options):
        """The samples of `steps` steps of 8, in order; half of the ranks' batch at a time. And the state after them."""
        orders = []
        for rank in range(world):
            loop = Loop(training, Static(), batch=4 // world, batch_size=8)
            if saved is not None:
                loop.hook.load_state_dict(json.loads(json.dumps(saved)))
            mine = range(loop.hook.position + rank, len(loop.dataset) // world * world, world)
            loop.run(steps, accumulate=2, batches=DataLoader(loop.dataset, loop.batch, sampler=mine, **options))
            orders.append(loop.order)
        return [sample for samples in zip(*orders, strict=True) for sample in samples], loop.hook.state_dict()

    whole = Loop(training, Static(), batch_size=8).run()
    before, saved = part(ranks[0], 12, num_workers=2 if ranks[0] == 1 else 0)
    after, _ = part(ranks[1], 20, saved, num_workers=2 if ranks[1] == 1 else 0)
    assert before + after == whole.order


def test_a_run_that_goes_on_with_another_batch_is_refused(training):
    saved = Loop(training, Static(), batch_size=8).run(steps=6).hook.state_dict()
    loop = Loop(training, Static(), batch=16)
    loop.hook.load_state_dict(saved)
    with pytest.raises(
        ValueError, match="the loader reads 16 samples at once, for one of 1 ranks: pass what .* keep it"
    ):
        loop.run()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_ends_with_the_last_whole_step_of_its_data(training, tmp_path, caplog, monkeypatch, workers):
    data = training.dataset(max_epochs={"noise": 1}, when_exhausted="stop", samples=400)
    monkeypatch.setattr(training, "dataset", lambda samples: data)
    loop = Loop(training, Static(), batch=4, batch_size=8, output=tmp_path).run(steps=50, accumulate=2, workers=workers)
    loop.hook.finish()
    end = data.schedule.exhausted_at
    assert 100 < end < 140
    assert loop.hook.steps == end // 8
    assert len(loop.order) == end // 8 * 8
    assert loop.order == expected(loop)
    reason = f"the stream ends at position {end}, where its domains have been read as often as they may: 'noise'"
    assert reason in Journal(tmp_path / "journal.jsonl").rows()[-1]["message"]
    assert f"the run ends after step {end // 8}: {reason}" in caplog.text


@pytest.mark.parametrize("homogeneous", [4, 8])
def test_micro_batches_of_ranks_that_take_samples_in_turn_are_of_one_domain(training, homogeneous):
    data = training.dataset(homogeneous=homogeneous)
    hook = MixtureHook(training.model(), data, training.tasks(), Static(), 5, batch_size=8)
    batches = list(DataLoader(data, 4, sampler=range(0, 32, 2)))  # of the first of two ranks
    if homogeneous == 8:
        assert all(len(set(batch["domain"].tolist())) == 1 for batch in batches)
        hook.step()
    else:
        with pytest.raises(ValueError, match="micro-batches of 8 sequences would hold several domains"):
            hook.step()


def test_one_rank_that_reads_for_all_at_once_is_told_what_is_wrong(training, monkeypatch):
    """As with accelerate's `dispatch_batches` and `split_batches`: every rank's share looks like a step of its own."""
    monkeypatch.setattr(dynmix.callbacks.loop, "Ranks", lambda shared: SimpleNamespace(rank=0, size=2))
    with pytest.raises(ValueError, match="8 samples at once, for one of 2 ranks: .* split_batches to False"):
        Loop(training, batch_size=8).run(steps=1)


def test_a_resumed_loader_that_starts_from_the_beginning_is_caught(training):
    saved = Loop(training).run(steps=12).hook.state_dict()
    loop = Loop(training)
    loop.hook.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"sampler=range\(hook.position"):
        loop.run(batches=iter(DataLoader(loop.dataset, batch_size=8)))


def test_a_second_pass_of_the_loader_is_refused_with_what_to_do(training):
    loop = Loop(training, samples=80, batch_size=8)
    loop.run(steps=10)
    with pytest.raises(ValueError, match="12 steps of 8 .* up to sample 80: that is all of it; .* raise num_samples"):
        loop.run(batches=DataLoader(loop.dataset, batch_size=8))


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_without_a_share_of_the_short_last_step_is_no_loader_of_other_batches(training, rank):
    """It gets samples of the beginning again, so that it has read one step less than those that have a share."""
    data = training.dataset(samples=33)
    batches = BatchSamplerShard(BatchSampler(SequentialSampler(data), 2, drop_last=False), 4, rank)
    for step, _ in enumerate(DataLoader(data, batch_sampler=batches), 1):
        check_read(data, step, 8, "")
    assert step == 5
    with pytest.raises(ValueError, match="7 steps of 8 samples"):
        check_read(data, 7, 8, "")


def test_workers_of_ranks_that_are_sent_what_the_first_one_reads_have_read_ahead_at_most(training, monkeypatch):
    """As with accelerate's `dispatch_batches`."""
    data = training.dataset()
    next(iter(DataLoader(data, batch_size=4, num_workers=1)))
    with pytest.raises(ValueError, match="4 steps of 8 samples"):
        check_read(data, 4, 8, "")
    monkeypatch.setattr(dynmix.callbacks.loop, "is_rank_0", lambda: False)
    check_read(data, 4, 8, "")


def test_a_loop_that_reads_without_a_loader_must_say_its_batch(training):
    loop = Loop(training)
    one = {key: value[None] for key, value in loop.dataset[0].items() if key != "domain"}
    with pytest.raises(ValueError, match="pass batch_size"):
        loop.run(batches=[one])


def test_a_loader_that_read_past_the_first_boundary_is_refused(training):
    loop = Loop(training, batch=8)
    read = list(DataLoader(loop.dataset, batch_size=8))
    with pytest.raises(ValueError, match="pass batch_size"):
        loop.run(batches=read)


def test_a_dataset_read_through_a_wrapper_works_with_batch_size(training):
    class Wrapper(torch.utils.data.Dataset):
        def __init__(self, inner):
            self.inner = inner

        def __len__(self):
            return len(self.inner)

        def __getitem__(self, index):
            return self.inner[index]

    loop = Loop(training, batch_size=8)
    loop.run(batches=DataLoader(Wrapper(loop.dataset), batch_size=8))
    assert loop.order == expected(loop)


def test_a_shuffled_loader_of_single_sequences_is_caught(training):
    data = training.dataset()
    with pytest.raises(ValueError, match="shuffle=False"):
        list(DataLoader(data, batch_size=1, shuffle=True))
    for _ in range(5):
        list(DataLoader(data, batch_size=1))


def test_other_stages_are_refused_on_resume(training):
    saved = Loop(training).run(steps=6).hook.state_dict()
    other = MixtureHook(
        training.model(), training.dataset(), training.tasks(), TiKMiXD(), stage_steps=7, curvature=Identity()
    )
    with pytest.raises(ValueError, match="stages are 5 steps, stage_steps=7"):
        other.load_state_dict(saved)


def test_ranks_of_a_sharded_model_decide_alike_and_save_it_whole(training, launch, tmp_path):
    launch(tmp_path, ranks=2, script=Path(__file__).with_name("sharded.py"))
    ranks = [json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["stages"] == ranks[1]["stages"]
    assert len({str(weights) for _, _, weights in ranks[0]["stages"]}) >= 3
    decided = training.dataset().schedule
    decided.hold(training.STAGE_STEPS * training.BATCH)
    for start, end, weights in ranks[0]["stages"][1:]:
        decided.publish(weights, start, end)
    domain, row, _ = decided.assign(0, training.STEPS * training.BATCH)
    expected_order = np.stack([domain, row], axis=1).tolist()
    assert [
        sample for pair in zip(*(rank["order"] for rank in ranks), strict=True) for sample in pair
    ] == expected_order
    saved = load_file(tmp_path / "snapshots/stage-0003/model.safetensors")
    whole = training.model().state_dict()
    assert {name: value.shape for name, value in saved.items()} == {name: value.shape for name, value in whole.items()}


def test_a_run_is_closed_once_and_only_if_it_began(training, tmp_path):
    """As by the `finally` of a loop that failed at once, in the folder of a run before."""
    loop = Loop(training, Static(), output=tmp_path, batch_size=8).run(steps=12)
    state = loop.hook.state_dict()
    loop.run()
    assert loop.hook.finish()
    written = (tmp_path / "journal.jsonl").read_bytes()
    assert loop.hook.finish() == {}
    assert Loop(training, Static(), output=tmp_path, batch_size=8).hook.finish() == {}
    assert (tmp_path / "journal.jsonl").read_bytes() == written
    with pytest.raises(ValueError, match="closed the run of 20 steps: load a state"):
        loop.hook.step()
    loop = Loop(training, Static(), output=tmp_path, batch_size=8)
    loop.hook.finish()
    loop.hook.load_state_dict(state)
    loop.run()
    assert loop.hook.finish()
    assert [row["kind"] for row in Journal(tmp_path / "journal.jsonl").rows()] == ["stage"] * 4 + ["final"]


def test_without_an_output_folder_nothing_is_written(training, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Loop(training).run().hook.finish()
    assert not list(tmp_path.iterdir())


def test_a_cache_that_hides_boundaries_is_warned_of_at_once(training, caplog):
    dataset = training.dataset(boundaries="position_ids")
    MixtureHook(training.model(), dataset, tasks=training.tasks(), mixer=Static(), stage_steps=5, batch_size=8)
    assert caplog.text.count("use_cache is on") == 1


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adamax])
def test_the_curvature_of_an_optimizer_that_keeps_none_is_refused_at_the_first_step(kind, training):
    """At the boundaries it would fail, and the weights stay for the whole run."""
    optimizers: list[torch.optim.Optimizer] = []
    loop = Loop(training, curvature=AdamDiagonal(lambda: optimizers[0]))
    loop.optimizer = kind(loop.model.parameters(), lr=0.1)
    optimizers.append(loop.optimizer)
    with pytest.raises(ValueError, match="AdamDiagonal: this .* is none of Adam's kin"):
        loop.run(steps=1)


@pytest.mark.parametrize("method", ["plan", "load_state_dict"])
def test_what_fails_on_one_rank_before_they_work_together_is_raised_on_all(told, tmp_path, method):
    assert told(tmp_path, "loop", method) == [
        "0 RuntimeError: another rank failed: OSError: no disk",
        "1 OSError: no disk",
    ]
