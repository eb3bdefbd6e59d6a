import json

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from dynmix import Influence, TiKMiXD, TokenStore, group_influence
from dynmix.batches import as_batches
from dynmix.cli import app
from dynmix.journal import Journal
from tests.journal_rows import journal_row


def call(*words):
    return CliRunner().invoke(app, [*map(str, words)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A checkpoint, three stores, a task's store, and what the command made of them."""
    folder = tmp_path_factory.mktemp("measured")
    rng = np.random.default_rng(0)
    for k, name in enumerate(("web", "code", "noise")):
        TokenStore.write(folder / "stores" / name, [rng.integers(10 * k, 10 * k + 10, 90) for _ in range(4 + k)])
    TokenStore.write(folder / "valid" / "numbers", [rng.integers(0, 10, 90)])
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=30, **size)).save_pretrained(folder / "model")
    words = ("influence", folder / "model", "--data", folder / "stores", "--tasks", folder / "valid")
    done = call(*words, "--out", folder / "out", "--sequence-length", 8, "--probe-sequences", 6, "--json")
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout)


def test_the_matrix_is_group_influence_s_and_is_saved_and_drawn(measured):
    folder, printed = measured
    saved = json.loads((folder / "out/influence.json").read_text())
    assert saved == printed
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    options = {"sequence_length": 8, "micro_batch": 8}
    domains = {
        name: as_batches(folder / "stores" / name, name=name, sequences=6, **options)
        for name in ("code", "noise", "web")
    }
    tasks = {"numbers": as_batches(folder / "valid/numbers", name="numbers", sequences=128, **options)}
    expected = group_influence(model, domains, tasks)
    found = Influence.from_dict(saved)
    assert (found.tasks, found.domains) == (expected.tasks, expected.domains)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    np.testing.assert_allclose(found.standard_error, expected.standard_error, rtol=1e-5)
    assert saved["tokens"] == {"code": 450, "noise": 540, "web": 360}
    assert (folder / "out/influence.png").read_bytes()[:4] == b"\x89PNG"
    drawing = (folder / "out/influence.svg").read_text()
    assert all(word in drawing for word in ("noise", "numbers", f"{found.scores[0, 0]:.2g}"))


def test_the_command_that_comes_next_can_be_copied_as_it_stands(measured, tmp_path):
    folder, out = measured[0], tmp_path / "my folder"
    words = ("influence", folder / "model", "--data", folder / "stores", "--tasks", folder / "valid", "--out", out)
    said = call(*words, "--sequence-length", 8, "--probe-sequences", 2).output
    assert f"dynmix propose '{out}/influence.json'" in said


def test_a_checkpoint_that_cannot_read_a_store_is_refused(measured, tmp_path):
    folder = measured[0]
    TokenStore.write(tmp_path / "long", [[1] * 90])
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 8}
    GPT2LMHeadModel(GPT2Config(vocab_size=20, **sizes)).save_pretrained(tmp_path / "model")
    words = ("influence", tmp_path / "model", "--out", tmp_path / "out", "--tasks", folder / "valid", "--data")
    for data, length, message in (
        (folder / "stores/noise", 8, "domain 'noise' has token 29, the model's vocabulary has 20"),
        (tmp_path / "long", 9, "domain 'long' has a sequence of 9 tokens, the model takes 8 at most"),
    ):
        refused = call(*words, data, "--sequence-length", length)
        assert refused.exit_code == 1
        assert message in " ".join(refused.output.split())


def test_a_table_for_people(measured):
    done = call("inspect", measured[0] / "out/influence.json")
    assert done.exit_code == 0
    assert call("inspect", measured[0] / "out").output.splitlines()[-4:] == done.output.splitlines()[-4:]
    assert [line.split()[0] for line in done.output.splitlines()[-4:-1]] == ["code", "noise", "web"]


def test_weights_from_it_are_the_mixer_s(measured, tmp_path):
    folder, saved = measured
    prior = {"web": 0.5, "code": 0.3, "noise": 0.2}
    words = ("propose", folder / "out", "confidence=0", "--prior", "web=0.5,code=0.3,noise=0.2", "--upper", "web=0.6")
    done = call(*words, "--json", "--output", tmp_path / "weights.json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    expected = TiKMiXD(confidence=0).propose(Influence.from_dict(saved), prior, {"web": 0.6})
    assert found["weights"] == pytest.approx(expected.weights)
    assert found["weights"]["web"] <= 0.6
    assert json.loads((tmp_path / "weights.json").read_text())["weights"] == found["weights"]
    said = call(*words).output
    assert "task numbers: predicted gain +" in said
    assert expected.message in said.replace("\n", " ")
    natural = json.loads(call("propose", folder / "out", "--mixer", "static", "observe=true", "--json").stdout)
    assert natural["prior"] == pytest.approx({"web": 360 / 1350, "code": 450 / 1350, "noise": 540 / 1350})


def test_guards_and_least_weights(measured):
    folder, _ = measured
    done = call("propose", folder / "out", "--prior", "uniform", "--lower", "noise=0.33", "confidence=0", "--json")
    assert json.loads(done.stdout)["weights"]["noise"] >= 0.33 - 1e-6
    both = call("propose", folder / "out", "--upper", "noise=0.2", "--upper", "web=0.3", "--json")
    weights = json.loads(both.stdout)["weights"]
    assert weights["noise"] <= 0.2 + 1e-6  # as with one option for both
    assert weights["web"] <= 0.3 + 1e-6
    refused = call("propose", folder / "out", "--guards", "number", "--guards", "letters,words")
    assert refused.exit_code == 1
    assert "['number', 'letters', 'words'] are no rows of the influence" in refused.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prior", "web=0.5,code=0.6,noise=0"], "--prior: weights sum to 1.1, not 1"),
        (["--prior", "web=1"], "--prior: weights do not match"),
        (["--prior", "nothing.json"], "--prior nothing.json: natural, uniform"),
        (["--output", "."], "is a directory"),
        (["--upper", "web"], "--upper 'web': write domain=number"),
        (["--upper", "web=40"], "--upper web=40: weights are from 0 to 1"),
        (["--lower", "web=10"], "lower={'web': 10.0}: weights are from 0 to 1"),
        (["--mixer", "odm"], "--mixer odm: it decides from ['loss'], in a run alone"),
        (["confidenc=1"], "did you mean 'confidence'?"),
        (["confidence"], "given as key=value"),
        (["--mixer", "tikmix-m", "--lower", "web=0.1"], "--lower: tikmix-m takes no least weights"),
    ],
)
def test_what_is_wrong_is_one_sentence(measured, words, message):
    done = call("propose", measured[0] / "out", *words)
    assert done.exit_code in (1, 2)
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--tasks": "nowhere"}, "--tasks nowhere: no such file or token store"),
        ({"--data": "nowhere"}, "nowhere.idx: no such file"),
        ({"--curvature": "ekfak"}, "did you mean 'ekfac'?"),
        ({"--curvature": "adam"}, "--curvature: adam is the optimizer of the run that trains"),
        ({"--probe-sequences": "0"}, "--probe-sequences"),
        ({"--sequence-length": "2000"}, "not one sequence of 2000"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(measured, tmp_path, change, message):
    folder, _ = measured
    options = {"--data": folder / "stores", "--tasks": folder / "valid", "--out": tmp_path / "out"} | change
    done = call("influence", folder / "model", *(word for pair in options.items() for word in pair))
    assert done.exit_code in (1, 2)
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_weights_from_a_journal_begin_at_those_it_was_measured_under(measured, tmp_path):
    row = journal_row(
        1, start=16, domains=["a", "b"], weights_before={"a": 0.7, "b": 0.3}, weights={"a": 0.5, "b": 0.5},
        influence=[[1.0, 2.0]], standard_error=[[0.1, None]],
    )  # fmt: skip
    Journal(tmp_path / "dynmix/journal.jsonl").append(row)
    found = json.loads(call("propose", tmp_path, "--json").stdout)
    assert found["prior"] == {"a": 0.7, "b": 0.3}
    assert found["weights"]["b"] == pytest.approx(0.3)  # its error is not known
    refused = call("propose", tmp_path, "--stage", 4)
    assert refused.exit_code == 1
    assert "no influence of stage 4; measured are 1" in " ".join(refused.output.split())
    seen = call("inspect", tmp_path)
    assert "a 0.5, b 0.5" in seen.output
    assert json.loads(call("inspect", tmp_path, "--json").stdout)["facts"]["samples"] == 16
