"""What is said to be needed, beside what is alive in a measurement at its peak."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynmix import EKFAC, KFAC, AdamDiagonal, DataInf, Identity, group_influence
from dynmix.influence.memory import _Alive, peak_memory, size_in_words


def llama(width: int, inner: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )


def batches(vocabulary: int, sequences: int, size: int, length: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (sequences, length), generator=generator)
    return [{"input_ids": some} for some in ids.split(size)]


def alive(model: Any, domains: int, tasks: int, curvature: Any, *form: int, **options: Any) -> int:
    sets = {str(i): batches(*form, seed=i) for i in range(domains + tasks)}
    counter = _Alive()
    with counter:
        group_influence(
            model,
            {name: sets[name] for name in list(sets)[:domains]},
            {name: sets[name] for name in list(sets)[domains:]},
            curvature,
            **options,
        )
    return counter.peak


@pytest.mark.parametrize(
    ("width", "inner", "vocabulary", "domains", "tasks", "size", "length"),
    [
        (64, 128, 64, 4, 3, 1, 8),  # gradients
        (32, 48, 1200, 1, 1, 4, 32),  # the batch, and of it the logits
        (32, 48, 512, 1, 1, 1, 8),  # one side of the head
    ],
)
def test_it_is_what_is_alive_at_the_peak(width, inner, vocabulary, domains, tasks, size, length):
    model, curvature = llama(width, inner, vocabulary), EKFAC()
    [sequence] = batches(vocabulary, 1, 1, length, seed=0)
    said = peak_memory(model, sequence, domains=domains, tasks=tasks, micro_batch=size, curvature=curvature)
    found = alive(model, domains, tasks, curvature, vocabulary, size, size, length)
    assert said.alive == pytest.approx(found, rel=0.25)


@pytest.mark.parametrize("curvature", [DataInf(), Identity(), KFAC()])
def test_it_knows_what_a_curvature_keeps(curvature):
    model = llama(48, 64, 64)
    [sequence] = batches(64, 1, 1, 8, seed=0)
    said = peak_memory(model, sequence, domains=3, tasks=1, micro_batch=1, curvature=curvature)
    assert said.alive == pytest.approx(alive(model, 3, 1, curvature, 64, 1, 1, 8), rel=0.25)


@pytest.mark.parametrize("options", [{"rank": 2}, {"layer_groups": 2, "rank": 2}])
def test_it_knows_the_ways_to_take_less(options):
    model = llama(48, 64, 64)
    [sequence] = batches(64, 1, 1, 8, seed=0)
    whole, less = (
        peak_memory(model, sequence, domains=1, tasks=3, micro_batch=1, curvature=Identity(), **some)
        for some in ({}, options)
    )
    assert less.alive < 0.8 * whole.alive
    assert less.alive == pytest.approx(alive(model, 1, 3, Identity(), 64, 1, 1, 8, **options), rel=0.25)


def test_it_does_not_depend_on_the_number_of_sequences():
    model = llama(48, 64, 64)
    few, many = (alive(model, 1, 1, EKFAC(), 64, n, 1, 8) for n in (1, 6))
    assert many == pytest.approx(few, rel=0.1)


def test_adams_moments_are_counted_and_the_model_is_left_as_it_was():
    model = llama(32, 48, 64).train()
    [sequence] = batches(64, 1, 1, 8, seed=0)
    before = [(p.requires_grad, p.grad) for p in model.parameters()]
    said = peak_memory(model, sequence, domains=2, tasks=1, micro_batch=4, curvature=AdamDiagonal({}))
    assert said.factors == 4 * sum(p.numel() for p in model.parameters())
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == before
    assert model.training
    assert "beside the model (of these, not all at once: " in str(said)
    assert "a batch of 4 0.1 MiB" in str(said)
    assert f"the allocator {size_in_words(said.heap)}" in str(said)
