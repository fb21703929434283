"""The pretrained text encoder of the benchmarks, where its packages are installed."""

import pathlib
import sys

import numpy as np
import pytest
from keras import ops


@pytest.fixture(scope="module")
def minilm():
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))
    try:
        import minilm
    finally:
        sys.path.pop(0)
    if minilm.missing():
        pytest.skip(f"not installed: {', '.join(minilm.missing())}")
    return minilm


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def reference(minilm, tokens):
    """What the model gives for tokens (B, T) without padding, in NumPy, by the names in the file.

    Its GELU is the approximate one, which KerasHub takes.
    """
    values = minilm.weights()

    def linear(x, name):
        return x @ values[f"{name}.weight"].T + values[f"{name}.bias"]

    def normal(x, name):
        centered = x - x.mean(-1, keepdims=True)
        scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * values[f"{name}.LayerNorm.weight"] + values[f"{name}.LayerNorm.bias"]

    def heads(x):
        return x.reshape(*x.shape[:2], minilm.HEADS, -1).swapaxes(1, 2)

    def attention(x, name):
        query, key, value = (heads(linear(x, f"{name}.self.{part}")) for part in ("query", "key", "value"))
        scores = np.exp(query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1]))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ value
        return normal(x + linear(mixed.swapaxes(1, 2).reshape(x.shape), f"{name}.output.dense"), f"{name}.output")

    words, places, kinds = (
        values[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    x = normal(words[tokens] + places[: tokens.shape[1]] + kinds[0], "embeddings")
    for index in range(minilm.LAYERS):
        name = f"encoder.layer.{index}"
        x = attention(x, f"{name}.attention")
        hidden = gelu(linear(x, f"{name}.intermediate.dense"))
        x = normal(x + linear(hidden, f"{name}.output.dense"), f"{name}.output")
    return x


SENTENCES = ("a gorgeous , witty , seductive movie .", "simplistic , silly and tedious .", "film")


def test_keras_hub_computes_what_the_weights_say(minilm):
    backbone, tokenizer = minilm.backbone(), minilm.tokenizer()
    rows = [tokenizer.encode(sentence).ids for sentence in SENTENCES]
    padded = np.zeros((len(rows), max(map(len, rows)) + 2), "int32")
    for row, ids in zip(padded, rows):
        row[: len(ids)] = ids
    inputs = {"token_ids": padded, "padding_mask": padded != 0, "segment_ids": np.zeros_like(padded)}
    found = ops.convert_to_numpy(backbone(inputs)["sequence_output"])
    for ids, each in zip(rows, found):
        np.testing.assert_allclose(each[: len(ids)], reference(minilm, np.array([ids]))[0], atol=1e-4)


def test_sentences_of_a_kind_are_near_each_other(minilm):
    tokenizer = minilm.tokenizer()
    means = []
    for sentence in ("a good film", "an excellent movie", "interest rates rose in march"):
        mean = reference(minilm, np.array([tokenizer.encode(sentence).ids]))[0].mean(0)
        means.append(mean / np.linalg.norm(mean))
    good, excellent, rates = means
    assert good @ excellent > 0.5 > good @ rates
