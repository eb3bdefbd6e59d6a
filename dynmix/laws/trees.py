"""RegMix's gradient-boosted trees (arXiv 2407.01492), with settings for few runs. Knows arrays only."""

import numpy as np

from dynmix.laws.base import Array, Features, Law, joined


class LightGBM(Law):
    """LightGBM, one model a target, with settings that follow the number of its runs: RegMix's law (arXiv 2407.01492).

    LightGBM's least leaf of 20 runs makes one leaf, a constant, of 25 runs; here a leaf holds 1 in 64 of the runs, at
    least 2, and a tree has at most as many leaves as fit twice, up to 12. Trees are step functions: they have no slope
    to optimise by (`best_mixture` averages what they like best), and predict nothing beyond the runs.

    Args:
        trees: boosting rounds.
        learning_rate: of each.
        extra: what the law is told besides the weights.
    """

    steps = True

    def __init__(self, trees: int = 300, learning_rate: float = 0.05, extra: Features | None = None):
        self.trees = trees
        self.learning_rate = learning_rate
        self.extra = extra

    def _fit(self, W: Array, L: Array) -> None:
        from lightgbm import LGBMRegressor

        W = joined(W, W, self.extra)
        self.models_ = []
        for y in L.T:
            rows = np.flatnonzero(np.isfinite(y))
            leaf = max(2, len(rows) // 64)
            model = LGBMRegressor(
                n_estimators=self.trees,
                learning_rate=self.learning_rate,
                num_leaves=int(np.clip(len(rows) // (2 * leaf), 2, 12)),
                min_child_samples=leaf,
                min_data_in_bin=1,
                max_bin=127,
                colsample_bytree=0.8,
                deterministic=True,
                force_row_wise=True,
                n_jobs=1,
                verbose=-1,
                random_state=0,
            )
            self.models_.append(model.fit(W[rows], y[rows]))

    def _predict(self, W: Array, with_std: bool) -> tuple[Array, Array | None]:
        W = joined(W, W, self.extra)
        return np.stack([np.asarray(model.predict(W), dtype=np.float64) for model in self.models_], axis=1), None
