import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from dynmix.laws.experts import Experts

TOKENS = {"web": 3001, "code": 17, "math": 9000}  # neither whole chunks nor multiples of four


def log_probabilities(k=4, seed=0):
    """Experts that are good at different tokens; natural logarithms, float64[k, n_tokens]."""
    return -np.random.default_rng(seed).gamma(1.5, 2.5, size=(k, sum(TOKENS.values())))


def slowly(log_p, W):
    """The formula as it is written, token by token in float64."""
    ends = np.cumsum(list(TOKENS.values()))[:-1]
    return np.array([[-np.log(w @ np.exp(part)).mean() for part in np.split(log_p, ends, axis=1)] for w in W])


def mixtures(n, k=4, seed=0, concentration=0.3):
    return np.random.default_rng(seed).dirichlet(np.full(k, concentration), size=n)


@pytest.fixture(scope="module")
def experts():
    return Experts(log_probabilities(), TOKENS)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 70), memory=st.sampled_from([0, 1 << 30]))
def test_losses_are_the_formulas(seed, n, memory):
    log_p, W = log_probabilities(seed=seed), mixtures(n, seed=seed)
    np.testing.assert_allclose(Experts(log_p, TOKENS, memory=memory).losses(W), slowly(log_p, W), atol=2e-6)


def test_a_corner_is_the_experts_own_loss_however_bad():
    log_p = log_probabilities()
    log_p[1, 5] = -75.0
    log_p[1:, 7] = -60.0  # every expert but one is hopeless
    experts = Experts(log_p, TOKENS)
    np.testing.assert_allclose(experts.corners, slowly(log_p, np.eye(4)), rtol=1e-6)
    np.testing.assert_array_equal(experts.corners, experts.losses(np.eye(4)))


def test_blas_has_one_thread_as_long_as_the_tokens_are_passed_over(experts, monkeypatch):
    def threads():
        return {each["num_threads"] for each in threadpool_info() if "numpy" in each["filepath"]}

    seen = []
    monkeypatch.setattr("dynmix.laws.experts._log_sums", lambda p: seen.append(threads()) or p.sum(axis=1))
    with threadpool_limits(2, user_api="blas"):
        before = threads()
        experts.losses(mixtures(3))
        assert threads() == before
    assert all(each <= {1} for each in seen)


def test_products_of_tiny_probabilities_do_not_vanish():
    """An expert that is e^-30 times as good as the best at every token: four of them leave float32."""
    log_p = log_probabilities()
    log_p[1] = log_p[0] - 30
    np.testing.assert_allclose(Experts(log_p[:2], TOKENS).corners, slowly(log_p[:2], np.eye(2)), rtol=1e-6)


@pytest.mark.parametrize("shift", [-5.0, -300.0])
def test_tokens_that_all_experts_find_unlikely_underflow_nothing(shift):
    log_p, W = log_probabilities() + shift, mixtures(5)
    wanted = slowly(log_p - shift, W) - shift
    np.testing.assert_allclose(Experts(log_p, TOKENS).losses(W), wanted, rtol=1e-6)


def test_an_expert_that_gives_a_token_nothing_costs_a_mixture_only_its_weight():
    log_p = log_probabilities()
    log_p[0, :9] = -np.inf
    experts, w = Experts(log_p, TOKENS), np.array([[0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(experts.losses(w), slowly(log_p, w), atol=2e-6)
    assert np.isfinite(experts.corners).all()


def test_float16_is_enough():
    log_p, W = log_probabilities(), mixtures(50)
    off = Experts(log_p.astype(np.float16), TOKENS).losses(W) - slowly(log_p, W)
    assert np.abs(off[:, 2]).max() < 5e-5  # of 9,000 tokens; losses of mixtures differ by tenths
    assert np.ptp(slowly(log_p, W)[:, 2]) > 0.1


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_gradient_and_curvature_are_those_of_finite_differences(memory):
    log_p, criterion = log_probabilities(), np.array([0.5, 0.2, 0.3])
    experts = Experts(log_p, TOKENS, memory=memory)
    W = mixtures(3, concentration=2)
    losses, gradients = experts.slopes(W)
    np.testing.assert_allclose(losses, slowly(log_p, W), atol=2e-6)
    for k, unit in enumerate(np.eye(4)):
        difference = (slowly(log_p, W + 1e-5 * unit) - slowly(log_p, W - 1e-5 * unit)) / 2e-5
        np.testing.assert_allclose(gradients[:, :, k], difference, rtol=1e-4)
    p = np.exp(log_p)
    weight = np.repeat(criterion / np.array(list(TOKENS.values())), list(TOKENS.values()))
    exact = (weight * p / (W[0] @ p) ** 2) @ p.T
    np.testing.assert_allclose(experts.curvature(W[0], criterion), exact, rtol=1e-4)


@given(st.integers(0, 2**31))
def test_gradient_along_the_weights_is_minus_one(experts, seed):
    """L is a logarithm of a linear form: w . dL/dw = -1 in every set, whatever the experts."""
    W = mixtures(4, seed=seed)
    np.testing.assert_allclose((experts.slopes(W).gradients * W[:, None]).sum(axis=2), -1, rtol=1e-5)


def test_a_sample_is_near_the_whole_and_keeps_the_sets():
    experts = Experts(log_probabilities(), TOKENS, list("abcd"))
    some = experts.sample(2000)
    assert some.tokens == (2000, 17, 2000)
    assert (some.targets, some.names) == (experts.targets, experts.names)
    W = mixtures(10)
    np.testing.assert_allclose(some.losses(W)[:, 1], experts.losses(W)[:, 1], rtol=1e-6)
    np.testing.assert_allclose(some.losses(W), experts.losses(W), atol=0.3)


def test_the_experts_own_losses_are_of_all_tokens_in_a_sample_too():
    # They stand beside losses of runs, which are: of 17 tokens they were off by as much as mixtures differ.
    experts = Experts(log_probabilities(), TOKENS, list("abcd"))
    some = experts.sample(17)
    assert np.abs(some.losses(np.eye(4)) - experts.corners).max() > 0.1
    np.testing.assert_array_equal(some.corners, experts.corners)
    np.testing.assert_array_equal(some.only(some.targets[:0:-1]).corners, experts.corners[:, :0:-1])


def test_a_cache_holds_what_was_written(tmp_path):
    log_p, W = log_probabilities(), mixtures(5)
    written = Experts.write(tmp_path / "cache", dict(zip("abcd", log_p, strict=True)), TOKENS)
    opened = Experts.open(tmp_path / "cache", memory=0)
    assert opened.names == written.names == ("a", "b", "c", "d")
    assert opened.targets == tuple(TOKENS)
    np.testing.assert_allclose(opened.losses(W), written.losses(W), rtol=1e-6)
    np.testing.assert_allclose(opened.losses(W), Experts(log_p.astype(np.float16), TOKENS).losses(W), rtol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]
    with pytest.raises(FileExistsError, match="delete it"):
        Experts.write(tmp_path / "cache", {"a": log_p[0]}, TOKENS)


def test_a_cache_is_whole_or_absent(tmp_path):
    log_p = log_probabilities()
    lost = log_p.copy()
    lost[:, 11] = -1e5  # beyond float16: no expert gives it any probability
    cases = (log_p[:, :-1], "expert 'a' has shape"), (log_p + 9, "token 0 by expert"), (lost, "token 11 by expert")
    for values, said in cases:
        with pytest.raises(ValueError, match=said):
            Experts.write(tmp_path / "cache", dict(zip("abcd", values, strict=True)), TOKENS)
        assert not list(tmp_path.iterdir())


def test_a_damaged_cache_says_what_is_wrong(tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"experts.json.*write it again"):
        Experts.open(folder)
    Experts.write(folder, dict(zip("abcd", log_probabilities(), strict=True)), TOKENS)
    whole, meta = (folder / "log_probabilities.npy").read_bytes(), json.loads((folder / "experts.json").read_text())
    (folder / "log_probabilities.npy").write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match="no cache of experts"):
        Experts.open(folder)
    (folder / "log_probabilities.npy").write_bytes(whole)
    for change, said in (
        ({"experts": ["a"]}, "4 different"),
        ({"tokens": {"web": 1}}, "12018"),
        ({"format": 2}, "format 2"),
    ):
        (folder / "experts.json").write_text(json.dumps(meta | change))
        with pytest.raises(ValueError, match=said):
            Experts.open(folder)


def test_refusals_say_where():
    log_p = log_probabilities()
    log_p[2, 40] = np.nan
    with pytest.raises(ValueError, match="token 40 by expert '2' is nan"):
        Experts(log_p, TOKENS)
    with pytest.raises(ValueError, match="token 40 by expert '2' is nan"):
        Experts(log_p, TOKENS, memory=0).losses(mixtures(1))
    log_p[:, 40] = -np.inf
    with pytest.raises(ValueError, match="token 40 .* one that is finite"):
        Experts(log_p, TOKENS)
    with pytest.raises(ValueError, match="int64"):
        Experts(np.zeros((2, 3), dtype=np.int64), {"a": 3})
    with pytest.raises(ValueError, match="4 different ones"):
        Experts(log_probabilities(), TOKENS, ["a", "a", "b", "c"])
    with pytest.raises(ValueError, match="3 domains"):
        Experts(log_probabilities(), TOKENS).losses(np.eye(3))
