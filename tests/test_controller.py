import io
import json
import sys
import textwrap

import numpy as np
import pytest
import torch

import dynmix.measurement
from dynmix import EKFAC, Identity, Influence, MixtureController, MixtureDataset, Static, TiKMiXD
from dynmix.journal import Journal
from dynmix.mixers import Proposal
from tests.running import BATCH, STEPS, begun, controller, dataset, run, sequences, stepped
from tests.small import Bigram


def test_the_curvature_is_the_usual_ekfac_if_none_is_given() -> None:
    assert controller(dataset()).measurement.curvature == EKFAC(damping=0.1)


def test_decides_one_step_before_each_boundary_and_not_after_the_last():
    loop = controller(dataset())
    logs = run(loop)
    assert [step for step, entry in enumerate(logs, 1) if entry] == [4, 9, 14, 19]
    stages = loop.dataset.schedule.stages
    assert [(s.start, s.end) for s in stages] == [(0, 20), (20, 40), (40, 60), (60, 80), (80, None)]


def test_the_last_of_max_stages_goes_on_to_the_end(tmp_path):
    loop = controller(dataset(), max_stages=3, output=tmp_path / "whole")
    logs = run(loop)
    assert [step for step, entry in enumerate(logs, 1) if entry] == [4, 9]
    assert [(s.start, s.end) for s in loop.dataset.schedule.stages] == [(0, 20), (20, 40), (40, None)]
    assert loop.finish(Bigram(), 25)
    rows = Journal(tmp_path / "whole/journal.jsonl").rows()
    assert [(row["kind"], row["start"], row["end"]) for row in rows][-2:] == [("stage", 40, None), ("final", 100, None)]
    enough = controller(dataset(), max_stages=5)
    assert [step for step, entry in enumerate(run(enough), 1) if entry] == [4, 9, 14, 19]
    assert [(s.start, s.end) for s in enough.dataset.schedule.stages][-1] == (80, None)


@pytest.mark.parametrize("at", [3, 7, 12])
def test_a_run_of_max_stages_goes_on_from_a_checkpoint_with_the_same_decisions(at):
    torch.manual_seed(0)
    model = Bigram()
    whole = begun(controller(dataset(), max_stages=3), model)
    state = stepped(whole, model)[at]
    again = controller(dataset(), max_stages=3)
    again.load_state_dict(state)
    begun(again, model, at)
    stepped(again, model, at + 1)
    assert again.dataset.schedule.stages == whole.dataset.schedule.stages
    with pytest.raises(ValueError, match="has max_stages=3, this run None: pass that of"):
        controller(dataset()).load_state_dict(state)


def test_where_the_only_measurement_fails_the_first_mixture_goes_on_to_the_end(monkeypatch, caplog):
    loop = begun(controller(dataset(weights={"a": 0.3, "b": 0.7}), max_stages=2))
    monkeypatch.setattr(loop.measurement, "influence", lambda *_: 1 / 0)
    logs = [loop.step_ended(Bigram(), step) for step in range(1, 26)]
    assert [step for step, entry in enumerate(logs, 1) if entry] == [4]
    assert "stage 1 keeps the weights of the one before: ZeroDivisionError" in caplog.text
    assert [(s.start, s.end) for s in loop.dataset.schedule.stages] == [(0, 20), (20, None)]
    assert loop.dataset.schedule.weights_at(99) == pytest.approx({"a": 0.3, "b": 0.7})


def test_files_of_a_run_hold_no_code_and_say_what_it_was(tmp_path):
    loop = controller(dataset(), output=tmp_path, keep=1)
    run(loop)
    loop.finish(Bigram(), 25)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "config.json",
        "journal.jsonl",
        "snapshots/stage-0004/model.safetensors",
        "snapshots/stage-0004/snapshot.json",
    ]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mixer"]["name"] == "TiKMiXD"
    assert config["stage_steps"] == STEPS
    assert len(Journal(tmp_path / "journal.jsonl").rows()) == 6


def test_state_survives_json_and_the_journal_is_cut_back_to_it(tmp_path):
    first = controller(dataset(), output=tmp_path, keep=0)
    model = Bigram()
    begun(first, model)
    states = stepped(first, model)
    rows = Journal(tmp_path / "journal.jsonl").rows()
    second = controller(dataset(), output=tmp_path, keep=0)
    second.load_state_dict(states[11])
    begun(second, model, step=11)
    assert Journal(tmp_path / "journal.jsonl").rows() == rows[:3]
    assert stepped(second, model, 12)[25] == states[25]
    again = Journal(tmp_path / "journal.jsonl").rows()
    assert [row["weights"] for row in again] == [row["weights"] for row in rows]


def test_a_run_that_is_refused_leaves_the_files_of_an_earlier_one_alone(tmp_path):
    first, model = controller(dataset(), output=tmp_path), Bigram()
    begun(first, model)
    old = stepped(first, model)[6]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = controller(dataset(), output=tmp_path)
    again.load_state_dict(old)
    with pytest.raises(ValueError, match=r"take \[4, 8\] samples a step"):
        again.plan(batch_size=2 * BATCH)
    with pytest.raises(ValueError, match="the state is older than step 16"):
        begun(again, model, step=16)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written


def test_a_state_older_than_the_run_is_refused():
    first = controller(dataset())
    first.plan(batch_size=BATCH)
    old = first.state_dict()
    second = controller(dataset())
    second.load_state_dict(old)
    with pytest.raises(ValueError, match="the stage of sample 20 is not in it"):
        begun(second, step=9)


def test_an_influence_that_is_not_finite_is_not_even_shown_to_the_mixer(monkeypatch, tmp_path):
    real, calls = dynmix.measurement.group_influence, []

    def measure(*args, **kwargs):
        calls.append(1)
        influence = real(*args, **kwargs)
        return influence if len(calls) == 1 else Influence([[np.nan, 1.0]], influence.tasks, influence.domains)

    class Blind(Static):
        needs = frozenset({"influence"})

        def __init__(self):
            pass

        def propose(self, influence, prior, upper=None):
            return Proposal({"a": 0.9, "b": 0.1})

    monkeypatch.setattr(dynmix.measurement, "group_influence", measure)
    data = dataset()
    run(controller(data, Blind(), output=tmp_path, keep=0))
    assert all(stage.weights == data.schedule.stages[0].weights for stage in data.schedule.stages)
    row = Journal(tmp_path / "journal.jsonl").rows()[1]
    assert "not finite" in row["error"]
    assert row["influence"] == [[None, 1.0]]


MIXERS = (
    "tikmix-d",
    {"name": "tikmix-d", "against": "run", "confidence": 0},
    "tikmix-m",
    "doge",
    "doremi",
    "odm",
    "ado",
    "uniform",
)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_domain_that_joins_is_decided_on_as_in_a_run_that_resumes(mixer, tmp_path):
    def go_on(loop, first):
        loop.watch(model)
        for step in range(first, 16):
            model(torch.stack([loop.dataset[g]["input_ids"] for g in range(step * BATCH - BATCH, step * BATCH)]))
            loop.step_ended(model, step)
            if step == 6:
                loop.dataset.extend({"c": sequences(2, 200)})
                state = json.dumps(loop.state_dict())
        return state if first == 1 else None

    def loop_of(name, names="ab"):
        data = MixtureDataset(
            {name: sequences("abc".index(name), 200) for name in names},
            {name: 0.5 if name in "ab" else 0.0 for name in names},
            num_samples=100,
            block=BATCH,
        )
        reference = Bigram(1) if mixer == "doremi" else None
        return controller(data, mixer, reference=reference, curvature=Identity(), output=tmp_path / name, keep=0)

    whole, again, model = loop_of("whole"), loop_of("again", "abc"), Bigram(0)
    begun(whole, model)
    state = go_on(whole, 1)
    again.load_state_dict(json.loads(state))
    begun(again, model, 6)
    go_on(again, 7)
    assert [row["error"] for row in Journal(tmp_path / "whole" / "journal.jsonl").rows()] == [None] * 4
    assert whole.dataset.schedule.stages == again.dataset.schedule.stages
    assert len(whole.dataset.schedule.stages) == 4


@pytest.mark.parametrize("mixer", ["tikmix-d", "tikmix-m", "doge", "odm", "ado", "fixed", "staged"])
@pytest.mark.parametrize("then", ["abc", "ab"])
def test_a_run_goes_on_without_a_domain_that_is_not_drawn_and_with_one_that_joined(mixer, then, caplog):
    def loop_of(names):
        domains = {name: sequences("abc".index(name), 200) for name in names}
        weights = {"a": 0.5, "b": 0.5} | dict.fromkeys(domains.keys() - {"a", "b"}, 0.0)
        data = MixtureDataset(domains, weights, num_samples=100, block=BATCH)
        by_hand = {"fixed": {"weights": weights}, "staged": {"stages": [weights, weights]}}
        return controller(data, {"name": mixer} | by_hand.get(mixer, {}), curvature=Identity())

    def steps(loop, model, first, last):
        loop.watch(model)
        for step in range(first, last):
            model(torch.stack([loop.dataset[g]["input_ids"] for g in range(step * BATCH - BATCH, step * BATCH)]))
            loop.step_ended(model, step)

    before, model = loop_of(then), Bigram()
    begun(before, model)
    steps(before, model, 1, 3)
    now = "ab" if then == "abc" else "abc"
    after = loop_of(now)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    begun(after, model, 2)
    steps(after, model, 3, 12)
    stages = after.dataset.schedule.stages
    assert "keeps the weights" not in caplog.text
    assert "taught the mixer nothing" not in caplog.text
    assert len(stages) == 3
    assert now == "abc" or stages[-1].weights["c"] == 0
    assert now == "ab" or mixer not in ("doge", "odm") or stages[-1].weights["c"] > 0.2


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("dataset"),
        lambda state: state.update(dataset=None),
        lambda state: state["dataset"].update(fingerprint={}),
        lambda state: state["dataset"]["schedule"]["stages"]["starts"].pop(1),
        lambda state: state["dataset"]["schedule"]["stages"].pop("weights"),
        lambda state: state["dataset"]["schedule"]["stages"]["starts"].__setitem__(1, 21),
    ],
)
def test_a_damaged_state_is_refused_as_such(damage):
    first = controller(dataset())
    run(first)
    state = json.loads(json.dumps(first.state_dict()))
    damage(state)
    with pytest.raises(ValueError, match="damaged"):
        controller(dataset()).load_state_dict(state)


def test_final_losses_that_cannot_be_measured_do_not_end_the_run(tmp_path, monkeypatch):
    loop = controller(dataset(), output=tmp_path, keep=0)
    run(loop)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(dynmix.measurement, "task_losses", fail)
    loop.finish(Bigram(), 25)
    last = Journal(tmp_path / "journal.jsonl").rows()[-1]
    assert last["kind"] == "final"
    assert "no room" in last["error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage_steps": 1}, "stage_steps=1: at least 2"),
        ({"max_stages": 1}, "max_stages=1: at least 2"),
        ({"probe_sequences": 0}, "probe_sequences=0"),
        ({"keep": -1}, "keep=-1"),
        ({"loss_every": 0}, "loss_every=0: at least every stage"),
        ({"stage_steps": "500"}, "stage_steps='500': give a whole number"),
        ({"stage_steps": 2.5}, "stage_steps=2.5: give a whole number"),
        ({"probe_sequences": None}, "probe_sequences=None: give a whole number"),
        ({"layer_groups": 2.5}, "layer_groups=2.5: give a whole number"),
        ({"micro_batch": "8"}, "micro_batch='8': give a whole number"),
        ({"mixer": "tikmix"}, "did you mean 'tikmix"),
        ({"mixer": "doremi"}, "pass reference="),
        ({"mixer": object()}, "subclass of dynmix.mixers.Mixer"),
        ({"guards": "all"}, "guards='all'"),
        ({"guards": ["web"]}, r"guards=\['web'\]"),
        ({"guards": {"t": [{"input_ids": [1, 2]}]}}, r"\['t'\] are tasks and guards"),
        ({"mixer": TiKMiXD}, "pass an instance"),
        ({"curvature": "ekfac"}, "curvature='ekfac' is no curvature: pass an instance"),
        ({"layers": "*.q_proj"}, r"layers='\*.q_proj' is no regular expression: nothing to repeat"),
        ({"layers": ["head"]}, r"layers=\['head'\] is no regular expression"),
        ({"curvature": EKFAC}, "is no curvature: pass an instance"),
        ({"max_epochs": {"c": 1}}, "no domain 'c'"),
        ({"max_epochs": {"a": -1}}, "at least 0"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        controller(dataset(), **options)


@pytest.mark.parametrize("wrong", [torch.utils.data.Subset(sequences(0, 8), range(8)), Bigram(), sequences(0, 8)])
def test_what_is_no_mixture_is_refused_as_the_dataset(wrong):
    with pytest.raises(ValueError, match=f"dataset is a {type(wrong).__name__}: give the MixtureDataset"):
        controller(wrong)


def test_no_tasks_and_decided_stages_are_refused():
    with pytest.raises(ValueError, match="tasks is empty"):
        MixtureController(dataset(), {}, TiKMiXD(), stage_steps=5)
    for wrong, name in (("stores/web.valid", "str"), ([sequences(0, 8)], "list")):
        with pytest.raises(ValueError, match=f"tasks is a {name}: give .* as {{name: batches}}"):
            MixtureController(dataset(), wrong, TiKMiXD(), stage_steps=5)
    data = dataset()
    data.schedule.publish({"a": 0.5, "b": 0.5}, 20)
    with pytest.raises(ValueError, match="the dataset has 2 stages"):
        controller(data).plan(batch_size=BATCH)


def test_losses_for_the_journal_are_measured_as_often_as_asked(tmp_path):
    loop = controller(dataset(), Static(), loss_every=2, output=tmp_path, keep=0)
    run(loop)
    rows = Journal(tmp_path / "journal.jsonl").rows()
    assert [row["task_loss"] is None for row in rows] == [False, True, False, True, False]


def test_only_what_a_mixer_needs_is_measured(monkeypatch):
    calls = []
    for name in ("influence", "gradient", "losses"):
        real = getattr(dynmix.measurement.Measurement, name)

        def counted(self, *args, name=name, real=real):
            calls.append(name)
            return real(self, *args)

        monkeypatch.setattr(dynmix.measurement.Measurement, name, counted)

    def measured_for(needs):
        class Needy(Static):
            def __init__(self):
                self.needs = needs

            def propose(self, influence, prior, upper=None, **more):
                assert (influence is None) == ("influence" not in needs)
                assert set(more) == ({"measure"} & set(needs))
                return super().propose(influence, prior, upper)

        loop = begun(controller(dataset(), Needy()))
        calls.clear()
        loop.step_ended(Bigram(), 4)
        return list(calls)

    assert measured_for(set()) == ["losses"]
    assert measured_for({"influence"}) == ["influence"]
    assert measured_for({"gradient"}) == ["gradient"]
    assert measured_for({"measure"}) == ["influence"]
    assert measured_for(["influence", "gradient", "guards"]) == ["influence", "gradient"]


def test_what_a_measurement_takes_is_said_before_and_what_a_low_rank_leaves_out_is_journaled(tmp_path, capsys):
    def influence(name, **options):
        torch.manual_seed(0)
        run(controller(dataset(), output=tmp_path / name, keep=0, **options), steps=4)
        return Journal(tmp_path / name / "journal.jsonl").rows()[1]

    plain, low = influence("plain"), influence("low", offload="disk", layer_groups=2, rank=4)
    assert capsys.readouterr().err.count("dynmix: a measurement takes about") == 2
    config = json.loads((tmp_path / "low" / "config.json").read_text())
    assert config["peak_memory"]["total"] > 0
    assert (config["offload"], config["layer_groups"], config["rank"]) == ("disk", 2, 4)
    assert plain["left_out"] is None
    assert 0 < low["left_out"]["t"] < 1
    apart = np.abs(np.subtract(low["influence"], plain["influence"]))
    assert (apart <= np.array(low["left_out_bound"]) * (1 + 1e-3)).all()
    assert (apart > 0).any()


def test_a_run_begins_where_nobody_reads_what_a_measurement_takes(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Gone())
    begun(controller(dataset()))


def test_a_run_begins_though_nobody_knows_what_a_measurement_takes(monkeypatch, tmp_path, caplog):
    loop = controller(dataset(), output=tmp_path)
    monkeypatch.setattr(loop.measurement, "peak_memory", lambda _: 1 / 0)
    begun(loop)
    assert "what a measurement will take of memory is not known: ZeroDivisionError" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["peak_memory"] is None


def test_workers_that_wait_hear_of_every_step(monkeypatch):
    """A stage may take longer than they wait without a sign of life, and they may be at its end from the start."""
    data, told = dataset(), []
    loop = begun(controller(data, Static()))
    monkeypatch.setattr(data, "pulse", lambda: told.append(True))
    for step in (1, 2, 3):
        loop.step_ended(Bigram(), step)
        assert len(told) == step


def test_a_resumed_run_that_is_finished_is_not_gone_on_with():
    first, model = controller(dataset()), Bigram()
    begun(first, model)
    state = stepped(first, model, last=7)[7]
    again = controller(dataset())
    again.load_state_dict(state)
    begun(again, model, 7)
    again.finish(model, 7)
    with pytest.raises(ValueError, match="the dataset has 2 stages: .* for another run"):
        again.plan(batch_size=BATCH)


def test_a_rank_that_cannot_write_the_runs_files_tells_the_others(tmp_path, processes):
    script = tmp_path / "begin.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import torch.distributed as dist
        from tests import running

        dist.init_process_group("gloo")
        try:
            running.begun(running.controller(running.dataset(), output=sys.argv[1]))
        except Exception as failure:
            print(f"<{dist.get_rank()} {type(failure).__name__}: {failure}>", flush=True)
        dist.destroy_process_group()
        """)
    )
    (tmp_path / "file").touch()
    status, printed = processes.run(script, tmp_path / "file" / "run", ranks=2, timeout=60)
    assert status == 0, printed
    assert "<0 NotADirectoryError: " in printed
    assert "<1 RuntimeError: another rank failed: NotADirectoryError: " in printed


def test_what_a_rank_cannot_read_as_a_run_begins_is_told_to_the_others(processes, tmp_path):
    script = tmp_path / "read.py"
    script.write_text(
        textwrap.dedent("""
        import types
        import torch.distributed as dist
        from dynmix import MixtureDataset
        from tests import running
        from tests.small import Bigram

        def unreadable(*_):
            raise OSError("no disk")

        dist.init_process_group("gloo")
        model = Bigram()
        model.config = types.SimpleNamespace(vocab_size=64)
        if dist.get_rank():
            MixtureDataset.sequence = unreadable
        try:
            running.begun(running.controller(running.dataset(), "static"), model)
        except Exception as failure:
            print(f"<{dist.get_rank()} {type(failure).__name__}: {failure}>", flush=True)
        dist.destroy_process_group()
        """)
    )
    status, printed = processes.run(script, ranks=2, timeout=60)
    assert status == 0, printed
    assert "<0 RuntimeError: another rank failed: OSError: no disk>" in printed
    assert "<1 OSError: no disk>" in printed


def test_a_mixer_that_fails_on_a_rank_that_does_not_decide_changes_nothing(processes, tmp_path):
    script = tmp_path / "decide.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import torch.distributed as dist
        from dynmix import Proposal, Static
        from tests import running
        from tests.small import Bigram

        dist.init_process_group("gloo")

        class Moving(Static):
            def propose(self, influence, prior, upper=None):
                if dist.get_rank() and self.decides:
                    raise ValueError("nonsense")
                return Proposal({"a": 0.1, "b": 0.9})

        Moving.decides = False
        loop, model = running.begun(running.controller(running.dataset(), Moving(), output=sys.argv[1])), Bigram()
        Moving.decides = True
        running.stepped(loop, model, last=11)
        dist.destroy_process_group()
        """)
    )
    status, printed = processes.run(script, tmp_path / "run", ranks=2, timeout=60)
    assert status == 0, printed
    _, *rows = Journal(tmp_path / "run" / "journal.jsonl").rows()
    assert [row["weights"]["b"] for row in rows] == pytest.approx([0.9, 0.9])
    assert [row["error"] for row in rows] == [None] * 2
    assert "rank 0 decides stage 1, which another rank could not: ValueError: nonsense" in printed


def test_domains_that_one_rank_cannot_write_enter_on_none(processes, tmp_path):
    """As on a machine whose disk is full: what is decided later is of the domains that all ranks have."""
    script = tmp_path / "enter.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from pathlib import Path
        import numpy as np
        import torch.distributed as dist
        from dynmix import Proposal, Static
        from tests import running
        from tests.small import Bigram

        dist.init_process_group("gloo")
        folder = Path(sys.argv[1]) / str(dist.get_rank())

        class Entering(Static):
            def propose(self, influence, prior, upper=None):
                if "group" in prior:
                    return Proposal({"a": 0.2, "b": 0.8})
                return Proposal({"group": 1.0}, groups={"group": (np.array([0, 1]), np.array([3, 4]))})

        loop, model = running.begun(running.controller(running.dataset(), Entering(), output=folder)), Bigram()
        if dist.get_rank():
            folder.mkdir()
            (folder / "groups").touch()  # no folder can be made there
        running.stepped(loop, model, last=11)
        print(f"<{loop.dataset.domains} {len(loop.dataset.schedule.stages)}>", flush=True)
        dist.destroy_process_group()
        """)
    )
    status, printed = processes.run(script, tmp_path, ranks=2, timeout=60)
    assert status == 0, printed
    assert printed.count("<('a', 'b') 3>") == 2
    errors = [row["error"] for row in Journal(tmp_path / "0" / "journal.jsonl").rows()]
    assert errors[0] is None
    assert all("RuntimeError: another rank failed: " in error for error in errors[1:])


def test_ranks_resume_together_also_where_one_alone_has_a_folder(tmp_path, processes):
    script = tmp_path / "resume.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import torch.distributed as dist
        from dynmix.journal import Journal
        from tests import running
        from tests.small import Bigram

        dist.init_process_group("gloo")
        rank, model = dist.get_rank(), Bigram(0)
        output = None if rank else sys.argv[1]
        first = running.begun(running.controller(running.dataset(), output=output), model)
        state = running.stepped(first, model, last=11)[6]
        for truncate in (Journal.truncate, lambda *_: 1 / 0):
            again = running.controller(running.dataset(), output=output)
            again.load_state_dict(state)
            Journal.truncate = truncate
            try:
                running.begun(again, model, 6)
                running.stepped(again, model, 7)
                again.finish(model, 25)
            except Exception as failure:
                print(f"<{rank} {type(failure).__name__}: {failure}>", flush=True)
        dist.destroy_process_group()
        """)
    )
    status, printed = processes.run(script, tmp_path / "run", ranks=2, timeout=60)
    assert status == 0, printed
    assert {row["error"] for row in Journal(tmp_path / "run" / "journal.jsonl").rows()} == {None}
    assert "<0 ZeroDivisionError: " in printed
    assert "<1 RuntimeError: another rank failed: ZeroDivisionError: " in printed


def test_a_run_takes_off_the_model_what_an_interrupted_one_left():
    model = Bigram()
    first, second = (controller(dataset(), mixer) for mixer in ("odm", Static()))
    begun(first, model)
    begun(second, model)
    model(torch.tensor([[0, 1, 0, 3, 4]])).sum().backward()
    assert first.decider.watch.take(1, BATCH) is None
