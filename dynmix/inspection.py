"""What a path is and what is in it: a store, a folder of stores, a run, a checkpoint, a recipe, a saved influence.

Knows files and their formats; loads no model. Every answer is a title, facts by name, and tables, all JSON-able.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dynmix.journal import Journal
from dynmix.mixture.distinct import distinct_share
from dynmix.mixture.packed import unpack
from dynmix.mixture.prepare.manifest import read_manifest, speaks_of
from dynmix.mixture.quota import TOTAL
from dynmix.mixture.store import TokenStore


@dataclass(frozen=True)
class Inspected:
    """What was found: `kind` of thing, facts by name, and tables (title -> rows of equal keys)."""

    kind: str
    path: str
    facts: dict[str, Any]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def inspect_path(path: Path, *, distinct: bool = False) -> Inspected:
    """Say what is at a path, with `distinct` also how much of a store's text is there once, which reads all of it.

    Raises ValueError where there is nothing, or nothing of ours, or it is damaged.
    """
    kinds: list[tuple[Callable[[Path], bool], Callable[[Path], Inspected]]] = [
        (lambda p: p.suffix in (".yaml", ".yml"), _recipe),
        (lambda p: _is_journal(p) or (p / "journal.jsonl").is_file(), _run),
        (lambda p: (p / "trainer_state.json").exists() or p.name.startswith("checkpoint-"), _checkpoint),
        (lambda p: (p / "dynmix" / "journal.jsonl").is_file() or (p / "run.json").is_file(), _run),
        (lambda p: p.suffix == ".json" or (p / "influence.json").is_file(), _influence),
        (lambda p: p.is_dir() and any(p.glob("*.idx")), partial(_stores, distinct=distinct)),
        (lambda p: (p.parent / f"{_stem(p).name}.idx").is_file(), partial(_store, distinct=distinct)),
    ]
    for fits, read in kinds:
        if fits(path):
            try:
                return read(path)
            except (LookupError, TypeError, AttributeError, json.JSONDecodeError) as problem:
                raise ValueError(f"{path} is damaged: {type(problem).__name__}: {problem}") from problem
    what = "there is nothing of dynmix's in it" if path.exists() else "no such file or folder"
    raise ValueError(
        f"{path}: {what}; a token store, a folder of stores, a run folder or journal.jsonl, a Trainer's checkpoint, a "
        "recipe (.yaml) or influence.json can be inspected"
    )


def _is_journal(path: Path) -> bool:
    """Whether a file is named or begins like a journal; other .jsonl files are texts or tasks."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    first = None
    with open(path, "rb") as file, suppress(ValueError):
        first = json.loads(file.readline(1 << 24))
    return path.name == "journal.jsonl" or (isinstance(first, dict) and {"kind", "stage"} <= first.keys())


def _stem(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".idx", ".bin") else path


def _store(path: Path, distinct: bool) -> Inspected:
    path = _stem(path)
    store = TokenStore.open(path)
    sizes = np.diff(store.starts(np.arange(len(store) + 1)))
    facts: dict[str, Any] = {
        "documents": len(store),
        "tokens": store.num_tokens,
        "dtype": str(store.dtype),
        "document_tokens": {"least": int(sizes.min()), "median": float(np.median(sizes)), "most": int(sizes.max())},
        "first_tokens": store.tokens[:16].tolist(),
        "fingerprint": store.fingerprint,
    } | _distinct(store, distinct)
    manifest = read_manifest(path.parent)
    if manifest is not None and speaks_of(manifest, path):
        own = manifest["stores"][path.name]
        made = manifest["preparations"][own["preparation"]]
        facts |= {"tokenizer": made["tokenizer"]["name"], "bytes_of_text": own["bytes"], "options": made["options"]}
    return Inspected("token store", str(path), facts)


def _distinct(store: TokenStore, asked: bool) -> dict[str, Any]:
    return {"distinct_share": round(distinct_share(store), 3)} if asked else {}


def _stores(path: Path, distinct: bool) -> Inspected:
    rows: list[dict[str, Any]] = []
    for file in sorted(path.glob("*.idx")):
        store = TokenStore.open(file.with_suffix(""))
        row = {"store": file.stem, "documents": len(store), "tokens": store.num_tokens, "dtype": str(store.dtype)}
        rows.append(row | _distinct(store, distinct))
    manifest = read_manifest(path)
    total: dict[str, Any] = {"stores": len(rows), "tokens": sum(row["tokens"] for row in rows)}
    total["unfinished"] = (path / ".prepare").exists()  # also of a first preparation, which has no manifest yet
    if manifest is not None:
        total["tokenizers"] = sorted({each["tokenizer"]["name"] for each in manifest["preparations"]})
    return Inspected("folder of token stores", str(path), total, {"stores": rows})


def _run(path: Path) -> Inspected:
    places = [path, path / "journal.jsonl", path / "dynmix" / "journal.jsonl"]
    rows = Journal(next(filter(Path.is_file, places), places[-1])).rows()
    facts: dict[str, Any] = {"stages": sum(row["kind"] == "stage" for row in rows)}
    if rows:
        last = rows[-1]
        facts |= {
            "ended": last["kind"] == "final",
            "step": last["step"],
            "samples": last["start"],
            "mixer": last["mixer"],
            "tokens": sum(last["tokens"].values()),
        }
    if (file := path / "run.json").is_file():
        about = json.loads(file.read_text(encoding="utf-8"))
        facts["starts"] = len(about["starts"])
        if about["starts"]:  # none while a proxy's small runs are made
            facts |= {"fingerprints": about["fingerprints"], "versions": about["starts"][-1]["versions"]}
    stages = [
        {
            "stage": row["stage"] if row["kind"] == "stage" else "end",
            "step": row["step"],
            "samples": row["start"],
            "weights": row["weights"],
            "task_loss": row["task_loss"],
            "words": row["error"] or row["message"],
        }
        for row in rows
    ]
    taken = [] if not rows else [
        {"domain": name, "tokens": rows[-1]["tokens"][name], "epochs": rows[-1]["epochs"][name]}
        for name in rows[-1]["domains"]
    ]  # fmt: skip
    return Inspected("run", str(path), facts, {"stages": stages, "domains": taken})


def _checkpoint(path: Path) -> Inspected:
    from dynmix.mixture.stream import UNKNOWN
    from dynmix.trainer_checkpoint import STATE, broken

    if (why := broken(path)) is not None:
        raise ValueError(f"{path}: a half-written checkpoint ({why}); a run goes on from the one before it")
    state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    facts: dict[str, Any] = {"step": state["global_step"], "max_steps": state.get("max_steps")}
    own = state.get("stateful_callbacks", {}).get(STATE)
    if own is None:
        return Inspected("checkpoint without a mixture", str(path), facts)
    schedule = own["dataset"]["schedule"]
    names, fingerprints = schedule["names"], own["dataset"].get("fingerprint", {})  # a stream has none
    saved = unpack(schedule["stages"], len(names))
    facts |= {
        "samples": state["global_step"] * own["batch_size"],
        "batch_size": own["batch_size"],
        "stage_steps": own["stage_steps"],
        "decided_until": saved.end,
        "seed": schedule["seed"],
        "sequence_length": own["dataset"]["sequence_length"],
        "mixer_state": own["mixer"],
    }
    stages = [
        {
            "stage": saved.first + k,
            "samples": start,
            "weights": dict(zip(names, (np.diff(cdf, prepend=0) / TOTAL).tolist(), strict=False)),
        }
        for k, (start, cdf) in enumerate(zip(saved.starts, saved.cdfs, strict=True))
    ]
    sizes = [
        {"domain": name, "sequences": None if size == UNKNOWN else size, "fingerprint": fingerprints.get(name, "")}
        for name, size in zip(names, schedule["sizes"], strict=True)
    ]
    return Inspected("checkpoint", str(path), facts, {"stages": stages, "domains": sizes})


def _recipe(path: Path) -> Inspected:
    from dynmix.recipe.read import read_recipe, to_plain

    return Inspected("recipe", str(path), to_plain(read_recipe(path)))


def _influence(path: Path) -> Inspected:
    from dynmix.saved_influence import read_influence

    influence, facts = read_influence(path)
    about: dict[str, Any] = {key: facts[key] for key in ("checkpoint", "curvature", "layers", "tokens") if key in facts}
    rows = [
        {"domain": domain, **{task: float(influence.scores[i, j]) for i, task in enumerate(influence.tasks)}}
        for j, domain in enumerate(influence.domains)
    ]
    return Inspected("influence", str(path), {**about, "guards": list(influence.guards)}, {"scores": rows})


def in_yaml(facts: dict[str, Any]) -> str:
    """Facts as people read them."""
    text: str = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    return text.rstrip()


def cell(value: Any) -> str:
    """A value of a table in a few characters."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(each)}" for name, each in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(cell, value))
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
