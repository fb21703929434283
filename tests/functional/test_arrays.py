"""Public functions of `functional` and `scores` take arrays of float64 and float32, and lists; not empty ones."""

import inspect

import keras
import numpy as np
import pytest

from keras_vdrop import functional, scores
from tests.cases import array

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(4, 6)), RNG.uniform(-4.0, 0.0, (4, 6))
X = RNG.normal(size=(5, 4))
SAMPLES = RNG.uniform(0.1, 0.9, (3, 5))
CLASSES = SAMPLES[..., None] * [1.0, 0.0] + (1.0 - SAMPLES[..., None]) * [0.0, 1.0]
LABELS = np.array([0, 1, 1, 0, 1])
Y = RNG.normal(size=5)
SCALE = RNG.uniform(0.5, 1.5, 5)
MANY = RNG.normal(size=(30, 5))


def matmul(x, w):
    return keras.ops.matmul(x, keras.ops.cast(w, x.dtype))


# Of each function, its arguments; what is an array there is given in every form.
ARGUMENTS = {
    "calibration.accuracy": (CLASSES[0], LABELS),
    "calibration.negative_log_likelihood": (CLASSES[0], LABELS),
    "calibration.reliability": (CLASSES[0], LABELS),
    "calibration.expected_calibration_error": (CLASSES[0], LABELS),
    "calibration.classwise_calibration_error": (CLASSES[0], LABELS),
    "calibration.brier_score": (CLASSES[0], LABELS),
    "calibration.brier_decomposition": (CLASSES[0], LABELS),
    "calibration.fit_temperature": (np.log(CLASSES[0]), LABELS),
    "conformal.quantile": (MANY[:, 0],),
    "conformal.set_threshold": (np.tile(CLASSES[0], (6, 1)), np.tile(LABELS, 6)),
    "conformal.prediction_sets": (CLASSES[0], 0.5),
    "conformal.interval_threshold": (MANY[:, 0], MANY[:, 1]),
    "conformal.prediction_intervals": (Y, 0.5),
    "detection.auroc": (Y, Y + 1.0),
    "detection.aupr": (Y, Y + 1.0),
    "detection.fpr_at_tpr": (Y, Y + 1.0),
    "detection.risk_coverage": (SCALE, Y**2),
    "detection.aurc": (SCALE, Y**2),
    "detection.excess_aurc": (SCALE, Y**2),
    "estimators.reparameterize": (*WEIGHT, 0),
    "estimators.perturbation": (WEIGHT[1], 0),
    "estimators.local_reparameterization": (matmul, X, *WEIGHT, 0),
    "estimators.flipout": (matmul, X, *WEIGHT, 0),
    "estimators.reparameterization": (matmul, X, *WEIGHT, 0),
    "kl.log_uniform": WEIGHT,
    "kl.log_uniform_exact": WEIGHT,
    "kl.log_uniform_cubic": (WEIGHT[1],),
    "kl.ard": (*WEIGHT, -1, 2),
    "kl.ard_variance": (*WEIGHT, -1, 2),
    "kl.normal": (*WEIGHT, 0.5),
    "kl.scale_mixture": (*WEIGHT, 0.5, 1.0, 0.1),
    "likelihoods.scale_of": (Y,),
    "likelihoods.normal": (Y, Y + 1.0, SCALE),
    "likelihoods.laplace": (Y, Y + 1.0, SCALE),
    "likelihoods.student_t": (Y, 3.0, Y + 1.0, SCALE),
    "likelihoods.normal_mixture": (Y, CLASSES[0], CLASSES[1], CLASSES[2] + 1.0),
    "noise.hash_seed": (3, "noise"),
    "noise.normal": ((2, 3), 0),
    "noise.rademacher": ((2, 3), 0),
    "noise.uniform": ((2, 3), 0),
    "noise.bernoulli": ((4, 6), RNG.uniform(size=(4, 6)), 0),
    "noise.concrete": ((4, 6), WEIGHT[0], 0.1, 0),
    "regression.normal_negative_log_likelihood": (Y, SCALE, Y + 1.0),
    "regression.normal_mixture_negative_log_likelihood": (SAMPLES, SAMPLES + 1.0, Y),
    "regression.normal_crps": (Y, SCALE, Y + 1.0),
    "regression.sample_crps": (MANY, Y),
    "regression.normal_interval": (Y, SCALE),
    "regression.sample_interval": (MANY,),
    "regression.interval_coverage": (Y, Y + 1.0, Y),
    "sparsity.log_alpha": (*WEIGHT, -1, 2),
    "sparsity.keep_mask": (*WEIGHT, 3.0, -1, 2),
    "sparsity.check_groups": ((4, 6), -1, 2),
    "sparsity.over_groups": (keras.ops.sum, WEIGHT[0], -1, 2),
    "uncertainty.entropy": (CLASSES[0],),
    "uncertainty.moments": (SAMPLES,),
    "uncertainty.categorical": (CLASSES,),
    "uncertainty.bernoulli": (SAMPLES,),
    "uncertainty.normal": (SAMPLES, SAMPLES + 1.0),
}

FORMS = {
    "float64": lambda value: value,
    "float32": lambda value: value.astype("float32") if value.dtype == "float64" else value,
    "list": lambda value: value.tolist(),
    "mixed": lambda value: value.astype("float32") if value.size % 2 == 0 and value.dtype == "float64" else value,
}


MODULES = {name: getattr(package, name) for package in (functional, scores) for name in package.__all__}


def public():
    """The names of all public functions of `functional` and `scores`, by module."""
    for module_name, module in MODULES.items():
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                yield f"{module_name}.{name}"


def test_every_public_function_is_listed():
    of_summaries = {"uncertainty.by_name"}
    assert sorted(set(public()) - of_summaries) == sorted(ARGUMENTS)


def test_scores_keep_their_names_in_functional():
    assert all(getattr(functional, name) is getattr(scores, name) for name in scores.__all__)


def call(name, form=None):
    module, function = name.split(".")
    convert = FORMS[form or "float32"]
    arguments = [convert(value) if isinstance(value, np.ndarray) else value for value in ARGUMENTS[name]]
    return getattr(MODULES[module], function)(*arguments)


def numbers(result):
    """All the numbers of a result, whatever it is."""
    fields = vars(result).values() if hasattr(result, "__dict__") and not hasattr(result, "shape") else result
    return [array(value) for value in keras.tree.flatten(fields) if value is not None]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "float32"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_takes_arrays(name, form):
    """And gives what it gives of float32. Draws of one seed need not be those of another type: they are as finite."""
    results, expected = numbers(call(name, form)), numbers(call(name))
    assert len(results) == len(expected)
    for one, other in zip(results, expected):
        assert one.shape == other.shape and np.array_equal(np.isfinite(one), np.isfinite(other))
        if not name.startswith(("estimators", "noise")):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# What asks for rows, or samples, or scores: it can say nothing of none.
OF_ROWS = [name for name in ARGUMENTS if name.startswith(("calibration", "conformal", "detection", "regression"))]
OF_SAMPLES = [f"uncertainty.{name}" for name in ("moments", "categorical", "bernoulli", "normal")]


@pytest.mark.parametrize("name", [*OF_ROWS, *OF_SAMPLES])
def test_none_at_all_are_refused(name):
    module, function = name.split(".")
    arguments = [value[:0] if isinstance(value, np.ndarray) else value for value in ARGUMENTS[name]]
    with pytest.raises(ValueError, match=r"at least|shape"):
        getattr(MODULES[module], function)(*arguments)


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name.startswith(("kl", "likelihoods"))])
def test_elementwise_functions_of_no_numbers_give_none(name):
    module, function = name.split(".")
    arguments = [value[:0] if isinstance(value, np.ndarray) else value for value in ARGUMENTS[name]]
    if name in ("kl.ard", "kl.ard_variance"):
        arguments = arguments[:2]
    assert array(getattr(MODULES[module], function)(*arguments)).size == 0
