import pytest
import torch
from torch import Tensor

from dynmix.influence.gradients import gradients_of

B, T, OUT, IN = 5, 3, 2, 4


def linear() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, output gradients, and the gradients [B, out, in] they make."""
    a, g = torch.randn(B, T, IN, dtype=torch.float64), torch.randn(B, T, OUT, dtype=torch.float64)
    return a, g, torch.einsum("bto,bti->boi", g, a)


def embedding() -> tuple[Tensor, Tensor, Tensor]:
    """The same of a table of 6 rows, where most sequences look a row up twice."""
    ids, g = torch.randint(0, 6, (B, T)), torch.randn(B, T, IN, dtype=torch.float64)
    return ids, g, torch.einsum("btv,bti->bvi", torch.nn.functional.one_hot(ids, 6).double(), g)


@pytest.mark.parametrize("kind", [linear, embedding])
@pytest.mark.parametrize("n", [1, 3])
def test_are_those_of_the_sequences_one_by_one(kind, n):
    torch.manual_seed(0)
    a, g, G = kind()
    own = gradients_of(a, g)
    towards, weights = torch.randn(n, *G.shape[1:], dtype=torch.float64), torch.randn(n, B, dtype=torch.float64)
    torch.testing.assert_close(own.products(towards), torch.einsum("boi,noi->bn", G, towards))
    torch.testing.assert_close(own.squared_norms(), G.square().sum((1, 2)))
    total = torch.ones_like(towards)
    own.add_weighted(weights, total)
    torch.testing.assert_close(total, 1 + torch.einsum("nb,boi->noi", weights, G))
