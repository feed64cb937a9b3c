"""Compares a `GroupingPolicy` on a long sequence of tasks with each of the groupings it picks from.

Some of these groupings are similar, others differ much (a tenth and ten times the strength). The
compared rules are: the same grouping at every boundary, a random one, the pick of a new policy, and
the pick of a policy that has learned from another sequence (other permutations and seeds). All runs
hold back the same tenth of the training data, from which the policy gets its rewards.

Usage: python benchmarks/policy.py [--tasks N] [--seeds N] [--processes N] [--out FILE]
"""

import argparse
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.evaluation.experiment import Experiment, versions
from keras_dwd.evaluation.methods import METHODS
from keras_dwd.files import write_json
from keras_dwd.groupings import (
    FixedGrouping,
    GaussianMixtureGrouping,
    LayerGrouping,
    SingleGroup,
)
from keras_dwd.groupings.policy import GroupingPolicy
from keras_dwd.groupings.strength import Importance

EPOCHS = 5
ARMS = {
    "one group": SingleGroup(),
    "layers": LayerGrouping(),
    "a mixture of four": GaussianMixtureGrouping(4),
    "the same, levelled": GaussianMixtureGrouping(4, Importance(-0.5)),
    "a tenth of the strength": FixedGrouping({"*": 0.1}),
    "ten times the strength": FixedGrouping({"*": 10.0}),
}
LEARNED, TRANSFERRED, RANDOM = "picked by the policy", "the same, experienced", "picked at random"
PROTOCOL = (
    "permuted digits, {tasks} tasks of {epochs} epochs, otherwise as `keras-dwd run`; a tenth of "
    "the training data held back from all, accuracy on the test data after the last task, "
    "seeds 0–{last}, mean ± std"
)


@keras.saving.register_keras_serializable("benchmarks")
class Watched(GroupingPolicy):
    """A policy that can pick by another rule, and records its picks."""

    def __init__(self, groupings, exploration=0.1, rewards=None, rule=LEARNED, seed=0):
        super().__init__(groupings, exploration, rewards)
        self.rule, self.seed, self.picks = rule, seed, []
        self._rng = np.random.default_rng(seed)

    def pick(self, context):
        if self.rule == RANDOM:
            return int(self._rng.integers(len(ARMS)))
        if self.rule in ARMS:
            return list(ARMS).index(self.rule)
        return super().pick(context)

    def commit(self):
        super().commit()
        self.picks.append(self.picked)

    def get_config(self):
        return super().get_config() | {"rule": self.rule, "seed": self.seed}


def sequence(tasks, rule, seed, permutations=0, rewards=None):
    """Run one sequence; returns the final average accuracy, the picks, and the rewards."""
    policy = Watched(list(ARMS.values()), rewards=rewards, rule=rule, seed=seed)
    plain = METHODS["dwd-online"]
    method = replace(plain, settings=lambda s, **k: plain.settings(s, **k) | {"grouping": policy})
    experiment = Experiment(
        "permuted:digits", tasks=tasks, epochs=EPOCHS, class_order_seed=permutations
    )
    result = experiment.run(method, seed)
    policy = result.model.grouping
    return float(result.matrix.average_accuracy), policy.picks, policy.rewards


def measure(job):
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tasks, rule, seed = job
    rewards = None
    if rule == TRANSFERRED:
        rewards = sequence(tasks, LEARNED, 100 + seed, permutations=1)[2]
    accuracy, picks, _ = sequence(tasks, rule, seed, rewards=rewards)
    return rule, accuracy, picks


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/policy.json")
    options = parser.parse_args()
    rules = [*ARMS, RANDOM, LEARNED, TRANSFERRED]
    jobs = [(options.tasks, rule, seed) for rule in rules for seed in range(options.seeds)]
    rows = {rule: {"average_accuracy": {"per_seed": []}, "picks": []} for rule in rules}
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        for rule, accuracy, picks in pool.imap(measure, jobs):
            rows[rule]["average_accuracy"]["per_seed"].append(accuracy)
            rows[rule]["picks"].append(picks)
            print(f"{rule}: {accuracy:.4f} {picks}", flush=True)
    for row in rows.values():
        values = row["average_accuracy"]["per_seed"]
        row["average_accuracy"] |= {"mean": float(np.mean(values))}
        row["average_accuracy"] |= {"std": float(np.std(values, ddof=1))}
    protocol = PROTOCOL.format(tasks=options.tasks, epochs=EPOCHS, last=options.seeds - 1)
    content = {"protocol": protocol, "versions": versions(), "arms": list(ARMS), "rules": rows}
    write_json(options.out, content)


if __name__ == "__main__":
    main()
