"""The main job end to end, on data that scikit-learn carries: learn, shrink, know when unsure."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_vdrop as kv
from keras_vdrop.cli import demo


@pytest.fixture(scope="module")
def digits():
    return demo.load_digits(seed=0)


@pytest.mark.slow
def test_a_plain_rnn_around_the_cell_reads_digits_row_by_row(digits):
    (x, y), (x_test, y_test) = digits
    model = keras.Sequential(
        [keras.Input((8, 8)), layers.RNN(kv.VariationalLSTMCell(64, kernel_prior="ard")), layers.Dense(10)]
    )
    elbo = kv.ELBO(len(x), warmup_epochs=20)
    demo.train(model, x[..., 0], y, epochs=40, callbacks=[elbo], rate=0.02, verbose=0)
    accuracy = (model.predict(x_test[..., 0], verbose=0).argmax(-1) == y_test).mean()
    assert accuracy >= 0.93, accuracy
    assert kv.prune(model).ratio > 10
    assert (model.predict(x_test[..., 0], verbose=0).argmax(-1) == y_test).mean() >= 0.93


def test_nothing_is_written_over(tmp_path):
    first = demo.fresh_folder(tmp_path / "demo")
    assert first == tmp_path / "demo" == demo.fresh_folder(tmp_path / "demo")  # still empty
    (first / "model.keras").touch()
    assert demo.fresh_folder(tmp_path / "demo") == tmp_path / "demo-2"


@pytest.mark.slow
def test_demo_functions_agree_with_each_other(digits, tmp_path):
    (x, y), (x_test, y_test) = digits
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), kv.VariationalDense(10)])
    demo.train(model, x, y, epochs=8, callbacks=[kv.ELBO(len(x), warmup_epochs=4)], verbose=0)
    before = model.get_weights()
    sampler = kv.MonteCarlo(model, 32, output="samples")
    left, samples, mean = demo.frontier(sampler, x_test, y_test, thresholds=[-4.0, 0.0, 3.0])
    assert left == sorted(left) and left[-1] == kv.sparsity(model, 3.0).left
    assert np.shape(samples) == (3, 32) and mean[-1] > 0.7
    for one, other in zip(before, model.get_weights()):
        np.testing.assert_array_equal(one, other)
    demo.draw(model, (left, samples, mean), left[-1], tmp_path / "digits.png")
    assert (tmp_path / "digits.png").stat().st_size > 10_000
