"""The scope means the same wherever a model runs: compiled, nested, in threads, on replicas."""

import concurrent.futures
import contextlib
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from keras_vdrop.sampling import FixedSeeds, OneDraw
from tests.cases import array

X, Y = np.random.default_rng(0).normal(size=(64, 4)).astype("float32"), np.zeros((64, 3), "float32")

BACKEND = keras.backend.backend()
# PyTorch compiles for a minute.
COMPILED = [False, True] if BACKEND != "torch" else [False]


def network(jit_compile=False, **arguments):
    layers = [kv.VariationalDense(8, activation="tanh"), kv.VariationalDense(3)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    for layer in layers:
        layer.kernel.log_variance.assign(np.full(layer.kernel.shape, -1.0, "float32"))
        layer.kl_weight = 0.0
    model.compile("sgd", "mse", jit_compile=jit_compile, **arguments)
    return model


def predict(model, x=X):
    return model.predict(x, batch_size=16, verbose=0)


def predict_on_batch(model, x=X):
    return np.array(model.predict_on_batch(x))


def evaluate(model, x=X):
    return model.evaluate(x, Y[: len(x)], batch_size=16, verbose=0)


def test_on_batch(model, x=X):
    return float(model.test_on_batch(x, Y[: len(x)]))


test_on_batch.__test__ = False
CALLS = [predict, predict_on_batch, evaluate, test_on_batch]


def trained(model, on_batch):
    """What one step from the same weights leads to."""
    weights = model.get_weights()
    if on_batch:
        model.train_on_batch(X, Y)
    else:
        model.fit(X, Y, batch_size=64, verbose=0)
    result = array(model.layers[0].kernel.loc)
    model.set_weights(weights)
    return result


def same(call, model):
    return np.allclose(call(model), call(model), atol=1e-6)


@contextlib.contextmanager
def nothing():
    yield


SCOPES = {
    "none": (nothing, True),
    "sampling": (kv.sampling, False),
    "consistent": (lambda: kv.sampling(consistent=True), True),
}
ORDERS = [
    ("sampling", "none", "sampling"),
    ("none", "sampling", "none", "consistent", "none", "sampling", "consistent"),
    ("consistent", "none", "consistent", "sampling"),
]


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("jit", COMPILED, ids=lambda jit: "jit" if jit else "no_jit")
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_no_scope_sticks(call, order, jit):
    model = network(jit_compile=jit)
    mean = array(model(X))
    mean = mean if call in (predict, predict_on_batch) else np.mean(mean**2)
    for name in order:
        scope, repeats = SCOPES[name]
        with scope():
            assert same(call, model) == repeats, name
            assert np.allclose(call(model), mean, atol=1e-5) == (name == "none"), name


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("jit", COMPILED, ids=lambda jit: "jit" if jit else "no_jit")
@pytest.mark.parametrize("on_batch", [False, True], ids=["fit", "train_on_batch"])
@pytest.mark.parametrize("first", ["none", "consistent"])
def test_training_repeats_its_noise_only_within_a_consistent_scope(first, on_batch, jit):
    model = network(jit_compile=jit)
    for name in (first, "none", "consistent", "none", "sampling"):
        with SCOPES[name][0]():
            one, other = trained(model, on_batch), trained(model, on_batch)
            assert np.allclose(one, other, atol=1e-7) == (name == "consistent"), name


def test_the_next_consistent_scope_is_another_function():
    model = network()
    drawn = []
    for _ in range(4):
        with kv.sampling(consistent=True):
            drawn.append(predict(model))
            np.testing.assert_allclose(drawn[-1], array(model(X)), atol=1e-5)
            np.testing.assert_allclose(drawn[-1][:5], predict(model, X[:5]), atol=1e-5)
    for index, one in enumerate(drawn):
        assert not any(np.allclose(one, other, atol=1e-3) for other in drawn[:index])


@pytest.mark.slow
def test_nested_and_shared_models():
    inner = network()
    outer = keras.Sequential([keras.Input((4,)), inner])
    drawn = kv.MonteCarlo(inner, 4, output="samples", seed=0)
    mean = array(inner(X))
    with kv.sampling():
        assert not same(predict, outer)
        samples = predict(drawn)
    np.testing.assert_allclose(predict(outer), mean, atol=1e-5)
    np.testing.assert_allclose(predict(inner), mean, atol=1e-5)
    with kv.sampling():
        assert not same(predict, inner) and not same(predict, outer)
    np.testing.assert_allclose(predict(outer), mean, atol=1e-5)
    again = predict(drawn)
    assert samples.std(axis=1).min() > 0 and again.std(axis=1).min() > 0
    with kv.sampling(consistent=True):
        assert not np.allclose(predict(drawn), predict(drawn))  # it has a scope of its own


class Subclassed(keras.Model):
    """With steps of its own."""

    def __init__(self):
        super().__init__()
        self.dense = kv.VariationalDense(3, initial_log_variance=-1.0, kl_weight=0.0)

    def call(self, inputs):
        return self.dense(inputs)

    def predict_step(self, *args):
        return super().predict_step(*args)


def test_a_model_with_its_own_step_that_is_built_in_a_scope():
    model = Subclassed()
    with kv.sampling():
        assert not same(predict, model)
    assert same(predict, model)
    np.testing.assert_allclose(predict(model), array(model(X)), atol=1e-5)


def test_a_scope_within_the_step_is_always_there():
    class Noisy(Subclassed):
        def predict_step(self, *args):
            with kv.sampling():
                return super().predict_step(*args)

    model = Noisy()
    assert not same(predict, model)
    with kv.sampling():
        assert not same(predict, model)
    assert not same(predict, model)


def test_eager_steps():
    model = network(run_eagerly=True)
    with kv.sampling():
        assert not same(predict, model)
    assert same(predict, model)
    model.compile("sgd", "mse")
    assert same(predict, model)
    with kv.sampling():
        assert not same(predict, model)
    model.compile("sgd", "mse")
    assert same(predict, model)


def test_a_model_can_be_made_and_saved_within_a_scope(tmp_path):
    with kv.sampling():
        model = network()
        predict(model)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(predict(loaded), predict(model), atol=1e-6)


def test_a_scope_in_which_nothing_is_drawn_is_an_error():
    with pytest.raises(ValueError, match="Nothing was drawn"), kv.sampling():
        keras.layers.Dense(3)(X)
    with pytest.raises(KeyError), kv.sampling():
        raise KeyError
    with kv.sampling(), kv.sampling(consistent=True):
        network()(X)


def compiled(function):
    """By the user."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    import jax

    return jax.jit(function)


def stateless(model):
    """A call that JAX can compile."""
    if BACKEND != "jax":
        return lambda x: model(x)
    variables = [[v.value for v in these] for these in (model.trainable_variables, model.non_trainable_variables)]
    return lambda x: model.stateless_call(*variables, x)[0]


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch compiles anew where a scope begins")
def test_a_function_that_is_compiled_within_a_scope_is_refused():
    model = network()
    for consistent in (False, True):
        function = compiled(stateless(model))
        with pytest.raises(ValueError, match="Open the scope inside the function"), kv.sampling(consistent):
            function(X)
        np.testing.assert_allclose(array(function(X)), array(model(X)), atol=1e-5)
        with pytest.raises(ValueError, match="Nothing was drawn"), kv.sampling(consistent):
            function(X)


@pytest.mark.skipif(BACKEND == "torch", reason="as above")
def test_a_function_that_opens_the_scope_itself():
    model = network()
    call = stateless(model)

    def drawn(x):
        with kv.sampling():
            return call(x)

    function = compiled(drawn)
    mean = array(model(X))
    with kv.sampling():
        assert not np.allclose(array(function(X)), mean, atol=1e-3)
    assert not np.allclose(array(function(X)), mean, atol=1e-3)


@pytest.mark.parametrize("consistent", [False, True])
def test_loops_of_keras(consistent):
    """Their bodies may be traced, but are run at once; a generator moves on from step to step in TensorFlow alone."""
    if BACKEND == "jax" and not consistent:
        pytest.skip("a generator's state does not leave the loop")
    layer = kv.VariationalDense(3, initial_log_variance=0.0)
    layer.build((None, 4))
    x = np.repeat(X[None, :1], 3, axis=0)

    def loops():
        mapped = keras.ops.map(lambda each: layer(each), x)
        _, scanned = keras.ops.scan(lambda carry, each: (carry, layer(each)), keras.ops.zeros((1, 3)), x)
        return array(mapped), array(scanned)

    def in_scope(consistent):
        with kv.sampling(consistent):
            return loops()

    for mapped, scanned in (in_scope(consistent), in_scope(consistent)):
        assert not np.allclose(mapped, array(layer(x)), atol=1e-3)
        if consistent:
            np.testing.assert_allclose(mapped, np.repeat(mapped[:1], 3, axis=0), atol=1e-6)
            np.testing.assert_allclose(mapped, scanned, atol=1e-6)
    for each in loops():
        np.testing.assert_allclose(each, array(layer(x)), atol=1e-5)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    "layer", [keras.layers.TimeDistributed, keras.layers.Bidirectional], ids=lambda cls: cls.__name__
)
def test_wrappers(layer):
    inside = kv.VariationalLSTM(3) if layer is keras.layers.Bidirectional else kv.VariationalDense(3)
    model = keras.Sequential([keras.Input((5, 4)), layer(inside)])
    for weight in model.trainable_variables:
        if weight.name.endswith("log_variance"):
            weight.assign(np.full(weight.shape, -1.0, "float32"))
    x = np.random.default_rng(1).normal(size=(6, 5, 4)).astype("float32")
    with kv.sampling(consistent=True):
        np.testing.assert_allclose(predict(model, x), array(model(x)), atol=1e-5)
    with kv.sampling():
        assert not np.allclose(predict(model, x), predict(model, x), atol=1e-3)
    np.testing.assert_allclose(predict(model, x), array(model(x)), atol=1e-5)


def in_thread(function):
    """What the function returns in a thread of its own."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


class TestThreads:
    def test_a_thread_that_starts_in_the_scope_draws_by_it(self):
        model = network()
        mean = array(model(X))
        with kv.sampling(consistent=True):
            here = array(model(X))
            np.testing.assert_allclose(in_thread(lambda: array(model(X))), here, atol=1e-6)
            np.testing.assert_allclose(in_thread(lambda: predict(model)), here, atol=1e-5)
        with kv.sampling():
            assert not np.allclose(in_thread(lambda: array(model(X))), in_thread(lambda: array(model(X))))
        np.testing.assert_array_equal(in_thread(lambda: array(model(X))), mean)

    def test_inner_scopes_and_those_of_the_thread(self):
        model = network()

        def own():
            with kv.sampling(consistent=True):
                return array(model(X)), array(model(X))

        with kv.sampling():
            one, other = in_thread(own)
            np.testing.assert_array_equal(one, other)
            with kv.sampling(consistent=True):
                np.testing.assert_array_equal(*(in_thread(lambda: array(model(X))) for _ in range(2)))
            assert not np.array_equal(*(in_thread(lambda: array(model(X))) for _ in range(2)))

    def test_a_thread_that_ran_before_does_not(self):
        model = network()
        mean = array(model(X))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(int).result()
            with kv.sampling():
                model(X)
                np.testing.assert_array_equal(pool.submit(lambda: array(model(X))).result(), mean)

    def test_the_scope_of_another_thread_is_its_own(self):
        """Siblings start while it is open; what they predict is the mean."""
        model = network()
        mean = predict(model)
        opened, done = threading.Event(), threading.Event()

        def sampler():
            with kv.sampling():
                model(X)
                opened.set()
                done.wait(60)
                return predict(model)

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            noisy = pool.submit(sampler)
            opened.wait(60)
            plain = pool.submit(lambda: (array(model(X)), predict(model)))
            for each in plain.result():
                np.testing.assert_allclose(each, mean, atol=1e-5)
            done.set()
            assert not np.allclose(noisy.result(), mean, atol=1e-3)

    @pytest.mark.slow
    def test_eight_threads_with_one_model_and_one_monte_carlo(self):
        model = network()
        drawn = kv.MonteCarlo(model, 4, output="samples")
        mean = array(model(X))

        # In JAX Keras takes the variables from a model while it predicts.
        call = (lambda model: array(model(X))) if BACKEND == "jax" else predict

        def plain():
            return [call(model) for _ in range(3)]

        def noisy():
            return [call(drawn).std(axis=1).min() for _ in range(3)]

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            runs = [pool.submit(noisy if index % 2 else plain) for index in range(8)]
            for index, run in enumerate(runs):
                for each in run.result():
                    if index % 2:
                        assert each > 1e-3
                    else:
                        np.testing.assert_allclose(each, mean, atol=1e-5)


REPLICAS = """
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
import keras, keras_vdrop as kv, numpy as np

keras.utils.set_random_seed(0)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    model = keras.Sequential([
        keras.Input((5, 6)),
        kv.VariationalLSTM(
            16, dropout=0.2, output_dropout=0.2, weight_dropout=0.2, initial_log_variance=0.0, return_sequences=True
        ),
        kv.MonteCarloDropout(0.2),
        kv.ConcreteDropout(keras.layers.Dense(16), initial_rate=0.2),
        kv.VariationalGaussianDropout(0.5),
        keras.layers.Flatten(),
        kv.VariationalDense(3, initial_log_variance=0.0, estimator="flipout"),
    ])
    consistent = kv.MonteCarlo(model, 4, consistent=True, seed=1, output="samples")
    independent = kv.MonteCarlo(model, 4, seed=1, output="samples")
x = np.ones((32, 5, 6), "float32")
# With several devices the end of a data set may wait for what tunes it, up to a minute.
options = tf.data.Options()
options.autotune.enabled = False
data = tf.data.Dataset.from_tensor_slices(x).batch(32).with_options(options)

def answers(model):
    return len(np.unique(model.predict(data, verbose=0).reshape(32, -1).round(4), axis=0))

def run(consistent):
    def call(x):
        with kv.sampling(consistent):
            return model(x)
    return call

def replicas(function):
    return [each.numpy().round(4) for each in strategy.experimental_local_results(function(tf.ones((4, 5, 6))))]

assert answers(consistent) == 1, answers(consistent)
assert answers(independent) == 32, answers(independent)
assert answers(model) == 1
with kv.sampling(consistent=True):
    assert answers(model) == 1
    first = model.predict(data, verbose=0)
    one, other = replicas(lambda x: strategy.run(model, (x,)))
    np.testing.assert_allclose(one, other, atol=1e-3)
    np.testing.assert_allclose(one[0], first[0], atol=1e-3)
with kv.sampling(consistent=True):
    assert not np.allclose(first, model.predict(data, verbose=0), atol=1e-3)
with kv.sampling():
    assert answers(model) == 32
    one, other = replicas(lambda x: strategy.run(model, (x,)))
    assert not np.isclose(one, other).all(axis=-1).any()
assert answers(model) == 1
one, other = replicas(tf.function(lambda x: strategy.run(run(True), (x,))))
np.testing.assert_allclose(one, other, atol=1e-3)
one, other = replicas(tf.function(lambda x: strategy.run(run(False), (x,))))
assert not np.isclose(one, other).all(axis=-1).any()

@tf.function
def outside(x):
    return strategy.run(model, (x,))

try:
    with kv.sampling():
        outside(tf.ones((4, 5, 6)))
except ValueError as error:
    assert "Open the scope inside" in str(error), error
else:
    raise AssertionError("compiled with the noise in it")

import concurrent.futures
def in_thread():
    with kv.sampling():
        model(x)
        return answers(model)
with concurrent.futures.ThreadPoolExecutor(1) as pool:
    try:
        assert pool.submit(in_thread).result() == 32
    except ValueError as error:
        assert "Nothing was drawn" in str(error), error
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="MirroredStrategy is TensorFlow's")
def test_replicas_draw_one_function_where_it_is_consistent_and_their_own_elsewhere():
    run = subprocess.run([sys.executable, "-c", REPLICAS], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("dtype", ["int32", "uint32"])
def test_fixed_seeds_of_many_draws_differ(dtype):
    generator = FixedSeeds(keras.ops.cast([7, 0], dtype))
    seeds = [tuple(keras.ops.convert_to_numpy(generator.next()).tolist()) for _ in range(600)]
    assert len({(first % 2**32, second % 2**32) for first, second in seeds}) == 600


def test_any_number_of_generators_that_no_layer_owns_start_far_apart():
    """Each of them counts up from its start: the streams of random numbers must not meet."""
    generators = [keras.random.SeedGenerator(0) for _ in range(300)]
    with OneDraw([], keras.ops.convert_to_tensor(7)):
        states = [array(keras.ops.convert_to_tensor(each.state)).tolist() for each in generators]
    assert {seed for seed, _ in states} == {7}
    assert np.diff(sorted([0, *(counter for _, counter in states), 2**31])).min() > 2**20
