from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynmix.mixture.quota import TOTAL, Quota

FAR = [0, TOTAL - 150, TOTAL, 10**12, 3 * TOTAL // 2, 2**61]


@st.composite
def quotas(draw: st.DrawFn) -> Quota:
    """Any weights, from one unit to all of them, 0 included, and up to a few draws owed either way."""
    cuts = st.one_of(st.integers(0, TOTAL), st.sampled_from([0, 1, TOTAL // 2, TOTAL - 1, TOTAL]))
    edges = [0, *sorted(draw(st.lists(cuts, max_size=7))), TOTAL]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    most = draw(st.sampled_from([0, TOTAL // 2, 5 * TOTAL]))
    keys, owed = rng.integers(0, 2**64, len(edges) - 1, np.uint64), rng.integers(-most, most + 1, len(edges) - 1)
    return Quota(np.diff(np.array(edges)), keys, owed)


def hashed(word: int) -> int:
    """SplitMix64."""
    word = (word + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def draws_one_by_one(quota: Quota, number: int) -> list[int]:
    """Domains of the first draws: the moment of every one of them in Python's own integers, sorted."""
    moments = []
    for domain, (unit, key, owed) in enumerate(zip(*(part.tolist() for part in quota), strict=True)):
        draw = 0
        while unit:
            place = 1 + 3 * TOTAL // 8 + (hashed((key + draw) % 2**64) >> 34)
            moment = max(0, -(-(draw * TOTAL + place - owed) // unit))
            if moment > number + 6 * len(quota.units):
                break
            moments.append((moment, domain, draw))
            draw += 1
    return [domain for _, domain, _ in sorted(moments)][:number]


@given(quota=quotas(), cuts=st.lists(st.integers(0, 400), min_size=2, max_size=5))
@example(Quota(np.array([TOTAL]), np.array([7], np.uint64), np.array([0])), [0, 400])
@example(Quota(np.array([TOTAL, 0]), np.array([7, 7], np.uint64), np.array([-(3 << 31), 3 << 31])), [0, 400])
def test_draws_and_counts_are_those_one_by_one(quota: Quota, cuts: list[int]) -> None:
    expected = draws_one_by_one(quota, 400)
    start, stop = min(cuts), max(cuts)
    domain, after = quota.domains(start, stop, quota.before(start))
    assert domain.tolist() == expected[start:stop]
    assert after.tolist() == np.bincount(expected[:stop], minlength=len(quota.units)).tolist()
    for cut in cuts:
        assert quota.before(cut).tolist() == np.bincount(expected[:cut], minlength=len(quota.units)).tolist()


@given(quota=quotas(), origin=st.sampled_from(FAR) | st.integers(0, 2**61), cut=st.integers(0, 300))
def test_counts_agree_with_draws_however_far(quota: Quota, origin: int, cut: int) -> None:
    before, middle = quota.before(origin), quota.before(origin + cut)
    whole, after = quota.domains(origin, origin + 300, before)
    assert before.sum() == origin
    assert (
        np.concatenate(
            [quota.domains(origin, origin + cut, before)[0], quota.domains(origin + cut, origin + 300, middle)[0]]
        )
        == whole
    ).all()
    assert (middle - before).tolist() == np.bincount(whole[:cut], minlength=len(quota.units)).tolist()
    assert (after - before).tolist() == np.bincount(whole, minlength=len(quota.units)).tolist()


@given(quota=quotas(), origin=st.sampled_from(FAR) | st.integers(0, 2**61))
def test_a_domain_is_off_by_no_more_than_rounding(quota: Quota, origin: int) -> None:
    late = len(quota.units) + np.abs(quota.owed).sum() / TOTAL  # moments, because the other domains are early
    for unit, owed, drawn in zip(quota.units.tolist(), quota.owed.tolist(), quota.before(origin).tolist(), strict=True):
        share = (unit * origin + owed) // TOTAL if unit else 0
        waiting = abs(owed) / TOTAL if origin < 100 else 0  # what is owed are the first draws, and takes some
        assert abs(drawn - max(0, share)) <= 2 + waiting + late * unit / TOTAL
        assert unit or not drawn


@given(quota=quotas(), moment=st.integers(0, 2000))
def test_what_is_nearer_than_three_eighths_of_a_draw_is_rounded_to_it(quota: Quota, moment: int) -> None:
    for unit, owed, drawn in zip(quota.units.tolist(), quota.owed.tolist(), quota._by(moment).tolist(), strict=True):
        share = unit * moment + owed
        if unit and share > 0 and min(share % TOTAL, -share % TOTAL) <= 3 * TOTAL // 8:
            assert drawn == (share + TOTAL // 2) // TOTAL


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_a_5000_domain_mixture_is_exact_too(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = rng.multinomial(TOTAL, rng.dirichlet(np.full(5000, 0.3)))
    quota = Quota(units, rng.integers(0, 2**64, 5000, np.uint64), rng.integers(-TOTAL, TOTAL, 5000))
    domain, after = quota.domains(10**12, 10**12 + 20_000, quota.before(10**12))
    assert (after - quota.before(10**12)).tolist() == np.bincount(domain, minlength=5000).tolist()
    assert np.abs(after - units * ((10**12 + 20_000) / TOTAL)).max() < 3


def test_a_count_takes_few_steps_where_all_weights_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def counted(self: Quota, moment: int) -> Any:
        looked.append(moment)
        return by(self, moment)

    by = Quota._by
    monkeypatch.setattr(Quota, "_by", counted)
    rng, share = np.random.default_rng(0), TOTAL // 5000
    units = np.full(5000, share) + (np.arange(5000) < TOTAL - share * 5000)
    quota = Quota(units, rng.integers(0, 2**64, 5000, np.uint64), np.zeros(5000, np.int64))
    for number in rng.integers(0, 10**12, 20).tolist():
        assert quota.before(number).sum() == number
    assert len(looked) < 20 * 6
