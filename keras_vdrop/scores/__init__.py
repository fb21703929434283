"""Scores, intervals and sets of predictions: NumPy arrays in, numbers and arrays out."""

from keras_vdrop.scores import calibration, conformal, detection, regression

__all__ = ["calibration", "conformal", "detection", "regression"]
