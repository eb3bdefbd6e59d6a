"""The variants of TiKMiX-D that decide its defaults, and the traps."""

SWEEPS = {
    "curvature": [f"tikmix-d[curvature={name}]" for name in ("KFAC", "AdamDiagonal", "DataInf", "Identity")],
    "layers": [f"tikmix-d[layers={name}]" for name in ("blocks", "embeddings", "norms")],
    "probes": [f"tikmix-d[probes={n}]" for n in (4, 8, 32, 64)],
    "stages": [f"tikmix-d[stages={n}]" for n in (2, 8, 16)],
    "alpha": [f"tikmix-d[alpha={n}]" for n in (0, 0.3, 3)],
    "beta": [f"tikmix-d[beta={n}]" for n in (0.3, 3)],
    "gamma": [f"tikmix-d[gamma={n}]" for n in (0.3, 3)],
    "confidence": [f"tikmix-d[confidence={n}]" for n in (0, 0.5, 2)],
    "largest step": [f"tikmix-d[max_change={n}]" for n in (0.02, 0.05, 0.1)],
    "guards": ["tikmix-d[guards=none]"],
    "traps": ["tikmix-d[tasks=rot13]", "tikmix-d[tasks=one-document]"],
}
