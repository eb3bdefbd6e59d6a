import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, MixtralConfig, get_cosine_schedule_with_warmup
from transformers.trainer_utils import set_seed

import dynmix.proxies.run as run_module
import dynmix.proxies.train as train_module
from dynmix.alone import alone
from dynmix.laws import Experts, sample_mixtures
from dynmix.laws.runs import read_runs
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.store import TokenStore
from dynmix.proxies import run_proxies, small_llama
from dynmix.proxies.plan import Plan, Training
from dynmix.proxies.train import read_result, train_run
from dynmix.proxies.workers import Workers

VOCABULARY, LENGTH = 64, 16
DOMAINS = ("web", "code")  # in no alphabetical order
TRAINING = Training(tokens=20 * 4 * LENGTH, sequence_length=LENGTH, batch_size=4, learning_rate=5e-3, seed=3)
MODEL = small_llama(VOCABULARY, hidden_size=16, layers=1, heads=2, sequence_length=LENGTH)


def documents(seed, n=30):
    """Runs upwards or downwards, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    step = 1 if seed % 2 else -1
    return [(rng.integers(VOCABULARY) + step * np.arange(rng.integers(20, 60))) % VOCABULARY for _ in range(n)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Stores of two domains, and validation sets: a store, and examples of several lengths of which a part counts."""
    folder = tmp_path_factory.mktemp("world")
    stores = {
        name: TokenStore.write(folder / name, documents(k, 10 if name == "code" else 40)).path
        for k, name in enumerate(DOMAINS)
    }
    examples = []
    for document in documents(7, 9):
        ids = torch.tensor(document[: 5 + len(document) % 11])
        labels = ids.clone()
        labels[:2] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return stores, {"valid": TokenStore.write(folder / "valid", documents(5)), "answers": examples}


def call(world, out, **changes):
    stores, validation = world
    return run_proxies(
        **{"stores": stores, "validation": validation, "out": out, "model": MODEL, "training": TRAINING, "mixtures": 4}
        | {"threads": 1}
        | changes
    )


def plan_of(world, training=TRAINING):
    return Plan.make(*world, MODEL, training, 0.5, (0.5, 2.0))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """All runs but one, which could not be trained."""
    out = tmp_path_factory.mktemp("proxies") / "out"
    plan_of(world).keep(out)
    (out / "runs/mixture-001").mkdir(parents=True)
    (out / "runs/mixture-001/trainer").write_text("in the way")
    return out, call(world, out, jobs=2)


@pytest.fixture
def planned(world, finished, tmp_path):
    """A folder with the same plan, in which nothing was run."""
    for name in ("proxies.json", "model", "validation"):
        source = finished[0] / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


def weights(out, run):
    row = next(row for row in csv.DictReader((out / "runs.csv").open()) if row["run"] == run)
    return {name: float(row[f"weight/{name}"]) for name in DOMAINS}


def test_the_table_has_the_experts_and_the_sampled_mixtures(world, finished):
    _, result = finished
    names = ["expert-web", "expert-code", "mixture-000", "mixture-002", "mixture-003"]
    assert result.done == tuple(names)
    assert [row["run"] for row in csv.DictReader(result.table.open())] == names
    runs = read_runs(result.table)
    assert runs.domains == DOMAINS
    assert runs.targets == ("valid", "answers")
    tokens = [len(TokenStore.open(path).tokens) // LENGTH for path in world[0].values()]
    np.testing.assert_array_equal(runs.W, np.vstack([np.eye(2), sample_mixtures(tokens, 4, seed=3)[[0, 2, 3]]]))


def test_losses_are_those_of_the_saved_models_in_nats_a_token(world, finished):
    out, _ = finished
    runs = read_runs(out / "runs.csv")
    rows = torch.tensor(world[1]["valid"].tokens.astype(np.int64))
    sequences = [{"input_ids": ids, "labels": ids} for ids in rows[: len(rows) // LENGTH * LENGTH].split(LENGTH)]
    for i, name in ((0, "expert-web"), (3, "mixture-002")):
        model = AutoModelForCausalLM.from_pretrained(out / "runs" / name / "model").eval()
        for j, examples in enumerate((sequences, world[1]["answers"])):
            nats = []
            for one in examples:  # each alone, without padding
                with torch.no_grad():
                    log_p = model(input_ids=one["input_ids"][None]).logits[0].double().log_softmax(-1)
                nats += [-log_p[t - 1, k].item() for t, k in enumerate(one["labels"].tolist()) if t and k != -100]
            assert runs.L[i, j] == pytest.approx(np.mean(nats), abs=1e-5)
    assert runs.L.std(axis=0).min() > 0.01  # the mixtures differ


def test_a_run_is_trained_on_its_mixture(world, finished):
    """By a plain loop: AdamW, cosine schedule, gradients clipped at 1."""
    out, _ = finished
    set_seed(TRAINING.seed)
    model = AutoModelForCausalLM.from_config(MODEL)
    data = MixtureDataset(
        world[0], weights(out, "mixture-002"), num_samples=80, sequence_length=LENGTH, seed=TRAINING.seed, block=4
    )
    optimizer = torch.optim.AdamW(model.parameters(), TRAINING.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 20)
    for batch in DataLoader(data, batch_size=4):
        model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    kept = AutoModelForCausalLM.from_pretrained(out / "runs/mixture-002/model")
    for ours, theirs in zip(kept.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_the_experts_are_cached(finished):
    out, result = finished
    experts = Experts.open(result.experts)
    assert experts.names == DOMAINS
    assert experts.targets == ("valid", "answers")
    assert read_result(out, "expert-web").keys() == {"valid", "answers"}
    np.testing.assert_allclose(experts.corners, read_runs(result.table).L[:2], atol=1e-3)


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("after", [1, 13, 20])
def test_an_interrupted_run_ends_bit_for_bit_as_if_it_had_not_been(finished, planned, monkeypatch, after):
    step, steps = torch.optim.AdamW.step, []

    def counted(self, *args, **kwargs):
        if len(steps) == after:
            raise Stop
        steps.append(1)
        return step(self, *args, **kwargs)

    def ended(model, batches):
        raise Stop

    out, run = finished[0], "mixture-002"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", counted)
        patch.setattr(train_module, "token_log_probabilities", ended)
        with pytest.raises(Stop):
            train_run(planned, run, weights(out, run))
    assert read_result(planned, run) is None
    torch.rand(3)
    checkpoints = sorted((planned / "runs" / run / "trainer").glob("checkpoint-*"))
    if checkpoints:  # a newer one that a kill has left half written
        broken = checkpoints[0].with_name("checkpoint-90")
        shutil.copytree(checkpoints[0], broken)
        (broken / "trainer_state.json").write_text('{"global_step": 9')
    steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (steps.append(1), step(self, *a, **k))[1])
        train_run(planned, run, weights(out, run))
    assert len(steps) == {1: 20, 13: 8, 20: 0}[after]
    for file in ("result.json", "log_probabilities.npy", "model/model.safetensors"):
        assert (planned / "runs" / run / file).read_bytes() == (out / "runs" / run / file).read_bytes(), file
    assert not (planned / "runs" / run / "trainer").exists()


def test_experts_go_on_from_where_they_were(world, tmp_path, monkeypatch):
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    for name in ("whole", "cut"):
        Plan.make(*world, config, TRAINING, 0.5, (0.5, 2.0)).keep(tmp_path / name)
    mixture = {"web": 0.5, "code": 0.5}
    train_run(tmp_path / "whole", "mixture-000", mixture)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "token_log_probabilities", None)
        with pytest.raises(TypeError):
            train_run(tmp_path / "cut", "mixture-000", mixture)  # trained, and not read yet
    train_run(tmp_path / "cut", "mixture-000", mixture)
    file = "runs/mixture-000/model/model.safetensors"
    assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


class Here:
    """Workers' stand-in: trains in this process."""

    def __init__(self, out, jobs, *rest):
        self.out = out

    def train(self, run, weights):
        train_run(self.out, run, weights)

    def close(self):
        pass


def test_runs_that_are_done_stay_and_others_join_them(world, finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "experts")
    (out / "runs/mixture-001/trainer").unlink()
    before = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/result.json")}
    assert len(before) == 5
    monkeypatch.setattr(run_module, "Workers", Here)
    result = call(world, out, mixtures=5)
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert result.failed == {}
    first, now = (path.read_text().splitlines() for path in (finished[1].table, result.table))
    assert [row for row in now if not row.startswith(("mixture-001", "mixture-004"))] == first
    assert len(now) == 8
    assert Experts.open(result.experts).names == DOMAINS
    assert not [*out.rglob(".*.part")]


def test_a_run_that_fails_is_reported_and_does_not_stop_the_others(finished):
    out, result = finished
    assert list(result.failed) == ["mixture-001"]
    assert "FileExistsError" in result.failed["mixture-001"]
    assert str(out / "runs/mixture-001/log.txt") in result.failed["mixture-001"]
    assert "Traceback" in (out / "runs/mixture-001/log.txt").read_text()
    assert not (out / "runs/mixture-001/result.json").exists()


def test_a_worker_that_dies_is_a_failed_run(planned):
    workers = Workers(planned, 1, 1)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(workers.train, "mixture-000", {"web": 0.5, "code": 0.5})
        until(lambda: workers._workers)
        workers._workers[0].send_signal(signal.SIGKILL)
        assert asked.result(30) == "its process ended by SIGKILL"
        workers.close()
        with pytest.raises(RuntimeError, match="closed"):
            workers.train("mixture-001", {"web": 0.5, "code": 0.5})


PARENT = """
import sys
from pathlib import Path
from dynmix.proxies.workers import Workers

with open(sys.argv[1] + "/.lock", "w") as held:
    import fcntl
    fcntl.flock(held, fcntl.LOCK_EX)
    Workers(Path(sys.argv[1]), 1, 1, held=held.fileno()).train("expert-web", {"web": 1.0, "code": 0.0})
"""


def test_a_killed_parent_leaves_no_process_and_its_run_goes_on(world, tmp_path):
    endless = Training(tokens=10**7, sequence_length=LENGTH, batch_size=4)
    plan = plan_of(world, endless)
    plan.keep(tmp_path)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)])
    try:
        until(lambda: (tmp_path / "runs/expert-web/trainer").exists())
        workers = psutil.Process(parent.pid).children()
        assert len(workers) == 1
    finally:
        parent.kill()
        parent.wait()
    try:
        with alone(tmp_path, "trains in it"):
            workers[0].wait(10)
    finally:
        if workers[0].is_running():
            workers[0].kill()
    assert read_result(tmp_path, "expert-web") is None


def test_an_interrupt_ends_the_workers(world, tmp_path, monkeypatch):
    before = set(psutil.Process().children())  # what other tests started, a tracker of shared memory perhaps

    def interrupted(futures):
        until(lambda: set(psutil.Process().children()) - before)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(world, tmp_path / "out", jobs=2)
    assert not set(psutil.Process().children()) - before
    with alone(tmp_path / "out", "trains in it"):
        pass


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_repeated_domains_are_counted_as_they_are_drawn(world, caplog):
    training = Training(tokens=300 * 4 * LENGTH, sequence_length=LENGTH, batch_size=4)
    plan = plan_of(world, training)
    runs = run_module.planned_runs(plan, 6, True)
    drawn = []
    for W in runs.values():
        dataset = training.dataset(world[0], dict(zip(DOMAINS, W.tolist(), strict=True)))
        drawn.append(dataset.schedule.counts(len(dataset)) / list(dataset.sizes.values()))
    limit = 10.0
    for name, seen in zip(DOMAINS, np.array(drawn).T, strict=True):
        own = [note for note in run_module.repeated(plan, runs, limit) if note.startswith(f"{name} ")]
        assert len(own) == (seen.max() > limit)
        if own:
            assert f"{(seen > limit).sum()} of 8 runs" in own[0]
            assert f"expert-{name} {seen.max():.1f} times" in own[0]
    assert run_module.repeated(plan, runs, 1e6) == []
    assert run_module.repeated(plan, runs, limit)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": Training(**{**vars(TRAINING), "learning_rate": 1e-3})}, "learning_rate was 0.005 and is 0.001"),
        ({"model": small_llama(VOCABULARY, 32, 1, 2, LENGTH)}, "model hidden_size was 16 and is 32"),
        ({"frequency": 0.1}, "mixtures frequency was 0.5 and is 0.1"),
        ({"stores": lambda stores, _: dict(reversed(stores.items()))}, r"order domains was \['web', 'code'\]"),
        ({"stores": lambda stores, _: stores | {"code": stores["web"]}}, "domains code was"),
        ({"stores": lambda stores, _: stores | {"more": stores["web"]}}, "domains more was None"),
        ({"validation": lambda _, sets: sets | {"answers": sets["answers"][:-1]}}, "validation answers was"),
        ({"validation": lambda _, sets: {"valid": sets["valid"]}}, "validation answers was .* and is None"),
    ],
)
def test_another_configuration_is_refused_with_what_differs(world, finished, changes, said):
    changes = {name: value(*world) if callable(value) else value for name, value in changes.items()}
    before = (finished[0] / "proxies.json").read_bytes()
    with pytest.raises(ValueError, match=said):
        call(world, finished[0], **changes)
    assert (finished[0] / "proxies.json").read_bytes() == before


def test_stores_may_move_and_the_model_be_given_as_a_folder(world, tmp_path):
    moved = {}
    for name, path in world[0].items():
        for end in (".idx", ".bin"):
            shutil.copy(f"{path}{end}", tmp_path)
        moved[name] = tmp_path / path.name
    plan_of(world).keep(tmp_path)
    Plan.make(moved, world[1], tmp_path / "model", TRAINING, 0.5, (0.5, 2.0)).keep(tmp_path)
    assert json.loads((tmp_path / "proxies.json").read_text())["paths"]["web"] == str(moved["web"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stores": {}}, "0 domains"),
        ({"stores": {"web": "nowhere", "code": "nowhere"}}, "nowhere.idx: no such file"),
        ({"stores": {"a/b": "x", "c": "y"}}, "stores: 'a/b' is to be a file's name"),
        ({"validation": {}}, "0 validation sets"),
        ({"validation": {"none": []}}, "none: it is empty"),
        ({"validation": {"one": [{"input_ids": [1]}]}}, "validation set 'one': no sequence has a token to score"),
        ({"validation": {"big": [{"input_ids": [1, 64]}]}}, "'big' has token 64"),
        ({"validation": {"long": [{"input_ids": [1] * 20}]}}, "a sequence of 20 tokens; .* takes 16 tokens at most"),
        ({"model": "./nowhere"}, "model ./nowhere: no configuration of a causal LM"),
        ({"model": small_llama(32, 16, 1, 2, LENGTH)}, "domain 'web' has token 63, the model's vocabulary has 32"),
        ({"model": small_llama(64, 16, 1, 2, 8)}, "sequence_length=16: the model takes 8 tokens at most"),
        ({"mixtures": -1}, "mixtures=-1"),
        ({"mixtures": 0, "experts": False}, "nothing to train"),
        ({"jobs": 0}, "jobs=0"),
        ({"threads": 0}, "threads=0"),
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"frequency": 2}, "frequency=2"),
        ({"scale": (2, 1)}, "scale="),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(world, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        call(world, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": 63}, "tokens=63: at least one step"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"sequence_length": 1}, "sequence_length=1"),
    ],
)
def test_bad_training_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        Training(**{**vars(TRAINING), **changes})


def test_foreign_folders_are_refused(world, tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="without proxies.json"):
        call(world, tmp_path)
    (tmp_path / "proxies.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        call(world, tmp_path)


def test_a_run_that_diverges_says_so(planned, monkeypatch):
    monkeypatch.setattr(train_module, "_trained", lambda *_: train_module.new_model(MODEL).apply(spoil))
    with pytest.raises(ValueError, match="its loss on valid is nan: it diverged"):
        train_run(planned, "mixture-000", {"web": 0.5, "code": 0.5})
    assert read_result(planned, "mixture-000") is None


def spoil(module):
    for parameter in module.parameters(recurse=False):
        parameter.data.fill_(float("nan"))


def test_a_worker_listens_before_torch_is_imported():
    light = "import sys, dynmix.proxies.workers; print(*({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", light], capture_output=True, text=True).stdout.strip() == ""


def test_the_result_is_written_last(finished):
    for folder in (file.parent for file in finished[0].glob("runs/*/result.json")):
        times = [p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != "log.txt"]
        assert (folder / "result.json").stat().st_mtime_ns == max(times)
        assert Path(folder / "log.txt").exists()
