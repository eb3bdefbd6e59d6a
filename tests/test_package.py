"""The arrows of the architecture, and what an installation contains."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FORBIDDEN = {
    "dynmix/mixture": {"dynmix.influence", "dynmix.mixers", "dynmix.laws", "dynmix.controller", "dynmix.callbacks"},
    "dynmix/mixture/prepare": {"torch", "dynmix.influence", "dynmix.mixers", "dynmix.laws", "dynmix.controller"},
    "dynmix/influence": {"dynmix.mixture", "dynmix.mixers", "dynmix.laws", "dynmix.controller", "dynmix.callbacks"},
    "dynmix/laws": {
        "torch",
        "transformers",
        "dynmix.mixture",
        "dynmix.influence",
        "dynmix.mixers",
        "dynmix.controller",
    },
    "dynmix/mixers": {"torch", "transformers", "dynmix.mixture", "dynmix.influence", "dynmix.controller"},
    "dynmix/report.py": {"torch", "transformers", "dynmix.controller", "dynmix.mixture", "dynmix.influence"},
    "dynmix/report_figures.py": {"torch", "transformers", "dynmix.controller", "dynmix.mixture", "dynmix.influence"},
    "dynmix/report_rows.py": {"torch", "transformers", "dynmix.controller", "dynmix.mixture", "dynmix.influence"},
    "dynmix/journal.py": {
        "torch",
        "transformers",
        "dynmix.controller",
        "dynmix.mixture",
        "dynmix.influence",
        "dynmix.mixers",
    },
    "dynmix/observation.py": {"torch", "transformers", "dynmix"},
    "dynmix/controller.py": {"transformers", "accelerate", "dynmix.callbacks"},
    "dynmix/decider.py": {"transformers", "accelerate", "dynmix.callbacks", "dynmix.controller", "dynmix.influence"},
    "dynmix/timetable.py": {"torch", "dynmix.influence", "dynmix.mixers", "dynmix.controller", "dynmix.callbacks"},
    "dynmix/scores.py": {"torch", "transformers", "dynmix"},
    "dynmix/scoring": {"dynmix.mixers", "dynmix.controller", "dynmix.callbacks"},
    "dynmix/sampling.py": {"dynmix.mixers", "dynmix.controller", "dynmix.callbacks"},
    "dynmix/drawn.py": {"torch", "transformers", "dynmix.mixture", "dynmix.influence", "dynmix.mixers"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_run_one_way(room):
    files = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).glob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            crossed = [wall for wall in FORBIDDEN[room] if name == wall or name.startswith(wall + ".")]
            assert not crossed, f"{path.relative_to(ROOT)} imports {name}"


def test_nothing_that_is_loaded_can_run_code():
    """State is JSON and safetensors: no pickle, no torch.load, no evaluation of text anywhere in the package."""
    for path in [*(ROOT / "dynmix").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "dill", "joblib", "marshal", "shelve"}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "torch.load", "np.load", "numpy.load", "yaml.load"}, path
                assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}, path


def test_text_is_read_as_it_is_written_whatever_the_locale():
    for path in [*(ROOT / "dynmix").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".read_text"):
                assert "encoding" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"


def test_mixers_and_report_work_without_loading_torch():
    code = "import sys, dynmix.mixers, dynmix.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names():
    import dynmix
    import dynmix.callbacks

    for name in dynmix.__all__:
        assert getattr(dynmix, name) is not None
    assert set(dynmix.__all__) <= set(dir(dynmix))  # what a notebook completes
    assert set(dynmix.callbacks.__all__) == {"MixtureCallback", "MixtureHook", "PeakCallback"}
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        dynmix.Nothing  # noqa: B018


def test_a_wheel_has_every_module_and_no_top_level_callbacks(tmp_path):
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    for name in tracked.stdout.split("\n"):
        if (ROOT / name).is_file() and (ROOT / name).exists() and name and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    (source / "dynmix/callbacks").symlink_to("../callbacks")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert not [name for name in names if name.startswith("callbacks")]
    files = {str(p.relative_to(source)) for p in (source / "dynmix").rglob("*.py") if "callbacks" not in p.parts}
    files |= {f"dynmix/callbacks/{p.name}" for p in (source / "callbacks").glob("*.py")}
    files |= {"dynmix/report.html", "dynmix/py.typed"}
    files |= {f"dynmix/recipe/examples/{p.name}" for p in (source / "dynmix/recipe/examples").glob("*.yaml")}
    assert files <= set(names)
    assert not [name for name in names if name.startswith("tests")]


def test_the_map_of_the_package_names_every_module():
    import dynmix

    found = [*(ROOT / "dynmix").glob("*.py"), *(path.parent for path in (ROOT / "dynmix").glob("*/__init__.py"))]
    assert {path.stem for path in found if path.stem[0] != "_"} == set(re.findall(r"`(\w+)`", dynmix.__doc__))
