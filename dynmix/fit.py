"""`dynmix fit`: from a table of runs to a law, how far to trust it, and the best mixture by it.

Knows tables, laws and figures; nothing of how the runs were made.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dynmix.laws.auto import AutoLaw, default_laws, spearman
from dynmix.laws.base import Array
from dynmix.laws.criteria import criterion_weights
from dynmix.laws.experts import Experts
from dynmix.laws.mde import laws_with_experts
from dynmix.laws.optimise import SMOOTHING, BestMixture, best_mixture
from dynmix.laws.runs import Runs
from dynmix.whole_file import finite, write_json, write_whole

FEWEST = 3  # different mixtures
EXPERT_TOKENS = 10_000  # of each validation set: a search asks for thousands of mixtures


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs, and the best mixture by it.

    Attributes:
        runs: that it was fitted to.
        law: the fitted `AutoLaw`.
        criterion: share of each target, float64[n_targets].
        best: the best mixture within the bounds.
    """

    runs: Runs
    law: AutoLaw
    criterion: Array
    best: BestMixture

    def errors(self) -> dict[str, dict[str, float]]:
        """Return each target's, and the criterion's, runs, Spearman, MAE and spread; of left-out runs, in L's unit."""
        own = self.criterion > 0
        columns = [
            np.column_stack([values, values[:, own] @ self.criterion[own]]).T
            for values in (self.runs.L, self.law.left_out_)
        ]
        found = {}
        for name, losses, predicted in zip((*self.runs.targets, "criterion"), *columns, strict=True):
            known = np.isfinite(losses) & np.isfinite(predicted)
            y, p = losses[known], predicted[known]
            constant = not len(y) or np.ptp(y) == 0
            found[name] = {
                "runs": float(np.isfinite(losses).sum()),
                "spearman": float("nan") if constant else spearman(y, p),
                "mae": float(np.abs(y - p).mean()) if len(y) else float("nan"),
                "spread": float(np.nanstd(losses)) if np.isfinite(losses).any() else float("nan"),
            }
        return found


def fit_runs(
    runs: Runs,
    criterion: str = "avg",
    law: str = "auto",
    *,
    experts: Experts | None = None,
    tokens: Mapping[str, float] | None = None,
    total_tokens: float | None = None,
    max_epochs: float | None = None,
    smooth: bool = False,
) -> Fit:
    """Fit a law to runs and search the best mixture by it.

    Args:
        runs: of the table.
        criterion: as `criterion_weights` reads it.
        law: "auto", or one of `default_laws` (and of `laws_with_experts`) by name.
        experts: cached experts of the runs' domains on their targets, and maybe others: laws with MDE features are
            tried, too.
        tokens: that each domain has; with `total_tokens` and `max_epochs` they bound the weights.
        total_tokens: of the run that the mixture is for.
        max_epochs: times that a domain may be seen.
        smooth: give every domain 1 % of a uniform mixture, as MDE does.

    Raises:
        ValueError: names that are not there, bounds that leave no mixture, or runs that no law can be fitted to.
    """
    if experts is not None:
        if set(runs.targets) < set(experts.targets):  # some were chosen, or have too few losses
            experts = experts.only(runs.targets)
        runs = runs.ordered(experts.names, experts.targets)
    if (different := len(np.unique(runs.W.round(9), axis=0))) < FEWEST:
        raise ValueError(
            f"the runs are of {different} different mixture(s): at least {FEWEST} are needed to tell anything"
        )
    shares = criterion_weights(criterion, runs.targets)
    candidates = default_laws(*runs.L.shape)
    if experts is not None:
        candidates |= laws_with_experts(experts.sample(EXPERT_TOKENS))
    if law != "auto" and law not in candidates:
        names = ", ".join(map(repr, ("auto", *candidates)))
        told = "" if experts is not None or "MDE" not in law else "; laws with MDE take experts (--experts)"
        raise ValueError(f"no law {law!r} for {len(runs.W)} runs; there are {names}{told}")
    if tokens is not None and set(tokens) != set(runs.domains):
        raise ValueError(f"tokens are of {', '.join(tokens)}; the domains are {', '.join(runs.domains)}")
    fitted = AutoLaw(candidates if law == "auto" else {law: candidates[law]}).fit(runs.W, runs.L)
    best = best_mixture(
        fitted,
        shares,
        tokens=None if tokens is None else [tokens[domain] for domain in runs.domains],
        total_tokens=total_tokens,
        max_epochs=max_epochs,
        smoothing=SMOOTHING if smooth else 0.0,
        compare=runs.W,
    )
    return Fit(runs, fitted, shares, best)


def print_fit(fit: Fit, console: Console) -> None:
    """Print what was understood, how well left-out runs are predicted, and the best mixture."""
    say = partial(console.print, markup=False, highlight=False)
    for note in fit.runs.notes:
        say(f"note: {note}", style="yellow")
    say(fit.law.report_)
    errors = Table(title="left-out runs", box=box.SIMPLE_HEAD)
    for head in ("target", "share", "runs", "Spearman", "MAE", "standard deviation"):
        errors.add_column(head, justify="left" if head == "target" else "right")
    shares = dict(zip(fit.runs.targets, fit.criterion, strict=True))
    for name, e in fit.errors().items():
        last = name not in shares
        if last:
            errors.add_section()
        share = "" if last else f"{shares[name]:.3f}"
        errors.add_row(
            escape(name), share, f"{e['runs']:.0f}", *(_number(e[key], 4) for key in ("spearman", "mae", "spread"))
        )
    console.print(errors)
    best, seen = fit.best, fit.runs.W / fit.runs.W.sum(axis=1, keepdims=True)
    mixture = Table(title="best mixture", box=box.SIMPLE_HEAD)
    for head in ("domain", "weight", "runs had", ""):
        mixture.add_column(head, justify="left" if head in ("domain", "") else "right")
    for j in np.argsort(-best.weights, kind="stable"):
        low, high = seen[:, j].min(), seen[:, j].max()
        beyond = "beyond the runs" if not low - 1e-3 <= best.weights[j] <= high + 1e-3 else ""
        mixture.add_row(escape(fit.runs.domains[j]), f"{best.weights[j]:.4f}", f"{low:.3f} to {high:.3f}", beyond)
    console.print(mixture)
    say(
        f"predicted {best.predicted:.4f} ± {best.std:.4f} (standard deviation of such a run); the best of the runs is "
        f"predicted {best.best_run:.4f}" + (f"; {best.message}" if best.message else "")
    )


def write_fit(fit: Fit, folder: Path) -> list[Path]:
    """Write `fit.json` (`fit_facts`) and `fit.svg` (predicted against observed) into a folder; return their paths."""
    paths = [folder / "fit.json", folder / "fit.svg"]
    write_json(paths[0], finite(fit_facts(fit)), allow_nan=False)
    write_whole(paths[1], _figure(fit))
    return paths


def fit_facts(fit: Fit) -> dict[str, Any]:
    """The best mixture, what is predicted of it, and how well left-out runs are, as plain numbers."""
    best, names = fit.best, fit.runs.targets
    return {
        "weights": dict(zip(fit.runs.domains, best.weights.tolist(), strict=True)),
        "predicted": best.predicted,
        "std": best.std,
        "best_run": best.best_run,
        "targets": dict(zip(names, best.targets.tolist(), strict=True)),
        "targets_std": dict(zip(names, best.targets_std.tolist(), strict=True)),
        "criterion": dict(zip(names, fit.criterion.tolist(), strict=True)),
        "law": fit.law.why_,
        "left_out": fit.errors(),
        "notes": [*fit.runs.notes, *([best.message] if best.message else [])],
    }


def _figure(fit: Fit) -> str:
    """Return predicted against observed, a panel a target, as SVG: each run predicted by a law that did not see it."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    rows, columns = -(-len(fit.runs.targets) // 4), min(4, len(fit.runs.targets))
    with matplotlib.rc_context({"font.size": 8, "text.parse_math": False, "svg.hashsalt": "dynmix"}):
        figure = Figure(figsize=(2.6 * columns, 2.7 * rows), layout="constrained")
        errors = fit.errors()
        for i, name in enumerate(fit.runs.targets):
            axes = figure.add_subplot(rows, columns, i + 1)
            observed, left_out = fit.runs.L[:, i], fit.law.left_out_[:, i]
            axes.scatter(observed, left_out, s=9, alpha=0.7, color="#0072b2", linewidths=0)
            if len(known := observed[np.isfinite(observed)]):
                axes.axline((float(known.mean()),) * 2, slope=1, color="#8c8c8c", linewidth=0.8)
            axes.set_title(f"{name}, Spearman {_number(errors[name]['spearman'], 3)}", fontsize=8)
            axes.set_xlabel("observed")
            axes.set_ylabel("predicted, left out")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"
