"""`MonteCarlo`: predictions from many draws of the weights, and decisions that follow from them."""

from keras_vdrop.montecarlo.predictions import Predictions
from keras_vdrop.montecarlo.sampler import MonteCarlo

__all__ = ["MonteCarlo", "Predictions"]
