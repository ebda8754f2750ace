"""Run the experiments of course.md again, and fail where an outcome no longer holds.

    python docs/experiments.py                        # all ten
    python docs/experiments.py learning_rate heads    # some
    python docs/experiments.py --texts                # only write the texts that the experiments train on

Each experiment is a list of commands, as a person would type them. They run in a temporary folder, or in `--folder`,
where `tensorboard --logdir FOLDER/logs` then shows them. `experiments.json` holds what course.md claims (a number and a
tolerance for each outcome) and what was measured; `--update` writes the measured values and draws the pictures anew.
"""

import argparse
import json
import math
import os
import platform
import random
import re
import shlex
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_gpt import GPTConfig, LitGPT, TextDataModule
from lit_gpt.data.sample import generate_rows, name_pattern
from lit_gpt.runs.summary import read_summary

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = ROOT / "docs" / "experiments.json"
FIT = "python scripts/fit.py --config configs/course.yaml --config docs/experiments.yaml --name"
DEFAULT_SEED = 1337

Points = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class Experiment:
    """A question and how it is answered.

    Attributes:
        question: What the experiment asks.
        commands: What is run, one after another; a training run that the folder has already is not repeated.
        measure: folder of the runs -> the outcomes, by the names they have in experiments.json.
        draw: (axes, folder) draws the picture.
        train: Called with the folder and the seed after the commands, for a run that no command does.
    """

    question: str
    commands: list[str]
    measure: Callable[[Path], dict[str, float]]
    draw: Callable[[Any, Path], None]
    train: Callable[[Path, int], None] | None = None


# ----------------------------------------------------------------------------------------------------------- texts


def write_texts(folder: Path) -> None:
    """Write the texts of some experiments: parts of the built-in table, and lines that end with their first letter."""
    names = [name for _, name, _, _ in generate_rows()]
    chinese = [name for name in names if re.search(r"[\u4e00-\u9fff]", name)]
    keys = random.Random(0).choices(string.ascii_uppercase, k=5000)
    lines = {"chinese": chinese, "few": names[:200], "keys": [f"{key}{string.ascii_lowercase}{key}" for key in keys]}
    for name, texts in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- outcomes


def curve(folder: Path, name: str, tag: str = "loss/val") -> Points:
    """Return the points of a curve of a run, without the untrained model, whose loss would hide all differences."""
    (run,) = (folder / "logs" / name).glob("version_*")
    events = EventAccumulator(str(run))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(tag) if point.step > 0]


def last(folder: Path, name: str, tag: str = "loss/val") -> float:
    """Return the last value of a curve."""
    return curve(folder, name, tag)[-1][1]


def texts(folder: Path, name: str) -> list[str]:
    """Return the texts that generate.py has written to a file."""
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def well_formed(names: list[str]) -> float:
    """Return the part of the names that are well formed."""
    return sum(map(bool, map(name_pattern().fullmatch, names))) / len(names)


def last_losses(**runs: str) -> Callable[[Path], dict[str, float]]:
    """Return a measurement: the last validation loss of each run."""
    return lambda folder: {f"loss_{key}": last(folder, name) for key, name in runs.items()}


def compare_tokenizers(folder: Path) -> dict[str, float]:
    outcomes = {}
    for name in ("char", "cl100k"):
        loss, bits = last(folder, name), last(folder, name, "val/bits_per_byte")
        outcomes[f"loss_{name}"] = loss
        outcomes[f"bytes_per_token_{name}"] = loss / math.log(2) / bits
        outcomes[f"bits_per_byte_{name}"] = bits
    return outcomes


def measure_overfitting(folder: Path) -> dict[str, float]:
    outcomes = {}
    for name in ("dropout_0", "dropout_0.3"):
        outcomes[f"train_{name}"] = last(folder, name, "loss/train_eval")
        outcomes[f"lowest_{name}"] = min(loss for _, loss in curve(folder, name))
        outcomes[f"last_{name}"] = last(folder, name)
    return outcomes


# --------------------------------------------------------------------------------------------- without zero_grad


class WithoutZeroGrad(LitGPT):
    """LitGPT frees the gradients in `on_train_batch_end`. This one keeps them, and each backward pass adds to them."""

    def on_train_batch_end(self, *args: Any) -> None:
        self.updating = False


def train_without_zero_grad(folder: Path, seed: int) -> None:
    """Train without zero_grad through the Python API, unless that run is there; all else is as in the run `base`."""
    name = "without_zero_grad"
    if (folder / "logs" / name).exists():
        return
    seed_everything(seed)
    data = TextDataModule(mode="raw", context_length=16, batch_size=32, eval_windows=128, seed=seed)
    shape = {"d_model": 64, "num_blocks": 4, "num_heads": 4, "bias": True, "mlp": "relu", "norm": "layernorm"}
    more = {"position": "sinusoidal", "qk_norm": False, "tie_embeddings": False}
    config = GPTConfig(data.model_vocab_size, context_length=16, **shape, **more)  # type: ignore[arg-type]
    adamw = {"learning_rate": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.01, "decay_norms_and_biases": True}
    model = WithoutZeroGrad(config, schedule="constant", warmup_steps=0, **adamw)  # type: ignore[arg-type]
    Trainer(
        accelerator="cpu",
        max_steps=400,
        val_check_interval=100,
        num_sanity_val_steps=0,
        logger=TensorBoardLogger(folder / "logs", name),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, datamodule=data)


# ------------------------------------------------------------------------------------------------------- pictures


def draw_curves(axes: Any, curves: dict[str, Points], ylabel: str = "validation loss") -> None:
    """Draw one line for each run."""
    for label, points in curves.items():
        axes.plot(*zip(*points), marker=".", label=label)
    axes.set(xlabel="step", ylabel=ylabel)
    axes.legend()


def val_curves(**runs: str) -> Callable[[Any, Path], None]:
    """Return what draws the validation loss of each run; `_` in a label stands for a space."""
    return lambda axes, folder: draw_curves(
        axes, {label.replace("_", " "): curve(folder, name) for label, name in runs.items()}
    )


def draw_different(axes: Any, folder: Path) -> None:
    for name in ("argmax", "multinomial"):
        names = texts(folder, name)
        axes.plot(range(1, 101), [len(set(names[:n])) for n in range(1, 101)], label=name)
    axes.set(xlabel="texts drawn", ylabel="different texts")
    axes.legend()


def draw_well_formed(axes: Any, folder: Path) -> None:
    labels = ("0.5", "1.0", "1.5")
    bars = axes.bar(labels, [100 * well_formed(texts(folder, f"t{label}")) for label in labels], width=0.5)
    axes.bar_label(bars, fmt="%.0f%%")
    axes.set(xlabel="temperature", ylabel="well-formed names, %")


def draw_overfitting(axes: Any, folder: Path) -> None:
    for name, color in (("dropout_0", "C0"), ("dropout_0.3", "C1")):
        label = name.replace("_", " ")
        axes.plot(*zip(*curve(folder, name)), color=color, label=f"{label}, validation")
        axes.plot(*zip(*curve(folder, name, "loss/train_eval")), color=color, linestyle=":", label=f"{label}, training")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()


# ---------------------------------------------------------------------------------------------------- experiments

LONGER = "--trainer.max_steps 800"
BASE = f"{FIT} base"  # several experiments compare with this run
NAMES = f"{FIT} names --data.mode rows --data.columns name --trainer.max_steps 1200"
SAMPLE = "python scripts/generate.py --name names --num_samples 100 --max_new_tokens 40"
CHARACTERS = "--data.tokenizer char --model.config.num_blocks 1"
ROTARY = f"{CHARACTERS} --model.config.position rope"
KEYS = f"{ROTARY} --data.files keys.txt --data.mode rows --data.document_mask true {LONGER}"
CHINESE = "--data.files chinese.txt --data.mode rows"
FEW = f"--data.files few.txt --data.mode rows {LONGER}"
KINDS = ("none", "sinusoidal", "learned")  # of positions

EXPERIMENTS: dict[str, Experiment] = {
    "argmax": Experiment(
        "Why is the next token drawn, and not simply the likeliest one taken?",
        [
            NAMES,
            f"{SAMPLE} --temperature 0 --jsonl argmax.jsonl",
            f"{SAMPLE} --temperature 1 --jsonl multinomial.jsonl",
        ],
        lambda folder: {name: len(set(texts(folder, name))) for name in ("argmax", "multinomial")},
        draw_different,
    ),
    "temperature": Experiment(
        "What does the temperature change?",
        [NAMES, *(f"{SAMPLE} --temperature {t} --jsonl t{t}.jsonl" for t in ("0.5", "1.0", "1.5"))],
        lambda folder: {f"well_formed_{t}": well_formed(texts(folder, f"t{t}")) for t in ("0.5", "1.0", "1.5")},
        draw_well_formed,
    ),
    "learning_rate": Experiment(
        "How large should the learning rate be?",
        [f"{FIT} lr_1e-4 --model.learning_rate 1e-4", BASE, f"{FIT} lr_1e-1 --model.learning_rate 1e-1"],
        last_losses(small="lr_1e-4", medium="base", large="lr_1e-1"),
        val_curves(**{"1e-4": "lr_1e-4", "1e-3": "base", "1e-1": "lr_1e-1"}),
    ),
    "context": Experiment(
        "Does a longer context help?",
        [
            "python docs/experiments.py --texts",
            f"{FIT} context_16 {KEYS}",
            f"{FIT} context_64 {KEYS} --model.config.context_length 64 --data.batch_size 8",
        ],
        last_losses(context_16="context_16", context_64="context_64"),
        val_curves(context_16="context_16", context_64="context_64"),
    ),
    "heads": Experiment(
        "What are several heads good for?",
        [f"{FIT} heads_{n} {ROTARY} {LONGER} --model.config.num_heads {n}" for n in (1, 4)],
        last_losses(heads_1="heads_1", heads_4="heads_4"),
        val_curves(**{"1_head": "heads_1", "4_heads": "heads_4"}),
    ),
    "positions": Experiment(
        "Does a transformer need positions?",
        [f"{FIT} position_{kind} {CHARACTERS} {LONGER} --model.config.position {kind}" for kind in KINDS],
        last_losses(**{kind: f"position_{kind}" for kind in KINDS}),
        val_curves(**{kind: f"position_{kind}" for kind in KINDS}),
    ),
    "norm": Experiment(
        "What is the normalisation good for?",
        [BASE, f"{FIT} norm_none --model.config.norm none"],
        last_losses(layernorm="base", none="norm_none"),
        val_curves(LayerNorm="base", no_normalisation="norm_none"),
    ),
    "tokenizer": Experiment(
        "Characters or cl100k_base: which suits Chinese?",
        [
            "python docs/experiments.py --texts",
            f"{FIT} char {CHINESE} --data.tokenizer char",
            f"{FIT} cl100k {CHINESE} --data.tokenizer cl100k_base",
        ],
        compare_tokenizers,
        lambda axes, folder: draw_curves(
            axes, {name: curve(folder, name, "val/bits_per_byte") for name in ("char", "cl100k")}, "bits per byte"
        ),
    ),
    "overfitting": Experiment(
        "What happens to a model that sees little text again and again, and does dropout help?",
        [
            "python docs/experiments.py --texts",
            *(f"{FIT} dropout_{p} {FEW} --model.config.dropout {p}" for p in ("0", "0.3")),
        ],
        measure_overfitting,
        draw_overfitting,
    ),
    "zero_grad": Experiment(
        "What happens without zero_grad?",
        [BASE],
        last_losses(**{"with": "base", "without": "without_zero_grad"}),
        val_curves(with_zero_grad="base", without_zero_grad="without_zero_grad"),
        train_without_zero_grad,
    ),
}


# ----------------------------------------------------------------------------------------------------------- runs


def local_words(command: str) -> list[str]:
    """Return a command as words, in which Python and the files of the project have their full paths."""
    words = [
        str(ROOT / word) if word.startswith(("scripts/", "configs/", "docs/")) else word
        for word in shlex.split(command)
    ]
    return [sys.executable, *words[1:]]


def is_finished(run: Path) -> bool:
    """Return whether the folder of a run's name has a run that trained to its end."""
    return any(read_summary(path.parent).status == "finished" for path in run.glob("version_*/summary.json"))


def run_command(command: str, folder: Path, seed: int) -> None:
    """Run a command in a folder, unless it is a training run that is there already; exit if it fails."""
    words = local_words(command)
    if "--name" in words and "fit.py" in command:
        run = folder / "logs" / words[words.index("--name") + 1]
        if is_finished(run):
            return
        if run.exists():
            sys.exit(f"{run} was not trained to its end: delete it, or give another --folder")
        words += ["--seed_everything", str(seed)]
    ran = subprocess.run(words, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONUTF8": "1"})
    if ran.returncode:
        sys.exit(f"{command}\nended with status {ran.returncode}:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")


def run_experiment(name: str, folder: Path, seed: int, claims: dict[str, Any]) -> bool:
    """Run an experiment, print and note its outcomes, and return whether all of them are as claimed."""
    experiment, start = EXPERIMENTS[name], time.monotonic()
    print(f"{name}: {experiment.question}", flush=True)
    for command in experiment.commands:
        run_command(command, folder, seed)
    if experiment.train is not None:
        experiment.train(folder, seed)
    measured = experiment.measure(folder)
    minutes = (time.monotonic() - start) / 60
    holds = True
    for outcome, claim in claims["outcomes"].items():
        is_as_claimed = abs(measured[outcome] - claim["claimed"]) <= claim["within"]
        holds = holds and is_as_claimed
        verdict = "" if is_as_claimed else "   <- no longer holds"
        claimed = f"claimed {claim['claimed']:g} within {claim['within']:g}{verdict}"
        print(f"  {outcome:26} {measured[outcome]:8.3f}   {claimed}", flush=True)
        claim["measured"] = round(measured[outcome], 4)
    print(f"  {minutes:.1f} minutes", flush=True)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, torch {torch.__version__}"
    claims |= {"minutes": round(minutes, 1), "date": date.today().isoformat(), "machine": machine}
    return holds


def read_claims() -> dict[str, Any]:
    """Return the contents of experiments.json: experiment -> outcomes and what the last run was."""
    return json.loads(CLAIMS.read_text(encoding="utf-8"))


def draw_picture(name: str, folder: Path) -> None:
    """Draw docs/images/experiment_NAME.svg, with equal bytes for equal outcomes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lit_gpt", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(4.8, 2.7), layout="constrained")
        EXPERIMENTS[name].draw(axes, folder)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(ROOT / "docs" / "images" / f"experiment_{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def main() -> int:
    """Run what the command line asks for; return 1 if an outcome does not hold."""
    parser = argparse.ArgumentParser(description="Run the experiments of docs/course.md again.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}; default: all")
    parser.add_argument("--folder", type=Path, help="where to run; default: a temporary folder")
    parser.add_argument("--texts", action="store_true", help="write the texts of the experiments here, and run nothing")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="another seed")
    parser.add_argument("--update", action="store_true", help="write experiments.json, draw the pictures (matplotlib)")
    options = parser.parse_args()
    if options.update and options.seed != DEFAULT_SEED:
        parser.error("--update takes the seed of docs/course.md: leave out --seed")
    if options.texts:
        write_texts(Path.cwd())
        return 0
    if unknown := set(options.names) - EXPERIMENTS.keys():
        parser.error(f"there is no experiment {unknown.pop()}: give one of {', '.join(EXPERIMENTS)}")
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)  # data/ and logs/ are written to the working folder
        for name in options.names or EXPERIMENTS:
            noted = read_claims()[name]
            if not run_experiment(name, folder, options.seed, noted):
                failed.append(name)
            if options.update:
                claims = read_claims() | {name: noted}  # read again: other experiments may have ended meanwhile
                CLAIMS.write_text(json.dumps(claims, indent=1) + "\n", encoding="utf-8")
                draw_picture(name, folder)
    if failed:
        print(f"no longer as docs/course.md claims: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
