"""TextDataModule: from files of text to the batches of a Lightning run."""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer

from lit_gpt.data.batches import Batch, BatchLoader, EvaluationBatches, TrainBatches, skip_worker_seeding
from lit_gpt.data.cache import Corpus
from lit_gpt.data.config import CorpusConfig, SplitOptions
from lit_gpt.data.corpus import open_corpus
from lit_gpt.data.read_options import Format, Mode, ReadOptions
from lit_gpt.data.readers import check_settings_have_effect
from lit_gpt.data.sample import SAMPLE_COLUMN, SAMPLE_FILE, is_sample, write_sample
from lit_gpt.data.samplers import EpochSampler, RankSampler
from lit_gpt.data.shards import ShardedArray
from lit_gpt.data.sources import Source, check_no_duplicates, find_sources
from lit_gpt.data.step_plan import StepPlan, limit_batches, plan_steps
from lit_gpt.data.windows import check_window_count, count_windows, evaluation_starts
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Tokenizer, Vocab, check_tokenizer_name

CACHE = Path("data/cache")
MAX_TRAIN_EVAL_WINDOWS = 256  # windows of the training split that are evaluated beside a whole validation split


class TextDataModule(LightningDataModule):
    """Read files of text, split and tokenize them, and give random windows of tokens as batches.

    A batch is `(tokens, targets)`, or `(tokens, targets, documents)` with `document_mask`, each (B, T) int64.

    It works with a Trainer and without one:

        data = TextDataModule("poems.csv", columns="text", tokenizer="char")
        tokens, targets = data.get_batch("train")

    A Trainer has to accumulate as many batches as `global_batch_size` says, if it is given. `fit.py` sees to that.

    Args:
        files: Paths, URLs or globs of .csv, .tsv, .txt, .jsonl or .parquet files. All but Parquet may be compressed
            (.gz, .zst). In raw mode, any text files.
        mode: "rows": each row is a document. "raw": each file is one text.
        format: Format of the files: csv, tsv, txt, jsonl or parquet. By default their suffix decides.
        columns: Columns (JSONL: fields) of a table that make up a document. Not needed if there is only one. The
            default for the built-in table is `name`.
        template: Pattern that combines columns, such as "{title}\\n{text}". Use it instead of `columns`.
        delimiter: Character between columns. By default a comma, in .tsv a tab, or what a first line `sep=;` says.
        quote: Character around fields that contain delimiters or line ends. "none": quotes are part of the text.
        header: Whether the first row names the columns. Without it they are named c1, c2, …
        skip_rows: Lines to leave out at the start of each file, before the header.
        encoding: Encoding of text files, such as gb18030. "auto": detect it for each file.
        tokenizer: cl100k_base, o200k_base, gpt2, byte, char, bpe (trained on the text), a .tiktoken file, or
            the .json of --model.init_from.
        vocab: "pruned": keep only the tokens of a pretrained tokenizer that the corpus uses. "full": keep all.
        vocab_size: Vocabulary size of the tokenizer bpe. The default is 4096.
        context_length: T, tokens in a window. Linked to model.config.context_length.
        batch_size: Windows in a batch of one device.
        global_batch_size: Windows in an optimizer step on all devices. Batches are accumulated to reach this number.
        sampling: "random": draw windows with replacement. "shuffled": use every window once in each epoch.
        val_fraction: Fraction of the documents for validation, taken from the end.
        test_fraction: Fraction of the documents for `fit.py test`, taken from the very end.
        val_files: Files for validation, instead of the `val_fraction` of `files`.
        test_files: Files for `fit.py test`, instead of the `test_fraction` of `files`.
        split_seed: Assign documents to splits at random with this seed. Equal documents get the same split.
        split_column: Column that names the split of each row: train, val or test.
        group_column: Rows with the same value in this column get the same split.
        dedupe: Whether to leave out documents that occurred before.
        document_mask: Whether tokens attend only to their own document, and positions count from its start.
        eval_windows: Windows to evaluate in each split. None: the whole validation or test split, and up to 256 windows
            of the training split.
        num_workers: Processes that prepare training batches. 0: the training process prepares them.
        seed: Seed of the sampling. Linked to seed_everything.
    """

    def __init__(
        self,
        files: list[str] | str = SAMPLE_FILE,
        mode: Mode = "rows",
        format: Format | None = None,
        columns: list[str] | str | None = None,
        template: str | None = None,
        delimiter: str | None = None,
        quote: str = '"',
        header: bool = True,
        skip_rows: int = 0,
        encoding: str = "auto",
        tokenizer: str = "cl100k_base",
        vocab: Vocab = "pruned",
        vocab_size: int | None = None,
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
        check_window_count("batch_size", batch_size, context_length)
        check_window_count("global_batch_size", global_batch_size, context_length)
        check_window_count("eval_windows", eval_windows, context_length)
        if num_workers < 0 or seed < 0:
            raise UserError(f"--data.num_workers is {num_workers} and the seed {seed}: give 0 or more")
        check_tokenizer_name(tokenizer)
        if is_sample(files) and (mode, columns, template) == ("rows", None, None) and format in (None, "csv"):
            columns = SAMPLE_COLUMN
        self.files, self.val_files, self.test_files = files, val_files, test_files
        read_options = ReadOptions(
            mode=mode,
            format=format,
            columns=None if columns is None else (columns,) if isinstance(columns, str) else tuple(columns),
            template=template,
            delimiter=delimiter,
            quote=quote,
            header=header,
            skip_rows=skip_rows,
            encoding=encoding,
            split_key_column=group_column if split_column is None else split_column,
        )
        split_options = SplitOptions(val_fraction, test_fraction, split_seed, split_column, group_column, dedupe)
        split_options.check_split_files(val_files is not None, test_files is not None, mode == "raw")
        self.corpus_config = CorpusConfig(read_options, split_options, tokenizer, vocab, vocab_size)
        self.context_length, self.batch_size, self.global_batch_size = context_length, batch_size, global_batch_size
        self.sampling, self.seed, self.document_mask = sampling, seed, document_mask
        self.eval_windows, self.num_workers = eval_windows, num_workers

    def sources(self) -> list[Source]:
        """Return the input files: training, then validation, then test. Write the built-in table if it is missing."""
        files = [self.files] if isinstance(self.files, str) else self.files
        if SAMPLE_FILE in files and not Path(SAMPLE_FILE).exists():
            try:
                write_sample(Path(SAMPLE_FILE))
            except OSError as error:
                raise UserError(
                    f"{SAMPLE_FILE} cannot be written ({error.strerror}): free disk space there, or run in a folder of "
                    "your own"
                ) from error
        sources = find_sources(self.files)
        for split, split_files in (("val", self.val_files), ("test", self.test_files)):
            if split_files is not None:
                sources += find_sources(split_files, split)
        check_no_duplicates(sources)
        check_settings_have_effect(sources, self.corpus_config.read_options)
        return sources

    @cached_property
    def corpus(self) -> Corpus:
        """The tokenized files. One process builds them on first use; the others wait and read them.

        Raises:
            UserError: A split is shorter than a window, or the files cannot be read.
        """
        corpus = open_corpus(self.sources(), self.corpus_config, CACHE)
        for split, name in (("train", "training"), ("val", "validation")):
            num_tokens = len(corpus.split(split))
            if num_tokens <= self.context_length:
                raise UserError(
                    f"the {name} split has {num_tokens:,} tokens, fewer than one window of "
                    f"{self.context_length + 1}: give more text or a smaller --model.config.context_length"
                )
        return corpus

    @property
    def tokenizer(self) -> Tokenizer:
        return self.corpus.tokenizer

    @property
    def model_vocab_size(self) -> int:
        """V, the number of ids of the tokenizer."""
        return self.corpus.tokenizer.vocab_size

    @property
    def train_ids(self) -> ShardedArray:
        return self.corpus.split("train")

    @property
    def val_ids(self) -> ShardedArray:
        return self.corpus.split("val")

    @property
    def test_ids(self) -> ShardedArray:
        """Token ids of the test split. Empty without test_fraction, test_files and split_column."""
        return self.corpus.split("test")

    @property
    def world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    # ---------------------------------------------------------------------------------------------------- step plan

    @property
    def batches_per_step(self) -> int:
        """The batches of each rank in an optimizer step, from `global_batch_size` if given, or else from the Trainer.

        Raises:
            UserError: The global batch is not a whole number of batches.
        """
        if self.global_batch_size is None:
            return self.trainer.accumulate_grad_batches if self.trainer else 1
        windows_per_batch = self.batch_size * self.world_size
        if self.global_batch_size % windows_per_batch:
            raise UserError(
                f"--data.global_batch_size {self.global_batch_size} is not a multiple of {windows_per_batch}, "
                f"--data.batch_size {self.batch_size} on {self.world_size} device(s): change one of them"
            )
        return self.global_batch_size // windows_per_batch

    @property
    def plan(self) -> StepPlan:
        """The optimizer steps that follow from the data and from the settings of the attached Trainer, as they are now.

        Without a Trainer, `global_batch_size` decides how many batches are accumulated.
        """
        num_windows, trainer = count_windows(len(self.train_ids), self.context_length), self.trainer
        if trainer is None:
            return plan_steps(num_windows, self.batch_size, accumulate_grad_batches=self.batches_per_step)
        return plan_steps(
            num_windows,
            self.batch_size,
            self.world_size,
            trainer.accumulate_grad_batches,
            1.0 if trainer.fast_dev_run else trainer.limit_train_batches,  # type: ignore[attr-defined]
            # the Trainer has no such attribute where the interval is a time
            getattr(trainer, "val_check_interval", None) if trainer.limit_val_batches else None,
            trainer.check_val_every_n_epoch,
            trainer.max_steps,
            trainer.max_epochs,
        )

    def prepare_data(self) -> None:
        """Tokenize the files, unless data/cache has the result already."""
        self.corpus  # noqa: B018

    def setup(self, stage: str) -> None:
        """Open the tokenized files; before training, check the settings of the Trainer, if there is one.

        Raises:
            UserError: They do not fit the data.
        """
        self.corpus  # noqa: B018
        if self.trainer is not None and stage == "fit":
            self.check_trainer(self.trainer)

    def check_trainer(self, trainer: Trainer) -> None:
        """Check that the settings of the attached Trainer fit the data and the settings of this data module.

        Raises:
            UserError: They do not.
        """
        accumulation, expected = trainer.accumulate_grad_batches, self.batches_per_step
        if accumulation != expected:
            raise UserError(
                f"global_batch_size {self.global_batch_size} is {expected} batches of {self.batch_size} windows on "
                f"{self.world_size} device(s), and the Trainer accumulates {accumulation}: give "
                f"Trainer(accumulate_grad_batches={expected}), or leave out global_batch_size"
            )
        tokens = self.plan.windows_per_step * self.context_length
        if tokens >= 2**31:
            raise UserError(
                f"--trainer.accumulate_grad_batches {accumulation} gives an optimizer step of {tokens:,} tokens: give "
                "fewer batches"
            )
        overfits = trainer.overfit_batches > 0  # type: ignore[attr-defined]  # it sets the limits of both splits
        limit, name = trainer.limit_train_batches, "overfit_batches" if overfits else "limit_train_batches"
        num_batches = self.plan.num_batches
        limited = limit_batches(num_batches, limit)
        if limited == 0:
            raise UserError(f"--trainer.{name} {limit:g} of {num_batches:,} batches is none: give more")
        if limited % accumulation and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise UserError(
                f"--trainer.{name} {limit:g} is an epoch of {limited:,} batches, not a multiple of {accumulation}, the "
                "batches of an optimizer step: change one of them"
            )
        limit, name = trainer.limit_val_batches, "overfit_batches" if overfits else "limit_val_batches"
        num_batches = min(len(loader) for loader in self.val_dataloader())
        if limit and limit_batches(num_batches, limit) == 0:
            raise UserError(
                f"--trainer.{name} {limit:g} of {num_batches} validation batches is none: give more, or more "
                "--data.eval_windows"
            )

    # -------------------------------------------------------------------------------------------------- dataloaders

    def get_batch(self, split: Literal["train", "val"], step: int = 0) -> Batch:
        """Return a batch of random windows of a split: the `get_batch` of the course.

        It is a pure function of the seed and the step. For "train" it is the batch on which this rank trains in that
        step, or the first of them if batches are accumulated.

        Args:
            split: "train" or "val".
            step: Optimizer step, from 0.

        Returns:
            `(tokens, targets)`, or `(tokens, targets, documents)` with `document_mask`, each (B, T) int64.
        """
        if split not in ("train", "val"):
            raise UserError(f"get_batch has no split {split!r}: give train or val")
        return self.train_batches(split).get_batch(step)

    def train_batches(self, split: Literal["train", "val"] = "train") -> TrainBatches:
        """Return the training batches of this rank, numbered from the start of the run, or such batches of "val"."""
        return TrainBatches(
            self.corpus.split(split),
            self.context_length,
            self.sampling,
            self.seed,
            self.batch_size,
            self.plan.accumulate_grad_batches,
            self.rank,
            self.world_size,
            self._end_of_text,
        )

    def evaluation_batches(self, ids: ShardedArray, num_windows: int | None) -> EvaluationBatches:
        """Return this rank's batches of `num_windows` windows spread over a split, or of all windows (None)."""
        starts = evaluation_starts(len(ids), self.context_length, num_windows)
        return EvaluationBatches(
            ids, starts, self.context_length, self.batch_size, self.rank, self.world_size, self._end_of_text
        )

    @property
    def _end_of_text(self) -> int | None:
        """The id that separates documents in a batch; None without a document mask."""
        return self.tokenizer.end_of_text if self.document_mask else None

    def train_dataloader(self) -> BatchLoader:
        return _make_loader(self.train_batches(), EpochSampler(self.plan, self.trainer), self.num_workers)

    def val_dataloader(self) -> list[BatchLoader]:
        """Return fixed windows of the training split and of the validation split, in this order.

        The course's `estimate_loss` draws random batches of both splits instead.
        """
        val_batches = self.evaluation_batches(self.val_ids, self.eval_windows)
        num_windows = self.eval_windows
        if num_windows is None:
            num_val_windows = len(evaluation_starts(len(self.val_ids), self.context_length, None))
            num_windows = min(num_val_windows, MAX_TRAIN_EVAL_WINDOWS)
        train_batches = self.evaluation_batches(self.train_ids, num_windows)
        return [_make_loader(batches, RankSampler(batches)) for batches in (train_batches, val_batches)]

    def test_dataloader(self) -> BatchLoader:
        batches = self.evaluation_batches(self.test_ids, self.eval_windows)
        return _make_loader(batches, RankSampler(batches))

    def predict_dataloader(self) -> BatchLoader:
        """Return the fixed windows of the validation split."""
        batches = self.evaluation_batches(self.val_ids, self.eval_windows)
        return _make_loader(batches, RankSampler(batches))


def _make_loader(batches: TrainBatches | EvaluationBatches, sampler: RankSampler, num_workers: int = 0) -> BatchLoader:
    return BatchLoader(
        batches,
        batch_size=None,  # an item of the dataset is a batch
        sampler=sampler,
        num_workers=num_workers,
        worker_init_fn=skip_worker_seeding,
        persistent_workers=num_workers > 0,
        multiprocessing_context="spawn" if num_workers else None,  # a fork could copy locks that nobody releases
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # without one, every pass draws a number from the global random state
    )


def fingerprint(data: TextDataModule) -> dict[str, Any]:
    """Return the description of the data that is saved in checkpoints and compared on resuming."""
    report = data.corpus.report
    return {
        "mode": data.corpus_config.read_options.mode,
        "documents": report["documents"],
        "characters": report["characters"],
        "tokenizer": data.corpus_config.tokenizer_name,
        **{f"{part} tokens": counts["tokens"] for part, counts in report["parts"].items()},
        "key": data.corpus.key,
    }
