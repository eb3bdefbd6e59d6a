import logging
from types import SimpleNamespace

import numpy as np
import pytest

import dynmix.measurement
from dynmix import TiKMiXD
from dynmix.journal import Journal
from dynmix.mixers import Proposal
from dynmix.mixture.dataset import MixtureDataset
from dynmix.observation import Influence
from dynmix.record import Recorder, log_keys, losses_of, warnings_heard
from dynmix.run_folder import RunFolder
from dynmix.saved_influence import read_influence
from tests import running
from tests.small import Bigram


def dataset():
    domains = {name: [{"input_ids": [i, 1, 2]} for _ in range(100)] for i, name in enumerate("ab")}
    data = MixtureDataset(domains, {"a": 0.5, "b": 0.5}, num_samples=400, block=10)
    data.publish({"a": 0.25, "b": 0.75}, 100, 200)
    return data


def test_a_row_is_what_the_journal_takes_and_log_keys_are_its_numbers(tmp_path):
    influence = Influence([[1.0, np.nan]], ["t"], ["a", "b"], [[0.5, np.inf]], [2.0], [0.1], scored_tokens=[2, 3])
    proposal = Proposal({"a": 0.25, "b": 0.75}, "dual", "why", {"t": 0.1}, {"t": 0.2})
    recorder = Recorder(dataset(), SimpleNamespace(sets={"t": []}, guards=()), "TiKMiXD")
    recorder.write(
        RunFolder(tmp_path),
        "stage",
        step=9,
        position=100,
        loss=losses_of(influence),
        influence=influence,
        proposal=proposal,
        prior={"a": 0.5, "b": 0.5},
        seconds={"measure": 1.5},
    )
    read = Journal(tmp_path / "journal.jsonl").rows()[0]
    assert (read["stage"], read["start"], read["end"], read["weights"]) == (1, 100, 200, {"a": 0.25, "b": 0.75})
    assert read["influence"] == [[1.0, None]]
    assert read["scored_tokens"] == {"a": 2.0, "b": 3.0}
    drawn = dict(zip("ab", dataset().schedule.counts(100).tolist(), strict=True))
    assert read["tokens"] == {name: 3 * n for name, n in drawn.items()}
    assert read["epochs"] == {name: n / 100 for name, n in drawn.items()}
    logs = log_keys(read)
    assert logs == {
        "dynmix/stage": 1,
        "dynmix/seconds/measure": 1.5,
        "dynmix/weight/a": 0.25,
        "dynmix/weight/b": 0.75,
        "dynmix/tokens/a": 3 * drawn["a"],
        "dynmix/tokens/b": 3 * drawn["b"],
        "dynmix/task_loss/t": 2.0,
        "dynmix/influence/t/a": 1.0,
    }


def test_an_influence_without_losses_has_none():
    assert losses_of(Influence([[1.0]], ["t"], ["a"])) is None


def test_a_recorder_gives_each_row_what_was_warned_of_since_the_one_before(tmp_path):
    sets = SimpleNamespace(sets={"t": [], "own": []}, guards=("own",))
    recorder, folder = Recorder(dataset(), sets, "TiKMiXD"), RunFolder(tmp_path)
    told = {"step": 9, "position": 100, "loss": None, "seconds": {"measure": 0.0}}
    with recorder.listening():
        for words in ("it is cold", "it is cold", "it failed: no memory"):
            logging.getLogger("dynmix").warning(words)
    logging.getLogger("dynmix").warning("nobody listens")
    recorder.write(folder, "stage", error="no memory", **told)
    assert "dynmix/stage" in recorder.write(folder, "final", **told)
    first, last = Journal(tmp_path / "journal.jsonl").rows()
    assert (first["tasks"], first["guards"]) == (["t", "own"], ["own"])
    assert (first["warnings"], first["error"], last["warnings"]) == (["it is cold"], "no memory", [])
    assert "training" not in first["seconds"]
    assert last["seconds"]["training"] >= 0
    assert recorder.write(None, "stage", **told)["dynmix/seconds/measure"] == 0.0


def test_warnings_of_dynmix_are_heard_once_each_and_logged_as_ever(caplog):
    heard: list[str] = []
    with warnings_heard(heard):
        for _ in range(2):
            logging.getLogger("dynmix.influence.group").warning("%d of %d", 1, 2)
        logging.getLogger("dynmix").error("worse")
        logging.getLogger("dynmix").info("nothing")
        logging.getLogger("other").warning("of no concern")
    logging.getLogger("dynmix").warning("too late")
    assert heard == ["1 of 2", "worse"]
    assert [record.message for record in caplog.records if record.name.startswith("dynmix")].count("1 of 2") == 2


def test_where_nobody_configured_logging_warnings_still_reach_stderr_once(monkeypatch, capsys):
    for log in (logging.getLogger(), logging.getLogger("dynmix")):
        monkeypatch.setattr(log, "handlers", [])
    with warnings_heard([]), warnings_heard(heard := []):
        logging.getLogger("dynmix.mixture").warning("inside")
        logging.getLogger("dynmix").info("nothing")
    logging.getLogger("dynmix").warning("outside")
    assert capsys.readouterr().err == "inside\noutside\n"
    assert heard == ["inside"]


def test_the_last_row_counts_the_samples_that_there_were(tmp_path):
    loop = running.controller(running.dataset(samples=98), output=tmp_path, keep=0)
    running.run(loop)
    loop.finish(Bigram(), 25)
    last = Journal(tmp_path / "journal.jsonl").rows()[-1]
    assert last["start"] == 98
    assert sum(last["tokens"].values()) == 98 * 5
    assert last["seconds"]["measure"] > 0


def test_influence_reaches_the_journal_as_measured(tmp_path, monkeypatch):
    scores, errors = np.array([[1.5, -0.5]]), np.array([[0.1, np.inf]])

    def measure(model, domains, tasks, *args, **kwargs):
        return Influence(scores, list(tasks), list(domains), errors, [2.0], [0.5])

    monkeypatch.setattr(dynmix.measurement, "group_influence", measure)
    loop = running.controller(running.dataset(), TiKMiXD(confidence=0), guards=None, output=tmp_path, keep=0)
    logs = running.run(loop)[3]
    row = Journal(tmp_path / "journal.jsonl").rows()[1]
    assert row["influence"] == [[1.5, -0.5]]
    assert row["standard_error"] == [[0.1, None]]
    assert row["task_loss"] == {"t": 2.0}
    assert logs["dynmix/influence/t/a"] == 1.5
    assert logs["dynmix/task_loss/t"] == 2.0
    assert logs["dynmix/weight/a"] > 0.4


def test_a_row_has_what_decided_where_a_mixer_remembers_and_decides_the_same_again(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)

    def measure(model, domains, tasks, *args, **kwargs):
        errors = generator.uniform(0.5, 1, (1, 2))
        scores = generator.normal(size=(1, 2))
        return Influence(scores, list(tasks), list(domains), errors, [2.0], [0.5], scored_tokens=[2.0, 5.0])

    monkeypatch.setattr(dynmix.measurement, "group_influence", measure)
    running.run(running.controller(running.dataset(), TiKMiXD(confidence=0), guards=None, output=tmp_path, keep=0))
    rows = Journal(tmp_path / "journal.jsonl").rows()
    alone = TiKMiXD(confidence=0).propose(
        Influence(rows[3]["influence"], ["t"], running.NAMES), rows[3]["weights_before"]
    )
    assert alone.weights != pytest.approx(rows[3]["weights"], abs=1e-3)
    for row in rows[1:4]:
        influence, facts = read_influence(tmp_path, row["stage"])
        again = TiKMiXD(confidence=0).propose(influence, facts["weights"])
        assert again.weights == pytest.approx(row["weights"], abs=1e-6)
        assert again.predicted_gain == pytest.approx(row["predicted_gain"])
