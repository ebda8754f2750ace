"""Recipes: configs that, planted in a checkpoint, would run a command. Each payload writes the file `harmed`.

python tests/recipes.py  # every recipe with every command, in some minutes; test_saved_config.py runs a part
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import SMALL, Result, forked
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy

COMMANDS: dict[str, list[str]] = {
    "fit": ["fit.py", "fit", "--trainer.max_steps", "8"],
    "last": ["fit.py", "--trainer.max_steps", "8", "--name", "small"],
    "validate": ["fit.py", "validate"],
    "test": ["fit.py", "test", "--data.test_fraction", "0.1"],
    "preflight": ["fit.py", "fit", "--preflight"],
    "generate": ["generate.py", "--max_new_tokens", "4"],
    "novel": ["generate.py", "--max_new_tokens", "4", "--novel"],
    "bench": ["bench.py", "train", "--turns", "1", "--steps", "2", "--warm_up", "1"],
}

# --------------------------------------------------------------------------------------------------------- payloads


def harm(*args: object, **kwargs: object) -> None:
    """Do harm: a payload that is called."""
    Path("harmed").touch()


class HarmfulCallback(Callback):
    def __init__(self, message: str = "") -> None:
        harm()


class HarmfulLogger(DummyLogger):
    def __init__(self, message: str = "") -> None:
        super().__init__()
        harm()


class HarmfulStrategy(SingleDeviceStrategy):
    def __init__(self) -> None:
        super().__init__(device="cpu")
        harm()


class HarmfulAccelerator(CPUAccelerator):
    def __init__(self) -> None:
        super().__init__()
        harm()


class HarmfulPlugin(LightningEnvironment):
    def __init__(self) -> None:
        super().__init__()
        harm()


class HarmfulProfiler(PassThroughProfiler):
    def __init__(self) -> None:
        super().__init__()
        harm()


HERE = "recipes"  # the module of the payloads, which any import path can name
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": "touch harmed", "shell": True}}
DDP = "lightning.pytorch.strategies.DDPStrategy"
LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"
TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"


def spec(class_path: str, **init_args: Any) -> dict[str, Any]:
    """Return how a config names a class and its arguments."""
    return {"class_path": class_path, "init_args": init_args}


def config_file(name: str, content: Any) -> str:
    """Write a config file that was planted in the working folder; return its name."""
    Path(name).write_text(yaml.safe_dump(content), encoding="utf-8")
    return name


# The settings of each recipe by dotted key. A function, because some write a config file into the working folder.
RECIPES: dict[str, Callable[[], dict[str, Any]]] = {
    # named in the issue
    "strategy with a command as argument": lambda: {"trainer.strategy": spec(DDP, ddp_comm_state=POPEN)},
    "logger with a command as argument": lambda: {"trainer.logger": spec(TENSORBOARD, save_dir="x", sub_dir=POPEN)},
    "logger with a command as untyped argument": lambda: {
        "trainer.logger": {"class_path": TENSORBOARD, "init_args": {"save_dir": "x"}, "dict_kwargs": {"a": POPEN}}
    },
    "function in a callback": lambda: {"trainer.callbacks": [spec(LAMBDA, on_fit_start=f"{HERE}.harm")]},
    # of our own
    "callback": lambda: {"trainer.callbacks": [spec(f"{HERE}.HarmfulCallback")]},
    "callback as a word": lambda: {"trainer.callbacks": f"{HERE}.HarmfulCallback"},
    "callback by its class name": lambda: {"trainer.callbacks": "HarmfulCallback"},
    "appended callback": lambda: {"trainer.callbacks+": spec(f"{HERE}.HarmfulCallback")},
    "callback below a number": lambda: {"trainer.callbacks": {"0": spec(f"{HERE}.HarmfulCallback")}},
    "callback without init_args": lambda: {"trainer.callbacks": {"class_path": f"{HERE}.HarmfulCallback"}},
    "callback with a command as argument": lambda: {
        "trainer.callbacks": [spec("lightning.pytorch.callbacks.LearningRateMonitor", logging_interval=POPEN)]
    },
    "function for each validation": lambda: {"trainer.callbacks": [spec(LAMBDA, on_validation_start=f"{HERE}.harm")]},
    "logger": lambda: {"trainer.logger": spec(f"{HERE}.HarmfulLogger")},
    "list of loggers": lambda: {"trainer.logger": [True, spec(f"{HERE}.HarmfulLogger")]},
    "strategy": lambda: {"trainer.strategy": spec(f"{HERE}.HarmfulStrategy")},
    "strategy as a word": lambda: {"trainer.strategy": f"{HERE}.HarmfulStrategy"},
    "function in a strategy": lambda: {"trainer.strategy": spec(DDP, ddp_comm_hook=f"{HERE}.harm")},
    "plugin in a strategy": lambda: {"trainer.strategy": spec(DDP, cluster_environment=spec(f"{HERE}.HarmfulPlugin"))},
    "plugin in a strategy as a word": lambda: {
        "trainer.strategy": spec(DDP, cluster_environment=f"{HERE}.HarmfulPlugin")
    },
    "accelerator in a strategy": lambda: {"trainer.strategy": spec(DDP, accelerator=f"{HERE}.HarmfulAccelerator")},
    "untyped argument of a strategy": lambda: {
        "trainer.strategy": {"class_path": DDP, "init_args": {}, "dict_kwargs": {"process_group": POPEN}}
    },
    "accelerator": lambda: {"trainer.accelerator": spec(f"{HERE}.HarmfulAccelerator")},
    "accelerator as a word": lambda: {"trainer.accelerator": f"{HERE}.HarmfulAccelerator"},
    "plugin": lambda: {"trainer.plugins": spec(f"{HERE}.HarmfulPlugin")},
    "list of plugins": lambda: {"trainer.plugins": [spec(f"{HERE}.HarmfulPlugin")]},
    "profiler": lambda: {"trainer.profiler": spec(f"{HERE}.HarmfulProfiler")},
    "profiler as a word": lambda: {"trainer.profiler": f"{HERE}.HarmfulProfiler"},
    "config file of a strategy": lambda: {
        "trainer.strategy": config_file("strategy.yaml", spec(f"{HERE}.HarmfulStrategy"))
    },
    "config file with the name of a strategy": lambda: {
        "trainer.strategy": config_file("ddp", spec(f"{HERE}.HarmfulStrategy"))
    },
    "config file of the Trainer": lambda: {
        "trainer": config_file("trainer.yaml", {"callbacks": [spec(f"{HERE}.HarmfulCallback")]})
    },
    "config file below config": lambda: {
        "config": config_file("all.yaml", {"trainer": {"callbacks": [spec(f"{HERE}.HarmfulCallback")]}})
    },
    "text of the Trainer": lambda: {"trainer": "{callbacks: [{class_path: " + f"{HERE}.HarmfulCallback" + "}]}"},
    "dotted key": lambda: {"trainer/callbacks": [spec(f"{HERE}.HarmfulCallback")]},  # becomes one key with a dot
    "class of the model": lambda: {"model": spec(f"{HERE}.HarmfulCallback")},
    "class of the config": lambda: {"model.config": spec("subprocess.Popen", args="touch harmed", shell=True)},
    "config as a class path": lambda: {"model.config": "subprocess.Popen"},
    "class of a number": lambda: {"trainer.max_steps": POPEN},
    "class of the devices": lambda: {"trainer.devices": POPEN},
    "class of the precision": lambda: {"trainer.precision": POPEN},
    "class of a limit": lambda: {"trainer.max_time": {"hours": POPEN}},
    "class of a file": lambda: {"data.files": ["rows.txt", POPEN]},
    "class of a tokenizer": lambda: {"data.tokenizer": POPEN},
    "class of prompts": lambda: {"generate.prompts": POPEN},
    "unknown key": lambda: {"harm": spec(f"{HERE}.HarmfulCallback")},
    "unknown key of the Trainer": lambda: {"trainer.harm": POPEN},
    "permission": lambda: {"allow_imports": [HERE], "trainer.callbacks": [spec(f"{HERE}.HarmfulCallback")]},
}


def settings_with(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the run of conftest.py, changed by a recipe."""
    settings: dict[str, Any] = yaml.safe_load(SMALL)
    for key, value in recipe.items():
        *sections, name = key.split(".")
        section = settings
        for part in sections:
            section = section.setdefault(part, {})
        section[name.replace("/", ".")] = value
    return settings


def plant(recipe: dict[str, Any], source: Path, target: Path) -> None:
    """Write a copy of a checkpoint whose config is that of a recipe."""
    contents = torch.load(source, weights_only=True)
    contents["config"] = yaml.safe_dump({"name": "small", **settings_with(recipe)}, sort_keys=False)
    torch.save(contents, target)


# ------------------------------------------------------------------------------------------------ the whole matrix


def run_command(folder: Path, command: str, checkpoint: Path) -> Result:
    script, *words = COMMANDS[command]
    path = "last" if command == "last" else str(checkpoint)
    return forked(folder, *words, "--ckpt_path", path, script=script)


def attack(folder: Path) -> Iterator[tuple[str, str, Result, bool]]:
    """Yield recipe, command, result and whether the payload ran, of every recipe with every command."""
    run = folder / "logs" / "small" / "version_0"
    os.chdir(folder)
    for name, recipe in RECIPES.items():
        for command in COMMANDS:
            shutil.rmtree(folder / "logs", ignore_errors=True)
            shutil.copytree(folder / "clean", folder / "logs")
            target = run / "last.ckpt" if command == "last" else folder / "planted.ckpt"
            plant(recipe(), run / "last.ckpt", target)
            (run / "best.ckpt").unlink()
            Path("harmed").unlink(missing_ok=True)
            result = run_command(folder, command, target)
            yield name, command, result, Path("harmed").exists()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = "\n".join(f"row {i}: " + "abcdefghij"[i % 10] * (i % 7) for i in range(120))
        (folder / "rows.txt").write_text(rows, encoding="utf-8")
        (folder / "small.yaml").write_text(SMALL, encoding="utf-8")
        assert forked(folder, "--config", "small.yaml").status == 0
        shutil.move(folder / "logs", folder / "clean")
        executed, tracebacks, total = [], [], 0
        for recipe, command, result, harmed in attack(folder):
            total += 1
            executed += [f"{command}: {recipe}"] * harmed
            tracebacks += [f"{command}: {recipe}"] * ("Traceback" in result.err)
            if "-v" in sys.argv or harmed or "Traceback" in result.err:
                line = (result.err.strip() or "-").splitlines()[-1]
                print(f"{command:9} {recipe:40} status {result.status} harmed {harmed} {line[:300]}", flush=True)
        print(f"{total} cases, {len(executed)} executed, {len(tracebacks)} tracebacks")


if __name__ == "__main__":
    main()
