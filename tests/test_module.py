"""Training, evaluation and logging by LitGPT, compared with plain PyTorch."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Fit, points, weights
from lightning.pytorch import Trainer
from torch.nn import functional as F

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.convert.load import load_model
from lit_gpt.data.batches import Batch
from lit_gpt.data.config import CorpusConfig
from lit_gpt.data.corpus import open_corpus
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.sources import Source
from lit_gpt.data.windows import random_starts
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.training.compile import compile_blocks
from lit_gpt.training.module import LitGPT

RUN = Path("logs/small/version_0")
TRAINED = 16  # context_length of small.yaml


def plain_training(steps: int, batch: int, clip: float = 1.0) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train the model of small.yaml in plain PyTorch; return losses and weights."""
    corpus = open_corpus([Source("rows.txt")], CorpusConfig(ReadOptions(), tokenizer="byte"), Path("data/cache"))
    ids = torch.from_numpy(np.asarray(corpus.split("train"), dtype=np.int64))  # 108 of 120 rows
    model = LitGPT.load_from_checkpoint("start.ckpt", weights_only=True).gpt
    decay, rest = ([p for p in model.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.95)
    )
    losses = []
    for step in range(steps):
        starts = random_starts(1337, step, batch, len(ids), TRAINED)
        x = torch.stack([ids[s : s + TRAINED] for s in starts])
        y = torch.stack([ids[s + 1 : s + TRAINED + 1] for s in starts])
        progress = (step - 2) / (6 - 2)
        rate = 1e-3 * ((step + 1) / 2 if step < 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses, {f"gpt.{name}": value for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "flags",
    [["--data.batch_size", 12], ["--data.global_batch_size", 12], ["--trainer.accumulate_grad_batches", 3]],
    ids=["one batch", "global_batch_size", "accumulate_grad_batches"],
)
def test_run_matches_a_training_loop_written_by_hand(fit: Fit, flags: list[object]) -> None:
    assert fit("--name", "start", "--trainer.max_steps", 1, "--model.learning_rate", 1e-30).status == 0
    Path("logs/start/version_0/last.ckpt").rename("start.ckpt")  # the weights before training, but for 1e-30
    assert fit(*flags, "--name", "run").status == 0
    losses, expected = plain_training(steps=6, batch=12)
    logged = points(Path("logs/run/version_0"))
    assert [step for step, _ in logged["loss/train"]] == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close([value for _, value in logged["loss/train"]], losses, rtol=1e-5, atol=1e-5)
    for name, value in weights(Path("logs/run/version_0/last.ckpt")).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_intervals_count_optimizer_steps_under_accumulation(fit: Fit) -> None:
    assert fit("--data.global_batch_size", 12, "--trainer.log_every_n_steps", 2).status == 0
    logged = points(RUN)
    assert [step for step, _ in logged["loss/train"]] == [2, 4, 6]
    assert [step for step, _ in logged["loss/val"]] == [0, 3, 6]
    assert [step for step, _ in logged["optim/grad_norm"]] == [2, 4, 6]
    assert set(logged) == {
        *("loss/train", "loss/train_eval", "loss/val", "best/loss_val", "val/perplexity", "val/bits_per_byte"),
        "val/accuracy",
        *("optim/lr", "optim/grad_norm", "speed/tokens_per_second", "memory/peak_gb"),
    }


@pytest.mark.parametrize("flags", [[], ["--data.global_batch_size", 12]], ids=["one batch", "three"])
def test_last_step_validates_whatever_the_interval(fit: Fit, flags: list[object]) -> None:
    assert fit("--trainer.val_check_interval", 4, *flags).status == 0
    assert [step for step, _ in points(RUN)["loss/val"]] == [0, 4, 6]
    assert fit("--name", "rare", "--trainer.val_check_interval", 1000, *flags).status == 0
    assert [step for step, _ in points(Path("logs/rare/version_0"))["loss/val"]] == [0, 6]


def test_validation_interval_can_be_a_part_of_an_epoch(fit: Fit) -> None:
    result = fit("--trainer.val_check_interval", 0.25, "--data.global_batch_size", 8)
    assert "17 to an epoch" in result.out
    assert [step for step, _ in points(RUN)["loss/val"]] == [0, 4, 6]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_estimated_loss_is_the_mean_over_all_tokens_of_the_split(fit: Fit, batch_size: int) -> None:
    assert fit("--data.batch_size", batch_size, "--data.eval_windows", "null").status == 0
    logged = points(RUN)
    model, tokenizer, _ = load_model(RUN / "last.ckpt")
    corpus = open_corpus([Source("rows.txt")], CorpusConfig(ReadOptions(), tokenizer="byte"), Path("data/cache"))
    ids = torch.from_numpy(np.asarray(corpus.split("val"), dtype=np.int64))
    nats, correct = 0.0, 0
    for start in range(0, len(ids) - 1, TRAINED):
        x, y = ids[start : start + TRAINED], ids[start + 1 : start + TRAINED + 1]
        logits = model(x[None, : len(y)])[0][0]
        nats += F.cross_entropy(logits, y, reduction="sum").item()
        correct += int((logits.argmax(dim=-1) == y).sum())
    loss = nats / (len(ids) - 1)
    assert logged["loss/val"][-1][1] == pytest.approx(loss, rel=1e-5)
    assert logged["val/perplexity"][-1][1] == pytest.approx(math.exp(loss), rel=1e-4)
    assert logged["val/accuracy"][-1][1] == pytest.approx(correct / (len(ids) - 1))
    size = len(tokenizer.decode(ids[1:].tolist()).encode("utf-8"))
    assert logged["val/bits_per_byte"][-1][1] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


def test_dropout_depends_on_seed_and_step_only(fit: Fit) -> None:
    for name, flags in {"a": [], "b": ["--trainer.val_check_interval", 1, "--generate.prompts", "[]"]}.items():
        assert fit("--name", name, "--model.config.dropout", 0.3, *flags).status == 0
    a, b = (points(Path(f"logs/{name}/version_0"))["loss/train"] for name in "ab")
    assert a == b
    assert fit("--name", "c", "--model.config.dropout", 0.3, "--seed_everything", 1).status == 0
    assert points(Path("logs/c/version_0"))["loss/train"] != a


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.gradient_clip_val", "null"],
        ["--trainer.gradient_clip_val", "1e-7", "--trainer.gradient_clip_algorithm", "value"],
    ],
    ids=["off", "by value"],
)
def test_gradient_clipping_follows_the_trainers_settings(fit: Fit, flags: list[str]) -> None:
    assert fit("--name", "norm", "--trainer.gradient_clip_val", 0.01).status == 0
    assert fit("--name", "other", *flags).status == 0
    norm, other = (points(Path(f"logs/{name}/version_0")) for name in ("norm", "other"))
    assert norm["optim/grad_norm"][0] == pytest.approx(other["optim/grad_norm"][0])  # of before the clipping
    ours, theirs = (weights(Path(f"logs/{name}/version_0/last.ckpt")) for name in ("norm", "other"))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.filterwarnings("ignore:.*barebones.*")
def test_clipping_by_value_bounds_every_gradient() -> None:
    module = LitGPT(GPTConfig(vocab_size=9, context_length=4, d_model=8, num_heads=2, num_blocks=1))
    module.trainer = Trainer(accelerator="cpu", barebones=True)
    tokens = torch.arange(8).view(2, 4)
    module.gpt.loss(tokens, tokens).backward()
    module.configure_gradient_clipping(torch.optim.SGD(module.parameters()), 1e-3, "value")
    assert max(p.grad.abs().max().item() for p in module.parameters() if p.grad is not None) == pytest.approx(1e-3)


def test_bf16_true_adds_up_losses_in_higher_precision(fit: Fit) -> None:
    assert fit("--name", "exact").status == 0
    assert fit("--name", "half", "--trainer.precision", "bf16-true").status == 0
    exact, half = (points(Path(f"logs/{name}/version_0"))["loss/val"] for name in ("exact", "half"))
    torch.testing.assert_close(half, exact, rtol=5e-3, atol=5e-3)


@pytest.mark.filterwarnings("default")  # of the compiler
def test_compiled_blocks_train_as_one_graph_after_text_was_generated(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], options: dict[str, bool]) -> Callable:
        def run(*arguments: torch.Tensor) -> tuple[torch.Tensor]:
            (out,) = graph(*arguments)
            if torch.is_grad_enabled():
                trained.append(out.ndim)
            return (out,)

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    deep = ["--model.config.num_blocks", 12, "--generate.max_new_tokens", 20]
    assert fit(*deep, "--name", "compiled", "--model.compile", "true").status == 0
    torch._dynamo.reset()
    assert trained == [0] * 6  # one graph a step, from embeddings to loss
    assert fit(*deep, "--name", "plain").status == 0
    compiled, plain = (points(Path(f"logs/{name}/version_0"))["loss/train"] for name in ("compiled", "plain"))
    torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_cpu_uses_the_cpp_wrapper_unless_activations_are_recomputed(
    monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    cpp_wrapper = []
    monkeypatch.setattr(torch, "compile", lambda function, options: cpp_wrapper.append(options["cpp_wrapper"]))
    gpt = LitGPT(GPTConfig(vocab_size=5, d_model=8, num_heads=2), activation_checkpointing=recompute).gpt
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), world_size=1)
    compile_blocks(gpt, trainer)
    assert cpp_wrapper == [not recompute] * 2


@pytest.mark.filterwarnings("default")  # of the compiler
def test_blocks_are_compiled_one_by_one_on_several_devices() -> None:
    gpt = GPT(GPTConfig(vocab_size=5, d_model=8, num_heads=2, num_blocks=2))
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), world_size=2)
    compile_blocks(gpt, trainer)
    assert None not in [block._compiled_call_impl for block in gpt.blocks]
    assert gpt.blocks._compiled_call_impl is None


def test_configure_model_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("lit_gpt.training.module.compile_blocks", lambda gpt, trainer: calls.append(gpt))
    module = LitGPT(GPTConfig(vocab_size=5, d_model=8, num_heads=2), compile=True)
    module.trainer = SimpleNamespace(precision="32-true")  # type: ignore[assignment]
    module.configure_model()
    module.configure_model()  # the Trainer calls it once for every fit, validate and test
    assert calls == [module.gpt]


def test_gradients_are_freed_after_the_optimizer_step(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, original = [], LitGPT.on_train_batch_start

    def count_gradients(module: LitGPT, batch: Batch, batch_idx: int) -> None:
        gradients.append(sum(p.grad is not None for p in module.gpt.parameters()))
        original(module, batch, batch_idx)

    monkeypatch.setattr(LitGPT, "on_train_batch_start", count_gradients)
    assert fit("--data.global_batch_size", 8, "--trainer.max_steps", 2).status == 0
    assert [count > 0 for count in gradients] == [False, True, False, True]  # of two batches to a step


def test_embeddings_and_head_have_their_own_learning_rates(fit: Fit) -> None:
    free = ["--model.config.tie_embeddings", "false", "--model.optimizer", "muon"]
    assert fit(*free, "--model.embedding_rate", 5, "--model.head_rate", 2).status == 0
    groups = Checkpoint.open(RUN / "last.ckpt").read()["optimizer_states"][0]["param_groups"]
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["embeddings"] == pytest.approx(5 * rates["blocks"])
    assert rates["head"] == pytest.approx(2 * rates["blocks"])
    assert rates["scales"] == rates["blocks"]


def test_weights_that_do_not_fit_into_memory_are_a_user_error(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: GPT, device: torch.device) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(GPT, "to_empty", fail)
    result = fit()
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "the model does not fit into memory (DefaultCPUAllocator: can't allocate memory): give a" in result.err
    assert not Path("logs").exists()


@pytest.mark.parametrize(
    ("native", "pays", "precision"), [(True, 0, "bf16-mixed"), (True, 1e9, "32-true"), (False, 0, "32-true")]
)
def test_default_precision_depends_on_the_processor_and_the_size_of_the_model(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, native: bool, pays: float, precision: str
) -> None:
    monkeypatch.setattr("lit_gpt.planning.speed.supports_bfloat16", lambda device: native)
    monkeypatch.setattr("lit_gpt.planning.speed.BF16_MIN_FLOPS", pays)
    result = fit("--trainer.precision", "null")
    assert f"device      1 x cpu, {precision}\n" in result.out
    assert f"precision: {precision}" in (RUN / "config.yaml").read_text()


def test_bf16_mixed_trains_close_to_float32(fit: Fit) -> None:
    assert fit("--name", "exact").status == 0
    assert fit("--name", "bf16", "--trainer.precision", "bf16-mixed").status == 0
    exact, half = (points(Path(f"logs/{name}/version_0"))["loss/train"] for name in ("exact", "bf16"))
    assert exact != half
    torch.testing.assert_close(half, exact, rtol=1e-2, atol=1e-2)


def test_document_mask_separates_the_documents_of_a_window(fit: Fit) -> None:
    assert fit("--data.document_mask", "true", "--trainer.max_steps", 1, "--trainer.val_check_interval", 1).status == 0
    (step, logged), *_ = points(RUN)["loss/train"]
    assert step == 1
    corpus = open_corpus([Source("rows.txt")], CorpusConfig(ReadOptions(), tokenizer="byte"), Path("data/cache"))
    ids = torch.from_numpy(np.asarray(corpus.split("train"), dtype=np.int64))
    assert fit("--name", "start", "--trainer.max_steps", 1, "--model.learning_rate", 1e-30).status == 0
    model, tokenizer, _ = load_model("logs/start/version_0/last.ckpt")
    nats = 0.0
    for start in random_starts(1337, 0, 4, len(ids), TRAINED):
        x, y = ids[start : start + TRAINED], ids[start + 1 : start + TRAINED + 1]
        starts_of_documents = [0, *(i for i in range(1, TRAINED) if x[i] == tokenizer.end_of_text), TRAINED]
        for first, end in itertools.pairwise(starts_of_documents):  # each document a row of its own
            nats += F.cross_entropy(model(x[None, first:end])[0][0], y[first:end], reduction="sum").item()
    assert logged == pytest.approx(nats / (4 * TRAINED), abs=1e-5)
