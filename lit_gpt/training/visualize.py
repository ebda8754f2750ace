"""Show in TensorBoard what a model has learned: `--visualize true`."""

import itertools
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.inference.attention_maps import attention_maps, check_heads, shown_heads
from lit_gpt.inference.generate import encode_prompt
from lit_gpt.inference.next_tokens import decode_beginning, likeliest_next_tokens
from lit_gpt.inference.token_texts import token_texts, visible_text
from lit_gpt.model import GPT
from lit_gpt.sharding import is_sharded
from lit_gpt.training.logger import StepLogger, step_logger
from lit_gpt.training.metrics import PositionLoss, sum_dtype
from lit_gpt.training.module import module_and_data
from lit_gpt.training.pictures import AttentionPicture, Bars, Picture, draw_bars, draw_curve, percent
from lit_gpt.training.projector import write_projector

NUM_LIKELIEST = 10  # next tokens of each prompt
PROMPT_CHARACTERS = 60  # of a prompt that are shown, its last ones
MAX_PROMPTS = 4  # in the picture of next tokens, the text of the validation split included
ATTENTION_TOKENS = 18  # of the text whose attention is shown: more would have no place for their texts
HISTOGRAM_BLOCKS = 4  # of which weights and gradients are shown
MAX_HISTOGRAM_VALUES = 2**14  # of each matrix, evenly spaced: counting them all would take ten times as long


class Visualize(Callback):
    """Log pictures of the model to TensorBoard at every validation, and its embedding at the end of the run.

    What is logged, all under `visualize/` but for the histograms::

        next_token         the ten likeliest next tokens of each prompt, as bars and as a table
        attention          the attention weights of some heads, on one text of the validation split
        loss_by_position   the loss at each position of the window, on all validation windows
        weights, gradients a histogram for each matrix of some blocks; the gradients are those of the last step
        projector          the vectors of the most frequent tokens, for the embedding projector

    Nothing is drawn at random, so a run has the same weights and the same curves with and without it. Without a
    StepLogger it does nothing. If the model is sharded, each device has only a part of the weights: then next tokens
    and the loss by position alone are logged.

    Args:
        prompts: Texts whose next token is shown, as `GenerateText` has them.
        heads: The heads whose attention is shown, as (block, head), both counted from 0. None: the first four of the
            first block and of the last one; []: none.
    """

    def __init__(self, prompts: list[str], heads: list[list[int]] | None = None) -> None:
        self.prompts, self.heads = prompts, heads
        self._position_loss: PositionLoss | None = None
        self._matrices: list[tuple[str, torch.nn.Parameter]] = []  # those with histograms; none if the model is sharded
        self._gradients: list[Tensor | None] = []  # theirs in the last step, until the next one begins
        self._attention_picture: AttentionPicture | None = None

    # ------------------------------------------------------------------------------------------ hooks of the Trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        module, _ = module_and_data(trainer)
        check_heads(self.heads, module.gpt.config)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, _ = module_and_data(trainer)
        if trainer.is_global_zero and step_logger(trainer) is not None and not is_sharded(module.gpt):
            self._matrices = shown_matrices(module.gpt)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._gradients = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        # LitGPT drops the gradients after this hook, when it is not known yet whether a validation follows.
        self._gradients = [p.grad for _, p in self._matrices]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, data = module_and_data(trainer)
        if self._is_active(trainer):
            device = module.device
            self._position_loss = PositionLoss(data.context_length, sum_dtype(device)).to(device)
            module.receive_token_losses = self._position_loss.update

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logger = step_logger(trainer)
        if not self._is_active(trainer) or logger is None or self._position_loss is None:
            return
        module, _ = module_and_data(trainer)
        module.receive_token_losses = None
        # collective; torchmetrics returns a number if there is one position
        losses = np.atleast_1d(self._position_loss.compute().cpu().numpy())
        self._log_losses(trainer, logger, losses)
        was_training = module.gpt.training
        module.gpt.eval()
        # a compiled block would compile again for texts of other lengths
        with torch.compiler.set_stance("force_eager"):
            if is_sharded(module.gpt):  # all ranks compute together
                self._log_next_tokens(trainer, logger)
            elif trainer.is_global_zero:
                self._log_next_tokens(trainer, logger)
                self._log_attention(trainer, logger)
                self._log_histograms(trainer, logger)
        module.gpt.train(was_training)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, data = module_and_data(trainer)
        if (logger := step_logger(trainer)) is None or not trainer.is_global_zero or is_sharded(module.gpt):
            return
        embedding = module.gpt.embedding.weight.detach().float().cpu().numpy()
        write_projector(Path(logger.log_dir), data.tokenizer, data.train_ids, embedding)

    def _is_active(self, trainer: Trainer) -> bool:
        return trainer.state.fn == "fit" and not trainer.sanity_checking and step_logger(trainer) is not None

    # ---------------------------------------------------------------------------------------------- what is logged

    def _log_losses(self, trainer: Trainer, logger: StepLogger, losses: np.ndarray) -> None:
        """Log the loss by position; collective, because Lightning sums metrics over the ranks where they are read."""
        mean = float(trainer.callback_metrics["loss/val"])
        if trainer.is_global_zero:
            header = "Loss by position in the window: nats a token, on the validation windows"
            picture = draw_curve(header, "tokens of context (logarithmic)", losses, mean, f"loss/val {mean:.4f}")
            log_picture(logger, "loss_by_position", picture, trainer.global_step)

    def _log_next_tokens(self, trainer: Trainer, logger: StepLogger) -> None:
        """Log the likeliest next tokens of all prompts; collective if the model is sharded."""
        module, data = module_and_data(trainer)
        mode = data.corpus_config.read_options.mode
        own = [(prompt, encode_prompt(data.tokenizer, prompt, mode), None) for prompt in self.prompts]
        panels = []
        for prompt, ids, following in [*own[: MAX_PROMPTS - 1], validation_prompt(data)]:
            likeliest = likeliest_next_tokens(module.gpt, data.tokenizer, ids, NUM_LIKELIEST, also=following)
            bars = [(after.text, after.probability, after.token == following) for after in likeliest]
            panels.append(Bars(prompt_title(prompt), bars))
        if trainer.is_global_zero:
            header = "The likeliest next tokens. Orange: what follows in the text of the validation split"
            log_picture(logger, "next_token", draw_bars(header, panels), trainer.global_step)
            logger.log_text("visualize/next_token", markdown_table(panels), trainer.global_step)

    def _log_attention(self, trainer: Trainer, logger: StepLogger) -> None:
        module, data = module_and_data(trainer)
        heads = shown_heads(self.heads, module.gpt.config)
        if not heads:
            return
        ids = data.val_ids[np.arange(min(ATTENTION_TOKENS, data.context_length))].astype(np.int64)
        tokens = torch.from_numpy(ids).to(module.device)  # (T,)
        documents = (tokens == data.tokenizer.end_of_text).cumsum(0) if data.document_mask else None
        maps = attention_maps(module.gpt, tokens, documents).cpu().numpy()  # (blocks, H, T, T)
        labels = token_texts(data.tokenizer, ids.tolist())
        if self._attention_picture is None:
            self._attention_picture = AttentionPicture(labels, [f"block {block}, head {head}" for block, head in heads])
        picture = self._attention_picture.draw(np.stack([maps[block, head] for block, head in heads]))
        log_picture(logger, "attention", picture, trainer.global_step)
        if not self._attention_picture.has_texts:
            tokens_text = ", ".join(f"{number} {literal(text)}" for number, text in enumerate(labels, 1))
            logger.log_text("visualize/attention", tokens_text, trainer.global_step)

    def _log_histograms(self, trainer: Trainer, logger: StepLogger) -> None:
        tensors = {f"weights/{name}": p.detach() for name, p in self._matrices}
        for (name, _), gradient in zip(self._matrices, self._gradients):  # none of the untrained model
            if gradient is not None:
                tensors[f"gradients/{name}"] = gradient
        values = {tag: spread_values(x) for tag, x in tensors.items()}
        logger.log_histograms({tag: some for tag, some in values.items() if len(some)}, trainer.global_step)


def log_picture(logger: StepLogger, name: str, picture: Picture, step: int) -> None:
    """Log a picture under `visualize/`."""
    logger.log_image(f"visualize/{name}", picture.png, picture.width, picture.height, step)


# --------------------------------------------------------------------------------------------------------- next tokens


def validation_prompt(data: TextDataModule) -> tuple[str, list[int], int]:
    """Return the first half of the first text of the validation split: its text, its ids, and the id that follows."""
    end, tokenizer = data.tokenizer.end_of_text, data.tokenizer
    ids: list[int] = data.val_ids[np.arange(data.context_length + 1)].tolist()  # the split has more than a window
    length = ids.index(end) if end in ids[1:] and ids[0] != end else len(ids)
    half = max(1, length // 2)
    while half < length - 1 and not decode_beginning(b"".join(map(tokenizer.token_bytes, ids[:half])))[1]:
        half += 1  # to the end of a character
    beginning = [end] if data.corpus_config.read_options.mode == "rows" else []
    return tokenizer.decode(ids[:half]), [*beginning, *ids[:half]], ids[half]


def prompt_title(prompt: str) -> str:
    """Return the title of the tokens that follow a prompt."""
    if not prompt:
        return "at the beginning of a text"
    shown = prompt if len(prompt) <= PROMPT_CHARACTERS else f"…{prompt[-PROMPT_CHARACTERS:]}"
    return f"after {visible_text(shown)}"


def markdown_table(panels: list[Bars]) -> str:
    """Return the bars as a table: two columns for each panel."""
    head = "".join(f"| {literal(panel.title)} | |" for panel in panels).replace("||", "|")
    lines = [head, "|" + " :--- | ---: |" * len(panels)]
    for row in itertools.zip_longest(*(panel.bars for panel in panels)):
        cells = ("  |  |" if bar is None else f" {literal(bar[0])} | {percent(bar[1])} |" for bar in row)
        lines.append("|" + "".join(cells))
    return "\n".join(lines)


def literal(text: str) -> str:
    """Return a text as Markdown that shows it as it is: ASCII punctuation becomes entities."""
    return "".join(f"&#{ord(char)};" if char in string.punctuation else char for char in text)


# ---------------------------------------------------------------------------------------------------------- matrices


def shown_matrices(gpt: GPT) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the matrices of which histograms are drawn: those outside of the blocks, and those of a few blocks."""
    last = gpt.config.num_blocks - 1
    blocks = {round(last * number / (HISTOGRAM_BLOCKS - 1)) for number in range(HISTOGRAM_BLOCKS)}
    hidden = tuple(f"blocks.{block}." for block in range(last + 1) if block not in blocks)
    matrices = [(name, p) for name, p in gpt.named_parameters() if p.ndim > 1 and not name.startswith(hidden)]
    return [(name.removesuffix(".weight"), p) for name, p in matrices]


def spread_values(x: Tensor) -> np.ndarray:
    """Return at most `MAX_HISTOGRAM_VALUES` values of a tensor, evenly spaced, as float32; only those that are finite.

    With `--trainer.precision 16-mixed`, gradients may overflow: the step is then not taken.
    """
    flat = x.flatten()
    values = flat[:: -(-len(flat) // MAX_HISTOGRAM_VALUES)].float().cpu().numpy()
    return values[np.isfinite(values)]
