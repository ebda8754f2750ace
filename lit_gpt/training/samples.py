"""Generate text during training."""

import os
import re
import sys
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from lit_gpt.data.read_options import unescape
from lit_gpt.errors import UserError
from lit_gpt.inference.generate import check_sampling, encode_prompt, generate
from lit_gpt.inference.utf8 import utf8_constraint
from lit_gpt.lines import COLUMNS, INDENT, cut_line, wrap_text
from lit_gpt.printable import escape_controls
from lit_gpt.training.checkpointing import has_finite_weights
from lit_gpt.training.logger import step_logger
from lit_gpt.training.module import module_and_data
from lit_gpt.training.progress import StepProgress

MARGIN = "  | "  # before each line of a sample


def sample_lines(prompt: str, texts: list[str], is_untrained: bool, columns: int = COLUMNS) -> list[str]:
    """Return the printed lines of a group of samples: which prompt they continue, and the texts.

    Args:
        prompt: What each of them begins with.
        texts: The samples.
        is_untrained: Whether the model has not been trained: of its texts only what fits on one line is shown.
        columns: The columns of a line.
    """
    untrained = "of the untrained model, " if is_untrained else ""
    start = f"continuing {prompt!r}" if prompt else "without a prompt"
    lines = [cut_line(escape_controls(f"{'samples':{len(INDENT)}}{untrained}{start}"), columns)]
    if is_untrained:
        return lines + [cut_line(f"{MARGIN}{escape_controls(text)}", columns).rstrip() for text in texts]
    has_line_ends = any("\n" in text for text in texts)
    for number, text in enumerate(texts):
        lines += [""] if number and has_line_ends else []
        lines += wrap_text(text, MARGIN)
    return lines


def sample_markdown(prompt: str, texts: list[str], step: int) -> str:
    """Return a group of samples as TensorBoard shows them: the step, the prompt, and each text as a block of code."""
    start = f"continuing {prompt!r}" if prompt else "without a prompt"
    heading = re.sub(r"([\\`*_{}\[\]<>#])", r"\\\1", escape_controls(f"step {step:,}, {start}"))
    longest = max((len(backticks) for text in texts for backticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)  # a shorter line of them in a text does not end its block
    return "\n\n".join([heading, *(f"{fence}\n{text}\n{fence}" for text in texts)])


def terminal_columns() -> int:
    """Return the columns of the lines on stdout: 80, or fewer in a narrower terminal."""
    try:
        return min(COLUMNS, os.get_terminal_size(sys.stdout.fileno()).columns or COLUMNS)
    except (OSError, ValueError, AttributeError):  # no terminal, a closed stream, or none
        return COLUMNS


class GenerateText(Callback):
    """Generate text at the start, after every validation and at the end of a run.

    The text is printed, and logged to TensorBoard under `samples/`. It is sampled with a generator of its own, so the
    losses of a run are the same with and without it.

    Args:
        prompts: Texts to continue. `\\n` and `\\t` may be typed as two characters. [] turns text generation off.
        num_samples: Texts for each prompt.
        max_new_tokens: Tokens of the longest text, without its prompt.
        temperature: Divides the logits. 0 always takes the likeliest token.
        top_k: Draw from the k likeliest tokens only.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(
        self,
        prompts: list[str] | str = "",
        num_samples: int = 5,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_k: int | None = None,
    ) -> None:
        if num_samples < 1 or max_new_tokens < 1:
            raise UserError(
                f"--generate.num_samples is {num_samples} and --generate.max_new_tokens is {max_new_tokens}: "
                "give 1 or more; --generate.prompts [] turns text generation off"
            )
        check_sampling(temperature, top_k)
        self.prompts = [unescape(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        self.num_samples = num_samples
        self.sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
        }
        self._last_step = -1  # the step of the last generated text

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_new_run = trainer.global_step == 0 and trainer.ckpt_path is None
        if is_new_run and self._last_step < 0:  # the untrained model has not been validated
            self._generate_and_log(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._generate_and_log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, data = module_and_data(trainer)
        was_interrupted = trainer.global_step != data.plan.last_step
        if self._last_step == trainer.global_step or was_interrupted:
            return
        if has_finite_weights(module):  # else nothing can be drawn, and the checkpoint callback ends the run
            self._generate_and_log(trainer)

    def _generate_and_log(self, trainer: Trainer) -> None:
        """Generate texts on every rank, because the model may be sharded over the ranks; print and log on rank 0."""
        step = self._last_step = trainer.global_step
        is_untrained = step == 0 and module_and_data(trainer)[0].hparams["init_from"] is None
        for number, prompt in enumerate(self.prompts, start=1):
            texts = [escape_controls(text, keep="\n\t") for text in self.generate_texts(trainer, prompt)]
            if not trainer.is_global_zero:
                continue
            progress_bar = trainer.progress_bar_callback
            print_text = tqdm.write if progress_bar is None else progress_bar.print
            print_text("\n".join(sample_lines(prompt, texts, is_untrained, terminal_columns())))
            if (logger := step_logger(trainer)) is not None:
                logger.log_text(f"samples/prompt_{number}", sample_markdown(prompt, texts, step), step)

    def generate_texts(self, trainer: Trainer, prompt: str) -> list[str]:
        """Return `num_samples` texts, each with its prompt. They depend only on the weights, the seed and the step."""
        module, data = module_and_data(trainer)
        generator = torch.Generator(device=module.device).manual_seed(data.seed + trainer.global_step)
        mode = data.corpus_config.read_options.mode
        prompt_ids = encode_prompt(data.tokenizer, prompt, mode)
        end = data.tokenizer.end_of_text if mode == "rows" else None
        sampling = {**self.sampling, "constraint": utf8_constraint(module.gpt, data.tokenizer)}
        progress_bar = trainer.progress_bar_callback
        if isinstance(progress_bar, StepProgress):
            sampling["track"] = partial(progress_bar.track_sampling, total=self.sampling["max_new_tokens"])
        was_training = module.gpt.training
        module.gpt.eval()
        # A compiled block recompiles for every length of the KV cache. At the recompile limit, torch.compile would run
        # training eagerly too.
        with torch.compiler.set_stance("force_eager"):
            samples = generate(module.gpt, [prompt_ids] * self.num_samples, end=end, generator=generator, **sampling)
        module.gpt.train(was_training)
        return [prompt + data.tokenizer.decode(ids) for ids in samples]
