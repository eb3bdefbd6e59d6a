"""Laws: loss as a function of the mixture, fitted to proxy runs. Knows no torch.

law = AutoLaw().fit(W, L)                       # W float[n_runs, n_domains], L float[n_runs, n_targets]
mean, std = law.predict(W_new, return_std=True)
print(law.report_)
best = best_mixture(law)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynmix.laws.auto import AutoLaw
    from dynmix.laws.base import Law
    from dynmix.laws.bimix import BiMix
    from dynmix.laws.exponential import DML
    from dynmix.laws.gp import GP, PowerLawGP
    from dynmix.laws.icm import MultiTaskGP
    from dynmix.laws.linear import Linear, Ridge
    from dynmix.laws.optimise import BestMixture, best_mixture
    from dynmix.laws.power import PowerLaw
    from dynmix.laws.trees import LightGBM

__all__ = [
    "DML",
    "GP",
    "AutoLaw",
    "BestMixture",
    "BiMix",
    "Law",
    "LightGBM",
    "Linear",
    "MultiTaskGP",
    "PowerLaw",
    "PowerLawGP",
    "Ridge",
    "best_mixture",
]

_HOME = {
    "AutoLaw": "auto",
    "BestMixture": "optimise",
    "BiMix": "bimix",
    "DML": "exponential",
    "GP": "gp",
    "Law": "base",
    "LightGBM": "trees",
    "Linear": "linear",
    "MultiTaskGP": "icm",
    "PowerLaw": "power",
    "PowerLawGP": "gp",
    "Ridge": "linear",
    "best_mixture": "optimise",
}


def __getattr__(name: str) -> Any:
    # When they are asked for: scikit-learn takes a second to import.
    if name in _HOME:
        return getattr(import_module(f"dynmix.laws.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dynmix.laws' has no attribute {name!r}")
