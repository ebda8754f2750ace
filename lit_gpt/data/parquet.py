"""Read Parquet tables into rows."""

from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

from lit_gpt.data.read_options import ReadOptions, field_to_text, make_formatter, select_columns
from lit_gpt.data.rows import RejectedRow, Row
from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError, shorten

MAX_COLUMN_BYTES, MAX_COMPRESSION = 2**28, 200  # of a column in a part of a Parquet table; a text has at most one


def read_parquet(source: Source, file: BinaryIO, options: ReadOptions) -> Iterator[Row | RejectedRow]:
    """Read a Parquet table, batch by batch. A text that the file stores once and uses often is in memory once."""
    from pyarrow import ArrowException  # imported here because it takes long
    from pyarrow.parquet import ParquetFile

    key, format_row, number = options.split_key_column, make_formatter(options), 0
    try:
        with ParquetFile(file) as table:
            sizes = partial(_text_sizes, table)
            columns = select_columns(source, options, table.schema_arrow.names, sizes)
            columns_to_read = list(dict.fromkeys(columns if key is None else [*columns, key]))
            _check_parquet_sizes(source, table.metadata, columns_to_read)
            texts = _text_columns(table)
        with ParquetFile(file, read_dictionary=texts) as table:
            for batch in table.iter_batches(batch_size=2**12, columns=columns_to_read):
                fields = {name: _column_values(batch.column(name)) for name in columns_to_read}
                for row in zip(*fields.values(), strict=True):
                    number += 1
                    values = dict(zip(fields, row, strict=True))
                    try:
                        text = format_row([values[name] for name in columns])
                        split_key = "" if key is None else field_to_text(values[key])
                    except (ValueError, ArithmeticError) as error:
                        yield RejectedRow(number, _describe_error(error))
                    else:
                        yield Row(number, text, split_key)
    except (ArrowException, ValueError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{source} cannot be read as a Parquet table of text ({reason}): choose other columns"
        ) from None


def _describe_error(error: Exception) -> str:
    reason = f"a value that cannot be written as text ({str(error).splitlines()[0]})"
    if isinstance(error, UnicodeDecodeError):
        reason = f"bytes that are not text in UTF-8 ({error.reason})"
    return f"{reason}: correct that row, or choose others with --data.columns"


def _text_columns(table: Any) -> list[str]:
    """Return the columns of a Parquet table that hold text or bytes."""
    from pyarrow import types

    is_text = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return [field.name for field in table.schema_arrow if any(check(field.type) for check in is_text)]


def _text_sizes(table: Any) -> list[int]:
    """Return the bytes of each column of a Parquet table in its first part; 0 for columns without text."""
    sizes = dict.fromkeys(_text_columns(table), 0)
    if table.num_row_groups:
        group = table.metadata.row_group(0)
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema in sizes:
                sizes[chunk.path_in_schema] += chunk.total_uncompressed_size
    return [sizes.get(name, 0) for name in table.schema_arrow.names]


def _check_parquet_sizes(source: Source, metadata: Any, columns: list[str]) -> None:
    """Check that no column of a Parquet table is so well compressed that it cannot be text.

    Raises:
        UserError: One is.
    """
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            size, name = chunk.total_uncompressed_size, chunk.path_in_schema.split(".")[0]
            if name in columns and size > max(MAX_COLUMN_BYTES, MAX_COMPRESSION * chunk.total_compressed_size):
                raise UserError(
                    f"{source} has a column {shorten(name)!r} of {size:,} bytes, compressed to "
                    f"{chunk.total_compressed_size:,}, which is no text: choose other columns"
                )


def _column_values(column: Any) -> list[Any]:
    """Return the values of a column of a Parquet batch; those of equal texts are the same object."""
    from pyarrow import DictionaryArray, compute, types

    if types.is_float16(column.type) or types.is_float32(column.type):  # Python's floats would show too many digits
        number = column.type.to_pandas_dtype()
        return [None if value is None else str(float(str(number(value)))) for value in column.to_pylist()]
    if not isinstance(column, DictionaryArray):
        return _values(column)
    used = column.indices.unique()
    texts = dict(zip(used.to_pylist(), _values(compute.take(column.dictionary, used)), strict=True))
    return [texts[index] for index in column.indices.to_pylist()]


def _values(array: Any) -> list[Any]:
    """Return the values of an array; in the place of one that has no Python value its error, see `field_to_text`."""
    try:
        return array.to_pylist()
    except (ValueError, ArithmeticError):
        return [_value(scalar) for scalar in array]


def _value(scalar: Any) -> Any:
    """Return a value, or its error. A time that Python does not have, as one of nanoseconds, is as Arrow writes it."""
    from pyarrow import ArrowException

    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error
    except (ValueError, ArithmeticError) as error:
        try:
            text = scalar.cast("string").as_py()
        except (ArrowException, ValueError):
            return error
        return error if text.startswith("<") else text  # Arrow's "<value out of range: …>"
