"""A mixture of data experts (MDE, arXiv 2502.15950): the loss of the experts' ensemble, for any mixture, from a cache.

An expert is a proxy trained on one domain. What each expert gives each validation token is kept once; the loss of a
mixture w is then L(w) = -mean over tokens of log sum_k w_k p_k(token), no model needed. Knows arrays and files only.

Float16 holds enough: log p is rounded by at most 2^-11 of itself, either way alike, so n tokens of loss l change their
mean by about l / (3500 sqrt(n)): 1e-5 nats for 10,000 tokens of 4 nats.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from dynmix.laws.base import Array, check_mixtures

CHUNK = 8192  # tokens at once: their probabilities stay in a core's cache
BATCH = 64  # mixtures at once
FLOOR = np.float32(-80.0)  # log of a probability relative to the token's best expert: float32 goes down to -87
SAFE = 1e-9  # the product of four numbers above it is a float32
FORMAT = 1

BLAS = ThreadpoolController()


class Slopes(NamedTuple):
    """Losses float64[n, n_targets] and their gradients by the weights float64[n, n_targets, n_experts], in nats."""

    losses: Array
    gradients: Array


class Experts:
    """What each expert gives each token of the validation sets.

    Args:
        log_probabilities: log p in nats, float16, float32 or float64 [n_experts, n_tokens]; may be memory-mapped.
        tokens: name of each validation set -> its number of tokens; the sets lie one after the other.
        names: of the experts, in order; None: "0", "1", ...
        memory: bytes that probabilities may take; if they need more (4 a token and expert) each pass reads
            `log_probabilities` again.

    Attributes:
        names, targets: of the experts and of the validation sets, in order.
        n_tokens: of all sets together.

    Raises:
        ValueError: shapes or names that do not fit; NaN, or log p above 0, or a token that no expert gives any
            probability, with the place.
    """

    def __init__(
        self,
        log_probabilities: NDArray[np.floating[Any]],
        tokens: Mapping[str, int],
        names: Sequence[str] | None = None,
        *,
        memory: int = 1 << 30,
    ):
        shape = log_probabilities.shape
        if len(shape) != 2 or 0 in shape or log_probabilities.dtype.kind != "f":
            raise ValueError(
                f"log_probabilities is {log_probabilities.dtype} {shape}: floats [n_experts, n_tokens] are needed"
            )
        self.names = tuple(map(str, range(shape[0]))) if names is None else tuple(names)
        if len(self.names) != shape[0] or len(set(self.names)) != shape[0]:
            raise ValueError(f"names={list(self.names)}: {shape[0]} different ones are needed, one an expert")
        self.targets, counts = tuple(tokens), list(tokens.values())
        if not counts or min(counts) < 1 or sum(counts) != shape[1]:
            raise ValueError(
                f"tokens={dict(tokens)}: each set needs at least one, and all together log_probabilities' {shape[1]}"
            )
        self.n_tokens, self.tokens = shape[1], tuple(counts)
        self._log = log_probabilities
        self._whole: Experts | None = None  # that these are a sample of
        self._held: list[tuple[int, Array, NDArray[np.float32]]] | None = None
        if 4 * shape[0] * shape[1] <= memory:
            self._held = list(self._chunks())

    def __sklearn_clone__(self) -> Self:  # scikit-learn's name: a clone of a law shares them
        return self

    @classmethod
    def write(
        cls,
        folder: Path | str,
        log_probabilities: Mapping[str, ArrayLike],
        tokens: Mapping[str, int],
        dtype: type[np.floating[Any]] = np.float16,
    ) -> "Experts":
        """Write a cache, `log_probabilities.npy` and `experts.json` in a new folder, and return it opened.

        Args:
            folder: must not be there yet; it appears complete or not at all.
            log_probabilities: name of each expert -> log p of all tokens, float[n_tokens].
            tokens: as in `Experts`.
            dtype: on disk.

        Raises:
            FileExistsError: `folder` is there.
            ValueError: what `Experts` refuses; experts with other numbers of tokens.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"{folder} is there: delete it, or choose another folder")
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            shape = len(log_probabilities), sum(tokens.values())
            table = np.lib.format.open_memmap(part / "log_probabilities.npy", "w+", dtype=dtype, shape=shape)
            for row, (name, values) in zip(table, log_probabilities.items(), strict=True):
                found = np.asarray(values)
                if found.shape != row.shape:
                    raise ValueError(f"expert {name!r} has shape {found.shape}, the sets have {shape[1]} tokens")
                with np.errstate(over="ignore"):  # what float16 has no number for is -inf, no probability at all
                    row[:] = found
            table.flush()
            meta = {"format": FORMAT, "experts": list(log_probabilities), "tokens": dict(tokens)}
            (part / "experts.json").write_text(json.dumps(meta, indent=1))
            for _ in cls(table, tokens, list(log_probabilities), memory=0)._chunks():
                pass  # refuses what is no log probability
            part.rename(folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path | str, *, memory: int = 1 << 30) -> "Experts":
        """Open a cache that `write` made, memory-mapped.

        Args:
            folder: of the cache.
            memory: as in `Experts`.

        Raises:
            ValueError: a file is missing, damaged or of another format; says which.
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / "experts.json").read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
            table = np.lib.format.open_memmap(folder / "log_probabilities.npy", "r")
            return cls(table, meta["tokens"], meta["experts"], memory=memory)
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as problem:
            raise ValueError(f"{folder} is no cache of experts ({problem}): write it again") from problem

    def only(self, targets: Sequence[str]) -> "Experts":
        """Return the experts on those of the validation sets, in that order.

        Raises:
            ValueError: a set that is not there.
        """
        if missing := [name for name in targets if name not in self.targets]:
            raise ValueError(f"no validation set is called {missing[0]!r}; there are {', '.join(self.targets)}")
        places = [self.targets.index(name) for name in targets]
        found = self._of([(name, np.arange(self.tokens[place])) for name, place in zip(targets, places, strict=True)])
        if self._whole is not None:
            found.corners = self.corners[:, places]
        return found

    def sample(self, tokens: int, seed: int = 0) -> "Experts":
        """Return the experts on at most that many tokens of each set, drawn at random: for searches over mixtures.

        Their `corners` stay those of all tokens, which runs are evaluated on: of 10,000 tokens they are 0.03 nats off.
        """
        rng = np.random.default_rng(seed)
        some = (np.sort(rng.choice(n, min(n, tokens), replace=False)) for n in self.tokens)
        found = self._of(list(zip(self.targets, some, strict=True)))
        found._whole = self
        return found

    def _of(self, parts: Sequence[tuple[str, NDArray[np.intp]]]) -> "Experts":
        starts = dict(zip(self.targets, np.cumsum((0, *self.tokens[:-1])), strict=True))
        rows = np.concatenate([starts[name] + place for name, place in parts])
        return Experts(self._log[:, rows], {name: len(place) for name, place in parts}, self.names)

    def losses(self, W: ArrayLike) -> Array:
        """Return the ensemble's loss for mixtures W float[n, n_experts], float64[n, n_targets], nats per token.

        A probability under e^-80 of that of the token's best expert counts as e^-80 of it, zero included.
        """
        W = self._mixtures(W)
        total = np.zeros((len(W), len(self.targets)))
        for target, best, p in self._pass():
            for some in _batches(len(W)):
                total[some, target] += best.sum() + _log_sums(W[some] @ p)
        return np.asarray(-total / self.tokens, dtype=np.float64)

    def slopes(self, W: ArrayLike) -> Slopes:
        """Return the losses of mixtures W float[n, n_experts] as `losses` does, and their gradients.

        These are d L / d w_k = -mean of p_k / sum_j w_j p_j, float64[n, n_targets, n_experts].
        """
        W = self._mixtures(W)
        total, slope = np.zeros((len(W), len(self.targets))), np.zeros((len(W), len(self.targets), len(self.names)))
        for target, best, p in self._pass():
            for some in _batches(len(W)):
                mixed = W[some] @ p
                total[some, target] += best.sum() + _log_sums(mixed)
                slope[some, target] += (1 / mixed) @ p.T
        tokens = np.array(self.tokens)
        return Slopes(-total / tokens, -slope / tokens[:, None])

    def curvature(self, w: ArrayLike, criterion: Array) -> Array:
        """Return the Hessian of sum_i criterion_i L_i at one mixture, float64[n_experts, n_experts].

        Args:
            w: the mixture, float[n_experts].
            criterion: float64[n_targets].
        """
        W = self._mixtures(np.asarray(w)[None])
        H = np.zeros((len(self.names),) * 2)
        for target, _, p in self._pass():
            ratio = p / (W @ p)
            H += criterion[target] / self.tokens[target] * (ratio @ ratio.T)
        return H

    @cached_property
    def corners(self) -> Array:
        """Each expert's own losses, float64[n_experts, n_targets]."""
        own: Array = self.losses(np.eye(len(self.names))) if self._whole is None else self._whole.corners
        return own

    def _mixtures(self, W: ArrayLike) -> NDArray[np.float32]:
        return check_mixtures(W, len(self.names)).astype(np.float32)

    def _pass(self) -> Iterator[tuple[int, Array, NDArray[np.float32]]]:
        """Yield the chunks. Meanwhile BLAS has one thread: several would wait for each other after each product."""
        with BLAS.limit(limits=1, user_api="blas"):
            yield from self._chunks() if self._held is None else self._held

    def _chunks(self) -> Iterator[tuple[int, Array, NDArray[np.float32]]]:
        """Yield (target, log p of each token's best expert [n], probabilities relative to it [n_experts, n])."""
        start = 0
        for target, count in enumerate(self.tokens):
            for first in range(start, start + count, CHUNK):
                p = self._log[:, first : min(first + CHUNK, start + count)].astype(np.float32)
                best = p.max(axis=0)
                if not (best <= 1e-3).all() or best.min() == -np.inf:
                    self._refuse(p, best, first)
                p -= best
                np.maximum(p, FLOOR, out=p)
                yield target, best.astype(np.float64), np.exp(p, out=p)
            start += count

    def _refuse(self, p: NDArray[np.float32], best: NDArray[np.float32], first: int) -> None:
        token = int(np.argmax(~((best <= 1e-3) & (best > -np.inf))))
        expert = int(np.argmax(np.where(np.isnan(p[:, token]), np.inf, p[:, token])))
        raise ValueError(
            f"log p of token {first + token} by expert {self.names[expert]!r} is {p[expert, token]:g}: natural "
            "logarithms of probabilities are needed, at most 0 and for each token one that is finite"
        )


def _batches(n: int) -> Iterator[slice]:
    for first in range(0, n, BATCH):
        yield slice(first, first + BATCH)


def _log_sums(x: NDArray[np.float32]) -> Array:
    """Return the sum of log x along the last axis of float32[n, tokens], float64[n].

    A logarithm costs seven times a product: where no product can leave float32, it is taken of products of four.
    """
    n = x.shape[1] // 4
    if n and x.min() > SAFE:
        product = x[:, : 2 * n] * x[:, 2 * n : 4 * n]
        product = product[:, :n] * product[:, n:]
        rest = np.log(x[:, 4 * n :]).sum(axis=1, dtype=np.float64)
        return np.asarray(np.log(product, out=product).sum(axis=1, dtype=np.float64) + rest)
    return np.asarray(np.log(np.maximum(x, np.finfo(np.float32).tiny)).sum(axis=1, dtype=np.float64))
