"""Pure functions on tensors: the mathematics that the layers are made of."""

from keras_vdrop.functional import calibration, estimators, kl, noise, sparsity, uncertainty

__all__ = ["calibration", "estimators", "kl", "noise", "sparsity", "uncertainty"]
