import textwrap

import numpy as np
import pytest
import torch

from dynmix import Influence, MixtureDataset, TiKMiXD
from dynmix.decider import Decider, Evidence
from dynmix.mixers import Mixer, Proposal, Static
from tests import running
from tests.small import Bigram

PRIOR = {"a": 0.6, "b": 0.4}
BATCH = 4


def dataset() -> MixtureDataset:
    domains = {
        name: [{"input_ids": torch.tensor([i, row, 2, 3])} for row in range(50)] for i, name in enumerate(("a", "b"))
    }
    return MixtureDataset(domains, PRIOR, num_samples=40, block=BATCH)


class Learner(Mixer):
    """Learns something from everything, and fails when it is told to."""

    needs = frozenset({"loss"})
    fails = False

    def __init__(self):
        self.steps: list[int] = []

    def observe(self, observation):
        if self.fails:
            raise ZeroDivisionError("bad luck")
        self.steps.append(observation.step)

    def propose(self, influence, prior, upper=None):
        return Proposal(dict(prior))

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = list(state["steps"])


def test_what_a_mixer_says_of_the_first_stage_holds_from_the_first_sample():
    data = dataset()
    Decider({"name": "fixed", "weights": {"a": 0.25, "b": 0.75}}, data, None)
    assert data.schedule.weights_at(0) == pytest.approx({"a": 0.25, "b": 0.75})
    data = dataset()
    Decider("static", data, None)
    assert data.schedule.weights_at(0) == pytest.approx(PRIOR)
    read = dataset()
    read.__getitems__([0, 1])
    with pytest.raises(ValueError, match="the loader has read 2 samples"):
        Decider("uniform", read, None)


def test_a_mixer_is_told_of_the_run_s_first_weights_where_the_state_has_left_them_out(monkeypatch):
    class Told(Learner):
        def start(self, run):
            self.first = run.weights

    long, data = dataset(), dataset()
    for stage in range(1, 9):
        long.publish({"a": stage / 10, "b": 1 - stage / 10}, 8 * stage)
    long.extend({"c": dataset().sequences["a"]})
    monkeypatch.setattr("dynmix.mixture.packed._ROOM", 0)
    state = long.state_dict()
    assert state["schedule"]["stages"]["first"] > 0
    decider = Decider(mixer := Told(), data, None)
    data.extend({"c": dataset().sequences["a"]})
    data.schedule.load_state_dict(state["schedule"])
    decider.load_state_dict({"name": "Told", "state": mixer.state_dict()})
    assert mixer.first == {**dataset().schedule.weights_at(0), "c": 0.0}
    Decider(later := Told(), data, None)  # of a dataset that was loaded before, all that is known
    assert later.first == data.schedule.weights_at(data.schedule.starts[0])


def test_a_rehearsal_leaves_the_mixer_as_it_was():
    mixer = Learner()
    mixer.steps = [7]
    decider = Decider(mixer, dataset(), None)
    decider.rehearse(Evidence(), PRIOR, {})
    assert decider.state_dict() == {"name": "Learner", "state": {"steps": [7]}}


def test_a_state_that_is_no_json_is_refused_where_it_becomes_one_and_not_at_the_first_checkpoint():
    class Forgetful(Learner):
        """Keeps arrays, from its first decision or its first observation on."""

        def observe(self, observation):
            self.steps = np.array([observation.step])

        def propose(self, influence, prior, upper=None):
            self.steps = np.array([1])
            return Proposal(dict(prior))

    with pytest.raises(ValueError, match=r"Forgetful.state_dict\(\) has to go through JSON.*turn arrays into lists"):
        Decider(Forgetful(), dataset(), None).rehearse(Evidence(), PRIOR, {})
    data, model = dataset(), Bigram()
    decider = Decider(Forgetful(), data, None)
    decider.watch.attach(model)
    model(torch.stack([data[g]["input_ids"] for g in range(BATCH)]))
    with pytest.raises(ValueError, match=r"Forgetful.state_dict\(\) has to go through JSON"):
        decider.observe(1, BATCH)


def test_a_gradient_is_observed_before_the_proposal_and_an_influence_only_shown_where_it_is_needed():
    seen = []

    class Aligned(Learner):
        needs = frozenset({"gradient"})

        def observe(self, observation):
            seen.append((observation.gradient, observation.steps))

        def propose(self, influence, prior, upper=None):
            seen.append(influence)
            return Proposal(dict(prior))

    gradient = Influence([[1.0, 2.0]], ["t"], ["a", "b"])
    decider = Decider(Aligned(), dataset(), None)
    proposal, cdf = decider.decide(Evidence(gradient, gradient), PRIOR, {}, step=9, steps=5)
    assert seen == [(gradient, 5), None]
    decider.decide(Evidence(gradient), PRIOR, {}, step=9, steps=5)  # it was not measured
    decider.rehearse(Evidence(Influence([[np.nan, 2.0]], ["t"], ["a", "b"])), PRIOR, {})  # as so few sequences may give
    assert seen[2:] == [None]
    assert proposal.weights == PRIOR
    np.testing.assert_allclose(cdf / 2**32, [0.6, 1.0])


def test_losses_reach_the_mixer_and_a_later_failure_is_only_logged(caplog):
    mixer, data, model = Learner(), dataset(), Bigram()
    decider = Decider(mixer, data, None)
    with pytest.raises(ValueError, match="no forward pass of the model in training mode was seen"):
        decider.observe(1, BATCH)
    decider.watch.attach(model)
    for step in (1, 2, 3):
        mixer.fails = step == 2
        model(torch.stack([data[g]["input_ids"] for g in range((step - 1) * BATCH, step * BATCH)]))
        decider.observe(step, BATCH)
    decider.observe(4, BATCH)  # of which nothing was seen
    assert mixer.steps == [1, 3]
    assert [record.getMessage() for record in caplog.records] == [
        "step 2 taught the mixer nothing: ZeroDivisionError: bad luck"
    ]


def test_the_state_of_another_mixer_is_not_taken_up(caplog):
    decider = Decider(Learner(), dataset(), None)
    decider.load_state_dict({"name": "ODM", "state": {"reward": {}}})
    assert decider.mixer.steps == []
    assert "the checkpoint's mixer is ODM: Learner starts afresh" in caplog.text
    decider.load_state_dict({"name": "Learner", "state": {"steps": [1, 2]}})
    assert decider.mixer.steps == [1, 2]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Proposal({"a": 0.9, "b": 0.6}), "sum to 1.5"),
        (Proposal({"a": 0.9, "b": 0.1}), "Wrong gave 'a' a weight of 0.9, above its bound 0.7"),
        ({"a": 0.5, "b": 0.5}, "not a Proposal"),
        (Proposal(PRIOR, decided_on=Influence([[1, 2]], ["t"], ["a", "b"])), "on \\['t'\\], which was not measured"),
    ],
)
def test_an_answer_that_is_no_mixture_is_refused(answer, message):
    class Wrong(Static):
        def propose(self, influence, prior, upper=None):
            return answer

    with pytest.raises(ValueError, match=message):
        Decider(Wrong(), dataset(), None).decide(Evidence(), PRIOR, {"a": 0.7}, step=1, steps=1)


def test_domains_that_enter_come_behind_the_others_within_their_bounds():
    class Entering(Mixer):
        needs = frozenset({"samples"})

        def propose(self, influence, prior, upper=None, *, samples=None):
            groups = {name: (np.zeros(3, int), np.arange(3)) for name in ("new", "rest")}
            return Proposal({"new": 0.8, "rest": 0.2}, groups=groups)

    decider = Decider(Entering(), dataset(), None)
    _, cdf = decider.decide(Evidence(), PRIOR, {}, step=1, steps=1)
    assert np.diff(cdf, prepend=0).tolist()[: len(PRIOR)] == [0] * len(PRIOR)
    assert len(cdf) == len(PRIOR) + 2
    bounded, _ = decider.decide(
        Evidence(), PRIOR, {}, step=1, steps=1, bound=lambda sizes: {name: 0.2 * n for name, n in sizes.items()}
    )
    assert bounded.weights == pytest.approx({"new": 0.6, "rest": 0.4})


def test_a_mixer_that_fails_keeps_the_weights(caplog):
    class Broken(Static):
        calls = 0

        def propose(self, *args, **kwargs):
            Broken.calls += 1
            if Broken.calls > 1:
                raise ZeroDivisionError("bad luck")
            return super().propose(*args, **kwargs)

    data = running.dataset()
    running.run(running.controller(data, Broken()))
    assert len(data.schedule.stages) == 5
    assert all(stage.weights == data.schedule.stages[0].weights for stage in data.schedule.stages)
    assert "bad luck" in caplog.text


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, "missing"),
        ({"a": 0.9, "b": 0.6}, "sum to 1.5"),
        ({"a": float("nan"), "b": 0.5}, "finite"),
        ({"a": 0.9, "b": 0.1}, "above its bound"),
    ],
)
def test_an_answer_that_is_no_mixture_keeps_the_weights_and_at_the_start_is_an_error(weights, message, caplog):
    class Wrong(Static):
        late = True

        def propose(self, influence, prior, upper=None):
            return Proposal(weights) if not self.late else super().propose(influence, prior, upper)

    mixer = Wrong()
    data = running.dataset(weights={"a": 0.5, "b": 0.5})
    loop = running.begun(running.controller(data, mixer, max_epochs={"a": 0.07}))
    mixer.late = False
    loop.step_ended(Bigram(), 4)
    assert data.schedule.stages[1].weights["a"] <= 0.5
    assert message in caplog.text
    early = running.controller(running.dataset(weights={"a": 0.5, "b": 0.5}), mixer, max_epochs={"a": 0.07})
    with pytest.raises(ValueError, match=message):
        running.begun(early)


def test_a_bound_on_a_domain_that_is_not_there_fails_at_the_start():
    loop = running.controller(running.dataset(), TiKMiXD(upper={"wbe": 0.3}))
    with pytest.raises(ValueError, match="no domain 'wbe'"):
        running.begun(loop)


def test_what_a_mixer_of_ones_own_gets_wrong_is_said_at_the_start():
    class Arrays(Static):
        def state_dict(self):
            return {"sum": np.zeros(2)}

    class Forgetful(Static):
        def state_dict(self):
            return {"sum": 1}

    class Plain(Static):
        def propose(self, influence, prior, upper=None):
            return dict(prior)

    class Greedy(Static):
        needs = "everything"

        def __init__(self):
            pass

    for mixer, message in (
        (Arrays(), "has to go through JSON, but Object of type ndarray"),
        (Forgetful(), r"Forgetful has no state, but was given \['sum'\]"),
        (Plain(), "propose returned dict, not a Proposal"),
    ):
        loop = running.controller(running.dataset(), mixer)
        with pytest.raises(ValueError, match=message):
            running.begun(loop)
    with pytest.raises(ValueError, match=r"Greedy needs \['everything'\]"):
        running.controller(running.dataset(), Greedy())


def test_where_a_mixer_fails_at_the_start_on_one_rank_all_raise(processes, tmp_path):
    script = tmp_path / "start.py"
    script.write_text(
        textwrap.dedent("""
        import torch
        import torch.distributed as dist
        from dynmix import Static
        from tests import running
        from tests.small import Bigram

        dist.init_process_group("gloo")
        rank = dist.get_rank()

        class Learner(Static):
            def __init__(self):
                self.needs = frozenset({"loss"})
            def observe(self, seen):
                if rank == 1:
                    raise OSError("no table")

        class Decider(Static):
            def propose(self, influence, prior, upper=None):
                if rank == 1:
                    raise OSError("no table")
                return super().propose(influence, prior, upper)

        for mixer in (Learner(), Decider()):
            try:
                model, data = Bigram(), running.dataset()
                loop = running.controller(data, mixer, guards=None)
                running.begun(loop, model)
                model(torch.stack([data[g]["input_ids"] for g in range(running.BATCH)]))
                loop.step_ended(model, 1)
            except Exception as failure:
                print(f"<{rank} {type(failure).__name__}: {failure}>", flush=True)
        dist.destroy_process_group()
        """)
    )
    status, printed = processes.run(script, ranks=2, timeout=60)
    assert status == 0, printed
    assert printed.count("<0 RuntimeError: another rank failed: OSError: no table>") == 2
    assert printed.count("<1 OSError: no table>") == 2
