"""What the runs of a budget say together: a law of each set's loss, and the static mixture that it likes best.

A control and no method, as it is fitted to the very figures that judge: what could be had if the mixture cost nothing
to find. Knows results and arrays; runs nothing.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, nnls

from .tables import PRIOR, Cell, Cells, markdown

HINDSIGHT = "hindsight"
FEWEST = 0.15  # of the prior's tokens of every domain, in the runs that are fitted: a logarithm has no end at 0
RIDGE = 0.15  # of the slopes, beside 1 for a run in which the domain has e times the prior's tokens

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """A set's loss is the prior's less the sum of slope times logarithm of tokens over the prior's, over the domains.

    Attributes:
        sets, domains: their names.
        slopes: float64[n_sets, n_domains], >= 0: nats a token less for e times as much of a domain.
        explained: float64[n_sets], of the squares of the fitted losses' differences to the prior.
        runs: that it was fitted to.
        prior: float64[n_domains], what the prior samples, in shares.
    """

    sets: list[str]
    domains: list[str]
    slopes: Array
    explained: Array
    runs: int
    prior: Array

    @classmethod
    def fit(cls, cells: Cells) -> "Law":
        """Fit it to every run of `_pairs`, beside the prior's.

        Non-negative least squares with a ridge: domains move together in the mixtures that methods choose.
        """
        pairs, domains = _pairs(cells), list(cells.settings["split"]["domains"])
        if not pairs:
            raise SystemExit(
                f"{HINDSIGHT} looks back on runs of other methods beside {PRIOR} in which every domain has some tokens "
                f"in both, and at least {100 * FEWEST:.0f} % of {PRIOR}'s: there is none, so run others first"
            )
        sets = [name for group in cells.groups.values() for name in group]
        X = np.log([[_tokens(cell, d) / _tokens(base, d) for d in domains] for cell, base in pairs])
        Y = np.array([[cell["final"][s]["loss"] - base["final"][s]["loss"] for s in sets] for cell, base in pairs])
        A = np.vstack([-X, RIDGE * np.eye(len(domains))])
        slopes = np.array([nnls(A, np.append(y, np.zeros(len(domains))))[0] for y in Y.T])
        explained = 1 - ((Y + X @ slopes.T) ** 2).sum(axis=0) / (Y**2).sum(axis=0)
        shares = np.mean([[base["sampled"][d] for d in domains] for _, base in pairs], axis=0)
        return cls(sets, domains, slopes, explained, len(pairs), shares)

    def worth(self, cells: Cells) -> tuple[Array, Array]:
        """Slopes of the mean of all groups of sets but the domains' own text, and of that: float64[n_domains] each."""
        means = {
            group: np.mean([self.slopes[self.sets.index(s)] for s in sets], axis=0)
            for group, sets in cells.groups.items()
        }
        own = means.pop("domains' own text", np.zeros(len(self.domains)))
        return np.mean(list(means.values()), axis=0), own

    def best(self, cells: Cells) -> dict[str, float]:
        """Domain -> weight of the static mixture whose mean loss is least and whose own text is not above the prior's.

        Of logarithms, the best mixture is in proportion to the slopes of the two of `worth`, where the constraint's
        multiplier weighs those of the own text.
        """
        gain, own = self.worth(cells)
        if not gain.any():
            raise SystemExit(f"{HINDSIGHT}: by {self.runs} runs, no domain makes a loss less: run more")

        def mixture(log_multiplier: float) -> Array:
            slopes = gain + np.exp(log_multiplier) * own
            return np.asarray(slopes / slopes.sum())

        def above_prior(log_multiplier: float) -> float:
            some = own > 0
            return -float(own[some] @ np.log(mixture(log_multiplier)[some] / self.prior[some]))

        least, most = -9.0, 9.0  # at the latter, the mixture that is best for the own text
        at = least if above_prior(least) <= 0 else most if above_prior(most) >= 0 else brentq(above_prior, least, most)
        return dict(zip(self.domains, mixture(at).tolist(), strict=True))

    def table(self) -> str:
        """A row a set: what e times as much of each domain takes off its loss."""
        rows = [
            [f"`{s}`", *(f"{x:.2f}" if x >= 0.005 else "" for x in row), f"{100 * share:.0f} %"]
            for s, row, share in zip(self.sets, self.slopes, self.explained, strict=True)
        ]
        return markdown(["set", *(f"`{d}`" for d in self.domains), "explained"], rows)


def section(name: str, cells: Cells) -> list[str]:
    """What the page says of it: parts in Markdown, none where there are fewer runs than domains."""
    if len(_pairs(cells)) < len(cells.settings["split"]["domains"]):
        return []
    law = Law.fit(cells)
    if not law.worth(cells)[0].any():
        return []
    own = {d: law.slopes[law.sets.index(f"text/{d}"), k] for k, d in enumerate(law.domains) if f"text/{d}" in law.sets}
    low, high = min(own, key=own.__getitem__, default=None), max(own, key=own.__getitem__, default=None)
    best = ", ".join(f"{domain} {100 * weight:.1f}" for domain, weight in law.best(cells).items())
    return [
        f"### What the runs of `{name}` say together\n",
        f"By {law.runs} runs, those that gave every domain at least {100 * FEWEST:.0f} % of the natural run's tokens, "
        "e times as much of a domain takes so much off a set's loss, in nats a token, and this much of these runs' "
        "differences to the natural mixture (squared) is explained by it:\n",
        law.table() + "\n",
        f"So much of a domain takes {own[low]:.2f} ({low}) to {own[high]:.2f} nats ({high}) off its own text.\n"
        if low and high
        else "",
        "The static mixture that is best by this law, of those whose own text is no worse than under natural, has, in "
        f"percent: {best}. `{HINDSIGHT}` is a run of what the law said of the runs that there were before its first "
        "seed; it was fitted to the figures that judge.\n",
    ]


def _pairs(cells: Cells) -> list[tuple[Cell, Cell]]:
    """Every run but its own that gave each domain enough, and the prior's of the same seed and operations to train."""
    prior, domains = cells.cells.get(PRIOR, {}), cells.settings["split"]["domains"]
    return [
        (cell, prior[seed])
        for name, own in cells.cells.items()
        for seed, cell in own.items()
        if name not in (PRIOR, HINDSIGHT) and seed in prior and cell["budget"] == prior[seed]["budget"]
        if set(cell["sampled"]) == set(domains)
        if all(_tokens(cell, d) >= FEWEST * _tokens(prior[seed], d) > 0 for d in domains)
    ]


def _tokens(cell: Cell, domain: str) -> float:
    return float(cell["sampled"][domain] * cell["tokens"])
