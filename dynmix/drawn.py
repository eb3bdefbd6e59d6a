"""The influence of a mixture that was actually drawn (TiKMiX, arXiv 2508.17677, Appendix D), from scored sequences.

Given the model and the curvature, the group influence of a set of sequences is the sum of the sequences' own (Eq. 3).
So a drawn sample needs no pass through the model beyond the one that scored the domains' probes: what its accumulated
gradient would give is the sum of its sequences' scores over the sum of their tokens. Knows arrays and names only.
"""

from collections.abc import Mapping

import numpy as np

from dynmix.observation import Array, Weights


class DrawnMixtures:
    """Draws samples of mixtures from the domains' scored sequences.

    Args:
        scores: domain -> float64[n_sequences, n_rows], influence of each sequence's summed loss on each task or guard.
        tokens: domain -> float64[n_sequences], scored tokens.
        sequences: of a sample.
        seed: of the draws; the n-th call draws the same rows in every process.
    """

    def __init__(self, scores: Mapping[str, Array], tokens: Mapping[str, Array], sequences: int, seed: int):
        self.scores, self.tokens, self.sequences = dict(scores), dict(tokens), sequences
        self._random = np.random.default_rng(seed)

    def __call__(self, weights: Weights) -> Array:
        """Return the influence of a freshly drawn sample of this mixture, float64[n_rows], nats per token.

        Each domain gets its share of the sample to within one sequence, as the training stream does. Its sequences are
        drawn without replacement, and a second time only where the domain has no others left.

        Raises:
            ValueError: a domain that was not scored.
        """
        if unknown := sorted(set(weights) - set(self.scores)):
            raise ValueError(f"weights: no domain {unknown[0]!r}; the domains are {list(self.scores)}")
        shares = np.array([weights.get(name, 0.0) for name in self.scores]) * self.sequences
        # Systematic sampling: the counts differ from the shares by less than one, and are the shares on average.
        ends = np.floor(np.cumsum(shares) + self._random.random())
        counts = np.diff(ends, prepend=0.0).astype(int)
        total = np.zeros(next(iter(self.scores.values())).shape[1])
        tokens = 0.0
        for name, count in zip(self.scores, counts.tolist(), strict=True):
            size = len(self.tokens[name])
            for whole in range(0, count, size):
                rows = self._random.permutation(size)[: count - whole]
                total += self.scores[name][rows].sum(axis=0)
                tokens += self.tokens[name][rows].sum()
        return total / tokens
