import numpy as np

from dynmix.laws import BiMix


def test_recovers_the_domain_and_the_law_of_each_target():
    rng = np.random.default_rng(0)
    W = rng.dirichlet(np.full(5, 0.5), size=60)
    own = np.array([3, 0, 4])
    L = np.array([1.0, 2.0, 0.5]) + 0.7 * (W[:, own] + 0.003) ** np.array([-0.1, -0.3, -0.5])
    law = BiMix().fit(W, L)
    np.testing.assert_array_equal(law.own_, own)
    new = rng.dirichlet(np.full(5, 0.5), size=100)
    wanted = np.array([1.0, 2.0, 0.5]) + 0.7 * (new[:, own] + 0.003) ** np.array([-0.1, -0.3, -0.5])
    assert (np.abs(law.predict(new) - wanted) < 0.1 * wanted.std(axis=0)).mean() > 0.95


def test_a_weight_of_zero_has_a_finite_loss():
    W = np.random.default_rng(0).dirichlet(np.ones(3), size=20)
    law = BiMix().fit(W, W[:, :1] ** -0.2)
    assert np.isfinite(law.predict(np.eye(3))).all()


def test_more_of_a_domain_never_hurts_its_own_target():
    rng = np.random.default_rng(1)
    W = rng.dirichlet(np.ones(3), size=30)
    law = BiMix().fit(W, rng.standard_normal((30, 2)))
    line = np.linspace(0, 1, 20)[:, None]
    for target, own in enumerate(law.own_):
        path = line * np.eye(3)[own] + (1 - line) * np.eye(3)[(own + 1) % 3]
        assert (np.diff(law.predict(path)[:, target]) <= 1e-12).all()
