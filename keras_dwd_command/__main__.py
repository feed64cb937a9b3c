"""`python -m keras_dwd_command` is `keras-dwd`."""

from keras_dwd_command import main

main()
