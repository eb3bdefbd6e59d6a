"""A preparation that is killed, at any moment, goes on; what it ends with is what an uninterrupted one does."""

import gzip
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dynmix.mixture.prepare import PrepareError, prepare
from dynmix.mixture.prepare import inputs as inputs_module
from dynmix.mixture.prepare import pipeline as pipeline_module
from dynmix.mixture.prepare import workers as workers_module
from dynmix.mixture.store import TokenStore
from tests.small import word_tokenizer

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def tokenizer(words: int = 50) -> PreTrainedTokenizerFast:
    return word_tokenizer(["<eos>", *(f"w{i}" for i in range(words))], "w0", eos_token="<eos>")


TOKENIZER = tokenizer()


def lines(seed: int, count: int) -> bytes:
    texts = [" ".join(f"w{(seed + i * j) % 50}" for j in range(i % 7)) for i in range(count)]
    return "".join(json.dumps({"text": t, "source": f"s{i % 3}"}) + "\n" for i, t in enumerate(texts)).encode()


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if not name.startswith(".prepare-")}  # what is being removed


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory):
    """Texts of two domains in three files, some twenty pieces; what they become as they are, and by a field."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts" / "web").mkdir(parents=True)
    (folder / "texts" / "web" / "a.jsonl").write_bytes(lines(1, 60))
    (folder / "texts" / "web" / "b.jsonl.gz").write_bytes(gzip.compress(lines(2, 60)))
    (folder / "texts" / "code.jsonl").write_bytes(lines(3, 60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs_module, "SMALLEST", 500)
        wanted = {}
        for field in (None, "source"):
            run(folder / f"whole-{field}", folder, field)
            wanted[field] = content(folder / f"whole-{field}")
        yield folder, wanted


def run(output: Path, folder: Path, field: str | None, **options) -> None:
    options = {"held_out": 0.2, "workers": 1, "progress": False, "domain_from": field} | options
    prepare(folder / "texts", output, options.pop("tokenizer", TOKENIZER), **options)


def killed_at(event: int, output: Path, *args) -> bool:
    """Run it in a process that kills itself before its `event`-th change of, or look into, a file; whether it did."""
    child = os.fork()
    if not child:
        left = event

        def hook(name, arguments):
            nonlocal left
            if name in EVENTS and str(arguments[0]).startswith(str(output)):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            run(output, *args)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


@settings(max_examples=4)
@given(st.lists(st.integers(1, 70), max_size=8), st.sampled_from([None, "source"]))
@example([1, 2, 3, 4, 5, 6, 9, 15], None)
@example([150, 20, 20, 1, 2], "source")
def test_a_chain_of_kills_ends_with_the_same_bytes(tmp_path_factory, corpus, kills, field):
    folder, wanted = corpus
    output = tmp_path_factory.mktemp("chain")
    for event in kills:
        if not killed_at(event, output, folder, field):
            break
        if (output / "manifest.json").exists() and not (output / ".prepare").exists():
            break  # in the middle of clearing up
    else:
        run(output, folder, field)
    assert content(output) == wanted[field]


def test_finished_shards_are_kept_and_half_written_ones_are_not_taken(corpus, tmp_path, monkeypatch):
    folder, wanted = corpus
    assert killed_at(60, tmp_path / "out", folder, None)
    shards = sorted((tmp_path / "out" / ".prepare" / "shards").glob("*.arrow"))
    assert len(shards) > 2
    shards[0].write_bytes(shards[0].read_bytes()[:-20])
    written = []
    real = inputs_module.FileLines.records
    monkeypatch.setattr(inputs_module.FileLines, "records", lambda self, f: written.append(self.start) or real(self, f))
    run(tmp_path / "out", folder, None)
    assert content(tmp_path / "out") == wanted[None]
    assert 0 in written
    assert len(written) < 20


def test_processes_give_the_same_bytes_and_one_that_is_killed_is_told(corpus, tmp_path, monkeypatch):
    folder, wanted = corpus
    processes = []
    real = workers_module._Process

    def recorded(*args):
        processes.append(real(*args))
        monkeypatch.setattr(processes[-1].tasks, "send", partial(send, processes[-1], processes[-1].tasks.send))
        return processes[-1]

    def send(process, to, message):
        if killed or not isinstance(message, tuple) or not list(output.glob(".prepare/shards/*.arrow")):
            to(message)
            return
        killed.append(process)
        process.popen.send_signal(signal.SIGSTOP)  # it has a task then, and does not end it before it ends itself
        to(message)
        process.popen.kill()

    killed = []
    output = tmp_path / "out"
    monkeypatch.setattr(workers_module, "_Process", recorded)
    with pytest.raises(ChildProcessError, match="a worker ended by SIGKILL while it .*same call goes on"):
        run(output, folder, "source", workers=2)
    assert all(process.popen.poll() is not None for process in processes)
    assert list(output.glob(".prepare/shards/*.arrow"))
    run(output, folder, "source", workers=2)
    assert content(output) == wanted["source"]
    assert all(process.popen.poll() is not None for process in processes)


def test_a_process_ends_with_its_parent_also_in_the_middle_of_a_message(tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    process = workers_module._Process(handle)
    os.write(process.tasks.fileno(), (1000).to_bytes(4, "big") + b"some of it")
    process.tasks.close()
    assert process.popen.wait(60) == 0
    process.answers.close()
    os.close(handle)


def test_other_arguments_are_refused_or_start_over(corpus, tmp_path):
    folder, wanted = corpus
    output = tmp_path / "out"
    assert killed_at(60, output, folder, None)
    left = content(output)
    for options, message in (
        ({"held_out": 0.3}, "its held_out was 0.2 and is now 0.3"),
        ({"append_eos": False}, "its append_eos was True and is now False"),
        ({"domain_from": "source"}, "its domain_from was None and is now 'source'"),
        ({"tokenizer": tokenizer(51)}, "it was by another tokenizer"),
    ):
        with pytest.raises(PrepareError, match=rf"\.prepare holds .* another preparation: {message}.*--overwrite"):
            run(output, folder, None, **options)
        assert content(output) == left
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "code.jsonl").write_bytes(lines(3, 60))
    with pytest.raises(PrepareError, match=r"web/a\.jsonl is missing now"):
        run(output, tmp_path, None)
    run(output, folder, None, held_out=0.3, overwrite=True)
    assert content(output) != wanted[None]
    run(output, folder, None, overwrite=True)
    assert content(output) == wanted[None]


def test_inputs_of_other_domains_are_other_arguments(corpus, tmp_path, monkeypatch):
    web, code = (corpus[0] / "texts" / name for name in ("web/a.jsonl", "code.jsonl"))

    def prepared(inputs):
        return prepare(inputs, tmp_path / "out", TOKENIZER, workers=1, progress=False)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline_module, "make_stores", None)
        with pytest.raises(TypeError):
            prepared({"web": web, "code": code})
    for other in ({"all": [web, code]}, {"x": web, "code": code}, {"web": web, "code": code, "twice": code}):
        with pytest.raises(PrepareError, match="its inputs were in another order, or of other domains"):
            prepared(other)
    assert list(prepared({"web": web, "code": code})) == ["web", "code"]


def test_a_bad_file_that_is_replaced_by_a_smaller_one_costs_no_domain(tmp_path, monkeypatch):
    """Small domains are finished together: which they are depends on their sizes."""
    monkeypatch.setattr("dynmix.mixture.prepare.run._GROUP_BYTES", 1000)
    (tmp_path / "texts").mkdir()
    for number, name in enumerate("abc"):
        (tmp_path / "texts" / f"{name}.jsonl").write_bytes(lines(number, 15))
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(0, 15) + b"{")
    with pytest.raises(PrepareError, match=r"a\.jsonl, line 16: not JSON"):
        run(tmp_path / "out", tmp_path, None)
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(0, 3))
    run(tmp_path / "out", tmp_path, None)
    run(tmp_path / "fresh", tmp_path, None)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_a_kill_while_a_bad_file_is_forgotten_leaves_none_of_its_shards_for_the_corrected_one(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs_module, "SMALLEST", 500)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(1, 60) + b"{")
    unlink = Path.unlink

    def killed(path, missing_ok=False):
        if path.parent.name == "shards" and path.suffix == ".arrow":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", tmp_path, None)
    assert list((tmp_path / "out" / ".prepare" / "shards").glob("*.arrow"))
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(2, 60) + b" ")
    with pytest.raises(PrepareError, match=r"a\.jsonl has changed since"):
        run(tmp_path / "out", tmp_path, None)


def test_finished_stores_that_were_removed_are_made_again(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("dynmix.mixture.prepare.run._GROUP_BYTES", 1)
    event = 60
    while not (tmp_path / "out" / "code.idx").exists():
        assert killed_at(event := event + 20, tmp_path / "out", corpus[0], None)
    for file in (tmp_path / "out").glob("[!.]*"):  # as `rm out/*` does, which leaves what is hidden
        file.unlink()
    run(tmp_path / "out", corpus[0], None)
    assert content(tmp_path / "out") == corpus[1][None]


def test_an_input_that_changed_is_refused(tmp_path):
    source, output = tmp_path / "texts" / "a.jsonl", tmp_path / "out"
    source.parent.mkdir()
    source.write_bytes(lines(1, 10))
    assert killed_at(12, output, tmp_path, None)
    source.write_bytes(lines(1, 11))
    with pytest.raises(PrepareError, match=r"a\.jsonl has changed since"):
        run(output, tmp_path, None)
    run(output, tmp_path, None, overwrite=True)
    assert len(TokenStore.open(output / "a")) + len(TokenStore.open(output / "a.valid")) == 9


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("replaced", r"a\.jsonl: it was changed while it was read"),
        ("shortened", r"a\.jsonl, after line .* fewer than before: the file is being changed"),
        ("appended", None),
    ],
)
def test_an_input_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch, caplog, how, message):
    file, before = tmp_path / "a.jsonl", lines(1, 60)
    changed = {"replaced": before.replace(b"s1", b"s2"), "shortened": lines(1, 20), "appended": lines(1, 61)}[how]
    file.write_bytes(before)
    monkeypatch.setattr(inputs_module, "SMALLEST", 500)
    cut = inputs_module._cut_plain

    def changed_meanwhile(*args):
        first, *others = cut(*args)
        yield first
        file.write_bytes(changed)
        os.utime(file, (1, 1))  # time stamps are coarse
        yield from others

    monkeypatch.setattr(inputs_module, "_cut_plain", changed_meanwhile)
    if message:
        with pytest.raises(PrepareError, match=message):
            prepare(file, tmp_path / "out", TOKENIZER, workers=1, progress=False)
        assert not (tmp_path / "out" / "a.idx").exists()
        monkeypatch.setattr(inputs_module, "_cut_plain", cut)
    prepare(file, tmp_path / "out", TOKENIZER, workers=1, progress=False)
    assert (how == "appended") == ("it grew while it was read" in caplog.text)


def test_a_bad_line_costs_its_own_file_only(corpus, tmp_path, monkeypatch):
    folder, wanted = corpus
    texts = tmp_path / "texts"
    (texts / "web").mkdir(parents=True)
    for name in ("web/a.jsonl", "web/b.jsonl.gz", "code.jsonl"):
        (texts / name).write_bytes((folder / "texts" / name).read_bytes())
    (texts / "web" / "b.jsonl.gz").write_bytes(gzip.compress(lines(2, 60) + b"{\n"))
    with pytest.raises(PrepareError, match=r"b\.jsonl\.gz, line 61: not JSON"):
        run(tmp_path / "out", tmp_path, "source")
    (texts / "web" / "b.jsonl.gz").write_bytes(gzip.compress(lines(2, 60)))
    monkeypatch.setattr(inputs_module.FileLines, "records", None)  # the others are not read again
    run(tmp_path / "out", tmp_path, "source")
    assert {n: d for n, d in content(tmp_path / "out").items() if n != "manifest.json"} == {
        n: d for n, d in wanted["source"].items() if n != "manifest.json"
    }


def test_a_file_system_without_locks_can_be_prepared_in(tmp_path, monkeypatch):
    from dynmix.mixture.prepare import work

    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with work.Work(tmp_path).alone():
        pass


def test_another_process_in_the_folder_is_waited_for_and_then_refused(tmp_path, monkeypatch):
    import fcntl

    from dynmix.mixture.prepare import work

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(1, 10))
    monkeypatch.setattr(work, "_PATIENCE", 0.1)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(PrepareError, match="another process prepares in it"):
        run(tmp_path, tmp_path, None)
    os.close(handle)
    run(tmp_path, tmp_path, None)
