import random
import textwrap

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import dynmix.measurement
from dynmix import (
    Identity,
    Influence,
    MixtureController,
    MixtureDataset,
    MixtureStream,
    Static,
    TiKMiXD,
    TokenStore,
)
from dynmix.influence.batch import check_fits
from dynmix.measurement import HELD_OUT, Measurement
from tests import running
from tests.small import Bigram


def sequences(domain: int, rows: int):
    return [{"input_ids": torch.tensor([domain, row % 64, row // 64, 3 + domain, 4])} for row in range(rows)]


def measurement(needs, guards="domains", sizes=(100, 200), **options) -> Measurement:
    domains = {name: sequences(i, n) for i, (name, n) in enumerate(zip("ab", sizes, strict=True))}
    data = MixtureDataset(domains, num_samples=400, block=10)
    settings = {"probe_sequences": 10, "curvature_sequences": 20, "task_sequences": 12, "sample_sequences": 30}
    settings |= {"micro_batch": 4, "layers": None} | options
    return Measurement(data, {"t": sequences(0, 6)}, Identity(), frozenset(needs), guards=guards, **settings)


PRIOR = {"a": 0.5, "b": 0.5}


def measured(room: Measurement):
    probes = room.probes(100, 50, PRIOR)
    return probes, *room.influence(Bigram(0), probes, PRIOR)


def test_guards_are_measured_for_mixers_that_need_them_alone():
    _, influence, drawn = measured(measurement({"influence"}))
    assert (influence.tasks, influence.guards, drawn) == (("t",), (), None)
    _, influence, _ = measured(measurement({"influence", "guards"}))
    assert (influence.tasks, influence.guards) == (("t", HELD_OUT), (HELD_OUT,))
    _, influence, _ = measured(measurement({"influence", "guards"}, guards=None))
    assert influence.guards == ()
    named = {"safe": sequences(1, 4)}
    _, influence, _ = measured(measurement({"influence", "guards"}, guards=named))
    assert (influence.tasks, influence.guards) == (("t", "safe"), ("safe",))
    without = measurement({"influence"}, guards=named)
    assert measured(without)[1].tasks == ("t",)
    assert set(without.losses(Bigram(0))[0]) == {"t", "safe"}  # what guards lose is journaled for every mixer


def test_the_default_guard_is_the_mean_of_the_domains_held_out_text():
    room = measurement({"influence", "guards"})
    probes, influence, _ = measured(room)
    domain, row, _ = room.dataset.schedule.assign(0, 150)
    for i, name in enumerate("ab"):
        assert len(probes.held_out[name]) == 6  # task_sequences over the domains, an even number
        assert not set(probes.held_out[name]) & set(probes.domains[name])
        assert not set(probes.held_out[name]) & set(row[domain == i])
    alone = []
    for name in "ab":
        rows = [room.dataset.sequence(name, int(r)) for r in probes.held_out[name]]
        own = measurement({"influence", "guards"}, guards={"own": rows})
        alone.append(own.influence(Bigram(0), probes, PRIOR)[0])
    guard = influence.tasks.index(HELD_OUT)
    np.testing.assert_allclose(influence.scores[guard], np.mean([x.scores[1] for x in alone], axis=0), rtol=1e-4)
    loss_errors = [x.task_loss_standard_error[1] for x in alone]
    # The domains differ by more than their sequences do among each other, and that is no error of the mean.
    assert influence.task_loss_standard_error[guard] == pytest.approx(np.hypot(*loss_errors) / 2, rel=1e-4)


def test_a_domain_too_small_for_guard_and_probes_keeps_its_probes():
    room = measurement({"influence", "guards"}, sizes=(12, 200))
    probes = room.probes(100, 50, PRIOR)
    alone = measurement({"influence"}, sizes=(12, 200)).probes(100, 50, PRIOR)
    np.testing.assert_array_equal(probes.domains["a"], alone.domains["a"])
    assert len(set(probes.held_out["a"])) == 6  # of the 12 rows, of which but 2 are no probes
    np.testing.assert_array_equal(measurement({"influence"}).probes(100, 50, PRIOR).held_out["a"], [])


def test_measure_draws_from_what_was_measured():
    _, influence, drawn = measured(measurement({"influence", "guards", "measure"}))
    np.testing.assert_allclose(drawn({"a": 1.0, "b": 0.0}), influence.scores[:, 0], rtol=1e-6)
    mixed = np.mean([drawn({"a": 0.3, "b": 0.7}) for _ in range(300)], axis=0)
    np.testing.assert_allclose(mixed, influence.scores @ [0.3, 0.7], rtol=0.02)


def test_what_is_rehearsed_and_estimated_has_the_rows_of_what_is_measured():
    rooms = [measurement({"influence"}), measurement({"influence", "guards"})]
    for room in rooms:
        assert room.rehearse(Bigram(0))[0].tasks == measured(room)[1].tasks
    one, two = (room.peak_memory(Bigram(0)).gradients for room in rooms)
    assert two > one


@pytest.mark.parametrize("in_all", [1, 4, 4_096])
def test_of_many_domains_each_is_looked_at_and_of_few_some_rows(in_all, monkeypatch):
    monkeypatch.setattr(dynmix.measurement, "_LOOKED_AT_IN_ALL", in_all)
    room, read = measurement({"influence"}, sizes=(3, 200)), []
    sequence = room.dataset.sequence
    monkeypatch.setattr(room.dataset, "sequence", lambda name, row: read.append((name, row)) or sequence(name, row))
    model = Bigram(0)
    model.config = LlamaConfig(vocab_size=64)
    room.check(model)
    rows = {name: sorted(row for domain, row in read if domain == name) for name in "ab"}
    few = {1: [0], 4: [0, 199], 4_096: np.linspace(0, 199, 32).astype(int).tolist()}[in_all]
    assert rows["b"] == few
    assert rows["a"] == {1: [0], 4: [0, 2], 4_096: [0, 1, 2]}[in_all]


def test_a_domain_that_is_not_here_has_a_column_that_says_nothing(monkeypatch):
    room = measurement({"influence"})
    monkeypatch.setattr(MixtureDataset, "gone", ("a",))
    bound = {"left_out": [0.1], "left_out_bound": [[3.0]]}
    measured = Influence([[0.5]], ["t"], ["b"], [[0.1]], scored_tokens=[7.0], **bound)
    unseen = Influence([[np.nan, 0.5]], ["t"], ["a", "b"], [[np.nan, 0.1]], scored_tokens=[np.nan, 7.0])
    for found in map(room.completed, (measured, unseen)):
        assert found.domains == ("a", "b")
        assert (found.scores.tolist(), found.standard_error.tolist()) == ([[0, 0.5]], [[0, 0.1]])
        assert found.scored_tokens.tolist() == [7, 7]
    assert room.completed(measured).left_out_bound.tolist() == [[0, 3]]


def test_it_says_how_many_tokens_sequences_score():
    room = measurement({"influence"})
    few = [item | {"labels": torch.where(torch.arange(5) > 2, item["input_ids"], -100)} for item in sequences(0, 100)]
    data = MixtureDataset({"few": few, "b": sequences(1, 200)}, num_samples=400, block=10)
    room.dataset, prior = data, {"few": 0.5, "b": 0.5}
    influence, _ = room.influence(Bigram(0), room.probes(100, 50, prior), prior)
    assert influence.scored_tokens.tolist() == [2, 4]  # the first token of a sequence is predicted by none


@pytest.mark.parametrize("options", [{}, {"rank": 3, "layer_groups": 2, "layers": "head"}])
def test_the_gradient_is_the_influence_without_a_curvature(options):
    room = measurement({"influence", "gradient", "guards"}, **options)
    probes, influence, _ = measured(room)
    gradient = room.gradient(Bigram(0), probes)
    for found in ("scores", "standard_error", "task_loss_standard_error", *(["left_out_bound"] if options else [])):
        np.testing.assert_allclose(getattr(gradient, found), getattr(influence, found), rtol=1e-6)


def test_probes_that_the_curvature_is_fitted_on_are_the_same_batches(monkeypatch):
    seen = []
    real = dynmix.measurement.group_influence

    def measure(model, domains, *args, curvature_batches=None, **kwargs):
        seen.append((domains, curvature_batches))
        return real(model, domains, *args, curvature_batches=curvature_batches, **kwargs)

    monkeypatch.setattr(dynmix.measurement, "group_influence", measure)
    room = measurement({"influence"}, curvature_sequences=28)
    prior = {"a": 0.25, "b": 0.75}
    room.influence(Bigram(0), room.probes(100, 50, prior), prior)
    domains, pooled = seen[-1]
    own = {id(batch) for batches in domains.values() for batch in batches}
    assert [len(batch["input_ids"]) for batch in pooled] == [4, 3, 4, 4, 2, 4, 4, 3]
    assert [id(batch) in own for batch in pooled] == [True, False, True, True, True, False, False, False]


def test_a_token_that_the_model_does_not_have_is_named():
    model = nn.Module()
    model.config = type("Config", (), {"vocab_size": 64})
    room = measurement(frozenset(), guards={"g": sequences(1, 4)})
    room.check(model)
    room.sets["g"][0]["input_ids"][0, 3] = 64
    with pytest.raises(ValueError, match=r"guards\['g'\] has token 64, the model's vocabulary has 64"):
        room.check(model)
    with pytest.raises(ValueError, match="guards"):
        room.check(nn.parallel.DataParallel(model))
    model.config = type("OfImagesToo", (), {"get_text_config": lambda text=model.config: text})
    with pytest.raises(ValueError, match="guards"):
        room.check(model)


def test_a_sequence_longer_than_the_models_table_of_positions_is_named():
    sizes = {"vocab_size": 64, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    room = measurement(frozenset(), guards=None)
    with pytest.raises(ValueError, match=r"tasks\['t'\] has a sequence of 5 tokens, the model takes 4 at most"):
        room.check(model)
    whole = room.sets["t"]
    room.sets["t"] = [{"input_ids": batch["input_ids"][:, :4]} for batch in whole]
    with pytest.raises(ValueError, match=r"domains\['a'\] has a sequence of 5 tokens.*lower sequence_length"):
        room.check(model)
    apart = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]]), "input_ids": torch.zeros(1, 5, dtype=torch.long)}
    check_fits(model, [apart], "documents of 3 and 2 tokens")
    sizes = {"hidden_size": 8, "ffn_dim": 8, "word_embed_proj_dim": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match="the model takes 4 at most"):
        check_fits(OPTForCausalLM(OPTConfig(max_position_embeddings=4, **sizes)), whole, "its table has 6")
    rotary = LlamaConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    rotary.max_position_embeddings = 64  # as many as tokens
    model, long = LlamaForCausalLM(rotary), [{"input_ids": torch.zeros(1, 65, dtype=torch.long)}]
    check_fits(model, long, "computed positions")
    model.model.embed_tokens = nn.Sequential(model.model.embed_tokens)  # as PEFT wraps it
    check_fits(model, long, "computed positions")
    model.model.tokens = model.model._modules.pop("embed_tokens")  # get_input_embeddings() does not find them
    check_fits(model, long, "computed positions")


@pytest.mark.parametrize(
    "read",
    [
        lambda room, probes: room.check(Bigram(0)),
        lambda room, probes: room.rehearse(Bigram(0)),
        lambda room, probes: room.peak_memory(Bigram(0)),
        lambda room, probes: room.influence(Bigram(0), probes, PRIOR),
        lambda room, probes: room.gradient(Bigram(0), probes),
        lambda room, probes: room.products(Bigram(0), room.task_gradients(Bigram(0), probes, PRIOR, 2), probes, "ab"),
    ],
)
def test_items_that_draw_random_numbers_leave_the_training_its_own(read, monkeypatch):
    class Drawing:
        def __len__(self):
            return 200

        def __getitem__(self, row):
            torch.rand(1), np.random.rand(), random.random()
            return sequences(0, 200)[row]

    monkeypatch.setattr(Bigram, "config", type("Config", (), {"vocab_size": 64}), raising=False)
    room = measurement({"influence", "guards"})
    room.dataset = MixtureDataset({"a": Drawing(), "b": Drawing()}, num_samples=400, block=10)
    probes = room.probes(100, 50, PRIOR)
    Bigram(0)  # which seeds torch
    before = torch.get_rng_state(), np.random.get_state()[2], random.getstate()
    read(room, probes)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[2] == before[1]
    assert random.getstate() == before[2]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_domain_of_another_tokenizer_is_named_though_its_first_row_fits(streamed):
    model = nn.Module()
    model.config = type("Config", (), {"vocab_size": 64})
    rows = sequences(1, 100)
    for row in rows[37:]:
        row["input_ids"][2] = 64
    room = measurement(frozenset())
    if streamed:
        tokens = {"a": lambda: iter(sequences(0, 99)), "b": lambda: iter(rows)}
        room.dataset = MixtureStream(tokens, num_samples=8, sequence_length=5, probe_sequences=50)
    else:
        room.dataset = MixtureDataset({"a": sequences(0, 9), "b": rows}, num_samples=8)
    with pytest.raises(ValueError, match=r"domains\['b'\] has token 64, the model's vocabulary has 64"):
        room.check(model)


def test_a_task_that_a_domain_trains_on_is_told(tmp_path, caplog):
    stores = [TokenStore.write(tmp_path / name, [np.arange(60) + i]) for i, name in enumerate("abv")]
    data = MixtureDataset(dict(zip("ab", stores, strict=False)), num_samples=20, sequence_length=5)
    settings = {"probe_sequences": 2, "curvature_sequences": 2, "task_sequences": 2, "sample_sequences": 2}
    settings |= {"micro_batch": 4, "layers": None}
    Measurement(data, {"t": stores[2]}, Identity(), frozenset(), guards={"g": str(tmp_path / "v")}, **settings)
    assert not caplog.messages
    Measurement(data, {"t": stores[2]}, Identity(), frozenset(), guards={"g": str(tmp_path / "b")}, **settings)
    assert ["'g' is the text that domain 'b' trains on" in m for m in caplog.messages] == [True]


def rows_of(batches) -> set[tuple[int, int]]:
    return {(int(d), int(low + 64 * high)) for batch in batches for d, low, high in batch["input_ids"][:, :3]}


@pytest.fixture
def boundaries(monkeypatch):
    """The domains and the curvature's batches of each measurement, the first of which is the rehearsal's."""
    seen, real = [], dynmix.measurement.group_influence

    def measure(model, domains, *args, curvature_batches=None, **kwargs):
        seen.append((domains, curvature_batches))
        return real(model, domains, *args, curvature_batches=curvature_batches, **kwargs)

    monkeypatch.setattr(dynmix.measurement, "group_influence", measure)
    return seen


def test_probes_are_not_trained_on_within_the_coming_stage(boundaries):
    loop = running.controller(running.dataset(rows=(60, 60), samples=400), stage_steps=10)
    running.run(loop, steps=100)
    stages = loop.dataset.schedule.stages
    assert len(boundaries) == len(stages) == 10
    for (domains, pooled), stage in zip(boundaries[1:], stages[1:], strict=True):
        domain, row, _ = loop.dataset.schedule.assign(stage.start, stage.end or 400)
        trained = set(zip(domain.tolist(), row.tolist(), strict=True))
        for name in running.NAMES:
            assert len(rows_of(domains[name])) == 10
            assert not rows_of(domains[name]) & trained
        assert not rows_of(pooled) & trained


def test_a_domain_too_small_to_hold_probes_back_says_so(caplog):
    running.run(running.controller(running.dataset(rows=(200, 12), samples=100, weights={"a": 0.5, "b": 0.5})))
    assert "probe sequences of domain 'b' are trained on within the next stage" in caplog.text


def test_the_curvature_is_fitted_in_the_proportions_of_the_mixture(boundaries):
    running.run(running.controller(running.dataset(weights={"a": 0.9, "b": 0.1}), Static(observe=True)))
    for _, batches in boundaries[1:]:
        counts = np.bincount(np.concatenate([batch["input_ids"][:, 0] for batch in batches]), minlength=2)
        assert counts.tolist() == [18, 2]


def test_many_domains_still_share_the_curvature_sequences(boundaries):
    domains = {f"d{i}": running.sequences(i % 60, 8) for i in range(50)}
    data = MixtureDataset(domains, "uniform", num_samples=16, block=running.BATCH)
    loop = MixtureController(
        data,
        {"t": running.sequences(0, 6)},
        TiKMiXD(confidence=0),
        stage_steps=2,
        probe_sequences=2,
        curvature_sequences=10,
    )
    running.run(loop, steps=3)
    assert sum(len(batch["input_ids"]) for batch in boundaries[1][1]) == 10
    assert data.schedule.stages[1].weights != data.schedule.stages[0].weights


def test_a_first_sequence_without_a_scored_token_is_no_obstacle():
    task = [{"input_ids": [3]}, *running.sequences(0, 5)]
    running.begun(
        MixtureController(running.dataset(), {"t": task}, TiKMiXD(), stage_steps=running.STEPS, probe_sequences=4)
    )
    for mixer in (TiKMiXD(), Static()):  # which reads tasks for the journal alone
        nothing = MixtureController(running.dataset(), {"t": [{"input_ids": [3]}]}, mixer, stage_steps=running.STEPS)
        with pytest.raises(ValueError, match=r"tasks\['t'\]: no sequence has a token to score"):
            running.begun(nothing)


def test_a_first_row_of_a_domain_without_a_scored_token_is_no_obstacle(caplog):
    data = MixtureDataset(
        {
            name: [{**row, "labels": row["input_ids"] if n else torch.full((5,), -100)} for n, row in enumerate(rows)]
            for name, rows in (("a", running.sequences(0, 200)), ("b", running.sequences(1, 300)))
        },
        num_samples=100,
        block=running.BATCH,
    )
    running.run(running.controller(data), steps=4)
    assert data.schedule.num_stages == 2
    assert "keeps the weights" not in caplog.text


def test_a_domain_of_which_hardly_a_row_has_a_scored_token_is_refused_in_words_that_are_true():
    rows = [row | {"labels": torch.full((5,), -100)} for row in running.sequences(0, 200)]
    rows[1] = running.sequences(0, 2)[1]  # not among those that are looked at, which are spread over it
    loop = running.controller(
        MixtureDataset({"a": rows, "b": running.sequences(1, 300)}, num_samples=100, block=running.BATCH)
    )
    with pytest.raises(ValueError, match=r"domains\['a'\], of which 32 sequences were looked at: no sequence has a"):
        running.begun(loop)


def test_large_tasks_are_cut_to_a_spread_of_them():
    loop = MixtureController(
        running.dataset(), {"t": running.sequences(0, 60)}, Static(), stage_steps=5, task_sequences=6
    )
    rows = [
        int(batch["input_ids"][i, 1]) for batch in loop.measurement.sets["t"] for i in range(len(batch["input_ids"]))
    ]
    assert rows == [0, 10, 20, 30, 40, 50]


def test_materialising_tasks_does_not_touch_the_random_state():
    loader = torch.utils.data.DataLoader(running.sequences(0, 8), batch_size=2, shuffle=True)
    before = torch.get_rng_state()
    MixtureController(running.dataset(), {"t": loader}, Static(), stage_steps=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_agree_that_one_of_them_could_not_read(processes, tmp_path):
    script = tmp_path / "read.py"
    script.write_text(
        textwrap.dedent("""
        import datetime
        import torch.distributed as dist
        from dynmix import MixtureDataset
        from tests.small import Bigram
        from tests.test_measurement import PRIOR, measurement

        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
        rank, read = dist.get_rank(), MixtureDataset.sequence

        def fails(self, name, row):
            if rank == 1 and name == "b":
                raise OSError("stale file handle")
            return read(self, name, row)

        room, model = measurement({"influence", "guards"}), Bigram(0)
        probes = room.probes(100, 50, PRIOR)
        for attempt in (
            lambda: room.influence(model, probes, PRIOR),
            lambda: room.gradient(model, probes),
            lambda: room.task_gradients(model, probes, PRIOR, 2),
            lambda: room.rehearse(model),
        ):
            MixtureDataset.sequence = fails
            try:
                attempt()
            except Exception as failure:
                print(f"<{rank} {type(failure).__name__}: {failure}>", flush=True)
            MixtureDataset.sequence = read
            assert room.shrunk_to is None
            attempt()  # and nobody is left waiting
        dist.destroy_process_group()
        """)
    )
    status, printed = processes.run(script, ranks=2, timeout=60)
    assert status == 0, printed
    assert printed.count("<0 RuntimeError: another rank failed: OSError: stale file handle>") == 4
    assert printed.count("<1 OSError: stale file handle>") == 4
