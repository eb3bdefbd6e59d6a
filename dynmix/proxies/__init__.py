"""Proxies: small models trained on mixtures, from whose losses `dynmix fit` learns what a mixture is worth."""

from importlib import import_module
from typing import Any

__all__ = ["Proxies", "Training", "run_proxies", "small_llama"]

_HOME = {"Proxies": "run", "Training": "plan", "run_proxies": "run", "small_llama": "plan"}


def __getattr__(name: str) -> Any:
    # When they are asked for: a worker process must be listening before torch is imported.
    if name in _HOME:
        return getattr(import_module(f"dynmix.proxies.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dynmix.proxies' has no attribute {name!r}")
