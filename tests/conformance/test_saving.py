"""Models survive saving and loading, weights files, `custom_objects`, cloning and export."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_vdrop import prune
from keras_vdrop.posterior import posteriors as all_posteriors
from tests.cases import CASES, array, posteriors, randomize

LOAD_ALL = """
import sys, pathlib, numpy as np, keras
import keras_vdrop
for path in pathlib.Path(sys.argv[1]).glob("*.keras"):
    model = keras.saving.load_model(path)
    np.save(path.with_suffix(".npy"), model.predict(np.load(path.with_suffix(".x.npy")), verbose=0))
"""


def scramble(model):
    """Give a model random weights, unlike those of a new model, and prune some of them."""
    randomize(model)
    if posteriors(model):
        prune(model, threshold=0.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder with a model of each case and its input, and {case name: prediction}."""
    folder, predictions = tmp_path_factory.mktemp("saved"), {}
    for case in CASES:
        model = case.model()
        scramble(model)
        np.save(folder / f"{case}.x.npy", case.inputs())
        predictions[case.name] = model.predict(case.inputs(), verbose=0)
        model.save(folder / f"{case}.keras")
    return folder, predictions


def loaded_elsewhere(folder, backend):
    """Return {case name: prediction} of the saved models, loaded in another process with that backend."""
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, "-c", LOAD_ALL, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return {case.name: np.load(folder / f"{case}.npy") for case in CASES}


@pytest.mark.slow
def test_loads_in_a_fresh_process(saved):
    folder, here = saved
    there = loaded_elsewhere(folder, keras.backend.backend())
    for case in CASES:
        np.testing.assert_array_equal(here[case.name], there[case.name], err_msg=case.name)


@pytest.mark.slow
@pytest.mark.parametrize("backend", sorted({"tensorflow", "jax", "torch"} - {keras.backend.backend()}))
def test_loads_on_another_backend(saved, backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    folder, here = saved
    there = loaded_elsewhere(folder, backend)
    for case in CASES:
        np.testing.assert_allclose(here[case.name], there[case.name], rtol=1e-4, atol=1e-6, err_msg=case.name)


def test_weights_file(case, tmp_path):
    model, other = case.model(), case.model()
    scramble(model)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(model.predict(case.inputs(), verbose=0), other.predict(case.inputs(), verbose=0))
    for one, two in zip(posteriors(model), posteriors(other)):
        np.testing.assert_array_equal(array(one.mask), array(two.mask))


def test_loads_by_custom_objects_alone(case, tmp_path):
    """A model with an unregistered class loads if `custom_objects` names the class."""
    subclass = type("Unregistered", (case.cls,), {})
    model = dataclasses.replace(case.with_prior("ard"), cls=subclass).model()
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", custom_objects={"Unregistered": subclass})
    np.testing.assert_array_equal(model.predict(case.inputs(), verbose=0), again.predict(case.inputs(), verbose=0))


def test_resumed_run_continues_its_noise(case, tmp_path):
    model, x = case.model(seed=1), case.inputs()
    randomize(model)
    first = array(model(x, training=True))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    resumed = array(again(x, training=True))
    assert not np.array_equal(resumed, first)
    np.testing.assert_array_equal(resumed, array(model(x, training=True)))


def test_clone_model(case):
    model = case.with_prior("ard").model()
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(model.predict(case.inputs(), verbose=0), clone.predict(case.inputs(), verbose=0))
    assert [type(w.prior) for w in posteriors(clone)] == [type(w.prior) for w in posteriors(model)]
    for ours, theirs in zip(posteriors(clone), posteriors(model)):
        assert ours.loc is not theirs.loc


def test_kl_weight_that_elbo_set_survives(case, tmp_path, recwarn):
    model = case.model(kl_weight=None)
    for posterior in all_posteriors(model):
        posterior.owner.kl_weight = 0.125
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    again(case.inputs(), training=True)
    assert not any("not the ELBO" in str(warning.message) for warning in recwarn)
    assert all(float(posterior.owner.kl_weight) == 0.125 for posterior in all_posteriors(again))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="SavedModel is TensorFlow's")
def test_saved_model(case, tmp_path):
    import tensorflow as tf

    model = case.model()
    randomize(model)
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "exported"))
    np.testing.assert_allclose(
        served.serve(case.inputs()), model.predict(case.inputs(), verbose=0), rtol=1e-5, atol=1e-6
    )
