"""The two contrastive losses, exact over the whole batch and without its B × B matrix.

Notable features:
- The logits are computed in tiles (tiles.py) and dropped at once: the extra memory is the gradient itself and
  a few tiles. `softmax_loss` computes each tile twice (for the sums, then for the gradient) unless it is one
  of the few kept in between, `sigmoid_loss` once.
- With a locked image tower only the texts need a gradient: three B × B × D products instead of the five of
  the plain loss (two instead of four for the sigmoid).
- The diagonal is computed apart, in float64, and a pair's loss is `log(1 + others / own)`: neither the loss nor
  its gradient loses digits when a model is nearly perfect.
- Rows that share an image or a caption are positives of each other (positives.py). Their logits are float64, too, and
  never pass through the sums over others.
- Every sum has a fixed order: results are the same to the last bit in every run.
- Each of several processes can take the share that belongs to its texts (shares.py).

Shapes: B pairs, D width; b of the pairs have their texts here, in a process of its own all B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamplit.errors import UsageError, kind_of
from lamplit.losses.positives import Peers, Positives, PositiveSums, find_positives
from lamplit.losses.tiles import Gradients, Tiles, add_up

_LN2 = math.log(2)  # tiles hold logits in units of it
_KEPT_BYTES = 165 * 2**20  # kept tiles, sums and twice the gradient: all tiles at B = 4096, one in 190 at 32768
_LINEAR_FROM = 115.0  # 2 ** 115 is a float32, and log2(1 + 2 ** 115) is 115 even in float64


def softmax_loss(
    zimg: Tensor,
    ztxt: Tensor,
    logit_scale: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
) -> Tensor:
    """Compute the mean cross entropy of finding each image's text and each text's image (LiT, CLIP).

    Rows i and j are positives of each other if their image ids or their text ids are equal; the target of
    a row is uniform over its positives. Without ids a row's only positive is itself.

    Args:
        zimg: unit vectors of the images, (B, D).
        ztxt: unit vectors of their texts, (B, D).
        logit_scale: the multiplier of the cosines, not its logarithm (open_clip: `logit_scale.exp()`); a scalar.
        image_ids: integers, (B,); equal if two rows show the same image.
        text_ids: integers, (B,); equal if two rows have the same text.

    Returns:
        The loss, a scalar; float64 for float64 vectors, else float32.

    Raises:
        UsageError: the shapes do not fit, or something is no tensor.

    Example:
        >>> loss = lamplit.softmax_loss(zimg, ztxt, model.logit_multiplier)
        >>> loss.backward()
    """
    zimg, ztxt, scale = prepare(zimg, ztxt, logit_scale)
    positives = shared_positives(zimg, image_ids, text_ids)
    loss: Tensor = run_uncompiled(SoftmaxLoss, *_gradient_side_last(zimg, ztxt), scale, positives, None)
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
    """Compute the binary cross entropy of every image with every text: sum over texts, mean over images (SigLIP).

    Rows that share an image or a text are positives of each other.

    Args:
        zimg: unit vectors of the images, (B, D).
        ztxt: unit vectors of their texts, (B, D).
        logit_scale: the multiplier of the cosines, not its logarithm (open_clip: `logit_scale.exp()`); a scalar.
        logit_bias: what is added to every logit, a scalar.
        image_ids: integers, (B,); equal if two rows show the same image.
        text_ids: integers, (B,); equal if two rows have the same text.

    Returns:
        The loss, a scalar; float64 for float64 vectors, else float32.

    Raises:
        UsageError: the shapes do not fit, or something is no tensor.

    Example:
        >>> loss = lamplit.sigmoid_loss(zimg, ztxt, model.logit_multiplier, bias)
        >>> loss.backward()
    """
    zimg, ztxt, scale = prepare(zimg, ztxt, logit_scale)
    require_tensors(logit_bias=logit_bias)
    bias = logit_bias.reshape(()).to(zimg.dtype)
    positives = shared_positives(zimg, image_ids, text_ids)
    loss: Tensor = run_uncompiled(SigmoidLoss, *_gradient_side_last(zimg, ztxt), scale, bias, positives)
    return loss


@torch.compiler.disable  # type: ignore[untyped-decorator]  # no compiler of torch follows tiles written in place
def run_uncompiled(function: type[torch.autograd.Function], *inputs: Tensor | Positives | Peers | None) -> Any:
    """Call a loss."""
    return function.apply(*inputs)


def prepare(
    zimg: Tensor, ztxt: Tensor, logit_scale: Tensor, *, is_share: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the shapes; give all three one type of at least float32."""
    require_tensors(zimg=zimg, ztxt=ztxt, logit_scale=logit_scale)
    fits = zimg.ndim == ztxt.ndim == 2 and zimg.shape[1] == ztxt.shape[1] and 0 < len(ztxt) <= len(zimg)
    if not fits or (len(ztxt) < len(zimg) and not is_share):
        shapes = f"the loss got vectors of shapes {tuple(zimg.shape)} and {tuple(ztxt.shape)}; it needs"
        if is_share:
            raise UsageError(f"{shapes} some of the texts of all images: (B, D) and (b, D), 0 < b <= B")
        raise UsageError(f"{shapes} one image and one text per row: two matrices of the same shape (B, D), B > 0")
    dtype = torch.promote_types(torch.promote_types(zimg.dtype, ztxt.dtype), torch.float32)
    return zimg.to(dtype), ztxt.to(dtype), logit_scale.reshape(()).to(dtype)


def require_tensors(**inputs: object) -> None:
    """Raise UsageError if something is no tensor."""
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"the loss takes torch tensors; {name} is {kind_of(value)}: give torch.as_tensor({name})")


def _gradient_side_last(zimg: Tensor, ztxt: Tensor) -> tuple[Tensor, Tensor]:
    # Both losses are symmetric in the two sides, and the last side's gradient is the cheaper one.
    return (ztxt, zimg) if zimg.requires_grad and not ztxt.requires_grad else (zimg, ztxt)


def shared_positives(zimg: Tensor, image_ids: Tensor | None, text_ids: Tensor | None) -> Positives | None:
    """Check the ids; None if no row has other positives than itself."""
    given = []
    for name, ids in (("image_ids", image_ids), ("text_ids", text_ids)):
        if ids is not None:
            require_tensors(**{name: ids})
            if ids.shape != zimg.shape[:1]:
                raise UsageError(f"{name} has the shape {tuple(ids.shape)}; it needs one id per row: ({len(zimg)},)")
            given.append(ids.detach().to(zimg.device))
    return find_positives(given)


# --- Softmax


class SoftmaxLoss(torch.autograd.Function):
    """Mean of both directions' cross entropy; each row's target is uniform over its positives."""

    @staticmethod
    def forward(
        ctx: Any, zimg: Tensor, ztxt: Tensor, scale: Tensor, positives: Positives | None, peers: Peers | None
    ) -> Tensor:
        """Compute the loss, or the share of the texts that are here."""
        tiles = Tiles(zimg, ztxt, scale)
        kept_bytes = _KEPT_BYTES - 2 * ztxt.nbytes if any(ctx.needs_input_grad) else 0
        sums, others, shift, kept = _log_sums(tiles, positives, kept_bytes)
        if peers is not None:
            others[1] = sums.join(others[1], peers)
        log_positives = sums.logarithms()
        of_others = torch.logaddexp2(others - log_positives, others.new_zeros(()))  # log2(1 + others / positives)
        losses = sums.excess()
        losses[:, sums.here] += of_others[:, sums.here]
        log_sums = log_positives + of_others
        if peers is not None:  # of images without a positive here
            log_sums[1, len(ztxt) :] = torch.logaddexp2(others, log_positives)[1, len(ztxt) :]
        ctx.shift, ctx.kept, ctx.positives, ctx.sums = shift, list(kept), positives, sums
        ctx.save_for_backward(zimg, ztxt, scale, log_sums, of_others, *kept.values())
        return (add_up(losses) / losses.numel() * _LN2).to(zimg.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients."""
        zimg, ztxt, scale, log_sums, of_others, *powers = ctx.saved_tensors
        kept = dict(zip(ctx.kept, powers, strict=True))
        gradients = Gradients(Tiles(zimg, ztxt, scale), both=ctx.needs_input_grad[0])
        weights = _PositiveWeights(ctx.positives, ctx.sums, torch.expm1(of_others * -_LN2))
        _add_softmax_weights(gradients, log_sums, weights, ctx.shift, kept)
        return *gradients.times(grad / (2 * len(zimg)), scale), None, None


class _LogSums(NamedTuple):
    """The sums of powers of two over each text's and each image's positives and others, and how they were taken."""

    positives: PositiveSums
    others: Tensor  # (2, B) binary logarithms of the sums, of texts and of images
    shift: float | None  # subtracted from all logits to keep the powers in range; None: no one number does it
    kept: dict[tuple[int, int], Tensor]  # powers of some tiles, by text and image block


def _log_sums(tiles: Tiles, positives: Positives | None, kept_bytes: int) -> _LogSums:
    shift = _common_shift(tiles)
    of_positives = PositiveSums(tiles.own_logits(), tiles.size, positives)
    parts = tiles.ztxt.new_zeros(2, len(tiles.blocks), tiles.size)  # one from each tile
    kept = {}
    num_kept = (kept_bytes - parts.nbytes) // (parts.element_size() * tiles.side**2)

    def sum_powers(spares: list[Tensor], j: int, i: int) -> None:
        tile = tiles.logits(j, i, out=spares[0]).sub_(shift).exp2_()
        if i == j:
            tile.fill_diagonal_(0)
        found = None if positives is None else positives.in_tile(tiles, j, i, keep=True)
        if found is not None:
            tile[found.texts, found.images] = 0
            of_positives.add(0, tiles.text_blocks[j], found.texts, found.logits)
            of_positives.add(1, tiles.blocks[i], found.images, found.logits)
        torch.sum(tile, 1, out=parts[0, i, tiles.text_blocks[j]])
        torch.sum(tile, 0, out=parts[1, j, tiles.blocks[i]])
        if i * len(tiles.text_blocks) + j < num_kept:
            kept[j, i] = tile.clone()

    tiles.sweep(sum_powers, disjoint=positives is not None)
    sums = parts.sum(1, dtype=tiles.wide)
    # What was rounded to zero is lost: all of it must be nothing beside the sum.
    finfo = torch.finfo(parts.dtype)
    least = tiles.size * finfo.tiny / finfo.eps if tiles.size > 1 else -1.0
    taken = torch.cat([sums[0, of_positives.here], sums[1]])
    if bool(((taken > least) & (taken < math.inf)).all()):
        return _LogSums(of_positives, sums.log2_().add_(shift), shift, kept)
    return _LogSums(of_positives, _log_sums_by_maxima(tiles, positives), None, {})


def _common_shift(tiles: Tiles) -> float:
    # Cosines are at most 1. The smallest shift under which a sum of B powers stays finite and its inverse
    # normal; none is needed up to a logit scale of about 74 (float32, B = 32768).
    largest = math.log2(torch.finfo(tiles.ztxt.dtype).max) - math.log2(tiles.size) - 6
    return max(0.0, abs(tiles.scale) - largest)


def _log_sums_by_maxima(tiles: Tiles, positives: Positives | None) -> Tensor:
    """Compute the same logarithms of sums where no common shift brings all powers within range."""
    parts = tiles.ztxt.new_full((2, len(tiles.blocks), tiles.size), -math.inf, dtype=tiles.wide)

    def sum_powers(spares: list[Tensor], j: int, i: int) -> None:
        tile = tiles.logits(j, i, out=spares[0])
        if i == j:
            tile.fill_diagonal_(-math.inf)
        found = None if positives is None else positives.in_tile(tiles, j, i, keep=True)
        if found is not None:
            tile[found.texts, found.images] = -math.inf
        for dim, part in ((1, parts[0, i, tiles.text_blocks[j]]), (0, parts[1, j, tiles.blocks[i]])):
            # The clamp is for a row of nothing but -inf: any finite maximum gives it the sum 0.
            maxima = tile.amax(dim, keepdim=True).clamp_(min=torch.finfo(tile.dtype).min)
            sums = torch.sub(tile, maxima, out=spares[1]).exp2_().sum(dim)
            part.copy_(sums.to(tiles.wide).log2_().add_(maxima.squeeze(dim)))

    tiles.sweep(sum_powers)
    return (parts * _LN2).logsumexp(1) / _LN2


@dataclass(frozen=True)
class _PositiveWeights:
    """The derivatives of both directions' losses by the logits of positives."""

    positives: Positives | None
    sums: PositiveSums
    to_others: Tensor  # (2, B) positives / all - 1

    def own(self) -> Tensor:
        """Of the pairs themselves whose texts are here, (b,)."""
        here, own = self.sums.here, self.sums.own[self.sums.here]
        return self._weigh(0, here, own) + self._weigh(1, here, own)

    def write(self, weights: Tensor, tiles: Tiles, j: int, i: int) -> None:
        """Write those beside the diagonal to a tile of weights."""
        found = None if self.positives is None else self.positives.in_tile(tiles, j, i, keep=True)
        if found is not None:
            of_texts = self._weigh(0, found.texts + tiles.text_blocks[j].start, found.logits)
            of_images = self._weigh(1, found.images + tiles.blocks[i].start, found.logits)
            weights[found.texts, found.images] = (of_texts + of_images).to(weights.dtype)

    def _weigh(self, side: int, rows: Tensor | slice, logits: Tensor) -> Tensor:
        # The share of all less the target, without a difference of near equals where the others are next to nothing.
        share = (logits - self.sums.maxima[side, rows]).exp2_().div_(self.sums.scaled[side, rows])
        return share * self.to_others[side, rows] + (share - 1 / self.sums.counts[rows])


def _add_softmax_weights(
    gradients: Gradients,
    log_sums: Tensor,
    positives: _PositiveWeights,
    shift: float | None,
    kept: dict[tuple[int, int], Tensor],
) -> None:
    """Add up the gradients of both directions' log-sums, less the mean logits of positives.

    Args:
        gradients: what is added to.
        log_sums: of the whole rows, of texts and of images, (2, B).
        positives: their weights.
        shift: as `_log_sums` returned it.
        kept: as `_log_sums` returned them; not changed, because there may be another backward pass.
    """
    tiles = gradients.tiles
    dtype = tiles.ztxt.dtype
    # 2 ** (logit - log_sum) is 2 ** (logit - shift) times 2 ** (shift - log_sum), one number per row.
    shifts = log_sums.round() if shift is None else torch.full_like(log_sums, shift)
    text_factors, image_factors = (shifts - log_sums).exp2_().to(dtype)
    text_shifts, image_shifts = shifts.to(dtype)
    own_weights = positives.own().to(dtype)

    def add_weights(spares: list[Tensor], j: int, i: int) -> None:
        texts, images = tiles.text_blocks[j], tiles.blocks[i]
        tile, weights, _ = spares
        if shift is None:
            tiles.logits(j, i, out=tile)
            torch.sub(tile, text_shifts[texts, None], out=weights).exp2_().mul_(text_factors[texts, None])
            weights.add_(tile.sub_(image_shifts[images]).exp2_().mul_(image_factors[images]))
        else:  # one power serves both directions
            powers = kept.get((j, i))
            if powers is None:
                powers = tiles.logits(j, i, out=tile).sub_(shift).exp2_()
            torch.add(text_factors[texts, None], image_factors[images], out=weights).mul_(powers)
        if i == j:
            weights.diagonal().copy_(own_weights[texts])
        positives.write(weights, tiles, j, i)
        gradients.add(weights, j, i)

    tiles.sweep(add_weights, disjoint=gradients.image is not None)


# --- Sigmoid


class SigmoidLoss(torch.autograd.Function):
    """Mean over images of the sum over texts of -log_sigmoid(±logit), + for positives.

    The weights need no sums over rows, so the gradient is ready in the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, zimg: Tensor, ztxt: Tensor, scale: Tensor, bias: Tensor, positives: Positives | None
    ) -> Tensor:
        """Compute the loss, or the share of the texts that are here."""
        tiles = Tiles(zimg, ztxt, scale)
        gradients = Gradients(tiles, both=ctx.needs_input_grad[0]) if any(ctx.needs_input_grad) else None
        offset = float(bias.detach()) / _LN2
        own = tiles.own_logits()
        losses = own.new_zeros(len(tiles.text_blocks), len(tiles.blocks))
        weights = torch.zeros_like(losses)

        def add_losses(spares: list[Tensor], j: int, i: int) -> None:
            tile = tiles.logits(j, i, out=spares[0]).add_(offset)
            if i == j:
                tile.diagonal().copy_(-own[tiles.text_blocks[j]] - offset)
            found = None if positives is None else positives.in_tile(tiles, j, i)
            if found is not None:
                tile[found.texts, found.images] = (-found.logits - offset).to(tile.dtype)
            losses[j, i] = _softplus(tile, *spares[1:])
            if gradients is not None:
                if i == j:
                    tile.diagonal().neg_()
                if found is not None:
                    tile[found.texts, found.images] *= -1
                weights[j, i] = tile.sum()
                gradients.add(tile, j, i)

        tiles.sweep(add_losses, disjoint=ctx.needs_input_grad[0])
        if gradients is not None:
            average = torch.ones_like(scale) / len(zimg)
            ctx.save_for_backward(*gradients.times(average, scale), (weights.sum() / len(zimg)).to(bias.dtype))
        return (losses.sum() * _LN2 / len(zimg)).to(zimg.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients."""
        return *(None if gradient is None else gradient * grad for gradient in ctx.saved_tensors), None


def _softplus(tile: Tensor, plus_one: Tensor, lost: Tensor) -> Tensor:
    """Return the sum of log2(1 + 2 ** x) over a tile of x, and leave 2 ** x / (1 + 2 ** x) in it."""
    above = tile.new_zeros(())
    if bool(tile.max() > _LINEAR_FROM):  # there log2(1 + 2 ** x) is x, and 2 ** x could overflow
        above = torch.sub(tile, _LINEAR_FROM, out=lost).clamp_(min=0).sum()
        tile.clamp_(max=_LINEAR_FROM)
    # torch's log1p can be seven times slower than its log2. So: the logarithm of what 1 + 2 ** x is rounded
    # to, plus what the rounding took away times the logarithm's derivative.
    tile.exp2_()
    torch.add(tile, 1, out=plus_one)
    torch.sub(plus_one, 1, out=lost)
    torch.sub(tile, lost, out=lost).div_(plus_one)
    tile.div_(plus_one)
    return above + lost.sum() / _LN2 + plus_one.log2_().sum()
