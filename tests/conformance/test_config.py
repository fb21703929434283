"""A layer's config is plain data from which an equal layer is made."""

import json


def test_config_round_trip(case):
    layer = case.make()
    config = layer.get_config()
    again = type(layer).from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config


def test_config_names_every_argument(case):
    layer = case.make()
    cell = getattr(layer, "cell", layer)
    expected = {**case.keras, **case.ours, "kl_weight": 0.01}
    config = {**layer.get_config(), **cell.get_config()}
    assert set(expected) <= set(config)
    assert {"kernel_prior", "bias_prior", "estimator", "initial_log_variance", "threshold", "seed"} <= set(config)
