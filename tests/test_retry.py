"""Bad luck in a measurement, brought about for real: none of it ends the run, and the journal says what happened."""

import json
import re
import textwrap
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from dynmix import EKFAC, MixtureController, MixtureDataset, TiKMiXD
from dynmix.journal import Journal
from dynmix.retry import within_memory

BATCH = 4


class Unlucky(nn.Module):
    """A bigram model: logits are a linear layer on an embedding. `room` sequences fit into its memory."""

    def __init__(self, room: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)
        self.room, self.calls = room, 0

    def forward(self, input_ids):
        self.calls += 1
        if self.room is not None and len(input_ids) > self.room:
            torch.empty(2**60, dtype=torch.uint8)  # what the CPU's allocator has to say
        return self.head(self.embedding(input_ids))

    def get_input_embeddings(self):
        return self.embedding


def sequences(domain: int, rows: int):
    return [{"input_ids": torch.tensor([domain, 2 + row % 60, row // 60, 3, 4])} for row in range(rows)]


def controller(output, tasks=None, **options):
    domains = {"a": sequences(0, 200), "b": sequences(63, 300)}
    data = MixtureDataset(domains, {"a": 0.5, "b": 0.5}, num_samples=100, block=BATCH)
    sizes = {"probe_sequences": 10, "curvature_sequences": 20, "task_sequences": 12}
    options = {"stage_steps": 5, "keep": 0} | sizes | options
    return MixtureController(data, tasks or {"t": sequences(0, 6)}, TiKMiXD(confidence=0), output=output, **options)


def run(loop, model, steps=9, before=lambda step: None):
    loop.plan(batch_size=BATCH)
    loop.begin(model)
    for step in range(1, steps + 1):
        before(step)
        loop.step_ended(model, step)
    return Journal(loop.folder.path / "journal.jsonl").rows()


def test_out_of_memory_halves_the_batches_for_the_rest_of_the_run(tmp_path):
    given = [{"input_ids": torch.stack([row["input_ids"] for row in sequences(0, 5)])}]  # a batch larger than ours
    loop = controller(tmp_path / "tight", {"t": given}, micro_batch=4)
    rows = run(loop, Unlucky(room=1))
    assert [row["error"] for row in rows] == [None, None, None]
    told = [[words for words in row["warnings"] if "out of memory" in words] for row in rows]
    assert [len(some) for some in told] == [2, 0, 0]
    assert "starts again with at most 2 sequences a batch" in told[0][0]
    assert "can't allocate memory" in told[0][1]

    wide = run(controller(tmp_path / "wide", {"t": given}, micro_batch=4), Unlucky())
    for one, other in zip(rows[1:], wide[1:], strict=True):
        np.testing.assert_allclose(one["influence"], other["influence"], rtol=1e-4)
        assert other["warnings"] == []

    again = controller(tmp_path / "tight", {"t": given}, micro_batch=4)
    again.load_state_dict(json.loads(json.dumps(loop.state_dict())))
    assert again.measurement.micro_batch == 1
    assert {len(batch["input_ids"]) for batch in again.measurement.sets["t"]} == {1}


def test_out_of_memory_with_a_single_sequence_keeps_the_weights(tmp_path):
    model = Unlucky()

    def before(step):
        model.room = 0 if step == 4 else None

    rows = run(controller(tmp_path, micro_batch=2), model, before=before)
    assert "can't allocate memory" in rows[1]["error"]
    assert rows[1]["weights"] == rows[0]["weights"]
    assert [sum("out of memory" in words for words in row["warnings"]) for row in rows] == [0, 1, 0]
    assert not any(rows[1]["error"] in words for words in rows[1]["warnings"])  # once in a row
    assert rows[2]["error"] is None
    assert rows[2]["influence"] is not None


def test_a_measurement_that_starts_twice_averages_the_factors_it_carries_on_once(tmp_path):
    plain = run(controller(tmp_path / "plain", curvature=EKFAC(ema=0.5, refresh_every=2)), Unlucky(), steps=19)
    model, fit = Unlucky(), EKFAC.fit
    done = []

    class Late(EKFAC):
        """Memory runs out when the second fit is through."""

        def fit(self, *arguments):
            fitted = fit(self, *arguments)
            done.append(1)
            if len(done) == 2:
                model.room = 4
            return fitted

    rows = run(controller(tmp_path / "late", curvature=Late(ema=0.5, refresh_every=2)), model, steps=19)
    assert [sum("out of memory" in words for words in row["warnings"]) for row in rows] == [0, 0, 0, 1, 0]
    for one, other in zip(rows[1:], plain[1:], strict=True):
        np.testing.assert_allclose(one["influence"], other["influence"], rtol=1e-4)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_keeps_the_weights_and_is_named(tmp_path, poison):
    model = Unlucky()
    clean = model.embedding.weight.detach().clone()
    loop = controller(tmp_path)

    def before(step):
        with torch.no_grad():
            model.embedding.weight.copy_(clean)
            if step == 4:
                model.embedding.weight[63] = poison  # the first token of every sequence of b, and of none of a or t

    rows = run(loop, model, before=before)
    assert rows[1]["error"] == "ArithmeticError: the influence on t, held-out is not finite"
    assert rows[1]["weights"] == rows[0]["weights"]
    assert [score is None for score in rows[1]["influence"][0]] == [False, True]
    assert "domain 'b': a loss or gradient is not finite, its influence is NaN" in rows[1]["warnings"]
    assert "curvature: 10 of 20 sequences are not finite and were left out" in rows[1]["warnings"]
    assert (rows[2]["error"], rows[2]["warnings"]) == (None, [])
    assert None not in rows[2]["influence"][0]


def test_of_a_set_of_one_sequence_the_score_is_known_and_its_error_is_not(tmp_path):
    rows = run(controller(tmp_path, {"t": sequences(0, 1)}), Unlucky(), steps=4)
    assert all(np.isfinite(rows[1]["influence"][0]))
    assert rows[1]["standard_error"][0] == [None, None]
    assert rows[1]["weights"] == rows[0]["weights"]
    assert "weights kept" in rows[1]["message"]
    assert rows[1]["error"] is None


def test_other_failures_are_not_tried_again():
    calls = []

    def measure():
        calls.append(1)
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        within_memory(measure, lambda: 1)
    assert len(calls) == 1


def test_what_a_failed_attempt_held_is_free_before_the_next():
    seen, left = [], [True]

    def measure():
        tensor = torch.zeros(3)
        seen.append(weakref.ref(tensor))
        cycle = [tensor]
        cycle.append(cycle)
        if left and left.pop():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return seen[0]() is None

    assert within_memory(measure, lambda: 4)


def test_a_side_whose_eigenvectors_cannot_be_found_keeps_its_own_basis(tmp_path, monkeypatch):
    model = Unlucky()
    real = torch.linalg.eigh

    def fails(matrix):
        if len(matrix) == 64:  # the head's outputs; those of its inputs are found
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return real(matrix)

    def before(step):
        monkeypatch.setattr(torch.linalg, "eigh", fails if step == 4 else real)

    rows = run(controller(tmp_path, guards=None), model, before=before)  # of two domains a guard lets neither go
    assert [row["error"] for row in rows] == [None, None, None]
    assert rows[1]["warnings"] == [
        "curvature: no eigenvectors found for the outputs of 'head', it is seen in its own basis"
    ]
    assert rows[2]["warnings"] == []
    assert np.isfinite(np.array(rows[1]["influence"], dtype=float)).all()
    assert rows[1]["weights"] != rows[0]["weights"]


def test_where_one_rank_runs_out_of_memory_all_of_them_start_again(processes, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent("""
        import torch
        import torch.distributed as dist
        from torch import nn
        from dynmix import EKFAC, group_influence
        from dynmix.retry import within_memory

        dist.init_process_group("gloo")
        rank = dist.get_rank()

        class Bigram(nn.Sequential):
            def forward(self, input_ids):
                if rank == 1 and len(input_ids) > 2:
                    torch.empty(2**60, dtype=torch.uint8)
                return super().forward(input_ids)

        torch.manual_seed(0)
        model, ids = Bigram(nn.Embedding(16, 4), nn.Linear(4, 16)), torch.randint(0, 16, (32, 5))
        size = 4

        def shrink():
            global size
            size //= 2
            return size or None

        def measure():
            sets = [[{"input_ids": some} for some in part.split(size)] for part in ids.split(16)]
            return group_influence(model, {"d": sets[0]}, {"t": sets[1]}, EKFAC(), over_ranks=True)

        found = within_memory(measure, shrink)
        dist.destroy_process_group()
        print(f"<{rank} {size} {found.scores.item():.9g}>", flush=True)
        """)
    )
    status, printed = processes.run(script, ranks=2)
    assert status == 0, printed
    found = re.findall(r"<(\d) (\d) (\S+)>", printed)
    assert sorted(rank for rank, _, _ in found) == ["0", "1"], printed
    assert {size for _, size, _ in found} == {"2"}
    assert len({score for _, _, score in found}) == 1
