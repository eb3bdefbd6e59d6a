"""`prepare`: arguments in, stores and manifest out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dynmix.mixture.prepare.inputs import SMALLEST, Input, Inputs, find_domains, piece_size
from dynmix.mixture.prepare.manifest import (
    Json,
    add_to_manifest,
    describe_tokenizer,
    load_tokenizer,
    read_manifest,
    tokenizer_json,
)
from dynmix.mixture.prepare.names import check_names, store_name
from dynmix.mixture.prepare.pieces import Fields, PrepareError
from dynmix.mixture.prepare.pipeline import Group, Pipeline
from dynmix.mixture.prepare.progress import Bar
from dynmix.mixture.prepare.tokenise import Job
from dynmix.mixture.prepare.work import Plan, Work
from dynmix.mixture.prepare.workers import Workers
from dynmix.mixture.store import UINT16_LIMIT, TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_GROUP_BYTES = 1 << 22  # of inputs whose stores are put together at once


def prepare(
    inputs: Inputs,
    output: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase,
    *,
    text_field: str = "text",
    append_eos: bool = True,
    domain_from: str | None = None,
    domain_default: str | None = None,
    held_out: float | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Mapping[str, TokenStore]:
    """Tokenise text into one store a domain, `output/<domain>.bin` and `.idx`; returns them by domain.

    A file is a domain named as the file without its suffix. In a folder each file is a domain and each sub-folder is
    one domain of all its files in sorted order; links are followed, each folder is read once, and names that begin with
    `.` or `_` are passed over. A folder that `Dataset.save_to_disk` wrote is a domain. In a `.txt` a blank line ends a
    document. A mapping names domains itself: name -> file, folder, several of them, or an HF `Dataset`.

    Tokens are uint16 or int32 by the tokenizer's largest id. No special token is added but its EOS after each document
    (`append_eos`); documents of the empty string are skipped and counted in the log. `output/manifest.json` says how
    the stores were made. A bar on stderr (`progress`) shows the bytes read, the tokens so far, their rate and the time
    left.

    The stores are the same bytes for any number of workers, and whether or not the work was interrupted: what is
    finished is kept in `output/.prepare`, and the same call goes on there. Memory is a few pieces of up to 8 MiB and
    a batch of documents per worker, whatever the size of the input (and its longest document; 4 bytes per document
    while a store is put together). Besides the stores, the disk holds the shards of the domains that are not finished.

    Args:
        inputs: paths, a mapping as above, or (with `domain_from`) an HF `Dataset`.
        output: folder of the stores.
        tokenizer: a transformers tokenizer, or the folder or name of one.
        text_field: field of a record that holds its text.
        append_eos: end each document with EOS.
        domain_from: field whose value (a string or an integer; `meta.source` reads `source` in `meta`) is a document's
            domain, instead of its file. Characters that no file name should have become `_`, and of names that would
            begin with `.` or `_` a hash is the end instead.
        domain_default: domain of the documents without that field; None: they are an error.
        held_out: share of the documents, above 0 and below 1, that goes to `<domain>.valid` instead: by a hash of the
            text, so that equal documents are always on the same side. Those stores are not among the returned ones.
        workers: processes that tokenise; 1: this one; None: as many as there are cores, where the input is worth it.
        overwrite: replace stores that are there, and discard unfinished work of other inputs or options.
        progress: show a bar.

    Raises:
        PrepareError: no input, an unknown suffix, two inputs or values with one domain name, an output in an input
            folder, an existing store or unfinished work of other arguments without `overwrite`, a record that is not an
            object with a string in `text_field`, a damaged or truncated file, or a domain without documents.
        ChildProcessError: a worker was killed.
    """
    _check(held_out, workers, text_field, domain_from, domain_default)
    folder = Path(output)
    domains = find_domains(inputs, folder, domain_from is not None)
    tok = load_tokenizer(tokenizer)
    job = _job(tok, append_eos, Fields(text_field, domain_from), domain_default, held_out)
    known = [] if domain_from is not None else list(domains)
    check_names(known, held_out is not None)
    groups = _groups(domains, domain_from is not None)
    given = [(group.domains.get(number), each) for group in groups for number, each in group.inputs.items()]
    options = {
        "text_field": text_field,
        "append_eos": append_eos,
        "domain_from": domain_from,
        "domain_default": domain_default,
        "held_out": held_out,
    }
    described = describe_tokenizer(tok)
    plan: Plan = {
        "options": {"tokenizer": {key: described[key] for key in ("fingerprint", "added", "eos")}, **options},
        "inputs": {each.name: each.stamp for _, each in given},
        "order": [(domain, each.name) for domain, each in given],
    }
    names = [store_name(name, side) for name in known for side in ((False, True) if held_out else (False,))]
    work = Work(folder)
    with work.alone() as lock:
        _check_others(folder, described, overwrite)
        size = sum(each.size for _, each in given)
        if work.begin(plan, names, piece_size(size), overwrite):
            _log.info("%s: going on with what is finished", work.folder)
        with Workers(_count(workers, size), job, lock) as pool, Bar(size, progress) as bar:
            facts = Pipeline(groups, work, pool, bar, job).run()
        listed = [
            {"name": each.name, "bytes": each.size} | ({} if domain is None else {"domain": domain})
            for domain, each in given
        ]
        add_to_manifest(folder, {"tokenizer": described, "options": options, "inputs": listed}, facts)
        _warn_of_older(folder, facts)
        work.discard()
    return Stores(folder, [name for name in facts if not facts[name]["held_out"]])


class Stores(Mapping[str, TokenStore]):
    """Stores of a folder by name, each opened when it is asked for: thousands would take all file handles."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._paths = {name: folder / name for name in names}

    def __getitem__(self, name: str) -> TokenStore:
        return TokenStore.open(self._paths[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __repr__(self) -> str:
        return f"Stores({list(self._paths)})"


def _check(
    held_out: float | None, workers: int | None, text_field: str, domain_from: str | None, domain_default: str | None
) -> None:
    if held_out is not None and not 0 < held_out < 1:
        raise PrepareError(f"held_out={held_out} (--held-out): a share of the documents, above 0 and below 1")
    if workers is not None and workers < 1:
        raise PrepareError(f"workers={workers} (--workers): at least 1")
    if domain_default is not None and (domain_from is None or not domain_default):
        raise PrepareError(f"domain_default={domain_default!r}: a name, and only with domain_from (--domain-from)")
    if domain_from == text_field:
        raise PrepareError(f"domain_from={domain_from!r} (--domain-from) is the field of the texts: give another one")


def _job(
    tokenizer: PreTrainedTokenizerBase, append_eos: bool, fields: Fields, default: str | None, held_out: float | None
) -> Job:
    eos = tokenizer.eos_token_id if append_eos else None
    if append_eos and eos is None:
        _log.warning("the tokenizer has no EOS token: documents are stored without one")
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) + 1 < UINT16_LIMIT else np.int32)
    end = () if eos is None else (eos,)
    made = tokenizer_json(tokenizer) or tokenizer
    return Job(made, end, dtype.name, fields, default, held_out or 0.0, tokenizer.split_special_tokens)


def _groups(domains: Mapping[str, list[Input]], together: bool) -> list[Group]:
    """One group if `together`, else one per domain; small domains share one, as what is done for each takes time."""
    groups = [Group(0, {}, {})]
    number = filled = 0
    for domain, found in domains.items():
        size = sum(each.size for each in found)
        filled += size
        if not together and groups[-1].inputs and filled > _GROUP_BYTES:
            groups.append(Group(len(groups), {}, {}))
            filled = size
        for each in found:
            groups[-1].inputs[number] = each
            if not together:
                groups[-1].domains[number] = domain
            number += 1
    return groups


def _check_others(folder: Path, described: Json, overwrite: bool) -> None:
    """Refuse to put stores of two tokenizers into one folder."""
    manifest = read_manifest(folder) or {"stores": {}}
    for name, facts in manifest["stores"].items():
        made = manifest["preparations"][facts["preparation"]]["tokenizer"]
        if made["fingerprint"] != described["fingerprint"] and not overwrite:
            raise PrepareError(
                f"{folder}: the store {name!r} in it was made with another tokenizer, {made['name']!r}: prepare into "
                "another folder, or pass overwrite (--overwrite)"
            )


def _warn_of_older(folder: Path, facts: Json) -> None:
    """Say which held-out stores are left from before: what they hold may be in the stores that are made now."""
    manifest = read_manifest(folder) or {"stores": {}}
    older = {name for name, each in manifest["stores"].items() if each["held_out"]} - facts.keys()
    if left := sorted(older & {store_name(name, True) for name in facts}):
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        _log.warning(
            "%s: %s%s are of an earlier preparation: what they hold out may be in the stores that are made now; remove"
            " them, or give held_out (--held-out) again",
            folder,
            ", ".join(left[:5]),
            more,
        )


def _count(workers: int | None, size: int) -> int:
    """Processes; as many as cores, but no more than there are pieces: starting one costs as much as a small piece."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, size // SMALLEST))
