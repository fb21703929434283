"""Inside a wrapper with another dtype policy, our layers have the same output dtype as Keras's layers.

`TimeDistributed` calls its layer under its own policy instead of the layer's.
"""

import dataclasses

import keras
import numpy as np
import pytest
from keras import layers

from tests.cases import CASES, array

# Pairs of policies: of the layer, and of the wrapper around it.
MIXED = [("mixed_float16", "float32"), ("float32", "mixed_bfloat16"), ("mixed_float16", "mixed_bfloat16")]
PURE = [("float16", "float32"), ("float32", "float16")]


def time_distributed(case, make, inner, outer):
    return layers.TimeDistributed(make(dtype=inner), dtype=outer)


def bidirectional(case, make, inner, outer):
    return layers.Bidirectional(make(dtype=inner), dtype=outer)


def rnn(case, make, inner, outer):
    return layers.RNN(make(dtype=inner).cell, dtype=outer)


def stacked(case, make, inner, outer):
    return layers.RNN([make(dtype=inner).cell, make(dtype=outer).cell], dtype=outer)


def settings_of(case):
    if case.is_cell:  # on JAX, Keras's own cells fail in a stack of two policies
        return [rnn] if keras.backend.backend() == "jax" else [rnn, stacked]
    # TimeDistributed passes only one input on, and attention needs two.
    return [] if case.is_attention else [time_distributed, *[bidirectional] * case.is_rnn]


def with_initializer(case):
    """Replace the default recurrent initializer, whose QR decomposition has no float16. Drop `go_backwards`."""
    if not (case.is_cell or case.is_rnn):
        return case
    arguments = {**case.keras, "recurrent_initializer": "glorot_uniform"}
    arguments.pop("go_backwards", None)
    return dataclasses.replace(case, keras=arguments)


SETTINGS = [(case, setting) for case in CASES for setting in settings_of(case)]


@pytest.mark.parametrize("subject, setting", SETTINGS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_the_output_is_of_the_type_of_the_twins(subject, setting):
    subject = with_initializer(subject)
    shape = subject.shape
    x = subject.inputs(shape=(shape[0], 2, *shape[1:]) if setting is time_distributed else shape)
    compared = 0
    # A convolution of two dtypes fails in TensorFlow. In JAX its output has the kernel's dtype.
    for inner, outer in MIXED if "conv" in subject.name else MIXED + PURE:
        try:
            expected = setting(subject, subject.make_twin, inner, outer)(x).dtype
        except Exception:
            continue  # Keras's own layer does not run here
        if subject.is_wrapper:  # our wrappers call their layer under that layer's policy
            expected = keras.DTypePolicy(inner).compute_dtype
        for training in (False, True):
            output = setting(subject, subject.make, inner, outer)(x, training=training)
            types = [keras.backend.standardize_dtype(each) for each in (output.dtype, expected)]
            assert types[0] == types[1], (inner, outer, training)
            assert np.isfinite(array(output)).all()
        compared += 1
    least = 3
    if keras.backend.backend() == "jax" and subject.is_rnn:
        least = 2  # Keras's GRU runs under no other pair
    if keras.backend.backend() == "tensorflow" and subject.keras.get("data_format") == "channels_first":
        least = 1  # on older CPUs it has no such convolution in half precision
    assert compared >= least
