"""Weights from an influence that was saved: by `dynmix influence`, or in a run's journal.

Knows JSON, names and mixers; no model and no torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from dynmix.journal import Journal
from dynmix.mixers.base import Proposal
from dynmix.mixers.registry import find_mixer, make_mixer
from dynmix.mixers.simplex import mixture
from dynmix.observation import Influence, Weights
from dynmix.recipe.names import check_arguments


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


def prior_weights(given: str | None, domains: Sequence[str], facts: Mapping[str, Any]) -> dict[str, float]:
    """Return domain -> weight of the prior.

    Args:
        given: "natural", "uniform", "domain=weight,...", or a JSON file of weights (or with `weights` in it); None: the
            weights that were saved with the influence, else natural.
        domains: of the influence.
        facts: as `read_influence` returns them.

    Raises:
        ValueError: weights that are not one for each domain or do not sum to 1, natural without known tokens.
    """
    if given is None and facts.get("weights"):
        weights = facts["weights"]
    elif given == "uniform":
        return dict.fromkeys(domains, 1 / len(domains))
    elif given in (None, "natural"):
        tokens = facts.get("tokens")
        if not tokens or not all(tokens.get(name) for name in domains):
            raise ValueError("--prior natural: how many tokens the domains have is not saved; give domain=weight,...")
        total = sum(tokens[name] for name in domains)
        return {name: tokens[name] / total for name in domains}
    elif "=" in str(given):
        weights = numbers("--prior", [given])
    else:
        try:
            weights = json.loads(Path(str(given)).read_text(encoding="utf-8"))
            weights = weights.get("weights", weights)
        except (OSError, ValueError, AttributeError) as problem:
            raise ValueError(
                f"--prior {given}: natural, uniform, domain=weight,... or a JSON file: {problem}"
            ) from None
    return mixture(weights, domains, "--prior")


def propose_from(
    influence: Influence,
    prior: Weights,
    mixer: str,
    options: Mapping[str, Any],
    *,
    upper: Weights | None = None,
    lower: Weights | None = None,
) -> Proposal:
    """Let a mixer decide from an influence.

    Args:
        influence: what was measured.
        prior: domain -> weight.
        mixer: by name.
        options: its arguments.
        upper, lower: domain -> largest and least weight; `lower` is for mixers that take one.

    Raises:
        ValueError: no such mixer or argument, one that does not decide from an influence, bounds that leave no mixture.
    """
    if over := [f"{name}={bound:g}" for name, bound in (upper or {}).items() if bound > 1]:
        raise ValueError(f"--upper {over[0]}: weights are from 0 to 1")
    make = find_mixer(mixer)
    check_arguments(f"mixer {mixer!r}", options, make)
    if lower is not None:
        if "lower" not in signature(make).parameters:
            raise ValueError(f"--lower: {mixer} takes no least weights; tikmix-d does")
        options = {**options, "lower": dict(lower)}
    made = make_mixer({"name": mixer, **options})
    if "influence" not in made.needs or made.needs - {"influence", "guards", "measure"}:
        raise ValueError(f"--mixer {mixer}: it decides from {sorted(made.needs) or 'nothing measured'}, in a run alone")
    return made.propose(influence, prior, upper)


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Values by name from `name=value` words, the values as in YAML. Raises ValueError."""
    if bad := [word for word in words if "=" not in word]:
        raise ValueError(f"{bad[0]!r}: arguments of the mixer are given as key=value")
    found: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(words)))
    return {str(name): value for name, value in found.items()}


def numbers(option: str, given: Sequence[str] | None) -> dict[str, float] | None:
    """Domain -> number from "domain=number,...", once or several times; None for none. Raises ValueError."""
    if not given:
        return None
    text = ",".join(given)
    try:
        return {name.strip(): float(number) for name, number in (part.rsplit("=", 1) for part in text.split(","))}
    except ValueError:
        raise ValueError(f"{option} {text!r}: write domain=number,...") from None


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
