"""The time that a run takes outside of its training steps and the batches of its validations."""

from dataclasses import dataclass

from lit_gpt.model import GPTConfig

# CPU seconds on the machine of docs/planning.md, of models with 0.1M and 7M parameters.
BEGIN_SECONDS, END_SECONDS = 0.3, 0.7
SECONDS_PER_PARAMETER = 3e-8  # of best.ckpt and last.ckpt together
SECONDS_PER_TOKEN_AND_BLOCK, SECONDS_PER_WIDTH = 2.4e-4, 4.2e-6  # of five texts side by side


@dataclass(frozen=True)
class Overheads:
    """What a run does beside training and validating, on a machine of a certain speed.

    Attributes:
        slowness: How many times as long as on the machine of docs/planning.md everything takes.
    """

    slowness: float = 1.0

    @property
    def begin(self) -> float:
        """The seconds from the tokenized text to the first step: objects, the folder of the run, a checkpoint."""
        return self.slowness * BEGIN_SECONDS

    @property
    def end(self) -> float:
        """The seconds after the last checkpoint: the report, and the end of the process."""
        return self.slowness * END_SECONDS

    def checkpoints(self, parameters: int) -> float:
        """Return the seconds to write best.ckpt and last.ckpt after a validation."""
        return self.slowness * (0.02 + SECONDS_PER_PARAMETER * parameters)

    def samples(self, config: GPTConfig, tokens: int = 64) -> float:
        """Return the seconds for the texts that are generated after each validation.

        Args:
            config: The shape of the model.
            tokens: The length of each text, `generate.max_new_tokens`.
        """
        per_block = SECONDS_PER_TOKEN_AND_BLOCK + SECONDS_PER_WIDTH * config.d_model
        return self.slowness * tokens * config.num_blocks * per_block
