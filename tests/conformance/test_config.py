"""A layer's config can be written as JSON and rebuilds an equal layer."""

import inspect
import json

import keras


def test_config_round_trip(case):
    layer = case.make()
    config = plain(layer)
    again = type(layer).from_config(json.loads(config))
    assert plain(again) == config


def plain(layer):
    """Return the layer's config as JSON."""
    return json.dumps(layer.get_config(), sort_keys=True)


def test_config_names_every_argument(case):
    layer = case.make()
    inner = getattr(layer, "layer", None) or getattr(layer, "cell", layer)
    config = {**layer.get_config(), **inner.get_config()}
    of_keras = set() if isinstance(inner, keras.Model) else set(case.keras)
    assert {*of_keras, *case.ours, *case.own_arguments} <= set(config)


def test_signature_names_every_argument(case):
    """The signature that `help` and editors show has Keras's arguments first, in Keras's order, then ours."""
    names = list(inspect.signature(case.cls).parameters)
    theirs = ["layer"] if case.is_wrapper else list(inspect.signature(case.twin).parameters)
    theirs = [name for name in theirs if name not in ("kwargs", "use_cudnn")]
    if case.is_wrapper or issubclass(case.cls, case.twin):
        assert names[: len(theirs)] == theirs
    assert set(case.own_arguments) <= set(names)
