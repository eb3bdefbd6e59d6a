"""`manifest.json` beside the stores: of which text, by which tokenizer and with which options each was made.

{"preparations": [{"tokenizer": {...}, "options": {...}, "inputs": [{"name", "bytes", "domain"}]}],
 "stores": {name: {"preparation": number, "domain", "documents", "tokens", "bytes" (of text), "dtype", "held_out",
                   "hash": {"bin", "idx"}}}}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dynmix.mixture.prepare.pieces import PrepareError
from dynmix.mixture.store import TokenStore, stem_of
from dynmix.whole_file import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "manifest.json"

# Of a slow tokenizer, whose rules are Python: what they make of capitals, accents, spaces, digits, signs and scripts.
_PROBE = "It's THE lowest,  newest naïve Straße; Été ﬁnds ½ of 1234.5!\n\n\tif x == y_2: 東京タワー、Привет, مرحبا 😀 "

Json = dict[str, Any]
AnyTokenizer: TypeAlias = "str | os.PathLike[str] | PreTrainedTokenizerBase"
AnyStore: TypeAlias = "TokenStore | str | os.PathLike[str]"


def load_tokenizer(tokenizer: AnyTokenizer) -> PreTrainedTokenizerBase:
    """A tokenizer, or the one of a folder or hub name. Raises PrepareError."""
    if not isinstance(tokenizer, str | os.PathLike):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise PrepareError(f"tokenizer={str(tokenizer)!r}: not a folder or hub name of a tokenizer: {error}") from error
    return loaded


def tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer.json of a fast tokenizer; None for a slow one.

    Raises PrepareError if it has parts written in Python, which other processes cannot be given.
    """
    if not tokenizer.is_fast:
        return None
    try:
        text: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # the library raises nothing narrower
        raise PrepareError(f"tokenizer: it cannot be written as tokenizer.json: {error}") from error
    return text


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Json:
    """What tells a tokenizer from others, JSON-able.

    `fingerprint` is a hash of what makes ids of plain text in its tokenizer.json: normalizer, pre-tokenizer and model
    (of a slow tokenizer: its class, vocabulary and ids of a text), and of `split_special_tokens`. Tokens that were
    added to it are listed and not hashed, since adding one more, say for padding, leaves the ids of other text as they
    are.
    """
    text = tokenizer_json(tokenizer)
    if text is None:
        try:
            ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        except Exception:  # one of few characters, as of DNA, may have no id for others, and none for unknown ones
            ids = None
        parts: Json = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "ids": ids}
    else:
        facts = json.loads(text)
        parts = {name: _canonical(facts[name]) for name in ("normalizer", "pre_tokenizer", "model")}
    if tokenizer.split_special_tokens:
        parts["split_special_tokens"] = True
    digest = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16)
    return {
        "name": str(tokenizer.name_or_path or ""),  # of one that was made in Python it may be anything
        "fingerprint": digest.hexdigest(),
        "vocabulary": len(tokenizer),
        "eos": tokenizer.eos_token_id,
        "added": dict(sorted(tokenizer.get_added_vocab().items())),
    }


def _canonical(value: Any) -> Any:
    """One form for what versions of the library write in different ways: absent, null, false; merges as strings."""
    if isinstance(value, dict):
        return {
            name: [pair.split(" ") if isinstance(pair, str) else pair for pair in each]
            if name == "merges"
            else _canonical(each)
            for name, each in value.items()
            if each is not None and each is not False
        }
    return [_canonical(each) for each in value] if isinstance(value, list) else value


def read_manifest(folder: str | os.PathLike[str]) -> Json | None:
    """The manifest of a folder of stores, None if it has none. Raises PrepareError for a damaged one."""
    file = Path(folder) / FILE
    try:
        found: Json = json.loads(file.read_text(encoding="utf-8"))
        for made in found["preparations"]:
            _check(made, {"tokenizer": dict, "options": dict})
            _check(made["tokenizer"], {"name": str, "fingerprint": str, "vocabulary": int, "added": dict})
        for facts in found["stores"].values():
            _check(facts, {"preparation": int, "tokens": int, "bytes": int, "dtype": str, "held_out": bool})
            found["preparations"][facts["preparation"]]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise PrepareError(
            f"{file}: damaged ({error!r}); remove it, and prepare the stores anew, or move it away if it is of another"
            " program"
        ) from error
    return found


def _check(facts: Json, kinds: Mapping[str, type]) -> None:
    for key, kind in kinds.items():
        if not isinstance(facts[key], kind):
            raise TypeError(f"{key!r} is {facts[key]!r}")


def add_to_manifest(folder: Path, preparation: Json, stores: Mapping[str, Json]) -> None:
    """Write what was prepared to the folder's manifest, in place of what it said of these stores."""
    known = _without(read_manifest(folder), stores)
    number = len(known["preparations"])
    known["preparations"].append(preparation)
    known["stores"] |= {name: {"preparation": number, **facts} for name, facts in stores.items()}
    known["stores"] = dict(sorted(known["stores"].items()))
    write_json(folder / FILE, known)


def drop_from_manifest(folder: Path, names: Collection[str]) -> None:
    """Take these stores, which are about to be replaced, out of the manifest."""
    known = read_manifest(folder)
    if known is not None and not known["stores"].keys().isdisjoint(names):
        write_json(folder / FILE, _without(known, names))


def _without(known: Json | None, names: Collection[str]) -> Json:
    """A manifest without these stores, and without preparations of which no store is left."""
    if known is None:
        return {"preparations": [], "stores": {}}
    stores = {name: facts for name, facts in known["stores"].items() if name not in names}
    kept = sorted({facts["preparation"] for facts in stores.values()})
    renumbered = {name: facts | {"preparation": kept.index(facts["preparation"])} for name, facts in stores.items()}
    return {"preparations": [known["preparations"][number] for number in kept], "stores": renumbered}


def check_tokenizer(stores: AnyStore | Iterable[AnyStore], tokenizer: AnyTokenizer) -> None:
    """Refuse a tokenizer that token stores were not made with, by the manifest beside them.

    A store without a manifest, or that is not the one which the manifest speaks of, is not checked. A tokenizer that
    has more added tokens than the store's own is not refused. Raises PrepareError, naming store and tokenizers.
    """
    several = [stores] if isinstance(stores, TokenStore | str | os.PathLike) else list(stores)
    manifest_of = cache(read_manifest)
    own: Json | None = None
    for each in several:
        path = each.path if isinstance(each, TokenStore) else stem_of(each)
        manifest = manifest_of(path.parent)
        if manifest is None or not speaks_of(manifest, path):
            continue
        own = own or describe_tokenizer(load_tokenizer(tokenizer))
        made = manifest["preparations"][manifest["stores"][path.name]["preparation"]]["tokenizer"]
        if why := _mismatch(made, own):
            raise PrepareError(
                f"{path}: made with another tokenizer, {made['name']!r}, than {own['name']!r}: {why}; "
                f"give the tokenizer of {path.parent / FILE}, or prepare the text with this one"
            )


def speaks_of(manifest: Json, store: Path) -> bool:
    """Whether the store at this path, without a suffix, is the one that the manifest beside it has facts of."""
    facts, tokens = manifest["stores"].get(store.name), store.with_name(f"{store.name}.bin")
    if facts is None or not tokens.is_file():
        return False
    width = 2 if facts["dtype"] == "uint16" else 4
    return bool(tokens.stat().st_size == facts["tokens"] * width)


def _mismatch(made: Json, own: Json) -> str | None:
    if made["fingerprint"] != own["fingerprint"]:
        sizes = f"{made['vocabulary']:,} and {own['vocabulary']:,} tokens"
        return f"their vocabularies or rules differ ({sizes}, fingerprints {made['fingerprint']}, {own['fingerprint']})"
    for token, number in made["added"].items():
        if own["added"].get(token) != number:
            return f"the added token {token!r} is {number} in the one and {own['added'].get(token)} in the other"
    return None
