"""Variational dropout for Keras 3: swap a layer, train with `fit`, and the network learns which weights it needs."""

from keras_vdrop import functional, layers, losses, metrics, plots, priors, scores, tfp
from keras_vdrop.callbacks import ELBO, SparsityLogger
from keras_vdrop.compaction import compact
from keras_vdrop.conversion import to_deterministic, to_variational
from keras_vdrop.layers import *  # noqa: F403
from keras_vdrop.montecarlo import MonteCarlo
from keras_vdrop.normalization import update_batch_normalization
from keras_vdrop.posterior import VariationalWeight, kl_divergence
from keras_vdrop.pruning import prune, sparsity
from keras_vdrop.sampling import sampling
from keras_vdrop.selection import select_threshold
from keras_vdrop.version import __version__

__all__ = [
    "ELBO",
    "MonteCarlo",
    "SparsityLogger",
    "VariationalWeight",
    "__version__",
    "compact",
    "functional",
    "kl_divergence",
    "losses",
    "metrics",
    "plots",
    "priors",
    "prune",
    "sampling",
    "scores",
    "select_threshold",
    "sparsity",
    "tfp",
    "to_deterministic",
    "to_variational",
    "update_batch_normalization",
]
__all__ += layers.__all__
