"""On a GPU, results match those of a CPU, and no training step waits for the device between logging steps."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Fit, points, weights
from lightning.pytorch import Callback, Trainer
from test_model import SHAPES, gpt, random_tokens
from torch.nn import functional as F

from lit_gpt.inference.generate import generate
from lit_gpt.inference.utf8 import utf8_constraint
from lit_gpt.ops.cross_entropy import IGNORE_INDEX, LinearCrossEntropy, linear_cross_entropy
from lit_gpt.ops.float8 import FLOAT8_CAPABILITY
from lit_gpt.tokenizer import ByteTokenizer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of torch.compile
]

RUN = Path("logs/small/version_0")
ON_GPU = ["--trainer.accelerator", "gpu", "--trainer.devices", 1]
MIXED = ["--trainer.precision", "bf16-mixed"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_and_gradients_match_cpu(shape: dict[str, Any], compiled: bool) -> None:
    plain = gpt(**{**shape, "context_length": 128, "d_model": 64}).train()
    tokens, targets = random_tokens(8, 128), random_tokens(8, 128).roll(1)
    targets[0, 100:] = IGNORE_INDEX
    exact = plain(tokens, targets)[1]
    assert exact is not None
    wanted = torch.autograd.grad(exact, list(plain.parameters()))
    model = copy.deepcopy(plain).cuda()
    model.tie_and_init_buffers()
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True)
    for kind, within in ((torch.float32, 1e-4), (torch.bfloat16, 0.1 if "sinusoidal" in shape.values() else 0.03)):
        with torch.autocast("cuda", kind, enabled=kind != torch.float32):
            loss = model.loss(tokens.cuda(), targets.cuda())
        torch.testing.assert_close(loss.cpu(), exact, rtol=within / 10, atol=0)
        for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), wanted):
            assert ours.dtype == torch.float32
            assert (ours.cpu() - theirs).norm() < 2 * within * theirs.norm() + 1e-5


@pytest.mark.parametrize("chunk", [1, 2**12, 2**30])
def test_chunked_cross_entropy_matches_unchunked(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(LinearCrossEntropy, "CHUNK_BYTES", {"cpu": 1, "cuda": chunk})
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64).cuda().bfloat16(), torch.randn(101, 64).cuda()
    targets = torch.randint(101, (300,)).cuda()
    free = [part.float().requires_grad_() for part in (hidden, weight.bfloat16())]
    expected = F.cross_entropy(free[0] @ free[1].T, targets)
    wanted = torch.autograd.grad(expected, free)
    given = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = LinearCrossEntropy.apply(*given, targets, torch.tensor(1 / 300).cuda())
    torch.testing.assert_close(loss, expected, rtol=3e-3, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, given), wanted):
        assert (ours.float() - theirs).norm() < 0.01 * theirs.norm()


def test_float8_head_is_nearly_exact() -> None:
    if torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        pytest.skip("this GPU does not multiply float8")
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64).cuda().bfloat16().requires_grad_(), (0.2 * torch.randn(1000, 64)).cuda()
    weight, targets = weight.requires_grad_(), torch.randint(1000, (300,)).cuda()
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].T, targets)
    loss = linear_cross_entropy(hidden, weight, targets, float8=True)
    torch.testing.assert_close(loss.double(), expected, rtol=5e-3, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, exact)):
        assert (ours.double() - theirs).norm() < 0.06 * theirs.norm()


@pytest.mark.parametrize("chunk", [2**12, 2**30])
def test_evaluation_matches_cpu(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(LinearCrossEntropy, "CHUNK_BYTES", {"cpu": 2**25, "cuda": chunk})
    model, tokens = gpt(context_length=64), random_tokens(8, 64)
    targets = tokens.roll(-1, dims=1)
    targets[0, 30:] = IGNORE_INDEX
    nats, correct = model.evaluate(tokens, targets)
    model.cuda().tie_and_init_buffers()
    nats_on_gpu, correct_on_gpu = model.evaluate(tokens.cuda(), targets.cuda())
    torch.testing.assert_close(nats_on_gpu.cpu(), nats, rtol=1e-4, atol=0)
    assert int(correct_on_gpu) == int(correct)


def test_document_mask_separates_documents() -> None:
    model, tokens = gpt(context_length=64).cuda(), random_tokens(2, 64).cuda()
    model.tie_and_init_buffers()
    documents = (torch.arange(64).cuda() >= 30).long().expand(2, 64)
    together = model(tokens, documents=documents)[0][:, 30:]
    torch.testing.assert_close(together, model(tokens[:, 30:])[0], rtol=1e-4, atol=1e-5)


def test_generated_tokens_match_cpu() -> None:
    model, prompts = gpt(context_length=48), [[1, 2, 3], [4], [5] * 20]
    expected = generate(model, prompts, max_new_tokens=20, temperature=0)
    model.cuda().tie_and_init_buffers()
    assert generate(model, prompts, max_new_tokens=20, temperature=0) == expected


def test_generated_text_is_valid_utf8() -> None:
    model, tokenizer = gpt(vocab_size=257, context_length=48).cuda(), ByteTokenizer()
    model.tie_and_init_buffers()
    constraint = utf8_constraint(model, tokenizer)
    for row in generate(model, [[256], [256, 97]] * 20, max_new_tokens=60, constraint=constraint):
        b"".join(map(tokenizer.token_bytes, row)).decode()


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_no_synchronization_and_no_memory_growth_between_logging_steps(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, compiled: str
) -> None:
    class SyncWatcher(Callback):
        """Makes every synchronization raise between logging steps, and records the allocated memory."""

        allocated: list[int] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step % 20 > 2:
                self.allocated.append(torch.cuda.memory_allocated())
            # Until the next logging step, code that waits for a number from the device raises an error.
            torch.cuda.set_sync_debug_mode("error" if trainer.global_step % 20 in range(2, 19) else "default")

    original_fit = Trainer.fit

    @functools.wraps(original_fit)  # the command line reads its signature
    def fit_with_watcher(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        trainer.callbacks.append(SyncWatcher())  # type: ignore[attr-defined]
        original_fit(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "fit", fit_with_watcher)
    steps = ["--trainer.max_steps", 60, "--trainer.log_every_n_steps", 20, "--trainer.val_check_interval", 60]
    more = ["--data.global_batch_size", 8, "--model.config.dropout", "0.1", "--trainer.gradient_clip_val", 1]
    try:
        ended = fit(*ON_GPU, *MIXED, *steps, *more, "--model.compile", compiled)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ended.status == 0, ended.err
    assert len(set(SyncWatcher.allocated[10:])) <= 2, SyncWatcher.allocated
    SyncWatcher.allocated.clear()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gpu_run_matches_cpu_run_and_resumes(fit: Fit, optimizer: str) -> None:
    flags = ["--model.optimizer", optimizer, "--model.schedule", "constant", "--trainer.precision", "32-true"]
    assert fit(*flags, "--name", "cpu").status == 0
    assert fit(*flags, "--name", "gpu", *ON_GPU, "--trainer.max_steps", 3).status == 0
    ended = fit(*flags, "--name", "gpu", *ON_GPU, "--ckpt_path", "last")
    assert ended.status == 0, ended.err
    curves = [points(Path(f"logs/{name}/version_0")) for name in ("cpu", "gpu")]
    for tag in ("loss/train", "loss/val"):
        one, other = (torch.tensor([value for _, value in curve[tag]]) for curve in curves)
        torch.testing.assert_close(one, other, rtol=2e-3 if optimizer == "muon" else 1e-4, atol=0)


def test_gpu_checkpoint_opens_on_cpu(fit: Fit) -> None:
    assert fit(*ON_GPU).status == 0
    assert {value.device.type for value in weights(RUN / "last.ckpt").values()} == {"cpu"}
    scored = fit("validate", "--ckpt_path", RUN / "best.ckpt")
    assert scored.status == 0, scored.err
