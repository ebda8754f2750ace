"""A table of text as Lightning wants it: batches of `(tokens, targets)`, each (B, T) int64."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from lit_gpt.data.batches import Batch, BatchLoader, EvaluationBatches, TrainBatches, skip_worker_seeding
from lit_gpt.data.config import CorpusConfig, SplitOptions
from lit_gpt.data.corpus import Corpus, open_corpus
from lit_gpt.data.read_options import Mode, ReadOptions
from lit_gpt.data.sample import SAMPLE_COLUMN, SAMPLE_FILE, write_sample
from lit_gpt.data.shards import ShardedArray, TokenIds
from lit_gpt.data.sources import Source, check_no_duplicates, find_sources
from lit_gpt.data.windows import count_windows, evaluation_starts
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Tokenizer, Vocab, check_tokenizer

CACHE = Path("data/cache")
TRAINING_WINDOWS = 256  # most of training that are evaluated beside a whole validation split


class TextDataModule(LightningDataModule):
    """Reads files, splits them, and samples windows of them.

    Args:
        files: paths, URLs or globs: .csv .tsv .txt .jsonl .parquet, all but the last also .gz or .zst; in raw mode any
            text.
        mode: "rows": every row is a document; "raw": a file is one text.
        columns: of a table, the columns (JSONL: fields) a document takes; not needed where there is one. The built-in
            table's default is `name`.
        template: how columns are put together instead, as "{title}\\n{text}".
        delimiter: between columns; a comma if left out, in .tsv a tab.
        quote: what a field may stand in, to hold delimiters and line ends; "none": quotes are text.
        header: whether the first row names the columns; without it they are c1, c2, …
        encoding: of text files, as gb18030; "auto": looked for in each.
        tokenizer: cl100k_base, byte, char, bpe (learned from the text), gpt2, o200k_base, or a .tiktoken file.
        vocab: of a byte-pair vocabulary not learned from the text: "pruned" to what the corpus uses, or "full".
        vocab_size: of the one that is learned, bpe.
        context_length: T, the model's; linked to model.config.context_length.
        batch_size: windows per device per forward.
        global_batch_size: windows per optimizer step over all devices; accumulation follows from it.
        sampling: "random" windows with replacement, or "shuffled": every window of the split once before any again.
        val_fraction: the share of documents, at the end, that validates.
        test_fraction: the share, at the very end, that neither trains nor validates; `fit.py test` scores it.
        val_files: what validates instead, files of their own.
        test_files: what is tested instead, files of their own.
        split_seed: deals documents at random by their text instead, so that equal ones share a part.
        split_column: a column that names each row's part instead: train, val or test.
        group_column: rows with the same in this column share a part.
        dedupe: leave out documents that came before.
        document_mask: keep documents that share a window apart: attention and places stop at their ends.
        eval_windows: windows used to estimate the loss of each split; None: the whole validation split, and 256 windows
            of training at most, whose loss is only looked at beside it; `fit.py test`: the whole test split.
        num_workers: processes that prepare the batches to train on; 0: the training process itself.
        seed: of the sampling; linked to seed_everything.
    """

    def __init__(
        self,
        files: list[str] | str = SAMPLE_FILE,
        mode: Mode = "rows",
        columns: list[str] | str | None = None,
        template: str | None = None,
        delimiter: str | None = None,
        quote: str = '"',
        header: bool = True,
        encoding: str = "auto",
        tokenizer: str = "cl100k_base",
        vocab: Vocab = "pruned",
        vocab_size: int = 4096,
        context_length: int = 64,
        batch_size: int = 16,
        global_batch_size: int | None = None,
        sampling: Literal["random", "shuffled"] = "random",
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        val_files: list[str] | str | None = None,
        test_files: list[str] | str | None = None,
        split_seed: int | None = None,
        split_column: str | None = None,
        group_column: str | None = None,
        dedupe: bool = False,
        document_mask: bool = False,
        eval_windows: int | None = 256,
        num_workers: int = 0,
        seed: int = 1337,
    ) -> None:
        super().__init__()
        for name, value in {
            "batch_size": batch_size,
            "global_batch_size": global_batch_size,
            "eval_windows": eval_windows,
        }.items():
            if value is not None and value < 1:
                raise UserError(f"--data.{name} is {value}: give 1 or more")
            if value is not None and value * context_length >= 2**31:
                raise UserError(
                    f"--data.{name} is {value}, with {context_length} tokens to a window: give fewer windows"
                )
        if num_workers < 0 or seed < 0:
            raise UserError(f"--data.num_workers is {num_workers} and the seed {seed}: give 0 or more")
        check_tokenizer(tokenizer)
        if files in (SAMPLE_FILE, [SAMPLE_FILE]) and mode == "rows" and columns is None and template is None:
            columns = SAMPLE_COLUMN
        self.files, self.val_files, self.test_files = files, val_files, test_files
        self.corpus_config = CorpusConfig(
            read_options=ReadOptions(
                mode=mode,
                columns=None if columns is None else (columns,) if isinstance(columns, str) else tuple(columns),
                template=template,
                delimiter=delimiter,
                quote=quote,
                header=header,
                encoding=encoding,
                split_key_column=split_column if split_column is not None else group_column,
            ),
            split_options=SplitOptions(val_fraction, test_fraction, split_seed, split_column, group_column, dedupe),
            tokenizer=tokenizer,
            vocab=vocab,
            vocab_size=vocab_size,
        )
        self.context_length, self.batch_size, self.global_batch_size = context_length, batch_size, global_batch_size
        self.sampling, self.seed, self.document_mask = sampling, seed, document_mask
        self.eval_windows, self.num_workers = eval_windows, num_workers
        self.validation_interval: int | None = None  # optimizer steps; setup reads it off the Trainer

    def sources(self) -> list[Source]:
        """The files, those that validate and test last; the built-in table is written if it is asked for."""
        if (
            SAMPLE_FILE in ([self.files] if isinstance(self.files, str) else self.files)
            and not Path(SAMPLE_FILE).exists()
        ):
            write_sample(Path(SAMPLE_FILE))
        found = find_sources(self.files)
        for part, files in (("val", self.val_files), ("test", self.test_files)):
            if files is not None:
                found += find_sources(files, part)
        check_no_duplicates(found)
        return found

    @cached_property
    def corpus(self) -> Corpus:
        """The tokenized files; built on first use, once for all processes."""
        corpus = open_corpus(self.sources(), self.corpus_config, CACHE)
        for part, name in (("train", "training"), ("val", "validation")):
            if len(corpus.split(part)) <= self.context_length:
                raise UserError(
                    f"the {name} split has {len(corpus.split(part)):,} tokens, fewer than one window of "
                    f"{self.context_length + 1}: give more text or a smaller --model.config.context_length"
                )
        return corpus

    @property
    def tokenizer(self) -> Tokenizer:
        return self.corpus.tokenizer

    @property
    def model_vocab_size(self) -> int:
        """V, the ids the tokenizer can give."""
        return self.corpus.tokenizer.vocab_size

    @property
    def train_ids(self) -> ShardedArray:
        return self.corpus.split("train")

    @property
    def val_ids(self) -> ShardedArray:
        return self.corpus.split("val")

    @property
    def test_ids(self) -> ShardedArray:
        """None, unless data.test_fraction, test_files or split_column give some."""
        return self.corpus.split("test")

    @property
    def world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def accumulation(self) -> int:
        """Forwards of each device per optimizer step."""
        if self.global_batch_size is None:
            return self.trainer.accumulate_grad_batches if self.trainer else 1
        return self.global_batch_size // (self.batch_size * self.world_size)

    @property
    def windows_per_step(self) -> int:
        """The global batch."""
        return self.batch_size * self.world_size * self.accumulation

    @property
    def overfit_batches(self) -> int:
        """The batches that are all there is to train on; 0: all there are."""
        return int(self.trainer.overfit_batches) if self.trainer else 0  # type: ignore[attr-defined]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which about as many windows are drawn as the training split holds: or few, to overfit."""
        whole = max(1, count_windows(len(self.train_ids), self.context_length) // self.windows_per_step)
        return min(whole, self.overfit_batches // self.accumulation) if self.overfit_batches else whole

    @property
    def max_steps(self) -> int | None:
        """The optimizer step at which the run ends; None where it has no end."""
        trainer = self.trainer
        assert trainer is not None
        limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            limits.append(trainer.max_epochs * self.steps_per_epoch)
        return min(limits, default=None)

    def check_batches(self) -> None:
        """Refuses a global batch that does not divide over devices and forwards.

        Raises:
            UserError: it does not.
        """
        share = self.batch_size * self.world_size
        if self.global_batch_size is not None and self.global_batch_size % share:
            raise UserError(
                f"--data.global_batch_size {self.global_batch_size} is not a multiple of {share}, --data.batch_size "
                f"{self.batch_size} on {self.world_size} device(s): change one of them"
            )
        if self.overfit_batches % self.accumulation:
            raise UserError(
                f"--trainer.overfit_batches {self.overfit_batches} is not a multiple of {self.accumulation}, the "
                "batches of an optimizer step: change one of them"
            )

    def setup(self, stage: str) -> None:
        """Makes the Trainer count as we do: intervals in optimizer steps, accumulation from the global batch."""
        if stage != "fit":
            return
        trainer = self.trainer
        assert trainer is not None
        self.check_batches()
        trainer.accumulate_grad_batches = self.accumulation
        if self.validation_interval is None:  # setup may run again, on what it changed
            given = trainer.val_check_interval
            self.validation_interval = given if isinstance(given, int) else max(1, int(given * self.steps_per_epoch))
        trainer.val_check_interval = self.validation_interval * self.accumulation
        trainer.check_val_every_n_epoch = None

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_batches(), sampler=RunSampler(self))

    def train_batches(self) -> TrainBatches:
        """Those of this rank, by their number since the run began."""
        windows = self.train_ids, self.context_length, self.sampling, self.seed
        ranks = self.rank, self.world_size
        return TrainBatches(*windows, self.batch_size, self.accumulation, *ranks, end_of_text=self._end_of_text)

    def val_dataloader(self) -> list[DataLoader]:
        """Fixed windows of training and of validation, in this order: the course's `estimate_loss`."""
        validation = evaluation_starts(len(self.val_ids), self.context_length, self.eval_windows)
        count = self.eval_windows or min(len(validation), TRAINING_WINDOWS)
        training = evaluation_starts(len(self.train_ids), self.context_length, count)
        return [self._fixed(self.train_ids, training), self._fixed(self.val_ids, validation)]

    def test_dataloader(self) -> DataLoader:
        return self._fixed(self.test_ids, evaluation_starts(len(self.test_ids), self.context_length, self.eval_windows))

    def _fixed(self, ids: TokenIds, starts: np.ndarray) -> DataLoader:
        ranks = self.rank, self.world_size
        return self._loader(
            EvaluationBatches(ids, starts, self.context_length, self.batch_size, *ranks, end_of_text=self._end_of_text)
        )

    @property
    def _end_of_text(self) -> int | None:
        """The id that separates documents in a batch; None without a document mask."""
        return self.tokenizer.end_of_text if self.document_mask else None

    def _loader(self, batches: "Dataset[Batch]", sampler: SequentialSampler | None = None) -> DataLoader:
        helped = sampler is not None and self.num_workers > 0
        return BatchLoader(
            batches,
            batch_size=None,  # an item is a batch already
            sampler=sampler,
            num_workers=self.num_workers if helped else 0,
            worker_init_fn=skip_worker_seeding,
            persistent_workers=helped,
            multiprocessing_context="spawn" if helped else None,  # a copy of threads may hold locks that no one opens
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every pass would draw from the global random state
        )


class RunSampler(SequentialSampler):
    """The batches of the current epoch that are still to come, read off the Trainer's step.

    A sequential sampler by type, which is what `overfit_batches` asks for: then every epoch has the same batches.
    """

    def __init__(self, data: TextDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.steps_per_epoch * self.data.accumulation

    def __iter__(self) -> Iterator[int]:
        trainer = self.data.trainer
        assert trainer is not None
        start = 0 if self.data.overfit_batches else trainer.global_step * self.data.accumulation
        return iter(range(start, (start // len(self) + 1) * len(self)))


def fingerprint(data: TextDataModule) -> dict[str, Any]:
    """What a checkpoint remembers of the data it was trained on."""
    report = data.corpus.report
    return {
        "mode": data.corpus_config.read_options.mode,
        "documents": report["documents"],
        "characters": report["characters"],
        "tokenizer": data.corpus_config.tokenizer_name,
        **{f"{part} tokens": counts["tokens"] for part, counts in report["parts"].items()},
        "key": data.corpus.key,
    }
