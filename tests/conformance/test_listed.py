"""Every public layer has a case, so that the conformance tests cover all layers."""

import keras

import keras_vdrop as kv
from keras_vdrop.posterior import posteriors
from tests.cases import CASES


def test_every_public_layer_has_a_case():
    public = {
        thing
        for thing in vars(kv).values()
        if isinstance(thing, type) and issubclass(thing, keras.layers.Layer) and thing is not kv.MonteCarlo
    }
    assert public == {case.cls for case in CASES}


def test_every_public_layer_has_a_public_docstring():
    for case in CASES:
        for part in ("Args:", "Input shape:", "Output shape:", "Raises:", "Examples:", "Reference:"):
            assert part in case.cls.__doc__, f"{case.cls.__name__} lacks {part}"


def test_every_case_has_the_kl_that_it_says():
    for case in CASES:
        assert bool(posteriors(case.built())) == case.has_kl, case
