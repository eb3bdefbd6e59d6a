import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmix.mixers.regroup import REST, Group, blending, group_weights, regroup
from dynmix.scores import Column, SampleScores


def scored(scores, columns, tokens=None):
    scores = np.asarray(scores, dtype=np.float64)
    n = len(scores)
    tokens = np.full(n, 8) if tokens is None else np.asarray(tokens)
    return SampleScores(("raw",), np.zeros(n, int), np.arange(n), tokens, tuple(columns), scores)


@st.composite
def corpora(draw):
    """Random scores of up to 4 tasks by up to 3 checkpoints each."""
    tasks = draw(st.integers(1, 4))
    columns = [
        Column(f"task{t}", f"step-{step}", step)
        for t in range(tasks)
        for step in draw(st.lists(st.integers(0, 900), min_size=1, max_size=3, unique=True))
    ]
    n = draw(st.integers(2, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.standard_normal((n, len(columns)))
    return scored(values * 10.0 ** rng.integers(-6, 6), columns, rng.integers(1, 50, n))


def slowly(scores, keep, blend, budget):
    """Names of the groups -> members, joint influence: one sample at a time, as the docstrings say it."""
    n, columns, tasks = len(scores.row), scores.columns, scores.tasks
    z = np.zeros((n, len(columns)))
    for c in range(len(columns)):
        x = scores.scores[:, c]
        z[:, c] = 0 if np.ptp(x) <= 1e-12 * abs(x).max() else (x - x.mean()) / x.std()

    def alpha(some):
        part = {"step": [float(c.step) for c in some], "early": [1 / max(c.step, 1) for c in some]}[blend]
        return [p / sum(part) if sum(part) else 1 / len(part) for p in part]

    joint = [sum(a * x for a, x in zip(alpha(columns), row, strict=True)) for row in z]
    groups = {task: [] for task in [*tasks, REST]}
    for x in range(n):
        own = {}
        for task in tasks:
            numbers = [c for c, column in enumerate(columns) if column.task == task]
            shares = alpha([columns[c] for c in numbers])
            own[task] = sum(a * z[x, c] for a, c in zip(shares, numbers, strict=True))
        best = max(own, key=own.get)  # the first of equals
        groups[best if own[best] > 0 else REST].append(x)
    for task in tasks:
        ordered = sorted(groups[task], key=lambda x: (-joint[x], x))
        whole, held, kept = sum(scores.tokens[x] for x in ordered), 0, []
        for x in ordered:
            if held + scores.tokens[x] <= min(keep * whole + 1e-6, budget):
                held += scores.tokens[x]
                kept.append(x)
        if not kept and ordered and scores.tokens[ordered[0]] <= budget:
            kept = ordered[:1]
        groups[task] = kept
    groups[REST].sort(key=lambda x: (-joint[x], x))
    return {name: members for name, members in groups.items() if members}, joint


@given(corpora(), st.sampled_from([0.1, 0.5, 1.0]), st.sampled_from(["step", "early"]), st.sampled_from([60, 10**9]))
def test_is_what_the_slow_way_gives(scores, keep, blend, budget):
    groups = regroup(scores, keep=keep, blend=blend, budget=budget)
    expected, joint = slowly(scores, keep, blend, budget)
    assert {group.name: group.members.tolist() for group in groups} == expected
    for group in groups:
        assert group.tokens == scores.tokens[group.members].sum()
        assert group.joint.tolist() == pytest.approx([joint[x] for x in expected[group.name]])
        assert group.density * group.tokens == pytest.approx(sum(max(joint[x], 0) for x in expected[group.name]))


@given(corpora())
def test_every_sample_is_in_one_group_when_all_is_kept(scores):
    members = np.concatenate([group.members for group in regroup(scores, keep=1.0)])
    assert sorted(members.tolist()) == list(range(len(scores.row)))


@given(corpora(), st.sampled_from([0.2, 0.5, 0.9]))
def test_what_is_cut_is_counted(scores, keep):
    whole = {group.name: group for group in regroup(scores, keep=1.0)}
    for group in regroup(scores, keep=keep):
        others = whole[group.name]
        assert set(group.members.tolist()) <= set(others.members.tolist())
        assert (np.diff(group.joint) <= 0).all()
        assert group.tokens + group.cut == others.tokens
        if group.name != REST:
            assert len(group.members) == 1 or group.tokens <= keep * others.tokens + 1e-6


def test_equal_scores_go_to_the_first_task_in_the_samples_order():
    scores = scored([[1, 1], [1, 1], [-1, -1]], [Column("a", "x", 1), Column("b", "x", 1)])
    groups = regroup(scores, keep=1.0)
    assert {group.name: group.members.tolist() for group in groups} == {"a": [0, 1], REST: [2]}


def test_alpha_reads_the_steps_both_ways():
    columns = [Column("a", "x", 100), Column("b", "y", 300)]
    assert blending(columns, "step").tolist() == [0.25, 0.75]
    assert blending(columns, "early").tolist() == [0.75, 0.25]
    assert blending(columns, "equal").tolist() == [0.5, 0.5]
    assert blending([Column("a", "x", 0), Column("b", "x", 0)], "step").tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="blend='late'"):
        blending(columns, "late")


def test_scale_and_offset_of_a_column_do_not_matter():
    rng = np.random.default_rng(0)
    columns = [Column("a", "x", 5), Column("b", "y", 9)]
    values = rng.standard_normal((50, 2))
    ours, theirs = (regroup(scored(v, columns)) for v in (values, values * [1e-9, 1e6] + [3e-9, -5e6]))
    assert [group.members.tolist() for group in ours] == [group.members.tolist() for group in theirs]


def test_broken_scores_go_to_rest_and_are_said(caplog):
    values = [[1.0, 0.0], [np.nan, 5.0], [-1.0, 0.5], [0.5, np.inf]]
    with caplog.at_level(logging.WARNING):
        groups = regroup(scored(values, [Column("a", "x", 1), Column("b", "x", 1)]), keep=1.0)
    assert {1, 3} <= set(next(group for group in groups if group.name == REST).members.tolist())
    assert "2 of 4 samples have scores that are not finite" in caplog.text
    assert all(np.isfinite(group.density) for group in groups)


def test_a_column_that_says_nothing_is_said(caplog):
    columns = [Column("a", "x", 1), Column("b", "x", 1)]
    with caplog.at_level(logging.WARNING):
        groups = regroup(scored([[1.0, 7.0], [0.0, 7.0]], columns), keep=1.0)
    assert "all scores for task 'b' by 'x' are equal" in caplog.text
    assert {group.name: group.members.tolist() for group in groups} == {"a": [0], REST: [1]}
    with pytest.raises(ValueError, match="no sample has a finite score for task 'b'"):
        regroup(scored([[1.0, np.nan], [0.0, np.nan]], columns))


def test_budgets_are_of_tokens_and_never_exceeded(caplog):
    values, columns = [[3.0], [2.0], [1.0], [-6.0]], [Column("a", "x", 1)]
    scores = scored(values, columns, tokens=[10, 10, 10, 10])
    assert regroup(scores, keep=1.0, budget=25)[0].members.tolist() == [0, 1]
    uneven = scored(values, columns, tokens=[30, 10, 10, 10])
    assert regroup(uneven, keep=1.0, budget=25)[0].members.tolist() == [1, 2]
    assert regroup(uneven, keep=0.5)[0].members.tolist() == [1, 2]
    with caplog.at_level(logging.WARNING):
        groups = regroup(scores, keep=1.0, budget={"a": 9})
    assert [group.name for group in groups] == [REST]
    assert "its budget of 9 tokens holds none" in caplog.text
    both = scored([[1.0, -1.0], [-1.0, 1.0]], [Column("a", "x", 1), Column("b", "x", 1)], tokens=[10, 10])
    with pytest.raises(ValueError, match="there are no groups: .*; raise budget"):
        group_weights(regroup(both, budget=9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, "keep=0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": float("nan")}, "keep=nan"),
        ({"budget": {"b": 5}}, "no task 'b'"),
        ({"budget": 0}, "at least 1 token"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        regroup(scored([[1.0], [0.0]], [Column("a", "x", 1)]), **arguments)
    with pytest.raises(ValueError, match="a task is called 'rest'"):
        regroup(scored([[1.0], [0.0]], [Column(REST, "x", 1)]))


def group(name, tokens, influence):
    return Group(name, np.arange(2), np.array([influence, -1.0]), tokens)


def test_weights_are_shares_of_influence_density():
    weights = group_weights([group("a", 100, 3.0), group("b", 300, 3.0), group(REST, 50, 0.0)])
    assert weights == pytest.approx({"a": 0.75, "b": 0.25, REST: 0.0})


def test_epochs_bound_weights_and_the_excess_goes_to_the_others_first():
    groups = [group("a", 100, 8.0), group("b", 300, 3.0), group("c", 300, 3.0), group(REST, 5000, 0.0)]
    weights = group_weights(groups, max_epochs=2, tokens=1000)
    assert weights == pytest.approx({"a": 0.2, "b": 0.4, "c": 0.4, REST: 0.0})
    weights = group_weights(groups, max_epochs=1, tokens=1000)
    assert weights == pytest.approx({"a": 0.1, "b": 0.3, "c": 0.3, REST: 0.3})
    with pytest.raises(ValueError, match=r"hold 5,700 tokens, seen 1 times at most, and 9,000"):
        group_weights(groups, max_epochs=1, tokens=9000)
    with pytest.raises(ValueError, match="both must be above 0"):
        group_weights(groups, max_epochs=1)


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 100)), min_size=1, max_size=6),
    st.floats(0.1, 4),
    st.integers(1, 4000),
)
def test_weights_are_a_mixture_within_the_epochs(sizes, max_epochs, tokens):
    groups = [group(f"g{i}", *size) for i, size in enumerate(sizes)]
    try:
        weights = group_weights(groups, max_epochs=max_epochs, tokens=tokens)
    except ValueError:
        assert sum(min(1, max_epochs * g.tokens / tokens) for g in groups) < 1
        return
    if weights is None:
        assert not any(g.density for g in groups)
        return
    assert sum(weights.values()) == pytest.approx(1)
    for g in groups:
        assert -1e-12 <= weights[g.name] * tokens <= max_epochs * g.tokens * (1 + 1e-9)


def test_nothing_to_go_by_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert group_weights([group("a", 10, 0.0), group(REST, 10, 0.0)]) is None
    assert "no group has positive joint influence" in caplog.text
    without = [group("a", 10, 0.0), group(REST, 10, 0.0)]
    assert group_weights(without, max_epochs=2, tokens=40) is None
    with pytest.raises(ValueError, match="hold 20 tokens, seen 2 times at most, and 41"):
        group_weights(without, max_epochs=2, tokens=41)  # the fallback would see them more often
    with pytest.raises(ValueError, match="there are no groups"):
        group_weights([])
