"""Every rival's rule written out slowly, block by block and token by token, in float64 NumPy.

Shares nothing with lightforcing.selectors but the Geometry that both are given.
"""

import numpy as np

from lightforcing.selectors import Geometry

MORTON_8 = [  # raster index of the tokens of an 8 x 8 frame in Morton order, by hand
    0, 1, 8, 9, 2, 3, 10, 11, 16, 17, 24, 25, 18, 19, 26, 27,
    4, 5, 12, 13, 6, 7, 14, 15, 20, 21, 28, 29, 22, 23, 30, 31,
    32, 33, 40, 41, 34, 35, 42, 43, 48, 49, 56, 57, 50, 51, 58, 59,
    36, 37, 44, 45, 38, 39, 46, 47, 52, 53, 60, 61, 54, 55, 62, 63,
]  # fmt: skip


def tiles_8(frames=4, q_frames=1, kept=4, **changes):
    """Frames of 8 x 8 tokens in Morton order: four blocks of 16 are the four 4 x 4 tiles."""
    return Geometry(64, q_frames, frames, kept, 16, 16, (8, 8), "morton", **changes)


def ragged(kept=6, **changes):
    """Frames of 4 x 5 tokens in raster order, blocks of 16 and 4; query blocks cross frames."""
    return Geometry(20, 3, 9, kept, **{"block_q": 32, "block_k": 16, "grid": (4, 5), **changes})


def key_blocks(g):
    """(frame, block in the frame, first token, end) of every key block, tokens of the video."""
    out = []
    for frame in range(g.k_frames):
        for place, begin in enumerate(range(0, g.frame_tokens, g.block_k)):
            end = min(begin + g.block_k, g.frame_tokens)
            out.append((frame, place, frame * g.frame_tokens + begin, frame * g.frame_tokens + end))
    return out


def own_blocks(g, row):
    """Numbers of the key blocks in which the rows of a query block lie."""
    first = g.past * g.frame_tokens
    tokens = range(first + row * g.block_q, first + min((row + 1) * g.block_q, g.q_len))
    return {j for j, (_, _, a, b) in enumerate(key_blocks(g)) for t in tokens if a <= t < b}


def lists(blocks):
    """Rows of a list as Python lists, [B][H][R]."""
    kept = np.asarray(blocks.to_bool())
    return [[[np.flatnonzero(r).tolist() for r in h] for h in b] for b in kept]


def best(scores, kept):
    """The kept highest, ties to the lower index, ascending."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return sorted(order[:kept])


def means(x, spans):
    """Means of token spans of [L, D]."""
    return np.stack([x[a:b].astype(np.float64).mean(0) for a, b in spans])


def pooled(q, k, g):
    """Mean query of every query block and mean key of every key block of one head, [L, D] each."""
    rows = [(a, min(a + g.block_q, g.q_len)) for a in range(0, g.q_len, g.block_q)]
    return means(q, rows), means(k, [(a, b) for _, _, a, b in key_blocks(g)])


def mean_rule(q, k, g):
    qm, km = pooled(q, k, g)
    return [best((row @ km.T).tolist(), g.kept) for row in qm]


def sta_rule(g, window, sink=0):
    """Windows of whole tiles in a grid of `down` x `across` tiles, clamped at the borders."""
    side = int(np.sqrt(g.block_k))
    down, across = g.grid[0] // side, g.grid[1] // side
    place = {}
    for at, raster in enumerate(morton(g.grid)[:: g.block_k]):
        place[at] = raster // g.grid[1] // side, raster % g.grid[1] // side
    out = []
    for row in range(g.rows):
        kept = set()
        for own in own_blocks(g, row):
            y, x = place[own % g.per_frame]
            top = min(max(y - (window[1] - 1) // 2, 0), max(0, down - window[1]))
            left = min(max(x - (window[2] - 1) // 2, 0), max(0, across - window[2]))
            for j, (frame, at, _, _) in enumerate(key_blocks(g)):
                near = frame >= g.k_frames - window[0] or frame < sink
                v, u = place[at]
                if near and top <= v < top + window[1] and left <= u < left + window[2]:
                    kept.add(j)
        out.append(sorted(kept))
    return out


def morton(grid):
    """Raster indices in Morton order, by comparing interleaved binary digits as text."""

    def key(raster):
        row, column = divmod(raster, grid[1])
        return "".join(a + b for a, b in zip(f"{row:08b}", f"{column:08b}", strict=True))

    return sorted(range(grid[0] * grid[1]), key=key)


def radial_rule(g, decay, split):
    """The published mask, token by token, then the rule for blocks; T a multiple of the blocks."""
    t, n = np.arange(g.frame_tokens), g.frame_tokens
    if g.order == "morton":
        t = np.array(morton(g.grid))
    far = np.abs(t[:, None] - t[None, :])
    out = []
    for frame in range(g.past, g.k_frames):
        whole = []
        for other in range(g.k_frames):
            d = abs(frame - other)
            length = 2 ** int(n).bit_length() / 2 ** int(d).bit_length()
            width = max(int(length * decay), g.block_k)
            width = {0: n, 1: n // 2}.get(d, width)
            mask = far <= (n if other == 0 else width)
            if other and length < split and d % int(split / length):
                mask = np.zeros_like(mask)
            whole.append(mask)
        mask = np.concatenate(whole, 1)
        for row in range(0, n, g.block_q):
            kept = []
            for j, (_, _, a, b) in enumerate(key_blocks(g)):
                share = mask[row : row + g.block_q, a:b].mean(0)
                if (share > 1 / 3).sum() > 0.6 * (share > 0).sum():
                    kept.append(j)
            out.append(kept)
    return out


def similar(x, spans):
    """Mean cosine similarity of all pairs of tokens of each span of [L, D]."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return [float((unit[a:b] @ unit[a:b].T).mean()) for a, b in spans]


def sparge_rule(q, k, g, *, similarity, mass=None):
    """The published block map: top-k with g.kept, or top-p with `mass`."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    k = k - k.mean(0)
    qm, km = pooled(q, k, g)
    spans = [(a, b) for _, _, a, b in key_blocks(g)]
    rows = [(a, min(a + g.block_q, g.q_len)) for a in range(0, g.q_len, g.block_q)]
    forced = [j for j, s in enumerate(similar(k, spans)) if s <= similarity]
    out = []
    for row, alike in zip(qm, similar(q, rows), strict=True):
        logits = row @ km.T * q.shape[1] ** -0.5
        logits[forced] = -np.inf
        p = np.exp(logits - logits.max())
        p = p / p.sum()
        order = [j for j in sorted(range(len(p)), key=lambda j: (-p[j], j)) if j not in forced]
        count = g.kept
        if mass is not None:
            count = 1
            while p[order[:count]].sum() < mass and count < len(order):
                count += 1
        kept = sorted({*forced, *order[:count]})
        out.append(kept if alike > similarity else list(range(g.blocks)))
    return out


def vmoba_rule(q, k, g, frames=(2, 3), threshold=None):
    """Macro-blocks in the order of their scores, the query block's own ones first."""
    qm, _ = pooled(q, k, g)
    blocks = key_blocks(g)
    kind = g.layer % 3
    name = [
        lambda f, p: (f // frames[0],),
        lambda f, p: (p,),
        lambda f, p: (f // frames[1], p),
    ][kind]
    macros = sorted({name(f, p) for f, p, _, _ in blocks})
    members = {m: [j for j, (f, p, _, _) in enumerate(blocks) if name(f, p) == m] for m in macros}
    keys = {}
    for m in macros:
        tokens = np.concatenate([k[blocks[j][2] : blocks[j][3]] for j in members[m]])
        keys[m] = tokens.astype(np.float64).mean(0)
    _, km = pooled(q, k, g)
    out = []
    for r, row in enumerate(qm):
        own = {m for m in macros if own_blocks(g, r) & set(members[m])}
        score = {m: row @ keys[m] for m in macros}
        order = sorted(macros, key=lambda m: (m not in own, -score[m], m))
        if threshold is None:
            kept = []
            for m in order:
                kept += sorted(members[m], key=lambda j: (-(row @ km[j]), j))
            out.append(sorted(kept[: g.kept]))
            continue
        low, high = min(score.values()), max(score.values())
        share = {m: (s - low) / (high - low) for m, s in score.items()}
        kept, held = [], 0.0
        for m in order:
            kept += members[m]
            held += share[m]
            if held >= threshold * sum(share.values()):
                break
        out.append(sorted(kept))
    return out


def cube_rule(q, k, g, frames):
    """Top cubes: one place through some frames; the last in part, by its blocks' own scores."""
    qm, km = pooled(q, k, g)
    blocks = key_blocks(g)
    cubes = sorted({(f // frames, p) for f, p, _, _ in blocks})
    out = []
    for row in qm:
        members, score = {}, {}
        for c in cubes:
            members[c] = [j for j, (f, p, _, _) in enumerate(blocks) if (f // frames, p) == c]
            tokens = np.concatenate([k[blocks[j][2] : blocks[j][3]] for j in members[c]])
            score[c] = row @ tokens.astype(np.float64).mean(0)
        kept = []
        for c in sorted(cubes, key=lambda c: (-score[c], c)):
            kept += sorted(members[c], key=lambda j: (-(row @ km[j]), j))
        out.append(sorted(kept[: g.kept]))
    return out


def mass_table(q, k, g):
    """True attention mass of every key block for every query block, [R, J]."""
    logits = q.astype(np.float64) @ k.astype(np.float64).T * q.shape[1] ** -0.5
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    columns = np.stack([p[:, a:b].sum(1) for _, _, a, b in key_blocks(g)], 1)
    return np.stack([columns[a : a + g.block_q].sum(0) for a in range(0, g.q_len, g.block_q)])


def oracle_rule(q, k, g):
    return [best(row.tolist(), g.kept) for row in mass_table(q, k, g)]


def density(rows, g):
    """Share of key blocks kept."""
    return sum(map(len, rows)) / len(rows) / g.blocks
