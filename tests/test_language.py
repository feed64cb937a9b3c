"""Language models of KerasHub: closed forms for all their layers, and what their tasks can do."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import pass_statistics, sweep

from keras_dwd import DiagonalFisher, DWDModel, strip_dwd
from keras_dwd.curvature.rules import GENERIC, ruled_layers
from keras_dwd.variables import by_path, trainable_by_path

keras_hub = pytest.importorskip("keras_hub")
models = keras_hub.models
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was passed an input with a mask attached"),
    pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer"),
]
WORDS, LENGTHS = 31, [8, 5, 3]
SMALL = {"dropout": 0.0, "max_sequence_length": 12}


def t5(tied=True):
    backbone = models.T5Backbone(
        *(WORDS, 2, 2, 8, 12),
        key_value_dim=4,
        dropout=0.0,
        activation="gelu",
        use_gated_activation=True,
        tie_embedding_weights=tied,
    )
    return models.T5Seq2SeqLM(backbone)


def gemma2():
    backbone = models.GemmaBackbone(
        *(WORDS, 2, 4, 2, 8, 12),
        head_dim=4,
        final_logit_soft_cap=2.0,
        attention_logit_soft_cap=5.0,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
    )
    return models.GemmaCausalLM(backbone)


def gemma3():
    backbone = models.Gemma3Backbone(
        *(WORDS, 16, 2, 4, 2, 8, 12), head_dim=4, vision_encoder=None, use_query_key_norm=True
    )
    return models.Gemma3CausalLM(backbone=backbone, preprocessor=None)


def classifier(name):
    backbone = getattr(models, f"{name}Backbone")(WORDS, 2, 2, 8, 12, **SMALL)
    return getattr(models, f"{name}TextClassifier")(backbone, num_classes=3, dropout=0.0)


FAMILIES = {
    "gpt2": lambda: models.GPT2CausalLM(models.GPT2Backbone(WORDS, 2, 2, 8, 12, **SMALL)),
    "opt": lambda: models.OPTCausalLM(models.OPTBackbone(WORDS, 2, 2, 8, 12, **SMALL)),
    "gemma": lambda: models.GemmaCausalLM(models.GemmaBackbone(WORDS, 2, 4, 2, 8, 12, head_dim=4)),
    "gemma2": gemma2,
    "gemma3": gemma3,
    "llama": lambda: models.LlamaCausalLM(
        models.LlamaBackbone(WORDS, 2, 4, 8, 12, 2, tie_word_embeddings=True)
    ),
    "llama3": lambda: models.Llama3CausalLM(models.Llama3Backbone(WORDS, 2, 4, 8, 12, 2)),
    "mistral": lambda: models.MistralCausalLM(
        models.MistralBackbone(WORDS, 2, 4, 8, 12, 2, sliding_window=6)
    ),
    "phi3": lambda: models.Phi3CausalLM(models.Phi3Backbone(WORDS, 2, 8, 12, 4, 2)),
    "qwen": lambda: models.QwenCausalLM(
        models.QwenBackbone(WORDS, 2, 4, 2, 8, 12, tie_word_embeddings=True)
    ),
    "qwen3": lambda: models.Qwen3CausalLM(
        models.Qwen3Backbone(WORDS, 2, 4, 2, 4, 8, 12, tie_word_embeddings=True)
    ),
    "bart": lambda: models.BartSeq2SeqLM(models.BartBackbone(WORDS, 2, 2, 8, 12, **SMALL)),
    "t5": t5,
    "t5_untied": lambda: t5(tied=False),
    "bert": lambda: classifier("Bert"),
    "roberta": lambda: classifier("Roberta"),
    "distilbert": lambda: classifier("DistilBert"),
}
ADAPTED = [  # of all the families
    *("query", "value", "query_dense", "value_dense", "query_projector", "value_projector"),
    *("token_embedding", "self_attention_output_dense", "feedforward_output_dense"),
]


def data_for(model, padding=0):
    """Sequences of three lengths. The first token of each is a prompt, which has no loss."""
    rng = np.random.default_rng(0)
    mask = np.arange(8 + padding) < np.array(LENGTHS)[:, None]
    padded = [(0, 0), (0, padding)]
    x = {}
    for name in sorted(model.input):
        ids = np.pad(rng.integers(1, WORDS, (3, 8)), padded) * mask
        x[name] = mask if "mask" in name else mask * (ids % 2) if "segment" in name else ids
        x[name] = x[name].astype("int32")
    if len(model.output.shape) == 2:
        return x, rng.integers(0, 3, 3)
    y = np.pad(rng.integers(0, WORDS, (3, 8)), padded)
    return x, y, (mask & (np.arange(8 + padding) > 0)).astype("float32")


def wrapped(model, lora=False):
    keras.utils.set_random_seed(0)
    if lora:
        model.backbone.enable_lora(2, ADAPTED)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:  # zero biases and unit scales would hide mistakes
        variable.assign_add(0.3 * rng.normal(size=variable.shape))
    made = DWDModel.from_model(model, fisher=DiagonalFisher("empirical", None), grouping=None)
    made.compile("sgd", jit_compile=False)
    return made


def one_by_one(model, x, y, weights=None):
    """Mean squared gradients of the sum of a sequence's losses, over √(Σ w²): of one token."""
    variables = trainable_by_path(model)
    total = dict.fromkeys(variables, 0.0)
    for i in range(3):
        with tf.GradientTape() as tape:
            logits = tf.cast(model({n: a[i : i + 1] for n, a in x.items()}), "float64")
            each = tf.nn.sparse_softmax_cross_entropy_with_logits(y[i : i + 1], logits)
            of_one = each if weights is None else each * weights[i] / np.sqrt(weights[i].sum())
            loss = tf.reduce_sum(of_one)
        values = [v.value for v in variables.values()]
        gradients = tape.gradient(loss, values, unconnected_gradients="zero")
        for path, g in zip(variables, gradients, strict=True):
            total[path] += np.asarray(tf.convert_to_tensor(g), "float64") ** 2 / 3
    return total


def check(model):
    layers = ruled_layers(model)
    assert not [ruled.layer.name for ruled in layers if ruled.rule is GENERIC]
    assert {p for ruled in layers for p in ruled.paths.values()} == set(by_path(model))
    data = data_for(model)
    expected = one_by_one(model, *data)
    largest = max(values.max() for values in expected.values())
    found = [pass_statistics(model, data, 3)]
    if len(data) == 3:
        found.append(pass_statistics(model, data_for(model, padding=4), 3))
    for path, values in expected.items():
        tolerance = {"rtol": 1e-3, "atol": 1e-4 * values.max() + 1e-9 * largest}
        for statistics in found:
            np.testing.assert_allclose(
                statistics[f"fisher/{path}"], values, **tolerance, err_msg=path
            )


@pytest.mark.parametrize("family", sweep(FAMILIES, "llama"))
def test_squares_are_those_of_single_sequences_whatever_their_padding(family):
    check(wrapped(FAMILIES[family]()))


@pytest.mark.long
@pytest.mark.parametrize("family", sweep(FAMILIES, "gpt2"))
def test_adapters_are_followed_and_nothing_else_is_pulled(family):
    model = wrapped(FAMILIES[family](), lora=True)
    assert any("lora" in path for path in trainable_by_path(model))
    # Of classifiers the layers after the backbone train as a whole.
    after = ("pooled_dense", "logits", "pooler")
    kernels = [p for p in trainable_by_path(model) if "kernel" in p and "lora" not in p]
    assert all(any(name in path for name in after) for path in kernels), kernels
    data = data_for(model)
    expected = one_by_one(model, *data)
    found = pass_statistics(model, data, 3)
    assert {name.removeprefix("fisher/") for name in found} == set(expected)
    largest = max(values.max() for values in expected.values())
    for path, values in expected.items():
        tolerance = {"rtol": 1e-3, "atol": 1e-4 * values.max() + 1e-9 * largest}
        np.testing.assert_allclose(found[f"fisher/{path}"], values, **tolerance, err_msg=path)


def test_positions_that_do_not_start_at_zero_are_followed_too():
    inputs = keras.Input((3, 4))
    positions = keras_hub.layers.PositionEmbedding(6)(inputs, start_index=2)
    outputs = keras.layers.Dense(3)(keras.layers.Flatten()(inputs + positions))
    model = DWDModel.from_model(keras.Model(inputs, outputs), fisher=DiagonalFisher("empirical"))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 3, 4)).astype("float32"), np.array([0, 2, 1])
    found, total = pass_statistics(model, (x, y), 3), np.zeros((6, 4))
    path = next(path for path in by_path(model) if "position" in path)
    for i in range(3):
        with tf.GradientTape() as tape:
            logits = model(x[i : i + 1])
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(y[i : i + 1], logits)
        gradient = tape.gradient(loss, by_path(model)[path].value)
        total += np.asarray(tf.convert_to_tensor(gradient), "float64") ** 2 / 3
    assert not total[:2].any()
    np.testing.assert_allclose(found[f"fisher/{path}"], total, rtol=1e-4, atol=1e-8)


def speaker(words=("a", "b", "c", "d", "ab")):
    """A GPT-2 of one layer that reads and writes the letters a to d."""
    vocabulary = {"<|endoftext|>": 0, **{word: i + 1 for i, word in enumerate(words)}}
    tokenizer = models.GPT2Tokenizer(vocabulary=vocabulary, merges=["a b"])
    preprocessor = models.GPT2CausalLMPreprocessor(tokenizer=tokenizer, sequence_length=8)
    backbone = models.GPT2Backbone(6, 1, 2, 8, 12, **SMALL)
    keras.utils.set_random_seed(3)
    task = models.GPT2CausalLM(backbone=backbone, preprocessor=preprocessor)
    rng = np.random.default_rng(0)
    for variable in task.weights:
        variable.assign(rng.normal(size=variable.shape))
    task.compile(sampler="greedy", jit_compile=False)
    return task


PROMPTS, TEXTS = ["a", "bc"], ["abcd", "dd", "cab"]


def said(model):
    prompt = {
        "token_ids": np.array([[1, 2, 0, 0, 0, 0, 0, 0], [3, 4, 1, 0, 0, 0, 0, 0]]),
        "padding_mask": np.array([[1] * 2 + [0] * 6, [1] * 3 + [0] * 5]),
    }
    tokens = {name: tf.constant(array) for name, array in prompt.items()}
    out = model.generate_step({**tokens, "padding_mask": tf.cast(tokens["padding_mask"], "bool")})
    return model.generate(list(PROMPTS), max_length=8), np.asarray(out["token_ids"]).tolist()


@pytest.mark.long
def test_a_task_model_keeps_what_it_can_do(tmp_path):
    task = speaker()
    before = said(task)
    settings = {"fisher": DiagonalFisher("empirical"), "grouping": None}
    model = DWDModel.from_model(task, **settings)
    assert said(model) == before
    model.compile(jit_compile=False)  # with the defaults, and the sampler that it had
    assert isinstance(model, DWDModel)
    assert said(model) == before
    assert model.backbone is task.backbone
    with pytest.warns(UserWarning, match="got its weights before this `fit`"):
        model.fit(TEXTS, batch_size=3, verbose=0, validation_data=(TEXTS,))
    assert model.evaluate(TEXTS, verbose=0)[0] > 0
    assert model.predict(TEXTS, verbose=0).shape == (3, 8, 6)
    model.consolidate(TEXTS)
    assert model.tasks_learned == 1
    model.train_on_batch(np.array(TEXTS))
    learned = said(model)
    model.save_weights(tmp_path / "m.weights.h5")
    plain = speaker()
    plain.load_weights(tmp_path / "m.weights.h5")
    assert said(plain) == learned
    again = DWDModel.from_model(speaker(), **settings)
    again.compile(jit_compile=False)
    again.load_weights(tmp_path / "m.weights.h5")
    assert said(again) == learned
    assert again.tasks_learned == 1
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    loaded.compile(sampler="greedy", jit_compile=False)
    assert said(loaded) == learned
    assert loaded.tasks_learned == 1
    stripped = strip_dwd(model)
    assert stripped is task
    assert said(stripped) == learned
    with pytest.raises(AttributeError, match="no attribute 'speak'"):
        model.speak  # noqa: B018
