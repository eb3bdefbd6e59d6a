"""An influence that was saved: by `dynmix influence`, or in a run's journal. Knows JSON and names; no torch."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dynmix.journal import Journal
from dynmix.observation import Influence


def read_influence(
    source: Path, stage: int | None = None, guards: Sequence[str] | None = None
) -> tuple[Influence, dict[str, Any]]:
    """Return an influence, and what is saved beside it: `tokens` or `weights` of its domains.

    Args:
        source: influence.json, or a journal, a folder with one, or a run folder.
        stage: of a journal; None: the last that was measured.
        guards: rows that are guards, in place of those that were saved.

    Raises:
        ValueError: there is no influence, or a name that is no row of it.
    """
    for inside in ("influence.json", "journal.jsonl", "dynmix/journal.jsonl"):
        if source.is_dir() and (source / inside).exists():
            source = source / inside
            break
    if source.suffix == ".jsonl":
        influence, facts = _of_journal(source, stage)
    else:
        try:
            facts = json.loads(source.read_text(encoding="utf-8"))
            influence = Influence.from_dict(facts)
        except FileNotFoundError:
            raise ValueError(f"{source}: no such file; `dynmix influence` writes one, or give a run folder") from None
        except (OSError, ValueError, TypeError) as problem:
            raise ValueError(f"{source}: no saved influence: {problem}") from None
    if guards is not None:
        influence = replace(influence, guards=tuple(guards))
    return influence, facts


def _of_journal(source: Path, stage: int | None) -> tuple[Influence, dict[str, Any]]:
    rows = Journal(source).rows()
    if not rows:
        raise ValueError(f"{source}: no journal there")
    measured = {row["stage"]: row for row in rows if row["influence"] is not None}
    if not measured:
        raise ValueError(f"{source}: no stage has a measured influence")
    if stage is not None and stage not in measured:
        raise ValueError(f"{source}: no influence of stage {stage}; measured are {', '.join(map(str, measured))}")
    row = measured[max(measured) if stage is None else stage]
    scores, errors = row["influence"], row["standard_error"]
    if row["decided_influence"] is not None:
        scores, errors = row["decided_influence"], row["decided_standard_error"]
    scored: Any = row["scored_tokens"]
    return Influence(
        scores=np.array(scores, dtype=np.float64),
        tasks=row["tasks"],
        domains=row["domains"],
        # What was not finite is written as null: an error that is not known keeps the domain's weight.
        standard_error=None if errors is None else np.nan_to_num(np.array(errors, dtype=np.float64), nan=np.inf),
        guards=row["guards"],
        scored_tokens=None if scored is None else [scored[name] for name in row["domains"]],
    ), {"weights": row["weights_before"]}
