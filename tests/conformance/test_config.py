"""A layer's config is plain data from which an equal layer is made."""

import inspect
import json


def test_config_round_trip(case):
    layer = case.make()
    config = layer.get_config()
    again = type(layer).from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config


def test_config_names_every_argument(case):
    layer = case.make()
    inner = getattr(layer, "layer", None) or getattr(layer, "cell", layer)
    config = {**layer.get_config(), **inner.get_config()}
    assert {*case.keras, *case.ours, *case.own_arguments} <= set(config)


def test_signature_names_every_argument(case):
    """What `help` and editors show: Keras's arguments in their order, then ours."""
    names = list(inspect.signature(case.cls).parameters)
    theirs = ["layer"] if case.is_wrapper else list(inspect.signature(case.twin).parameters)
    theirs = [name for name in theirs if name not in ("kwargs", "use_cudnn")]
    if issubclass(case.cls, case.twin) or case.is_wrapper:
        assert names[: len(theirs)] == theirs
    assert set(case.own_arguments) <= set(names)
