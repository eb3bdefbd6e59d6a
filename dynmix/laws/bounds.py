"""Bounds of a mixture's weights, and searches within them. Knows arrays only."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from dynmix.laws.base import Array


class Bounds(NamedTuple):
    """Of each weight, float64[n_domains] both; `message` says what the upper ones come from, else ""."""

    low: Array
    high: Array
    message: str = ""

    @classmethod
    def of(
        cls,
        n_domains: int,
        lower: ArrayLike = 0.0,
        upper: ArrayLike = 1.0,
        *,
        tokens: ArrayLike | None = None,
        total_tokens: float | None = None,
        max_epochs: float | None = None,
        seen: NDArray[np.bool_] | None = None,
    ) -> Self:
        """Return the bounds that the arguments make together; a domain that is not `seen` stays at 0.

        Raises:
            ValueError: they leave no mixture, or are no numbers of the right count.
        """
        try:
            low = np.broadcast_to(np.asarray(lower, dtype=np.float64), (n_domains,))
            high = np.broadcast_to(np.asarray(upper, dtype=np.float64), (n_domains,))
        except ValueError:
            raise ValueError(f"lower and upper are a number or {n_domains} of them, one a domain") from None
        messages = []
        if max_epochs is None and (tokens is not None or total_tokens is not None):
            raise ValueError("tokens and total_tokens bound nothing without max_epochs: give it, or leave them out")
        if max_epochs is not None:
            if tokens is None or total_tokens is None:
                raise ValueError("max_epochs needs tokens (of each domain) and total_tokens (of the run)")
            if not (max_epochs > 0 and 0 < total_tokens < float("inf")):
                raise ValueError(f"max_epochs={max_epochs}, total_tokens={total_tokens}: numbers above 0 are needed")
            have = np.asarray(tokens, dtype=np.float64)
            if have.shape != (n_domains,):
                raise ValueError(f"tokens has shape {have.shape}: {n_domains} numbers are needed, one a domain")
            held = np.minimum(high, max_epochs * have / total_tokens)
            messages.append(f"max_epochs={max_epochs:g} bounds {int((held < high).sum())} of {n_domains} domains")
            high = held
        if seen is not None and not seen.all():
            unseen = np.flatnonzero(~seen).tolist()
            if (low[unseen] > 0).any():
                raise ValueError(f"lower asks for domains that no run had (columns {unseen}): nothing is known of them")
            messages.append(f"no run had the domains of columns {unseen}: they stay at 0")
            high = np.where(seen, high, 0.0)
        message = "; ".join(messages)
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low >= 0).all() and (low <= high).all()):
            raise ValueError(
                f"bounds must be finite with 0 <= lower <= upper: lower {low.tolist()}, upper {high.tolist()}"
                + (f" ({message})" if message else "")
            )
        if low.sum() > 1 + 1e-9 or high.sum() < 1 - 1e-9:
            remedy = f" ({message}: fewer total_tokens or more epochs)" if max_epochs is not None else ""
            raise ValueError(
                f"no mixture fits: the lower bounds sum to {low.sum():.4g}, the upper ones to {high.sum():.4g}{remedy}"
            )
        return cls(low, high, message)

    def nearest(self, w: Array) -> Array:
        """Return the mixtures within the bounds that are nearest to `w` float64[..., n_domains] (Euclidean).

        They are clip(w + shift), the shift of each found by bisection.
        """
        inside = ((w >= self.low) & (w <= self.high)).all(-1) & (np.abs(w.sum(-1) - 1) < 1e-12)
        if inside.all():
            return w
        left, right = (self.low - w).min(-1, keepdims=True), (self.high - w).max(-1, keepdims=True)
        for _ in range(60):
            shift = 0.5 * (left + right)
            below = np.clip(w + shift, self.low, self.high).sum(-1, keepdims=True) < 1
            left, right = np.where(below, shift, left), np.where(below, right, shift)
        x = np.clip(w + right, self.low, self.high)
        return np.where(inside[..., None], w, x / x.sum(-1, keepdims=True))

    def cheapest(self, cost: Array) -> Array:
        """Return the mixture within the bounds that minimises cost @ w: the cheapest domains, filled up in turn."""
        w, left = self.low.copy(), 1 - self.low.sum()
        for j in np.argsort(cost, kind="stable"):
            more = min(left, self.high[j] - self.low[j])
            w[j] += more
            left -= more
        return w

    def slsqp(self, cost: Callable[[Array], Any], w: Array, slope: Any, **options: Any) -> Array:
        """Return where SciPy's SLSQP comes to from w on, within the bounds but for rounding; w where it finds none."""
        box = np.column_stack([self.low, self.high])
        whole = {"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like}
        found = minimize(cost, w, jac=slope, method="SLSQP", bounds=box, constraints=whole, options=options)
        return np.asarray(found.x) if np.isfinite(found.x).all() else w
