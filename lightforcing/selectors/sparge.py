"""SpargeAttn (arXiv 2502.18137), its first stage: softmax of pooled scores, top-k or top-p."""

from dataclasses import dataclass

from .rank import Scored, as_torch, block_means, first, head_counts, ranking, top


@dataclass(frozen=True)
class Sparge(Scored):
    """Blocks by the softmax of mean query times mean key, and those whose mean says too little.

    A block is compressible when the mean cosine similarity of all pairs of its tokens exceeds
    ``similarity``; keys are centred first. As published, a key block that is not compressible is
    attended by everybody and scores nothing, and a query block that is not attends everything.

    Attributes:
        mode: ``topk``: as many blocks as the schedule says. ``topp``: the fewest that hold ``mass``
            of the softmax.
        similarity: -0.1 (nothing is incompressible) is the source's for top-k, 0.6 for top-p.
        mass: of top-p; the source's is 0.98. None is the value at which the rows of a video keep
            the schedule's count on average (each row at least one).
        fit: blocks that are not compressible take slots of the budget, at most half of a row's,
            the least similar first (a lower threshold for heads with more), and query blocks that
            are not get no more than others; False adds them on top, as published.
        sink: key block 0 is attended by everybody.
    """

    mode: str = "topk"
    similarity: float = -0.1
    mass: float | None = None
    fit: bool = True
    sink: bool = False

    def __post_init__(self):
        """Check the mode and the share."""
        if self.mode not in ("topk", "topp"):
            raise ValueError(f"mode: expected topk or topp, got {self.mode!r}")
        if self.mass is not None and not 0 < self.mass <= 1:
            raise ValueError(f"mass: expected a share in (0, 1], got {self.mass}")

    @property
    def name(self):
        """``sparge``, ``sparge-sim`` with the similarity test, or ``sparge-topp``."""
        if self.mode == "topp":
            return "sparge-topp"
        return "sparge" if self.similarity < 0 else "sparge-sim"

    @property
    def notes(self):
        """What of the source this is."""
        rule = "top-k" if self.mode == "topk" else "top-p"
        if self.mode == "topp" and self.mass is None:
            rule += " at the schedule's mean density"
        test = "no similarity test"
        if self.similarity >= 0:
            test = f"one similarity threshold ({self.similarity:g}) for all heads"
            test += ", lowered where it forces more than half of a row" * self.fit
        return (
            f"Stage 1 only, {rule}, {test} (the source tunes one per head); no skipping inside the "
            "kernel, no quantisation."
        )

    @property
    def exact(self):
        """Top-p rows differ, and what comes on top of top-k does."""
        return self.mode == "topk" and (self.fit or (self.similarity < 0 and not self.sink))

    def scores(self, q, k, geometry):
        """Softmax of the pooled scores; forced blocks above 1, the least similar first."""
        import torch

        tokens = geometry.frame_tokens
        scale = q.shape[3] ** -0.5 if geometry.scale is None else geometry.scale
        centre = k.float().mean(1, keepdim=True)
        qm = block_means(q, geometry.block_q)
        km = block_means(k, geometry.block_k, tokens) - centre.transpose(1, 2)
        logits = scale * (qm @ km.mT)
        forced = torch.zeros(*logits.shape[:2], 1, logits.shape[3], device=logits.device)
        if self.similarity >= 0:  # a mean of cosines over all pairs is never negative
            alike = _similarity(k - centre, geometry.block_k, tokens)[:, :, None]
            forced = torch.where(alike > self.similarity, 0.0, 3.0 - alike)
            if self.fit:
                forced = _most(forced, geometry)
            logits = logits.masked_fill(forced > 0, -torch.inf)
        # A row of forced blocks only has no softmax.
        scores = logits.softmax(-1).nan_to_num(0.0)
        if self.sink:
            forced[..., 0] = 5.0
        return torch.where(forced > 0, forced, scores)

    def select(self, q, k, geometry):
        """See :class:`lightforcing.selectors.Selector`."""
        import torch

        tq, tk = as_torch(q), as_torch(k)
        scores = self.scores(tq, tk, geometry)
        if self.exact:
            return top(scores, geometry, q)
        order = ranking(scores)
        forced = (scores > 1).sum(-1)
        p = scores.gather(-1, order).double()
        p = p.masked_fill(p > 1, 0.0)
        before = p.cumsum(-1) - p  # mass of what ranks higher; in float32 all of a tail is at 1
        place = torch.arange(p.shape[-1], device=p.device)
        before = before.masked_fill(place < forced[..., None], -1)
        by_head = head_counts(geometry, p.shape[1], p.device)
        if self.mode == "topk":
            counts = forced + (geometry.kept if by_head is None else by_head[:, None])
        elif self.mass is None:
            total = sum(geometry.kept_by_head or [geometry.kept] * p.shape[1])
            counts = _pooled(before, total * p.shape[2])
        else:
            counts = (before < self.mass).sum(-1)
        if not self.fit and self.similarity >= 0:
            alike = _similarity(tq, geometry.block_q, None) > self.similarity
            counts = torch.where(alike, counts, geometry.blocks)
        return first(order, counts.clamp(1, geometry.blocks), geometry, q)


def _most(forced, geometry):
    """The highest of ``forced`` [B, H, 1, J], for half of a row's slots; the others 0."""
    import torch

    order = ranking(forced)
    slots = head_counts(geometry, forced.shape[1], forced.device)
    slots = geometry.kept // 2 if slots is None else (slots // 2)[:, None, None]
    place = torch.arange(forced.shape[3], device=forced.device)
    first = (place < slots).expand(forced.shape)
    return forced * torch.zeros_like(first).scatter(-1, order, first)


def _pooled(before, total):
    """Counts of each row: the rows of all heads keep ``total`` together, by one threshold."""
    import torch

    batch, heads, rows, blocks = before.shape
    before = before.clone()
    before[..., 0] = -2  # everybody keeps one
    order = before.flatten(1).sort(dim=-1, stable=True).indices[:, :total]
    chosen = torch.zeros(batch, heads * rows * blocks, dtype=torch.bool, device=before.device)
    return chosen.scatter_(1, order, True).view(before.shape).sum(-1)


def _similarity(x, block, frame_tokens):
    """Mean cosine of all pairs of tokens of each block, [B, H, n]: |mean of unit vectors|^2."""
    unit = x.float()
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return block_means(unit, block, frame_tokens).square().sum(-1)
