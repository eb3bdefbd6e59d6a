"""What the manifest says, and that a tokenizer which did not make a store is refused."""

import hashlib
import json
from functools import partial
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from dynmix.mixture.prepare import PrepareError, check_tokenizer, prepare, read_manifest
from dynmix.mixture.prepare.manifest import _canonical
from dynmix.mixture.store import TokenStore


def tokenizer(words=("a", "b", "ab"), merges=(("a", "b"),), split=True) -> PreTrainedTokenizerFast:
    model = Tokenizer(models.BPE({"<eos>": 0} | {w: i + 1 for i, w in enumerate(words)}, [*merges]))
    if split:
        model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name, texts in (("web", ["ab a", "é", ""]), ("code", ["b"])):
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(tmp_path / "in", tmp_path / "out", tokenizer(), progress=False)
    return tmp_path / "out"


def test_the_manifest_says_how_the_stores_were_made(made):
    manifest = read_manifest(made)
    assert [path.name for path in made.iterdir() if path.name.startswith(".")] == []
    (preparation,) = manifest["preparations"]
    assert preparation["options"] == {
        "text_field": "text", "append_eos": True, "domain_from": None, "domain_default": None, "held_out": None,
    }  # fmt: skip
    files = [made.parent / "in" / f"{name}.jsonl" for name in ("code", "web")]
    assert preparation["inputs"] == [
        {"name": str(file), "bytes": file.stat().st_size, "domain": file.stem} for file in files
    ]
    assert preparation["tokenizer"]["vocabulary"] == 4
    assert preparation["tokenizer"]["eos"] == 0
    assert list(manifest["stores"]) == ["code", "web"]
    web, store = manifest["stores"]["web"], TokenStore.open(made / "web")
    assert (web["documents"], web["tokens"], web["bytes"]) == (2, store.num_tokens, len("ab aé".encode()))
    assert web["hash"] == {
        end: hashlib.blake2b((made / f"web.{end}").read_bytes(), digest_size=16).hexdigest() for end in ("bin", "idx")
    }


@pytest.mark.parametrize(("name", "written"), [(None, ""), (Path("a/b"), "a/b")])
def test_a_tokenizer_that_was_made_in_python_may_be_called_anything(tmp_path, name, written):
    (tmp_path / "code.jsonl").write_text('{"text": "a"}\n')
    own = tokenizer()
    own.name_or_path = name
    prepare(tmp_path / "code.jsonl", tmp_path / "out", own, progress=False)
    assert read_manifest(tmp_path / "out")["preparations"][0]["tokenizer"]["name"] == written


def test_another_preparation_in_the_folder_is_added_and_one_that_replaces_is_not(made):
    (made.parent / "more.jsonl").write_text('{"text": "a"}\n')
    prepare(made.parent / "more.jsonl", made, tokenizer(), append_eos=False, progress=False)
    manifest = read_manifest(made)
    assert [manifest["stores"][name]["preparation"] for name in ("code", "more", "web")] == [0, 1, 0]
    prepare(made.parent / "in", made, tokenizer(), overwrite=True, progress=False)
    manifest = read_manifest(made)
    assert [manifest["stores"][name]["preparation"] for name in ("code", "more", "web")] == [1, 0, 1]
    other = tokenizer(("a", "b", "c"), ())
    with pytest.raises(PrepareError, match=r"the store '\w+' in it was made with another tokenizer"):
        prepare(made.parent / "more.jsonl", made, other, progress=False)


def test_a_tokenizer_that_did_not_make_the_store_is_refused(made, tmp_path):
    every = [made / "web", made / "code.idx"]
    check_tokenizer(every, tokenizer())
    tokenizer().save_pretrained(tmp_path / "saved")
    check_tokenizer(TokenStore.open(made / "web"), tmp_path / "saved")
    for other in (
        tokenizer(("b", "a", "ab")),
        tokenizer(("a", "b", "ab", "c")),
        tokenizer(merges=()),
        tokenizer(split=False),
    ):
        with pytest.raises(PrepareError, match=r"out/web: made with another tokenizer, .*vocabularies or rules differ"):
            check_tokenizer(every, other)
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(PrepareError, match="other.*another|another.*other"):
            check_tokenizer(str(made / "web.bin"), str(tmp_path / "other"))


def test_what_does_not_change_the_ids_of_text_is_not_refused(made):
    same = tokenizer()
    same.backend_tokenizer.enable_truncation(3)
    same.backend_tokenizer.enable_padding(length=9)
    same.add_special_tokens({"pad_token": "<pad>"})
    check_tokenizer(made / "web", same)
    more = tokenizer()
    more.add_tokens([AddedToken("<x>"), AddedToken("<y>")])
    less = tokenizer()
    less.add_tokens([AddedToken("<y>")])
    prepare(made.parent / "in", made, more, overwrite=True, progress=False)
    with pytest.raises(PrepareError, match="the added token '<x>' is 4 in the one and None in the other"):
        check_tokenizer(made / "web", less)


def test_merges_as_strings_and_absent_options_are_the_same_tokenizer():
    """Versions of the library write the same tokenizer in these ways."""
    facts = json.loads(tokenizer().backend_tokenizer.to_str())["model"]

    def described(**changes):
        return _canonical(facts | changes)

    assert facts["merges"] == [["a", "b"]]
    assert described(merges=["a b"]) == described() == described(ignore_merges=None, new_option=False)
    assert described(merges=[]) != described()
    assert described(byte_fallback=True) != described()


def test_stores_that_no_manifest_speaks_of_are_not_checked(made, tmp_path):
    other = tokenizer(("b", "a", "ab"))
    TokenStore.write(tmp_path / "plain" / "x", [[1, 2]])
    check_tokenizer(tmp_path / "plain" / "x", other)
    TokenStore.write(made / "web", [[1, 2]])
    check_tokenizer(made / "web", other)
    (made / "manifest.json").unlink()
    check_tokenizer(made / "code", other)
    (made / "manifest.json").write_text('{"stores": {"code": 1}}')
    again = partial(prepare, made.parent / "in", made, other, overwrite=True, progress=False)
    for call in (partial(check_tokenizer, made / "code", other), again):
        with pytest.raises(PrepareError, match=r"manifest\.json: damaged .*; remove it, .*, or move it away if"):
            call()
    (made / "manifest.json").unlink()
    assert list(again()) == ["code", "web"]


@pytest.mark.parametrize("value", [None, "gone"])
@pytest.mark.parametrize(
    "keys",
    [
        *(("stores", "web", key) for key in ("preparation", "tokens", "bytes", "dtype", "held_out")),
        *(("preparations", 0, "tokenizer", key) for key in ("name", "fingerprint", "vocabulary", "added")),
        ("preparations", 0, "options"),
    ],
)
def test_a_manifest_that_was_edited_by_hand_is_damaged_in_words(made, keys, value):
    manifest = json.loads((made / "manifest.json").read_text())
    part = manifest
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    if value == "gone":
        del part[keys[-1]]
    (made / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PrepareError, match=r"manifest\.json: damaged"):
        read_manifest(made)


def test_slow_tokenizers_and_ones_with_parts_in_python(made, tmp_path):
    prepare(made.parent / "in", tmp_path / "slow", ByT5Tokenizer(), progress=False)
    check_tokenizer(tmp_path / "slow" / "web", ByT5Tokenizer())
    with pytest.raises(PrepareError, match="another tokenizer"):
        check_tokenizer(tmp_path / "slow" / "web", tokenizer())
    with pytest.raises(PrepareError, match="another tokenizer"):
        check_tokenizer(made / "web", ByT5Tokenizer())
    odd = tokenizer()
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(type("Odd", (), {})())
    with pytest.raises(PrepareError, match=r"it cannot be written as tokenizer\.json"):
        prepare(made.parent / "in", tmp_path / "odd", odd, progress=False)


def test_rules_of_slow_tokenizers_are_told_apart(made, tmp_path):
    class Lowered(ByT5Tokenizer):
        def _tokenize(self, text):
            return super()._tokenize(text.lower())

    kept, lowered = ByT5Tokenizer(), Lowered()
    Lowered.__name__ = "ByT5Tokenizer"  # as one class with an option
    prepare(made.parent / "in", tmp_path / "slow", kept, progress=False)
    with pytest.raises(PrepareError, match="their vocabularies or rules differ"):
        check_tokenizer(tmp_path / "slow" / "web", lowered)


def test_a_slow_tokenizer_without_ids_for_other_characters_works(tmp_path):
    class Bases(ByT5Tokenizer):
        def _convert_token_to_id(self, token):
            return {"A": 3, "C": 4, "G": 5, "T": 6}[token]

    (tmp_path / "dna.txt").write_text("GATTACA\n")
    prepare(tmp_path / "dna.txt", tmp_path / "out", Bases(), progress=False)
    check_tokenizer(next((tmp_path / "out").glob("*.bin")), Bases())


def test_special_tokens_in_a_text_are_text_where_the_tokenizer_splits_them(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a<eos>b"}')
    known = tokenizer((*"ab<eos>",), ())
    split = tokenizer((*"ab<eos>",), ())
    split.split_special_tokens = True
    for each in (known, split):
        store = prepare(tmp_path / "a.jsonl", tmp_path, each, overwrite=True, append_eos=False, progress=False)["a"]
        assert store[0].tolist() == each("a<eos>b", add_special_tokens=False)["input_ids"]
    assert len(store[0]) == 7
    with pytest.raises(PrepareError, match="another tokenizer"):
        check_tokenizer(store, known)
