"""Pair losses over tiles of the product matrix: statistics of rows and columns in one pass, gradients in a second.

Both sides are trainable, so weights depend on complete statistics: a product is made twice and multiplied twice (4
products of B x G x D in all; no tensor of B x G exists). Logits are natural here: log p enters the gradients.
Shape suffixes: B rows, G columns, D features; R rows and C columns of a tile; S statistics, C coefficients.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.kernels.checks import EMPTY, MASKS, wide_dtype
from reid_dist.kernels.workspace import buffer, on_tensor_cores, product

_CPU_TILE = (512, 1024)
_GPU_TILE = (2048, 2048)


class _Pairs:
    """The operands of a call, prepared once: empty rows hold zeros, both sides have one dtype; and its tiles."""

    def __init__(
        self, rows_BD: Tensor, columns_GD: Tensor, row_ids_B: Tensor, column_ids_G: Tensor, log_scale: Tensor, mask: int
    ) -> None:
        self.wide = wide_dtype(rows_BD.dtype)
        half = on_tensor_cores(rows_BD, columns_GD) and rows_BD.dtype == columns_GD.dtype
        self.rows_BD, self.columns_GD = (
            x.to(torch.bfloat16 if half else self.wide).masked_fill((ids == EMPTY)[:, None], 0.0)
            for x, ids in ((rows_BD, row_ids_B), (columns_GD, column_ids_G))
        )
        self.row_ids_B, self.column_ids_G, self.mask = row_ids_B, column_ids_G, mask
        self.scale = log_scale.double().exp().to(self.wide).reshape(())
        on_cpu = rows_BD.device.type == "cpu"
        self.tile = _CPU_TILE if on_cpu else _GPU_TILE
        # Looking at ids is free on the CPU, a host sync elsewhere.
        unmasked = MASKS[mask] == "none"
        self.all_counted = on_cpu and unmasked and not ((row_ids_B == EMPTY).any() or (column_ids_G == EMPTY).any())

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """(rows, columns) of each tile; those of the same columns follow each other."""
        for column in range(0, self.columns_GD.shape[0], self.tile[1]):
            for row in range(0, self.rows_BD.shape[0], self.tile[0]):
                yield slice(row, row + self.tile[0]), slice(column, column + self.tile[1])

    def logits(self, rows: slice, columns: slice) -> Tensor:
        """Scaled products of a tile, not masked. Shape: (R, C)."""
        return product(self.rows_BD[rows], self.columns_GD[columns].T, "logits").mul_(self.scale)

    def same(self, rows: slice, columns: slice) -> Tensor:
        """Pairs of one id. Shape: (R, C)."""
        return self.row_ids_B[rows, None] == self.column_ids_G[None, columns]

    def left_out(self, rows: slice, columns: slice) -> Tensor:
        """Pairs that are not counted. Shape: (R, C)."""
        empty = (self.row_ids_B[rows, None] == EMPTY) | (self.column_ids_G[None, columns] == EMPTY)
        if MASKS[self.mask] == "none":
            return empty
        same = self.same(rows, columns)
        return empty | (~same if MASKS[self.mask] == "positives" else same)

    def masked_logits(self, rows: slice, columns: slice) -> Tensor:
        """Scaled products of a tile, -inf where a pair is not counted. Shape: (R, C)."""
        logits = self.logits(rows, columns)
        return logits if self.all_counted else logits.masked_fill_(self.left_out(rows, columns), -torch.inf)

    def add_gradients(self, rows: slice, columns: slice, g: Tensor, grad_BD: Tensor, grad_GD: Tensor) -> None:
        """Adds s g c to the rows' gradient and s g^T a to the columns', for the derivative g of a tile's logits."""
        g.mul_(self.scale)
        grad_BD[rows] += product(g, self.columns_GD[columns], "row_gradient")
        grad_GD[columns] += product(g.T, self.rows_BD[rows], "column_gradient")

    def new_gradients(self) -> tuple[Tensor, Tensor]:
        return self.rows_BD.new_zeros(self.rows_BD.shape, dtype=self.wide), self.columns_GD.new_zeros(
            self.columns_GD.shape, dtype=self.wide
        )


class _OnlineStatistics:
    """Running peak and sums of exp(x - peak) f along one dimension; f is 1, x - peak, [same id] and [other id]."""

    def __init__(self, count: int, moments: bool, like: Tensor, wide: torch.dtype) -> None:
        self.peak_N = like.new_full((count,), -torch.inf, dtype=wide)
        # In float64: 1 + 1e-9 is what an easy positive leaves, and it is all that its loss is made of.
        self.sums_SN = like.new_zeros((4 if moments else 1, count), dtype=torch.float64)

    def add(self, part: slice, logits: Tensor, same: Tensor | None, dim: int) -> None:
        old_N = self.peak_N[part]
        peak_N = torch.maximum(old_N, logits.amax(dim=dim))
        shift_N = peak_N.masked_fill(peak_N == -torch.inf, 0.0)
        sums_SN = self.sums_SN[:, part]
        drop_N = (old_N - shift_N).double()
        if same is not None:
            # exp(x - new) (x - new) = exp(old - new) exp(x - old) ((x - old) + (old - new)).
            sums_SN[1] += torch.where(old_N == -torch.inf, 0.0, drop_N) * sums_SN[0]
        sums_SN *= drop_N.exp()
        gap = torch.sub(logits, shift_N.unsqueeze(dim), out=buffer("gap", tuple(logits.shape), logits, logits.dtype))
        weight = torch.exp(gap, out=buffer("weight", tuple(logits.shape), logits, logits.dtype))
        sums_SN[0] += weight.sum(dim=dim, dtype=torch.float64)
        if same is not None:
            sums_SN[1] += gap.masked_fill_(gap == -torch.inf, 0.0).mul_(weight).sum(dim=dim, dtype=torch.float64)
            positive = torch.mul(weight, same, out=gap)
            sums_SN[2] += positive.sum(dim=dim, dtype=torch.float64)
            sums_SN[3] += weight.masked_fill_(same, 0.0).sum(dim=dim, dtype=torch.float64)
        self.peak_N[part] = peak_N

    def finish(self) -> Tensor:
        total_N = self.sums_SN[0]
        log_total_N = total_N.log()
        lse_N = self.peak_N + log_total_N
        if self.sums_SN.shape[0] == 1:
            return lse_N[None]
        means_3N = self.sums_SN[1:] / total_N.masked_fill(total_N == 0, 1.0)
        means_3N[0] -= log_total_N.masked_fill(total_N == 0, 0.0)
        return torch.cat([lse_N[None], means_3N])


def pair_statistics(
    rows_BD: Tensor,
    columns_GD: Tensor,
    row_ids_B: Tensor,
    column_ids_G: Tensor,
    log_scale: Tensor,
    mask: int,
    moments: bool,
) -> tuple[Tensor, Tensor]:
    """(row statistics (S, B), column statistics (S, G)) in float64; see `operators`."""
    with torch.autocast(rows_BD.device.type, enabled=False):
        pairs = _Pairs(rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale, mask)
        of_rows = _OnlineStatistics(rows_BD.shape[0], moments, rows_BD, pairs.wide)
        of_columns = _OnlineStatistics(columns_GD.shape[0], moments, rows_BD, pairs.wide)
        for rows, columns in pairs.tiles():
            logits = pairs.masked_logits(rows, columns)
            same = pairs.same(rows, columns) if moments else None
            of_rows.add(rows, logits, same, dim=1)
            of_columns.add(columns, logits, same, dim=0)
        return of_rows.finish(), of_columns.finish()


def pair_gradients(
    rows_BD: Tensor,
    columns_GD: Tensor,
    row_ids_B: Tensor,
    column_ids_G: Tensor,
    log_scale: Tensor,
    mask: int,
    row_lse_B: Tensor,
    column_lse_G: Tensor,
    row_coefficients_CB: Tensor,
    column_coefficients_CG: Tensor,
) -> tuple[Tensor, Tensor]:
    """(gradient of the rows (B, D), of the columns (G, D)); see `operators`."""
    with torch.autocast(rows_BD.device.type, enabled=False):
        pairs = _Pairs(rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale, mask)
        grad_BD, grad_GD = pairs.new_gradients()
        for rows, columns in pairs.tiles():
            logits = pairs.masked_logits(rows, columns)
            same = pairs.same(rows, columns) if row_coefficients_CB.shape[0] > 1 else None
            g = _softmax_derivative(logits, row_lse_B[rows], row_coefficients_CB[:, rows], same, dim=1)
            by_columns = _softmax_derivative(
                logits, column_lse_G[columns], column_coefficients_CG[:, columns], same, dim=0
            )
            pairs.add_gradients(rows, columns, g.add_(by_columns), grad_BD, grad_GD)
        return grad_BD, grad_GD


def _softmax_derivative(
    logits: Tensor, lse_N: Tensor, coefficients_CN: Tensor, same: Tensor | None, dim: int
) -> Tensor:
    """Derivative p (alpha + beta log p) of a tile, p = exp(logits - lse), in a reused buffer of this `dim`.

    lse is float64, the tile is not: it is shifted by the rounded lse, and what rounding took is put back into the
    coefficients. At temperature 0.01 it would be 4e-6 of every p.
    """
    shift_N = lse_N.masked_fill(lse_N == -torch.inf, 0.0).to(logits.dtype)
    rest_N = torch.where(lse_N == -torch.inf, 0.0, shift_N.double() - lse_N)
    factor_CN = (coefficients_CN.double() * rest_N.exp()).to(logits.dtype).unsqueeze(1 + dim)
    log_p = torch.sub(
        logits, shift_N.unsqueeze(dim), out=buffer(f"log_p{dim}", tuple(logits.shape), logits, logits.dtype)
    )
    if same is None:
        return log_p.exp_().mul_(factor_CN[0])
    p = torch.exp(log_p, out=buffer("p", tuple(logits.shape), logits, logits.dtype))
    log_p.masked_fill_(log_p == -torch.inf, 0.0).add_(rest_N.to(logits.dtype).unsqueeze(dim))
    other, by_log, own = factor_CN
    return log_p.mul_(by_log).add_(torch.where(same, own, other)).mul_(p)


def siglip_loss(
    rows_BD: Tensor, columns_GD: Tensor, row_ids_B: Tensor, column_ids_G: Tensor, log_scale: Tensor, bias: Tensor
) -> Tensor:
    """Sum over columns of softplus(-z (S + bias)) in float64; see `operators`. Shape: (B,)."""
    with torch.autocast(rows_BD.device.type, enabled=False):
        pairs = _Pairs(rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale, MASKS.index("none"))
        loss_B = rows_BD.new_zeros(rows_BD.shape[0], dtype=torch.float64)
        for rows, columns in pairs.tiles():
            loss = F.softplus(_signed(pairs, rows, columns, bias), threshold=40.0)
            if not pairs.all_counted:
                loss.masked_fill_(pairs.left_out(rows, columns), 0.0)
            loss_B[rows] += loss.sum(dim=1, dtype=torch.float64)
        return loss_B


def siglip_gradients(
    rows_BD: Tensor,
    columns_GD: Tensor,
    row_ids_B: Tensor,
    column_ids_G: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of rows (B, D), of columns (G, D), of bias () in float64) of sum_i weight_i loss_i."""
    with torch.autocast(rows_BD.device.type, enabled=False):
        pairs = _Pairs(rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale, MASKS.index("none"))
        grad_BD, grad_GD = pairs.new_gradients()
        grad_bias = rows_BD.new_zeros((), dtype=torch.float64)
        for rows, columns in pairs.tiles():
            g = _signed(pairs, rows, columns, bias).sigmoid_()
            g.mul_(torch.where(pairs.same(rows, columns), -1.0, 1.0)).mul_(weight_B[rows, None].to(g.dtype))
            if not pairs.all_counted:
                g.masked_fill_(pairs.left_out(rows, columns), 0.0)
            grad_bias += g.sum(dtype=torch.float64)
            pairs.add_gradients(rows, columns, g, grad_BD, grad_GD)
        return grad_BD, grad_GD, grad_bias


def _signed(pairs: _Pairs, rows: slice, columns: slice, bias: Tensor) -> Tensor:
    """-z (S + bias) of a tile: what softplus and sigmoid take. Shape: (R, C)."""
    logits = pairs.logits(rows, columns).add_(bias.reshape(()))
    return logits.mul_(torch.where(pairs.same(rows, columns), -1.0, 1.0))
