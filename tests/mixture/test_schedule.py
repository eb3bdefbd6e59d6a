import copy
import itertools
import json
import multiprocessing
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from dynmix.mixture import order, packed
from dynmix.mixture import schedule as module
from dynmix.mixture.quota import TOTAL
from dynmix.mixture.roster import MAX_JOINED, JoinedDomain
from dynmix.mixture.schedule import MixtureSchedule, Undecided
from dynmix.mixture.weights import integer_cdf

FAR = 10**12
names = ["web", "code", "books", "law", "noise"]
shares = st.lists(st.one_of(st.just(0.0), st.floats(1e-7, 1)), min_size=5, max_size=5).filter(lambda w: sum(w) > 0)


def weights_of(values: list[float]) -> dict[str, float]:
    return {name: value / sum(values) for name, value in zip(names, values, strict=True)}


@st.composite
def schedules(draw: st.DrawFn) -> MixtureSchedule:
    sizes = {name: draw(st.integers(1, 400)) for name in names}
    made = MixtureSchedule(
        weights_of(draw(shares)), sizes, seed=draw(st.integers(0, 2**63 - 1)), block=draw(st.integers(1, 300))
    )
    start = 0
    for length in draw(st.lists(st.integers(1, 900), max_size=3)):
        start += length
        made.publish(weights_of(draw(shares)), start)
    return made


def two_stages(**options: Any) -> MixtureSchedule:
    made = MixtureSchedule({"a": 0.25, "b": 0.75}, {"a": 50, "b": 70}, **options)
    made.publish({"b": 0.1, "a": 0.9}, start=1000)
    return made


@given(made=schedules(), cuts=st.lists(st.integers(0, 3000), max_size=6))
@settings(max_examples=25, deadline=None)
def test_counts_and_rows_agree_with_counting_one_by_one(made: MixtureSchedule, cuts: list[int]) -> None:
    domain, row, epoch = (array.tolist() for array in made.assign(0, 3000))
    drawn: Counter[int] = Counter()
    seen: dict[tuple[int, int], set[int]] = {}
    counts_at = {}
    for position in range(3000):
        counts_at[position] = [drawn[number] for number in range(5)]
        d, r, e = domain[position], row[position], epoch[position]
        size = made.sizes[names[d]]
        assert e == drawn[d] // size
        assert 0 <= r < size
        assert r not in seen.setdefault((d, e), set())  # `size` different rows: each epoch is a permutation
        seen[d, e].add(r)
        drawn[d] += 1
    for cut in [*cuts, *(stage.start for stage in made.stages)]:
        if cut < 3000:
            assert made.counts(cut).tolist() == counts_at[cut]


@given(
    made=schedules(),
    origin=st.sampled_from([0, FAR, 2**61]),
    cuts=st.lists(st.integers(0, 2000), min_size=1, max_size=8),
)
@settings(max_examples=25, deadline=None)
def test_any_chunking_gives_the_same(made: MixtureSchedule, origin: int, cuts: list[int]) -> None:
    whole = np.array(made.assign(origin, origin + 2000))
    bounds = [0, *sorted(cuts), 2000]
    parts = [made.assign(origin + a, origin + b) for a, b in itertools.pairwise(bounds)]
    assert (np.concatenate([np.array(part) for part in parts], axis=1) == whole).all()
    drawn = made.counts(origin + cuts[0]) - made.counts(origin)
    assert drawn.tolist() == np.bincount(whole[0, : cuts[0]], minlength=5).tolist()


def test_chunks_inside_a_call_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    made = two_stages(block=96)
    whole = made.assign(0, 5000)
    monkeypatch.setattr(order, "_CHUNK", 97)
    assert all((a == b).all() for a, b in zip(made.assign(0, 5000), whole, strict=True))


def test_far_positions_are_exact() -> None:
    made = MixtureSchedule({"a": 0.3, "b": 0.7}, {"a": 1000, "b": 10**9}, block=256)
    counts = made.counts(FAR)
    assert counts.sum() == FAR
    assert abs(counts - np.array([0.3, 0.7]) * FAR).max() < 400  # 2**-32 of rounding over 10**12 draws is 233
    domain, row, epoch = made.assign(FAR, FAR + 100)
    first = int(np.argmax(domain == 0))
    assert epoch[first] == counts[0] // 1000
    assert row[first] == made.rows(0, counts[:1])[0][0]


def test_epochs_are_different_permutations() -> None:
    made = two_stages()
    row, epoch = made.rows(1, np.arange(210))
    orders = row.reshape(3, 70)
    assert epoch.tolist() == [0] * 70 + [1] * 70 + [2] * 70
    assert (np.sort(orders) == np.arange(70)).all()
    assert (orders[0] != orders[1]).sum() > 50 < (orders[1] != orders[2]).sum()
    other_seed = MixtureSchedule({"a": 0.25, "b": 0.75}, {"a": 50, "b": 70}, seed=1)
    assert (other_seed.rows(1, np.arange(70))[0] != orders[0]).sum() > 50


def test_weight_zero_is_never_drawn_and_a_small_one_is() -> None:
    weights = {"none": 0.0, "tiny": 1e-5, "rest": 1 - 1e-5, "last": 0.0}
    made = MixtureSchedule(weights, {"none": 0, "tiny": 100, "rest": 1000, "last": 7})
    counts = made.counts(10**6)
    assert counts[[0, 3]].tolist() == [0, 0]
    assert abs(counts[1] - 10) <= 2
    assert made.counts(FAR)[[0, 3]].tolist() == [0, 0]


def mean_distance(weights: np.ndarray, draws: int) -> float:
    """Expected total variation of the mixture of independent draws (de Moivre)."""
    least = np.floor(draws * weights) + 1
    return float((least * (1 - weights) * binom.pmf(least, draws, weights)).sum() / draws)


def nearest_distance(weights: np.ndarray, draws: int) -> float:
    """Least total variation of any whole numbers of draws: largest remainders."""
    counts = np.floor(draws * weights)
    counts[np.argsort(counts - draws * weights)[: round(draws - counts.sum())]] += 1
    return float(np.abs(counts / draws - weights).sum() / 2)


def test_every_prefix_keeps_the_proportions() -> None:
    rng = np.random.default_rng(0)
    for trial in range(60):
        size = rng.integers(2, 201)
        weights = rng.dirichlet(np.ones(size)) if trial % 2 else 10 ** rng.uniform(-5, 0, size)
        weights = np.maximum(weights / weights.sum(), 1e-5)
        weights /= weights.sum()
        domains = {f"d{k}": float(weight) for k, weight in enumerate(weights)}
        made = MixtureSchedule(domains, dict.fromkeys(domains, 1000), seed=trial)
        for n in (1_000, 10_000, 100_000):
            distance = np.abs(made.counts(n) / n - weights).sum() / 2
            # Of any order, where the nearest whole numbers are no nearer than a fifth.
            assert distance <= max(mean_distance(weights, n) / 5, 1.1 * nearest_distance(weights, n)), (trial, n)


def test_what_one_stage_rounds_away_the_next_one_pays() -> None:
    rng = np.random.default_rng(0)
    domains, length, declared = [f"d{k}" for k in range(12)], 96, np.zeros(12)
    made = MixtureSchedule(dict.fromkeys(domains, 1 / 12), dict.fromkeys(domains, 1000), block=32)
    declared += length / 12
    for stage in range(1, 500):
        weights = rng.dirichlet(np.full(12, 0.3))
        weights[3] = 0.002 if stage % 2 else 0.0  # a fifth of a draw at most: no stage alone would round it up
        weights /= weights.sum()
        made.publish(dict(zip(domains, weights.tolist(), strict=True)), start=stage * length)
        declared += length * weights
        assert np.abs(made.counts((stage + 1) * length) - declared).max() < 2.5, stage
    drawn = np.bincount(made.assign(0, 500 * length)[0], minlength=12)
    assert abs(drawn[3] - declared[3]) < 1.5 < 0.1 * declared[3]
    for stage in range(2, 500, 2):
        assert not (made.assign(stage * length, (stage + 1) * length)[0] == 3).any()


@given(values=shares, tiny=st.integers(0, 4), seed=st.integers(0, 2**63 - 1), start=st.integers(0, 2**61))
@settings(max_examples=25)
def test_a_small_weight_has_its_draws_wherever_it_stands(values: list[float], tiny: int, seed: int, start: int) -> None:
    weights = weights_of([*values[:tiny], 0.0, *values[tiny + 1 :]] if sum(values) > values[tiny] else [1.0] * 5)
    weights = {name: 1e-5 if k == tiny else weight * (1 - 1e-5) for k, (name, weight) in enumerate(weights.items())}
    weights = dict(zip(names, np.array(list(weights.values())) / sum(weights.values()), strict=True))
    made = MixtureSchedule(weights, dict.fromkeys(names, 9), seed=seed)
    drawn = made.counts(start + 10**6) - made.counts(start)
    assert abs(drawn[tiny] - 1e6 * weights[names[tiny]]) <= 2
    assert all(drawn[k] == 0 for k, name in enumerate(names) if weights[name] == 0)


def test_no_order_is_left_between_the_domains_of_a_block() -> None:
    made = MixtureSchedule({"a": 0.5, "b": 0.5}, {"a": 10**6, "b": 10**6}, block=256)
    domain = made.assign(0, 256 * 400)[0].reshape(400, 256)
    assert np.abs(domain.sum(axis=1) - 128).max() <= 3
    follows = (domain[:, 1:] == domain[:, :-1]).mean()  # unscattered it would be 0.19
    assert abs(follows - 0.5) < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": {"a": 1}}, r"missing \['b'\], unknown \[\]"),
        ({"sizes": {"a": 1, "b": 2, "c": 3}}, r"unknown \['c'\]"),
        ({"sizes": {"a": 0, "b": 2}}, "'a' has weight but no rows"),
        ({"sizes": {"a": -1, "b": 2}}, "'a' has -1"),
        ({"seed": -1}, "seed must be"),
        ({"block": 0}, "block must be"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"weights": {"a": 0.5, "b": 0.5}, "sizes": {"a": 1, "b": 2}}
    with pytest.raises(ValueError, match=message):
        MixtureSchedule(**{**arguments, **change})


def test_publishing_leaves_the_past_and_changes_the_rest() -> None:
    made = MixtureSchedule({"a": 0.25, "b": 0.75}, {"a": 50, "b": 70})
    before = made.assign(0, 2000)
    made.publish({"a": 1.0, "b": 0.0}, start=1000)
    after = made.assign(0, 2000)
    assert all((old[:1000] == new[:1000]).all() for old, new in zip(before, after, strict=True))
    assert (after[0][1000:] == 0).all()
    assert made.weights_at(999) == pytest.approx({"a": 0.25, "b": 0.75})
    assert made.weights_at(1000) == {"a": 1.0, "b": 0.0}
    assert [(stage.start, stage.end) for stage in made.stages] == [(0, 1000), (1000, None)]


def test_a_cdf_computed_elsewhere_gives_the_same_stage() -> None:
    by_name, by_integers = two_stages(), MixtureSchedule({"a": 0.25, "b": 0.75}, {"a": 50, "b": 70})
    by_integers.publish(integer_cdf([0.9, 0.1]), start=1000)
    assert by_name.state_dict() == by_integers.state_dict()


def test_undecided_positions() -> None:
    made = two_stages()
    made.hold(2000)
    assert made.end == 2000
    made.assign(1990, 2000)
    assert made.counts(2000).sum() == 2000
    for look in (lambda: made.assign(1990, 2001), lambda: made.counts(2001), lambda: made.weights_at(2000)):
        with pytest.raises(Undecided, match=r"position 2000 is not decided yet.*publish\(weights, start=2000\)"):
            look()
    made.publish({"a": 0.0, "b": 1.0}, start=2000, end=3000)
    assert (made.assign(2000, 3000)[0] == 1).all()
    with pytest.raises(Undecided, match="position 3000"):
        made.assign(2500, 4000)
    for start, stop in ((-1, 3), (5, 4), (0, 1 << 62)):
        with pytest.raises(ValueError, match=f"not start={start}, stop={stop}"):
            made.assign(start, stop)


def test_stages_that_do_not_follow_are_refused() -> None:
    made = two_stages()
    half = {"a": 0.5, "b": 0.5}
    for start in (0, 999, 1000):
        with pytest.raises(ValueError, match=f"start={start} is in the past"):
            made.publish(half, start=start)
    with pytest.raises(ValueError, match="2 stages are published already"):
        made.begin(half)
    with pytest.raises(ValueError, match="end=1000 is not beyond"):
        made.hold(1000)
    made.hold(2000)
    made.hold(2000)
    with pytest.raises(ValueError, match="declared to end at 2000"):
        made.hold(2001)
    for start in (1500, 2500):
        with pytest.raises(ValueError, match="the next one starts at 2000"):
            made.publish(half, start=start)
    with pytest.raises(ValueError, match="end=2000 is not beyond"):
        made.publish(half, start=2000, end=2000)
    for wrong in (np.array([0.5, 1.0]), np.array([1, TOTAL - 1]), np.array([TOTAL]), np.array([TOTAL + 1, TOTAL])):
        with pytest.raises(ValueError, match="integer"):
            made.publish(wrong, start=2000)
    assert len(made.stages) == 2


def test_a_full_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STAGES", 2)
    made = two_stages()
    with pytest.raises(RuntimeError, match="all 2 stages"):
        made.publish({"a": 0.5, "b": 0.5}, start=2000)


@given(made=schedules(), held=st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_state_brings_back_the_same_order(made: MixtureSchedule, held: bool) -> None:
    if held:
        made.hold(4000)
    text = json.dumps(made.state_dict())
    twin = MixtureSchedule(made.stages[-1].weights, made.sizes, seed=made.seed, block=made.block)
    twin.load_state_dict(json.loads(text))
    assert json.dumps(twin.state_dict()) == text
    assert twin.stages == made.stages
    assert (np.array(twin.assign(500, 4000)) == np.array(made.assign(500, 4000))).all()


def test_a_state_is_small() -> None:
    made = two_stages()
    made.publish({"a": 0.5, "b": 0.5}, start=FAR)
    assert len(json.dumps(made.state_dict())) < 1000


def many_stages() -> MixtureSchedule:
    """A thousand stages of fifty domains, as random as they can be."""
    rng = np.random.default_rng(0)
    domains = [f"domain-{k}" for k in range(50)]
    made = MixtureSchedule(dict.fromkeys(domains, 0.02), dict.fromkeys(domains, 10**6))
    for number in range(1, 1000):
        made.publish(integer_cdf(rng.dirichlet(np.ones(50))), start=number * 10_000)
    return made


def test_a_state_is_continued_by_one_that_left_out_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a worker that read ahead, in a run of so many stages that the oldest are left out."""
    monkeypatch.setattr(packed, "_ROOM", 0)  # which leaves the newest four
    uniform, other = weights_of([1, 1, 1, 1, 1]), weights_of([1, 2, 1, 1, 1])
    made = MixtureSchedule(uniform, dict.fromkeys(names, 9))
    states = []
    for number in range(1, 12):
        made.publish(uniform if number % 2 else other, start=10 * number)
        states.append(made.state_dict())
    now = MixtureSchedule(uniform, dict.fromkeys(names, 9))
    now.load_state_dict(states[-1])
    assert [state["stages"]["first"] for state in states[-4:]] == [5, 6, 7, 8]
    assert [now.continues(state) for state in states[-5:]] == [False, True, True, True, True]
    made.load_state_dict(states[-2])
    made.publish(other, start=110)
    assert not now.continues(made.state_dict())


def test_a_state_of_very_many_stages_leaves_out_the_oldest_and_goes_on_exactly() -> None:
    made = many_stages()
    text = json.dumps(made.state_dict())
    assert len(text) < 100_000
    twin = MixtureSchedule(dict.fromkeys(made.names, 0.02), made.sizes)
    twin.load_state_dict(json.loads(text))
    first = twin.starts[0]
    assert twin.num_stages == 1000
    assert 0 < first < 9_000_000
    assert twin.stages == made.stages[-len(twin.stages) :]
    assert json.dumps(twin.state_dict()) == text
    for start in (first, 9_995_000):
        assert (np.array(twin.assign(start, start + 9000)) == np.array(made.assign(start, start + 9000))).all()
    for look in (lambda: twin.assign(first - 1, first), lambda: twin.counts(0), lambda: twin.weights_at(5)):
        with pytest.raises(LookupError, match="was left out of the state that was loaded"):
            look()
    weights = dict(zip(made.names, np.full(50, 0.02), strict=True))
    for each in (made, twin):
        each.publish(weights, start=10_000_000)
    assert (np.array(twin.assign(9_999_000, 10_001_000)) == np.array(made.assign(9_999_000, 10_001_000))).all()
    assert made.counts(10**9).tolist() == twin.counts(10**9).tolist()
    # More are kept where they are asked for.
    assert made.state_dict(since=1_234_567)["stages"]["starts"][0] == 1_200_000
    assert len(made.state_dict(since=0)["stages"]["starts"]) == 1001


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_is_equal_and_independent(make_copy: Any) -> None:
    made = two_stages()
    twin = make_copy(made)
    assert twin.state_dict() == made.state_dict()
    made.publish({"a": 0.5, "b": 0.5}, start=5000)
    assert len(twin.stages) == 2


@pytest.mark.parametrize(
    ("weights", "sizes", "options", "message"),
    [
        ({"a": 0.5, "c": 0.5}, {"a": 50, "c": 70}, {}, "domain 'c' is new; domain 'b' is gone"),
        ({"b": 0.5, "a": 0.5}, {"a": 50, "b": 70}, {}, r"order was \['a', 'b'\] and is \['b', 'a'\]"),
        ({"a": 0.5, "b": 0.5}, {"a": 50, "b": 71}, {}, "'b' had 70 rows and has 71"),
        ({"a": 0.5, "b": 0.5}, {"a": 50, "b": 70}, {"seed": 3}, "seed was 0 and is 3"),
        ({"a": 0.5, "b": 0.5}, {"a": 50, "b": 70}, {"block": 64}, "block was 256 and is 64"),
    ],
)
def test_a_state_of_another_schedule_is_refused(weights: Any, sizes: Any, options: Any, message: str) -> None:
    other = MixtureSchedule(weights, sizes, **options)
    before = other.state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(two_stages().state_dict())
    assert other.state_dict() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda stages: stages.clear(),
        lambda stages: stages.update(starts=[], weights=[]),
        lambda stages: stages["weights"].reverse(),
        lambda stages: stages["starts"].reverse(),
        lambda stages: stages.update(end=7),
        lambda stages: stages.update(first=1),
        lambda stages: stages["starts"].pop(),
        lambda stages: stages["weights"].__setitem__(0, "0" * 5),
    ],
)
def test_a_damaged_state_is_refused(damage: Any) -> None:
    made = two_stages()
    state = made.state_dict()
    damage(state["stages"])
    with pytest.raises(ValueError, match="damaged state"):
        made.load_state_dict(state)
    assert made.state_dict() == two_stages().state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": [], "weights": []}, "damaged state: 0 stages"),
        ({"starts": [0, 0]}, "damaged state: stage 1 cannot begin at 0"),
        ({"starts": [5, 1000]}, "damaged state: 2 stages, the first of them number 0"),
        ({"starts": [0]}, "damaged state"),
        ({"first": 4095}, "damaged state: 2 stages, the first of them number 4095"),
        ({"first": -1, "starts": [5, 1000]}, "damaged state: 2 stages, the first of them number -1"),
        ({"end": 7}, "end=7 is not beyond start=1000"),
        ({"weights": ["0 0", "0"]}, "damaged state: bad base85"),
        ({"weights": ["0" * 20, ""]}, "damaged state: a stage has the weights of 5 domains, of 2"),
    ],
)
def test_a_state_that_makes_no_sense_is_refused_though_its_check_is_right(change: Any, message: str) -> None:
    made = two_stages()
    state = made.state_dict()
    stages = {key: value for key, value in state["stages"].items() if key != "check"} | change
    with pytest.raises(ValueError, match=message):
        made.load_state_dict({**state, "stages": {**stages, "check": packed._check(stages)}})
    assert made.state_dict() == two_stages().state_dict()


def late(**sizes: int) -> list[JoinedDomain]:
    return [JoinedDomain(name, size, {"of": name}) for name, size in sizes.items()]


def grown() -> MixtureSchedule:
    """Two stages of two domains, a third with one that joined, and a fourth domain that has no stage yet."""
    made = two_stages()
    made.extend(late(c=30))
    made.publish({"a": 0.1, "b": 0.2, "c": 0.7}, start=2000)
    made.extend(late(d=9))
    return made


@given(data=st.data(), seed=st.integers(0, 2**63 - 1), block=st.integers(1, 300))
@settings(max_examples=25)
def test_domains_that_join_are_as_if_they_had_always_been_there_with_weight_0(
    data: st.DataObject, seed: int, block: int
) -> None:
    stages, start, present = [], 0, data.draw(st.integers(1, 4))
    sizes = {name: data.draw(st.integers(1, 400)) for name in names}
    for more in [0, *data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))]:
        joining = names[present : present + more]
        present += len(joining)
        values = data.draw(st.lists(st.floats(0.01, 1) | st.just(0.0), min_size=present, max_size=present).filter(any))
        stages.append((start, joining, dict(zip(names, [v / sum(values) for v in values], strict=False))))
        start += data.draw(st.integers(1, 700))
    full = [(at, dict.fromkeys(names, 0.0) | weights) for at, _, weights in stages]
    reference = MixtureSchedule(full[0][1], sizes, seed=seed, block=block)
    made = MixtureSchedule(stages[0][2], {name: sizes[name] for name in stages[0][2]}, seed=seed, block=block)
    for (at, joining, weights), (_, all_weights) in zip(stages[1:], full[1:], strict=True):
        made.extend([JoinedDomain(name, sizes[name], {}) for name in joining])
        cdf = integer_cdf(list(all_weights.values()))
        made.publish(weights if data.draw(st.booleans()) else cdf[: len(weights)], start=at)
        reference.publish(cdf, start=at)
    made.extend([JoinedDomain(name, sizes[name], {}) for name in names[present:]])
    assert made.names == reference.names
    assert made.sizes == reference.sizes
    assert made.stages == reference.stages
    assert (np.array(made.assign(0, 3000)) == np.array(reference.assign(0, 3000))).all()
    for position in (0, 1, *(at for at, *_ in stages), 2500, FAR):
        assert made.counts(position).tolist() == reference.counts(position).tolist()
        assert made.weights_at(position) == reference.weights_at(position)
    state, expected = made.state_dict(), reference.state_dict()
    assert len(state.pop("joined", [])) == len(names) - len(stages[0][2])
    assert state == expected


def test_joining_leaves_every_position_as_it_was() -> None:
    made = two_stages()
    before, generation = made.assign(0, 3000), made.generation
    made.extend(late(c=30))
    assert made.generation > generation
    assert all((old == new).all() for old, new in zip(before, made.assign(0, 3000), strict=True))
    assert made.weights_at(500) == pytest.approx({"a": 0.25, "b": 0.75, "c": 0.0})
    made.publish({"a": 0.0, "b": 0.0, "c": 1.0}, start=2000)
    after = made.assign(0, 3000)
    assert all((old[:2000] == new[:2000]).all() for old, new in zip(before, after, strict=True))
    assert (after[0][2000:] == 2).all()
    assert after[2][-1] == 999 // 30


def test_the_first_stage_may_begin_with_a_domain_that_joined() -> None:
    made = MixtureSchedule({"a": 1.0}, {"a": 5})
    made.hold(64)
    made.extend(late(b=6))
    made.begin({"a": 0.5, "b": 0.5})
    assert made.end == 64
    assert set(made.assign(0, 64)[0].tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (late(e=5, a=3), "there is a domain 'a' already: give the one that joins another name"),
        (late(c=3), "there is a domain 'c' already"),
        ([*late(e=5), *late(e=6)], "there is a domain 'e' already"),
        (late(e=5, f=0), "domain 'f' would join with 0 rows"),
        ([JoinedDomain(3, 5, {})], "must be strings, not 3"),  # type: ignore[arg-type]
        (late(**{f"x{i}": 1 for i in range(MAX_JOINED - 1)}), "cannot join the 2 that did: there is room for 1024"),
        ([JoinedDomain("e" * 2**24, 5, {})], "16 MiB .* are used up"),
    ],
)
def test_domains_that_cannot_join_change_nothing(domains: list[JoinedDomain], message: str) -> None:
    made = grown()
    before, generation = made.state_dict(), made.generation
    for attempt in (made.extend, made.check_new):
        with pytest.raises(ValueError, match=message):
            attempt(domains)
    assert made.state_dict() == before
    assert made.generation == generation
    made.extend(late(e=5))
    assert made.names == ("a", "b", "c", "d", "e")


def test_as_many_may_join_as_there_is_room_for() -> None:
    made = two_stages()
    made.extend(late(**{f"x{i}": i + 1 for i in range(MAX_JOINED)}))
    weights = dict.fromkeys(made.names, 1 / len(made.names))
    made.publish(weights, start=2000)
    assert np.bincount(made.assign(2000, 2000 + 50 * len(weights))[0]).min() > 40
    assert made.counts(10**6).sum() == 10**6
    twin = two_stages()
    twin.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert (np.array(twin.assign(1900, 4000)) == np.array(made.assign(1900, 4000))).all()


@pytest.mark.parametrize("make", [two_stages, grown])
def test_a_state_replaces_what_joined_since(make: Any) -> None:
    text = json.dumps(make().state_dict())
    others = two_stages(), grown(), MixtureSchedule({"a": 0.5, "b": 0.5}, {"a": 50, "b": 70})
    others[1].extend(late(e=8, f=9))
    for other in others:
        generation = other.generation
        other.load_state_dict(json.loads(text))
        assert json.dumps(other.state_dict()) == text
        assert other.generation > generation
        assert other.joined == make().joined
        assert (np.array(other.assign(0, 3000)) == np.array(make().assign(0, 3000))).all()
        other.extend(late(z=4))  # and goes on from there
        assert other.names == (*make().names, "z")


def test_a_state_without_such_domains_is_what_it_was() -> None:
    assert list(two_stages().state_dict()) == ["version", "seed", "block", "names", "sizes", "stages"]
    assert grown().state_dict()["joined"] == [{"of": "c"}, {"of": "d"}]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state["joined"].append({}), "domain 'b' is new"),
        (lambda state: state["joined"].extend([{}] * 9), "damaged state: 11 of its 4 domains joined"),
        (lambda state: state["joined"].pop(), "domain 'c' is gone"),
        (lambda state: state["names"].__setitem__(3, "a"), "there is a domain 'a' already"),
        (lambda state: state["sizes"].__setitem__(3, 0), "domain 'd' would join with 0 rows"),
        (lambda state: state["stages"]["weights"].__setitem__(2, "x"), "damaged state: its stages are not what was"),
    ],
)
def test_a_damaged_state_with_such_domains_is_refused(damage: Any, message: str) -> None:
    state, made = grown().state_dict(), two_stages()
    damage(state)
    with pytest.raises(ValueError, match=message):
        made.load_state_dict(state)
    assert made.state_dict() == two_stages().state_dict()


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_has_the_domains_that_joined_and_stays_small(make_copy: Any) -> None:
    made = grown()
    twin = make_copy(made)
    assert twin.state_dict() == made.state_dict()
    made.extend(late(e=5))
    assert twin.names == ("a", "b", "c", "d")
    assert len(pickle.dumps(made)) < 3000


def watch(made: MixtureSchedule, ready: Any, out: Any) -> None:
    """Read without a pause while another process extends and publishes; say what was seen when all is there."""
    rounds = 0
    while len(made.names) < 42 or len(made._table) < 41:
        domain, row, _ = made.assign(0, 900)
        assert len(made.counts(900)) >= 2 > domain.max()
        assert (row < np.array([50, 70])[domain]).all()
        assert all(abs(sum(stage.weights.values()) - 1) < 1e-9 for stage in made.stages)
        made.assign(900, 6000)
        ready.set()
        rounds += 1
    out.put((rounds, [part.tolist() for part in made.assign(0, 6000)], made.state_dict()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_that_reads_meanwhile_sees_whole_things_only(method: str) -> None:
    made = MixtureSchedule({"a": 0.25, "b": 0.75}, {"a": 50, "b": 70})
    processes: Any = multiprocessing.get_context(method)
    ready, out = processes.Event(), processes.Queue()
    reader = processes.Process(target=watch, args=(made, ready, out), daemon=True)
    reader.start()
    assert ready.wait(60)
    for k in range(40):
        made.extend(late(**{f"x{k}": k + 1}))
        made.publish(dict.fromkeys(made.names, 1 / len(made.names)), start=1000 + 100 * k)
    rounds, order, state = out.get(timeout=60)
    reader.join(60)
    assert rounds >= 1
    assert order == [part.tolist() for part in made.assign(0, 6000)]
    assert state == made.state_dict()
