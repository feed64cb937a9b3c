import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import compiled, sweep

from keras_dwd.curvature.rules import GENERIC, ruled_layers
from keras_dwd.evaluation.text.decoder import DecoderSize, decoder
from keras_dwd.evaluation.text.generation import Generator
from keras_dwd.evaluation.text.tokenizer import END, PAD, SEPARATOR

TOKENS = 12


def untidy():
    """A decoder with large random weights, so that what it writes depends on all it has read."""
    model = decoder(TOKENS, DecoderSize(8, 2, 2, 24))
    rng = np.random.default_rng(3)
    for v in model.trainable_variables:
        v.assign(v + 0.6 * rng.normal(size=v.shape))
    ends = 3.0 * (np.arange(TOKENS) == END)  # so that some texts end before others
    model.get_layer("next").bias.assign_add(ends)
    return model


def prompts(count=5):
    rng = np.random.default_rng(1)
    return [[*rng.integers(3, TOKENS, 1 + 3 * i).tolist(), SEPARATOR] for i in range(count)]


def searched(model, prompt, steps, beams):
    """The search as it is defined, one text at a time, without a cache."""
    run = tf.function(lambda x: tf.nn.log_softmax(model(x)[0, -1]), reduce_retracing=True)
    held = [(0.0, [])]
    for _ in range(steps):
        longer = []
        for score, written in held:
            if written[-1:] in ([END], [PAD]):
                longer.append((score, [*written, PAD]))
                continue
            gains = run(tf.constant([prompt + written])).numpy()
            longer += [(score + gains[t], [*written, t]) for t in range(TOKENS)]
        held = sorted(longer, key=lambda pair: -pair[0])[:beams]
    best = max(held, key=lambda pair: pair[0] / sum(t != PAD for t in pair[1]))[1]
    return [t for t in best if t not in (END, PAD)]


@pytest.mark.parametrize("beams", sweep((1, 3), 3))
def test_what_is_written_equals_a_search_without_a_cache(beams):
    model = untidy()
    expected = [searched(model, prompt, 7, beams) for prompt in prompts()]
    lengths = {len(text) for text in expected}
    assert len(lengths) > 1, "some must end before others"
    assert Generator(model, beams, batch_size=2)(prompts(), 7) == expected


def test_a_wrapped_decoder_writes_the_same():
    model = untidy()
    expected = Generator(model)(prompts(), 4)
    assert Generator(compiled(model))(prompts(), 4) == expected


def test_texts_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match=r"must be at most 24 .* Received: 26"):
        Generator(untidy())(prompts(), 12)
    for name, made in (
        ("steps", lambda: Generator(untidy())(prompts(1), 0)),
        ("beams", lambda: Generator(untidy(), beams=0)),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer >= 1"):
            made()


def test_each_token_depends_on_those_before_it_alone():
    model = untidy()
    text = np.array([[3, 4, 5, 6, 7, PAD, PAD]])
    changed = np.array([[3, 4, 5, 9, 9, 9, 9]])
    a, b = model(text), model(changed)
    np.testing.assert_allclose(a[:, :3], b[:, :3], atol=1e-5)
    assert np.abs(a[:, 3] - b[:, 3]).max() > 0.01


def test_all_layers_of_the_decoder_have_closed_forms():
    model = compiled(untidy())
    ruled = ruled_layers(model)
    assert {path for each in ruled for path in each.paths.values()} == {
        v.path for v in model.trainable_variables
    }
    assert all(each.rule is not GENERIC for each in ruled)


@pytest.mark.long
def test_the_decoder_is_saved_and_loaded(tmp_path):
    model = untidy()
    model.save(tmp_path / "decoder.keras")
    loaded = keras.saving.load_model(tmp_path / "decoder.keras")
    assert Generator(loaded)(prompts(), 3) == Generator(model)(prompts(), 3)


@pytest.mark.parametrize(
    ("size", "error"), [({"heads": 3}, "must divide"), ({"blocks": 0}, "`blocks`")]
)
def test_sizes_that_cannot_be(size, error):
    with pytest.raises(ValueError, match=error):
        DecoderSize(**size)
