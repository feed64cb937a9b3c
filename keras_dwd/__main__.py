"""`python -m keras_dwd` is `keras-dwd`."""

from keras_dwd.cli import main

main()
