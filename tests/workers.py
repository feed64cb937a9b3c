"""Programs that workers run in the tests, started as `python workers.py NAME,NAME... FOLDER`.

Each function returns arrays, which are written to `FOLDER/NAME.RANK.npz`. Programs of one job run
one after another, as starting the workers takes longer than most of them.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

if __name__ == "__main__":  # before TensorFlow is used
    tf.config.threading.set_intra_op_parallelism_threads(1)

from keras_dwd import DiagonalFisher, Distillation, DWDModel, DWDRegularizer, KroneckerFisher
from keras_dwd.callbacks import LearningRateWarmup
from keras_dwd.distributed import data as data_module
from keras_dwd.distributed.horovod import HorovodCommunicator, detect_communicator
from keras_dwd.evaluation import Scenario, run_sequence
from keras_dwd.groupings import GaussianMixtureGrouping, LayerGrouping
from keras_dwd.layers import TaskHeads

LAYERS = keras.layers
# A prime number, so that the last batch cannot be divided evenly among workers.
EXAMPLES = 61


def data(seed=0, count=EXAMPLES):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count).astype("int32")
    centres = np.random.default_rng(7).normal(size=(3, 6))
    x = (centres[y] + 0.5 * rng.normal(size=(count, 6))).astype("float32")
    return x, y


def network(second="second"):
    return keras.Sequential(
        [
            keras.Input((6,)),
            LAYERS.Dense(8, "tanh", name="hidden"),
            LAYERS.Dense(7, "relu", name=second),
            LAYERS.Dense(3, name="head"),
        ]
    )


def made(communicator=None, sharded=False, net=None, optimizer=None, **settings):
    keras.utils.set_random_seed(0)
    model = DWDModel.from_model(network() if net is None else net(), **settings)
    model.compile(
        optimizer or keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        communicator=communicator,
        sharded=sharded,
    )
    return model


def fit(model, x, y, **arguments):
    """Fit with eight examples per step, for any number of workers."""
    share = 8 // model.workers.communicator.size
    return model.fit(x, y, batch_size=share, verbose=0, **arguments)


def layers():
    """Groups of variables, far from each other, as rounding errors could change close ones."""
    return GaussianMixtureGrouping(2, granularity="variable")


CASES = {
    "kronecker": {"validate": True},
    "elements": {
        "grouping": GaussianMixtureGrouping,
        "fisher": lambda: DiagonalFisher("empirical", every=1),
    },
    "sharded": {"sharded": True},
    "layers": {
        "sharded": True,
        "grouping": LayerGrouping,
        "fisher": lambda: KroneckerFisher("empirical", every=2),
    },
    "diagonal": {
        "sharded": True,
        "dataset": True,
        "fisher": lambda: DiagonalFisher("empirical", every=1),
        "regularizer": lambda: DWDRegularizer(3.0, anchor="folded"),
        "validate": True,
    },
    "pass": {"sharded": True, "fisher": lambda: KroneckerFisher(gamma=None), "consolidate": True},
    "proximal": {
        "sharded": True,
        "optimizer": lambda: keras.optimizers.SGD(0.02, momentum=0.9),
        "fisher": lambda: DiagonalFisher("empirical", every=1),
    },
    "shuffled": {"shuffle": True, "fisher": lambda: DiagonalFisher("empirical", every=1)},
    "distilled": {
        "distillation": Distillation,
        # Never at the last batch of an epoch, in which workers have examples that only fill it up.
        "fisher": lambda: DiagonalFisher("batch", every=4),
    },
    "distilled sharded": {
        "sharded": True,
        "distillation": Distillation,
        "fisher": lambda: DiagonalFisher("empirical", every=1),
    },
    "half": {
        "communicator": lambda: HorovodCommunicator("fp16"),
        "fisher": lambda: DiagonalFisher("empirical", every=1),
        "regularizer": lambda: DWDRegularizer(3.0, anchor="folded"),
        "validate": True,
    },
}
# Cases that are for one worker what another is.
ALIKE = {"sharded": "kronecker", "half": "diagonal"}


def two_tasks(name):
    """Weights, online Fisher information, state and logs after two tasks."""
    case = dict(CASES[name])
    shuffle, as_dataset = case.pop("shuffle", False), case.pop("dataset", False)
    with_data, sharded = case.pop("consolidate", False), case.pop("sharded", False)
    validate = case.pop("validate", False)
    settings = {key: make() for key, make in ({"grouping": layers} | case).items()}
    model = made(sharded=sharded, **settings)
    found = {}
    for task in range(2):
        x, y = data(task)
        size = model.workers.communicator.size
        held_back = {"validation_data": (x, y)} if validate else {}
        if as_dataset:
            batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8 // size)
            history = model.fit(batches, epochs=3, shuffle=False, verbose=0, **held_back)
        else:
            np.random.seed(task)
            history = fit(model, x, y, epochs=3, shuffle=shuffle, **held_back)
        online = {f"online/{k}": np.asarray(v) for k, v in model.fisher.slots.items()}
        found[f"penalty/{task}"] = np.asarray(model.penalty())  # zero right after a boundary
        model.consolidate((x, y) if with_data else None, batch_size=8)
        for key in ("val_loss", "val_accuracy") if validate else ():
            found[f"{key}/{task}"] = np.array(history.history[key])
    found |= {f"weight/{i}": np.asarray(w) for i, w in enumerate(model.weights)}
    found |= {f"group/{i}": np.array([g["size"]]) for i, g in enumerate(model.groups)}
    if validate:
        x, y = data(5)
        tested = model.evaluate(x, y, verbose=0, return_dict=True)
        found |= {f"test/{k}": np.array(v) for k, v in tested.items()}
    # Compare products with the precision, as its eigenvectors are not unique.
    for block in model.regularizer.precisions.values():
        deltas = [
            tf.constant(
                np.random.default_rng(len(path)).normal(size=model.regularizer.anchors[path].shape),
                "float32",
            )
            for path in block.paths
        ]
        for path, pull in zip(block.paths, block.matvec(deltas), strict=True):
            found[f"pull/{path}"] = np.asarray(pull)
            found[f"anchor/{path}"] = np.asarray(model.regularizer.anchors[path])
    return found | online


def agree():
    return agreed(os.environ["CASES"].split(","), Path(sys.argv[2]) / "checkpoints")


def agreed(cases, folder):
    found = {}
    for name in cases:
        case = sequence(str(folder), sharded=True) if name == "sequence" else two_tasks(name)
        found |= {f"{name}/{key}": value for key, value in case.items()}
    return found


def sequence(folder=None, sharded=None):
    """The accuracy matrix and the weights of a run with a head for each task."""

    def build(scenario):
        x, task = keras.Input((6,)), keras.Input((), dtype="int32")
        hidden = LAYERS.Dense(8, "relu", name="hidden")(x)
        return keras.Model([x, task], TaskHeads(3, 3, name="heads")(hidden, task))

    tasks = []
    for t in range(3):
        x, y = data(t, 96)
        u, v = data(10 + t, 50)
        tasks.append((f"task {t}", ((x, np.full(96, t)), y), ((u, np.full(50, t)), v)))
    scenario = Scenario.from_tasks(tasks, setting="task")
    folder = folder or os.environ["CHECKPOINTS"]
    sharded = os.environ.get("SHARDED") == "1" if sharded is None else sharded
    die_at = json.loads(os.environ.get("DIE_AT", "null"))

    class Die(keras.callbacks.Callback):
        def __init__(self, task):
            super().__init__()
            self.task = task

        def on_epoch_end(self, epoch, logs=None):
            if die_at == [self.task, epoch, detect_communicator().rank]:
                os.kill(os.getpid(), signal.SIGKILL)

    result = run_sequence(
        build,
        scenario,
        "dwd-online",
        epochs=3,
        batch_size=8,
        callbacks=lambda t, task: [Die(t)],
        checkpoint_dir=folder,
        sharded=sharded,
    )
    after = np.nan_to_num(result.matrix.after)
    return {"after": after} | {
        f"weight/{i}": np.asarray(w) for i, w in enumerate(result.model.weights)
    }


def share(sharded=True):
    """Bytes of the consolidation state on this worker."""

    def net():
        return keras.Sequential([keras.Input((64,)), *(LAYERS.Dense(64) for _ in range(4))])

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 64)).astype("float32"), rng.integers(0, 64, 32)
    found = {}
    kinds = {"kronecker": KroneckerFisher, "diagonal": lambda: DiagonalFisher("empirical")}
    for name, fisher in kinds.items():
        model = made(sharded=sharded, net=net, fisher=fisher())
        fit(model, x, y)
        model.consolidate()
        arrays = [*model.fisher.slots.values(), *model.regularizer.anchors.values()]
        arrays += [a for b in model.regularizer.precisions.values() for a in b.arrays().values()]
        found[name] = np.array(sum(np.asarray(a).nbytes for a in arrays))
    return found


def bytes_sent():
    """Horovod's timelines of plain training, and of sharded training with a penalty."""
    import horovod.tensorflow as hvd

    x, y = data(0, 96)
    plain = made(fisher=KroneckerFisher(gamma=None), strength=0.0)
    sharded = made(sharded=True, fisher=KroneckerFisher(every=1000), strength=30.0)
    fit(sharded, x, y, shuffle=False)
    sharded.consolidate()
    for name, model in (("plain", plain), ("pulled", sharded)):
        hvd.start_timeline(str(Path(sys.argv[2]) / f"{name}.json"))
        fit(model, x, y, shuffle=False)  # the first step updates the Fisher information
        detect_communicator().messages(b"", "wait")  # until the other has all steps behind it
        hvd.stop_timeline()
    return {}


def memory():
    """Resident memory that a model adds to this process, and bytes of its variables."""

    def resident():
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the GNU C library
        if trim is not None:
            trim(0)  # what was freed is no longer resident, however much the allocator would keep
        status = Path("/proc/self/status").read_text()
        (line,) = (each for each in status.splitlines() if each.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    def net():
        return keras.Sequential([keras.Input((1500,)), *(LAYERS.Dense(1500) for _ in range(6))])

    detect_communicator()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 1500)).astype("float32"), rng.integers(0, 1500, 16)
    settings = {"fisher": DiagonalFisher("empirical", every=1), "grouping": None}
    fit(made(**settings), *data())  # allocates the memory that TensorFlow needs for itself
    before = resident()
    model = made(sharded=True, net=net, **settings)
    fit(model, x, y)
    model.consolidate()
    fit(model, x, y)
    held = resident() - before
    variables = [*model.variables, *model.optimizer.variables, *model.fisher.slots.values()]
    variables += model.regularizer.anchors.values()
    variables += [a for b in model.regularizer.precisions.values() for a in b.arrays().values()]
    return {
        "resident": np.array(held),
        "variables": np.array(sum(np.asarray(v).nbytes for v in variables)),
    }


def behaves():
    """Files, callbacks, saving and averaging of moving statistics."""
    folder = Path(sys.argv[2])
    rank = detect_communicator().rank
    found = {}

    def net():
        return keras.Sequential(
            [
                keras.Input((6,)),
                LAYERS.Dense(8, name="hidden"),
                LAYERS.BatchNormalization(name="norm"),
                LAYERS.Dense(3, name="head"),
            ]
        )

    model = made(sharded=True, net=net)
    if rank:  # the weights of rank 0 must replace these
        kernel = model.get_layer("hidden").kernel
        kernel.assign(kernel + 1.0)
    x, y = data()
    rates = []

    class Rates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            rates.append(float(self.model.optimizer.learning_rate))

    log = folder / f"log.{rank}.csv"
    checkpoint = folder / "best.keras"
    warmup = LearningRateWarmup(2)
    callbacks = [
        keras.callbacks.CSVLogger(str(log)),
        keras.callbacks.ModelCheckpoint(str(checkpoint)),
        warmup,
        Rates(),
    ]
    fit(model, x, y, epochs=4, callbacks=callbacks, validation_split=0.2, class_weight={0: 2.0})
    found["rates"] = np.array(rates)
    model.consolidate()
    fit(model, x, y)
    model.save(folder / "saved.keras")
    found |= {f"weight/{i}": np.asarray(w) for i, w in enumerate(model.weights)}
    found["penalty"] = np.asarray(model.penalty())
    detect_communicator().messages(b"", "wait")  # wait until the file is written
    loaded = keras.saving.load_model(folder / "saved.keras")
    found["loaded"] = np.asarray(loaded.penalty())
    found["kept"] = np.array(len(loaded.regularizer.precisions))
    found["sharded"] = np.array(loaded.workers.sharded)
    x, y = data(3)
    fit(loaded, x, y)
    loaded.consolidate()

    # When training begins, all workers get the weights and optimizer state of rank 0.
    fresh = made(net=net)
    if rank == 0:
        fresh.load_weights(folder / "saved.keras")
        fresh.optimizer.build(fresh.trainable_variables)
        fresh.optimizer.iterations.assign(7)
    own = data_module.as_own(tf.data.Dataset.from_tensor_slices((x, y)).batch(4).take(3 + rank))
    fresh.fit(own, verbose=0)  # 3 and 4 batches: both workers use 3
    found["first_tasks"] = np.array(fresh.tasks_learned)
    found["first_steps"] = np.array(int(fresh.optimizer.iterations))
    found["first_penalty"] = np.asarray(fresh.penalty())
    found |= {f"first_weight/{i}": np.asarray(w) for i, w in enumerate(fresh.weights)}
    return found


# The least that is traced, where the estimate does not matter.
CHEAP = {"fisher": DiagonalFisher("batch"), "grouping": None}


def said_by(train):
    """What the error says that training raises on this worker."""
    try:
        train()
    except Exception as error:
        return {"said": np.array(f"{type(error).__name__}: {error}")}
    return {"said": np.array("nothing")}


def different_graph():
    model = made(
        net=lambda: network("more" if detect_communicator().rank == 1 else "second"), **CHEAP
    )
    return said_by(lambda: fit(model, *data()))


def left_alone():
    """Rank 0 sends a message, which the others never answer."""
    if detect_communicator().rank:
        time.sleep(120)
    detect_communicator().messages(b"?", "asked")
    return {}


def not_a_number():
    model = made(**CHEAP)
    x, y = data()
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(4).take(10)
    if detect_communicator().rank == 1:
        spoil = lambda i, b: (tf.where(i == 5, np.nan, 1.0) * b[0], b[1])  # noqa: E731
        batches = batches.enumerate().map(spoil)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return said_by(lambda: model.fit(batches.with_options(options), epochs=3, verbose=0))


def failing_data():
    model = made(**CHEAP)
    x, y = data()
    fit(model, x, y)
    if detect_communicator().rank == 1:
        x = x.copy()
        x[12] = np.nan
    model.consolidate((x, y), batch_size=8)
    return {}


def endless():
    """Trains until it is killed; writes a file when it begins."""
    model = made(**CHEAP)
    x, y = data()

    class Began(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                (Path(sys.argv[2]) / f"pid.{detect_communicator().rank}").write_text(
                    str(os.getpid())
                )

    fit(model, x, y, epochs=10**6, callbacks=[Began()])
    return {}


def main():
    names, folder = sys.argv[1:3]
    for name in names.split(","):
        found = globals()[name]()
        np.savez(Path(folder) / f"{name}.{detect_communicator().rank}.npz", **found)


if __name__ == "__main__":
    main()
