"""What every export target offers."""

from collections.abc import Callable
from dataclasses import dataclass

from lit_gpt.convert.parity import Parity


@dataclass(frozen=True)
class Target:
    """An export target.

    Attributes:
        write: (model, tokenizer, mode, path, dtype): write the file or folder `path`, and what belongs beside it.
            Raises UserError before a byte is written where the target cannot express the model.
        check: (model, tokenizer, mode, path, texts, dtype) -> Parity: compare what was written with the model.
            Raises ParityError where they differ.
        dtypes: The number formats of the weights; the first is the default.
        opens: What opens the result, in a few words.
        suffix: Of the file's name; "": the result is a folder.
        suffixes_beside: Of the names of files that appear beside it.
    """

    write: Callable[..., None]
    check: Callable[..., Parity]
    dtypes: tuple[str, ...]
    opens: str
    suffix: str = ""
    suffixes_beside: tuple[str, ...] = ()
