"""Models of text that experiments can train: the small decoder, or a preset of KerasHub."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras

from keras_dwd.checks import integer
from keras_dwd.evaluation.profiles import Profile
from keras_dwd.evaluation.recipe import Recipe
from keras_dwd.evaluation.scenario import Scenario
from keras_dwd.evaluation.text.decoder import decoder
from keras_dwd.evaluation.text.encoding import masked, sequence_loss
from keras_dwd.evaluation.text.generation import Generator
from keras_dwd.evaluation.text.preset import PresetTokenizer, PresetWriter, load_preset
from keras_dwd.evaluation.text.pretraining import Pretraining
from keras_dwd.evaluation.text.scoring import Write
from keras_dwd.evaluation.text.tokenizer import Tokenizer

LENGTH = 176
"""Tokens of a prompt and a target together."""


@dataclass(frozen=True)
class Language:
    """A model of text, and how it is trained.

    Attributes:
        tokenizer: Its tokenizer.
        profile: The model and the training protocol.
        length: The most tokens of a prompt and a target together.
        writer: Makes what continues prompts with a model.
        inputs: Makes what `fit` takes of the arrays of `Encoding.examples`.
        about: Further entries of the protocol in result files.
        details: What it has been trained on, in words.
    """

    tokenizer: Tokenizer
    profile: Profile
    length: int
    writer: Callable[[keras.Model], Write]
    inputs: Callable[[Any], Any]
    about: dict[str, Any]
    details: str


def small_decoder(
    pretraining: Pretraining,
    texts: Sequence[str],
    beams: int,
    cache_dir: Path | None,
    say: Callable[[str], None],
) -> Language:
    """The small decoder, pretrained if that has not been done yet.

    Args:
        pretraining: How.
        texts: See `Pretraining`, as `cache_dir` and `say`.
        beams: See `Generator`.
        cache_dir: Where the decoder is kept.
        say: Called with a message when pretraining begins.
    """
    tokenizer, weights = pretraining(texts, cache_dir, say)
    size, characters = pretraining.size, sum(map(len, pretraining.used(texts)))

    def build(scenario: Scenario) -> keras.Model:
        model = decoder(tokenizer.size, size)
        model.set_weights(weights)
        return model

    return Language(
        tokenizer,
        Profile(
            f"decoder of {size.blocks} blocks, {size.width} wide, {tokenizer.size} tokens, "
            "pretrained",
            build,
            epochs=3,
            batch_size=16,
            recipe=Recipe(learning_rate=1e-3, bucket=16),
            compile_settings=_COMPILE | {"steps_per_execution": lambda: 16},
        ),
        LENGTH,
        lambda model: Generator(model, beams),
        lambda examples: examples,
        {"pretraining": asdict(pretraining) | {"characters": characters}},
        f"pretrained on {characters:,} other characters",
    )


def of_preset(folder: Path, lora: int | None, beams: int) -> Language:
    """A causal language model of KerasHub.

    Args:
        folder: A preset.
        lora: The rank of the adapters of its attention layers, which are then trained alone;
            `None` to train all weights.
        beams: Number of continuations that are followed at once.
    """
    if lora is not None:
        integer("lora", lora, 1)
    task = load_preset(folder, load_weights=False)
    if task.preprocessor is None:
        raise ValueError(f"`preset` must have a preprocessor. Received: {str(folder)!r}")
    tokenizer = PresetTokenizer(task.preprocessor)
    longest = getattr(task.backbone, "max_sequence_length", sys.maxsize)
    length = min(LENGTH, longest)
    name = folder.resolve().name
    trained = "all weights" if lora is None else f"LoRA of rank {lora}"

    def build(scenario: Scenario) -> keras.Model:
        model = load_preset(folder, preprocessor=None)
        if lora is not None:
            model.backbone.enable_lora(lora)
        return model

    def sampler() -> Any:
        import keras_hub

        return "greedy" if beams == 1 else keras_hub.samplers.BeamSampler(num_beams=beams)

    return Language(
        tokenizer,
        Profile(
            f"preset {name}, {trained}",
            build,
            epochs=1,
            batch_size=8,
            recipe=Recipe(learning_rate=3e-5 if lora is None else 3e-4, bucket=16),
            # Compiling by XLA takes longer than what is written.
            compile_settings=_COMPILE | {"sampler": sampler, "jit_compile": lambda: False},
        ),
        length,
        lambda model: PresetWriter(model, tokenizer, longest),
        masked,
        {"preset": name, "lora": lora},
        "as the preset was trained",
    )


_COMPILE: dict[str, Callable[[], Any]] = {
    "loss": sequence_loss,
    "metrics": lambda: [],
    "weighted_metrics": lambda: [keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
}
