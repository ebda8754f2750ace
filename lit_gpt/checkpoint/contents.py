"""What a checkpoint contains: which keys it has, and values of which types."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lit_gpt.checkpoint.archive import Refused

Check = Callable[[Any], bool]

# The keys that every checkpoint of this project has, and the types of their values.
REQUIRED_KEYS = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "tokenizer": dict,
    "data": dict,
    "global_step": int,
    "saved_at": float,
}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_amount(value: Any) -> bool:
    return type(value) is float and math.isfinite(value) and value >= 0


def _dict_of(is_key: Check, is_value: Check = lambda value: True) -> Check:
    return lambda value: isinstance(value, dict) and all(is_key(k) and is_value(v) for k, v in value.items())


def _list_of(is_item: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(is_item, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _is_float(value: Any) -> bool:
    return type(value) is float


def _is_scheduler(value: Any) -> bool:
    """Whether it is the state of a LambdaLR: numbers, and lists of one value for each group of parameters.

    LambdaLR sets an attribute of itself for each key, so none may be the name of a method, or of its optimizer.
    """
    lists = ("lr", "lrs", "lambdas")
    if not _dict_of(_is_text)(value) or any(key == "optimizer" or callable(getattr(LambdaLR, key, 0)) for key in value):
        return False
    return all(
        isinstance(item, list) if key.endswith(lists) else isinstance(item, bool | int | float)
        for key, item in value.items()
    )


def _is_optimizer_state(value: Any) -> bool:
    if not isinstance(value, dict) or not _list_of(_is_dict)(value.get("param_groups")):
        return False
    is_value = _dict_of(_is_text, lambda item: isinstance(item, Tensor) or _is_scalar(item))
    return _dict_of(_is_count, is_value)(value.get("state"))


# What is known of the values of these keys, and of others that a checkpoint may have.
CHECKS: dict[str, Check] = {
    "state_dict": _dict_of(_is_text, _is_weight),
    "hyper_parameters": _dict_of(_is_text),
    "tokenizer": _dict_of(_is_text),
    "data": _dict_of(_is_text, _is_scalar),
    "global_step": _is_count,
    "saved_at": _is_amount,
    "config": lambda value: value is None or _is_text(value),
    "callbacks": _dict_of(_is_text),
    "callback_metrics": _dict_of(_is_text, _is_float),
    "events": _dict_of(_is_text, _is_count),
    "run_totals": _dict_of(_is_text, _is_amount),
    "epoch": _is_count,
    "loops": _is_dict,
    "optimizer_states": _list_of(_is_optimizer_state),
    "lr_schedulers": _list_of(_is_scheduler),
    "pytorch-lightning_version": _is_text,
}


def check_contents(contents: Any, stored_bytes: int) -> None:
    """Check the parts of a checkpoint that this project reads. There may be others, of callbacks for example.

    Args:
        contents: What the file holds, with tensors on any device.
        stored_bytes: The size of the file, or of all files of a folder.

    Raises:
        Refused: A part is missing or has another type, or the tensors are larger than the file.
    """
    if not isinstance(contents, dict) or not REQUIRED_KEYS.keys() <= contents.keys():
        raise Refused("is not a checkpoint of lit_gpt")
    for key, is_valid in CHECKS.items():
        if key in contents and not is_valid(contents[key]):
            raise Refused(f"is not a checkpoint of lit_gpt: its {key} is damaged")
    states = [contents["state_dict"]]
    for optimizer in contents.get("optimizer_states", []):
        states += optimizer["state"].values()
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    if sum(tensor.nbytes for tensor in tensors) > 2 * stored_bytes:  # tied weights count twice
        raise Refused("is not a checkpoint of lit_gpt: its tensors are larger than the file")
