"""`python -m keras_dwd` is `keras-dwd`, with the start-up messages of TensorFlow."""

from keras_dwd_command.app import main

main()
