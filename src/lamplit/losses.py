"""The two contrastive losses, exact over the whole batch and without its B × B matrix.

Notable features:
- Logits are computed in square tiles that fit the processor's cache and are dropped at once: the extra memory
  is the gradient itself and a few tiles. `softmax_loss` visits every tile twice (once for the sums, once for
  the gradient), `sigmoid_loss` once.
- With a locked image tower only the texts need a gradient: three B × B × D products instead of the five of
  the plain loss (two instead of four for the sigmoid).
- The diagonal never passes through a sum. A pair's loss is `log(1 + others / own)`, so neither the loss nor
  its gradient loses digits when a model is nearly perfect.
- Rows that share a picture or a caption are positives of each other. They cost O(B × D), not O(B × B).
- On a CPU every core takes whole tiles: this beats splitting each small product between the cores. Every sum
  has a fixed order, so results are the same bytes in every run and with any number of threads.

Shapes: B pairs, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamplit.errors import UsageError

_CPU_TILE = 512  # a tile of 512 × 512 float32 is 1 MB: it stays in a core's own cache
_ACCELERATOR_TILE = 4096
_LINEAR_FROM = 80.0  # exp(80) is a float32, and log(1 + exp(80)) is 80 even in float64


def softmax_loss(
    zimg: Tensor,
    ztxt: Tensor,
    logit_scale: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
) -> Tensor:
    """Average cross entropy of finding each picture's text and each text's picture (CLIP, LiT).

    Rows i and j are positives of each other where their image ids or their text ids are equal; the target of
    a row is uniform over its positives. Without ids each row's only positive is its own.

    Args:
        zimg: unit vectors of the pictures, (B, D).
        ztxt: unit vectors of their texts, (B, D).
        logit_scale: the multiplier of the cosines itself (not its logarithm), a scalar.
        image_ids: integers, (B,); equal where two rows show the same picture.
        text_ids: integers, (B,); equal where two rows have the same text.

    Returns:
        The loss, a scalar; float64 for float64 vectors, else float32.

    Raises:
        UsageError: if the shapes do not fit.
    """
    zimg, ztxt, scale = _prepare(zimg, ztxt, logit_scale)
    loss: Tensor = _SoftmaxLoss.apply(*_gradient_side_last(zimg, ztxt), scale)
    positives = _shared_positives(zimg, image_ids, text_ids)
    if positives is not None:
        own = (zimg[positives.rows] * ztxt[positives.rows]).sum()
        loss = loss + scale * (own - positives.sum_of_cosines(zimg, ztxt, 1 / positives.counts)) / len(zimg)
    return loss


def sigmoid_loss(
    zimg: Tensor,
    ztxt: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
) -> Tensor:
    """Binary cross entropy of every picture with every text: sums over texts, mean of pictures (SigLIP).

    Args:
        zimg: unit vectors of the pictures, (B, D).
        ztxt: unit vectors of their texts, (B, D).
        logit_scale: the multiplier of the cosines itself (not its logarithm), a scalar.
        logit_bias: what is added to every logit, a scalar.
        image_ids: integers, (B,); equal where two rows show the same picture.
        text_ids: integers, (B,); equal where two rows have the same text.

    Returns:
        The loss, a scalar; float64 for float64 vectors, else float32.

    Raises:
        UsageError: if the shapes do not fit.
    """
    zimg, ztxt, scale = _prepare(zimg, ztxt, logit_scale)
    bias = logit_bias.reshape(()).to(zimg.dtype)
    loss: Tensor = _SigmoidLoss.apply(*_gradient_side_last(zimg, ztxt), scale, bias)
    positives = _shared_positives(zimg, image_ids, text_ids)
    if positives is not None:
        own = (zimg[positives.rows] * ztxt[positives.rows]).sum()
        others = positives.sum_of_cosines(zimg, ztxt, torch.ones_like(positives.counts)) - own
        # -log_sigmoid(x) is -log_sigmoid(-x) - x: a positive differs from a negative by its own logit.
        loss = loss - (scale * others + bias * (positives.counts - 1).sum()) / len(zimg)
    return loss


def _prepare(zimg: Tensor, ztxt: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check the shapes; give all three one type of at least float32."""
    if zimg.ndim != 2 or zimg.shape != ztxt.shape or len(zimg) == 0:
        raise UsageError(
            f"the loss got vectors of shapes {tuple(zimg.shape)} and {tuple(ztxt.shape)}; "
            "it needs one picture and one text per row: two matrices of the same shape (B, D), B > 0"
        )
    dtype = torch.promote_types(torch.promote_types(zimg.dtype, ztxt.dtype), torch.float32)
    return zimg.to(dtype), ztxt.to(dtype), logit_scale.reshape(()).to(dtype)


def _gradient_side_last(zimg: Tensor, ztxt: Tensor) -> tuple[Tensor, Tensor]:
    # Both losses are symmetric in the two sides, and the last side's gradient is the cheaper one.
    return (ztxt, zimg) if zimg.requires_grad and not ztxt.requires_grad else (zimg, ztxt)


# --- Positives beside the diagonal


@dataclass(frozen=True)
class _Positives:
    """The rows that have other positives than themselves, and how these hang together.

    Sums over "same picture or same text" are sums over groups: same picture, plus same text, minus both.
    """

    rows: Tensor  # (R,) of the B rows
    counts: Tensor  # (R,) positives of each, itself included
    groups: Tensor  # (3, R) group number of each row: by picture, by text, by both
    signs = (1.0, 1.0, -1.0)

    def sum_of_cosines(self, zimg: Tensor, ztxt: Tensor, weights: Tensor) -> Tensor:
        """Sum of <zimg_i, ztxt_j> over all positives i, j, each times the mean of weights i and j."""
        zimg, ztxt = zimg[self.rows], ztxt[self.rows]
        weights = weights[:, None] / 2
        total = zimg.new_zeros(())
        for sign, group in zip(self.signs, self.groups, strict=True):
            # <sum of pictures, sum of texts>, with the weights once on the pictures and once on the texts.
            zeros = zimg.new_zeros(int(group.max()) + 1, zimg.shape[1])
            images, texts = zeros.index_add(0, group, zimg), zeros.index_add(0, group, ztxt)
            weighted_images = zeros.index_add(0, group, zimg * weights)
            weighted_texts = zeros.index_add(0, group, ztxt * weights)
            total = total + sign * ((weighted_images * texts).sum() + (images * weighted_texts).sum())
        return total


def _shared_positives(zimg: Tensor, image_ids: Tensor | None, text_ids: Tensor | None) -> _Positives | None:
    """Find the rows with more than one positive; None where there are none."""
    if image_ids is None and text_ids is None:
        return None
    own = torch.arange(len(zimg), device=zimg.device)
    for name, ids in (("image_ids", image_ids), ("text_ids", text_ids)):
        if ids is not None and ids.shape != own.shape:
            raise UsageError(
                f"{name} has the shape {tuple(ids.shape)}; it needs one id per row: ({len(own)},)"
            )
    by_image, image_counts = _number_groups(own if image_ids is None else image_ids.to(zimg.device))
    by_text, text_counts = _number_groups(own if text_ids is None else text_ids.to(zimg.device))
    by_both, both_counts = _number_groups(by_image * len(own) + by_text)
    counts = image_counts + text_counts - both_counts
    rows = (counts > 1).nonzero().squeeze(1)
    if len(rows) == 0:
        return None
    # Groups never reach outside `rows`: whoever shares a group has that positive too.
    groups = [_number_groups(group[rows])[0] for group in (by_image, by_text, by_both)]
    return _Positives(rows, counts[rows].to(zimg.dtype), torch.stack(groups))


def _number_groups(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's group, numbered from 0, and the size of that group."""
    _, group, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    return group, counts[group]


# --- Tiles


class _Tiles:
    """The logits of B texts (down) against B pictures (across), one square tile at a time."""

    def __init__(self, zimg: Tensor, ztxt: Tensor, scale: Tensor) -> None:
        self.zimg, self.ztxt = zimg.detach().contiguous(), ztxt.detach().contiguous()
        self.scale = float(scale)
        self.size = len(zimg)
        side = _CPU_TILE if zimg.device.type == "cpu" else _ACCELERATOR_TILE
        self.blocks = [slice(k, min(k + side, self.size)) for k in range(0, self.size, side)]
        # MPS has no float64. Everywhere else the few numbers that are not B × B are kept in it.
        self.wide = torch.float32 if zimg.device.type == "mps" else torch.float64

    def sweep(
        self, visit: Callable[[Tensor, list[Tensor], int, int], None], *, disjoint: bool = False
    ) -> None:
        """Call `visit(tile, spares, text_block, image_block)` for every tile, from several threads on a CPU.

        `tile` holds the logits, `spares` two more of the same shape; all are free to be overwritten. No two
        tiles of one text block, and if `disjoint` none of one image block, are visited at the same time, and
        those of one block always in the same order: their sums need no lock and are the same in every run.
        """
        blocks = range(len(self.blocks))
        if disjoint:  # a Latin square: round r has the r-th diagonal
            rounds = [[(j, [(j + shift) % len(blocks)]) for j in blocks] for shift in blocks]
        else:
            rounds = [[(j, list(blocks)) for j in blocks]]

        def visit_row(work: tuple[int, list[int]]) -> None:
            j, images = work
            side = self.blocks[0].stop
            buffers = self.ztxt.new_empty(3, side * side)
            texts = self.ztxt[self.blocks[j]]
            for i in images:
                pictures = self.zimg[self.blocks[i]]
                shape = len(texts), len(pictures)
                tile, *spares = buffers[:, : shape[0] * shape[1]].view(3, *shape)
                tile.addmm_(texts, pictures.T, beta=0, alpha=self.scale)
                visit(tile, spares, j, i)

        _in_threads(visit_row, rounds, self.zimg.device)


class _Gradients:
    """Sums over tiles of weights W (texts × pictures): W @ zimg for texts, W.T @ ztxt for pictures."""

    def __init__(self, tiles: _Tiles, *, both: bool) -> None:
        self.tiles = tiles
        self.text = torch.zeros_like(tiles.ztxt)  # (B, D)
        self.image = torch.zeros_like(tiles.zimg) if both else None  # (B, D)

    def add(self, weights: Tensor, j: int, i: int) -> None:
        """Add the share of one tile."""
        texts, pictures = self.tiles.blocks[j], self.tiles.blocks[i]
        self.text[texts].addmm_(weights, self.tiles.zimg[pictures])
        if self.image is not None:
            self.image[pictures].addmm_(weights.T, self.tiles.ztxt[texts])

    def times(self, factor: Tensor, scale: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return `factor` times the gradients of pictures, texts and scale; this object is used up."""
        # d(logit) / d(scale) is the cosine: the sum of W * cosines is <ztxt, W @ zimg>, block by block so as
        # not to make another (B, D) matrix.
        sums = [
            torch.linalg.vecdot(self.tiles.ztxt[k], self.text[k]).sum(dtype=self.tiles.wide)
            for k in self.tiles.blocks
        ]
        of_scale = factor * torch.stack(sums).sum().to(factor.dtype)
        of_image = None if self.image is None else self.image.mul_(factor * scale)
        return of_image, self.text.mul_(factor * scale), of_scale


def _in_threads(
    task: Callable[[tuple[int, list[int]]], None],
    rounds: Iterable[Sequence[tuple[int, list[int]]]],
    device: torch.device,
) -> None:
    """Do every task of a round before the next round; on a CPU with as many threads as torch has."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        for work in rounds:
            for item in work:
                task(item)
        return

    def in_worker(item: tuple[int, list[int]]) -> None:
        # Gradient and inference modes belong to a thread; inference mode may write to tensors of either kind.
        with torch.inference_mode():
            task(item)

    try:
        # Within a worker the products use one thread each. The number belongs to the thread, but torch gives
        # the last one set to threads started later: so it is set again at the end, to what it was.
        with ThreadPoolExecutor(threads, "losses", partial(torch.set_num_threads, 1)) as pool:
            for work in rounds:
                for _ in pool.map(in_worker, work):
                    pass
    finally:
        torch.set_num_threads(threads)


# --- Softmax


class _SoftmaxLoss(torch.autograd.Function):
    """Mean of both directions' cross entropy, each row's own text or picture being its target."""

    @staticmethod
    def forward(ctx: Any, zimg: Tensor, ztxt: Tensor, scale: Tensor) -> Tensor:
        tiles = _Tiles(zimg, ztxt, scale)
        own, others, shift = _log_sums(tiles)
        losses = torch.logaddexp(others - own, others.new_zeros(()))  # log(1 + others / own)
        ctx.save_for_backward(zimg, ztxt, scale, own + losses, torch.expm1(-losses).sum(0))
        ctx.shift = shift
        return losses.mean().to(zimg.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        zimg, ztxt, scale, log_sums, own_weights = ctx.saved_tensors
        gradients = _Gradients(_Tiles(zimg, ztxt, scale), both=ctx.needs_input_grad[0])
        _add_softmax_weights(gradients, log_sums, own_weights, ctx.shift)
        return gradients.times(grad / (2 * len(zimg)), scale)


def _log_sums(tiles: _Tiles) -> tuple[Tensor, Tensor, float | None]:
    """Compute each text's and each picture's sum of exponentials over all the *others*.

    Returns:
        The logits of the pairs themselves (B,); the logarithms of the sums, of texts and of pictures (2, B);
        and what was subtracted from all logits to keep their exponentials within range, or None where no one
        number does it.
    """
    shift = _common_shift(tiles)
    own = tiles.ztxt.new_empty(tiles.size)
    sums = tiles.ztxt.new_empty(2, len(tiles.blocks), tiles.size)  # a part from each tile: added up in order

    def add_exponentials(tile: Tensor, spares: list[Tensor], j: int, i: int) -> None:
        if i == j:
            own[tiles.blocks[j]] = tile.diagonal()
        tile.sub_(shift).exp_()
        if i == j:
            tile.fill_diagonal_(0)
        torch.sum(tile, 1, out=sums[0, i, tiles.blocks[j]])
        torch.sum(tile, 0, out=sums[1, j, tiles.blocks[i]])

    tiles.sweep(add_exponentials)
    totals = sums.sum(1, dtype=tiles.wide)
    # What exp() rounded to zero is lost: that must be nothing beside the sum.
    finfo = torch.finfo(tiles.ztxt.dtype)
    if tiles.size == 1 or bool(((totals > tiles.size * finfo.tiny / finfo.eps) & (totals < math.inf)).all()):
        return own.to(tiles.wide), totals.log_().add_(shift), shift
    return own.to(tiles.wide), _log_sums_by_maximum(tiles), None


def _common_shift(tiles: _Tiles) -> float:
    # Cosines are at most 1. The smallest shift under which a sum of B exponentials stays finite, and its
    # inverse normal, is none at all up to a scale of about 74 (float32, B = 32768).
    largest = math.log(torch.finfo(tiles.ztxt.dtype).max) - math.log(tiles.size) - 4
    return max(0.0, abs(tiles.scale) - largest)


def _log_sums_by_maximum(tiles: _Tiles) -> Tensor:
    """Do the same with each tile's own maxima: for logits that no common shift brings within range."""
    sums = tiles.ztxt.new_empty(2, len(tiles.blocks), tiles.size, dtype=tiles.wide)

    def add_exponentials(tile: Tensor, spares: list[Tensor], j: int, i: int) -> None:
        if i == j:
            tile.fill_diagonal_(-math.inf)
        for dim, part in ((1, sums[0, i, tiles.blocks[j]]), (0, sums[1, j, tiles.blocks[i]])):
            # A row of nothing but -inf has the sum 0 whatever the maximum, if only that is finite.
            maxima = tile.amax(dim, keepdim=True).clamp_(min=torch.finfo(tile.dtype).min)
            torch.sub(tile, maxima, out=spares[0]).exp_()
            part.copy_(spares[0].sum(dim).to(part.dtype).log_().add_(maxima.squeeze(dim)))

    tiles.sweep(add_exponentials)
    return sums.logsumexp(1)


def _add_softmax_weights(
    gradients: _Gradients, log_sums: Tensor, own_weights: Tensor, shift: float | None
) -> None:
    """Add up the gradients of both directions' log-sums, less the pairs' own logits.

    Args:
        gradients: where to.
        log_sums: of the whole rows, of texts and of pictures, (2, B).
        own_weights: of the pairs themselves, (B,).
        shift: as `_log_sums` returned it.
    """
    tiles = gradients.tiles
    dtype = tiles.ztxt.dtype
    # exp(logit - log_sum) is exp(logit - shift) times exp(shift - log_sum), the latter one number per row.
    shifts = log_sums.round() if shift is None else torch.full_like(log_sums, shift)
    text_factors, image_factors = (shifts - log_sums).exp_().to(dtype)
    text_shifts, image_shifts = shifts.to(dtype)
    own_weights = own_weights.to(dtype)

    def add_weights(tile: Tensor, spares: list[Tensor], j: int, i: int) -> None:
        texts, pictures = tiles.blocks[j], tiles.blocks[i]
        if shift is None:
            torch.sub(tile, text_shifts[texts, None], out=spares[0]).exp_().mul_(text_factors[texts, None])
            tile.sub_(image_shifts[pictures]).exp_().mul_(image_factors[pictures]).add_(spares[0])
        else:  # one exponential serves both directions
            torch.add(text_factors[texts, None], image_factors[pictures], out=spares[0])
            tile.sub_(shift).exp_().mul_(spares[0])
        if i == j:
            tile.diagonal().copy_(own_weights[texts])
        gradients.add(tile, j, i)

    tiles.sweep(add_weights, disjoint=gradients.image is not None)


# --- Sigmoid


class _SigmoidLoss(torch.autograd.Function):
    """Mean over pictures of the sum over texts of -log_sigmoid(±logit), + on the diagonal.

    The weights need no sums over rows, so the gradient is ready in the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, zimg: Tensor, ztxt: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        tiles = _Tiles(zimg, ztxt, scale)
        gradients = _Gradients(tiles, both=ctx.needs_input_grad[0]) if any(ctx.needs_input_grad) else None
        offset = float(bias)
        losses = tiles.ztxt.new_zeros(len(tiles.blocks), len(tiles.blocks), dtype=tiles.wide)
        weights = torch.zeros_like(losses)

        def add_losses(tile: Tensor, spares: list[Tensor], j: int, i: int) -> None:
            tile.add_(offset)
            if i == j:
                tile.diagonal().neg_()
            losses[j, i] = _softplus(tile, *spares)
            if gradients is not None:
                if i == j:
                    tile.diagonal().neg_()
                weights[j, i] = tile.sum()
                gradients.add(tile, j, i)

        tiles.sweep(add_losses, disjoint=ctx.needs_input_grad[0])
        if gradients is not None:
            average = torch.ones_like(scale) / len(zimg)
            ctx.save_for_backward(
                *gradients.times(average, scale), (weights.sum() / len(zimg)).to(bias.dtype)
            )
        return (losses.sum() / len(zimg)).to(zimg.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if gradient is None else gradient * grad for gradient in ctx.saved_tensors)


def _softplus(tile: Tensor, plus_one: Tensor, lost: Tensor) -> Tensor:
    """Return the sum of log(1 + exp(x)) over a tile of x, and leave the sigmoid of x in the tile."""
    above = tile.new_zeros(())
    if bool(tile.max() > _LINEAR_FROM):  # there log(1 + exp(x)) is x, and exp(x) could overflow
        above = torch.sub(tile, _LINEAR_FROM, out=lost).clamp_(min=0).sum()
        tile.clamp_(max=_LINEAR_FROM)
    # As log1p, which is six times slower than log: the logarithm of what 1 + exp(x) is rounded to, plus the
    # derivative of the logarithm times what the rounding took away.
    tile.exp_()
    torch.add(tile, 1, out=plus_one)
    torch.sub(plus_one, 1, out=lost)
    torch.sub(tile, lost, out=lost).div_(plus_one)
    tile.div_(plus_one)
    return above + lost.sum() + plus_one.log_().sum()
