"""Train ten small configurations at two commits and compare the results bit for bit.

    python tests/compare_commits.py main~20             # against the working tree
    python tests/compare_commits.py main~20 main        # against another commit
    python tests/compare_commits.py main~20 --only float32 resumed

A refactoring must not change what a run computes. Each configuration trains 12 steps with `scripts/fit.py`. Compared
are the SHA-256 of the weights, of the optimizer state, and of every logged point and text, except speed and memory.
Different processors give different bits, so the digests of a commit are kept on this machine only, in its folder for
temporary files.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.util import tensor_util

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ("speed/", "memory/")  # tags whose values differ between any two runs

# Every setting that matters is given, so that a change of a default is no difference.
SHARED = """
seed_everything: 7
data: {{files: rows.txt, tokenizer: {tokenizer}, mode: rows, batch_size: 6, eval_windows: 16, sampling: random}}
model:
  config: {{context_length: 32, d_model: 32, num_blocks: 2, num_heads: 4, dropout: 0.0, position: rope, norm: rmsnorm,
    mlp: swiglu, qk_norm: true, tie_embeddings: true, bias: false, previous_tokens: 0}}
  optimizer: adamw
  learning_rate: 0.003
  schedule: constant
  warmup_steps: 3
  weight_decay: 0.1
  betas: [0.9, 0.95]
trainer: {{max_steps: 12, val_check_interval: 6, log_every_n_steps: 1, accelerator: cpu, precision: {precision},
  gradient_clip_val: 1.0}}
checkpoint: {{every_n_steps: 5, keep: 2}}
generate: {{prompts: [row], num_samples: 2, max_new_tokens: 12, temperature: 0.8}}
"""

LEARNED = "--model.config.position=learned --model.config.norm=layernorm --model.config.mlp=gelu"
FREE = "--model.config.mlp=relu2 --model.config.tie_embeddings=false --model.config.previous_tokens=2"
TWO_RANKS = "--trainer.devices=2 --data.global_batch_size=24"

# name: (tokenizer, precision, flags of one command after another)
CONFIGURATIONS: dict[str, tuple[str, str, list[str]]] = {
    "float32": ("byte", "32-true", [f"{LEARNED} --model.config.qk_norm=false --model.schedule=cosine"]),
    "bfloat16": ("byte", "bf16-mixed", ["--model.config.num_kv_heads=2 --model.config.bias=true"]),
    "dropout": ("char", "bf16-mixed", ["--model.config.dropout=0.1 --model.activation_checkpointing=true"]),
    "documents": ("byte", "32-true", ["--data.document_mask=true --data.global_batch_size=12"]),
    "muon": ("byte", "bf16-mixed", [f"--model.optimizer=muon --data.sampling=shuffled {FREE}"]),
    "compiled": ("byte", "bf16-mixed", ["--model.compile=true --model.config.dropout=0.1"]),
    "vocabulary": ("cl100k_base", "bf16-mixed", ["--data.vocab=full --model.config.norm=layernorm"]),
    "two_ranks": ("byte", "32-true", [f"{TWO_RANKS} --trainer.strategy=ddp --model.config.dropout=0.1"]),
    "fsdp": ("byte", "32-true", [f"{TWO_RANKS} --config={{root}}/configs/fsdp.yaml --model.optimizer=muon"]),
    "resumed": (
        "byte",
        "32-true",
        ["--model.config.dropout=0.1 --trainer.max_steps=7", "--model.config.dropout=0.1 --ckpt_path=last"],
    ),
}


def write_rows(path: Path) -> None:
    """Write 400 short documents, in English, Chinese and digits."""
    rows = [f"row {i} 第{i * i}行: " + "abcdefghij"[i % 10] * (i % 7) + " end" * (i % 3) for i in range(400)]
    path.write_text("\n".join(rows), encoding="utf-8")


def run_configuration(name: str, root: Path) -> dict[str, str]:
    """Train one configuration with the code in `root`; return its digests by part.

    Raises:
        SystemExit: a command failed; its output is printed.
    """
    tokenizer, precision, commands = CONFIGURATIONS[name]
    # PYTHONPATH comes before an editable installation
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(script: str, *words: str) -> None:
        command = [sys.executable, str(root / "scripts" / script), *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{name} at {root} ended with {done.returncode}:\n{done.stdout}{done.stderr}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "rows.txt")
        config = SHARED.format(tokenizer=tokenizer, precision=precision)
        (folder / "shared.yaml").write_text(config, encoding="utf-8")
        for flags in commands:
            run("fit.py", "--config=shared.yaml", "--name=run", *flags.format(root=root).split())
        last = folder / "logs" / "run" / "version_0" / "last.ckpt"
        if last.is_dir():  # a sharded checkpoint
            run("consolidate.py", str(last), "whole.ckpt")
            checkpoint = folder / "whole.ckpt"
        else:
            checkpoint = last
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        return {
            "weights": digest(content["state_dict"]),
            "optimizer": digest([state["state"] for state in content["optimizer_states"]]),
            "points": digest(sorted(read_points(last.parent))),
        }


def read_points(folder: Path) -> Iterator[tuple[str, int, str]]:
    """Yield (tag, step, value) of every scalar and text in a run's event files."""
    for path in folder.glob("events.*"):
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            for value in event.summary.value:
                if value.tag.startswith(MEASURED) or value.tag.startswith(("_hparams_", "custom_scalars__")):
                    continue
                content = tensor_util.make_ndarray(value.tensor).tolist() if value.HasField("tensor") else None
                yield value.tag, event.step, repr(value.simple_value if content is None else content)


def digest(value: Any) -> str:
    """Return the SHA-256 of nested values, tensors by dtype, shape and bytes, dictionaries by sorted key."""
    hashed = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            hashed.update(f"{part.dtype}{tuple(part.shape)}".encode())
            hashed.update(part.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key in sorted(part, key=str):
                hashed.update(f"{key}:".encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            hashed.update(f"[{len(part)}]".encode())
            for item in part:
                add(item)
        else:
            hashed.update(repr(part).encode())

    add(value)
    return hashed.hexdigest()[:16]


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout.strip()


def digests_of_commit(commit: str, names: list[str]) -> dict[str, dict[str, str]]:
    """Return the digests at a commit, from an earlier call on this machine where there was one."""
    version = hashlib.sha256(f"{Path(__file__).read_text()}{torch.__version__}{platform.node()}".encode()).hexdigest()
    stored = Path(tempfile.gettempdir(), f"lit_gpt_{git('rev-parse', commit)}_{version[:16]}.json")
    found: dict[str, dict[str, str]] = json.loads(stored.read_text()) if stored.exists() else {}
    missing = [name for name in names if name not in found]
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            git("worktree", "add", "--detach", "--force", folder, commit)
            try:
                found |= {name: run_configuration(name, Path(folder)) for name in missing}
            finally:
                git("worktree", "remove", "--force", folder)
        stored.write_text(json.dumps(found))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a commit")
    parser.add_argument("after", nargs="?", help="a commit; the working tree if left out")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    options = parser.parse_args()
    before = digests_of_commit(options.before, options.only)
    unequal = 0
    for name in options.only:
        after = digests_of_commit(options.after, [name])[name] if options.after else run_configuration(name, ROOT)
        differing = [part for part in after if after[part] != before[name][part]]
        print(f"{name:12} {'differs: ' + ', '.join(differing) if differing else 'equal'}", flush=True)
        unequal += bool(differing)
    return int(unequal > 0)


if __name__ == "__main__":
    sys.exit(main())
