"""What a run will need: memory, disk and time. The first two are told before every run, all three are measured."""

import shutil
from pathlib import Path

from lightning.pytorch import Trainer

from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.device import free_memory
from lit_gpt.training.checkpointing import StepCheckpoint
from lit_gpt.training.memory import (
    checkpoint_bytes,
    checkpoint_count,
    estimate_memory,
    format_bytes,
    processes_sharing_memory,
)
from lit_gpt.training.module import LitGPT

TOKENS_A_PARAMETER = 20  # where more data and more parameters are worth the same
PASSES = 4  # over the same text that teach about as much as so much new text


def preflight(
    trainer: Trainer, model: LitGPT, data: TextDataModule, folder: Path | None, saves: StepCheckpoint | None
) -> str:
    """What is about to be trained, on what, for how long, what it needs, and where it is written."""
    config, counts = model.gpt.config, data.corpus.report
    parameters = sum(p.numel() for p in model.gpt.parameters())
    tokens = len(data.corpus.ids)
    per_step = data.plan.windows_per_step * data.context_length
    steps = data.plan.last_step
    skipped = f", {counts['empty_rows']:,} empty rows left out" if counts["empty_rows"] else ""
    if counts["rejected"]:
        skipped += f", {counts['rejected']:,} rows that cannot be read: see {data.corpus.folder / 'rejected.jsonl'}"
    tested = f", {len(data.test_ids):,} to test" if len(data.test_ids) else ""
    epochs = steps / data.plan.steps_per_epoch if steps is not None else float("inf")
    memory, warnings = _memory(trainer, model, data)
    lines = [
        f"text        {counts['documents']:,} document{'s'[: counts['documents'] != 1]}, "
        f"{counts['characters']:,} characters{skipped}",
        f"tokens      {tokens:,} ({len(data.train_ids):,} to train on, {len(data.val_ids):,} to validate{tested}), "
        f"{data.model_vocab_size:,} different ({data.corpus_config.tokenizer_name})",
        f"model       {parameters:,} parameters, {tokens / parameters:.2g} tokens a parameter; "
        f"{config.num_blocks} blocks of width {config.d_model}, context {config.context_length}",
        f"memory      {memory}",
        f"steps       {'no end' if steps is None else f'{steps:,}'} of {per_step:,} tokens, "
        f"{data.plan.steps_per_epoch:,} to an epoch" + ("" if steps is None else f", {epochs:,.1f} epochs"),
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
    if data.corpus_config.tokenizer == "bpe":
        remedy = "a smaller --data.vocab_size"
    else:
        remedy = (
            "--data.vocab pruned" if data.corpus_config.tokenizer_name.endswith(" full") else "--data.tokenizer bpe"
        )
    return (
        f"of {size:,} different tokens {used:,} occur, and {spent:,} of {whole:,} parameters stand for them all: give "
        f"{remedy}; scripts/prepare.py --compare shows more"
    )


def _memory(trainer: Trainer, model: LitGPT, data: TextDataModule) -> tuple[str, list[str]]:
    """What a run takes and there is, and what is wrong with it."""
    state, kept = estimate_memory(trainer, model, data.batch_size)
    optimizer = "Muon" if model.optimizer == "muon" else "AdamW"
    told = f"{format_bytes(state)} for weights, gradients and {optimizer}, "
    told += f"{format_bytes(kept)} and more for activations"
    free = free_memory(trainer.strategy.root_device)
    if free is None:
        return told, []
    told += f"; {format_bytes(free)} free"
    needed = (state + kept) * processes_sharing_memory(trainer)
    if needed <= free:
        return told, []
    remedy = "give a smaller --data.batch_size, or a smaller --model.config"
    return told, [f"the run needs {format_bytes(needed)} of memory, and {format_bytes(free)} are free: {remedy}"]


def _disk(
    trainer: Trainer, model: LitGPT, data: TextDataModule, folder: Path, saves: StepCheckpoint
) -> tuple[str, list[str]]:
    """What a run's checkpoints take and there is, and what is wrong with it."""
    size, kept = checkpoint_bytes(model, data), checkpoint_count(saves, trainer, data.plan.last_step)
    free = shutil.disk_usage(next(place for place in folder.absolute().parents if place.exists())).free
    told = f"{format_bytes(kept * size)} for {kept} checkpoints of {format_bytes(size)}; {format_bytes(free)} free"
    needed = (kept + 1) * size  # one more while it is written
    if needed <= free:
        return told, []
    remedy = "make room there, or write elsewhere with --trainer.default_root_dir"
    shortage = f"the run needs {format_bytes(needed)} of disk, and {format_bytes(free)} are free at {folder}"
    return told, [f"{shortage}: {remedy}"]


# ------------------------------------------------------------------------------------------------- what is needed


# ----------------------------------------------------------------------------------------------- what there is


# ---------------------------------------------------------------------------------------------- what is measured
