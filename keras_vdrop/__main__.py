"""`python -m keras_vdrop demo`."""

import argparse
import importlib.util
import sys


def main(arguments=None):
    """Run a command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m keras_vdrop", description="Variational dropout for Keras 3.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train, prune and compare a small network on scikit-learn's digits")
    demo.add_argument(
        "--out",
        default="demo",
        help="folder for the model and the picture, numbered where it is taken (default: %(default)s)",
    )
    demo.add_argument("--seed", type=int, default=0, help="of the split, the weights and the noise (default: 0)")
    demo.add_argument("--quick", action="store_true", help="fewer epochs: to see it run, not to judge it by")
    demo.add_argument("--beta", type=float, default=0.3, help="weight of the KL; 1 is the ELBO (default: %(default)s)")
    options = parser.parse_args(arguments)
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"the demo needs {' and '.join(missing)}: pip install 'keras-vdrop[demo]'")
    from keras_vdrop import demo

    return demo.run(options.out, options.seed, options.quick, options.beta)


if __name__ == "__main__":
    sys.exit(main())
