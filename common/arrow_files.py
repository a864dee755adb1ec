"""Rows of Arrow and Parquet files."""

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from common import rows as row_files
from common.problems import AnyPath, UserError
from common.rows import Row, Table

if TYPE_CHECKING:
    import pyarrow

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # Arrow IPC streaming format: continuation marker, length 0


def read_arrow(path: Path) -> list[Row]:
    """The rows of an Arrow file, stream or file format, whatever its name. UserError if it is damaged."""
    return list(open_arrow(path, False))


def open_arrow(path: Path, on_disk: bool) -> Sequence[Row]:
    """`read_arrow`; with `on_disk`, the rows of a large file stay there."""
    import pyarrow as pa

    large = on_disk and os.path.getsize(path) > row_files.LARGE
    try:
        source = pa.memory_map(str(path))
        try:
            stream = pa.ipc.open_stream(source)
            schema, batches = stream.schema, _batches(stream, large)
        except (pa.ArrowInvalid, OSError):
            source.seek(0)
            file = pa.ipc.open_file(source)
            schema = file.schema
            batches = _batches((file.get_batch(index) for index in range(file.num_record_batches)), large)
        else:
            source.seek(max(0, source.size() - len(END_OF_STREAM)))
            if source.read() != END_OF_STREAM:  # truncated between two batches, it would pass for a shorter file
                raise UserError(f"{path}: the Arrow stream has no end marker; the file is truncated")
        return _rows_of(path, schema, batches, large or (on_disk and sum(map(len, batches)) > row_files.MANY))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not an Arrow file, or truncated ({_first_line(error)})") from None


def _batches(source: "Iterable[pyarrow.RecordBatch]", large: bool) -> "list[pyarrow.RecordBatch]":
    """All batches of a mapped file; the buffers of a `large` compressed one are not kept in memory."""
    import pyarrow as pa

    batches = iter(source)
    before = pa.total_allocated_bytes()
    first = next(batches, None)
    if first is None:
        return []
    if large and pa.total_allocated_bytes() - before > first.nbytes / 2:  # not mapped, but decompressed
        return row_files.map_batches(itertools.chain([first], batches), first.schema)
    return [first, *batches]


def open_parquet(path: Path, on_disk: bool) -> Sequence[Row]:
    """The rows of a Parquet file; with `on_disk`, those of a large file stay there."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
        large = sum(group.total_byte_size for group in groups) > row_files.LARGE
        if on_disk and (large or file.metadata.num_rows > row_files.MANY):
            batches = row_files.map_batches(file.iter_batches(row_files.BLOCK), file.schema_arrow)
            return _rows_of(path, file.schema_arrow, batches, True)
        table = pyarrow.parquet.read_table(path)
        return _rows_of(path, table.schema, table.to_batches(), False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file, or damaged ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _rows_of(
    path: Path, schema: "pyarrow.Schema", batches: "Sequence[pyarrow.RecordBatch]", on_disk: bool
) -> Sequence[Row]:
    """The rows of Arrow batches as JSON values. UserError for a column of bytes or of text that is not UTF-8."""
    import pyarrow as pa

    if len(set(schema.names)) < len(schema.names):
        raise UserError(f"{path}: two columns have the same name; rename one")
    for field in schema:
        kind = field.type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
            raise UserError(f"{path}: column {field.name!r} holds bytes; remove it or convert it to text")
    if on_disk:
        return Table(batches, lambda piece: _table_rows(path, piece))
    return _table_rows(path, pa.Table.from_batches(batches, schema))


def _table_rows(path: Path, table: "pyarrow.Table") -> list[Row]:
    import pyarrow as pa
    import pyarrow.compute as pc

    for index, name in enumerate(table.column_names):
        column, kind = table.column(index), table.schema.field(index).type
        if pa.types.is_floating(kind):
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
        elif pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
            column = column.cast(pa.string())
        table = table.set_column(index, name, column)
    try:
        rows: list[Row] = table.to_pylist()
    except UnicodeDecodeError:
        raise UserError(f"{path}: contains text that is not UTF-8; write the file again") from None
    return rows


def check_columns(path: AnyPath, rows: list[Row]) -> None:
    """UserError naming each field of `rows` whose values do not fit one Arrow column; shows no values.

    Builders of Arrow files call it before they start.
    """
    import pyarrow as pa

    problems = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            column = pa.array(values)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):  # their messages would quote values
            kinds = sorted({type(value).__name__ for value in values if value is not None})
            reason = (
                f"values of different types ({', '.join(kinds)})" if len(kinds) > 1 else "values of different types"
            )
            if kinds == ["int"]:
                reason = "integers beyond 64 bits"
            problems.append(f"{path}: column {name!r} has {reason}; an Arrow column has one type: fix or remove it")
            continue
        if column.to_pylist() != values:  # a dict's missing keys become None, 1 becomes 1.0 or True
            problems.append(
                f"{path}: column {name!r} would not be read back unchanged (objects with different fields, or numbers "
                "of different types); fix or remove it"
            )
    if problems:
        raise UserError(*problems)


def write_arrow(file: IO[bytes], rows: list[Row]) -> None:
    """Write rows to an open binary file in the stream format of datasets (read by `datasets.Dataset.from_file`)."""
    import pyarrow as pa

    columns = dict.fromkeys(name for row in rows for name in row)  # from_pylist alone uses the first row's keys
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
