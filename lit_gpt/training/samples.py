"""What a person watches of a run: its curves, its progress, its speed, and the text it writes."""

import textwrap
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_gpt.errors import UserError
from lit_gpt.inference.generate import generate, prompt_tokens, shown
from lit_gpt.inference.sampling import check_sampling
from lit_gpt.training.logger import StepLogger
from lit_gpt.training.module import parts


class GenerateText(Callback):
    """Writes text at the start, at validations and at the end: to the console and to TensorBoard, under `samples/`.

    It draws from a generator of its own, so that a run's losses are the same with and without it.

    Args:
        prompts: what to go on from; [] for no text at all.
        num_samples: texts a prompt.
        max_new_tokens: their length at most.
        temperature: 0 takes the likeliest token always.
        top_k: draw among the k likeliest tokens only.
    """

    def __init__(
        self,
        prompts: list[str] | str = "",
        num_samples: int = 3,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_k: int | None = None,
    ) -> None:
        if num_samples < 1 or max_new_tokens < 1:
            raise UserError(
                f"--generate.num_samples is {num_samples} and --generate.max_new_tokens {max_new_tokens}: "
                "give 1 or more; --generate.prompts [] turns the texts off"
            )
        check_sampling(temperature, top_k)
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        self.num_samples = num_samples
        self.sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
        }
        self._written_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is None:
            self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _, data = parts(trainer)
        if self._written_step != trainer.global_step == data.max_steps:  # not where a run is only interrupted
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        """Every rank draws the same texts, since the model may be spread over them; the first one shows them."""
        step = self._written_step = trainer.global_step
        for number, prompt in enumerate(self.prompts, start=1):
            texts = [shown(text) for text in self.generate_texts(trainer, prompt)]
            if not trainer.is_global_zero:
                continue
            between = "\n\n" if any("\n" in text for text in texts) else "\n"
            bar = trainer.progress_bar_callback
            (print if bar is None else bar.print)(between.join(textwrap.indent(text, "  | ", bool) for text in texts))
            if isinstance(trainer.logger, StepLogger):
                markdown = "\n\n".join(f"```\n{text}\n```" for text in texts)
                trainer.logger.experiment.add_text(f"samples/prompt_{number}", markdown, step)

    def generate_texts(self, trainer: Trainer, prompt: str) -> list[str]:
        """`num_samples` texts, prompts included; they depend on the weights, the seed and the step alone."""
        module, data = parts(trainer)
        generator = torch.Generator(device=module.device).manual_seed(data.seed + trainer.global_step)
        rows = data.corpus_config.reading.mode == "rows"
        start = prompt_tokens(data.tokenizer, prompt, rows)
        end = data.tokenizer.end_of_text if rows else None
        was_training = module.gpt.training
        module.gpt.eval()
        # compiled blocks would be compiled anew for every length of the cache, and in the end for training no more
        with torch.compiler.set_stance("force_eager"):
            written = generate(module.gpt, [start] * self.num_samples, end=end, generator=generator, **self.sampling)
        module.gpt.train(was_training)
        return [prompt + data.tokenizer.decode(row) for row in written]
