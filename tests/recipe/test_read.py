from pathlib import Path

import pytest
import yaml

from dynmix.recipe.names import RecipeError, check_names
from dynmix.recipe.read import differences, example, example_names, read_recipe, to_plain, to_yaml
from dynmix.recipe.schema import AutoMixerProxy, MDEProxy

SMALLEST = "output: run\nmodel: base\ndomains: {web: stores/web}\ntasks: {web: web.valid}\nstages: {steps: 5}\n"


def recipe(tmp_path: Path, text: str = SMALLEST) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", example_names())
def test_the_recipes_of_the_package_are_whole_and_read_again_as_they_are_saved(tmp_path, name):
    found = read_recipe(recipe(tmp_path, example(name)))
    assert isinstance(found.proxy, {"mde": MDEProxy, "automixer": AutoMixerProxy}.get(name, type(None)))
    assert isinstance(found.training["learning_rate"], float)  # 6e-4 is a number, which plain YAML takes for text
    if found.mixer["name"].startswith("tikmix"):
        assert {task.held_out for task in found.tasks.values()} < {*found.domains}  # else no mixture is better for all
    again = read_recipe(recipe(tmp_path, to_yaml(found)))
    assert again == found
    assert yaml.safe_load(to_yaml(found)) == to_plain(found)


def test_there_is_a_recipe_for_each_way():
    assert {*example_names()} >= {"tikmix-d", "tikmix-m", "automixer", "mde", "staged", "continued"}


def test_names_and_paths_alone_stand_for_mappings(tmp_path):
    found = read_recipe(recipe(tmp_path, SMALLEST + "mixer: odm\nmeasurement: {curvature: kfac}\n"))
    assert found.model.path == "base"
    assert found.domains["web"].path == "stores/web"
    assert found.tasks["web"].path == "web.valid"
    assert found.mixer == {"name": "odm"}
    assert found.measurement.curvature == {"name": "kfac"}


def test_a_word_replaces_what_the_file_has_there(tmp_path):
    file = recipe(tmp_path, SMALLEST + "mixer: {name: tikmix-d, alpha: 2}\n")
    words = ["stages.steps=7", "training.learning_rate=1e-3", "domains.code=[a, b]", "seed=3"]
    found = read_recipe(file, words)
    assert (found.stages.steps, found.training, found.seed) == (7, {"learning_rate": 0.001}, 3)
    assert found.domains["code"].path == ["a", "b"]
    assert read_recipe(file, ["mixer.alpha=3"]).mixer == {"name": "tikmix-d", "alpha": 3}
    assert read_recipe(file, ["mixer=odm"]).mixer == {"name": "odm"}  # and not with the other's alpha
    assert read_recipe(file, ["tokenizer="]).tokenizer is None
    assert read_recipe(file, ["guards.g=3"]).guards == {"g": {"path": 3}}  # as in the file
    assert read_recipe(file, ["data.weights={web: 1.0}"]).data.weights == {"web": 1.0}


def test_values_come_from_the_environment_and_from_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("STORES", "/data")
    found = read_recipe(recipe(tmp_path, SMALLEST + "tokenizer: ${model.path}\n"), ["domains.web=${oc.env:STORES}/web"])
    assert found.tokenizer == "base"
    assert found.domains["web"].path == "/data/web"


def test_paths_of_the_home_folder_are_there_and_in_no_folder_named_after_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = SMALLEST.replace("output: run", "output: ~/run").replace("web.valid", "~/web.valid")
    found = read_recipe(recipe(tmp_path, text), ["tokenizer=~/tokens", "domains.code=[~/a, b]", "model=~/base"])
    assert (found.output, found.tasks["web"].path) == ("/home/me/run", "/home/me/web.valid")
    assert (found.tokenizer, found.domains["code"].path) == ("/home/me/tokens", ["/home/me/a", "b"])
    assert found.model.path == "/home/me/base"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mixr=odm"], "no key 'mixr'; did you mean 'mixer'?"),
        (["stages.step=3"], "no key 'stages.step'; did you mean 'steps'?"),
        (["domains.web.pth=3"], "no key 'domains.web.pth'; did you mean 'path'?"),
        (["proxy={name: mde, tokns: 3}"], "no key 'tokns'; did you mean 'tokens'?"),
        (["proxy=mda"], "no key 'mda'; did you mean 'mde'?"),
        (["proxy=mde"], "proxy: 'tokens' is missing"),
        (["measurement.offlod=disk"], "no key 'measurement.offlod'; did you mean 'offload'?"),
        (["measurement.in_run={windw: 3}"], "no key 'measurement.in_run.windw'; did you mean 'window'?"),
        (["measurement.in_run={folds: 3}"], "'measurement.in_run.window' is missing"),
        (["measurement.in_run=3"], "measurement.in_run=3: a mapping with keys of window, folds, every, least"),
        (["stages.steps=many"], "stages.steps: Value 'many' of type 'str'"),
        (["stages=5"], "stages=5: a mapping with keys of steps, max_stages, keep, loss_every is expected"),
        (["domains=[stores/web]"], "domains=['stores/web']: a mapping is expected, of names to what each one is"),
        (["tasks="], "tasks=None: a mapping is expected, of names to what each one is"),
        (["training=100"], "training=100: a mapping is expected"),
        (["seed"], "'seed': override a value of the recipe as key.sub=value"),
        (["output=runs/\udcff"], "'output=runs/\\udcff': 'utf-8' codec can't encode"),
        (["seed=[1"], "'seed=[1'"),
        (["tokenizer=${model.pth}"], "model.pth"),
        (["zzz=1"], "there are batch_size, data, domains"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_right(tmp_path, words, message):
    with pytest.raises(RecipeError) as raised:
        read_recipe(recipe(tmp_path), words)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: run\n", "'stages.steps' is missing"),
        ("- 1\n", "a recipe is a mapping"),
        ("a: [\n", "not to be read as YAML"),
        ("domains:\n\tweb: stores/web\n", "never by tabs"),
        ("seed: 1\nseed: 2\n", "duplicate key seed"),
        (None, "no such recipe; make one: dynmix train --example"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, message):
    file = tmp_path / "nothing.yaml" if text is None else recipe(tmp_path, text)
    with pytest.raises(RecipeError) as raised:
        read_recipe(file)
    assert str(raised.value).startswith(str(file))
    assert message in str(raised.value)


def test_differences_are_told_by_the_whole_key():
    before, now = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 2, "c": [1]}, "e": 3}
    assert differences(before, now) == ["a.b was 1 and is 2", "d was 2 and is None", "e was None and is 3"]
    assert differences(now, now) == []


def test_the_nearest_name_is_told_and_where_none_is_near_all():
    with pytest.raises(RecipeError, match="here: no key 'alhpa'; did you mean 'alpha'"):
        check_names("here", ["alhpa"], ["alpha", "beta"])
    with pytest.raises(RecipeError, match="there are alpha, beta"):
        check_names("here", ["zz"], ["beta", "alpha"])
    check_names("here", ["beta"], ["alpha", "beta"])
