"""The variants of TiKMiX-D that decide its defaults, and the traps.

All start from UniMax: what a variant decides shows more clearly where the mixture begins near the best static one.
"""

from .hindsight import HINDSIGHT

BASE = "tikmix-d[start=unimax]"


def _variants(key: str, *values: object) -> list[str]:
    return [f"tikmix-d[start=unimax,{key}={value}]" for value in values]


SWEEPS = {
    "curvature": _variants(
        "curvature", "EKFAC:0.1", "EKFAC:1", "EKFAC:10", "KFAC:1", "AdamDiagonal", "DataInf", "Identity"
    ),
    "layers": _variants("layers", "blocks", "embeddings", "norms"),
    "probes": _variants("probes", 4, 8, 16, 32, 64),
    "stages": [*_variants("stages", 2, 3, 5, 8, 16, 20), *_variants("max_stages", 2, 3)],
    "alpha": _variants("alpha", 0, 0.3, 3),
    "beta": _variants("beta", 0.3, 2, 3),
    "gamma": _variants("gamma", 0.3, 3),
    "confidence": _variants("confidence", 0, 0.25, 0.5, 1),
    "memory": _variants("memory", 0, 0.5, 0.95),
    "against": _variants("against", "run"),
    "epochs": _variants("epochs", 4),
    "largest step": _variants("max_change", 0.02, 0.05, 0.1),
    "guards": [*_variants("guards", "none"), *_variants("guard_weight", 1)],
    "least weight": [
        "tikmix-d[start=unimax,beta=2,lower=0.03]",
        "tikmix-d[start=unimax,guard_weight=1,lower=0.06]",
        "tikmix-d[start=unimax,stages=4,guard_weight=1,lower=0.06]",
    ],
    "start": ["tikmix-d"],
    "what decisions are worth": [
        *_variants("free", "yes"),
        *_variants("free=yes,stages=5,max_stages=5,confidence", 0.25, 0.5, 1),
        "tikmix-d[start=unimax,free=yes,probes=32,examples=60]",
        "tikmix-d[start=unimax,free=yes,probes=32,examples=60,against=run]",
    ],
    "half of the operations": [
        *_variants("share", 0.5),
        *_variants("beta=2,share", 0.5),
        *_variants("guard_weight=1,share", 0.5),
    ],
    "traps": _variants("tasks", "rot13", "one-document"),
    "what a static mixture could reach": [HINDSIGHT],  # last: it looks back on all others
}
