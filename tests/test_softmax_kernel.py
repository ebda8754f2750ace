"""The Triton kernel of the head's loss, in Triton's interpreter on the CPU. tests/test_gpu.py runs it on a GPU."""

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs")

PROGRAM = """
import torch
from torch.nn import functional as F
from lit_gpt.ops.softmax_kernel import loss_and_grad_

torch.manual_seed(0)
for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):
    for vocab_size, width, scale in ((50, 64, 1), (5000, 5056, 1), (9000, 9024, 10), (300, 320, 60)):
        logits = (scale * torch.randn(7, width)).to(dtype)
        targets = torch.randint(vocab_size, (7,))
        logits[1, targets[1]] = logits[1, :vocab_size].max() + 8  # a target that is nearly certain
        logits[2, targets[2]] -= 100 * scale  # and one that is nearly impossible
        exact = logits[:, :vocab_size].double().requires_grad_()
        losses = F.cross_entropy(exact, targets, reduction="none")
        losses.sum().backward()
        result = loss_and_grad_(logits, targets, vocab_size)
        torch.testing.assert_close(result.double(), losses, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(logits[:, :vocab_size].double(), exact.grad, rtol=rtol, atol=1e-7)
        assert not logits[:, vocab_size:].any()
"""


def test_kernel_gives_losses_and_gradients_of_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
