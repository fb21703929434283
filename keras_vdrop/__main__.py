"""`python -m keras_vdrop demo`."""

import argparse
import sys


def main(arguments=None):
    """Run a command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m keras_vdrop", description="Variational dropout for Keras 3.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train, prune and compare a small network on scikit-learn's digits")
    demo.add_argument("--out", default="demo", help="folder for the model and the picture (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the split, the weights and the noise (default: 0)")
    demo.add_argument("--quick", action="store_true", help="fewer epochs: to see it run, not to judge it by")
    options = parser.parse_args(arguments)
    from keras_vdrop import demo

    return demo.run(options.out, options.seed, options.quick)


if __name__ == "__main__":
    sys.exit(main())
