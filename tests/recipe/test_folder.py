from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dynmix.recipe.folder import check_folder, write_recipe
from dynmix.recipe.names import RecipeError
from dynmix.recipe.read import example, read_recipe, to_plain, to_yaml
from dynmix.recipe.schema import Recipe


@pytest.fixture
def work(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe_of(name: str, *words: str) -> Recipe:
    """A recipe of the package, for the folder `run`."""
    file = Path(f"{name}.yaml")
    file.write_text(example(name))
    return read_recipe(file, ["output=run", *words])


@pytest.mark.parametrize(
    ("name", "last", "more"),
    [
        ("automixer", "groups/groups.json", ["proxy.training.per_device_train_batch_size=1"]),
        ("mde", "fit.json", ["proxy.jobs=2"]),
    ],
)
def test_what_small_runs_do_not_depend_on_may_change_until_it_is_used(work, name, last, more):
    def check(*words):
        check_folder(recipe_of(name, *words))

    write_recipe(recipe_of(name))
    Path("run/proxy").mkdir()
    ours = ["mixer=odm", "stages.steps=4", "training.learning_rate=1", "model.config.hidden_size=8", "reference=big"]
    check(*ours, *more, "training.max_steps=9", "proxy.max_epochs=2")
    for word in ("proxy.batch_size=3", "data.sequence_length=16", "model.path=base"):
        with pytest.raises(RecipeError, match="a run of another recipe"):
            check(word)
    (Path("run/proxy") / last).parent.mkdir(exist_ok=True)
    (Path("run/proxy") / last).touch()
    check(*ours, *more)
    for word in ("training.max_steps=9", "proxy.max_epochs=2"):
        with pytest.raises(RecipeError, match="a run of another recipe"):
            check(word)
    Path("run/checkpoint-3").mkdir()
    check(*more)
    for word in ours:
        with pytest.raises(RecipeError, match="a run of another recipe"):
            check(word)


def test_a_recipe_may_be_mended_until_something_is_trained_by_it(work):
    recipe = recipe_of("staged")
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(to_yaml(replace(recipe, seed=1)))
    Path("run/run.json").touch()
    check_folder(recipe)
    for name in ("checkpoint-3", "model", "proxy"):
        Path("run", name).mkdir()
        with pytest.raises(RecipeError, match="a run of another recipe: seed was 1 and is 0"):
            check_folder(recipe)
        less = replace(recipe, seed=1, measurement=replace(recipe.measurement, micro_batch=1, layer_groups=2))
        check_folder(less)  # which is but for rounding the same run
        Path("run", name).rmdir()
    # A recipe that was written before there were these keys.
    old = to_plain(recipe)
    del old["measurement"]["layer_groups"], old["data"]["homogeneous"]
    Path("run/recipe.yaml").write_text(yaml.safe_dump(old))
    Path("run/checkpoint-3").mkdir()
    check_folder(recipe)
