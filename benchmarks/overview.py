"""Draw the picture at the top of the README: accuracy against size, and a regression with both kinds of uncertainty.

    python benchmarks/overview.py --out benchmarks/results/overview.json --pictures docs/images

Left: the demo's variational network on scikit-learn's digits, trained with five seeds and pruned at thresholds on log
alpha from −3 to 12. The picture shows the mean test accuracy and its range over the seeds against the factor by which
the number of weights falls, and the accuracy of the plain network.

Right: 300 rows of a sine with noise that grows with |x|, on two separate intervals. A network of two hidden layers
predicts the mean and the standard deviation of y; 200 consistent draws give both kinds of uncertainty. Of six choices
of prior, activation and temperature, this one shows them best: with wide priors on all layers the network underfits.

`--pictures` names a folder for overview_light.svg and overview_dark.svg, for pages of either background.
"""

import functools
import pathlib

import common
import keras
import numpy as np
from keras import layers

import keras_vdrop as kv
from keras_vdrop.cli import demo
from keras_vdrop.scores import calibration

BETA, EPOCHS = 0.3, 50
LIGHT = {"text.color": "#1f2328", "axes.labelcolor": "#1f2328", "axes.edgecolor": "#59636e"}
DARK = {"text.color": "#e6edf3", "axes.labelcolor": "#e6edf3", "axes.edgecolor": "#9198a1"}


def sizes(seed, quick):
    """Return the plain accuracy, and the ratios and accuracies of the variational network at each threshold."""
    keras.utils.set_random_seed(seed)
    (x, y), (x_test, y_test) = demo.load_digits(seed)
    epochs = 2 if quick else EPOCHS
    plain = demo.train(demo.network(layers.Dense, layers.Conv2D), x, y, epochs, verbose=0)
    slow = (functools.partial(cls, **demo.SLOW) for cls in (kv.VariationalDense, kv.VariationalConv2D))
    model = demo.network(*slow)
    elbo = kv.ELBO(len(x), schedule=lambda epoch: BETA * min(1.0, 2 * epoch / epochs))
    demo.train(model, x, y, epochs, [elbo], rate=6e-3, verbose=0)
    before, ratios, accuracies = model.get_weights(), [], []
    for threshold in np.arange(-3.0, 12.5, 5.0 if quick else 1.0):
        ratios.append(kv.prune(model, threshold).ratio)
        accuracies.append(calibration.accuracy(demo.probabilities(model, x_test), y_test))
        model.set_weights(before)
    return {
        "plain": calibration.accuracy(demo.probabilities(plain, x_test), y_test),
        "ratios": ratios,
        "accuracies": accuracies,
    }


def band(quick):
    """Return the data, and the predictions on a grid, of the regression."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-4, -1, 150), rng.uniform(1.5, 4, 150)])[:, None].astype("float32")
    y = (np.sin(x) + 0.05 * (1 + np.abs(x)) * rng.normal(size=x.shape)).astype("float32")
    wide = kv.priors.Normal(1.0)
    model = keras.Sequential(
        [
            keras.Input((1,)),
            kv.VariationalDense(64, activation="relu", kernel_prior=wide, bias_prior=wide),
            kv.VariationalDense(64, activation="relu", kernel_prior="ard"),
            kv.VariationalDense(2, kernel_prior="ard"),
        ]
    )
    epochs = 2 if quick else 300
    rate = keras.optimizers.schedules.PolynomialDecay(1e-2, epochs * 10, 0.0)
    model.compile(keras.optimizers.Adam(rate), kv.losses.NormalNLL())
    model.fit(x, y, batch_size=32, epochs=epochs, callbacks=[kv.ELBO(len(x))], verbose=0)
    grid = np.linspace(-6, 6, 200, dtype="float32")[:, None]
    drawn = kv.MonteCarlo(model, 200, likelihood=kv.losses.NormalNLL(), consistent=True, seed=0)
    predicted = drawn.predict(grid, batch_size=len(grid), verbose=0)
    return {
        "observed": [x[:, 0].tolist(), y[:, 0].tolist()],
        "x": grid[:, 0].tolist(),
        **{name: np.ravel(value).tolist() for name, value in predicted.items()},
    }


def draw(rows, regression, path, colors):
    """Save the picture as an SVG file with a transparent background."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {**colors, "xtick.color": colors["text.color"], "ytick.color": colors["text.color"]}
    style |= {"axes.facecolor": "none", "legend.framealpha": 0.0, "svg.hashsalt": "overview", "font.size": 10}
    with plt.rc_context(style):
        figure, (one, other) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
        ratios = np.exp(np.mean(np.log([row["ratios"] for row in rows]), axis=0))
        accuracies = 100 * np.array([row["accuracies"] for row in rows])
        blue, orange = kv.plots.COLORS[5 if colors is DARK else 0], kv.plots.COLORS[1]
        band = {"color": blue, "alpha": 0.3, "linewidth": 0, "label": f"lowest to highest of {len(rows)} seeds"}
        one.fill_between(ratios, accuracies.min(0), accuracies.max(0), **band)
        one.plot(ratios, accuracies.mean(0), "o-", color=blue, markersize=4, label="variational, pruned: mean")
        plain = 100 * np.mean([row["plain"] for row in rows])
        one.axhline(plain, color=orange, linestyle="--", label="plain, all weights")
        one.set(xscale="log", xlabel="weights ÷ kept weights", ylabel="test accuracy, %")
        one.set_title("Digits: accuracy against size")
        one.set_ylim(bottom=max(80, accuracies.mean(0).min() - 2), top=100)
        ticks = [tick for tick in (1, 3, 10, 30, 100, 300, 1000) if ratios.min() <= tick <= 1.1 * ratios.max()]
        one.set_xticks(ticks, [f"{tick}x" for tick in ticks])
        one.minorticks_off()
        one.legend(loc="lower left")
        columns = (regression[name] for name in ("x", "mean", "aleatoric_variance", "epistemic_variance"))
        kv.plots.regression_band(*columns, ax=other)
        for line in other.lines:
            line.set_color(colors["text.color"])  # the bands are blue, and so dark on a dark page
        if colors is DARK:
            for bright, shape in zip((kv.plots.COLORS[5], "#BBDDF5"), other.collections):
                shape.set_facecolor(bright)
        other.plot(*regression["observed"], ".", color=colors["text.color"], markersize=3, alpha=0.6, label="data")
        other.legend(loc="upper center", ncols=2)
        other.set_title("Regression: epistemic and aleatoric uncertainty")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


def main():
    parser = common.parser(__doc__, seeds=5)
    parser.add_argument("--pictures", type=pathlib.Path, help="folder for the two plots")
    options = parser.parse_args()
    if options.quick:
        options.seeds = 2
    folder = options.pictures
    del options.pictures  # it does not affect a row
    rows = common.learn_rows(["digits"], options, lambda name, seed: sizes(seed, options.quick))["digits"]
    for row in rows:
        print(row["plain"], [(f"{r:.1f}x", f"{a:.4f}") for r, a in zip(row["ratios"], row["accuracies"])])
    if folder is not None:
        regression = band(options.quick)
        for name, colors in (("light", LIGHT), ("dark", DARK)):
            draw(rows, regression, folder / f"overview_{name}.svg", colors)


if __name__ == "__main__":
    main()
