"""Measures what DWD costs on a transformer of 34 million parameters: steps, state, boundaries.

CPU seconds of the process are compared, not those of the clock, which other work on the machine
distorts. The plain model and the wrapped one take steps in turn.

Usage: python benchmarks/text_cost.py [--rounds N] [--kinds NAME ...] [--out FILE]
"""

import argparse
import json
import resource
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_dwd import DiagonalFisher, DWDModel, KroneckerFisher
from keras_dwd.evaluation.experiment import versions
from keras_dwd.evaluation.text.decoder import DecoderSize, decoder
from keras_dwd.evaluation.text.encoding import sequence_loss
from keras_dwd.files import write_json

TOKENS, SIZE = 8192, DecoderSize(width=512, blocks=8, heads=8, length=128)
BATCH, EXAMPLES = 8, 16
FISHERS = {"diagonal": DiagonalFisher(), "Kronecker": KroneckerFisher()}
PROTOCOL = (
    f"decoder of {SIZE.blocks} blocks, {SIZE.width} wide, {TOKENS:,} tokens, random texts of "
    f"{SIZE.length}, batch {BATCH}, Adam; train_step in a tf.function after a boundary against "
    "that of the plain model, in turn, median ratio of CPU seconds over rounds (and their range); "
    f"consolidate of {EXAMPLES} texts, the first with tracing, CPU seconds; rise of the peak "
    "resident memory in the first"
)


def texts(count, rng):
    """Inputs, next tokens and weights."""
    tokens = rng.integers(3, TOKENS, (count, SIZE.length + 1)).astype("int32")
    return tokens[:, :-1], tokens[:, 1:], np.ones((count, SIZE.length), "float32")


def compiled(model):
    model.compile(keras.optimizers.Adam(1e-3), sequence_loss())
    model.optimizer.build(model.trainable_variables)
    return model


def stepper(model, batch):
    """A function that takes a step and returns its CPU seconds."""
    step = tf.function(model.train_step, autograph=False)

    def seconds():
        started = time.process_time()
        float(step(batch)["loss"])
        return time.process_time() - started

    seconds()  # traces
    return seconds


def boundary(model, data):
    """CPU seconds of a boundary, and by how much it raises the peak memory, in bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    model.consolidate(data, batch_size=BATCH, verbose=0)
    seconds = time.process_time() - started
    return seconds, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def measured(fisher, rounds):
    """The measurements with a Fisher estimate."""
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    model = compiled(DWDModel.from_model(decoder(TOKENS, SIZE), fisher=fisher, grouping=None))
    plain = compiled(decoder(TOKENS, SIZE))
    batch = tuple(map(tf.constant, texts(BATCH, rng)))
    learned = texts(EXAMPLES, rng)
    plain_step = stepper(plain, batch)
    model.train_on_batch(*batch)
    first, memory = boundary(model, learned)
    model.train_on_batch(*batch)
    second, _ = boundary(model, learned)
    step = stepper(model, batch)
    times = np.array([[step(), plain_step()] for _ in range(rounds)])
    ratios = times[:, 0] / times[:, 1]
    parameters = model.count_params()
    state = sum(a.nbytes for a in model._consolidation.state(model).values())
    return {
        "parameters": parameters,
        "state_bytes_per_parameter": state / parameters,
        "step_ratio": float(np.median(ratios)),
        "step_ratio_range": [float(ratios.min()), float(ratios.max())],
        "step_seconds": [float(s) for s in np.median(times, 0)],
        "boundary_seconds": [first, second],
        "boundary_memory": memory,
        "rounds": rounds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", choices=FISHERS, default=list(FISHERS))
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "text_cost.json"
    )
    options = parser.parse_args()
    content = {"protocol": PROTOCOL, "versions": versions(), "transformer": {}}
    earlier = json.loads(options.out.read_text()) if options.out.exists() else {}
    if all(earlier.get(key) == content[key] for key in ("protocol", "versions")):
        content["transformer"] = earlier["transformer"]
    for kind in options.kinds:
        row = content["transformer"][kind] = measured(FISHERS[kind], options.rounds)
        print(kind, row, flush=True)
        write_json(options.out, content)
        keras.utils.clear_session()


if __name__ == "__main__":
    main()
