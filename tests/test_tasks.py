import gzip
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dynmix.batches import as_batches
from dynmix.influence.group import group_influence
from dynmix.influence.losses import task_losses
from dynmix.tasks import Task, TaskScore

BOS = 256


def bytes_tokenizer(**special):
    """A token a UTF-8 byte, but for " a" and "ab", so that tokens cross from contexts into texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"<s>": BOS, "Ġa": 257, "ab": 258, "ĊĠ": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "a"), ("a", "b"), ("Ċ", "Ġ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.enable_truncation(5)  # what a tokenizer.json may carry, and nobody wants here
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TOKENIZER = bytes_tokenizer(bos_token="<s>")
PLAIN = bytes_tokenizer()
PLAIN.backend_tokenizer.no_truncation()


def llama(positions=64, vocabulary=260, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=positions, attention_dropout=0.2, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class DictModel(nn.Module):
    """Logits of a module that is no transformers model, from `input_ids` alone."""

    def __init__(self, vocabulary=260):
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.head = nn.Embedding(vocabulary, 8), nn.Linear(8, vocabulary)

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids).cumsum(1))


def written(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def logprob(model, ids, scored):
    """Log-likelihood of the last `scored` tokens, one sequence at a time, a token at a time."""
    with torch.no_grad():
        output = model(torch.tensor([ids]))
    table = (output if isinstance(output, torch.Tensor) else output.logits)[0].double().log_softmax(-1)
    return float(sum(table[i - 1, ids[i]] for i in range(len(ids) - scored, len(ids))))


def untruncated(text):
    return PLAIN.backend_tokenizer.encode(text).ids


def reference(model, records, max_length, per_byte):
    """The definition, slowly. Returns loss, bits per byte, accuracy and the first two's values by example."""
    model = model.eval()
    losses, counts, sizes, credits = [], [], [], []

    def score(context, text):
        kept = context.rstrip()
        whole, before = untruncated(context + text), len(untruncated(kept)) if kept else 0
        if not before:
            whole, before = [BOS, *whole], 1
        n, total = len(whole) - before, 0.0
        if n + 1 <= max_length:
            return logprob(model, whole[-max_length:], n), n
        while before < len(whole):
            stop = min(before + max_length - 1, len(whole))
            total += logprob(model, whole[before - 1 : stop], stop - before)
            before = stop
        return total, n

    for record in records:
        context, gold = record.get("context", ""), record.get("gold") or record["text"]
        found, n = score(context, gold)
        losses.append(-found), counts.append(n), sizes.append(len(gold.encode()))
        if record.get("choices"):
            values = {c: score(context, c)[0] / (len(c.encode()) if per_byte else 1) for c in record["choices"]}
            best = max(values.values())
            credits.append((values[gold] == best) / sum(v == best for v in values.values()))
    accuracy = float(np.mean(credits)) if credits else None
    return sum(losses) / sum(counts), sum(losses) / np.log(2) / sum(sizes), accuracy


WORDS = st.text(alphabet="ab é漢\n", min_size=1, max_size=30)


@st.composite
def examples(draw):
    kind = draw(st.sampled_from(["choice", "pair", "none", "text"]))
    records = []
    for _ in range(draw(st.integers(1, 5))):
        if kind == "text":
            records.append({"text": draw(WORDS)})
            continue
        context = "" if kind == "pair" else draw(st.sampled_from(["", "x", "x y", "é\n", "Question: a b\nAnswer:"]))
        size = 2 if kind == "pair" else draw(st.integers(2, 4))
        texts = draw(st.lists(WORDS.map(lambda text: " z" + text), min_size=size, max_size=size, unique=True))
        choices = None if kind == "none" else texts
        records.append({"context": context, "gold": draw(st.sampled_from(texts)), "choices": choices, "id": "?"})
    return records


@given(records=examples(), max_length=st.integers(4, 40), batch_tokens=st.integers(1, 300), other=st.booleans())
@settings(max_examples=25)
def test_scores_are_those_of_one_example_at_a_time(tmp_path_factory, records, max_length, batch_tokens, other):
    path = written(tmp_path_factory.mktemp("task") / "x.jsonl", records)
    task = Task.from_jsonl(path, TOKENIZER, max_length=max_length)
    model = DictModel() if other else llama()
    pair = all(not r.get("context") and len(r.get("choices") or "12") == 2 for r in records)
    loss, bits, accuracy = reference(model, records, max_length, per_byte=not pair)
    score = task.evaluate(model, batch_tokens=batch_tokens)
    assert score.loss == pytest.approx(loss, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert score.accuracy == (None if accuracy is None else pytest.approx(accuracy))
    assert score.examples == len(records)
    batches = as_batches(task, name="x", sequence_length=8, micro_batch=3)
    assert task_losses(model, {"x": batches})[0]["x"] == pytest.approx(score.loss, rel=1e-5)
    assert max(len(example["input_ids"]) for example in task) <= max_length


def test_no_gold_token_is_lost_and_the_context_is_cut_from_the_left(tmp_path):
    records = [{"context": "0123456789", "gold": " xyz"}, {"context": "01", "gold": " pqrstuvw"}, {"text": "0123456"}]
    task = Task.from_jsonl(written(tmp_path / "x.jsonl", records), TOKENIZER, max_length=6)
    texts = [TOKENIZER.decode(e["input_ids"]) for e in task]
    golds = [TOKENIZER.decode(e["input_ids"][e["labels"] != -100]) for e in task]
    assert texts == ["89 xyz", "1 pqrs", "stuvw", "<s>01234", "456"]
    assert golds == [" xyz", " pqrs", "tuvw", "01234", "56"]
    assert all(torch.equal(e["labels"][e["labels"] != -100], e["input_ids"][e["labels"] != -100]) for e in task)
    assert [e["input_ids"].dtype for e in task] == [torch.int64] * 5


def test_white_space_that_ends_a_context_is_scored_with_the_gold(tmp_path):
    """The tokenizer merges the two: cut by count of the context's tokens, the gold would lose its first token."""
    task = Task.from_jsonl(written(tmp_path / "x.jsonl", [{"context": "f:\n", "gold": " x"}]), TOKENIZER)
    assert task[0]["input_ids"].tolist() == untruncated("f:\n x")
    assert task[0]["labels"].tolist()[2:] == [259, untruncated("x")[0]]


class Constant(nn.Module):
    """The same next-token distribution everywhere: byte `likely` has logit 3, all others 0."""

    def __init__(self, likely=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.logits = torch.zeros(260)
        if likely is not None:
            self.logits[untruncated(likely)[0]] = 3.0

    def forward(self, input_ids, attention_mask=None):
        return self.scale * self.logits.expand(*input_ids.shape, -1)


def test_an_uninformed_model_scores_chance(tmp_path):
    four = [{"context": "Q:", "gold": f" {c}", "choices": [" p", " q", " r", " s"]} for c in "pqrs"]
    pairs = [{"context": "", "gold": g, "choices": ["one way", "two way"]} for g in ("one way", "two way", "one way")]
    for records, chance in ((four, 0.25), (pairs, 0.5)):
        score = Task.from_jsonl(written(tmp_path / "x.jsonl", records), TOKENIZER).evaluate(Constant())
        assert (score.accuracy, score.accuracy_standard_error) == (chance, 0)
    mixed = [*four, {"context": "Q:", "gold": " zz", "choices": [" z", " zz", " zz", " é"]}]
    task = Task.from_jsonl(written(tmp_path / "x.jsonl", mixed), TOKENIZER)
    # " zz" is 3 tokens in 3 bytes, " é" 3 in 3, " z" 2 in 2: equally likely a byte, and the double counts once.
    assert task.evaluate(Constant(), batch_tokens=1).accuracy == pytest.approx((4 / 4 + 1 / 3) / 5)


@pytest.mark.parametrize(("metric", "accuracy"), [("choice", 1.0), ("pair", 0.0), ("auto", 0.0)])
def test_the_metric_decides_whether_length_counts(tmp_path, metric, accuracy):
    # Likelier a byte, because of its z's, and less likely as a whole, because it is longer.
    records = [{"context": "", "gold": "zzzzy", "choices": ["zzzzy", "y"]}]
    task = Task.from_jsonl(written(tmp_path / "x.jsonl", records), TOKENIZER, metric=metric)
    assert task.evaluate(Constant("z")).accuracy == accuracy


def test_pairs_with_a_context_or_of_three_are_choices(tmp_path):
    records = [{"context": "", "gold": "zzzzy", "choices": ["zzzzy", "y"]}]
    for other in ({"context": "Q:", "gold": " a", "choices": [" a", " b"]}, {"gold": "z", "choices": ["z", "u", "v"]}):
        path = written(tmp_path / "x.jsonl", [*records, {"context": "", **other}])
        assert Task.from_jsonl(path, TOKENIZER).evaluate(Constant("z")).accuracy >= 0.5


def test_bits_are_of_utf8_bytes(tmp_path):
    score = Task.from_jsonl(written(tmp_path / "x.jsonl", [{"text": "漢é"}]), TOKENIZER).evaluate(Constant())
    assert score.bits_per_byte == pytest.approx(np.log2(260))  # 5 tokens, 5 bytes, 2 characters
    merged = Task.from_jsonl(written(tmp_path / "x.jsonl", [{"text": "abab"}]), TOKENIZER).evaluate(Constant())
    assert (merged.loss, merged.bits_per_byte) == (pytest.approx(np.log(260)), pytest.approx(np.log2(260) / 2))


def test_standard_errors_are_over_examples(tmp_path):
    """Not over the pieces of one: they are of one text."""
    records = [{"text": "zzzz" * n} for n in (1, 2, 3)] + [{"text": "yx" * 6}]
    whole, cut = (
        Task.from_jsonl(written(tmp_path / "x.jsonl", records), TOKENIZER, max_length=m).evaluate(Constant("z"))
        for m in (64, 4)
    )
    assert cut == whole
    z = np.log(np.exp(3) + 259)
    residuals = np.array([*((z - 3) * np.array([4, 8, 12])), 12 * z]) - whole.loss * np.array([4, 8, 12, 12])
    assert whole.loss_standard_error == pytest.approx(np.sqrt(4 / 3 * (residuals**2).sum()) / 36)
    single = Task.from_jsonl(written(tmp_path / "x.jsonl", records), TOKENIZER, limit=1).evaluate(Constant())
    assert single.loss_standard_error == np.inf


def test_evaluating_leaves_no_trace(tmp_path):
    records = [{"context": "Q:", "gold": " p", "choices": [" p", " qq"]}]
    task, model = Task.from_jsonl(written(tmp_path / "x.jsonl", records), TOKENIZER), llama().train()
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = task.evaluate(nn.parallel.DataParallel(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(p.grad, g) and p.requires_grad for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(value, parameters[name]) for name, value in model.state_dict().items())
    assert task.evaluate(model.eval()) == first  # without dropout


def test_logits_are_computed_only_where_a_token_is_scored(tmp_path):
    shapes = []
    model = llama()
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(list(output.shape[:2])))
    records = [{"context": "0123456789", "gold": f" {c}"} for c in "pq"]
    Task.from_jsonl(written(tmp_path / "x.jsonl", records), TOKENIZER).evaluate(model)
    assert shapes == [[2, 3]]


def test_choices_become_tokens_once_and_when_they_are_needed(tmp_path):
    calls = []

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, text, **kwargs):
            calls.append(len(text))
            return super().__call__(text, **kwargs)

    tokenizer = Counting(tokenizer_object=TOKENIZER.backend_tokenizer, bos_token="<s>")
    records = [{"context": f"{i}:", "gold": " p", "choices": [" p", " q", " r"]} for i in range(5)]
    task = Task.from_jsonl(written(tmp_path / "x.jsonl", records), tokenizer)
    assert calls == [10]
    task.evaluate(llama())
    task.evaluate(llama(seed=1))
    assert calls == [10, 15]


def test_limit_takes_examples_evenly_spread_over_the_file(tmp_path):
    path = written(tmp_path / "some.task.jsonl.gz", [{"text": c} for c in "0123456789"])
    task = Task.from_jsonl(path, TOKENIZER, limit=4)
    assert [record.gold for record in task.records] == ["0", "2", "5", "7"]
    assert len(Task.from_jsonl(path, TOKENIZER, limit=99)) == 10
    assert (task.name, Task.from_jsonl(path, TOKENIZER, name="n").name) == ("some.task", "n")
    fingerprints = {
        Task.from_jsonl(path, TOKENIZER).fingerprint,
        Task.from_jsonl(path, bytes_tokenizer(bos_token="<s>", eos_token="a")).fingerprint,
        Task.from_jsonl(path, bytes_tokenizer(bos_token="Q")).fingerprint,
        task.fingerprint,
    }
    assert len(fingerprints) == 3


def test_it_is_an_objective_of_influence(tmp_path):
    records = [{"context": "Q: ab", "gold": f" {c}"} for c in "pqr"]
    task, model = Task.from_jsonl(written(tmp_path / "x.jsonl", records), TOKENIZER), llama()
    batches = as_batches(task, name="x", sequence_length=8, micro_batch=2)
    text = Task.from_jsonl(written(tmp_path / "y.jsonl", [{"text": "ab ab"}, {"text": "zz"}]), TOKENIZER)
    found = group_influence(model, {"y": as_batches(text, name="y", sequence_length=8, micro_batch=2)}, {"x": batches})
    assert found.task_loss == pytest.approx([task.evaluate(model).loss], rel=1e-5)


def test_a_gold_that_adds_no_token_is_named_with_file_and_line(tmp_path):
    path = written(tmp_path / "x.jsonl", [{"text": "fine"}, {"context": "a", "gold": "b"}])
    with pytest.raises(ValueError, match="x.jsonl, line 2: its gold or one of its choices adds no token"):
        Task.from_jsonl(path, TOKENIZER)


def test_impossible_arguments_and_files_are_refused(tmp_path):
    path = written(tmp_path / "x.jsonl", [{"text": "abc"}])
    for arguments, message in (
        ({"max_length": 1}, "max_length=1"),
        ({"limit": 0}, "limit=0"),
        ({"metric": "best"}, "metric='best'"),
        ({"metric": "pair"}, "has choices"),
        ({"tokenizer": str(tmp_path)}, "tokenizer="),
        ({"tokenizer": bytes_tokenizer()}, "x.jsonl, line 1: an empty context needs"),
    ):
        with pytest.raises(ValueError, match=message):
            Task.from_jsonl(path, **{"tokenizer": TOKENIZER} | arguments)
    with pytest.raises(ValueError, match="no examples"):
        Task.from_jsonl(written(tmp_path / "empty.jsonl", []), TOKENIZER)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 9999)[:60])
    with pytest.raises(ValueError, match="cut.jsonl.gz, after line .*damaged or truncated"):
        Task.from_jsonl(tmp_path / "cut.jsonl.gz", TOKENIZER)
    with pytest.raises(FileNotFoundError):
        Task.from_jsonl(tmp_path / "none.jsonl", TOKENIZER)
    with pytest.raises(ValueError, match="batch_tokens=0"):
        Task.from_jsonl(path, TOKENIZER).evaluate(llama(), batch_tokens=0)


def test_an_eos_token_does_where_there_is_no_bos(tmp_path):
    path = written(tmp_path / "x.jsonl", [{"text": "q"}])
    assert Task.from_jsonl(path, bytes_tokenizer(eos_token="<s>"))[0]["input_ids"][0] == BOS


def test_a_task_that_does_not_fit_the_model_says_why(tmp_path):
    task = Task.from_jsonl(written(tmp_path / "long.jsonl", [{"text": "0123456789"}]), TOKENIZER)
    with pytest.raises(ValueError, match="task 'long' has a sequence of 11 tokens.* takes 10 .*max_length=10"):
        task.evaluate(llama(positions=10))
    task.evaluate(llama(positions=11))
    with pytest.raises(ValueError, match="has token 256, the model's vocabulary has 250"):
        task.evaluate(llama(vocabulary=250))


def test_a_model_that_has_diverged_scores_nan(tmp_path):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    records = [{"context": "Q:", "gold": " p", "choices": [" p", " q"]}]
    score = Task.from_jsonl(written(tmp_path / "x.jsonl", records), TOKENIZER).evaluate(model)
    assert np.isnan([score.loss, score.bits_per_byte, score.accuracy]).all()


def test_a_figure_by_name():
    score = TaskScore(1.0, 0.1, 2.0, 0.1, None, None, 3)
    assert (score.metric("loss"), score.metric("bits_per_byte")) == (1.0, 2.0)
    with pytest.raises(ValueError, match="without choices has no accuracy"):
        score.metric("accuracy")


def test_the_real_files(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "corpus/tokenizers/bpe4096")
    model = llama(positions=256, vocabulary=4096)
    for path in sorted((shared / "corpus/tasks").iterdir()):
        task = Task.from_jsonl(path, tokenizer, max_length=256, limit=3)
        score = task.evaluate(model)
        assert 0.5 < score.loss / np.log(4096) < 3, path
        assert (score.accuracy is not None) == (path.name.split(".")[0] in {"arc_easy", "blimp", "hellaswag", "piqa"})
        for record in task.records[:3]:
            own = list(Task(task.name, [record], tokenizer, max_length=256))
            gold = torch.cat([e["input_ids"][e["labels"] != -100] for e in own])
            assert tokenizer.decode(gold).endswith(record.gold), record.where
