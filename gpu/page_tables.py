"""Page tables from one form to the other: CSR (indptr, indices, last_page_len) and block table with lengths.

torch tensors on any device, all of a call on one. Nothing here waits for the GPU unless its docstring says so, so the
conversions may be captured in a CUDA graph.
"""
from __future__ import annotations

import torch

MAX_TABLE_ENTRIES = 2**26  # 256 MiB: of a table as wide as all indices, where nobody on the host knows the rows


def _check(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], like: torch.Tensor) -> None:
    fits = tensor.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, tensor.shape))
    if not fits or tensor.dtype != torch.int32 or tensor.device != like.device:
        wanted = ["any" if size is None else size for size in shape]
        raise ValueError(f"{name}: expected int32 {wanted} on {like.device}, got "
                         f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}")


def seq_lens_of(
    indptr: torch.Tensor, last_page_len: torch.Tensor, page_size: int, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Tokens of each row, [batch_size] int32; rows without pages have none, whatever last_page_len says.

    indptr [batch_size + 1] int32: row r owns indices[indptr[r]:indptr[r + 1]]. last_page_len [batch_size] int32:
    tokens in its last page. Raises ValueError naming the argument.
    """
    batch_size = len(last_page_len)
    _check("last_page_len", last_page_len, (batch_size,), last_page_len)
    _check("indptr", indptr, (batch_size + 1,), last_page_len)
    pages = indptr[1:] - indptr[:-1]
    lens = torch.where(pages > 0, (pages - 1) * page_size + last_page_len, 0)
    return lens if out is None else out.copy_(lens)


def block_table_of(indptr: torch.Tensor, indices: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Writes the rows' page ids into `out` [batch_size, max_pages] int32 and returns it.

    indices [>= indptr[-1]] int32. Entries past a row's end keep what they hold. Pages past max_pages are left out, so
    max_pages must be at least the longest row's; table_width() gives a width that is. Raises ValueError naming the
    argument.
    """
    batch_size = len(indptr) - 1
    _check("indptr", indptr, (batch_size + 1,), out)
    _check("indices", indices, (None,), out)
    _check("out", out, (batch_size, None), out)
    if not out.is_contiguous():
        raise ValueError(f"out: expected contiguous, got strides {list(out.stride())}")
    if not (len(indices) and out.numel()):
        return out
    row, column, owned = _places(indptr, len(indices))
    keep = owned & (column < out.shape[1])
    # Picking the owned ones would wait for the GPU, so all are scattered: the others repeat the first that is owned.
    flat, place = out.view(-1), row * out.shape[1] + column
    first = keep.byte().argmax(0, keepdim=True)  # of one axis: torch would read an index of none on the host
    value = torch.where(keep[first], indices[first], flat[:1])
    place = torch.where(keep, place, torch.where(keep[first], place[first], 0))
    flat.index_copy_(0, place, torch.where(keep, indices, value))
    return out


def csr_of(
    seq_lens: torch.Tensor, block_table: torch.Tensor, page_size: int, *, num_indices: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indptr [batch_size + 1], indices [num_indices], last_page_len [batch_size]), all int32.

    seq_lens [batch_size] int32, block_table [batch_size, max_pages] int32. num_indices: the length of indices, at
    least the rows' pages together; entries past them are 0. Without it the length is exact, and reading it waits for
    the GPU. Rows of length 0 have no page and a last_page_len of 0. Raises ValueError naming the argument.
    """
    batch_size = len(seq_lens)
    _check("seq_lens", seq_lens, (batch_size,), seq_lens)
    _check("block_table", block_table, (batch_size, None), seq_lens)
    pages = (seq_lens + (page_size - 1)) // page_size
    indptr = torch.zeros(batch_size + 1, dtype=torch.int32, device=seq_lens.device)
    torch.cumsum(pages, 0, dtype=torch.int32, out=indptr[1:])
    if num_indices is None:
        num_indices = int(indptr[-1])
    row, column, owned = _places(indptr, num_indices)
    if block_table.numel():
        picked = block_table[row, column.clamp(max=block_table.shape[1] - 1)]
    else:
        picked = torch.zeros_like(row, dtype=torch.int32)
    last_page_len = torch.where(seq_lens > 0, (seq_lens - 1) % page_size + 1, 0)
    return indptr, torch.where(owned, picked, 0), last_page_len


def table_width(indptr: torch.Tensor, num_indices: int) -> int:
    """A width with room for every row's pages: the longest row's where indptr is on the host.

    On the GPU indptr is not read: one row may own all the indices.
    """
    if indptr.device.type != "cpu":
        return num_indices
    return int((indptr[1:] - indptr[:-1]).max()) if len(indptr) > 1 else 0


class StepTables:
    """A step's block_table [batch_size, max_pages] and seq_lens [batch_size], int32, rewritten in place from CSR.

    They stay the same tensors while batch size and width do. With fixed buffers both always do, so that a captured
    graph may read them, and the CSR arrays pass through the buffers, where the caller may look for them.
    """

    __slots__ = ("block_table", "seq_lens", "_fixed")

    def __init__(self, fixed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None) -> None:
        """fixed: int32 buffers for indptr [batch_size + 1], indices [the most ever], last_page_len [batch_size]."""
        self.block_table: torch.Tensor | None = None
        self.seq_lens: torch.Tensor | None = None
        self._fixed = fixed

    def update(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, page_size: int, *,
        device: torch.device, max_pages: int | None = None, non_blocking: bool = True,
    ) -> None:
        """Takes a step's CSR arrays, each on the host or on `device`.

        max_pages: the longest row's pages at most; by default table_width(). Raises ValueError naming the argument.
        """
        width = table_width(indptr, len(indices)) if max_pages is None else max_pages
        if self._fixed is not None:
            width = self._fixed_width(len(indices), len(last_page_len), width, bounded=max_pages is not None)
            sources = indptr, indices, last_page_len
            buffers = self._fixed[0], self._fixed[1][:len(indices)], self._fixed[2]
            indptr, indices, last_page_len = (
                buffer.copy_(source, non_blocking=non_blocking) for buffer, source in zip(buffers, sources))
        else:
            width = 1 << max(0, width - 1).bit_length()  # tables of a growing batch keep their shape
            indptr, indices, last_page_len = (
                array.to(device, non_blocking=non_blocking) for array in (indptr, indices, last_page_len))
        batch_size = len(last_page_len)
        if batch_size * width > MAX_TABLE_ENTRIES:
            raise ValueError(f"block_tables: expected a table to tell the rows' width, as {batch_size} rows of {width} "
                             f"pages each are more than {MAX_TABLE_ENTRIES} entries")
        if self.block_table is None or self.block_table.shape != (batch_size, width):
            self.block_table = torch.empty((batch_size, width), dtype=torch.int32, device=device)
            self.seq_lens = torch.empty(batch_size, dtype=torch.int32, device=device)
        block_table_of(indptr, indices, out=self.block_table)
        seq_lens_of(indptr, last_page_len, page_size, out=self.seq_lens)

    def _fixed_width(self, num_indices: int, batch_size: int, width: int, *, bounded: bool) -> int:
        """The width of the first step, which later ones must fit."""
        if batch_size != len(self._fixed[2]):
            raise ValueError(f"last_page_len: expected the fixed batch size {len(self._fixed[2])}, got {batch_size}")
        if num_indices > len(self._fixed[1]):
            raise ValueError(f"indices: expected at most the buffer's {len(self._fixed[1])} entries, got {num_indices}")
        if self.block_table is None:
            return width if bounded else len(self._fixed[1])
        first = self.block_table.shape[1]
        if width > first:
            raise ValueError(f"block_tables: expected rows within the first plan's {first} pages, got up to {width}")
        return first


def _places(indptr: torch.Tensor, num_indices: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each of indices' entries: its row and column in a block table, int64, and whether any row owns it."""
    entry = torch.arange(num_indices, dtype=torch.int32, device=indptr.device)
    row = torch.searchsorted(indptr, entry, right=True) - 1
    owned = (row >= 0) & (row < len(indptr) - 1)
    row = row.clamp(0, max(0, len(indptr) - 2))
    column = torch.where(owned, entry - indptr[row], 0).long()
    return row, column, owned
