import numpy as np
import pytest
import torch

from dynmix import EKFAC
from dynmix.drawn import DrawnMixtures
from dynmix.influence.group import group_influence, scored_groups


def scored(seed: int = 0, rows: int = 40):
    rng = np.random.default_rng(seed)
    return (
        {name: rng.normal(size=(rows, 2)) for name in "abc"},
        {name: rng.integers(5, 20, rows).astype(float) for name in "abc"},
    )


def test_a_sample_of_a_whole_domain_has_the_domains_own_influence():
    scores, tokens = scored()
    drawn = DrawnMixtures(scores, tokens, sequences=80, seed=0)
    expected = scores["b"].sum(axis=0) / tokens["b"].sum()
    np.testing.assert_allclose(drawn({"a": 0.0, "b": 1.0, "c": 0.0}), expected)


def test_samples_scatter_around_the_mixture_of_the_domains_influences():
    scores, tokens = scored()
    tokens = {name: np.full_like(n, 10.0) for name, n in tokens.items()}
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    drawn = DrawnMixtures(scores, tokens, sequences=50, seed=1)
    samples = np.array([drawn(weights) for _ in range(2000)])
    linear = sum(weights[name] * scores[name].sum(axis=0) / tokens[name].sum() for name in "abc")
    np.testing.assert_allclose(samples.mean(axis=0), linear, atol=4 * samples.std(axis=0).max() / np.sqrt(2000))
    assert samples.std(axis=0).min() > 0


def test_the_same_seed_draws_the_same_and_an_unknown_domain_is_refused():
    first, second = (DrawnMixtures(*scored(), sequences=20, seed=3) for _ in range(2))
    weights = {"a": 0.2, "b": 0.2, "c": 0.6}
    for _ in range(3):
        np.testing.assert_array_equal(first(weights), second(weights))
    with pytest.raises(ValueError, match="no domain 'd'"):
        first({"d": 1.0})


def test_it_is_what_the_accumulated_gradient_of_the_sample_gives(model, shared_batches):
    """The sum of scores stands for a pass over the drawn sequences; here such a pass is made (Eq. 3's linearity)."""
    domains, tasks = shared_batches
    found = scored_groups(model, domains, tasks, EKFAC())
    halves = {name: scores[: len(scores) // 2] for name, scores in found.scores.items()}
    n = {name: tokens[: len(tokens) // 2] for name, tokens in found.tokens.items()}
    expected = sum(x.sum(axis=0) for x in halves.values()) / sum(x.sum() for x in n.values())
    pooled = [batch for batches in domains.values() for batch in batches]
    drawn = {"drawn": [{"input_ids": torch.cat([first(batches) for batches in domains.values()])}]}
    again = group_influence(model, drawn, tasks, EKFAC(), curvature_batches=pooled)
    np.testing.assert_allclose(again.scores[:, 0], expected, rtol=1e-4)


def first(batches):
    ids = torch.cat([batch["input_ids"] for batch in batches])
    return ids[: len(ids) // 2]


@pytest.fixture
def model():
    torch.manual_seed(0)

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32)

        def forward(self, input_ids):
            return self.head(self.embedding(input_ids))

        def get_input_embeddings(self):
            return self.embedding

    return Tiny()


@pytest.fixture
def shared_batches():
    generator = torch.Generator().manual_seed(0)

    def batches(low: int):
        return [{"input_ids": torch.randint(low, low + 16, (4, 10), generator=generator)} for _ in range(2)]

    return {"a": batches(0), "b": batches(16)}, {"t": batches(8)}
