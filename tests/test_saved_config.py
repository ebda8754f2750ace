"""Tests of what the commands take from a checkpoint: plain values. Nothing that it names is imported or called."""

import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import recipes
import torch
import yaml
from conftest import DEFAULT, ROOT, SMALL, Fit, forked
from jsonargparse._common import parsing_settings
from user_errors import assert_user_error

from lit_gpt import LitGPT, UserError
from lit_gpt.benchmark.task import build_run
from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.config_file import LINKED_SETTINGS
from lit_gpt.cli.experiment import instantiate
from lit_gpt.cli.generate import main as generate_main
from lit_gpt.cli.parser import build_parser, load_settings
from lit_gpt.cli.saved_config import NEVER_TAKEN, setting_checks, take_settings
from lit_gpt.cli.yaml_text import dump_yaml, load_yaml
from lit_gpt.training.module import LitGPT as Module

RUN = Path("logs/small/version_0")
PLANTED = ["--ckpt_path", "planted.ckpt"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the last checkpoint of a run of six steps."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "rows.txt").write_text("\n".join(f"row {i}: some text" for i in range(120)), encoding="utf-8")
    (folder / "small.yaml").write_text(SMALL, encoding="utf-8")
    assert forked(folder, "--config", "small.yaml").status == 0
    return folder / RUN / "last.ckpt"


@pytest.fixture
def plant(folder: Path, trained: Path) -> Callable[..., None]:
    """Return a function that writes planted.ckpt, whose config has the given settings, with dotted keys."""
    (folder / "rows.txt").write_text("\n".join(f"row {i}: some text" for i in range(120)), encoding="utf-8")
    (folder / "data").symlink_to(trained.parents[3] / "data")  # the text is tokenized once

    def write(settings: dict[str, Any]) -> None:
        recipes.plant(settings, trained, folder / "planted.ckpt")

    return write


@pytest.fixture
def parser_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore what a test changes in the settings of jsonargparse, which hold for the whole process."""
    monkeypatch.setitem(parsing_settings, "import_path_verdicts", dict(parsing_settings["import_path_verdicts"]))


def change(trained: Path, **entries: Any) -> None:
    """Write planted.ckpt, a copy of a checkpoint with other entries."""
    contents = torch.load(trained, weights_only=True)
    for name, value in entries.items():
        contents[name.replace("__", "-")] = value
    torch.save(contents, "planted.ckpt")


def command_line(*flags: str) -> CommandLine:
    return CommandLine(["fit", *PLANTED, *flags], DEFAULT)


# --------------------------------------------------------------------------------------------------- nothing is run

RECIPES = recipes.RECIPES


def assert_settings_are_plain() -> None:
    """Check that no setting of the Trainer that may have a class comes from planted.ckpt, and instantiate them all."""
    parser, settings, _ = load_settings(command_line())
    parts = instantiate(parser, settings)
    for name, plain in {
        "callbacks": None,
        "plugins": None,
        "profiler": None,
        "logger": None,
        "default_root_dir": None,
        "strategy": ("auto", "ddp"),
        "accelerator": ("auto", "cpu"),
        "devices": "auto",
    }.items():
        assert settings.trainer[name] in (plain if isinstance(plain, tuple) else (plain,))
        assert parts.trainer[name] == settings.trainer[name]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipe_in_a_checkpoint_runs_nothing(plant: Callable[..., None], recipe: Callable[[], dict]) -> None:
    plant(recipe())
    if recipe().keys() & {"model", "model.config"}:  # the shape of the model is left out, and the default is another
        with pytest.raises(UserError, match=r"planted\.ckpt has another model"):
            load_settings(command_line())
    else:
        assert_settings_are_plain()
    assert not Path("harmed").exists()


MIXTURE = {
    "trainer.strategy": recipes.spec(recipes.DDP, ddp_comm_state=recipes.POPEN),
    "trainer.callbacks": [
        recipes.spec(recipes.LAMBDA, on_fit_start="recipes.harm", on_validation_start="recipes.harm")
    ],
    "trainer.logger": recipes.spec("recipes.HarmfulLogger"),
    "trainer.plugins": [recipes.spec("recipes.HarmfulPlugin")],
    "trainer.profiler": "recipes.HarmfulProfiler",
    "trainer.accelerator": "recipes.HarmfulAccelerator",
}


@pytest.mark.parametrize("command", recipes.COMMANDS)
def test_command_runs_nothing_of_a_checkpoint(
    fit: Fit, plant: Callable[..., None], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(MIXTURE)
    script, *words = recipes.COMMANDS[command]
    if command == "last":
        RUN.mkdir(parents=True)
        Path("planted.ckpt").rename(RUN / "last.ckpt")
    flags = ["--ckpt_path", "last" if command == "last" else "planted.ckpt"]
    if script == "fit.py":
        result = fit(*words, *flags, config=None)
        status, err = result.status, result.err
    else:
        status = generate_main([*words, *flags]) if script == "generate.py" else 0 * bool(build_run(flags, DEFAULT))
        err = capsys.readouterr().err
    assert (status, Path("harmed").exists()) == (0, False), err
    if script != "generate.py":  # which takes settings of the data only
        assert "left out of its config, which may only give plain values: --trainer." in err
        for name in MIXTURE:
            assert f"--{name}" in err or "and 1 more" in err


def test_hyperparameters_name_no_class_to_build(folder: Path, trained: Path) -> None:
    class WithAny(Module):
        def __init__(self, config: Any, extra: Any = None, **kwargs: Any) -> None:
            super().__init__(config, **kwargs)

    saved = torch.load(trained, weights_only=True)["hyper_parameters"]
    for instantiator in ("lightning.pytorch.cli.instantiate_module", "subprocess.Popen", "recipes.harm"):
        harmful = {**saved, "_instantiator": instantiator, "extra": recipes.POPEN}
        change(trained, hyper_parameters=harmful, hparams=harmful, module_arguments=harmful)
        assert isinstance(WithAny.load_from_checkpoint("planted.ckpt"), WithAny)
        assert isinstance(LitGPT.load_from_checkpoint("planted.ckpt"), LitGPT)
    assert not Path("harmed").exists()


@pytest.mark.parametrize("version", ["0.5.0", "1.0.0", "x", "2.6.6.x", ""])
def test_checkpoint_of_no_lightning_2_is_refused(fit: Fit, plant: Callable[..., None], version: Any) -> None:
    plant({})
    change(Path("planted.ckpt"), pytorch__lightning_version=version)
    assert_user_error(fit(*PLANTED, config=None), "wrote it, which is no version 2")


# ---------------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--config", str(ROOT / "configs" / "ddp.yaml")],
        ["--config", str(ROOT / "configs" / "fsdp.yaml")],
        ["--trainer.max_time", "00:01:00:00", "--data.columns", "1e3", "--trainer.devices", "[0]"],
        ["--trainer.strategy", "ddp", "--generate.prompts", "['*a', 'b: c', '1', '中文']", "--trainer.logger", "false"],
    ],
    ids=["small", "ddp", "fsdp", "texts like numbers", "prompts"],
)
def test_all_plain_settings_of_a_run_come_back(folder: Path, trained: Path, flags: list[str]) -> None:
    arguments = CommandLine(["fit", "--config", "small.yaml", *flags], DEFAULT)
    parser, settings, _ = load_settings(arguments)
    change(trained, config=parser.dump(settings, skip_unset=False))
    _, again, _ = load_settings(command_line())
    again.ckpt_path = None
    assert parser.dump(again, skip_unset=False) == parser.dump(settings, skip_unset=False)


def test_every_setting_is_taken_or_known_to_be_left_out() -> None:
    checks = setting_checks()
    known = set(build_parser("fit", "x").get_defaults().keys())
    own = {"trainer.default_root_dir"}  # depends on the checkpoint's path
    assert known - checks.keys() == NEVER_TAKEN | own
    assert checks.keys() - known == {"trainer.limit_predict_batches"}
    assert not checks.keys() & (NEVER_TAKEN | LINKED_SETTINGS.keys())
    for action in build_parser("fit", "x")._actions:
        names_class = re.search(r"lightning\.|Callable|object|Any", str(getattr(action, "_typehint", "")))
        if names_class and not action.dest.endswith(".help"):
            spec = {"class_path": "recipes.HarmfulCallback", "init_args": {}}
            check = checks.get(action.dest, lambda value: False)
            assert not any(check(value) for value in ("recipes.harm", spec, [spec], {"0": spec}, "planted.yaml")), (
                action
            )


@pytest.mark.parametrize("name", ["data.files", "data.val_files", "data.test_files", "data.tokenizer"])
def test_url_of_a_checkpoint_is_asked_for(plant: Callable[..., None], fit: Fit, name: str) -> None:
    plant({name: "memory://x.csv"})
    assert_user_error(fit(*PLANTED, config=None), f"--{name} is the URL memory://x.csv: give --{name} too")
    settings, left_out = take_settings(Checkpoint.open("planted.ckpt"), lambda key: key == name)
    assert left_out == []
    assert name.partition(".")[2] not in settings["data"]


def test_root_folder_comes_from_a_checkpoint_only_if_its_path_says_the_same(fit: Fit, folder: Path) -> None:
    assert fit("--trainer.default_root_dir", "runs").status == 0
    last = Path("runs/small/version_0/last.ckpt")
    result = fit("--ckpt_path", last, "--trainer.max_steps", 7, config=None)
    assert (result.status, result.err) == (0, "")
    assert "changed     trainer.default_root_dir" not in result.out
    assert yaml.safe_load(last.with_name("config.yaml").read_text("utf-8"))["trainer"]["default_root_dir"] == "runs"
    last.rename("moved.ckpt")
    result = fit("--ckpt_path", "moved.ckpt", "--trainer.max_steps", 8, config=None)
    assert result.status == 0
    assert "left out of its config, which may only give plain values: --trainer.default_root_dir; to" in result.err
    assert Path("logs/small/version_0").is_dir()


def test_setting_given_as_flag_is_not_reported(plant: Callable[..., None], fit: Fit) -> None:
    plant({"trainer.callbacks": [recipes.spec("recipes.HarmfulCallback")]})
    result = fit("validate", *PLANTED, "--trainer.callbacks", "LearningRateMonitor", config=None)
    assert (result.status, result.err) == (0, "")


# -------------------------------------------------------------------------------------------------- configs and flags


@pytest.mark.usefixtures("parser_settings")
def test_config_names_only_allowed_packages(fit: Fit, folder: Path) -> None:
    Path("overlay.yaml").write_text("trainer: {callbacks: {class_path: recipes.HarmfulCallback}}", encoding="utf-8")
    overlay = ["--config", "overlay.yaml"]
    message = "recipes.HarmfulCallback may not be imported: if you trust it, give --allow_imports recipes too"
    assert_user_error(fit(*overlay), message)
    assert not Path("harmed").exists()
    result = fit(*overlay, "--allow_imports", "[decimal, recipes]")
    assert (result.status, result.err) == (0, "")
    assert Path("harmed").exists()
    assert "allow_imports" not in (RUN / "config.yaml").read_text("utf-8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--trainer.callbacks", f"{{class_path: {recipes.LAMBDA}, init_args: {{on_fit_start: os.abort}}}}"],
            "os.abort",
        ),
        (
            [
                "--trainer.callbacks",
                f"{{class_path: {recipes.LAMBDA}, init_args: {{on_fit_start: torch.hub.os.abort}}}}",
            ],
            "",
        ),
        (["--trainer.callbacks", f"{{class_path: {recipes.LAMBDA}, init_args: {{on_fit_start: torch.load}}}}"], ""),
        (["--trainer.strategy", str(MIXTURE["trainer.strategy"])], "subprocess.Popen may not be imported"),
        (["--allow_imports", "jsonargparse"], "--allow_imports jsonargparse: give names of packages"),
        (["--allow_imports", "a b"], "--allow_imports a b: give names of packages"),
        (["--allow_imports"], "give names of packages"),
    ],
)
@pytest.mark.usefixtures("parser_settings")
def test_flag_names_only_allowed_packages(fit: Fit, flags: list[str], message: str) -> None:
    assert_user_error(fit(*flags), message or "may not be imported: if you trust it, give --allow_imports torch.")


def test_packages_are_not_allowed_by_a_config(fit: Fit) -> None:
    Path("overlay.yaml").write_text("allow_imports: [recipes]", encoding="utf-8")
    assert_user_error(fit("--config", "overlay.yaml"), "allow_imports says what configs may import: give it as a flag")


# --------------------------------------------------------------------------------------------------------------- YAML

LEVELS = "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12))
BOMBS = {
    "aliases of aliases": (f"a: &a [{', '.join(['x'] * 9)}]\n{LEVELS}", "aliases (*a) are not supported"),
    "alias of itself": ("data: &a {files: *a}", "aliases (*a) are not supported"),
    "aliases in a text": ("trainer: {max_steps: '[&a [1], *a]'}\ndata: {files: rows.txt}", ""),
    "brackets": ("data: " + "[" * 100_000, ""),
    "levels": ("".join(f"{' ' * i}a:\n" for i in range(500)), "more than 30 levels: give fewer"),
    "long list": (f"data: {{files: [{'a,' * 100_000}]}}", "more than 5,000 keys and values: give fewer"),
    "long text": (f"name: {'a' * 1_000_000}", "more than 500,000 characters: give fewer"),
    "long number": (f"seed_everything: {'9' * 10_000}", "a number of 10,000 digits"),
    "long number of base 60": (f"seed_everything: {'1:' * 100_000}1", "a number of 200,001 digits"),
    "tag that does not fit": ("seed_everything: !!bool x", ""),
    "date that does not exist": ("name: !!timestamp 2001-99-99", ""),
    "code": ("name: !!python/object/apply:os.system ['touch harmed']", ""),
}


@pytest.fixture
def within_limits() -> Iterator[None]:
    """Check that a test takes at most 2 s, and at most 200 MB more than this process has ever had."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    yield
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 2
    assert after.ru_maxrss - before.ru_maxrss < 200_000  # KB


@pytest.mark.parametrize("in_checkpoint", [False, True], ids=["config", "checkpoint"])
@pytest.mark.parametrize(("text", "message"), BOMBS.values(), ids=BOMBS)
@pytest.mark.usefixtures("within_limits")
def test_yaml_bomb_is_refused(fit: Fit, trained: Path, text: str, message: str, in_checkpoint: bool) -> None:
    if in_checkpoint:
        change(trained, config=text)
        result = fit(*PLANTED, config=None)
    else:
        Path("overlay.yaml").write_text(text, encoding="utf-8")
        result = fit("--config", "overlay.yaml")
    assert result.status == 2
    assert message in result.err
    assert len(result.err) < 500
    assert result.err.splitlines()[-1].startswith("error: ")
    assert not Path("harmed").exists()


@pytest.mark.parametrize("config", ["", "- a", "a", "5", "null"])
def test_checkpoint_without_a_config_is_refused(fit: Fit, trained: Path, config: Any) -> None:
    change(trained, config=config)
    assert_user_error(fit(*PLANTED, config=None), ": give --config")


def test_written_yaml_has_no_aliases_and_reads_back() -> None:
    shared = [
        "1e3",
        "1:2",
        "",
        "*a",
        "a: b",
        "line\nline\n",
        "\x7f\u2028\U0001f600'\"",
        "null",
        "9" * 150,
        " - x",
        "---\n",
    ]
    settings = {"one": shared, "other": shared, "numbers": [1, 2.5, 1e-5, None, True], "in": {"one": {"a": shared}}}
    assert not any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(dump_yaml(settings)))
    assert load_yaml(dump_yaml(settings)) == settings
