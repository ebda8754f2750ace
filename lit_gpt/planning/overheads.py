"""The time that a run takes outside of its training steps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Overheads:
    """Seconds that a run takes outside of its training steps and validations.

    Attributes:
        begin: From the tokenized text to the first step: objects, the folder of the run, the first checkpoint.
        sample: A group of sample texts.
        checkpoint: A checkpoint, of a model of a few million parameters.
        end: After the last checkpoint: the report, and the end of the process.
    """

    begin: float = 1.0
    sample: float = 0.5
    checkpoint: float = 0.1
    end: float = 1.0
