import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from dynmix.influence.batch import next_token_labels, next_token_logits
from dynmix.influence.capture import Capture
from dynmix.influence.curvature import EKFAC, KFAC, GaussNewton, Identity
from dynmix.influence.group import group_influence
from dynmix.influence.isolation import isolated
from dynmix.influence.layers import Layers
from tests.influence.conftest import Batcher, Models
from tests.influence.test_layers import build


def dense(model: Any, batches: list[dict[str, Tensor]], capture: Capture) -> Tensor:
    """The Gauss-Newton matrix over the layers' matrices one after the other, from the Jacobian of the logits."""
    model.eval()
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = {names[id(p)]: p.detach() for layer in capture.layers.values() for p in layer.parameters}
    total: Any = 0.0
    tokens = 0
    for batch in batches:
        labels = next_token_labels(batch)

        class With(torch.nn.Module):
            def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
                inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
                return functional_call(model, self.own, (), inputs)

        module = With()
        keys = list(parameters)

        def logits(*values: Tensor) -> Tensor:
            module.own = dict(zip(keys, values, strict=True))  # noqa: B023
            return next_token_logits(module, batch)[:, :-1][labels != -100]  # noqa: B023

        jacobian = torch.autograd.functional.jacobian(logits, tuple(parameters.values()))
        p = logits(*parameters.values()).softmax(-1)
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        for token, H in enumerate(middle):
            rows = [
                torch.cat([
                    layer.matrix(lambda q: jacobian[keys.index(names[id(q)])][token, v]).flatten()  # noqa: B023
                    for layer in capture.layers.values()
                ])
                for v in range(len(H))
            ]  # fmt: skip
            J = torch.stack(rows)
            total = total + J.mT @ H @ J
        tokens += int((labels != -100).sum())
    model.train()
    return total / tokens


@pytest.mark.parametrize(
    ("kind", "layers"), [("gpt2", "h.1.attn.c_proj"), ("mixtral", r"layers.1.mlp.*down_proj\.1$|1.*v_proj")]
)
def test_is_the_exact_damped_inverse(tiny_lm: Models, token_batches: Batcher, kind: str, layers: str) -> None:
    model = tiny_lm("gpt2", dtype=torch.float64) if kind == "gpt2" else build(kind)
    batches = token_batches(2, length=4, size=1)[:1] + token_batches(1, length=3)
    capture = Capture(model, layers=layers)
    curvature = GaussNewton(damping=0.3, tolerance=1e-10, probes=16)
    torch.manual_seed(0)
    vectors = {name: torch.randn(2, *layer.shape, dtype=torch.float64) for name, layer in capture.layers.items()}
    solved = dict(vectors)
    with isolated(model):
        fitted = curvature.fit(capture, batches)
        products = fitted.times(vectors)
        fitted.precondition_all(solved)
    H = dense(model, batches, capture)
    flat = torch.cat([x.flatten(1) for x in vectors.values()], dim=1)
    damped = H + fitted.damping * torch.eye(len(H), dtype=torch.float64)
    torch.testing.assert_close(
        torch.cat([x.flatten(1) for x in products.values()], 1), flat @ damped, rtol=1e-4, atol=1e-7
    )
    expected = torch.linalg.solve(damped, flat.mT).mT
    torch.testing.assert_close(torch.cat([x.flatten(1) for x in solved.values()], 1), expected, rtol=1e-4, atol=1e-6)
    assert fitted.damping == pytest.approx(0.3 * H.diagonal().mean().item(), rel=0.5)


def test_factors_with_the_models_own_labels_are_close_to_it(tiny_lm: Models, token_batches: Batcher) -> None:
    """In direction and in scale; the plain product of gradients is in neither."""
    model = tiny_lm("llama", dtype=torch.float64)
    domains = {str(seed): token_batches(8, seed=seed) for seed in range(5)}
    tasks = {"t": token_batches(8, seed=9), "u": token_batches(8, seed=10)}
    exact, ekfac, kfac, none = (
        group_influence(model, domains, tasks, curvature, layers="1.mlp.down_proj").scores.ravel()
        for curvature in (
            GaussNewton(damping=1.0, tolerance=1e-2, probes=2),
            EKFAC(damping=1.0, labels="sampled"),
            KFAC(damping=1.0, labels="sampled"),
            Identity(),
        )
    )
    for scores in (ekfac, kfac):
        assert np.corrcoef(exact, scores)[0, 1] > max(0.85, np.corrcoef(exact, none)[0, 1])
        assert 0.7 < scores @ exact / (exact @ exact) < 1.6  # few sequences, of one draw each


def test_refusals_and_warnings(tiny_lm: Models, token_batches: Batcher, caplog: pytest.LogCaptureFixture) -> None:
    for settings, message in (
        ({"damping": 0.0}, "damping"),
        ({"iterations": 0}, "iterations"),
        ({"tolerance": 2.0}, "tol"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussNewton(**settings)
    model, sets = tiny_lm("llama"), ({"d": token_batches(2)}, {"t": token_batches(2, seed=1)})
    with pytest.raises(ValueError, match="needs the default loss"):
        group_influence(model, *sets, GaussNewton(), loss=lambda model, batch: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"layers with one weight: leave out model\.embed_tokens"):
        group_influence(tiny_lm("llama", tied=True), *sets, GaussNewton(), layers=Layers(embeddings=True))
    with caplog.at_level(logging.WARNING):
        group_influence(model, *sets, GaussNewton(damping=1e-4, iterations=2), layers="lm_head")
    assert "after 2 iterations the residual is still" in caplog.text
