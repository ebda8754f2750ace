"""Tests of settings that constructors or `lit_gpt.cli.validation` reject."""

import os
import socket
from pathlib import Path

import pytest
from conftest import ROOT, Fit, forked
from user_errors import TWO_RANKS, Case, assert_user_error, check_case, check_case_on_two_ranks

SETTINGS: dict[str, Case] = {
    "num_heads does not divide d_model": Case(
        ["--model.config.num_heads", "3"], "num_heads 3 does not divide d_model 16"
    ),
    "accumulation given twice": Case(
        ["--data.global_batch_size", "8", "--trainer.accumulate_grad_batches", "2"],
        "follows from --data.global_batch_size 8: give only one of them",
    ),
    "global batch not a multiple": Case(["--data.global_batch_size", "6"], "6 is not a multiple of 4"),
    "timeout out of range": Case(["--timeout", "0"], "--timeout 0: give seconds, from 1 to 86400"),
    "batch_size 0": Case(["--data.batch_size", "0"], "--data.batch_size is 0: give 1 or more"),
    "huge batch_size": Case(["--data.batch_size", str(2**63)], "batch_size"),
    "huge d_model": Case(["--model.config.d_model", str(2**40)], "does not fit"),
    "val_fraction above 1": Case(
        ["--data.val_fraction", "1.5"], "--data.val_fraction is 1.5: give a fraction between 0 and 1"
    ),
    "validation interval in time": Case(
        ["--trainer.val_check_interval", "00:00:01:00"], "00:00:01:00: give optimizer steps"
    ),
    "validation interval 0": Case(
        ["--trainer.val_check_interval", "0"], "--trainer.val_check_interval 0: give optimizer steps"
    ),
    "schedule without end": Case(["--trainer.max_steps", "-1"], "--model.schedule cosine needs an end"),
    "max_steps 0": Case(["--trainer.max_steps", "0"], "--trainer.max_steps 0, or max_epochs 0, trains nothing"),
    "min_epochs after the end": Case(
        ["--trainer.min_epochs", "100"], "--trainer.min_epochs 100 of 35 steps is more than the 8 steps of the run"
    ),
    "decay of nothing": Case(
        ["--model.decay_norms_and_biases", "true", "--model.weight_decay", "0"],
        "--model.decay_norms_and_biases true has no effect, because --model.weight_decay is 0",
    ),
    "invalid max_time": Case(["--trainer.max_time", "an hour"], "--trainer.max_time an hour: give DD:HH:MM:SS"),
    "prompt with unknown character": Case(
        ["--data.tokenizer", "char", "--generate.prompts", "[row, 静夜思]"], "character '静' (U+9759) is not among"
    ),
    "negative temperature": Case(["--generate.temperature", "-1"], "temperature is -1.0: give 0"),
    "unknown accelerator": Case(["--trainer.accelerator", "tpu"], "torch_xla"),
    "devices -1": Case(["--trainer.devices", "-1"], "should be an int > 0"),
    "more devices than cores": Case(["--trainer.devices", "999"], "--trainer.devices 999 on"),
    "several nodes without launcher": Case(
        ["--trainer.num_nodes", "2"], "--trainer.num_nodes 2: start the command on each node, with torchrun or srun"
    ),
    "ddp_spawn": Case(["--trainer.strategy", "ddp_spawn"], "--trainer.strategy ddp_spawn is for notebooks: give ddp"),
    "limit_train_batches 0": Case(
        ["--trainer.limit_train_batches", "0"], "--trainer.limit_train_batches 0 of 35 batches is none: give more"
    ),
    "limit_train_batches not a multiple": Case(
        ["--trainer.limit_train_batches", "0.5", "--trainer.accumulate_grad_batches", "2"],
        "limit_train_batches 0.5 is an epoch of 17 batches, not a multiple of 2, the batches of an optimizer step",
    ),
    "overfit_batches not a multiple": Case(
        ["--trainer.overfit_batches", "3", "--data.global_batch_size", "8"],
        "--trainer.overfit_batches 3 is an epoch of 3 batches, not a multiple of 2, the batches of an optimizer step",
    ),
    "limit_val_batches below one batch": Case(
        ["--trainer.limit_val_batches", "0.5"],
        "--trainer.limit_val_batches 0.5 of 1 validation batches is none: give more, or more --data.eval_windows",
    ),
    "overfit_batches below one validation batch": Case(
        ["--trainer.overfit_batches", "0.5"], "--trainer.overfit_batches 0.5 of 1 validation batches is none: give more"
    ),
    "beta above 1": Case(["--model.betas", "[1.5, 0.9]"], "--model.betas is [1.5, 0.9]: give two numbers"),
    "negative weight decay": Case(["--model.weight_decay", "-1"], "--model.weight_decay is -1.0: give 0 or more"),
    "final learning rate above peak": Case(
        ["--model.min_learning_rate", "1"], "--model.min_learning_rate 1.0 is above --model.learning_rate 0.001"
    ),
    "float8_head on a CPU": Case(
        ["--model.float8_head", "true"], "--model.float8_head true needs a GPU of compute capability 8.9 or more"
    ),
    "momentum_warmup_steps without Muon": Case(
        ["--model.momentum_warmup_steps", "5"],
        "--model.momentum_warmup_steps is 5, but only Muon has this momentum: give --model.optimizer muon, or 0",
    ),
    "decay_share of a constant schedule": Case(
        ["--model.schedule", "constant", "--model.decay_share", "0.5"],
        "--model.min_learning_rate is null and --model.decay_share 0.5: give null and 1, or another schedule",
    ),
    "min_learning_rate of a constant schedule": Case(
        ["--model.schedule", "constant", "--model.min_learning_rate", "0"],
        "--model.min_learning_rate is 0.0 and --model.decay_share 1.0: give null and 1, or another schedule",
    ),
    "head_rate of a tied head": Case(
        ["--model.head_rate", "2"], "--model.head_rate is 2.0, but the head is the embedding, whose factor is"
    ),
    "vocab_size without bpe": Case(
        ["--data.vocab_size", "4096"], "--data.vocab_size 4096 is for a vocabulary that is trained on the text: give "
    ),
    "min_delta without patience": Case(
        ["--early_stopping.min_delta", "0.1"], "nothing stops early without --early_stopping.patience: give both"
    ),
    "columns and template": Case(
        ["--data.columns", "a", "--data.template", "{a}"], "--data.columns and --data.template both choose the columns"
    ),
    "table settings in raw mode": Case(
        ["--data.mode", "raw", "--data.quote", "none", "--data.header", "false"],
        "leave out --data.quote and --data.header, or give --data.mode rows",
    ),
    "val_files and val_fraction": Case(
        ["--data.val_files", "rows.txt", "--data.val_fraction", "0.2"],
        "--data.val_files is the validation split: leave it out, or --data.val_fraction",
    ),
    "test_files and test_fraction": Case(
        ["--data.test_files", "rows.txt", "--data.test_fraction", "0.2"],
        "--data.test_files is the test split: leave it out, or --data.test_fraction",
    ),
    "negative gradient clipping": Case(
        ["--trainer.gradient_clip_val", "-1"], "--trainer.gradient_clip_val is -1: give 0"
    ),
    "negative logging interval": Case(
        ["--trainer.log_every_n_steps", "-1"], "--trainer.log_every_n_steps is -1: give 0"
    ),
    "accumulation 0": Case(["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches is 0: give 1 or more"),
    "16-true": Case(["--trainer.precision", "16-true"], "--trainer.precision 16-true: squares of gradients exceed"),
    "64-true with FSDP2": Case(
        ["--config", str(ROOT / "configs" / "fsdp.yaml"), "--trainer.precision", "64-true"],
        "--trainer.precision 64-true does not work with FSDP2: give 32-true",
    ),
    "invalid argument of a callback": Case(
        [
            "--trainer.callbacks+",
            "EarlyStopping",
            "--trainer.callbacks.monitor=loss/val",
            "--trainer.callbacks.mode=up",
        ],
        "EarlyStopping: `mode` can be min, max, got up",
    ),
    "logger without its package": Case(["--trainer.logger", "CometLogger"], "CometLogger: "),
    "seed out of range": Case(
        ["--seed_everything", str(2**32)], "--seed_everything is 4294967296: give a number from 0"
    ),
    "patience 0": Case(["--early_stopping.patience", "0"], "--early_stopping.patience is 0"),
    "unknown metric to monitor": Case(
        ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "val_loss"],
        "--trainer.callbacks: no metric is called 'val_loss'",
    ),
    "negative number of checkpoints": Case(
        ["--checkpoint.keep", "-1"], "--checkpoint.keep -1: give 1 or more, 0 or more"
    ),
    "unsupported callback": Case(
        ["--trainer.callbacks+", "GradientAccumulationScheduler", "--trainer.callbacks.scheduling", "{0: 2}"],
        "GradientAccumulationScheduler is not supported: give --data.global_batch_size",
    ),
    "epochs and steps between validations": Case(
        ["--trainer.check_val_every_n_epoch", "2", "--trainer.val_check_interval", "3"],
        "--trainer.check_val_every_n_epoch 2 counts epochs, and --trainer.val_check_interval 3 optimizer steps",
    ),
    "part of two epochs between validations": Case(
        ["--trainer.check_val_every_n_epoch", "2", "--trainer.val_check_interval", "0.5"],
        "--trainer.val_check_interval 0.5 optimizer steps or a part of an epoch: give one of them, and null for",
    ),
    "0 epochs between validations": Case(
        ["--trainer.check_val_every_n_epoch", "0"], "--trainer.check_val_every_n_epoch is 0: give 1 or more"
    ),
    "FSDP1": Case(
        ["--trainer.strategy", "fsdp"],
        "fsdp is FSDP1, which cannot clip gradients by their norm: give --config configs/fsdp.yaml, which is FSDP2",
    ),
    "FSDP1 by its class": Case(
        ["--trainer.strategy", "lightning.pytorch.strategies.FSDPStrategy"], "FSDPStrategy is FSDP1, which cannot clip"
    ),
    "pruning": Case(
        ["--trainer.callbacks+", "ModelPruning", "--trainer.callbacks.pruning_fn", "l1_unstructured"],
        "ModelPruning is not supported: ",
    ),
    "patience without validation": Case(
        ["--early_stopping.patience", "2", "--trainer.limit_val_batches", "0"],
        "--early_stopping.patience counts validations, but",
    ),
    "remote root folder": Case(["--trainer.default_root_dir", "s3://b/x"], "give a folder on this machine"),
    "max_time 0": Case(["--trainer.max_time", "00:00:00:00"], "--trainer.max_time 00:00:00:00: give DD:HH"),
    "many workers": Case(["--data.num_workers", "100000"], "--data.num_workers 100000 on"),
    "many blocks": Case(["--model.config.num_blocks", str(10**12)], "more than 10^12 parameters"),
    "xla profiler": Case(["--trainer.profiler", "xla"], "--trainer.profiler xla needs a TPU"),
    "validate without a run": Case(
        ["validate"], "there is no checkpoint of 'small' under logs: train one with scripts/fit.py"
    ),
}


@pytest.mark.parametrize("case", SETTINGS.values(), ids=SETTINGS)
def test_wrong_setting_gives_one_line(fit: Fit, case: Case) -> None:
    check_case(fit, case)


@pytest.mark.parametrize(
    "name", ["num_heads does not divide d_model", "prompt with unknown character", "schedule without end"]
)
def test_wrong_setting_on_two_ranks_is_reported_once(folder: Path, name: str) -> None:
    check_case_on_two_ranks(folder, SETTINGS[name])


def test_global_batch_too_small_for_two_ranks_is_reported_once(folder: Path) -> None:
    result = forked(folder, "--config", "small.yaml", *TWO_RANKS, "--data.global_batch_size", 4)
    assert_user_error(result, "4 is not a multiple of 8, --data.batch_size 4 on 2 device(s)")
    assert not Path("logs").exists()


@pytest.mark.parametrize(
    ("port", "message"), [("taken", "Address already in use"), ("99999", "give a port from 1 to 65535")]
)
def test_master_port_that_cannot_be_used_is_reported_once(folder: Path, port: str, message: str) -> None:
    with socket.socket(socket.AF_INET6) as server:
        server.bind(("", 0))
        server.listen()
        number = str(server.getsockname()[1]) if port == "taken" else port
        environment = {"MASTER_PORT": number}
        result = forked(folder, "--config", "small.yaml", *TWO_RANKS, prepare=lambda: os.environ.update(environment))
    assert_user_error(result, message)
    assert not Path("logs").exists()
