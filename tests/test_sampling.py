"""What is refused before a run; what one evaluates and keeps is in `callbacks/test_automixer.py`."""

from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynmix.callbacks import MixtureHook
from dynmix.mixers import AutoMixer
from dynmix.mixture.dataset import MixtureDataset
from tests.small import Bigram

TINY = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


PACKED = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
BLOCKS = {"attention_mask": torch.block_diag(*[torch.ones(3, 3)] * 2).tril()[None, None].bool()}
LEFT_PADDED = {
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]),
    "position_ids": torch.tensor([[1, 1, 0, 1, 2, 3]]),
}


@pytest.mark.parametrize(("extra", "refused"), [(PACKED, True), (BLOCKS, True), (LEFT_PADDED, False), ({}, False)])
def test_a_task_of_packed_documents_is_refused_as_it_would_be_scored_as_one(extra, refused):
    batch = {"input_ids": torch.arange(6)[None], "labels": torch.arange(6)[None], **extra}
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    dataset = MixtureDataset({"code": [{"input_ids": [1, 2, 3, 4]}] * 50}, num_samples=64, sequence_length=4)
    with pytest.raises(ValueError, match=r"tasks\['code'\] packs several documents") if refused else nullcontext():
        MixtureHook(model, dataset, {"code": [batch]}, AutoMixer(), stage_steps=4)


def test_items_that_draw_random_numbers_leave_the_training_its_own():
    class Drawing:
        def __len__(self):
            return 50

        def __getitem__(self, row):
            return {"input_ids": torch.randint(0, TINY["vocab_size"], (4,))}

    model = LlamaForCausalLM(LlamaConfig(**TINY))
    dataset = MixtureDataset({"code": Drawing()}, num_samples=64)
    batch = {"input_ids": torch.arange(6)[None]}
    hook = MixtureHook(model, dataset, {"code": [batch]}, AutoMixer(), stage_steps=4)
    before = torch.get_rng_state()
    hook.controller.sampler.rehearse(model, hook.controller.measurement.scored_of_each())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_whose_first_sequences_have_no_label_begins(tmp_path):
    masked = {"input_ids": [1, 2, 3, 4], "labels": [-100] * 4}
    rows = [masked, *({"input_ids": [k, 2, 3, 4]} for k in range(5, 35))]
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    dataset = MixtureDataset({"code": rows, "web": rows}, num_samples=64)
    task = {"code": [{"input_ids": torch.arange(6)[None]}]}
    hook = MixtureHook(model, dataset, task, AutoMixer(), stage_steps=4, output=tmp_path)
    hook.controller.plan(batch_size=4)
    hook.controller.begin(model)


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from dynmix import AutoMixer, MixtureDataset
from dynmix.callbacks import MixtureHook
from dynmix.measurement import Measurement
dist.init_process_group("gloo")

def failing(*args):
    raise OSError(5, "Input/output error")

model = LlamaForCausalLM(LlamaConfig(**TINY))
fully_shard(model)
dataset = MixtureDataset({"code": [{"input_ids": [1, 2, 3, 4]}] * 50}, num_samples=64, sequence_length=4)
task = {"code": [{"input_ids": torch.arange(6)[None]}]}
hook = MixtureHook(model, dataset, task, AutoMixer(), stage_steps=4, batch_size=4, output=sys.argv[1])
if dist.get_rank():
    Measurement.scored_of_each = failing
try:
    hook.controller.begin(model)
except Exception as failure:
    print(f"<{dist.get_rank()} {failure}>", flush=True)
dist.barrier()
"""


def test_where_a_rank_cannot_read_what_a_sharded_model_rehearses_on_all_raise(processes, tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED.replace("**TINY", f"**{TINY}"))
    status, printed = processes.run(tmp_path / "sharded.py", tmp_path / "run", ranks=2, timeout=60)
    assert status == 0, printed
    assert "<0 another rank failed: OSError: [Errno 5] Input/output error>" in printed
    assert "<1 [Errno 5] Input/output error>" in printed


TWO_RANKS = """
import sys, time, torch, torch.distributed as dist
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
import dynmix.sampling
from dynmix import AutoMixer, MixtureDataset
from dynmix.callbacks import MixtureHook
dist.init_process_group("gloo")
rank, folder, written = dist.get_rank(), Path(sys.argv[1]), dynmix.sampling.write_snapshot

def slowly(*args):
    time.sleep(rank == 0)
    written(*args)

def scored(dataset, tasks, sources, out, **options):
    (folder / f"rank-{rank}").write_text(repr([source.step for source in sources]))
    raise ValueError("that is all")

dynmix.sampling.write_snapshot, dynmix.sampling.score_corpus = slowly, scored
model = LlamaForCausalLM(LlamaConfig(**TINY))
dataset = MixtureDataset({"code": [{"input_ids": [1, 2, 3, 4]}] * 50}, num_samples=64, sequence_length=4)
task = {"code": [{"input_ids": torch.arange(6)[None]}]}
sampler = MixtureHook(model, dataset, task, AutoMixer(checkpoints=2), stage_steps=4).controller.sampler
sampler.begin(folder, 0)
sampler.evaluate(model, 2, wanted=True)
try:
    sampler.scores(model, 3, 64)
except ValueError as problem:
    assert str(problem) == "that is all", problem
"""


def test_every_rank_scores_by_the_checkpoint_that_rank_0_has_just_written(processes, tmp_path):
    (tmp_path / "two.py").write_text(TWO_RANKS.replace("**TINY", f"**{TINY}"))
    status, printed = processes.run(tmp_path / "two.py", tmp_path, ranks=2)
    assert status == 0, printed
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["[2, 3]"] * 2


READING = """
import sys, time, torch, torch.distributed as dist
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
import dynmix.sampling
from dynmix import AutoMixer, MixtureDataset
from dynmix.callbacks import MixtureHook
dist.init_process_group("gloo")
rank, folder, read = dist.get_rank(), Path(sys.argv[1]), dynmix.sampling.read_scores
seen_from = time.monotonic() + 3 * rank

class Late(dynmix.sampling.ScoreFolder):  # as on a disk of which this machine knows that a file was not there
    @property
    def missing(self):
        return super().missing or ([0] if time.monotonic() < seen_from else [])

def failing(out):
    if Late(out).missing or (rank == 1 and sys.argv[2] == "broken"):
        raise OSError(5, "Input/output error")
    return read(out)

dynmix.sampling.ScoreFolder, dynmix.sampling.read_scores = Late, failing
model = LlamaForCausalLM(LlamaConfig(**TINY))
dataset = MixtureDataset({"code": [{"input_ids": [1, 2, 3, 4]}] * 50}, num_samples=64, sequence_length=4)
task = {"code": [{"input_ids": torch.arange(6)[None]}]}
sampler = MixtureHook(model, dataset, task, AutoMixer(), stage_steps=4).controller.sampler
sampler.begin(folder, 0)
try:
    print(f"<{rank} {len(sampler.scores(model, 3, 64).row)}>", flush=True)
except Exception as failure:
    print(f"<{rank} {failure}>", flush=True)
dist.barrier()
"""


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("late", ["<0 50>", "<1 50>"]),
        ("broken", ["<0 another rank failed: OSError: [Errno 5] Input", "<1 [Errno 5] Input"]),
    ],
)
def test_every_rank_reads_the_scores_or_none(processes, tmp_path, how, told):
    (tmp_path / "reading.py").write_text(READING.replace("**TINY", f"**{TINY}"))
    status, printed = processes.run(tmp_path / "reading.py", tmp_path, how, ranks=2, timeout=120)
    assert status == 0, printed
    for words in told:
        assert words in printed


BEGINNING = """
import sys, torch, torch.distributed as dist
from pathlib import Path
import dynmix.sampling
from dynmix import AutoMixer, MixtureDataset
from dynmix.callbacks import MixtureHook
from tests.small import Bigram
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])

def failing(*args, **kwargs):
    raise OSError(5, "Input/output error")

dataset = MixtureDataset({"code": [{"input_ids": [1, 2, 3, 4]}] * 50}, num_samples=64, sequence_length=4)
task = {"code": [{"input_ids": torch.arange(6)[None]}]}
sampler = MixtureHook(Bigram(), dataset, task, AutoMixer(checkpoints=2), stage_steps=4).controller.sampler
for owner, name, where in ((dynmix.sampling, "PeakSnapshots", 1), (dynmix.sampling.shutil, "rmtree", 0)):
    whole = getattr(owner, name)
    if rank == where:
        setattr(owner, name, failing)
    try:
        sampler.begin(folder, 2)
    except Exception as failure:
        print(f"<{rank} {name}: {failure}>", flush=True)
    setattr(owner, name, whole)
dist.barrier()
"""


def test_where_the_files_of_a_run_fail_as_it_begins_on_one_rank_all_raise(processes, tmp_path):
    (tmp_path / "checkpoints" / "step-0000004").mkdir(parents=True)
    (tmp_path / "beginning.py").write_text(BEGINNING)
    status, printed = processes.run(tmp_path / "beginning.py", tmp_path, ranks=2, timeout=60)
    assert status == 0, printed
    for name, where in (("PeakSnapshots", 1), ("rmtree", 0)):
        assert f"<{where} {name}: [Errno 5] Input/output error>" in printed
        assert f"<{1 - where} {name}: another rank failed: OSError: [Errno 5] Input/output error>" in printed


def test_a_copy_that_somebody_made_of_a_checkpoint_is_theirs(tmp_path):
    copy = tmp_path / "checkpoints" / "step-0000002-best"
    copy.mkdir(parents=True)
    dataset = MixtureDataset({"code": [{"input_ids": [1, 2, 3, 4]}] * 50}, num_samples=64, sequence_length=4)
    task = {"code": [{"input_ids": torch.arange(6)[None]}]}
    sampler = MixtureHook(Bigram(), dataset, task, AutoMixer(checkpoints=2), stage_steps=4).controller.sampler
    sampler.begin(tmp_path, 0)
    sampler.saved(3, wanted=False)
    assert copy.is_dir()


def test_only_what_is_no_view_is_said_to_be_in_no_group(tmp_path, caplog):
    rows = [{"input_ids": [1, 2, 3, 4]}] * 50
    dataset = MixtureDataset({"code": rows}, num_samples=64)
    model, task = LlamaForCausalLM(LlamaConfig(**TINY)), {"code": [{"input_ids": torch.arange(6)[None]}]}
    sampler = MixtureHook(model, dataset, task, AutoMixer(), stage_steps=4).controller.sampler
    dataset.extend({"group:code": ([0, 0], [3, 4])}, tmp_path / "groups")
    sampler.begin(tmp_path, 0)
    sampler.scores(model, 3, 64)
    assert "not scored" not in caplog.text
    dataset.extend({"late": rows[:9]})
    sampler.scores(model, 4, 64)
    assert "domains ['late'] joined the run and are not scored" in caplog.text


OTHERS = """
import sys, torch, torch.distributed as dist
from pathlib import Path
import dynmix.sampling
from dynmix import AutoMixer, MixtureDataset
from dynmix.callbacks import MixtureHook
from tests.small import Bigram
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])

def scored(*args, **options):
    if rank == 1:
        raise OSError(5, "Input/output error")
    raise dynmix.sampling.OtherConfiguration("another layer")

dynmix.sampling.score_corpus = scored
dataset = MixtureDataset({"code": [{"input_ids": [1, 2, 3, 4]}] * 50}, num_samples=64, sequence_length=4)
task = {"code": [{"input_ids": torch.arange(6)[None]}]}
sampler = MixtureHook(Bigram(), dataset, task, AutoMixer(), stage_steps=4).controller.sampler
sampler.begin(folder, 0)
try:
    sampler.scores(Bigram(), 3, 64)
except Exception as failure:
    print(f"<{rank} {failure}>", flush=True)
assert dynmix.sampling.from_rank_0(rank) == 0  # and the next that they do together is the same on both
"""


def test_a_rank_that_cannot_score_is_heard_where_another_finds_other_scores(processes, tmp_path):
    (tmp_path / "others.py").write_text(OTHERS)
    status, printed = processes.run(tmp_path / "others.py", tmp_path, ranks=2, timeout=60)
    assert status == 0, printed
    assert "<0 another rank failed: OSError: [Errno 5] Input/output error>" in printed
    assert "<1 [Errno 5] Input/output error>" in printed
