/* What the kernels of select_blocks share: the geometry of a call and its workspace.
 *
 * A part is a sub-block: block_k / 4 consecutive tokens of a frame (keys), or as many rows of a
 * query block; the last part of a frame or of a query block is short. Key block j has the parts
 * 4 b .. 4 b + 3 of its frame, b its number there, some of which may not exist. */
#pragma once

#include "launch.cuh"
#include "ptx.cuh"
#include <cfloat>

namespace lf {

struct Selection {
    lf_select_params p;
    int batch_heads, heads, dim;  // 32-bit: a 64-bit division is a call
    int part;                     // rows of a part: block_k / 4
    int blocks;                   // J
    int frame_blocks;             // key blocks of a frame
    int frame_parts;              // key parts of a frame
    int q_blocks;                 // R
    int block_parts;              // A / R: parts of a query block
    int q_parts;                  // A: parts of the queries, R * block_parts, some at the end empty
    int q_tiles;                  // tiles of 8 query parts of a (batch, head)
    int q_len;                    // query rows
    int new_frames;               // frames of k whose means are not given
    int padded_blocks;            // J rounded up to whole sectors of L2: the row length of `logits`
    uint32_t over_block_parts, over_frame_blocks;  // quotient() by these
    // Means of the new frames, in k_means (store_means) or in the workspace; row 0 is the first.
    lf_tensor new_means;
    bool q_vectors, k_vectors, means_vectors, new_vectors;  // 16-byte accesses are allowed

    // Workspace, by score: mean
    float *q_means;  // [BH, R, D]
    float *scores;   // [BH, R, J], or p.scores
    // mass, lse
    uint4 *q_split;   // [BH, ceil(A / 8), split tile]: see split.cuh
    float *q_factor;  // [BH, ceil(A / 8) * 8] logit = factor of q * factor of k * product
    float *logits;    // [BH, A, padded J] log-sum-exp of a key block's logits; bit 0 marks a NaN
};

/* x / d by a product, over = reciprocal(d): exact where x d < 2^32. (d = 1: over is 0.) An integer
 * division takes 25 instructions, one after the other. */
inline uint32_t reciprocal(int d) { return uint32_t((0xffffffffu + uint64_t(d)) / uint32_t(d)); }
__device__ __forceinline__ int quotient(int x, uint32_t over)
{
    return over > 0 ? int(__umulhi(uint32_t(x), over)) : x;
}

/* Query rows of part i of query block r: the first of them, and how many (below 1: none). */
__device__ __forceinline__ int part_rows(const Selection &s, int r, int i, int *first)
{
    const int start = r * int(s.p.block_q), end = min(start + int(s.p.block_q), s.q_len);
    *first = start + i * s.part;
    return min(s.part, end - *first);
}

/* Tokens of part i of block b of any frame, and where in the frame they start. */
__device__ __forceinline__ int key_part_tokens(const Selection &s, int b, int i, int *first)
{
    *first = b * int(s.p.block_k) + i * s.part;
    return min(s.part, int(s.p.frame_tokens) - *first);
}

/* Where a (batch, head) begins in a tensor, in elements. Most calls have one batch: a division
 * takes about 0.1 us, which every thread block would wait for. */
__device__ __forceinline__ int64_t head_offset(const Selection &s, const lf_tensor &x, int bh)
{
    if (s.p.batch == 1) return bh * x.head;
    return bh / s.heads * x.batch + bh % s.heads * x.head;
}

/* Row of the given means and of the new ones, [D] float32. */
__device__ __forceinline__ const float *given_mean(const Selection &s, int bh, int64_t row)
{
    const lf_tensor &x = s.p.k_means;
    return static_cast<const float *>(x.data) + head_offset(s, x, bh) + row * x.token;
}

__device__ __forceinline__ float *new_mean(const Selection &s, int bh, int64_t row)
{
    const lf_tensor &x = s.new_means;
    return static_cast<float *>(x.data) + head_offset(s, x, bh) + row * x.token;
}

/* The pair kernel of Hopper (select_sm90.cu); returns 0, or -1 with `err` filled. */
int launch_pairs_sm90(const Selection &s, int multiprocessors, lf_place place, lf_error *err);

}  // namespace lf
