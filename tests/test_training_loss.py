import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from dynmix import MixtureDataset
from dynmix.training_loss import TrainingLoss, detach_earlier, token_losses
from tests.small import Bigram

BATCH = 6


def dataset(samples: int = 24) -> MixtureDataset:
    domains = {
        name: [{"input_ids": torch.tensor([i, row % 64, row // 64, 3 * i, 4])} for row in range(40)]
        for i, name in enumerate(("a", "b", "unused"))
    }
    return MixtureDataset(domains, {"a": 0.6, "b": 0.4, "unused": 0.0}, num_samples=samples, block=BATCH)


def slow_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Loss of each token [T - 1], a token at a time."""
    with torch.no_grad():  # or it would be watched
        logits = model(ids[None])[0].double()
    return torch.stack([torch.logsumexp(z, 0) - z[y] for z, y in zip(logits[:-1], ids[1:], strict=True)])


def test_a_steps_losses_by_domain_are_those_of_its_samples():
    data, model, reference = dataset(), Bigram(0), Bigram(1)
    watch = TrainingLoss(data, reference)
    watch.attach(model)
    watch.attach(model)
    for step in (1, 2):
        positions = range((step - 1) * BATCH, step * BATCH)
        for half in (positions[3:], positions[:3]):  # in any order, in two micro-batches
            model(torch.stack([data[g]["input_ids"] for g in half])).sum().backward()
        seen = watch.take(step, BATCH)
        expected: dict[str, list] = {}
        for g in positions:
            ids, name = data[g]["input_ids"], data.domains[data[g]["domain"]]
            expected.setdefault(name, []).append((slow_losses(model, ids), slow_losses(reference, ids)))
        assert seen.step == step
        assert set(seen.loss) == set(expected)
        assert "unused" not in seen.loss
        for name, parts in expected.items():
            own, other = (torch.cat(x).detach() for x in zip(*parts, strict=True))
            assert seen.tokens[name] == len(own)
            assert seen.loss[name] == pytest.approx(float(own.mean()), rel=1e-5)
            assert seen.reference_loss[name] == pytest.approx(float(other.mean()), rel=1e-5)
            assert seen.excess_loss[name] == pytest.approx(float((own - other).clamp(min=0).mean()), rel=1e-4)
    assert watch.take(3, BATCH) is None


def test_evaluations_are_not_training_and_after_detaching_nothing_is_seen():
    data, model = dataset(), Bigram(0)
    watch = TrainingLoss(data)
    watch.attach(model)
    batch = torch.stack([data[g]["input_ids"] for g in range(BATCH)])
    model.eval()(batch)
    with torch.no_grad():
        model.train()(batch)
    assert watch.take(1, BATCH) is None
    watch.detach()
    model(batch)
    assert watch.take(1, BATCH) is None


def test_a_copy_of_the_model_is_not_watched_and_holds_no_data(tmp_path):
    data = dataset()
    model, losses = Bigram(), TrainingLoss(data, reference=Bigram())
    losses.attach(model)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        [hook] = twin._forward_hooks.values()
        assert not vars(hook.__self__)
        twin.train()(input_ids=torch.stack([data[i]["input_ids"] for i in range(4)]))
    assert losses.take(1, 4) is None
    model.train()(input_ids=torch.stack([data[i]["input_ids"] for i in range(4)]))
    assert losses.take(1, 4) is not None


def test_a_sequence_of_another_step_is_refused():
    data, model = dataset(), Bigram(0)
    watch = TrainingLoss(data)
    watch.attach(model)
    model(data[BATCH + 1]["input_ids"][None])
    with pytest.raises(ValueError, match="none of the samples 0 to 5 of"):
        watch.take(1, BATCH)


def test_logits_behind_the_loss_of_a_tuple_are_those_alone():
    """What transformers' models return with return_dict=False, and many models of one's own."""

    class Tuple(Bigram):
        def forward(self, input_ids, labels):
            logits = super().forward(input_ids)
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits

    data, seen = dataset(), []
    batch = torch.stack([data[g]["input_ids"] for g in range(BATCH)])
    for model, labels in ((Bigram(0), {}), (Tuple(0), {"labels": batch})):
        watch = TrainingLoss(data)
        watch.attach(model)
        model(input_ids=batch, **labels)
        seen.append(watch.take(1, BATCH))
    assert seen[0] == seen[1]


def test_a_model_without_logits_says_so():
    class Fused(Bigram):
        def forward(self, input_ids):
            return super().forward(input_ids).sum()

    data, model = dataset(), Fused(0)
    TrainingLoss(data).attach(model)
    with pytest.raises(ValueError, match="returned no logits"):
        model(data[0]["input_ids"][None])


def test_log_probabilities_in_place_of_logits_are_as_good():
    class Fused(Bigram):
        def forward(self, input_ids, labels):
            per_token = token_losses(super().forward(input_ids), labels[:, 1:])
            return SimpleNamespace(log_probs=-per_token, loss=per_token.sum())

    seen = []
    for model in (Bigram(0), Fused(0)):
        data = dataset()
        watch = TrainingLoss(data)
        watch.attach(model)
        ids = torch.stack([data[g]["input_ids"] for g in range(BATCH)])
        model(ids, labels=ids) if isinstance(model, Fused) else model(ids)
        seen.append(watch.take(1, BATCH))
    assert seen[0] == seen[1]


def test_tokens_that_a_loop_keeps_out_of_the_loss_itself_are_warned_of_once(caplog):
    rows = [{"input_ids": torch.tensor([1, row, 2, 3, 4])} for row in range(40)]
    for ignored, warned in (((), 0), ((4,), 1)):
        data = MixtureDataset({"a": rows}, num_samples=24, block=BATCH, ignore_token_ids=ignored)
        model = Bigram(0)
        TrainingLoss(data).attach(model)
        for _ in range(2):
            model(torch.stack([data[g]["input_ids"] for g in range(BATCH)]))
        assert sum("label_smoothing_factor" in record.message for record in caplog.records) == warned


def test_token_losses_leave_out_ignored_labels():
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[1, -100, 3, 2], [0, 1, -100, -100]])
    found = token_losses(logits, labels)
    assert found.shape == (2, 4)
    assert float(found.sum()) == pytest.approx(
        float(F.cross_entropy(logits[:, :4].flatten(0, 1), labels.flatten(), reduction="sum")), rel=1e-6
    )
    assert (found[labels == -100] == 0).all()


def test_a_reference_that_cannot_be_loaded_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no model that transformers can load"):
        TrainingLoss(dataset(), tmp_path)


def test_what_an_interrupted_run_left_on_a_model_is_taken_off():
    data, model = dataset(), Bigram(0)
    earlier, watch = TrainingLoss(data), TrainingLoss(data)
    earlier.attach(model)
    detach_earlier(nn.Sequential(model))
    watch.attach(model)
    model(data[0]["input_ids"][None])
    assert earlier.take(1, BATCH) is None
    assert watch.take(1, BATCH) is not None
