"""The fused kernels themselves; the only file that imports triton, itself imported only where they are asked for.

Called by `triton_launch.py`, laid out by `triton_tiles.py`; formulas stand at the head of `operators.py`. `attend` is
one pass over the keys: a FlashAttention forward with K = V and an id mask (kernel.md sections 1 and 7). `statistics`
and `gradient` recompute the products tile by tile. Nothing is added in an order that could vary.

Under TRITON_INTERPRET=1 (set before this file is imported) they run on the CPU. Triton 3.9's interpreter multiplies
bfloat16 as raw bits and truncates where a GPU rounds, so EMU widens operands and rounds by hand.
Shape suffixes: B rows (anchors), G columns, S splits, D features. In the code, a variable is one tile's part.
"""
# Kernels are Triton's language, not Python: their pointers and tiles have no type that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _narrow(p, dtype: tl.constexpr, EMU: tl.constexpr):
    """The first operand of the second product in the dtype of the keys, rounded to nearest even."""
    if dtype == tl.bfloat16:
        if EMU:
            bits = p.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            p = bits.to(tl.float32, bitcast=True)
        else:
            p = p.to(tl.bfloat16)
    return p


@triton.jit
def _load(pointers, filled, feature, D: tl.constexpr, BLOCK_D: tl.constexpr, EMU: tl.constexpr):
    """Rows that are filled, zeros for the others: whatever an empty slot holds, 0 * NaN must not reach a sum."""
    if D == BLOCK_D:
        x = tl.load(pointers + feature[None, :], mask=filled[:, None], other=0.0)
    else:
        x = tl.load(pointers + feature[None, :], mask=filled[:, None] & (feature[None, :] < D), other=0.0)
    if EMU:
        x = x.to(tl.float32)
    return x


@triton.jit
def _own_rows(row_ptr, row_id_ptr, row, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, EMU: tl.constexpr):
    """Ids, pointers and features of the rows that a program owns."""
    row_id = tl.load(row_id_ptr + row, mask=row < rows, other=-1)
    pointers = row_ptr + row.to(tl.int64)[:, None] * D
    return row_id, pointers, _load(pointers, row_id != -1, tl.arange(0, BLOCK_D), D, BLOCK_D, EMU)


@triton.jit
def _keys(key_ptr, key_id_ptr, key, last, D: tl.constexpr, BLOCK_D: tl.constexpr, EMU: tl.constexpr):
    """Ids, pointers and features of one tile of keys."""
    key_id = tl.load(key_id_ptr + key, mask=key < last, other=-1)
    pointers = key_ptr + key.to(tl.int64)[:, None] * D
    return key_id, pointers, _load(pointers, key_id != -1, tl.arange(0, BLOCK_D), D, BLOCK_D, EMU)


@triton.jit
def _products(
    row_id, row_pointers, a, key_id, key_pointers, k,
    D: tl.constexpr, MASK: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr, EMU: tl.constexpr,
):  # fmt: skip
    """Products of all pairs of a tile, not scaled yet; -inf for those that are not counted."""
    if STEP < BLOCK_D:
        # float32 is multiplied by ordinary instructions, whose operands must fit into registers.
        s = tl.zeros([row_id.shape[0], key_id.shape[0]], tl.float32)
        for piece in tl.static_range(0, BLOCK_D, STEP):
            feature = piece + tl.arange(0, STEP)
            a_piece = _load(row_pointers, row_id != -1, feature, D, BLOCK_D, EMU)
            k_piece = _load(key_pointers, key_id != -1, feature, D, BLOCK_D, EMU)
            s = tl.dot(a_piece, tl.trans(k_piece), s, input_precision="ieee")
    else:
        s = tl.dot(a, tl.trans(k), input_precision="ieee")
    counted = (row_id != -1)[:, None] & (key_id != -1)[None, :]
    if MASK == 0:
        counted = counted & (row_id[:, None] != key_id[None, :])
    elif MASK == 2:
        counted = counted & (row_id[:, None] == key_id[None, :])
    return tl.where(counted, s, float("-inf"))


@triton.jit
def _softmax(s, scale, shift, total, weight, dtype: tl.constexpr, EMU: tl.constexpr):
    """One turn of the online softmax to base 2: (terms as rounded, factor for what was summed before, new sums).

    The shift follows the maximum only when left behind by more than 2^8, which float32 sums bear easily: most turns
    then spare the product of factor and mean. It is decided row by row, so that a row's neighbours do not matter.
    """
    top = tl.max(s, 1) * scale
    grows = top > shift + 8.0
    new_shift = tl.where(grows, top, shift)
    safe = tl.where(new_shift == float("-inf"), 0.0, new_shift)
    decay = tl.where(grows, tl.exp2(shift - safe), 1.0)
    p = tl.exp2(s * scale - safe[:, None])  # one multiply-add: the scaled product is never rounded
    narrow = _narrow(p, dtype, EMU)
    # A maximum may drop a NaN, the sums keep it.
    total = total * decay + tl.sum(p, 1)
    return narrow, decay, new_shift, total, weight * decay + tl.sum(narrow.to(tl.float32), 1)


@triton.jit(do_not_specialize=["rows", "keys", "per_split", "out_rows"])
def attend(
    anchor_ptr, key_ptr, anchor_id_ptr, key_id_ptr, log_scale_ptr, shift_ptr, sum_ptr, weight_ptr, mean_ptr,
    rows, keys, per_split, out_rows,
    D: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    STEP: tl.constexpr, SPREAD: tl.constexpr, EMU: tl.constexpr,
):  # fmt: skip
    """One block of anchors against one split of the keys.

    Writes per anchor the shift m, sum 2^(s - m), the sum of the same terms as rounded for the second product, and that
    product, sum 2^(s - m) k. Divided by the sum of what was really added, a key that dominates loses nothing.
    """
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_id, row_pointers, a = _own_rows(anchor_ptr, anchor_id_ptr, row, rows, D, BLOCK_D, EMU)
    # In float64: an error of exp would be multiplied by the largest product.
    scale = (tl.exp(tl.load(log_scale_ptr).to(tl.float64)) / LN_2).to(tl.float32)
    shift = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, BLOCK_D], tl.float32)
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, keys)
    for start in tl.range(first, last, KEYS):
        key_id, pointers, k = _keys(key_ptr, key_id_ptr, start + tl.arange(0, KEYS), last, D, BLOCK_D, EMU)
        if SPREAD:
            narrow = _narrow(tl.zeros([ROWS, KEYS], tl.float32), dtype, EMU)
            decay = tl.zeros([ROWS], tl.float32)
            if start < last:  # always: see `Tile.spread`
                s = _products(row_id, row_pointers, a, key_id, pointers, k, D, MASK, BLOCK_D, STEP, EMU)
                narrow, decay, shift, total, weight = _softmax(s, scale, shift, total, weight, dtype, EMU)
        else:
            s = _products(row_id, row_pointers, a, key_id, pointers, k, D, MASK, BLOCK_D, STEP, EMU)
            narrow, decay, shift, total, weight = _softmax(s, scale, shift, total, weight, dtype, EMU)
        if tl.min(decay, 0) < 1.0:
            mean = mean * decay[:, None]
        mean = tl.dot(narrow, k, mean, input_precision="ieee")
    out = tl.program_id(1) * out_rows + row
    tl.store(shift_ptr + out, shift, mask=row < rows)
    tl.store(sum_ptr + out, total, mask=row < rows)
    tl.store(weight_ptr + out, weight, mask=row < rows)
    feature = tl.arange(0, BLOCK_D)
    tl.store(mean_ptr + out[:, None] * D + feature[None, :], mean, mask=(row < rows)[:, None] & (feature < D)[None, :])


@triton.jit(do_not_specialize=["rows", "splits", "out_rows"])
def combine(
    shift_ptr, sum_ptr, weight_ptr, mean_ptr, lse_ptr, out_ptr, rows, splits, out_rows,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the splits of `attend` in their order; lse in float64, since losses are small differences of it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, BLOCK_D)
    stored = (row < rows)[:, None] & (feature < D)[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for split in tl.range(0, splits):
        top = tl.maximum(top, tl.load(shift_ptr + split * out_rows + row, mask=row < rows, other=float("-inf")))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([ROWS], tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for split in tl.range(0, splits):
        part = split * out_rows + row
        factor = tl.exp2(tl.load(shift_ptr + part, mask=row < rows, other=float("-inf")) - top)
        total += factor * tl.load(sum_ptr + part, mask=row < rows, other=0.0)
        weight += factor * tl.load(weight_ptr + part, mask=row < rows, other=0.0)
        mean += factor[:, None] * tl.load(mean_ptr + part[:, None] * D + feature[None, :], mask=stored, other=0.0)
    some = total != 0.0
    lse = (top.to(tl.float64) + tl.log2(tl.where(some, total, 1.0).to(tl.float64))) * LN_2
    tl.store(lse_ptr + row, tl.where(some, lse, float("-inf")), mask=row < rows)
    mean = mean / tl.where(some, weight, 1.0)[:, None]
    tl.store(out_ptr + row[:, None] * D + feature[None, :], mean, mask=stored)


@triton.jit(do_not_specialize=["rows", "columns", "per_split"])
def statistics(
    row_ptr, column_ptr, row_id_ptr, column_id_ptr, log_scale_ptr, row_sums_ptr, column_sums_ptr,
    rows, columns, per_split,
    D: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    STEP: tl.constexpr, SPREAD: tl.constexpr, EMU: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the columns: of the same products, each row's and each column's sums.

    Writes shift m and sum 2^(s - m) of a row over this split, (2, S, B), and of a column over this block,
    (2, blocks, G).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_id, row_pointers, a = _own_rows(row_ptr, row_id_ptr, row, rows, D, BLOCK_D, EMU)
    scale = (tl.exp(tl.load(log_scale_ptr).to(tl.float64)) / LN_2).to(tl.float32)
    shift = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, columns)
    for start in tl.range(first, last, KEYS):
        column = start + tl.arange(0, KEYS)
        column_id, pointers, k = _keys(column_ptr, column_id_ptr, column, last, D, BLOCK_D, EMU)
        s = _products(row_id, row_pointers, a, column_id, pointers, k, D, MASK, BLOCK_D, STEP, EMU)
        new_shift = tl.maximum(shift, tl.max(s, 1) * scale)
        safe = tl.where(new_shift == float("-inf"), 0.0, new_shift)
        total = total * tl.exp2(shift - safe) + tl.sum(tl.exp2(s * scale - safe[:, None]), 1)
        shift = new_shift
        top = tl.max(s, 0) * scale
        top = tl.where(top == float("-inf"), 0.0, top)
        out = tl.program_id(0).to(tl.int64) * columns + column
        tl.store(column_sums_ptr + out, top, mask=column < last)
        out += tl.num_programs(0).to(tl.int64) * columns
        tl.store(column_sums_ptr + out, tl.sum(tl.exp2(s * scale - top[None, :]), 0), mask=column < last)
    out = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(row_sums_ptr + out, tl.where(shift == float("-inf"), 0.0, shift), mask=row < rows)
    out += tl.num_programs(1).to(tl.int64) * rows
    tl.store(row_sums_ptr + out, total, mask=row < rows)


@triton.jit
def _coefficients(
    s, scale, row_shift, row_weight, column_shift, column_weight, piece, dtype: tl.constexpr, EMU: tl.constexpr
):
    """G of a tile, 0 for pairs that are not counted; of piece 1 what bfloat16 rounds off it."""
    x = s * scale
    g = row_weight[:, None] * tl.exp2(x - row_shift[:, None])
    g += column_weight[None, :] * tl.exp2(x - column_shift[None, :])
    g = tl.where(s == float("-inf"), 0.0, g)
    if dtype == tl.bfloat16:
        g = tl.where(piece == 1, g - _narrow(g, dtype, EMU).to(tl.float32), g)
    return _narrow(g, dtype, EMU)


@triton.jit(do_not_specialize=["rows", "columns", "per_split", "pieces"])
def gradient(
    row_ptr, row_id_ptr, row_shift_ptr, row_weight_ptr, column_ptr, column_id_ptr, column_shift_ptr, column_weight_ptr,
    log_scale_ptr, out_ptr, rows, columns, per_split, pieces,
    D: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    STEP: tl.constexpr, SPREAD: tl.constexpr, EMU: tl.constexpr,
):  # fmt: skip
    """One block of rows over one split of the columns: one piece of s sum_j g_ij c_j, (S x pieces, B, D).

    g_ij = u_i 2^(S_ij - x_i) + v_j 2^(S_ij - y_j), S to base 2; the sides exchanged give the columns' gradient. What
    bfloat16 rounds off g is a piece of its own: unlike a queue's softmax, g has no sum that the result could be divided
    by. (Both products in one program spill 4 KB of registers at D = 512 on sm_90.)
    """
    dtype: tl.constexpr = column_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_id, row_pointers, a = _own_rows(row_ptr, row_id_ptr, row, rows, D, BLOCK_D, EMU)
    row_shift = tl.load(row_shift_ptr + row, mask=row < rows, other=0.0)
    row_weight = tl.load(row_weight_ptr + row, mask=row < rows, other=0.0)
    natural_scale = tl.exp(tl.load(log_scale_ptr).to(tl.float64))
    scale = (natural_scale / LN_2).to(tl.float32)
    grad = tl.zeros([ROWS, BLOCK_D], tl.float32)
    piece = tl.program_id(1) % pieces
    first = tl.program_id(1) // pieces * per_split
    last = tl.minimum(first + per_split, columns)
    for start in tl.range(first, last, KEYS):
        column = start + tl.arange(0, KEYS)
        column_shift = tl.load(column_shift_ptr + column, mask=column < last, other=0.0)
        column_weight = tl.load(column_weight_ptr + column, mask=column < last, other=0.0)
        column_id, pointers, k = _keys(column_ptr, column_id_ptr, column, last, D, BLOCK_D, EMU)
        sides = row_shift, row_weight, column_shift, column_weight, piece
        if SPREAD:
            g = _narrow(tl.zeros([ROWS, KEYS], tl.float32), dtype, EMU)
            if start < last:
                s = _products(row_id, row_pointers, a, column_id, pointers, k, D, MASK, BLOCK_D, STEP, EMU)
                g = _coefficients(s, scale, *sides, dtype, EMU)
        else:
            s = _products(row_id, row_pointers, a, column_id, pointers, k, D, MASK, BLOCK_D, STEP, EMU)
            g = _coefficients(s, scale, *sides, dtype, EMU)
        grad = tl.dot(g, k, grad, input_precision="ieee")
    out = tl.program_id(1).to(tl.int64) * rows + row
    feature = tl.arange(0, BLOCK_D)
    stored = (row < rows)[:, None] & (feature < D)[None, :]
    tl.store(out_ptr + out[:, None] * D + feature[None, :], natural_scale.to(tl.float32) * grad, mask=stored)
