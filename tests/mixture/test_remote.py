import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from dynmix.mixture.documents import JoinedDocuments
from dynmix.mixture.files import open_path
from dynmix.mixture.prepare import PrepareError, prepare
from dynmix.mixture.remote import cache_folder
from dynmix.mixture.sources import open_domains
from dynmix.mixture.store import StoreError, TokenStore
from tests.small import word_tokenizer


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[MemoryFileSystem]:
    """A bucket with stores code/a and code/deep/b, and a flat file."""
    system: MemoryFileSystem = fsspec.filesystem("memory")
    for name, documents in (("a", [[1, 2], [3]]), ("deep/b", [[4], [5, 6]])):
        TokenStore.write(tmp_path / "made" / name, documents)
        for end in (".bin", ".idx"):
            system.pipe(f"/bucket/code/{name}{end}", (tmp_path / "made" / f"{name}{end}").read_bytes())
    system.pipe("/bucket/flat/x.npy", np.arange(100, 300, dtype=np.uint16).tobytes())
    system.pipe("/bucket/code/README.md", b"no tokens")
    yield system
    system.rm("/bucket", recursive=True)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were copied."""
    names: list[str] = []
    get_file = MemoryFileSystem.get_file

    def counted(self: MemoryFileSystem, name: str, *args: Any, **options: Any) -> None:
        names.append(name)
        get_file(self, name, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    return names


def tokens(url: str, cache: Path) -> list[int]:
    documents = open_path(url, cache_dir=cache)
    return documents.read(np.array([0]), documents.num_tokens)[0].tolist()


@pytest.mark.usefixtures("remote")
def test_files_folders_and_globs_are_copied_once(tmp_path: Path, fetched: list[str]) -> None:
    cache = tmp_path / "cache"
    for url in ("memory://bucket/code/a", "memory://bucket/code/a.idx", "memory://bucket/code/a.bin"):
        assert tokens(url, cache) == [1, 2, 3]
    assert fetched == ["/bucket/code/a.bin", "/bucket/code/a.idx"]
    for url in ("memory://bucket/code", "memory://bucket/code/", "memory://bucket/code/**/*.idx", "memory://bucket/c*"):
        assert tokens(url, cache) == [1, 2, 3, 4, 5, 6]
    assert len(fetched) == 4
    assert tokens("memory://bucket/flat/x.npy", cache) == list(range(100, 300))
    assert tokens("memory://bucket/flat/*.npy", cache) == list(range(100, 300))
    assert tokens("memory://bucket", cache) == [1, 2, 3, 4, 5, 6, *range(100, 300)]
    assert len(fetched) == 5
    documents = open_path("memory://bucket/code", cache_dir=cache)
    assert isinstance(documents, JoinedDocuments)
    assert [each.tolist() for each in pickle.loads(pickle.dumps(documents))] == [[1, 2], [3], [4], [5, 6]]
    assert not list(cache.rglob("*.tmp*"))


def test_what_changed_is_copied_again(remote: MemoryFileSystem, tmp_path: Path, fetched: list[str]) -> None:
    cache, url = tmp_path / "cache", "memory://bucket/flat/x.npy"
    before = open_path(url, cache_dir=cache)
    remote.pipe("/bucket/flat/x.npy", np.arange(1000, 1200, dtype=np.uint16).tobytes())
    assert tokens(url, cache) == list(range(1000, 1200))
    assert before.read(np.array([0]), 2).tolist() == [[100, 101]]  # who has it open keeps what was there
    assert len(fetched) == 2
    note = next(cache.rglob(".x.npy.json"))
    for damaged in ("", "[]", "{}", json.dumps({"remote": {}, "bytes": 400})):
        note.write_text(damaged)
        assert tokens(url, cache) == list(range(1000, 1200))
    assert len(fetched) == 6
    (note.parent / "x.npy").write_bytes(b"12")
    assert tokens(url, cache) == list(range(1000, 1200))


@pytest.mark.usefixtures("remote")
def test_a_download_that_breaks_off_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_file = MemoryFileSystem.get_file

    def cut(error: Exception | None) -> Any:
        def broken(self: MemoryFileSystem, name: str, path: str, **options: Any) -> None:
            get_file(self, name, path, **options)
            if name.endswith(".idx"):
                os.truncate(path, 20)
                if error is not None:
                    raise error

        return broken

    for error, message in ((ConnectionResetError("reset by peer"), "ConnectionResetError: reset"), (None, "20 bytes")):
        monkeypatch.setattr(MemoryFileSystem, "get_file", cut(error))
        with pytest.raises(StoreError, match=rf"the download of /bucket/code/a\.idx broke off: .*{message}.*again"):
            open_path("memory://bucket/code", cache_dir=tmp_path)
    assert {file.name for file in (tmp_path / "remote").rglob("*") if file.is_file()} == {"a.bin", ".a.bin.json"}
    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    assert tokens("memory://bucket/code", tmp_path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/nowhere", "memory://bucket/nowhere: no such file or folder"),
        ("memory://bucket/none*", "memory://bucket/none.*: no such file or folder"),
        ("memory://bucket/code/README.md", "no token files"),
        ("memory://bucket/lost", r"memory://bucket/lost: /bucket/lost/y\.bin is missing, a store is both files"),
        ("strange://bucket/code", "strange://bucket/code cannot be reached: Protocol not known"),
        ("adl://bucket/code", "adl://bucket/code cannot be reached: "),
    ],
)
def test_what_cannot_be_had_is_refused(remote: MemoryFileSystem, tmp_path: Path, url: str, message: str) -> None:
    remote.pipe("/bucket/lost/y.idx", remote.cat("/bucket/code/a.idx"))
    with pytest.raises(StoreError, match=message):
        open_path(url, cache_dir=tmp_path)


@pytest.mark.usefixtures("remote")
def test_errors_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise PermissionError("403")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "isdir", refused)
        with pytest.raises(StoreError, match="memory://bucket/code cannot be listed: PermissionError: 403"):
            open_path("memory://bucket/code", cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=3))
        with pytest.raises(
            StoreError, match="bytes are to be copied, and .* has 3 left: give a cache_dir that has room"
        ):
            open_path("memory://bucket/code", cache_dir=tmp_path)


def test_the_tokenizer_of_a_remote_store_is_known_by_its_manifest(served: tuple[Path, str], tmp_path: Path) -> None:
    first, second = (word_tokenizer(["<unk>", *words], "<unk>") for words in ("ab", "ba"))
    (tmp_path / "web.txt").write_text("a b a")
    for time, made, other in ((1, first, second), (2, second, first)):
        prepare(tmp_path / "web.txt", served[0] / "made", made, progress=False, overwrite=True)
        for file in (served[0] / "made").iterdir():
            os.utime(file, (time, time))  # http tells it in whole seconds
        for name in ("made/web", "made/web.idx", "made", "made/*.bin"):
            domains = {"web": f"{served[1]}/{name}"}
            assert len(open_domains(domains, 1, tokenizer=made, cache_dir=tmp_path / "cache")["web"]) == 3
            with pytest.raises(PrepareError, match="web: made with another tokenizer"):
                open_domains(domains, 1, tokenizer=other, cache_dir=tmp_path / "cache")


def test_the_cache_is_where_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNMIX_CACHE", str(tmp_path / "a"))
    assert cache_folder(None) == tmp_path / "a"
    assert cache_folder(tmp_path / "b") == tmp_path / "b"
    monkeypatch.delenv("DYNMIX_CACHE")
    assert cache_folder(None) == Path.home() / ".cache" / "dynmix"


class Server(SimpleHTTPRequestHandler):
    """Of a folder; what is asked of `cut` breaks off in the middle."""

    cut: str | None = None

    def log_message(self, *args: Any) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        if self.cut is not None and self.path.endswith(self.cut):
            outputfile.write(source.read(3))
            self.close_connection = True
        else:
            super().copyfile(source, outputfile)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder with the store code/a and the flat file flat/x.npy, and its address."""
    pytest.importorskip("aiohttp", reason="fsspec reads http by it")
    root = tmp_path / "root"
    TokenStore.write(root / "code" / "a", [[1, 2], [3]])
    (root / "flat").mkdir()
    np.save(root / "flat" / "x.npy", np.arange(100, 300, dtype=np.uint16))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(root))) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield root, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_http(served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its listings tell names alone, and its times have a name of their own."""
    (root, url), cache, flat = served, tmp_path / "cache", served[0] / "flat" / "x.npy"
    with monkeypatch.context() as patch:
        patch.setattr(Server, "cut", "/a.idx")
        with pytest.raises(StoreError, match=r"the download of .*/code/a\.idx broke off: .*start again"):
            open_path(f"{url}/code/a", cache_dir=cache)
    for path in ("code/a", "code/a.bin", "code", "code/*.idx"):
        assert tokens(f"{url}/{path}", cache) == [1, 2, 3]
    looked: list[str] = []  # reads what is there as a page, however large
    with monkeypatch.context() as patch:
        patch.setattr(fsspec.filesystem("http"), "isdir", lambda path: not looked.append(path))  # type: ignore[func-returns-value]
        for path in ("code/a.bin", "code/a.idx", "code"):
            assert tokens(f"{url}/{path}", cache) == [1, 2, 3]
    assert looked == [f"{url}/code"]
    for path, first in (("flat/x.npy", 100), ("flat/x.npy", 1000), ("flat", 2000), ("flat/*.npy", 3000)):
        np.save(flat, np.arange(first, first + 200, dtype=np.uint16))  # as many bytes as before
        os.utime(flat, (0, first * 1e6))
        assert tokens(f"{url}/{path}", cache) == list(range(first, first + 200))
    (root / "code" / "a.idx").unlink()
    for path in ("code/a", "code/a.idx"):
        with pytest.raises(StoreError, match=r"/code/a\.idx is missing, a store is both files|no such file"):
            open_path(f"{url}/{path}", cache_dir=cache)
    for path in ("nowhere", "code/none*"):
        with pytest.raises(StoreError, match="no such file or folder"):
            open_path(f"{url}/{path}", cache_dir=cache)


def test_a_flat_file_does_not_take_the_index_of_a_store_that_was_there(
    remote: MemoryFileSystem, tmp_path: Path
) -> None:
    assert tokens("memory://bucket/code/a.bin", tmp_path) == [1, 2, 3]
    remote.rm("/bucket/code/a.idx")
    with pytest.raises(StoreError, match=r"a\.idx is missing, a store is both files"):
        open_path("memory://bucket/code/a", cache_dir=tmp_path)
    remote.pipe("/bucket/code/a.bin", np.arange(100, 300, dtype=np.uint16).tobytes())
    assert tokens("memory://bucket/code/a.bin", tmp_path) == list(range(100, 300))


def zipped(path: Path, token: int) -> str:
    """Address of the store `t` in an archive: one document of 64 times this token."""
    TokenStore.write(path.with_suffix("") / "t", [np.full(64, token)])
    with zipfile.ZipFile(path, "w") as archive:
        for end in (".bin", ".idx"):
            archive.write(path.with_suffix("") / f"t{end}", f"t{end}")
    return f"zip://t::{path}"


def test_archives_with_files_of_one_name_have_a_copy_each_and_are_seen_to_change(tmp_path: Path) -> None:
    cache, a, b = tmp_path / "cache", zipped(tmp_path / "a.zip", 1), zipped(tmp_path / "b.zip", 2)
    for _ in range(2):
        assert [tokens(url, cache)[0] for url in (a, b)] == [1, 2]
    zipped(tmp_path / "a.zip", 7)  # as many bytes as before
    assert [tokens(url, cache)[0] for url in (a, b)] == [7, 2]


class Hosted(AbstractFileSystem):
    """A file at a host that is in no path, as of ftp, with a version under the name `tells`."""

    protocol = "hosted"
    cachable = False
    version = 0
    copies = 0

    def __init__(self, host: str = "here", tells: str = "modify", **options: Any) -> None:
        super().__init__(**options)
        self.host, self.tells = host, tells

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        if path != "x.npy":
            raise FileNotFoundError(path)
        return {"name": path, "size": 40, "type": "file", self.tells: self.version}

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        Path(lpath).write_bytes(np.full(20, 100 * len(self.host) + self.version, np.uint16).tobytes())
        Hosted.copies += 1


@pytest.mark.parametrize("tells", ["modify", "sha", "CRC"])
def test_storage_options_say_where_a_file_is_but_for_credentials(
    tells: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("hosted", Hosted, clobber=True)
    monkeypatch.setattr(Hosted, "copies", 0)

    def first(**options: Any) -> int:
        found = open_path("hosted://x.npy", cache_dir=tmp_path, storage_options={"tells": tells, **options})
        return int(found.read(np.array([0]), 1)[0, 0])

    assert [first(), first(host="elsewhere"), first(), first(token="a"), first(token="b")] == [400, 900, 400, 400, 400]
    assert Hosted.copies == 2
    monkeypatch.setattr(Hosted, "version", 1)
    assert [first(), first(host="elsewhere")] == [401, 901]
