"""What a run will need: memory, disk and time. The first two are told before every run, all three are measured."""

import contextlib
import copy
import ctypes
import os
import pickle
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_gpt.callbacks import GenerateText, parts, peak_memory, synchronize, told_seconds, told_time, validations_left
from lit_gpt.data.batches import Batch, EvaluationBatches
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.model import GPT, LinearCrossEntropy
from lit_gpt.module import LitGPT
from lit_gpt.optim import parameter_groups
from lit_gpt.saving import StepCheckpoint

TOKENS_A_PARAMETER = 20  # where more data and more parameters are worth the same
PASSES = 4  # over the same text that teach about as much as so much new text

USABLE = 0.95  # of the memory that is free; the rest is for what the allocator cannot put together

# of --preflight, in seconds: what it may take, where steps are slow, and what of it each figure may
SECONDS, STEP_SECONDS, VALIDATION_SECONDS, TEXT_SECONDS, SLOPE_SECONDS = 20.0, 8.0, 2.0, 1.0, 1.5
WARM_UP, FEWEST = 3, 2  # steps, before the clock runs and while it does
WRITTEN = 16  # tokens, by which the time of texts is known


def preflight(
    trainer: Trainer, model: LitGPT, data: TextDataModule, folder: Path | None, saves: StepCheckpoint | None
) -> str:
    """What is about to be trained, on what, for how long, what it needs, and where it is written."""
    config, counts = model.gpt.config, data.corpus.report
    parameters = sum(p.numel() for p in model.gpt.parameters())
    tokens = len(data.corpus.ids)
    per_step = data.windows_per_step * data.context_length
    steps = data.max_steps
    skipped = f", {counts['empty_rows']:,} empty rows left out" if counts["empty_rows"] else ""
    if counts["rejected"]:
        skipped += f", {counts['rejected']:,} rows that cannot be read: see {data.corpus.folder / 'rejected.jsonl'}"
    tested = f", {len(data.test_ids):,} to test" if len(data.test_ids) else ""
    epochs = steps / data.steps_per_epoch if steps is not None else float("inf")
    memory, warnings = _memory(trainer, model, data)
    lines = [
        f"text        {counts['documents']:,} document{'s'[: counts['documents'] != 1]}, "
        f"{counts['characters']:,} characters{skipped}",
        f"tokens      {tokens:,} ({len(data.train_ids):,} to train on, {len(data.val_ids):,} to validate{tested}), "
        f"{data.model_vocab_size:,} different ({data.recipe.tokenizer_name})",
        f"model       {parameters:,} parameters, {tokens / parameters:.2g} tokens a parameter; "
        f"{config.num_blocks} blocks of width {config.d_model}, context {config.context_length}",
        f"memory      {memory}",
        f"steps       {'no end' if steps is None else f'{steps:,}'} of {per_step:,} tokens, "
        f"{data.steps_per_epoch:,} to an epoch" + ("" if steps is None else f", {epochs:,.1f} epochs"),
        f"device      {data.world_size} x {trainer.strategy.root_device.type}, {trainer.precision}",
        f"logs        {folder if folder else 'none'}",
    ]
    if saves is not None and folder is not None:
        disk, more = _disk(trainer, model, data, folder, saves)
        lines.append(f"disk        {disk}")
        warnings += more
    trained = len(data.train_ids)
    if epochs > PASSES and parameters > trained / TOKENS_A_PARAMETER:
        warnings.append(
            f"{parameters:,} parameters may learn {trained:,} tokens by heart: a model wants "
            f"{TOKENS_A_PARAMETER} tokens a parameter (Hoffmann et al. 2022), and after {PASSES} epochs text loses its "
            "worth (Muennighoff et al. 2023); give --early_stopping.patience 5, a smaller model or more text"
        )
    if unused := _unused(model, data):
        warnings.append(unused)
    return "\n".join([*lines, *(f"warning     {warning}" for warning in warnings)])


def _unused(model: LitGPT, data: TextDataModule) -> str | None:
    """What is to be said of a vocabulary of which little is used and which costs much."""
    config, used, size = model.gpt.config, data.corpus.report["vocabulary_in_use"], data.model_vocab_size
    tables = 1 + (not config.tie_embeddings) + config.previous_tokens
    spent, whole = tables * size * config.d_model, sum(p.numel() for p in model.gpt.parameters())
    if size < 1000 or used > size / 2 or spent < whole / 4:
        return None
    if data.recipe.tokenizer == "bpe":
        remedy = "a smaller --data.vocab_size"
    else:
        remedy = "--data.vocab pruned" if data.recipe.tokenizer_name.endswith(" full") else "--data.tokenizer bpe"
    return (
        f"of {size:,} different tokens {used:,} occur, and {spent:,} of {whole:,} parameters stand for them all: give "
        f"{remedy}; scripts/prepare.py --compare shows more"
    )


def _memory(trainer: Trainer, model: LitGPT, data: TextDataModule) -> tuple[str, list[str]]:
    """What a run takes and there is, and what is wrong with it."""
    state, kept = needed_bytes(trainer, model, data.batch_size)
    optimizer = "Muon" if model.optimizer == "muon" else "AdamW"
    told = f"{as_bytes(state)} for weights, gradients and {optimizer}, {as_bytes(kept)} and more for activations"
    free = free_memory(trainer.strategy.root_device)
    if free is None:
        return told, []
    told += f"; {as_bytes(free)} free"
    needed = (state + kept) * processes(trainer)
    if needed <= free:
        return told, []
    remedy = "give a smaller --data.batch_size, or a smaller --model.config"
    return told, [f"the run needs {as_bytes(needed)} of memory, and {as_bytes(free)} are free: {remedy}"]


def _disk(
    trainer: Trainer, model: LitGPT, data: TextDataModule, folder: Path, saves: StepCheckpoint
) -> tuple[str, list[str]]:
    """What a run's checkpoints take and there is, and what is wrong with it."""
    size, kept = checkpoint_bytes(model, data), kept_checkpoints(saves, trainer, data.max_steps)
    free = shutil.disk_usage(next(place for place in folder.absolute().parents if place.exists())).free
    told = f"{as_bytes(kept * size)} for {kept} checkpoints of {as_bytes(size)}; {as_bytes(free)} free"
    needed = (kept + 1) * size  # one more while it is written
    if needed <= free:
        return told, []
    remedy = "make room there, or write elsewhere with --trainer.default_root_dir"
    return told, [f"the run needs {as_bytes(needed)} of disk, and {as_bytes(free)} are free at {folder}: {remedy}"]


def as_bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


# ------------------------------------------------------------------------------------------------- what is needed


def element_bytes(precision: str) -> int:
    """Of a weight, under the Trainer's `precision`."""
    return {"bf16-true": 2, "64-true": 8}.get(precision, 4)


def state_bytes(model: LitGPT, precision: str = "32-true") -> int:
    """Bytes of weights, gradients and the optimizer's state: four numbers a parameter, three for Muon's matrices."""
    groups = parameter_groups(model.gpt, model.weight_decay, model.optimizer)
    return element_bytes(precision) * sum((3 if g["muon"] else 4) * p.numel() for g in groups for p in g["params"])


def needed_bytes(trainer: Trainer, model: LitGPT, windows: int) -> tuple[int, int]:
    """What a process will take for the weights and what belongs to them, all or its slices, and for activations."""
    device, precision = trainer.strategy.root_device.type, str(trainer.precision)
    holders = trainer.world_size if isinstance(trainer.strategy, ModelParallelStrategy) else 1
    activations = activation_bytes(model.gpt, windows, precision, device)
    if device == "cuda":  # where two chunks of the head's logits are no little
        logits = windows * model.gpt.config.context_length * model.gpt.config.vocab_size * 4
        activations += 2 * min(LinearCrossEntropy.CHUNK[device], logits)
    return state_bytes(model, precision) // holders, activations


def activation_bytes(gpt: GPT, windows: int, precision: str, device: str = "cpu") -> int:
    """About the bytes that the forward pass of one batch leaves for the backward pass, blocks not compiled.

    It goes through `Block` and adds up what the operations keep of one token.

    Args:
        gpt: the model.
        windows: B.
        precision: the Trainer's.
        device: its type.
    """
    config, mixed, cpu = gpt.config, "mixed" in precision, device == "cpu"
    T, D, H, KE = config.context_length, config.d_model, config.num_heads, config.kv_heads * config.head_size
    hidden = sum(block.mlp.project.in_features for block in gpt.blocks) // config.num_blocks  # type: ignore[union-attr, misc]
    size = 2 if mixed else element_bytes(precision)
    norm = 2 * size * D + 4  # what it reads, and a number of it; its output is what a product reads
    turned = config.qk_norm or config.position == "rope"
    if cpu and T <= 512 and (config.dropout or (size == 2 and T >= 32)):  # attention_by_products
        attention = size * (3 * D + H * T) + (size * (D + 2 * KE) if config.qk_norm else 0)  # qkv's output by its norms
        attention += 2 * size * H * T if config.dropout else 0
    else:
        attention = size * (2 * D + 2 * KE) + 4 * H  # what qkv gave, what came of it, sums of shares
        attention += size * (D + KE) if turned else 0
    mlp = {"swiglu": 4, "gelu": 2, "relu": 1, "relu2": 2}[config.mlp] * size * hidden
    masks = 2 * size * D if config.dropout else 0
    block = 2 * norm + attention + size * D + mlp + masks
    blocks = config.num_blocks * block
    if gpt.blocks.activation_checkpointing:  # what goes into each, its masks, and one of them at work
        shares = size * H * T if config.dropout and cpu and T <= 512 else 0
        blocks = config.num_blocks * (size * D + masks + shares) + block
    token = blocks + norm + 2 * 8
    cast = size * sum(p.numel() for p in gpt.blocks.parameters() if p.ndim == 2) if mixed else 0
    return windows * T * token + cast


def checkpoint_bytes(model: LitGPT, data: TextDataModule) -> int:
    """Of a checkpoint file: weights, the optimizer's state, the tokenizer, and what stands around each tensor."""
    weights = list(model.gpt.parameters())
    state = state_bytes(model) - sum(4 * p.numel() for p in weights)  # without gradients
    return state + len(pickle.dumps(data.tokenizer.state())) + 2000 * len(weights)


def kept_checkpoints(saves: StepCheckpoint, trainer: Trainer, steps: int | None) -> int:
    """How many files a run of `steps` leaves: last.ckpt, best.ckpt where it validates, and periodic ones."""
    periodic = saves.keep if steps is None else min(saves.keep, steps // saves.every_n_steps)
    return 1 + (trainer.limit_val_batches != 0) + periodic


# ----------------------------------------------------------------------------------------------- what there is


def processes(trainer: Trainer) -> int:
    """How many of the run's share one memory: on a CPU, all on this machine."""
    return 1 if trainer.strategy.root_device.type == "cuda" else trainer.num_devices


def free_memory(device: torch.device) -> int | None:
    """Bytes this process can still take on `device`: of the CPU's, what the system and a container's limit leave.

    Where the system does not tell what is free, all of the machine's; None: it tells nothing.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # Windows
            return None
    return min([free, *left_to_groups()])


def left_to_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What each control group around this process leaves of its limit, where it has one (Linux, cgroups(7))."""
    names = "memory.max memory.current inactive_file", "memory.limit_in_bytes memory.usage_in_bytes total_inactive_file"
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for number, controllers, place in groups:
        if number != "0" and "memory" not in controllers.split(","):
            continue
        top = root if number == "0" else root / "memory"
        limit, usage, cached = names[number != "0"].split()
        folder = top / place.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(top):
                break
            try:
                most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
                statistic = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # it has no limit, or is another's
                continue
            if most.isdecimal() and int(most) < 2**60:
                yield max(0, int(most) - used + int(statistic.get(cached, 0)))


def own_memory(device: torch.device, peak: bool = False) -> int:
    """Bytes this process holds on `device`, or has held at most since `forget_peak`, where the system can tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024
    except (OSError, KeyError):
        return peak_memory(device)


def forget_peak(device: torch.device) -> None:
    """Counts the peak of `own_memory` anew, where the system lets us, without what is free and only kept."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # proc(5)


# ---------------------------------------------------------------------------------------------- what is measured


def usual(values: list[float]) -> float:
    """The mean of the middle nine tenths: a machine that is now faster and now slower is told by it, a stall is not."""
    few = len(values) // 20
    return statistics.mean(sorted(values)[few : len(values) - few])


class Measure(Callback):
    """Takes steps of a run that is not made, of batches that grow, and knows then what the run would need.

    The steps are the Trainer's, with all its settings, but for logs, checkpoints and validations; evaluation and texts
    are tried by themselves. A step of many forwards is known by two of them. Of processes that share the work, the
    first decides.

    Args:
        generate: what writes texts in the run.
        step: optimizer steps the run has taken already.

    Attributes:
        peaks: windows in a forward -> the most bytes the process held meanwhile.
        peak: the most it held with whole batches, in validation and while it wrote.
        allowed: how many it may hold; None: not known.
        refused: windows that were not tried, since they would not fit.
        step_seconds: of one optimizer step with whole batches.
        start_seconds: that compiling took.
        validation_seconds: of one validation.
        text_seconds: of the texts that are written after it.
    """

    def __init__(self, generate: GenerateText, step: int = 0) -> None:
        self.generate, self.step = generate, step
        self.peaks: dict[int, int] = {}
        self.peak = 0
        self.allowed: int | None = None
        self.refused: int | None = None
        self.step_seconds = self.start_seconds = self.validation_seconds = self.text_seconds = 0.0
        self.windows = self._kept = 0  # in a forward of the run, and bytes kept of each by the formula
        self._windows = 1  # in a forward of this step
        self._seconds: list[float] = []  # of each forward of this step, the last with the update
        self._since = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _, data = parts(trainer)
        data.on_before_batch_transfer = self._cut  # type: ignore[method-assign]
        self._steps, self._interval = data.max_steps, data.validation_interval
        self._tokens = data.windows_per_step * data.context_length  # of an optimizer step

    def _cut(self, batch: Batch, dataloader_idx: int) -> Batch:
        tokens, targets = batch
        if self._windows == len(tokens):
            return batch
        rows = torch.arange(self._windows) % len(tokens)  # some of the batch, or all of it more than once
        return tokens[rows], targets[rows]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, data = parts(trainer)
        self._device = module.device
        self._forwards = trainer.accumulate_grad_batches
        trainer.accumulate_grad_batches = min(2, self._forwards)
        loop = trainer.fit_loop
        loop.epoch_loop.max_steps, loop.max_epochs = -1, -1  # this callback says when it is enough
        loop.epoch_loop.min_steps = loop.min_epochs = None
        self._validates, trainer.limit_val_batches = trainer.limit_val_batches != 0, 0
        free = free_memory(self._device)
        if free is not None:
            self.allowed = own_memory(self._device) + int(USABLE * free / processes(trainer))
        self._plan = self._stages(trainer, module, data)
        self._windows = next(self._plan)
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        synchronize(self._device)
        self._seconds.append(time.perf_counter() - self._since)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._windows = next(self._plan, 0)
            trainer.should_stop = self._windows == 0
            self._seconds = []
        self._since = time.perf_counter()

    def _stages(self, trainer: Trainer, module: LitGPT, data: TextDataModule) -> Iterator[int]:
        """Before each step, how many windows its forwards take; what the step showed is kept when it is done."""
        agreed, begun, whole = trainer.strategy.broadcast, time.perf_counter(), data.batch_size
        self.windows, windows, compiles = whole, 1, bool(module.arguments["compile"])
        one, two = (activation_bytes(module.gpt, n, str(trainer.precision), self._device.type) for n in (1, 2))
        self._kept = two - one
        if compiles:  # which every other shape would need anew
            torch.compiler.set_stance("force_eager")
        while windows < whole:
            yield from self._try(windows)
            ample = self.allowed is None or self.expected(whole) < self.allowed / 2
            slow = time.perf_counter() - begun > SECONDS / 4
            windows = whole if agreed(ample or slow) else min(2 * windows, whole)
            if agreed(self.allowed is not None and self.expected(windows) > self.allowed):
                self.refused = windows
                return
        if compiles:
            torch.compiler.set_stance("default")
        forget_peak(self._device)
        first: list[float] = []
        for _ in range(WARM_UP):
            yield whole
            first.append(sum(self._seconds))
            if agreed(time.perf_counter() - begun > SECONDS / 2):
                break
        taken: list[list[float]] = []
        since = time.perf_counter()
        most = sys.maxsize if self._steps is None else self._steps - self.step  # no more than the run takes
        while len(taken) < FEWEST or agreed(
            len(taken) < most and time.perf_counter() < min(since + STEP_SECONDS, begun + SECONDS)
        ):
            yield whole
            taken.append(self._seconds)
        before, last = (usual([seconds[place] for seconds in taken]) for place in (0, -1))
        self.step_seconds = (self._forwards - 1) * before + last
        if compiles:
            self.start_seconds = max(0.0, sum(first) - len(first) * last)
        self.peaks[whole] = own_memory(self._device, peak=True)
        self.validation_seconds = self._evaluate(trainer, module, data) if self._validates else 0.0
        self.text_seconds = self._write(trainer)
        self.peak = own_memory(self._device, peak=True)
        if compiles:
            torch.compiler.set_stance("force_eager")
        while agreed(
            self.allowed is not None
            and self.expected(2 * windows) < self.allowed / 2
            and time.perf_counter() - begun + 2 * FEWEST * self.step_seconds * windows / whole < SECONDS
            and 2 * FEWEST * self.step_seconds * windows / whole < SLOPE_SECONDS
        ):
            windows *= 2
            yield from self._try(windows)
        if compiles:
            torch.compiler.set_stance("default")

    def _try(self, windows: int) -> Iterator[int]:
        """Steps with so many windows, for the memory they take."""
        forget_peak(self._device)
        for _ in range(FEWEST):  # the very first makes the optimizer's state
            yield windows
        self.peaks[windows] = own_memory(self._device, peak=True)

    def _evaluate(self, trainer: Trainer, module: LitGPT, data: TextDataModule) -> float:
        """Seconds a validation takes, known by some batches of the second split; those of the first are like them."""
        splits: list[EvaluationBatches] = [loader.dataset for loader in data.val_dataloader()]  # type: ignore[misc]
        batches, seconds, known = splits[-1], 0.0, 0
        module.eval()
        module.on_validation_epoch_start()
        for turn, index in enumerate((0, *range(len(batches)))):  # the first one twice, to get ready
            since = time.perf_counter()
            batch = trainer.strategy.batch_to_device(batches[index])
            with torch.no_grad():
                trainer.strategy.validation_step(batch, index, len(splits) - 1)
            synchronize(self._device)
            if turn:
                seconds, known = seconds + time.perf_counter() - since, known + len(batch[0])
            if trainer.strategy.broadcast(seconds > VALIDATION_SECONDS):
                break
        module.train()
        return seconds / known * sum(len(split.starts) for split in splits)

    def _write(self, trainer: Trainer) -> float:
        """Seconds the texts of one time take, known by those of one prompt, or by their first tokens."""
        seconds, some = 0.0, copy.copy(self.generate)
        whole = self.generate.sampling["max_new_tokens"]
        length = min(WRITTEN, whole)
        for prompt in self.generate.prompts[:1] * 3:  # once to get ready
            some.sampling = {**self.generate.sampling, "max_new_tokens": length}
            since = time.perf_counter()
            some.texts(trainer, prompt)
            seconds = (time.perf_counter() - since) * whole / length
            if trainer.strategy.broadcast(seconds < TEXT_SECONDS):
                length = whole  # those beyond the context take longer
        return seconds * len(self.generate.prompts)

    def ran_out(self) -> None:
        """There was no memory for the batches that were just tried: what is held now is all there is."""
        if not self.peak:
            self.refused, self.allowed = self._windows, own_memory(self._device, peak=True)

    def slope(self) -> float:
        """Bytes a window more takes, by the two largest batches tried.

        Until there are two: what the forward pass keeps of it, three times, since a CPU's memory is handed out in
        pieces that do not fit together.
        """
        *_, smaller, larger = 0, 0, *sorted(self.peaks)
        if smaller == 0 or self.peaks[larger] <= self.peaks[smaller]:
            return 3 * self._kept
        return (self.peaks[larger] - self.peaks[smaller]) / (larger - smaller)

    def expected(self, windows: int) -> float:
        """Bytes the process would hold with batches of more windows than were tried."""
        largest = max(self.peaks)
        return self.peaks[largest] + (windows - largest) * self.slope()

    def told(self) -> str:
        """What was found."""
        if not self.peaks:
            return "measured    nothing, since not even one window fits"
        each = [f"{as_bytes(peak)} with {windows:,}" for windows, peak in self.peaks.items()]
        lines = [f"measured    {', '.join(each)} window{'s'[: max(self.peaks) != 1]} in a batch"]
        needed, place = self.expected(self.refused) if self.refused else self.peak, ""
        if self.allowed is not None:
            largest = max(self.peaks)
            held = max(self.peaks[largest], self.peak)
            most = max(1, int(largest + (self.allowed - held) / self.slope()))
            verdict = "does not fit" if self.refused or needed > self.allowed else "fits"
            place = f" of {as_bytes(self.allowed)}: {verdict}; the largest batch that fits is of about {most:,}"
        lines.append(f"needed      {as_bytes(needed)} with {self.refused or self.windows:,}{place}")
        if self.refused:
            lines.append("time        not measured, since the batch does not fit")
            return "\n".join(lines)
        pace = f"{self._tokens / self.step_seconds:,.0f} tokens/s"
        if self._steps is None:
            lines.append(f"time        {told_seconds(self.step_seconds)} a step, {pace}; no end is set")
            return "\n".join(lines)
        steps, times = max(0, self._steps - self.step), 0
        if self._validates and self._interval is not None:
            times = validations_left(self.step, self._steps, self._interval)
        more = self.start_seconds + self.text_seconds * (1 + times)
        told = told_time(steps, self.step_seconds, times, self.validation_seconds, more)
        lines.append(f"time        {told}; {pace}")
        return "\n".join(lines)
