"""Describe a run before it starts: its data, model, steps, memory and disk space, with warnings."""

import pickle
import shutil
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_gpt.cli.describe_data import duplicates_warning, encoding_lines, hint_lines
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.device import free_memory
from lit_gpt.figures import format_bytes
from lit_gpt.planning.memory import checkpoint_bytes, checkpoint_count, estimate_memory, processes_sharing_memory
from lit_gpt.training.checkpointing import StepCheckpoint, StopEarly
from lit_gpt.training.module import LitGPT

TOKENS_PER_PARAMETER = 20  # compute-optimal training, Hoffmann et al. 2022 (arXiv:2203.15556)
# Up to here repeated text is worth about as much as new text, Muennighoff et al. 2023 (arXiv:2305.16264):
USEFUL_EPOCHS = 4


def describe_run(
    trainer: Trainer, model: LitGPT, data: TextDataModule, folder: Path | None, checkpointing: StepCheckpoint | None
) -> list[str]:
    """Return the lines to print before a run.

    Args:
        trainer: The Trainer of the run.
        model: The model; its weights are not read.
        data: The data module, connected to the Trainer.
        folder: The run's folder; None if the run has none.
        checkpointing: The callback that writes checkpoints; None if none are written.
    """
    memory, memory_warning = _describe_memory(trainer, model, data)
    lines = [
        *encoding_lines(data.corpus.report["files"]),
        *_data_lines(data),
        *hint_lines(data.corpus.report, data.corpus_config, data.sources()),
        _model_line(model, data),
        f"memory      {memory}",
        _steps_line(data),
        f"device      {data.world_size} x {trainer.strategy.root_device.type}, {trainer.precision}",
        f"logs        {folder or 'none'}",
    ]
    warnings = [memory_warning]
    if checkpointing is not None and folder is not None:
        disk, disk_warning = _describe_disk(trainer, model, data, folder, checkpointing)
        lines.append(f"disk        {disk}")
        warnings.append(disk_warning)
    warnings += [
        duplicates_warning(data.corpus.report),
        _memorization_warning(trainer, model, data),
        _vocabulary_warning(model, data),
    ]
    return [*lines, *(f"warning     {warning}" for warning in warnings if warning)]


def _data_lines(data: TextDataModule) -> list[str]:
    """Return the lines about the text and its tokens."""
    report = data.corpus.report
    documents = f"{report['documents']:,} document{'' if report['documents'] == 1 else 's'}"
    left_out = f", {report['empty_rows']:,} empty rows left out" if report["empty_rows"] else ""
    if report["rejected"]:
        path = data.corpus.folder / "rejected.jsonl"
        left_out += f", {report['rejected']:,} rows that cannot be read: see {path}"
    test = f", {len(data.test_ids):,} to test" if len(data.test_ids) else ""
    splits = f"{len(data.train_ids):,} to train on, {len(data.val_ids):,} to validate{test}"
    return [
        f"text        {documents}, {report['characters']:,} characters{left_out}",
        f"tokens      {len(data.corpus.ids):,} ({splits}), "
        f"{data.model_vocab_size:,} different ({data.corpus_config.tokenizer_name})",
    ]


def _model_line(model: LitGPT, data: TextDataModule) -> str:
    """Return the line about the size of the model."""
    config, parameters = model.gpt.config, _count_parameters(model)
    return (
        f"model       {parameters:,} parameters, {len(data.corpus.ids) / parameters:.2g} tokens a parameter; "
        f"{config.num_blocks} blocks of width {config.d_model}, context {config.context_length}"
    )


def _steps_line(data: TextDataModule) -> str:
    """Return the line about the length of the run."""
    tokens = data.plan.windows_per_step * data.context_length
    steps = "no end" if data.plan.last_step is None else f"{data.plan.last_step:,}"
    epochs = "" if data.plan.last_step is None else f", {_count_epochs(data):,.1f} epochs"
    return f"steps       {steps} of {tokens:,} tokens, {data.plan.steps_per_epoch:,} to an epoch{epochs}"


def estimate_run_memory(trainer: Trainer, model: LitGPT, windows: int) -> tuple[int, int]:
    """Return `estimate_memory` of one process of a run, for B = `windows` windows in a forward pass."""
    shards = trainer.world_size if isinstance(trainer.strategy, ModelParallelStrategy) else 1
    device, precision = trainer.strategy.root_device.type, str(trainer.precision)
    return estimate_memory(model.gpt, model.hparams["optimizer"], windows, precision, device, shards)


def _describe_memory(trainer: Trainer, model: LitGPT, data: TextDataModule) -> tuple[str, str | None]:
    """Return the memory that the run needs and that is free; and a warning if it is too little."""
    state, activations = estimate_run_memory(trainer, model, data.batch_size)
    optimizer = "Muon" if model.hparams["optimizer"] == "muon" else "AdamW"
    description = (
        f"{format_bytes(state)} for weights, gradients and {optimizer}, "
        f"{format_bytes(activations)} and more for activations"
    )
    free = free_memory(trainer.strategy.root_device)
    if free is None:
        return description, None
    description += f"; {format_bytes(free)} free"
    needed = (state + activations) * processes_sharing_memory(trainer.strategy.root_device.type, trainer.num_devices)
    if needed <= free:
        return description, None
    shortage = f"the run needs {format_bytes(needed)} of memory, and {format_bytes(free)} are free"
    return description, f"{shortage}: give a smaller --data.batch_size, or a smaller --model.config"


def _describe_disk(
    trainer: Trainer, model: LitGPT, data: TextDataModule, folder: Path, checkpointing: StepCheckpoint
) -> tuple[str, str | None]:
    """Return the disk space that the checkpoints need and that is free; and a warning if it is too little."""
    tokenizer_bytes = len(pickle.dumps(data.tokenizer.state()))
    size = checkpoint_bytes(model.gpt, model.hparams["optimizer"], tokenizer_bytes)
    validates = trainer.limit_val_batches != 0
    count = checkpoint_count(data.plan.last_step, checkpointing.every_n_steps, checkpointing.keep, validates)
    free = shutil.disk_usage(next(parent for parent in folder.absolute().parents if parent.exists())).free
    total = f"{format_bytes(count * size)} for {count} checkpoints of {format_bytes(size)}"
    description = f"{total}; {format_bytes(free)} free"
    needed = (count + 1) * size  # an old checkpoint is deleted after the new one is written
    if needed <= free:
        return description, None
    shortage = f"the run needs {format_bytes(needed)} of disk, and {format_bytes(free)} are free at {folder}"
    return description, f"{shortage}: make room there, or write elsewhere with --trainer.default_root_dir"


def _memorization_warning(trainer: Trainer, model: LitGPT, data: TextDataModule) -> str | None:
    """Return a warning if the model is large for its training text and reads the text many times."""
    parameters, tokens = _count_parameters(model), len(data.train_ids)
    if _count_epochs(data) <= USEFUL_EPOCHS or parameters <= tokens / TOKENS_PER_PARAMETER:
        return None
    stops_early = any(isinstance(callback, StopEarly) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return (
        f"{parameters:,} parameters may memorize {tokens:,} training tokens: a model should have "
        f"{TOKENS_PER_PARAMETER} tokens a parameter (Hoffmann et al. 2022), and after {USEFUL_EPOCHS} epochs the same "
        f"text teaches little (Muennighoff et al. 2023); give {'' if stops_early else '--early_stopping.patience 5, '}"
        "a smaller model or more text"
    )


def _vocabulary_warning(model: LitGPT, data: TextDataModule) -> str | None:
    """Return a warning if most of the vocabulary does not occur and its parameters are a large part of the model."""
    config, vocab_size, used = model.gpt.config, data.model_vocab_size, data.corpus.report["vocabulary_in_use"]
    tables = 1 + (not config.tie_embeddings) + config.previous_tokens  # matrices of shape (vocab_size, d_model)
    vocab_parameters, parameters = tables * vocab_size * config.d_model, _count_parameters(model)
    if vocab_size < 1000 or used > vocab_size / 2 or vocab_parameters < parameters / 4:
        return None
    if data.corpus_config.tokenizer == "bpe":
        remedy = "a smaller --data.vocab_size"
    elif data.corpus_config.tokenizer_name.endswith(" full"):
        remedy = "--data.vocab pruned"
    else:
        remedy = "--data.tokenizer bpe"
    return (
        f"of {vocab_size:,} different tokens {used:,} occur, and {vocab_parameters:,} of {parameters:,} parameters are "
        f"for the vocabulary: give {remedy}; scripts/prepare.py --compare shows more"
    )


def _count_parameters(model: LitGPT) -> int:
    """Return the number of parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.gpt.parameters())


def _count_epochs(data: TextDataModule) -> float:
    """Return the number of epochs of the run, which is infinite if the run has no end."""
    return float("inf") if data.plan.last_step is None else data.plan.last_step / data.plan.steps_per_epoch
