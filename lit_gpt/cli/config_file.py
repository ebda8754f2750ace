"""Read a config, and check it for what the parser would ignore."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lit_gpt.cli.config_values import get_setting, has_setting
from lit_gpt.cli.text_settings import keep_texts
from lit_gpt.cli.yaml_text import MAX_CHARACTERS, LimitError, StrictLoader, check_limits
from lit_gpt.errors import UserError, did_you_mean

SECTIONS = ("data", "model", "trainer", "generate", "checkpoint", "early_stopping")

# Settings that the parser derives from others, and from which.
LINKED_SETTINGS = {
    "model.config.vocab_size": "the tokenizer (data.tokenizer, data.vocab)",
    "data.context_length": "model.config.context_length",
    "data.seed": "seed_everything",
}


def read_config(path: Path) -> dict[str, Any]:
    """Read a config and check it for errors that the parser would ignore. Text settings are the texts that it has.

    Raises:
        UserError: The file does not exist, is not valid YAML, gives a key twice, has a section that is not a mapping, a
            key with dots, or a setting that the parser derives from others or that is a flag only.
    """
    if not path.is_file():
        others = [str(other) for other in path.parent.glob("*.yaml")]
        raise UserError(f"--config {path}: no such file{did_you_mean(str(path), others)}")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
        check_limits(text)
        loader = StrictLoader(text)
        root = loader.get_single_node()
        keep_texts(root, text, str(path))
        config: Any = loader.construct_document(root) if root else None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror}): give yourself the permission") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        remedy = "" if isinstance(error, LimitError) else ": correct the YAML"
        raise UserError(f"{path}{line}: {error.problem}{remedy}") from None
    except Exception:  # bytes that are not UTF-8, or one of the many errors of PyYAML for a value that does not fit
        raise UserError(f"{path} is not YAML in UTF-8: give a config such as configs/default.yaml") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} has no settings: write them as `trainer:` and, below it, `max_steps: 100`")
    for key in (*SECTIONS, "model.config"):
        section = get_setting(config, key, default={})
        if not isinstance(section, dict):
            raise UserError(f"{path}: {key} is {section!r}: write its settings below it, one `name: value` a line")
    for dotted in _find_dotted_keys(config):
        raise UserError(f"{path}: {dotted}: write it as {': '.join(dotted.split('.'))}, key below key")
    if "allow_imports" in config:
        raise UserError(f"{path}: allow_imports says what configs may import: give it as a flag, --allow_imports NAME")
    for key, value in (("budget", "10m"), ("plan", "")):
        if config.get(key):  # --print_config shows null and false
            flag = f"--{key} {value}".strip()
            raise UserError(f"{path}: {key} holds for one command only: give it as a flag, {flag}")
    for key, origin in LINKED_SETTINGS.items():
        if has_setting(config, key):
            raise UserError(f"{path}: {key} follows from {origin}: remove it")
    return config


def _find_dotted_keys(config: dict[Any, Any]) -> Iterator[str]:
    """Yield all keys with a dot. The parser accepts them as nested keys, but the checks of this module do not."""
    for key, value in config.items():
        if "." in str(key):
            yield str(key)
        if isinstance(value, dict):
            yield from _find_dotted_keys(value)
