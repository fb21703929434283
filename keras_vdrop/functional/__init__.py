"""Pure functions on tensors: the mathematics of the layers."""

from keras_vdrop.functional import estimators, kl, likelihoods, noise, sparsity, uncertainty

# Scores have a package of their own. Code that was written before finds them here.
from keras_vdrop.scores import calibration, conformal, detection, regression  # noqa: F401

__all__ = ["estimators", "kl", "likelihoods", "noise", "sparsity", "uncertainty"]
