"""Words of the help that are in no docstring: examples, what settings are in a few words, arguments of the Trainer."""

from typing import NamedTuple


class CommandHelp(NamedTuple):
    """What the first page of a command's help says.

    Attributes:
        usage: The form of a command line.
        description: What the command does.
        examples: Command lines, each with what it does.
        names: The settings that people change most.
    """

    usage: str
    description: str
    examples: tuple[str, ...]
    names: tuple[str, ...]


FIT_SETTINGS = (
    *("data.files", "budget", "data.columns", "data.mode", "data.tokenizer", "data.batch_size"),
    *("model.config.context_length", "model.config.d_model", "model.config.num_blocks", "model.config.num_heads"),
    *("model.config.dropout", "model.learning_rate"),
    *("trainer.max_steps", "trainer.val_check_interval", "trainer.devices"),
    *("generate.prompts", "name", "ckpt_path", "seed_everything", "preflight", "visualize"),
)
READING_SETTINGS = ("data.files", "data.columns", "data.template", "data.mode", "data.encoding")
EVALUATION_SETTINGS = ("data.eval_windows", "data.batch_size", "trainer.accelerator", "trainer.devices")

COMMAND_HELP = {
    "fit": CommandHelp(
        "python scripts/fit.py [--config FILE] [--SETTING VALUE] ...",
        "Trains a GPT on a table of text. Curves, checkpoints and sample texts are written to logs/NAME/version_N/. "
        "--budget 10m chooses the settings that you do not give, for ten minutes. Ctrl-C saves the run and ends it. "
        "validate and test evaluate a checkpoint: fit.py validate --help.",
        (
            "examples:",
            "  python scripts/fit.py                                # the built-in table",
            "  python scripts/fit.py --data.files poems.csv --budget 10m --name poems",
            "  python scripts/fit.py --name poems --ckpt_path last  # continues the run",
        ),
        FIT_SETTINGS,
    ),
    "validate": CommandHelp(
        "python scripts/fit.py validate [--name NAME] [--ckpt_path FILE] ...",
        "Prints the loss, the perplexity and other metrics of a checkpoint on the validation split. Settings that are "
        "not given are those of the checkpoint.",
        (
            "examples:",
            "  python scripts/fit.py validate               # the best one of the newest run",
            "  python scripts/fit.py validate --name poems --ckpt_path last",
            "  python scripts/fit.py validate --name poems --data.val_files new.csv",
        ),
        (
            *("name", "ckpt_path", *READING_SETTINGS, "data.val_fraction", "data.val_files"),
            *(*EVALUATION_SETTINGS, "trainer.limit_val_batches"),
        ),
    ),
    "test": CommandHelp(
        "python scripts/fit.py test [--name NAME] [--ckpt_path FILE] ...",
        "Prints the loss, the perplexity and other metrics of a checkpoint on the test split, which has to be given. "
        "Settings that are not given are those of the checkpoint.",
        (
            "examples:",
            "  python scripts/fit.py --data.test_fraction 0.1 --name split  # trains, then:",
            "  python scripts/fit.py test --name split",
            "  python scripts/fit.py test --name poems --data.test_files new.csv",
        ),
        (
            *("name", "ckpt_path", *READING_SETTINGS, "data.test_fraction", "data.test_files", "data.split_column"),
            *(*EVALUATION_SETTINGS, "trainer.limit_test_batches"),
        ),
    ),
}

# At most 29 columns each, which is what the first page has left.
SHORT_WORDS = {
    "budget": "time, as 90s, 10m, 2h or 1d",
    "ckpt_path": "a file, last, best or auto",
    "data.batch_size": "windows in a batch",
    "data.columns": "columns that are read",
    "data.encoding": "as gb18030; auto detects it",
    "data.eval_windows": "windows; null: all",
    "data.files": "tables or texts; globs, URLs",
    "data.mode": "rows, or raw for one text",
    "data.split_column": "its cells: train, val, test",
    "data.template": 'as "{title}: {text}"',
    "data.test_files": "the test split",
    "data.test_fraction": "part of the documents",
    "data.tokenizer": "or char, byte, bpe, gpt2, ...",
    "data.val_files": "the validation split",
    "data.val_fraction": "part of the documents",
    "generate.prompts": "texts to continue",
    "model.config.context_length": "tokens seen at once",
    "model.config.d_model": "width",
    "model.config.dropout": "0 to 1, 0 for none",
    "model.config.num_blocks": "depth",
    "model.config.num_heads": "attention heads",
    "model.learning_rate": "highest, after the warm-up",
    "name": "the run's folder in logs/",
    "preflight": "measure only a few steps",
    "seed_everything": "seed of everything random",
    "trainer.accelerator": "cpu, gpu, mps or auto",
    "trainer.devices": "number; auto: all",
    "trainer.limit_test_batches": "batches; 1.0: all",
    "trainer.limit_val_batches": "batches; 1.0: all",
    "trainer.max_steps": "optimizer steps",
    "trainer.val_check_interval": "steps between validations",
    "visualize": "true: pictures of the model",
}

# Sentences that stand for those of jsonargparse, and of Lightning, which describes its arguments at length, in
# reStructuredText, and with its own defaults.
SENTENCES = {
    "config": "A YAML file of settings. It may be given again: the later one wins, and flags win over all.",
    "trainer.accelerator": "The type of the devices: cpu, gpu, mps, or auto, which takes the fastest one there is.",
    "trainer.strategy": "How several devices work together: auto, ddp, or the name of a class.",
    "trainer.devices": "The number of devices, a list of their numbers, or auto and -1, which take all of them.",
    "trainer.num_nodes": "The number of machines.",
    "trainer.precision": "Number format: 32-true, bf16-mixed, 16-mixed, bf16-true or 64-true. null: bf16-mixed where "
    "that is faster, else 32-true.",
    "trainer.logger": "The name of a logger class, or a list of them. null: TensorBoard files in the run's folder. "
    "false: no curves.",
    "trainer.callbacks": "The name of a callback class, or a list of them.",
    "trainer.fast_dev_run": "Runs this many batches of training and validation to find errors, and writes nothing.",
    "trainer.max_epochs": "Epochs after which the run ends. -1: no limit.",
    "trainer.min_epochs": "Epochs before which the run does not end.",
    "trainer.max_steps": "Optimizer steps after which the run ends. -1: no limit.",
    "trainer.min_steps": "Optimizer steps before which the run does not end.",
    "trainer.max_time": "Time after which the run is saved and ends, as DD:HH:MM:SS.",
    "trainer.num_sanity_val_steps": "Batches of a validation that checks, before training, that validation works.",
    "trainer.log_every_n_steps": "Optimizer steps between two points of a training curve. 0: no curve.",
    "trainer.enable_checkpointing": "Whether to write checkpoints. null: true.",
    "trainer.enable_progress_bar": "Whether to show a progress bar. null: true.",
    "trainer.enable_model_summary": "Whether to print Lightning's table of the parts of the model.",
    "trainer.accumulate_grad_batches": "Batches whose gradients are added up in an optimizer step.",
    "trainer.gradient_clip_val": "Largest norm of the gradients; larger ones are scaled down to it. null: no limit.",
    "trainer.gradient_clip_algorithm": "What is limited: norm, that of all gradients, or value, each of their numbers.",
    "trainer.deterministic": "Whether to refuse operations whose results differ in equal runs. warn: warn of them.",
    "trainer.benchmark": "Whether cuDNN measures which of its algorithms is fastest. null: false.",
    "trainer.inference_mode": "Whether evaluation uses torch.inference_mode, not torch.no_grad.",
    "trainer.use_distributed_sampler": "Whether Lightning divides the batches of other data among the devices.",
    "trainer.profiler": "Measures the parts of each step: simple, advanced, pytorch, or the name of a class.",
    "trainer.detect_anomaly": "Whether autograd looks for the operation that gave a gradient that is not a number.",
    "trainer.barebones": "Whether to switch off curves, checkpoints and the progress bar to measure the plain loop.",
    "trainer.plugins": "The name of a plugin class of Lightning, or a list of them.",
    "trainer.sync_batchnorm": "Whether batch norms average over all devices; this model has none.",
    "trainer.reload_dataloaders_every_n_epochs": "Epochs after which the data are loaded again. 0: never.",
    "trainer.enable_autolog_hparams": "Whether to log the hyperparameters at the start of a run.",
    "trainer.model_registry": "The name under which a model is uploaded to Lightning's model registry.",
}
