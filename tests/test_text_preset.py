import json

import numpy as np
import pytest
import tensorflow as tf
from test_text_sequence import folder as folder

from keras_dwd.evaluation.experiment import Experiment
from keras_dwd.evaluation.text.language import of_preset
from keras_dwd.evaluation.text.preset import PresetTokenizer, PresetWriter, load_preset

models = pytest.importorskip("keras_hub").models
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A small GPT-2 whose tokens are bytes; the end of a text is what it pads with, too."""
    folder = tmp_path_factory.mktemp("presets") / "tiny"
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *letters, "ab"])}
    tokenizer = models.GPT2Tokenizer(vocabulary=vocabulary, merges=["a b"])
    backbone = models.GPT2Backbone(
        vocabulary_size=len(vocabulary),
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=40,
    )
    preprocessor = models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=40)
    models.GPT2CausalLM(backbone, preprocessor).save_to_preset(str(folder))
    return folder


def test_adapters_of_a_preset_learn_a_sequence_of_tasks(preset, folder):
    made = Experiment("text:first,last", data_dir=folder, epochs=1, preset=preset, lora=2)
    result = made.run("dwd")
    model, plain = result.model, load_preset(preset)
    before = {v.path: np.array(v) for v in plain.backbone.weights}
    trained = {v.path for v in model.trainable_variables}
    assert {path.rpartition("/")[2] for path in trained} == {
        *("bias", "lora_kernel_a", "lora_kernel_b")  # the layers with adapters train their bias
    }
    for v in model.backbone.weights:
        assert v.path not in trained or np.any(np.array(v))
        if v.path not in trained:
            np.testing.assert_array_equal(v, before[v.path])
    held = result.consolidation["held"]
    assert held == sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    loss = result.matrices["loss"]
    assert loss.after[0, 0] < loss.before[0]
    described = made.describe(1)
    assert (described["preset"], described["lora"]) == ("tiny", 2)
    assert described["network"] == "preset tiny, LoRA of rank 2"
    json.dumps(described)


def test_a_preset_writes_the_most_probable_tokens(preset):
    model = load_preset(preset, preprocessor=None)
    rng = np.random.default_rng(0)
    for v in model.trainable_variables:
        v.assign(v + 0.7 * rng.normal(size=v.shape))
    tokenizer = of_preset(preset, None, 1).tokenizer
    prompts = [[5, 9, 7], [8, 30, 31, 32, 3], [11]]
    model.compile(sampler="greedy", jit_compile=False)
    written = PresetWriter(model, tokenizer, 40, batch_size=2)(prompts, 6)
    run = tf.function(model.call, reduce_retracing=True)
    for prompt, found in zip(prompts, written, strict=True):
        expected = list(prompt)
        for _ in range(6):
            ids = tf.constant([expected])
            expected.append(
                int(np.argmax(run({"token_ids": ids, "padding_mask": ids > -1})[0, -1]))
            )
        own = expected[len(prompt) :]
        assert found == own[: own.index(tokenizer.end)] if tokenizer.end in own else own


def test_the_tokenizer_of_a_preset_makes_text_again(preset):
    tokenizer = PresetTokenizer(load_preset(preset, load_weights=False).preprocessor)
    texts = ["cab", "", " ¿Qué?\n\tx = 語"]
    tokens = tokenizer.encode(texts)
    assert len(tokens[0]) == 2
    assert tokenizer.decode(tokens) == texts
    assert tokenizer.pad != tokenizer.end
    assert tokenizer.start == (tokenizer.end,)  # as GPT-2 begins texts
