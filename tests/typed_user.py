"""What a type checker sees of the package: this file is checked by pyright in CI, and never run.

Each `pyright: ignore` marks a mistake that the checker must find: it reports the comments that it does not need.
"""

from typing import Any

import keras
import numpy as np
from typing_extensions import assert_type

import keras_vdrop as kv
from keras_vdrop.compaction.propagation import RULES
from keras_vdrop.compaction.rules import Cut, PassThrough
from keras_vdrop.functional import estimators, uncertainty
from keras_vdrop.posterior import VariationalWeight
from keras_vdrop.pruning import Sparsity
from keras_vdrop.scores import calibration, conformal
from keras_vdrop.selection import Candidate

dense = kv.VariationalDense(3, activation="relu", kernel_prior="ard", kl_weight=0.1)
assert_type(dense, kv.VariationalDense)
assert_type(dense.kernel, VariationalWeight)
lstm = kv.VariationalLSTM(3, recurrent_dropout=0.1, tied_masks=False)
assert_type(dense.kernel.numpy(), np.ndarray)
doubled: Any = 2.0 * dense.kernel + dense.kernel[0]
if dense.kernel:  # pyright: ignore[reportGeneralTypeIssues]
    pass
kv.VariationalDense("three")  # pyright: ignore[reportArgumentType]
kv.VariationalDense(3, estimator="local")  # pyright: ignore[reportArgumentType]
kv.VariationalLSTM(3, estimator="local_reparameterization")  # pyright: ignore[reportArgumentType]

model = keras.Sequential([keras.Input((4, 4)), lstm, dense])
elbo = kv.ELBO(num_examples=3, schedule=lambda epoch: 0.1 * epoch)
kv.ELBO(num_examples=3, per="step")  # pyright: ignore[reportArgumentType]
kv.ELBO()  # pyright: ignore[reportCallIssue]

assert_type(kv.prune(model), Sparsity)
assert_type(kv.select_threshold(model, [1.0], [1]).chosen, Candidate | None)
small: keras.Model = kv.compact(kv.to_variational(model, rank=None))
kv.to_variational(model, dropout="gaussian")  # pyright: ignore[reportArgumentType]
sampler = kv.MonteCarlo(model, num_samples=32, likelihood="categorical", output="samples")
kv.MonteCarlo(model, output="draws")  # pyright: ignore[reportArgumentType]
assert_type(sampler.num_samples, int)
sampler.compile(jit_compile="yes")  # pyright: ignore[reportArgumentType]
with kv.sampling(consistent=True):
    model([1.0])

p, labels = np.array([[0.9, 0.1], [0.3, 0.7]]), [0, 1]
assert_type(calibration.expected_calibration_error(p, labels, binning="mass"), float)
assert_type(calibration.reliability(p, labels).count, np.ndarray)
assert_type(conformal.prediction_intervals([4.0], 0.5), tuple[np.ndarray, np.ndarray])
assert_type(uncertainty.by_name({"y": uncertainty.MOMENTS}), uncertainty.Summary)
calibration.brier_decomposition(p, labels, binning="equal")  # pyright: ignore[reportArgumentType]
conformal.set_threshold(p, labels, score="raps")  # pyright: ignore[reportArgumentType]
estimators.reparameterize(0.0, 0.0, seed="a seed")  # pyright: ignore[reportArgumentType]


class Logged(kv.ELBO):
    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        print(self.beta(epoch + 1))
        self.beta("last")  # pyright: ignore[reportArgumentType]


class Halved(PassThrough):
    def of_constants(self, value: np.ndarray) -> np.ndarray:
        return 0.5 * value

    def cut(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> Cut:
        return {}, [weight[outs[0]] for weight in self.layer.get_weights()]


class Misread(PassThrough):
    def need(self, known, ins):  # pyright: ignore[reportIncompatibleMethodOverride]
        pass


RULES[keras.layers.Rescaling] = Halved
RULES[keras.layers.Rescaling] = Halved(None)  # pyright: ignore[reportArgumentType]
