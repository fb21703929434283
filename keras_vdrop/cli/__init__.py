"""What the commands of `keras-vdrop` do. The module `keras_vdrop_cli` reads and checks their arguments."""
