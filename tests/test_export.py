"""What `compact` makes goes where Keras's own models go: SavedModel, ONNX, LiteRT, int8."""

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from tests.cases import array, posteriors, randomize, stock

BACKEND = keras.backend.backend()


def only_on(*backends, reason="Keras does not export this from the backend"):
    return pytest.mark.skipif(BACKEND not in backends, reason=reason)


def digits():
    """A convolutional network, four of whose six filters are left."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            kv.VariationalConv2D(6, 3, activation="relu", kl_weight=0.1),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            kv.VariationalDense(10, kl_weight=0.1),
        ]
    )
    return model, np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype("float32")


def text():
    """An embedding and an LSTM, four of whose six columns and units are left; some sentences end in padding."""
    tokens = keras.Input((12,), dtype="int32")
    words = kv.VariationalEmbedding(20, 6, mask_zero=True, kl_weight=0.1)(tokens)
    h = kv.VariationalLSTM(6, kl_weight=0.1)(words)
    x = np.random.default_rng(0).integers(1, 20, (3, 12)).astype("int32")
    x[1:, -2:] = 0
    return keras.Model(tokens, kv.VariationalDense(1, kl_weight=0.1)(h)), x


@pytest.fixture(scope="module", params=[digits, text], ids=["digits", "text"])
def served(request):
    """A compacted model, inputs, and what the variational model predicts for them."""
    keras.utils.set_random_seed(0)
    model, x = request.param()
    randomize(model, log_variance=(-9.0, -8.0))
    for weight in posteriors(model)[:-1]:
        weight.mask.assign(np.broadcast_to(np.arange(weight.shape[-1]) % 6 < 4, weight.shape))
    kv.prune(model, 50.0)
    small = kv.compact(model, 50.0)
    assert stock(small) and small.count_params() < kv.to_deterministic(model).count_params()
    return small, x, array(model(x))


@only_on("tensorflow", "jax")
def test_saved_model(served, tmp_path):
    import tensorflow as tf

    small, x, expected = served
    small.export(tmp_path / "model", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "model")
    np.testing.assert_allclose(loaded.serve(x), expected, rtol=1e-4, atol=1e-5)


@only_on("tensorflow", reason="of what jax2onnx 0.17 makes of pooling, ONNX Runtime 1.32 says: unsupported size")
def test_onnx(served, tmp_path):
    small, x, expected = served
    np.testing.assert_allclose(run_onnx(small, tmp_path / "model.onnx", x), expected, rtol=1e-4, atol=1e-5)


def run_onnx(model, path, x):
    """What ONNX Runtime predicts with the exported model."""
    pytest.importorskip("tf2onnx")
    runtime = pytest.importorskip("onnxruntime")
    model.export(path, format="onnx", verbose=False)
    session = runtime.InferenceSession(path)
    (inputs,) = session.get_inputs()
    return session.run(None, {inputs.name: x})[0]


def run_litert(path, x):
    """What the interpreter predicts, one example at a time."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter(str(path))
    runner = interpreter.get_signature_runner()
    (name,) = runner.get_input_details()
    return np.concatenate([next(iter(runner(**{name: each[None]}).values())) for each in x])


@pytest.mark.slow
@only_on("tensorflow")
@pytest.mark.skipif('"litert"' not in keras.Model.export.__doc__, reason="this Keras has no LiteRT yet")
@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "int8"])
def test_litert(served, tmp_path, quantized):
    import tensorflow as tf

    small, x, expected = served
    one = [keras.InputSpec(shape=(1, *x.shape[1:]), dtype=x.dtype.name)]  # a loop over time asks for a fixed batch
    options = {"optimizations": [tf.lite.Optimize.DEFAULT]} if quantized else {}
    path = tmp_path / "model.tflite"
    small.export(path, format="litert", input_signature=one, verbose=False, **options)
    tolerance = 0.05 * np.abs(expected).max() if quantized else 1e-5
    np.testing.assert_allclose(run_litert(path, x), expected, rtol=1e-4, atol=tolerance)


@pytest.mark.slow
def test_int8(served, tmp_path):
    """Within 5 % of the largest output, and the same once it is saved and loaded."""
    small, x, expected = served
    small.save(tmp_path / "small.keras")
    quantized = keras.saving.load_model(tmp_path / "small.keras")
    quantized.quantize("int8")
    predicted = array(quantized(x))
    np.testing.assert_allclose(predicted, expected, atol=0.05 * np.abs(expected).max())
    quantized.save(tmp_path / "int8.keras")
    again = keras.saving.load_model(tmp_path / "int8.keras")
    assert keras.backend.standardize_dtype(again.layers[-1].kernel.dtype) == "int8"
    np.testing.assert_allclose(array(again(x)), predicted, rtol=1e-6, atol=1e-6)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        again.export(tmp_path / "int8", verbose=False)
        loaded = tf.saved_model.load(tmp_path / "int8")  # what serves must outlive the call
        np.testing.assert_allclose(loaded.serve(x), predicted, rtol=1e-4, atol=1e-5)
        of_onnx = run_onnx(again, tmp_path / "int8.onnx", x)
        np.testing.assert_allclose(of_onnx, expected, atol=0.05 * np.abs(expected).max())
