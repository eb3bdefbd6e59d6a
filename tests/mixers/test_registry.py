import subprocess
import sys

import pytest

from dynmix.mixers.base import Mixer
from dynmix.mixers.odm import ODM
from dynmix.mixers.registry import BUILT_IN, _key, make_mixer, mixer_names
from dynmix.mixers.static import Fixed, Static, Temperature
from dynmix.mixers.tikmix_d import TiKMiXD

ARGUMENTS = {"fixed": {"weights": {"a": 1.0}}, "staged": {"stages": [{"a": 1.0}]}}


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_mixer_of_the_package_can_be_made_by_its_name(name):
    if name == "tikmix-m":
        pytest.importorskip("dynmix.mixers.tikmix_m")
    mixer = make_mixer({"name": name, **ARGUMENTS.get(name, {})})
    assert isinstance(mixer, Mixer)
    assert mixer.describe()["name"].lower() == name.replace("-", "")
    assert name in mixer_names()


@pytest.mark.parametrize("name", ["TiKMiXD", "tikmix_d", "TIKMIX-D", "tikmix d"])
def test_names_are_matched_without_case_and_hyphens(name):
    assert isinstance(make_mixer(name), TiKMiXD)


def test_options_go_to_the_constructor_and_mixers_go_through():
    spec = {"name": "temperature", "tau": 5}
    mixer = make_mixer(spec)
    assert isinstance(mixer, Temperature)
    assert mixer.tau == 5
    assert spec == {"name": "temperature", "tau": 5}
    assert make_mixer(mixer) is mixer


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tikmix", r"no mixer 'tikmix': did you mean 'tikmix-[dm]'\? there are static, natural"),
        ("zzz", r"no mixer 'zzz': there are static"),
        ({"tau": 5}, "needs the mixer's name as 'name'"),
        ({"name": "odm", "beta": 1}, r"mixer 'odm': .*'beta'; it is ODM\(alpha: float = 0.9\)"),
        ("fixed", r"mixer 'fixed': .*'weights'; it is Fixed\(weights"),
        ({"name": "odm", "alpha": 2}, "alpha=2"),
        (ODM, r"mixer=ODM is a class: pass an instance, ODM\(...\)"),
        (7, "mixer=7 is no mixer: .*subclass of dynmix.mixers.Mixer"),
        (object(), "subclass of dynmix.mixers.Mixer"),
    ],
)
def test_what_is_no_mixer_is_refused_with_words(spec, words):
    with pytest.raises(ValueError, match=words):
        make_mixer(spec)


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """A distribution that is installed for the test: a module and a dist-info with entry points."""
    (tmp_path / "other_mixers.py").write_text(
        "from dynmix.mixers.base import Mixer, Proposal\n"
        "class Mine(Mixer):\n"
        "    def __init__(self, half=0.5): self.half = half\n"
        "    def propose(self, influence, prior, upper=None): return Proposal(dict(prior))\n"
        "def factory(): return Mine(half=0.25)\n"
        "def no_mixer(): return 7\n"
    )
    (tmp_path / "broken_mixers.py").write_text("raise RuntimeError('no such device')\n")
    info = tmp_path / "other_mixers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-mixers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dynmix.mixers]\n"
        "My-Mixer = other_mixers:Mine\n"
        "made = other_mixers:factory\n"
        "seven = other_mixers:no_mixer\n"
        "broken = broken_mixers:Mixer\n"
        "Static = other_mixers:Mine\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("other_mixers", None)


@pytest.mark.usefixtures("distribution")
def test_mixers_of_others_are_found_through_their_entry_points(caplog):
    assert {"My-Mixer", "made", "broken"} <= set(mixer_names())
    assert make_mixer({"name": "my_mixer", "half": 0.1}).half == 0.1
    assert make_mixer("made").half == 0.25
    with pytest.raises(ValueError, match="did you mean 'My-Mixer'"):
        make_mixer("mymixr")
    with pytest.raises(ValueError, match="mixer 'seven' is a int, no subclass"):
        make_mixer("seven")
    caplog.clear()
    assert isinstance(make_mixer("static"), Static)
    assert "mixer 'static' is dynmix's own; the entry point other_mixers:Mine of other-mixers" in caplog.text
    assert [_key(name) for name in mixer_names()].count("static") == 1


@pytest.mark.usefixtures("distribution")
def test_an_entry_point_that_cannot_be_imported_fails_only_where_it_is_asked_for():
    assert isinstance(make_mixer({"name": "fixed", "weights": {"a": 1.0}}), Fixed)
    words = "mixer 'broken': its entry point broken_mixers:Mixer of other-mixers failed: RuntimeError: no such device"
    with pytest.raises(ValueError, match=words):
        make_mixer("broken")


def test_the_registry_imports_no_mixer_until_it_is_asked_for():
    code = (
        "import sys; import dynmix.mixers.registry as r; r.mixer_names(); r.make_mixer('uniform');"
        "print([m for m in sys.modules if m in ('torch', 'sklearn', 'lightgbm', 'dynmix.mixers.ado')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
