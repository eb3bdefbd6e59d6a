"""AutoLaw: the law, or the average of a few, that predicts left-out runs best, and why. Knows no test set."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.base import clone

from dynmix.laws.base import Array, Law, spread
from dynmix.laws.bimix import BiMix
from dynmix.laws.exponential import DML
from dynmix.laws.gp import GP, PowerLawGP
from dynmix.laws.icm import MultiTaskGP
from dynmix.laws.linear import Ridge
from dynmix.laws.power import PowerLaw
from dynmix.laws.trees import LightGBM
from dynmix.shown import Bar

FEWEST = 6  # runs of a target below which left-out ones tell nothing
AVERAGED = 3  # laws at most
WORTH = 0.99  # one law more must bring the error down to that times, else fewer: they can be read


class Score(NamedTuple):
    """A law's cross-validated errors, means over targets.

    Attributes:
        error: root mean square over the target's standard deviation over the runs; what the choice is made by.
        mae: mean absolute error, in L's unit.
        spearman: rank correlation.
        spearman_average: of the average over targets.
        seconds: that the folds took.
        failure: why there is no score, else "".
    """

    error: float
    mae: float
    spearman: float
    spearman_average: float
    seconds: float
    failure: str = ""


def default_laws(n_runs: int, n_targets: int) -> dict[str, Law]:
    """Return the candidates for so many runs and targets (the shape of L), by name: what `AutoLaw` takes by itself."""
    laws: dict[str, Law] = {
        "power law": PowerLaw(),
        "power law, free": PowerLaw(tau=2.0, tau_alpha=0.5, tau_exponent=0.5, tau_domain=0.3, noise=0.05),
        "power law + GP": PowerLawGP(),
        "DML": DML(),
        "BiMix": BiMix(),
        "ridge": Ridge(),
        "GP": GP(),
        "LightGBM": LightGBM(),
    }
    if n_targets > 1 and n_runs * n_targets <= 1000:
        laws["multi-task GP"] = MultiTaskGP()
    if n_runs < 40:  # a residual of so few runs shows a process nothing
        del laws["power law + GP"]
    return laws


class AutoLaw(Law):
    """Chooses among laws by cross-validation inside the runs, and says why.

    Args:
        laws: name -> law; None: `default_laws`.
        folds: of the cross-validation; runs of one mixture are in one fold.
        random_state: of the folds.

    Attributes:
        laws_: name -> law fitted to all runs, of those chosen; their predictions are averaged.
        scores_: name -> `Score` of every candidate.
        why_: the choice in one sentence.
        report_: a table of the scores, and the choice.
        left_out_: float64[n_runs, n_targets], what the chosen laws predict for each run without it; NaN for a target
            with too few runs, and for a run whose losses a law knows (`Law.known`), which is never left out.
        correlation_: float64[n_targets, n_targets], of what the chosen law misses on left-out runs.

    Raises (from `fit`):
        ValueError: what `Law.fit` refuses, no laws, or none that could be fitted to every fold.
    """

    def __init__(self, laws: Mapping[str, Law] | None = None, folds: int = 5, random_state: int = 0):
        self.laws = laws
        self.folds = folds
        self.random_state = random_state

    def _fit(self, W: Array, L: Array) -> None:
        laws = dict(default_laws(*L.shape) if self.laws is None else self.laws)
        if not laws:
            raise ValueError("laws is empty: name at least one law")
        # Runs whose losses a law has from elsewhere, as laws with experts have the experts', would flatter it. They are
        # fitted to in every fold, and nobody is judged by them.
        known = np.any([law.known(W) for law in laws.values()], axis=0)
        fold = np.full(len(W), -1, dtype=np.intp)
        if not known.all():
            fold[~known] = folds(W[~known], self.folds, self.random_state)
        judges = np.where(known[:, None], np.nan, L)
        judged = np.array([_can_be_left_out(np.isfinite(y), fold) for y in judges.T])
        self.scores_, left_out = {}, {}
        misses, std = np.full(L.shape, np.nan), np.full(L.shape, np.nan)
        if not judged.any():
            chosen = ["power law" if "power law" in laws else next(iter(laws))]
            self.why_ = (
                f"{chosen[0]}: no target has {FEWEST} different mixtures, too few to compare laws on left-out ones"
            )
        else:
            count = int(fold.max()) + 1
            with Bar(total=len(laws) * count, desc="comparing laws", unit="fit") as bar:
                for number, (name, law) in enumerate(laws.items(), start=1):
                    self.scores_[name], predicted = _cross_validate(law, W, L[:, judged], fold, bar.update)
                    bar.update(number * count - bar.n)  # one that failed has left out folds
                    if predicted is not None:
                        left_out[name] = predicted
            if not left_out:
                failures = "; ".join(f"{name}: {score.failure}" for name, score in self.scores_.items())
                raise ValueError(f"no law could be fitted to every fold: {failures}")
            chosen, mean, own, self.why_ = self._choose(judges[:, judged], left_out)
            misses[:, judged], std[:, judged] = L[:, judged] - mean, own
        if known.any():
            self.why_ += f"; not left out: {int(known.sum())} runs that laws with experts know without a fit"
        last = Bar(chosen, desc="fitting to all runs", unit="law")
        self.laws_ = {name: clone(laws[name]).fit(W, L) for name in last}
        self.left_out_ = L - misses
        self.seen_ = np.all([law.seen_ for law in self.laws_.values()], axis=0)
        self.steps = all(law.steps for law in self.laws_.values())
        self._scale_uncertainty(L, misses, std)
        self.report_ = self._table(chosen)

    def _choose(self, L: Array, left_out: dict[str, tuple[Array, Array]]) -> tuple[list[str], Array, Array, str]:
        order = sorted(left_out, key=lambda name: self.scores_[name].error)
        best, error = order[:1], self.scores_[order[0]].error
        single = error
        # The law that helps the average most, not the next best one: laws of one kind err alike.
        while len(best) < min(AVERAGED, len(order)):
            tried = {
                name: _score(L, np.mean([left_out[n][0] for n in (*best, name)], axis=0), 0.0).error
                for name in order
                if name not in best
            }
            partner = min(tried, key=lambda name: tried[name])
            if tried[partner] > WORTH * error:
                break
            best, error = [*best, partner], tried[partner]
        mean, std = _average([left_out[name] for name in best])
        said = f"error {error:.4f} of a standard deviation on left-out runs"
        if len(best) > 1:
            why = f"the average of {', '.join(best)}: {said}, the best of them alone {single:.4f} ({best[0]})"
        else:
            rest = f", next {order[1]} {self.scores_[order[1]].error:.4f}" if len(order) > 1 else ""
            why = f"{best[0]}: {said}{rest}; no average with another is better by {1 - WORTH:.0%}"
        return best, mean, std, why

    def _scale_uncertainty(self, L: Array, misses: Array, std: Array) -> None:
        counts = np.isfinite(misses).sum(axis=0)
        self._fallback = np.where(counts, np.sqrt(np.nansum(misses**2, axis=0) / np.maximum(counts, 1)), spread(L))
        # A law with as many parameters as runs misses none of them: a deviation that no left-out run has borne out is
        # no less than the runs' own.
        self._least = np.where(counts, 0.0, self._fallback)
        # Without a law's own deviation, the one that its left-out runs show.
        std = np.where(np.isfinite(std), std, self._fallback)
        # Two runs' worth of faith in the law's own deviation, so that a few lucky ones do not shrink it to nothing.
        squares = np.nansum((misses / np.maximum(std, 1e-300)) ** 2, axis=0)
        self._factor = np.sqrt((squares + 2) / (counts + 2))
        scaled = np.nan_to_num(misses / np.maximum(self._fallback, 1e-300))
        both = np.isfinite(misses).astype(np.float64)
        pairs = both.T @ both
        # Pairs of targets that few runs share are pulled to 1, which is the cautious side for an average.
        self.correlation_ = np.clip((scaled.T @ scaled + 2) / (pairs + 2), -1, 1)
        np.fill_diagonal(self.correlation_, 1)

    def _predict(self, W: Array, with_std: bool) -> tuple[Array, Array | None]:
        mean, std = _average([law._predict(W, with_std) for law in self.laws_.values()])
        if not with_std:
            return mean, None
        return mean, np.maximum(np.where(np.isfinite(std), std, self._fallback) * self._factor, self._least)

    def _table(self, chosen: list[str]) -> str:
        width = max([18, *(len(name) + 2 for name in self.scores_)])
        head = f"{'law':<{width}}{'error':>9}{'MAE':>10}{'Spearman':>10}{'of average':>12}{'seconds':>9}"
        lines = [head]
        for name, s in sorted(self.scores_.items(), key=lambda item: (bool(item[1].failure), item[1].error)):
            mark = "*" if name in chosen else " "
            row = f"{s.error:>9.4f}{s.mae:>10.5f}{s.spearman:>10.4f}{s.spearman_average:>12.4f}{s.seconds:>9.1f}"
            lines.append(f"{mark}{name:<{width - 1}}" + (f"  {s.failure}" if s.failure else row))
        return "\n".join([*lines, f"chosen: {self.why_}"])


def folds(W: Array, count: int, seed: int) -> NDArray[np.intp]:
    """Return each run's fold, int[n_runs]: runs of one mixture share it, else it would be known when left out."""
    _, mixture = np.unique(W.round(9), axis=0, return_inverse=True)
    mixture = mixture.ravel()
    n = int(mixture.max()) + 1
    place = np.random.default_rng(seed).permutation(n) % min(count, n)
    return np.asarray(place[mixture], dtype=np.intp)


def _can_be_left_out(known: NDArray[np.bool_], fold: NDArray[np.intp]) -> bool:
    """Return whether a target has enough runs for its left-out errors to tell laws apart."""
    enough = known.sum() >= FEWEST and len(np.unique(fold[known])) > 1
    return enough and all((known & ~out).sum() >= FEWEST - 2 for out in _splits(fold))


def _splits(fold: NDArray[np.intp]) -> Iterator[NDArray[np.bool_]]:
    for k in range(fold.max() + 1):
        yield fold == k


def _cross_validate(
    law: Law, W: Array, L: Array, fold: NDArray[np.intp], tick: Callable[[], object]
) -> tuple[Score, tuple[Array, Array] | None]:
    start = time.perf_counter()
    mean, std = np.full(L.shape, np.nan), np.full(L.shape, np.nan)
    judges = fold >= 0
    try:
        for out in _splits(fold):
            # A target with too few runs in the other folds has no left-out prediction here.
            own = np.isfinite(L[~out]).sum(axis=0) >= law.min_runs
            if own.any():
                cells = np.ix_(out, own)
                mean[cells], deviation = clone(law).fit(W[~out], L[~out][:, own])._predict(W[out], True)
                std[cells] = np.nan if deviation is None else deviation
                tick()
        if not np.isfinite(mean[judges]).all():
            raise ValueError("a target has too few runs outside a fold, or a prediction is not finite")
    except (ValueError, ArithmeticError) as failure:  # LinAlgError is a ValueError
        return Score(np.nan, np.nan, np.nan, np.nan, time.perf_counter() - start, str(failure)), None
    judged = np.where(judges[:, None], L, np.nan)
    return _score(judged, mean, time.perf_counter() - start), (mean, std)


def _average(predictions: Sequence[tuple[Array, Array | None]]) -> tuple[Array, Array]:
    """Return mean and deviation of the average: the laws' mean variance, and how they disagree."""
    mean = np.mean([m for m, _ in predictions], axis=0)
    between = np.var([m for m, _ in predictions], axis=0)
    own = np.array([np.full(mean.shape, np.nan) if s is None else s for _, s in predictions])
    count = np.isfinite(own).sum(axis=0)
    with np.errstate(invalid="ignore"):
        within = np.nansum(own**2, axis=0) / np.where(count, count, np.nan)
    return mean, np.sqrt(within + between)


def _score(L: Array, mean: Array, seconds: float) -> Score:
    miss = L - mean
    complete = np.isfinite(L).all(axis=1)
    return Score(
        error=float(np.mean(np.sqrt(np.nanmean(miss**2, axis=0)) / spread(L))),
        mae=float(np.nanmean(np.abs(miss))),
        spearman=float(
            np.mean([spearman(y[np.isfinite(y)], m[np.isfinite(y)]) for y, m in zip(L.T, mean.T, strict=True)])
        ),
        spearman_average=spearman(L[complete].mean(axis=1), mean[complete].mean(axis=1)),
        seconds=seconds,
    )


def spearman(a: Array, b: Array) -> float:
    """Rank correlation; 0 where one of them is constant, NaN of fewer than 3."""
    if len(a) < 3:
        return float("nan")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
