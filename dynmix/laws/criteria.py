"""Criteria: which average of the targets' losses a mixture is chosen for. Knows names and numbers only."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import ArrayLike

from dynmix.laws.base import Array


def criterion_weights(text: str, targets: Sequence[str]) -> Array:
    """Return each target's share of a criterion, float64[n_targets], sums to 1.

    The text is "avg", the average of all, or parts "pattern=weight,...": a pattern with `*` and `?` names a group,
    whose targets share its weight. With sets called sp_* and et_* the criteria of MDE (arXiv 2502.15950, Section 4.5)
    are "sp_*" (AVG-SP), "et_*" (AVG-ET) and "sp_*=1,et_*=1" (their sum, AVG-ALL); "avg" is its AVG-ET+SP.

    Raises:
        ValueError: a pattern that no target has, or a weight that is no number of at least 0; names what there is.
    """
    shares = np.zeros(len(targets))
    for part in ("*" if text == "avg" else text).split(","):
        pattern, given, weight = part.strip().rpartition("=")
        pattern, weight = (pattern, weight) if given else (weight, "1")
        own = np.array([name == pattern for name in targets])
        own = own if own.any() else np.array([fnmatchcase(name, pattern) for name in targets])
        if not own.any():
            raise ValueError(f"criterion {text!r}: no target is called {pattern!r}; there are {', '.join(targets)}")
        try:
            shares[own] += float(weight) / own.sum()
        except ValueError:
            raise ValueError(f"criterion {text!r}: {weight!r} is no number; write name=weight,...") from None
    return normalised(shares, len(targets))


def normalised(criterion: ArrayLike | None, n_targets: int) -> Array:
    """Return weights of the targets float64[n_targets] that sum to 1; None: all equal.

    Raises:
        ValueError: another number of them, or one that is not finite and at least 0, or all 0.
    """
    v = np.ones(n_targets) if criterion is None else np.asarray(criterion, dtype=np.float64)
    if v.shape != (n_targets,) or not (np.isfinite(v).all() and (v >= 0).all() and v.sum() > 0):
        raise ValueError(
            f"criterion={v.tolist()}: {n_targets} weights of at least 0 are needed, one a target, not all 0"
        )
    return np.asarray(v / v.sum(), dtype=np.float64)
