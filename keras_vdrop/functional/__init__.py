"""Pure functions: the mathematics of the layers, on tensors, and scores of predictions, on arrays."""

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
