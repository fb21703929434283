"""Training steps with the layers of other packages, each in the style that its package recommends.

    pip install "tensorflow-probability[tf]" torch
    pip install --no-deps bayesian-torch torchbnn blitz-bayesian-pytorch

speed.py and conversion.py use this module. Packages that are not installed are skipped. A network of speed.py is a
list of (kind, units or filters, kernel size, padding), with ReLU after every dense layer but the last. Steps use Adam
and the cross-entropy of integer labels (LSTM: SGD and the squared error), plus the KL times `KL_WEIGHT`. PyTorch's
steps of these networks use a GPU if there is one.
"""

import functools
import importlib.util
import typing

import numpy as np

KL_WEIGHT = 1 / 60_000


def installed(*names):
    return all(importlib.util.find_spec(name) for name in names)


def keras_network(keras, network, shape, dense, convolution, noise=None):
    """Build the network in Keras 3 or 2 from the given classes, with `noise()` after every hidden dense layer."""
    model = keras.Sequential([keras.Input(shape)])
    for index, (kind, *sizes) in enumerate(network):
        hidden = index < len(network) - 1
        if kind == "dense":
            model.add(dense(*sizes, activation="relu" if hidden else None))
            if hidden and noise is not None:
                model.add(noise())
        elif kind == "convolution":
            filters, size, *padding = sizes
            model.add(convolution(filters, size, padding=padding[0] if padding else "valid"))
        else:
            model.add(
                {"pool": keras.layers.MaxPooling2D, "relu": keras.layers.ReLU, "flatten": keras.layers.Flatten}[kind]()
            )
    return model


# TensorFlow Probability, whose layers are those of Keras 2


def tfp_steps(network, x, y, jit):
    """Return {name: step} for tf_keras's layers, and for TFP's estimators that have all layers of the network."""
    if not installed("tensorflow_probability", "tf_keras"):
        return {}
    import tensorflow as tf
    import tensorflow_probability as tfp
    import tf_keras

    def divergence(posterior, prior, _):
        return KL_WEIGHT * tfp.distributions.kl_divergence(posterior, prior)

    def step(dense, convolution):
        model = keras_network(tf_keras, network, x.shape[1:], dense, convolution)
        loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(tf_keras.optimizers.Adam(1e-3), loss, jit_compile=jit)
        inputs, labels = tf.constant(x), tf.constant(y)
        return lambda: model.train_on_batch(inputs, labels)

    steps = {"tf_keras.layers": step(tf_keras.layers.Dense, tf_keras.layers.Conv2D)}
    for estimator in ("LocalReparameterization", "Flipout", "Reparameterization"):
        dense, convolution = (
            functools.partial(getattr(tfp.layers, name), kernel_divergence_fn=divergence)
            if hasattr(tfp.layers, name)
            else None
            for name in (f"Dense{estimator}", f"Convolution2D{estimator}")
        )
        if convolution or not any(kind == "convolution" for kind, *_ in network):
            steps[f"tfp.layers, {estimator}"] = step(dense, convolution)
    return steps


# PyTorch


class _Torch(typing.NamedTuple):
    """A package: functions that build its dense and convolutional layers, and one for the KL of a model.

    Without a KL function, the layers have no KL or return it with their outputs.
    """

    dense: typing.Callable
    convolution: typing.Callable
    kl: typing.Callable | None = None


def _torch_packages():
    """Return {name: _Torch} of the installed packages; PyTorch's own layers come first."""
    import torch

    packages = {"torch.nn": _Torch(torch.nn.Linear, torch.nn.Conv2d)}
    if installed("bayesian_torch"):
        from bayesian_torch import layers

        for estimator in ("Reparameterization", "Flipout"):
            packages[f"bayesian-torch, {estimator}"] = _Torch(
                getattr(layers, f"Linear{estimator}"), getattr(layers, f"Conv2d{estimator}")
            )
    if installed("torchbnn"):
        import torchbnn

        loss = torchbnn.BKLLoss(reduction="sum")
        packages["torchbnn"] = _Torch(
            functools.partial(torchbnn.BayesLinear, 0, 1.0), functools.partial(torchbnn.BayesConv2d, 0, 1.0), loss
        )
    if installed("blitz"):
        from blitz import losses, modules

        def convolution(inputs, filters, size, padding):
            return modules.BayesianConv2d(inputs, filters, (size, size), padding=padding)

        packages["blitz"] = _Torch(modules.BayesianLinear, convolution, losses.kl_divergence_from_nn)
    return packages


def torch_steps(network, x, y, tf32=False):
    """Return {name: step} for PyTorch's own layers and those of every installed package.

    `tf32` allows TF32 in matrix products, as TensorFlow and JAX do by default.
    """
    if not installed("torch"):
        return {}
    import torch

    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    return {name: _torch_step(package, network, x, y) for name, package in _torch_packages().items()}


def _torch_step(package, network, x, y):
    import torch

    layers = _torch_layers(package, network, x.shape[1:])
    model = torch.nn.ModuleList(layer for layer in layers if isinstance(layer, torch.nn.Module))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    inputs = torch.from_numpy(np.moveaxis(x, -1, 1).copy()).to(device)
    labels = torch.from_numpy(y).long().to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def step():
        optimizer.zero_grad()
        h, penalty = inputs, 0.0
        for layer in layers:
            h = layer(h)
            if isinstance(h, tuple):  # bayesian-torch returns the KL too
                h, kl = h
                penalty = penalty + kl
        if package.kl is not None:
            penalty = package.kl(model)
        loss = torch.nn.functional.cross_entropy(h, labels) + KL_WEIGHT * penalty
        loss.backward()
        optimizer.step()
        return loss.item()  # as Keras's step does; it waits for the GPU

    return step


def _torch_layers(package, network, shape):
    """Return the layers to apply in turn; `shape` is that of an example, channels last."""
    import torch

    layers, size, channels = [], shape[0], shape[-1]
    for index, (kind, *sizes) in enumerate(network):
        if kind == "dense":
            layers.append(package.dense(channels, *sizes))
            if index < len(network) - 1:
                layers.append(torch.nn.ReLU())
            channels = sizes[0]
        elif kind == "convolution":
            filters, width, *padding = sizes
            border = width // 2 if padding == ["same"] else 0
            layers.append(package.convolution(channels, filters, width, padding=border))
            channels, size = filters, size + 2 * border - width + 1
        elif kind == "pool":
            layers.append(torch.nn.MaxPool2d(2))
            size //= 2
        elif kind == "relu":
            layers.append(torch.nn.ReLU())
        else:
            layers.append(torch.nn.Flatten())
            channels *= size * size
    return layers


def torch_lstm_steps(units, x, y):
    """Return {name: SGD step} for LSTMs with a dense layer from the last output to one number."""
    if not installed("torch"):
        return {}
    import torch

    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)

    def step(lstm, kl):
        head = torch.nn.Linear(units, 1)
        optimizer = torch.optim.SGD([*lstm.parameters(), *head.parameters()], lr=1e-3)

        def run():
            optimizer.zero_grad()
            outputs, *more = lstm(inputs)
            loss = torch.mean((head(outputs[:, -1]) - targets) ** 2) + KL_WEIGHT * kl(lstm, more)
            loss.backward()
            optimizer.step()

        return run

    sizes = x.shape[-1], units
    steps = {"torch.nn.LSTM": step(torch.nn.LSTM(*sizes, batch_first=True), lambda lstm, more: 0.0)}
    if installed("bayesian_torch"):
        from bayesian_torch import layers

        for estimator in ("Reparameterization", "Flipout"):
            lstm = getattr(layers, f"LSTM{estimator}")(*sizes)
            steps[f"bayesian-torch, {estimator}"] = step(lstm, lambda lstm, more: more[-1])
    if installed("blitz"):
        from blitz import losses, modules

        lstm = modules.BayesianLSTM(*sizes)
        steps["blitz"] = step(lstm, lambda lstm, more: losses.kl_divergence_from_nn(lstm))
    return steps


# Networks of conversion.py in PyTorch, and their conversion by bayesian-torch


def torch_resnet(filters, blocks, classes):
    """Build the network of finetune_vision.py in PyTorch."""
    from torch import nn

    def normalized(inputs, outputs, size, stride=1):
        convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.inner = nn.Sequential(
                normalized(inputs, outputs, 3, stride), nn.ReLU(), normalized(outputs, outputs, 3)
            )
            self.shortcut = nn.Identity() if stride == 1 else normalized(inputs, outputs, 1, stride)

        def forward(self, x):
            return nn.functional.relu(self.inner(x) + self.shortcut(x))

    parts = [normalized(1, filters[0], 3), nn.ReLU()]
    for stage, count in enumerate(filters):
        for block in range(blocks):
            first = stage > 0 and block == 0
            parts.append(Block(filters[stage - 1] if first else count, count, 2 if first else 1))
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters[-1], classes))


def torch_encoder(words, depth, width, heads, classes, length=40):
    """Build the encoder of conversion.py. Attention consists of linear layers, which `dnn_to_bnn` can convert."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

        def forward(self, x):
            query, key, value = (
                layer(x).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
            )
            found = nn.functional.scaled_dot_product_attention(query, key, value)
            x = self.first(x + self.out(found.transpose(1, 2).flatten(-2)))
            return self.second(x + self.down(nn.functional.gelu(self.up(x))))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
            self.norm = nn.LayerNorm(width)
            self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
            self.logits = nn.Linear(width, classes)

        def forward(self, tokens):
            h = self.norm(self.words(tokens) + self.places(torch.arange(length)))
            return self.logits(self.blocks(h).mean(1))

    return Encoder()


def torch_conversions():
    """Return {name: function from a PyTorch network to the network to fine-tune}."""
    ways = {"torch.nn": lambda network: network}
    if installed("bayesian_torch"):
        for estimator in ("Reparameterization", "Flipout"):
            ways[f"bayesian-torch's dnn_to_bnn, {estimator}"] = functools.partial(_dnn_to_bnn, estimator)
    return ways


def _dnn_to_bnn(estimator, network):
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn

    moped = {"moped_enable": True, "moped_delta": 0.1}
    prior = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -4.0}
    dnn_to_bnn(network, {**prior, **moped, "type": estimator})
    return network


def torch_fine_tuning(network, x, y):
    """Return a training step and the number of parameters."""
    import torch

    kl = None
    if installed("bayesian_torch"):
        from bayesian_torch.models.dnn_to_bnn import get_kl_loss as kl
    inputs = torch.from_numpy(np.moveaxis(x, -1, 1).copy() if x.ndim == 4 else x)
    labels = torch.from_numpy(y).long()
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)

    def step():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(inputs), labels)
        penalty = None if kl is None else kl(network)
        if penalty is not None:
            loss = loss + KL_WEIGHT * penalty
        loss.backward()
        optimizer.step()

    return step, sum(parameter.numel() for parameter in network.parameters())
