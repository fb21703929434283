"""Does our ELBO match a direct implementation of the published equations? LeNet-300-100 on MNIST.

    python benchmarks/elbo.py --data DIR --out benchmarks/results/elbo.json

Three networks train for the same number of steps, at the same learning rate and KL weight:

- plain: a straightforward implementation of local reparameterization in about twenty lines of Keras (`PlainDense`);
- local_reparameterization: our layers with the same initial log variance, log variance rate and estimator;
- defaults: our layers with their default arguments.

All are scored in the same way, regardless of how they trained: the negative ELBO of all 60,000 training images in nats
per image, with 20 draws of the exact Gaussian noise and the exact KL; the error on the 10,000 test images; and the
number of weights kept at the default threshold. DIR holds mnist.npz.
"""

import functools

import common
import images
import keras
import mnist_lenet
import numpy as np
from keras import layers, ops

import keras_vdrop as kv
from keras_vdrop.functional import kl

NETWORKS = ("plain", "local_reparameterization", "defaults")
COLUMNS = {"negative_elbo": "−ELBO", "nll": "NLL", "kl": "KL / N", "error": "test error %", "left": "kept weights"}


@keras.saving.register_keras_serializable(package="benchmarks")
class PlainDense(layers.Layer):
    """Dense layer with local reparameterization and the published approximation of the KL to the log-uniform prior."""

    def __init__(self, units, activation=None, kl_weight=None, **kwargs):
        super().__init__(**kwargs)
        self.units, self.activation = units, keras.activations.get(activation)
        self.kl_weight = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.seeds = keras.random.SeedGenerator()

    def build(self, shape):
        self.loc = self.add_weight(shape=(shape[-1], self.units), regularizer=self.penalty)
        self.log_variance = self.add_weight(shape=self.loc.shape, initializer=keras.initializers.Constant(-8.0))
        self.bias = self.add_weight(shape=(self.units,), initializer="zeros")

    def penalty(self, loc):
        log_alpha = self.log_variance - ops.log(ops.square(loc) + 1e-16)
        gain = ops.sigmoid(1.87320 + 1.48695 * log_alpha)
        return self.kl_weight * ops.sum(0.63576 * (1.0 - gain) + 0.5 * ops.softplus(-log_alpha))

    def call(self, x, training=False):
        y = ops.matmul(x, self.loc)
        if training:
            variance = ops.matmul(ops.square(x), ops.exp(self.log_variance))
            y = y + ops.sqrt(variance + 1e-16) * keras.random.normal(ops.shape(y), seed=self.seeds)
        return self.activation(y + self.bias)


class Ramp(keras.callbacks.Callback):
    """Set the KL weight of the plain layers by the schedule of an `ELBO` callback."""

    def __init__(self, elbo):
        super().__init__()
        self.elbo = elbo

    def on_epoch_begin(self, epoch, logs=None):
        for layer in self.model.layers:
            if isinstance(layer, PlainDense):
                layer.kl_weight.assign(self.elbo.beta(epoch) / self.elbo.num_examples)


def learn(name, seed, data, options):
    """Train and score one network with one seed."""
    keras.utils.set_random_seed(seed)
    dense = PlainDense
    if name != "plain":
        dense = functools.partial(kv.VariationalDense, **({} if name == "defaults" else mnist_lenet.SPARSIFIER))
    model = mnist_lenet.network("300-100", dense, None)
    elbo = kv.ELBO(len(data["train"][0]), warmup_epochs=options.epochs // 2)
    mnist_lenet.fit(model, data, options.epochs, callbacks=[Ramp(elbo) if name == "plain" else elbo])
    return scores(judged(model), data, options)


def judged(model):
    """Copy the posterior into a network with the default estimator."""
    same = mnist_lenet.network("300-100", functools.partial(kv.VariationalDense, kl_weight=0.0), None)
    for ours, learned in zip(same.layers, model.layers):
        if isinstance(ours, kv.VariationalDense):
            of = learned if isinstance(learned, PlainDense) else learned.kernel
            ours.kernel.loc.assign(of.loc)
            ours.kernel.log_variance.assign(of.log_variance)
            ours.bias.assign(learned.bias)
    return same


def scores(model, data, options):
    x, y = data["train"]
    draws = kv.MonteCarlo(model, 1 if options.quick else 20, output="samples").predict(x, batch_size=1000, verbose=0)
    log_probability = draws - np.logaddexp.reduce(draws, axis=-1, keepdims=True)
    nll = -float(np.take_along_axis(log_probability, y[:, None, None], axis=-1).mean())
    weights = [layer.kernel for layer in model.layers if isinstance(layer, kv.VariationalDense)]
    divergence = sum(float(ops.sum(kl.log_uniform_exact(w.loc.value, w.log_variance.value))) for w in weights) / len(x)
    return {
        "negative_elbo": nll + divergence,
        "nll": nll,
        "kl": divergence,
        "error": mnist_lenet.error(model, data),
        "left": kv.sparsity(model).left,
    }


def show(rows):
    print(f"\n{'':<32}" + "".join(f"{title:>20}" for title in COLUMNS.values()))
    for name, each in rows.items():
        cells = [
            f"{np.mean(values):.4g} ± {np.std(values, ddof=len(values) > 1):.2g}"
            for values in ([row[key] for row in each] for key in COLUMNS)
        ]
        print(f"{name:<32}" + "".join(f"{cell:>20}" for cell in cells))


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.seeds = 2, 1
    data = images.load(options.data, None if options.quick else "mnist")
    learn_this = functools.partial(learn, data=data, options=options)
    show(common.learn_rows(NETWORKS, options, learn_this))


if __name__ == "__main__":
    main()
