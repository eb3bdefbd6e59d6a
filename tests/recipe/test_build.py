from pathlib import Path

import pytest
from transformers import AutoTokenizer, TrainingArguments

from dynmix.influence.curvature import EKFAC, AdamDiagonal
from dynmix.recipe.build import check_parts, curvature, load_tokenizer, make_model, model_config, training_arguments
from dynmix.recipe.names import RecipeError
from dynmix.recipe.read import read_recipe
from dynmix.recipe.schema import Model, Recipe

TEXT = """
output: run
model: {config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
  num_attention_heads: 2}}
domains: {web: stores/web, code: stores/code}
tasks: {web: web.valid}
stages: {steps: 5}
training: {max_steps: 10}
"""


def recipe(*words: str) -> Recipe:
    Path("recipe.yaml").write_text(TEXT)
    return read_recipe(Path("recipe.yaml"), words)


def test_trainer_arguments_have_the_run_s_defaults_and_the_batch_is_made_up_by_accumulation(world):
    made = training_arguments(recipe("batch_size=12", "training.per_device_train_batch_size=4", "seed=7"))
    assert (made.gradient_accumulation_steps, made.max_steps, made.seed) == (3, 10, 7)
    assert (made.output_dir, made.save_steps, made.train_sampling_strategy) == ("run", 5, "sequential")
    assert training_arguments(recipe("training.save_steps=3", "training.weight_decay=1")).save_steps == 3


@pytest.mark.parametrize(("split", "accumulation"), [("false", 2), ("true", 4)])
def test_a_step_takes_the_recipe_s_batch_however_processes_share_it(world, monkeypatch, split, accumulation):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    words = f"training.accelerator_config={{split_batches: {split}}}", "training.per_device_train_batch_size=4"
    assert training_arguments(recipe("batch_size=16", *words)).gradient_accumulation_steps == accumulation


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("training.learning_rat=1", "training: no key 'learning_rat'; did you mean 'learning_rate'?"),
        ("training.learning_rate=fast", "training.learning_rate='fast': a value of type float"),
        ("training={}", "training.max_steps: give the optimizer steps"),
        ("training.max_steps=0", "training.max_steps: give the optimizer steps"),
        ("training.max_steps=1.5", "training.max_steps=1.5: a value of type int"),
        ("training.bf16=3", "training.bf16=3: a value of type bool"),
        ("training.output_dir=a", "training.output_dir: say it as output"),
        ("training.num_train_epochs=2", "say it as training.max_steps"),
        ("training.train_sampling_strategy=random", "would shuffle the stages together: leave it out"),
        ("training.save_only_model=true", "could not go on where the run was killed: leave it out"),
        ("training.eval_strategy=steps", "training.eval_strategy='steps': a recipe has no eval_dataset; leave it out"),
        ("training.auto_find_batch_size=true", "would change what a step is during the run: leave it out"),
        ("training.ignore_data_skip=true", "would start the data again from its first sample where the run goes on"),
        ("training.per_device_train_batch_size=5", "batch_size=32: no multiple of"),
        ("training.per_device_train_batch_size=0", "training.per_device_train_batch_size=0: at least 1 sequence"),
        ("batch_size=0", "batch_size=0: at least 1 sequence"),
        ("training.lr_scheduler_type=cosin", "training: cosin is not a valid SchedulerType"),
    ],
)
def test_trainer_arguments_that_are_none(world, word, message):
    with pytest.raises(RecipeError) as raised:
        training_arguments(recipe(word))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mixer=tikmix", "no mixer 'tikmix': did you mean 'tikmix-"),
        ("mixer={name: tikmix-d, confidenc: 1}", "no key 'confidenc'; did you mean 'confidence'?"),
        ("mixer={name: 3}", "mixer: give a name"),
        ("mixer={name: tikmix-d, alpha: -1}", "alpha=-1"),
        ("measurement.curvature=ekfak", "no key 'ekfak'; did you mean 'ekfac'?"),
        ("measurement.curvature={name: ekfac, damp: 1}", "no key 'damp'; did you mean 'damping'?"),
        ("measurement.curvature={name: ekfac, damping: -1}", "damping must be finite"),
        ("measurement.layers='(('", "measurement.layers='((' is no regular expression: missing )"),
        ("measurement.layers={exclude: '(('}", "measurement.layers='((' is no regular expression: missing )"),
        ("measurement.layers=0", "measurement.layers=0 is no regular expression: first argument must be string"),
        ("measurement.layers={exclud: a}", "no key 'exclud'; did you mean 'exclude'?"),
        ("measurement.in_run={window: 3, every: 9}", "measurement.in_run: InRun(every=9): from 1 to window=3"),
        ("model.dtype=float23", "model.dtype='float23': float32, bfloat16 or float16"),
        ("model.dtype=int8", "model.dtype='int8': float32, bfloat16 or float16"),
        ("data.weights={web: 0.5, code: 0.6}", "data.weights: weights sum to 1.1, not 1"),
        ("data.weights={web: 1.0}", "data.weights: weights do not match the domains: missing ['code']"),
    ],
)
def test_parts_are_checked_before_any_data_is_read(world, word, message):
    check_parts(recipe())
    with pytest.raises(ValueError) as raised:  # noqa: PT011 # the message is looked at below, as plain text
        check_parts(recipe(word))
    assert message in str(raised.value)


def test_a_curvature_by_name():
    assert curvature("ekfac", {"damping": 0.5}, None) == EKFAC(damping=0.5)
    asked = []
    made = curvature("adam", {"eps": 0.1}, lambda: asked.append(1))
    assert isinstance(made, AdamDiagonal)
    with pytest.raises(ValueError, match="no optimizer yet"):
        made.fit(None, [])
    assert asked == [1]


def test_a_new_model_follows_the_tokenizer_and_the_sequence_length(world):
    tokenizer = AutoTokenizer.from_pretrained("tokenizer")
    model = recipe().model
    config = model_config(model, tokenizer, 48)
    assert (config.vocab_size, config.max_position_embeddings) == (len(tokenizer), 48)
    assert config.eos_token_id == tokenizer.eos_token_id
    one, two, other = (make_model(model, config, seed).state_dict()["lm_head.weight"] for seed in (1, 1, 2))
    assert one.equal(two)
    assert not one.equal(other)
    gpt2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2}
    assert model_config(Model(config=gpt2), tokenizer, 48).n_positions == 48
    assert model_config(Model(config=gpt2 | {"n_positions": 64}), tokenizer, 48).n_positions == 64


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(), "model: give `path`"),
        (Model(path="a", config="b"), "model: give `path`"),
        (Model(path="nowhere/at/all"), "model.path: nowhere/at/all: no configuration of a model"),
        (Model(config={"hidden_size": 8}), "model_type is missing"),
        (Model(config={"model_type": "lama"}), "model.config: no configuration of a model (Unrecognized model"),
        (Model(config={"model_type": "llama", "hiden_size": 8}), "no key 'hiden_size'; did you mean 'hidden_size'?"),
        (Model(config={"model_type": "llama", "hidden_size": 9}), "no configuration of a model"),
        (Model(config={"model_type": "llama", "vocab_size": 9}), "leave vocab_size out, it follows"),
    ],
)
def test_models_that_are_none(world, model, message):
    with pytest.raises(RecipeError) as raised:
        model_config(model, AutoTokenizer.from_pretrained("tokenizer"), 32)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_that_is_none_is_named(world):
    with pytest.raises(RecipeError, match="tokenizer: ./nothing: no folder or hub name of a tokenizer"):
        load_tokenizer(recipe("tokenizer=./nothing"))
    assert load_tokenizer(recipe()) is None
