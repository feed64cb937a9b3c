"""Boundaries within `fit`: after a number of steps, and where the loss tells that a task began."""

import keras
import numpy as np
import pytest
from cases import blobs, compiled

from keras_dwd.callbacks import ConsolidateEvery, ConsolidateOnDrift
from keras_dwd.curvature.diagonal import DiagonalFisher


def stream(*parts):
    """Batches of 8, in the order of the parts."""
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return {"x": x, "y": y, "batch_size": 8, "shuffle": False, "verbose": 0}


def test_it_consolidates_after_each_number_of_steps():
    def made():
        keras.utils.set_random_seed(0)
        return compiled()

    same, other, every = made(), made(), ConsolidateEvery(3)
    x, y = blobs(64)
    same.fit(x[:24], y[:24], batch_size=8, shuffle=False, verbose=0)
    same.consolidate(verbose=0)
    same.fit(x[24:40], y[24:40], batch_size=8, shuffle=False, verbose=0)
    other.fit(**stream((x[:40], y[:40])), callbacks=[every])
    assert every.boundaries == [3]
    for a, b in zip(same.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    other.fit(**stream((x, y)), callbacks=[every])  # counts on
    assert every.boundaries == [3, 6, 9, 12]
    assert other.tasks_learned == 4


def test_a_new_task_is_found_from_the_loss():
    x, y = blobs(800)
    model, drift = compiled(optimizer=keras.optimizers.SGD(0.2)), ConsolidateOnDrift(least=30)
    model.fit(**stream((x, y), (x, (y + 1) % 3)), callbacks=[drift])
    (found,) = drift.boundaries
    assert 102 <= found <= 106
    assert model.tasks_learned == 1


def naive(losses, threshold=10.0, slack=0.5, memory=30):
    """The test with the mean and deviation as explicit sums over all losses, in which it ends."""
    total = 0.0
    for n, loss in enumerate(losses):
        before = np.array(losses[:n])
        if n >= memory:
            weights = []
            for i in range(n):  # the share of each loss, which fades as others come after it
                share = max(1 / memory, 1 / (i + 1))
                fading = np.prod([1 - max(1 / memory, 1 / (k + 1)) for k in range(i + 1, n)])
                weights.append(share * fading)
            mean = np.dot(weights, before)
            deviation = np.sqrt(np.dot(weights, before**2) - mean**2)
            total = max(0.0, total + (loss - mean) / deviation - slack)
        if total > threshold:
            return n
    return None


def test_the_test_is_that_of_page_and_hinkley():
    rng = np.random.default_rng(0)
    losses = [*rng.normal(1, 0.2, 90), *rng.normal(1.3, 0.2, 60)]
    test = ConsolidateOnDrift()
    found = next(n for n, loss in enumerate(losses) if test.drifts(loss))
    assert found == naive(losses)
    assert 90 <= found < 125


def test_noise_outliers_and_falling_losses_are_no_drift():
    rng = np.random.default_rng(0)
    noise = rng.normal(1, 0.2, 3000)
    noise[500::500] = 9.0
    falling = np.geomspace(2, 0.1, 500) * rng.lognormal(0, 0.2, 500)
    for losses in (noise, falling, np.ones(200), [np.nan] * 100):
        test = ConsolidateOnDrift()
        assert not any(test.drifts(loss) for loss in losses)


def test_the_loss_of_a_step_is_told_from_the_mean_of_the_epoch(monkeypatch):
    seen = []
    monkeypatch.setattr(ConsolidateOnDrift, "drifts", lambda self, loss: seen.append(loss))
    x, y = blobs(32)
    model = compiled(optimizer=keras.optimizers.SGD(0.0), fisher=DiagonalFisher("batch", None))
    model.fit(**stream((x, y)), epochs=2, callbacks=[ConsolidateOnDrift()])
    expected = [model.evaluate(x[i : i + 8], y[i : i + 8], verbose=0)[0] for i in range(0, 32, 8)]
    np.testing.assert_allclose(seen, 2 * expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("made", "error"),
    [
        (lambda: ConsolidateEvery(0), "`steps` must be"),
        (lambda: ConsolidateOnDrift(threshold=-1), "`threshold` must be"),
        (lambda: ConsolidateOnDrift(memory=1), "`memory` must be"),
    ],
)
def test_bad_settings_are_refused(made, error):
    with pytest.raises(ValueError, match=error):
        made()
