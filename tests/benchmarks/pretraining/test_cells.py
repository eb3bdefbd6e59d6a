"""The bench from its command line, on a corpus that is made here: cells cost alike, are kept, and go on bit for bit."""

import gzip
import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from typer.testing import CliRunner

from benchmarks.pretraining import beforehand, cells
from benchmarks.pretraining.__main__ import app
from benchmarks.pretraining.corpus import Corpus
from benchmarks.pretraining.doge import DogeProxy
from benchmarks.pretraining.hindsight import Law
from benchmarks.pretraining.loop import train
from benchmarks.pretraining.tables import Cells
from benchmarks.pretraining.training import Training
from dynmix import TokenStore
from tests.small import word_tokenizer

WORDS = [a + b for a in "bcdfg" for b in "aeiou"]
VARIANT = "tikmix-d[start=unimax,max_stages=2]"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of ten words each, a task of the first and one of the second."""
    root, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)

    def text(kind: int, words: int) -> str:
        return " ".join(rng.choices(WORDS[5 * kind : 5 * kind + 10], k=words))

    for folder in ("domains", "tasks", "tokenizers/bpe4096"):
        (root / folder).mkdir(parents=True)
    for kind, name in enumerate(("one", "two", "three")):
        for file, rows in ((f"domains/{name}", 200), (f"tasks/{name}.valid", 6)):
            lines = [json.dumps({"text": text(kind, 200)}) + "\n" for _ in range(rows)]
            (root / f"{file}.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    for kind, name in enumerate(("t", "u")):
        rows = [{"context": text(kind, 20) + " ", "gold": text(kind, 5), "choices": None} for _ in range(40)]
        (root / f"tasks/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = word_tokenizer(
        ["<eos>", "<unk>", *WORDS], "<unk>", pre_tokenizers.Whitespace(), eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(root / "tokenizers/bpe4096")
    return root


def bench(corpus: Path, output: Path, methods: str, **more: str) -> Any:
    given = {"output": output, "corpus": corpus, "methods": methods, "budget": "tiny", "seeds": "0"}
    given |= {"unseen-tasks": "u", "unseen-domains": "three"} | more
    return CliRunner().invoke(app, ["run", *(f"--{key}={value}" for key, value in given.items())])


def cell(output: Path, method: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "tiny" / method / "0" / "cell.json").read_text())
    return found


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of two cells, and of the page that is made of them."""
    output = tmp_path_factory.mktemp("bench")
    shown = bench(corpus, output, f"natural,{VARIANT}")
    assert shown.exit_code == 0, shown.output
    assert f"{VARIANT}, seed 0" in shown.output
    page = CliRunner().invoke(app, ["results", "--output", str(output), "--file", str(output / "RESULTS.md")])
    assert page.exit_code == 0, page.output
    return output


def test_cells_spend_the_same_budget_whatever_on(run: Path) -> None:
    natural, measured = cell(run, "natural"), cell(run, VARIANT)
    assert natural["budget"] == measured["budget"] == sum(natural["spent"]["flops"].values())
    spent = measured["spent"]["flops"]
    assert spent["mixing"] > 0
    assert measured["steps"] < natural["steps"] == 48
    a_step = spent["training"] / measured["steps"]
    assert a_step == pytest.approx(natural["spent"]["flops"]["training"] / 48)
    # Whatever is bought last, a step or the only measurement, may go over it, and nothing is bought after that.
    assert measured["budget"] <= sum(spent.values()) < measured["budget"] + max(a_step, spent["mixing"])
    journal = (run / "tiny" / VARIANT / "0/run/journal.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in journal][:-1] == [1, 11]  # a quarter of the run, and no more
    assert set(natural["sampled"]) == {"one", "two"}
    assert set(natural["final"]) == {"t", "u", "text/one", "text/two", "text/three"}


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What each proxy and reference that the bench itself trains spends, filled as they are trained."""
    found: list[dict[str, float]] = []

    def watched(*given: Any, **more: Any) -> Any:
        curve = train(*given, **more)
        found.append(given[3].flops)
        return curve

    monkeypatch.setattr(beforehand, "train", watched)
    return found


def test_proxies_look_for_the_mixture_of_a_run_as_long_as_its_share(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many epochs as a domain may have are more of a shorter run."""
    steps = []

    def weights_of(bench: Any, *_: Any) -> dict[str, float]:
        steps.append(bench.budget.steps)
        return {"one": 0.5, "two": 0.5}

    monkeypatch.setattr(cells, "weights_of", weights_of)
    assert bench(corpus, tmp_path, "mde,regmix[share=0.5]").exit_code == 0
    assert steps == [48, 24]


def test_near_duplicates_are_read_as_often_as_their_text_may_be(corpus: Path, tmp_path: Path) -> None:
    root = shutil.copytree(corpus, tmp_path / "corpus")
    again = json.dumps({"text": " ".join(random.Random(1).choices(WORDS[5:15], k=200))}) + "\n"
    (root / "domains/two.jsonl.gz").write_bytes(gzip.compress(200 * again.encode()))
    assert bench(root, tmp_path, "uniform[epochs=4]").exit_code == 0
    sampled = cell(tmp_path, "uniform[epochs=4]")["sampled"]
    assert 0 < sampled["two"] < 8 * 200 / (48 * 8 * 128)  # four times the text, and no more than twice that by rounding


def test_methods_that_read_no_task_are_not_charged_for_any(
    corpus: Path, tmp_path: Path, proxies: list[dict[str, float]]
) -> None:
    assert bench(corpus, tmp_path, "odm,doremi").exit_code == 0
    odm = cell(tmp_path, "odm")["spent"]["flops"]
    assert 0 < odm["mixing"] < 0.02 * odm["training"] / 48
    reference, minimax = proxies
    assert reference["mixing"] == 0 < minimax["mixing"] < 0.002 * minimax["training"]


def test_doge_spends_its_share_on_a_proxy_of_which_each_step_holds_every_domain(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, held = DogeProxy.step, set()

    def watched(training: DogeProxy, batch: Any) -> float:
        held.add(tuple(sorted(batch["domain"].tolist())))
        return step(training, batch)

    monkeypatch.setattr(DogeProxy, "step", watched)
    assert bench(corpus, tmp_path, "doge").exit_code == 0
    assert held == {(0, 1)}
    found = cell(tmp_path, "doge")
    assert 0.5 * found["budget"] <= found["spent"]["flops"]["before"] < 0.51 * found["budget"]


def test_what_is_there_is_not_run_again(corpus: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Training, "step")
    assert bench(corpus, run, f"natural,{VARIANT}").exit_code == 0
    assert isinstance(bench(corpus, run, "uniform").exception, AttributeError)


def test_a_cell_that_was_killed_goes_on_bit_for_bit(
    corpus: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Training.step

    def killed(training: Training, batch: Any) -> float:
        if training.steps == 20:
            raise KeyboardInterrupt
        return step(training, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "step", killed)
        assert bench(corpus, tmp_path, VARIANT).exit_code
    folder = tmp_path / "tiny" / VARIANT / "0"
    assert (folder / "state.pt").exists()
    assert not (folder / "cell.json").exists()
    assert bench(corpus, tmp_path, VARIANT).exit_code == 0
    one, other = cell(run, VARIANT), cell(tmp_path, VARIANT)
    assert one["spent"].pop("seconds") != other["spent"].pop("seconds")
    assert one == other
    assert not (folder / "state.pt").exists()


def test_hindsight_trains_on_what_a_law_of_the_other_cells_likes(corpus: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    assert bench(corpus, tmp_path, "uniform,temperature,hindsight").exit_code == 0
    cells = Cells.read(tmp_path / "tiny")
    weights = json.loads((tmp_path / "tiny/hindsight/weights.json").read_text())
    assert weights == pytest.approx(Law.fit(cells).best(cells))  # its own cell is left out
    assert cell(tmp_path, "hindsight")["sampled"] == pytest.approx(weights, abs=0.01)


def test_the_page_says_what_the_cells_say(run: Path) -> None:
    text, natural, measured = (run / "RESULTS.md").read_text(), cell(run, "natural"), cell(run, VARIANT)
    row = next(line for line in text.splitlines() if line.startswith("| `natural` | 1 |"))
    own = [(natural["final"][f"text/{name}"]["loss"]) for name in ("one", "two")]
    expected = [natural["final"]["t"]["loss"], natural["final"]["u"]["loss"], sum(own) / 2]
    assert [f"{value:.3f}" for value in expected] == [part.strip() for part in row.split("|")[3:6]]
    for name, part in measured["sampled"].items():
        assert f"{100 * natural['sampled'][name]:.1f}" in next(
            line for line in text.splitlines() if line.startswith(f"| `{name}` |")
        )
        assert 0 < part < 1
    own = f"{measured['final']['t']['loss']:.3f}"  # of no table of methods, and with nothing that it varies
    assert f"| `{VARIANT}` | 1 | {own} (" in text.split("### Other runs in `tiny`")[1]
    assert "Not run: uniform (seed 0)" in text.replace("natural (seed 1), natural (seed 2), ", "")
    assert (run / "results" / "curves-tiny.svg").exists()
    kept = [json.loads(line) for line in (run / "results" / "cells-tiny.jsonl").read_text().splitlines()]
    assert natural in kept
    assert measured in kept


def test_a_page_can_be_written_of_what_is_kept_beside_it(corpus: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "results", tmp_path / "results")
    page = CliRunner().invoke(app, ["results", f"--file={tmp_path / 'RESULTS.md'}"])
    assert page.exit_code == 0, page.output
    assert (tmp_path / "RESULTS.md").read_text() == (run / "RESULTS.md").read_text()
    # A cell that was run since takes the place of its own line alone; those of another bench are not mixed in.
    later = cell(run, "natural") | {"steps": 1}
    (tmp_path / "tiny/natural/0").mkdir(parents=True)
    (tmp_path / "tiny/natural/0/cell.json").write_text(json.dumps(later))
    settings = json.loads((run / "tiny/settings.json").read_text())
    call = ["results", f"--output={tmp_path}", f"--file={tmp_path / 'RESULTS.md'}"]
    for steps, fits in ((settings["steps"], True), (7, False)):
        (tmp_path / "tiny/settings.json").write_text(json.dumps(settings | {"steps": steps}))
        page = CliRunner().invoke(app, call)
        assert (page.exit_code == 0) is fits
        kept = [json.loads(line) for line in (tmp_path / "results/cells-tiny.jsonl").read_text().splitlines()]
        assert kept == [settings, later, cell(run, VARIANT)]
    assert "is of other settings" in str(page.exception)
    assert f"(steps was {settings['steps']} and is 7): give a --file elsewhere" in str(page.exception)


def test_the_page_stays_where_there_is_nothing_to_write(run: Path, tmp_path: Path) -> None:
    (page := tmp_path / "RESULTS.md").write_text("as it was")
    nothing = CliRunner().invoke(app, ["results", f"--output={tmp_path / 'mistyped'}", f"--file={page}"])
    assert "mistyped has no cells and no claims" in str(nothing.exception)
    shutil.copytree(run / "tiny", tmp_path / "bench/tiny")
    (tmp_path / "bench/tiny/natural/0/cell.json").write_text("")
    damaged = CliRunner().invoke(app, ["results", f"--output={tmp_path / 'bench'}", f"--file={page}"])
    assert "natural/0/cell.json is damaged" in str(damaged.exception)
    assert page.read_text() == "as it was"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "results keeps nothing, and there is no --output"),
        (("--fidelity=mistyped",), "mistyped has no fidelity.json"),
    ],
)
def test_the_page_stays_where_nothing_is_kept(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    (page := tmp_path / "RESULTS.md").write_text("as it was")
    nothing = CliRunner().invoke(app, ["results", f"--file={page}", *options])
    assert message in str(nothing.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["RESULTS.md"]
    assert page.read_text() == "as it was"


def test_the_page_of_a_corpus_where_little_is_held_out(corpus: Path, tmp_path: Path) -> None:
    """Seeds of one's own, a domain without held-out text, and nothing unseen."""
    shutil.copytree(corpus, bare := tmp_path / "bare")
    (bare / "tasks/two.valid.jsonl.gz").unlink()
    lines = gzip.decompress((bare / "domains/one.jsonl.gz").read_bytes()).splitlines(keepends=True)
    (bare / "domains/one.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:90])))  # or all mixtures are one
    none = {"unseen-tasks": "", "unseen-domains": "", "seeds": "7"}
    shown = bench(bare, tmp_path, "natural,uniform,temperature,unimax", **none)
    assert shown.exit_code == 0, shown.output
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = CliRunner().invoke(app, ["results", f"--output={tmp_path}", f"--file={tmp_path / 'RESULTS.md'}"])
    assert page.exit_code == 0, page.output
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| method | seeds | optimised tasks | domains' own text | tokens trained |" in text
    assert "What the runs of `tiny` say together" in text
    assert "text/one" in text
    assert "text/two" not in text
    assert "(seed 7)" in text
    assert "(seed 0)" not in text
    assert "traps" not in text


def test_another_corpus_has_stores_of_its_own_and_what_judges_is_part_of_the_settings(
    corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(corpus, other := tmp_path / "other")
    shutil.copy(corpus / "domains/three.jsonl.gz", other / "domains/one.jsonl.gz")
    ours, theirs = (Corpus(root, tmp_path / "cache").stores for root in (corpus, other))
    assert ours["two"] == theirs["two"]
    content = {path: TokenStore.open(path).tokens[:50].tolist() for path in (*ours.values(), *theirs.values())}
    assert content[theirs["one"]] == content[ours["three"]] != content[ours["one"]]
    shutil.copytree(corpus, judged := tmp_path / "judged")
    shutil.copy(corpus / "tasks/three.valid.jsonl.gz", judged / "tasks/one.valid.jsonl.gz")
    assert bench(corpus, tmp_path, "natural").exit_code == 0
    refused = bench(judged, tmp_path, "uniform")
    assert "results of other settings" in str(refused.exception)


def test_the_tokenizer_of_a_corpus_may_have_any_name_where_it_is_the_only_one(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, other := tmp_path / "other")
    (other / "tokenizers/bpe4096").rename(other / "tokenizers/own")
    found = Corpus(other, tmp_path)
    assert found.tokenizer_name == str(other / "tokenizers/own")
    assert "tokenizer/tokenizer.json" in found.facts
    shutil.copytree(other / "tokenizers/own", other / "tokenizers/second")
    with pytest.raises(SystemExit, match=r"tokenizers has \['own', 'second'\]: put one"):
        Corpus(other, tmp_path)
    (other / "tokenizers/own").rename(other / "tokenizers/bpe4096")
    assert Corpus(other, tmp_path).tokenizer_name == str(other / "tokenizers/bpe4096")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"budget": "huge"}, "no budget 'huge': there are tiny"),
        ({"methods": "best"}, "best"),
        ({"methods": "tikmix-d[stage=2]"}, "stage"),
        ({"corpus": "nowhere"}, "nowhere/domains has no .jsonl.gz and no token store"),
        ({"methods": ""}, "--methods '' names none"),
        ({"methods": "regmix[start=unimax]"}, "no option 'start'; regmix takes epochs, share"),
        ({"methods": "tikmix-d[stages]"}, "stages=: a whole number of at least 2"),
        ({"methods": "tikmix-d[stages=1]"}, "stages=1: a whole number of at least 2"),
        ({"methods": "tikmix-d[beta=1,stages=2,beta=2]"}, "an option is given twice"),
        ({"methods": "tikmix-d[max_stages=1]"}, "max_stages=1: a whole number of at least 2"),
        ({"methods": "tikmix-d[guards=non]"}, "guards=non: one of domains, none"),
        ({"methods": "tikmix-d[start=odm]"}, "start=odm: one of natural"),
        ({"methods": "tikmix-d[beta=x]"}, "beta=x: a number"),
        ({"methods": "tikmix-d[beta=-1]"}, "beta=-1.0: a finite number of at least 0"),
        ({"methods": "tikmix-d[curvature=KFAC:x]"}, "curvature 'KFAC:x': could not convert"),
        ({"methods": "odm[share=0]"}, "share=0: above 0"),
        ({"seeds": "1.5"}, "--seeds '1.5': whole numbers of at least 0"),
        ({"device": "cuda:99"}, "--device cuda:99: "),
        ({"unseen-tasks": "t,u"}, "no task to optimise"),
        ({"unseen-domains": "one,two,three"}, "has [] to train on"),
        ({"unseen-domains": "one,three"}, "has ['two'] to train on, of ['one', 'three', 'two']: two at least"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(
    corpus: Path, tmp_path: Path, changed: dict[str, str], message: str
) -> None:
    shown = bench(**{"corpus": corpus, "output": tmp_path, "methods": "natural"} | changed)  # type: ignore[arg-type]
    assert shown.exit_code
    assert message in shown.output + str(shown.exception)
    assert not (tmp_path / "tiny").exists()  # or the next call would be told of other settings


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tasks/t.jsonl", b'{"context": "ba", "gold": " be"}\n{"context": "ba"\n', "t.jsonl, line 2: not JSON"),
        ("tasks/t.jsonl", b'{"context": "ba", "gold": " be"}\n', "t.jsonl has one example: two at least"),
        ("tasks/one.valid.jsonl.gz", b"", "one.valid.jsonl.gz has no document"),
        ("tasks/one.valid.jsonl.gz", b'{"txt": "ba"}\n', "one.valid.jsonl.gz, line 1: no field"),
        ("domains/one.jsonl.gz", b'{"text": "ba be"}\n', "'one' has not one whole sequence"),
    ],
)
def test_files_that_cannot_be_read_are_said_before_the_settings_stand(
    corpus: Path, tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    shutil.copytree(corpus, broken := tmp_path / "broken")
    # Not compressed above: the time in it would be in the test's name, and each worker would collect another.
    (broken / file).write_bytes(gzip.compress(content) if file.endswith(".gz") else content)
    shown = bench(broken, tmp_path / "bench", "natural")
    assert isinstance(shown.exception, SystemExit)
    assert message in str(shown.exception)
    assert not (tmp_path / "bench/tiny").exists()


@pytest.mark.parametrize("file", ["domains/four.jsonl", "tasks/one.valid.jsonl", "tasks/v.jsonl.gz"])
def test_files_that_would_be_left_out_or_be_tasks_are_said(corpus: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(corpus, other := tmp_path / "other")
    (other / file).touch()
    with pytest.raises(SystemExit, match=rf"{Path(file).name}'\]: texts are read from <domain>.jsonl.gz"):
        Corpus(other, tmp_path)


def test_domains_may_be_token_stores(corpus: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, other := tmp_path / "other")
    made = Corpus(corpus, tmp_path / "cache", without=("three",)).stores
    for part in ("idx", "bin"):
        shutil.copy(f"{made['one']}.{part}", other / f"domains/one.{part}")
    both = bench(other, tmp_path, "natural")
    assert "domains has ['one'] as text and as token stores" in str(both.exception)
    (other / "domains/one.jsonl.gz").unlink()
    shown = bench(other, tmp_path, "natural")
    assert shown.exit_code == 0, shown.output
    ours, theirs = cell(tmp_path, "natural"), cell(run, "natural")
    assert {**ours, "spent": 0} == {**theirs, "spent": 0}
    TokenStore.write(other / "domains/one", [[999] * 300])
    assert "one has token 999, the tokenizer 27 tokens" in str(bench(other, tmp_path / "new", "natural").exception)
    TokenStore.write(other / "domains/one", [[1] * 300])
    assert "results of other settings (corpus was" in str(bench(other, tmp_path, "uniform").exception)


def test_the_document_of_a_trap_is_no_text_that_judges(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, other := tmp_path / "other")
    (other / "tasks/one.valid.jsonl.gz").unlink()
    found, characters = Corpus(other, tmp_path / "cache"), 120
    text, one = found.text("three", characters), found.rest_of_a_document(found.domains, characters)
    whole = json.loads(gzip.decompress((other / "tasks/three.valid.jsonl.gz").read_bytes()).splitlines()[0])["text"]
    assert text.records[0].gold + one.records[0].gold == whole
    assert len(text.records[0].gold) == characters // 6
    with pytest.raises(ValueError, match="no .valid.jsonl.gz of a document"):
        found.rest_of_a_document(found.domains, 10**6)
    for file in (other / "tasks").glob("*.valid.jsonl.gz"):
        file.unlink()
    shown = bench(other, tmp_path / "bench", "natural,tikmix-d[tasks=one-document]")
    assert "leave out what asks for it" in str(shown.exception)
    assert not (tmp_path / "bench/tiny").exists()


def test_the_page_of_variants_alone(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "tiny/natural")
    shutil.rmtree(tmp_path / "results")
    base = tmp_path / "tiny" / "tikmix-d[start=unimax]" / "0"
    base.mkdir(parents=True)
    own = cell(run, VARIANT) | {"method": base.parent.name}
    (base / "cell.json").write_text(json.dumps(own))
    page = CliRunner().invoke(app, ["results", f"--output={tmp_path}", f"--file={tmp_path / 'RESULTS.md'}"])
    assert page.exit_code == 0, page.output
    assert "`[max_stages=2]` | 1 | +0.000" in (tmp_path / "RESULTS.md").read_text()


def test_results_of_other_settings_are_not_mixed(corpus: Path, run: Path) -> None:
    shown = bench(corpus, run, "natural", **{"unseen-tasks": ""})
    assert shown.exit_code
    assert "has results of other settings (split was" in shown.output + str(shown.exception)
