"""Pure functions on tensors: the mathematics that the layers are made of; and on arrays, how good predictions are."""

from keras_vdrop.functional import (
    calibration,
    conformal,
    detection,
    estimators,
    kl,
    likelihoods,
    noise,
    regression,
    sparsity,
    uncertainty,
)

__all__ = [
    "calibration",
    "conformal",
    "detection",
    "estimators",
    "kl",
    "likelihoods",
    "noise",
    "regression",
    "sparsity",
    "uncertainty",
]
