"""How long a training step takes beside Keras's own layers: ratios within one run, medians of interleaved repeats.

An LSTM of 256 units on 64 steps of 128 inputs, in batches of 32. Every network is compiled before the clock starts;
then each takes one step in turn, so that what else the machine does meets all of them alike.

    python benchmarks/speed.py --out benchmarks/results/speed.json
    pip install --no-deps bayesian-torch  # adds its LSTM, beside PyTorch's own
"""

import importlib.util

import common
import keras
import numpy as np

import keras_vdrop as kv

BATCH, STEPS, INPUTS, UNITS = 32, 64, 128, 256
MASKS = {"dropout": 0.25, "recurrent_dropout": 0.25}
KL = {"kl_weight": 1e-4}

# The first of them is what the others are compared with.
LAYERS = {
    "keras.layers.LSTM": lambda units: keras.layers.LSTM(units),
    "keras.layers.LSTM, two dropout rates": lambda units: keras.layers.LSTM(units, **MASKS),
    "classic: masks only": lambda units: kv.VariationalLSTM(units, kernel_prior=None, **MASKS),
    "reparameterization": lambda units: kv.VariationalLSTM(units, **KL),
    "flipout": lambda units: kv.VariationalLSTM(units, estimator="flipout", **KL),
}


def keras_step(layer, x, y, jit):
    """One training step as a function without arguments."""
    model = keras.Sequential([keras.Input(x.shape[1:]), layer, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=jit)
    x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
    return lambda: model.train_on_batch(x, y)


def torch_steps(units, x, y):
    """The same steps of PyTorch's LSTM and, where it is installed, of bayesian-torch's."""
    import torch
    from bayesian_torch.layers import LSTMReparameterization

    x, y = torch.from_numpy(x), torch.from_numpy(y)

    def step(lstm, penalty):
        head = torch.nn.Linear(units, 1)
        optimizer = torch.optim.SGD([*lstm.parameters(), *head.parameters()], lr=1e-3)

        def run():
            optimizer.zero_grad()
            outputs, *more = lstm(x)
            loss = torch.mean((head(outputs[:, -1]) - y) ** 2) + penalty(more)
            loss.backward()
            optimizer.step()

        return run

    plain = torch.nn.LSTM(x.shape[-1], units, batch_first=True)
    bayesian = LSTMReparameterization(x.shape[-1], units)
    return {
        "torch.nn.LSTM": step(plain, lambda more: 0.0),
        "bayesian_torch LSTMReparameterization": step(bayesian, lambda more: 1e-4 * more[-1]),
    }


def summary(seconds):
    """Of every step the median in milliseconds, and of its ratio to the first one in the same round."""
    base = next(iter(seconds.values()))
    return {
        name: {"ms": 1e3 * float(np.median(values)), "ratio": float(np.median(values / base))}
        for name, values in seconds.items()
    }


def show(title, rows):
    print(f"\n{title:<44}{'ms a step':>10}{'ratio':>8}")
    for name, row in rows.items():
        print(f"{name:<44}{row['ms']:>10.1f}{row['ratio']:>8.2f}", flush=True)


def main():
    parser = common.parser(__doc__, learns=False)
    parser.add_argument("--repeats", type=int, default=30, help="steps of each network")
    options = parser.parse_args()
    batch, steps, inputs, units = BATCH, STEPS, INPUTS, UNITS
    if options.quick:
        batch, steps, inputs, units, options.repeats = 4, 5, 6, 8, 3
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(batch, steps, inputs)).astype("float32"), rng.normal(size=(batch, 1)).astype("float32")

    result = {}
    for jit in (False, True):
        made = {name: keras_step(make(units), x, y, jit) for name, make in LAYERS.items()}
        title = f"LSTM, {keras.backend.backend()}, jit_compile={jit}"
        result[title] = summary(common.measure(made, options.repeats))
        show(title, result[title])
    if importlib.util.find_spec("bayesian_torch"):
        result["LSTM, torch"] = summary(common.measure(torch_steps(units, x, y), max(3, options.repeats // 5)))
        show("LSTM, torch", result["LSTM, torch"])
    common.keep(options.out, {"shape": [batch, steps, inputs, units], "repeats": options.repeats, "steps": result})


if __name__ == "__main__":
    main()
