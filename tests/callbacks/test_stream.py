"""A `MixtureStream` under the adapters."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from dynmix import MixtureStream, Static
from dynmix.callbacks import MixtureHook
from dynmix.journal import Journal
from dynmix.mixers.static import Staged
from dynmix.mixture import packed

PROBES = 20
GIVEN = [
    dict(zip(("web", "code", "noise"), row, strict=True)) for row in ([0.3, 0.2, 0.5], [0, 0.9, 0.1], [0.6, 0.4, 0])
]


@pytest.fixture
def stream(training, monkeypatch):
    """Make a stream of the domains of `training`, which its runs take instead of their own dataset."""

    def stream(seed: int = 0, samples: int = training.STEPS * training.BATCH, **options: Any) -> MixtureStream:
        given = {"batch_size": training.BATCH, "sizes": dict.fromkeys(training.DOMAINS, training.ROWS - PROBES)}
        return MixtureStream(
            {name: training.sequences(i) for i, name in enumerate(training.DOMAINS)},
            weights={"web": 0.3, "code": 0.2, "noise": 0.5},
            num_samples=samples,
            sequence_length=training.LENGTH,
            seed=seed,
            block=training.BATCH,
            **given | {"probe_sequences": PROBES} | options,
        )

    monkeypatch.setattr(training, "dataset", stream)
    return stream


def expected(training, dataset, readers: int = 1) -> list[list[int]]:
    """(domain, row) of every sample, where each of the readers takes its share of the rows in order."""
    of = [[reader] * len(training.DOMAINS) for reader in range(readers)]
    found = []
    for position, domain in enumerate(dataset.schedule.assign(0, dataset.num_samples)[0].tolist()):
        mine = of[position // training.BATCH % readers]
        while mine[domain] % training.ROWS < PROBES:
            mine[domain] += readers
        found.append([domain, mine[domain] % training.ROWS])
        mine[domain] += readers
    return found


def test_the_trainer_takes_what_the_schedule_says_and_resumes_bit_for_bit(training, stream, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_ROOM", 0)  # however little there is: it reads through all stages again
    monkeypatch.setattr(packed, "_ALWAYS", 1)
    options = {"probe_sequences": 4, "curvature_sequences": 8}
    whole = training.run(tmp_path, save_strategy="steps", save_steps=6, steps=8, options=options)
    first, second = whole.train_dataset.schedule.stages
    assert second.start == 40
    assert first.weights != second.weights
    assert whole.order == expected(training, whole.train_dataset)[: 8 * training.BATCH]
    rows = list(Journal(tmp_path / "dynmix" / "journal.jsonl").rows())
    assert [row["error"] for row in rows] == [None] * 3
    assert sum(rows[-1]["epochs"].values()) == pytest.approx(8 * training.BATCH / (training.ROWS - PROBES))

    resumed = training.run(tmp_path, steps=8, options=options, resume=str(tmp_path / "checkpoint-6"))
    assert resumed.order == whole.order[6 * training.BATCH :]
    assert facts(resumed) == facts(whole)


def facts(trained) -> Any:
    stages = [(stage.start, stage.weights) for stage in trained.train_dataset.schedule.stages]
    return stages, [value.tolist() for value in trained.model.state_dict().values()]


def test_with_workers_each_takes_its_share_of_the_rows(training, stream, tmp_path):
    trained = training.run(tmp_path, steps=8, dataloader_num_workers=2, mixer=Staged(GIVEN))
    assert trained.order == expected(training, trained.train_dataset, readers=2)[: 8 * training.BATCH]
    assert [stage.start for stage in trained.train_dataset.schedule.stages] == [0, 40]


def test_workers_of_ranks_that_are_sent_what_the_first_one_reads_have_read_ahead_at_most(training, launch, tmp_path):
    launch(tmp_path, ranks=2, script=Path(__file__).with_name("streamed.py"))
    first, second = (json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in range(2))
    half = training.BATCH // 2
    found = [
        domain
        for start in range(0, 8 * half, half)
        for domain, _ in first["order"][start : start + half] + second["order"][start : start + half]
    ]
    assert found == first["domains"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_resumes_from_the_states_of_hook_and_loader(training, stream, tmp_path, workers):
    def made():
        data, model = stream(), training.model(dropout=0.0)
        hook = MixtureHook(
            model, data, tasks=training.tasks(), mixer=Staged(GIVEN), stage_steps=training.STAGE_STEPS,
            batch_size=training.BATCH, loss_every=100,
        )  # fmt: skip
        loader = StatefulDataLoader(data, batch_size=training.BATCH, num_workers=workers)
        return hook, loader, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def steps(hook, loader, optimizer, until=None):
        order = []
        for batch in islice(loader, until):
            order += batch["input_ids"][:, :2].tolist()
            hook.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            hook.step()
        return order

    first, second = made(), made()
    order = steps(*first, until=9)  # the stage of step 10 is decided and not begun
    hook, loader, optimizer = second
    hook.load_state_dict(json.loads(json.dumps(first[0].state_dict())))
    loader.load_state_dict(json.loads(json.dumps(first[1].state_dict())))
    hook.model.load_state_dict(first[0].model.state_dict())
    optimizer.load_state_dict(first[2].state_dict())
    order += steps(*second)
    assert order == expected(training, hook.dataset, readers=max(1, workers))
    assert [stage.start for stage in hook.dataset.schedule.stages] == [0, 40, 80, 120]


def test_what_a_stream_cannot_do_is_refused(training, stream, tmp_path):
    def hook(mixer: Any = "TiKMiXD", **options: Any) -> None:
        MixtureHook(training.model(), stream(**options), tasks=training.tasks(), mixer=mixer, stage_steps=5)

    with pytest.raises(ValueError, match="pass sizes="):
        hook(sizes=None)
    with pytest.raises(ValueError, match="pass probe_sequences="):
        hook(probe_sequences=0)
    with pytest.raises(ValueError, match="gives each of them once"):
        hook(mixer="ODM")
    with pytest.raises(ValueError, match="gives each of them once"):
        hook(mixer="AutoMixer")
    hook(mixer=Static(), probe_sequences=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 4}, "it must be 8"), ({"rank": 0, "world_size": 2}, "pass world_size=1 and no rank")],
)
def test_arguments_that_do_not_fit_the_trainer_are_refused(training, stream, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(training, "dataset", lambda: stream(**options))
    with pytest.raises(ValueError, match=message):
        training.run(tmp_path, dataloader_num_workers=2)
