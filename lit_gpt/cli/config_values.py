"""Read and remove settings, as "data.columns", in a config, which is a dictionary of dictionaries."""

from typing import Any

_MISSING = object()


def get_setting(config: dict[str, Any], key: str, default: Any = None) -> Any:
    """Return `config["a"]["b"]` for the key "a.b", or a default if there is no such value."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return default
        value = value[part]
    return value


def has_setting(config: dict[str, Any], key: str) -> bool:
    """Return whether a config has a setting, which may be None."""
    return get_setting(config, key, _MISSING) is not _MISSING


def pop_setting(config: dict[str, Any], key: str) -> Any:
    """Remove a setting from a config that has it, and its section if that is empty then; return its value."""
    name, _, rest = key.partition(".")
    if not rest:
        return config.pop(name)
    value = pop_setting(config[name], rest)
    if not config[name]:
        del config[name]
    return value


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"model.a": 1}` for `{"model": {"a": 1}}`, without keys whose value is None.

    Values of types that TensorBoard does not accept become strings.
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif value is not None:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
