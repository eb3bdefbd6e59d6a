import json
import random
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dynmix.harness import HarnessTasks
from dynmix.tasks import Task

YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: "{{{{choices.index(gold)}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"<s>": 256}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>")


def model():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, attention_dropout=0.2, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Two tasks of local files: name -> path, and the harness's index of them."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rng = random.Random(0)
    paths = {}
    for name, context in (("words", "Question {}\nAnswer:"), ("pairs", "")):
        paths[name] = tmp_path / f"{name}.jsonl"
        with open(paths[name], "w") as file:
            for i in range(30):
                choices = [
                    "".join(rng.choices("abcdef ", k=rng.randint(3, 20))) for _ in range(2 if not context else 4)
                ]
                choices = [(" " if context else "") + choice + str(k) for k, choice in enumerate(choices)]
                record = {"context": context.format(i), "gold": rng.choice(choices), "choices": choices, "id": str(i)}
                file.write(json.dumps(record) + "\n")
        (tmp_path / f"{name}.yaml").write_text(YAML.format(name=name, data=paths[name]))
    return paths, TaskManager(include_path=str(tmp_path), include_defaults=False)


def test_the_harness_on_the_live_model_agrees_with_our_tasks_and_leaves_no_trace(written):
    paths, manager = written
    tasks = HarnessTasks(list(paths), tokenizer(), task_manager=manager, bootstrap_iters=0)
    live = model()
    live(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    live.model.layers[0].eval()
    modes = [module.training for module in live.modules()]
    parameters = {name: (p, p.detach().clone(), p.grad, p.grad.clone()) for name, p in live.named_parameters()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    found = tasks.evaluate(nn.parallel.DataParallel(live))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [module.training for module in live.modules()] == modes
    for name, parameter in live.named_parameters():
        same, value, grad, content = parameters[name]
        assert parameter is same
        assert parameter.requires_grad
        assert parameter.grad is grad
        assert torch.equal(parameter, value)
        assert torch.equal(grad, content)
    own = {
        name: Task.from_jsonl(path, tokenizer(), max_length=64).evaluate(live).accuracy for name, path in paths.items()
    }
    assert found["words/acc_norm"] == pytest.approx(own["words"])
    assert found["pairs/acc"] == pytest.approx(own["pairs"])
    assert tasks.evaluate(live) == found


def test_other_models_and_no_tasks_are_refused():
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="takes transformers models, got Linear"):
        HarnessTasks(["words"], tokenizer()).evaluate(nn.Linear(2, 2))
    for names in ([], "words"):
        with pytest.raises(ValueError, match="give a list of at least one task"):
            HarnessTasks(names, tokenizer())


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'dynmix\[lm-eval\]'"):
        HarnessTasks(["words"], tokenizer())


FAILING = """
import sys, types
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

def simple_evaluate(*_, **__):
    if dist.get_rank() == 0:
        raise OSError("no metric")

for name, content in (("lm_eval", {"simple_evaluate": simple_evaluate}), ("lm_eval.models", {}),
                      ("lm_eval.models.huggingface", {"HFLM": dict}), ("lm_eval.tasks", {"TaskManager": dict})):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)
from dynmix.harness import HarnessTasks

dist.init_process_group("gloo")
size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **size))
try:
    HarnessTasks(["sums"], "tokenizer").evaluate(model)
except Exception as failure:
    print(f"<{dist.get_rank()} {failure}>", flush=True)
dist.barrier()
"""


def test_what_the_harness_raises_on_one_rank_is_told_to_the_others(processes, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    status, printed = processes.run(tmp_path / "failing.py", ranks=2, timeout=60)
    assert status == 0, printed
    assert "<0 no metric>" in printed
    assert "<1 another rank failed: OSError: no metric>" in printed
