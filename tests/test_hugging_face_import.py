"""Models of Hugging Face, read and compared with what transformers computes from the same folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt import UserError, generate, load_model
from lit_gpt.convert.hugging_face import check_hugging_face, write_hugging_face
from lit_gpt.convert.parity import sample_strings
from lit_gpt.library_tokenizer import LibraryTokenizer
from lit_gpt.tokenizer import ByteTokenizer, Tokenizer, from_state

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'lit-gpt[hf]'")
from test_hugging_face import SHAPES, TEXTS, random_model, tokenizers  # noqa: E402  # it needs transformers too

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "initializer_range": 0.1,
}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
ROPE = {"rope_type": "default", "rope_theta": 100_000.0}

# name: (class of the config, its arguments)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2Config", GPT2),
    "GPT-2, odd": ("GPT2Config", {**GPT2, "n_inner": 52, "activation_function": "gelu", "tie_word_embeddings": False}),
    "Llama": ("LlamaConfig", {**SMALL, "num_key_value_heads": 2, "rope_parameters": ROPE, "tie_word_embeddings": True}),
    "Llama, biases": ("LlamaConfig", {**SMALL, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "Qwen 2": ("Qwen2Config", {**SMALL, "num_key_value_heads": 2, "rms_norm_eps": 1e-3}),
    "Qwen 3": ("Qwen3Config", {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
    "Arcee": ("ArceeConfig", {**SMALL, "head_dim": 8, "num_key_value_heads": 4, "rope_parameters": ROPE}),
    "Starcoder 2": ("Starcoder2Config", {**SMALL, "num_key_value_heads": 2, "rope_parameters": ROPE}),
}


def library_tokenizer() -> Any:
    """Return a byte-level tokenizer as their programs train them, with the end of text as its first id."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(TEXTS * 9, trainer)
    return library


def write_theirs(folder: Path, family: str) -> Any:
    """Write a folder as transformers does, with random weights; return the model."""
    torch.manual_seed(1)
    name, arguments = FAMILIES[family]
    config = getattr(transformers, name)(**arguments)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    theirs.save_pretrained(folder)
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=library_tokenizer(), **ends).save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_imported_model_computes_the_same(family: str, tmp_path: Path) -> None:
    theirs = write_theirs(tmp_path, family)
    model, _, mode = load_model(tmp_path)
    assert mode == "raw"
    tokens = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
    assert (theirs(tokens).logits - model(tokens)[0]).abs().max() < 1e-4
    (ours,) = generate(model, [tokens[0, :9].tolist()], 20, temperature=0)
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    attended = torch.ones(1, 9, dtype=torch.long)
    expected = theirs.generate(tokens[:1, :9], attention_mask=attended, pad_token_id=0, **settings)[0, 9:]
    assert ours == expected.tolist()


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.formats)])
def test_imported_tokenizer_encodes_as_theirs_and_survives_a_checkpoint(count: int, tmp_path: Path) -> None:
    write_theirs(tmp_path, "Llama")
    _, tokenizer, _ = load_model(tmp_path / "model.safetensors")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, LibraryTokenizer)
    assert (tokenizer.end_of_text, tokenizer.begin_of_text, tokenizer.vocab_size) == (0, 0, 300)
    restored = from_state(json.loads(json.dumps(tokenizer.state())))
    for string in sample_strings(tokenizer, TEXTS, count):
        ids = theirs.encode(string, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.encode(string) == restored.encode(string) == ids
        assert tokenizer.decode(ids) == string
    assert tokenizer.token_bytes(0) == tokenizer.token_bytes(299_999) == b""


@pytest.mark.parametrize(("name", "shape"), SHAPES.items(), ids=SHAPES)
def test_import_of_an_export_is_the_identity(name: str, shape: dict[str, Any], tmp_path: Path) -> None:
    choices = tokenizers()
    for mode, (kind, tokenizer) in zip(["rows", "raw"] * 2, choices.items()):
        if name in ("qwen3", "gpt2, course") or kind == "bpe":
            check_identity(shape, tokenizer, mode, tmp_path / kind)


def check_identity(shape: dict[str, Any], tokenizer: Tokenizer, mode: str, folder: Path) -> None:
    model = random_model(tokenizer.vocab_size, **shape)
    write_hugging_face(model, tokenizer, mode, folder)
    again, restored, restored_mode = load_model(folder)
    assert again.config == model.config
    assert (restored.state(), restored_mode) == (tokenizer.state(), mode)
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    write_hugging_face(again, restored, mode, folder.with_suffix(".again"))
    for file in sorted(folder.iterdir()):
        if file.name != "README.md":  # it states the name of the folder
            assert (folder.with_suffix(".again") / file.name).read_bytes() == file.read_bytes()


def test_imported_model_survives_an_export(tmp_path: Path) -> None:
    write_theirs(tmp_path / "theirs", "Qwen 2")
    model, tokenizer, mode = load_model(tmp_path / "theirs")
    write_hugging_face(model, tokenizer, mode, tmp_path / "ours")
    check_hugging_face(model, tokenizer, mode, tmp_path / "ours", TEXTS, num_strings=100)
    again, restored, restored_mode = load_model(tmp_path / "ours")
    assert (again.config, restored.state(), restored_mode) == (model.config, tokenizer.state(), mode)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_export_that_another_program_has_trained_keeps_its_biases(tmp_path: Path) -> None:
    model = random_model(257, **SHAPES["gpt2, course"])
    write_hugging_face(model, ByteTokenizer(), "rows", tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        theirs.transformer.h[0].attn.c_attn.bias += 1
        theirs.transformer.wpe.weight += 0.1
    theirs.save_pretrained(tmp_path / "model")
    again, _, _ = load_model(tmp_path / "model")
    tokens = torch.randint(257, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (again(tokens)[0] - theirs(tokens).logits).abs().max() < 1e-4


def test_changed_export_is_read_as_it_is(tmp_path: Path) -> None:
    model = random_model(257)
    write_hugging_face(model, ByteTokenizer(), "rows", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
    config["rms_norm_eps"] = 0.5
    (tmp_path / "model/config.json").write_text(json.dumps(config), encoding="utf-8")
    again, tokenizer, mode = load_model(tmp_path / "model")
    assert again.norm.eps == 0.5
    assert (mode, tokenizer.end_of_text, tokenizer.begin_of_text) == ("rows", 256, 256)
    assert tokenizer.encode("é<|endoftext|>") == list("é<|endoftext|>".encode())


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
    "code": ({"auto_map": {"AutoModel": "x.py"}}, "auto_map"),
    "activation": ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    "scaled": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
    "scaled, older": ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type is 'linear'"),
    "window": ({"sliding_window": 16}, "sliding_window is 16"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "shape": ({"num_hidden_layers": 3}, "lacks the weight model.layers.2.input_layernorm.weight"),
    "far more": ({"num_hidden_layers": 10**9}, "num_blocks is 1000000000, and it has 20 weights"),
    "context": ({"max_position_embeddings": 10**9}, "context_length is 1000000000"),
    "fewer": ({"num_hidden_layers": 1}, "has the weight model.layers.1"),
    "width": ({"hidden_size": 64}, "the weight model.embed_tokens.weight has another shape"),
    "no width": ({"hidden_size": None}, "config.json describes no model"),
    "heads": ({"num_key_value_heads": 3}, "num_kv_heads 3 does not divide"),
    "layers": ({"layer_types": ["sliding_attention"] * 2}, "layer_types is ['sliding_attention'"),
    "no family": ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
    "no angles": ({"rope_parameters": [1]}, "config.json describes no model"),
    "no number": ({"rms_norm_eps": 10**400}, "config.json describes no model"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_part_that_is_not_supported_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_theirs(tmp_path, "Llama")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load_model(tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "no such file"),
        ("config.json", b"{", "config.json is damaged"),
        ("model.safetensors", None, "has no weights as .safetensors"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}", "model.safetensors cannot be read"),
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", b"{}", "tokenizer.json is damaged"),
        ("tokenizer.json", b'{"added_tokens": []}', "the tokenizer is damaged"),
        ("tokenizer_config.json", b"[" * 10**5, "tokenizer_config.json is damaged"),
        ("model.safetensors.index.json", b'{"weight_map": []}', "model.safetensors.index.json is damaged"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"x": "../x.safetensors"}}',
            "names a file in another folder",
        ),
    ],
    ids=str,
)
def test_damaged_folder_is_refused_in_one_line(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    write_theirs(tmp_path, "Llama")
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_model(tmp_path)
    assert "\n" not in str(raised.value)
    if message != "no such file":
        assert message in str(raised.value)


@pytest.mark.parametrize("end", [-1, 300, True, "x"])
def test_end_of_text_that_is_no_id_is_refused(end: Any) -> None:
    with pytest.raises(UserError, match="which is no id below 300"):
        LibraryTokenizer(library_tokenizer().to_str(), 0, end, 300)


def test_name_on_the_hub_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="owner/model: no such path here, and the Hugging Face hub does not give it"):
        load_model("owner/model")
