"""What README.md says of itself; that its code runs is `test_docs.py`'s."""

import re
from pathlib import Path

from dynmix.mixers.registry import BUILT_IN

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_ways_to_plug_it_in_take_at_most_ten_lines():
    setup, *ways = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(ways) == 3
    assert all(len(f"{setup}{way}".splitlines()) <= 14 and len(way.splitlines()) <= 10 for way in ways)


def test_it_is_a_page_to_be_read():
    assert len(README.splitlines()) <= 170


def test_every_mixer_is_in_the_table():
    table = README.partition("## Mixers")[2].partition("## ")[0]
    assert set(re.findall(r"`([a-z-]+)`", table.partition("| Name")[2])) >= set(BUILT_IN)


def test_every_checking_command_selects_tests():
    """The table of promises names tests that exist."""
    commands = re.findall(r"`pytest (.*?)`", README)
    assert len(commands) == 6
    root = Path(__file__).parent
    names = [
        name
        for path in root.rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    ]
    for command in commands:
        words = re.search(r'-k "(.*)"', command).group(1).split(" or ")
        for word in words:
            assert any(word in name for name in names), word
