"""Laws: loss as a function of the mixture, fitted to proxy runs. Knows no torch.

law = AutoLaw().fit(W, L)                       # W float[n_runs, n_domains], L float[n_runs, n_targets]
mean, std = law.predict(W_new, return_std=True)
print(law.report_)
best = best_mixture(law)

experts = Experts.open("experts")               # token probabilities of one proxy per domain, made by Experts.write
best = solve(experts)                           # by their ensemble alone, without runs
law = AutoLaw(laws_with_experts(experts)).fit(W, L)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynmix.laws.auto import AutoLaw
    from dynmix.laws.base import Law
    from dynmix.laws.bimix import BiMix
    from dynmix.laws.criteria import criterion_weights
    from dynmix.laws.experts import Experts
    from dynmix.laws.exponential import DML
    from dynmix.laws.gp import GP, PowerLawGP
    from dynmix.laws.icm import MultiTaskGP
    from dynmix.laws.linear import Linear, Ridge
    from dynmix.laws.mde import MDE, MDEFeatures, Solution, WithExperts, laws_with_experts, solve
    from dynmix.laws.optimise import BestMixture, best_mixture
    from dynmix.laws.power import PowerLaw
    from dynmix.laws.sampling import sample_mixtures
    from dynmix.laws.trees import LightGBM

__all__ = [
    "DML",
    "GP",
    "MDE",
    "AutoLaw",
    "BestMixture",
    "BiMix",
    "Experts",
    "Law",
    "LightGBM",
    "Linear",
    "MDEFeatures",
    "MultiTaskGP",
    "PowerLaw",
    "PowerLawGP",
    "Ridge",
    "Solution",
    "WithExperts",
    "best_mixture",
    "criterion_weights",
    "laws_with_experts",
    "sample_mixtures",
    "solve",
]

_NAMES = {
    "auto": ["AutoLaw"],
    "base": ["Law"],
    "bimix": ["BiMix"],
    "criteria": ["criterion_weights"],
    "experts": ["Experts"],
    "exponential": ["DML"],
    "gp": ["GP", "PowerLawGP"],
    "icm": ["MultiTaskGP"],
    "linear": ["Linear", "Ridge"],
    "mde": ["MDE", "MDEFeatures", "Solution", "WithExperts", "laws_with_experts", "solve"],
    "optimise": ["BestMixture", "best_mixture"],
    "power": ["PowerLaw"],
    "sampling": ["sample_mixtures"],
    "trees": ["LightGBM"],
}


def __getattr__(name: str) -> Any:
    # When they are asked for: scikit-learn takes a second to import.
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"dynmix.laws.{module}"), name)
    raise AttributeError(f"module 'dynmix.laws' has no attribute {name!r}")
