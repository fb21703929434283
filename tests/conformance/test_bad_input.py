"""Every layer refuses invalid arguments at construction or build, and runs with unusual valid ones."""

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from keras_vdrop import priors
from keras_vdrop.layers.stochastic import StochasticLayer
from tests.cases import CASES, array

KERNELS = [case for case in CASES if case.has_kl and not case.is_wrapper]
QUANTIZED = ["int8_from_float32", "int8_from_mixed_bfloat16", "float8_from_float32", "int4_from_float32"]


class Total(priors.Prior):
    """A prior whose `kl` wrongly returns a sum instead of one value per weight."""

    def kl(self, loc, log_variance):
        return keras.ops.sum(loc)


class Lost(priors.Prior):
    """A prior whose `kl` lacks the required argument `log_variance`."""

    def kl(self, loc):
        return loc


NO_PRIORS = {
    "empty": {},
    "no_config": {"class_name": "Normal"},
    "other_arguments": {"class_name": "Normal", "config": {"mean": 0.0}},
    "unknown": {"class_name": "Nobody", "config": {}},
    "layer": keras.saving.serialize_keras_object(keras.layers.Dense(3)),
    "layer_config": keras.layers.Dense(3).get_config(),
    "initializer": keras.saving.serialize_keras_object(keras.initializers.RandomNormal()),
    "class": priors.ARD,
    "list": ["ard"],
    "number": 3,
}


@pytest.mark.parametrize("prior", NO_PRIORS)
@pytest.mark.parametrize("subject", KERNELS, ids=str)
def test_what_is_no_prior_is_refused_at_construction(subject, prior):
    with pytest.raises(ValueError, match=r"prior"):
        subject.with_prior(NO_PRIORS[prior]).make()


@pytest.mark.parametrize("prior", [priors.ARD(9), priors.ARD(-9), priors.ARD(-1, blocks=7), Total(), Lost()], ids=str)
@pytest.mark.parametrize("subject", KERNELS, ids=str)
def test_a_prior_that_does_not_fit_is_refused_at_build(subject, prior):
    layer = subject.with_prior(prior).make()
    with pytest.raises(ValueError, match=r"axis|blocks|`kl`"):
        subject.call(layer, subject.input())


@pytest.mark.parametrize("policy", QUANTIZED)
def test_quantized_policies_are_refused_by_name(case, policy):
    with pytest.raises(ValueError, match=f"dtype='{policy}'"):
        case.make(dtype=policy)


def generators(layer):
    """Count the noise generators of a layer and its sublayers."""
    return len(layer.variables) - len(layer.weights)


def test_one_generator_a_layer(case):
    of_keras = 0
    if case.cls is kv.Variational:
        of_keras = generators(case.built().layer)
    assert generators(case.built()) - of_keras == (4 if case.is_attention else 1)


@pytest.mark.parametrize("subject", [case for case in CASES if case.is_kernel], ids=str)
def test_no_generator_where_nothing_is_drawn(subject):
    layer = subject.replace(kernel_prior=None, bias_prior=None).built()
    assert generators(layer) == 0
    x = subject.inputs()
    np.testing.assert_array_equal(array(subject.call(layer, x, training=True)), array(subject.call(layer, x)))


def outcome(function):
    """Return the shape of the function's result, or None if the function fails."""
    try:
        return tuple(function().shape)
    except Exception:
        return None


@pytest.mark.parametrize("training", [False, True])
def test_no_rows_give_what_keras_gives(case, training):
    x = case.inputs(shape=(0, *case.shape[1:]))
    expected = outcome(lambda: case.call(case.make_twin(), x))
    if expected is None:
        pytest.skip("Keras's own layer does not run")
    assert tuple(case.call(case.make(), x, training=training).shape) == expected


class _Store(dict):
    """A stand-in for the store of a weights file: values by key."""


def own_layers(layer):
    return [each for each in layer._flatten_layers() if type(each).__module__.startswith("keras_vdrop")]


def test_weights_from_before_a_key_existed(case):
    """Weights load without the optional keys, and fail to load without any other key.

    Optional are the generator's state, the masks, the KL weight, the free bits and the log scale of a prior.
    """
    layer, other = case.built(), case.built()
    if case.is_wrapper:
        other.layer.set_weights(layer.layer.get_weights())
    for ours, theirs in zip(own_layers(layer), own_layers(other)):
        ours.save_own_variables(store := _Store())
        store = _Store({key: array(value) if "seed" not in key else value for key, value in store.items()})
        extra = set()
        if isinstance(ours, StochasticLayer):
            extra = {key for key, variable in ours._keys().items() if ours._value_before(variable) is not None}
            extra = (extra | {"seed_generator_state", "log_variance_rate"}) & set(store)
        needed = set(store) - extra
        if not needed:
            continue
        for key in extra:
            theirs.load_own_variables(_Store({k: v for k, v in store.items() if k != key}))
        theirs.load_own_variables(_Store({key: store[key] for key in needed}))
        for key in needed:
            with pytest.raises((ValueError, KeyError)):
                theirs.load_own_variables(_Store({k: v for k, v in store.items() if k != key}))
    x = case.inputs()
    np.testing.assert_allclose(array(case.call(other, x)), array(case.call(layer, x)), rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 3, -3, -4, 1.0, True, None])
def test_axes_out_of_range(axis):
    with pytest.raises(ValueError, match="axis"):
        kv.VariationalGaussianDropout(axis=axis).build((None, 4, 3))


def test_inputs_of_too_few_axes():
    layer = kv.VariationalEinsumDense("abc,cd->abd", (None, 2))
    with pytest.raises(ValueError, match=r"input_shape=\(None, 3\)"):
        layer.build((None, 3))


POLICIES = ["float16", "bfloat16", "float64", "mixed_float16"]
WRAPPERS = {
    "rnn": (kv.VariationalGRUCell, keras.layers.GRUCell, keras.layers.RNN),
    "bidirectional": (kv.VariationalLSTM, keras.layers.LSTM, keras.layers.Bidirectional),
    "time_distributed": (kv.VariationalDense, keras.layers.Dense, keras.layers.TimeDistributed),
}


@pytest.mark.parametrize("inner", ["float32", *POLICIES])
@pytest.mark.parametrize("outer", ["float32", *POLICIES])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_policy_within_another(wrapper, outer, inner):
    ours, theirs, wrap = WRAPPERS[wrapper]
    x = np.ones((2, 3, 4), "float32")

    def run(cls, **arguments):
        return wrap(cls(3, dtype=inner, **arguments), dtype=outer)(x, training=True)

    try:
        expected = keras.backend.standardize_dtype(run(theirs).dtype)
    except Exception:
        pytest.skip("Keras's own layer does not run")
    for estimator in ("flipout", "reparameterization"):
        output = run(ours, estimator=estimator, kl_weight=0.1)
        # A different expected dtype means that the wrapper's policy leaks into Keras's layer.
        if expected == keras.DTypePolicy(inner).compute_dtype:
            assert keras.backend.standardize_dtype(output.dtype) == expected
        assert np.isfinite(array(output)).all()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="ragged tensors are TensorFlow's")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("estimator", list(kv.functional.estimators.ESTIMATORS))
def test_ragged_indices(estimator, training):
    import tensorflow as tf

    table = np.random.default_rng(0).normal(size=(9, 3)).astype("float32")
    layer = kv.VariationalEmbedding(9, 3, weights=table, estimator=estimator, initial_log_variance=-45.0, kl_weight=0.1)
    twin = keras.layers.Embedding(9, 3, weights=table)
    for rows in ([[1, 2, 3], [4], []], [[[1, 2], [3]], [[4]], []]):
        ragged = tf.ragged.constant(rows, dtype="int64")
        output, expected = layer(ragged, training=training), twin(ragged)
        assert output.shape.as_list() == expected.shape.as_list()
        for one, other in zip(output.nested_row_splits, expected.nested_row_splits, strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(output.flat_values, expected.flat_values, rtol=1e-5, atol=1e-6)
    layer.embeddings.log_variance.assign(np.zeros((9, 3)))
    noisy = layer(tf.ragged.constant([[1, 2, 3], [4]]), training=True)
    assert np.abs(noisy.flat_values.numpy() - table[1:5]).min() > 0
