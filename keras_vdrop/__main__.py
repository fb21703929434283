"""`python -m keras_vdrop` is `keras-vdrop`, except that it imports the package before it reads its arguments."""

import sys

from keras_vdrop_cli import main

if __name__ == "__main__":
    sys.exit(main())
