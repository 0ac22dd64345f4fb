/* First kernel of select_blocks: means of the queries and of the key frames whose means are not
 * given, into the workspace.
 *
 *   grid   batch * heads, side by side as the heads of a token are; query units + key units
 *   block  ceil(D / 8) threads of 8 elements each, times 8 parts
 *
 * A unit is 8 parts (mass, lse), or the parts of whole blocks, about 8 (mean), whose means meet in
 * shared memory. Bound by reading q and k once; nothing is read twice. */
#pragma once

#include "means.cuh"
#include "select.cuh"
#include "split.cuh"

namespace lf {

/* 8 elements of a [B, L, H, D] tensor from a token on. */
template <typename T>
__device__ __forceinline__ Rows<T> rows_of(const lf_tensor &x, const Selection &s, int bh,
                                           int64_t token, int octet, bool vectors)
{
    const T *data = static_cast<const T *>(x.data);
    return {data + head_offset(s, x, bh) + token * x.token + octet * 8, x.token, vectors};
}

__device__ __forceinline__ void store_octet(float *to, const float (&x)[8])
{
    reinterpret_cast<float4 *>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4 *>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

/* Mean score: a block's mean from its parts' means, [parts][D] in shared memory. */
__device__ __forceinline__ void combine(const float *parts, int count, int dim, int d,
                                        const int *tokens, float *to)
{
    float sum = 0.0f;
    int total = 0;
    for (int i = 0; i < count && tokens[i] > 0; i++) {
        sum = __fadd_rn(sum, __fmul_rn(float(tokens[i]), parts[i * dim + d]));
        total += tokens[i];
    }
    if (total > 0) *to = __fdiv_rn(sum, float(total));
}

/* Units of whole query blocks (mean): their number of blocks. */
__host__ __device__ inline int q_unit_blocks(int block_parts)
{
    return block_parts < 8 ? 8 / block_parts : 1;
}

constexpr int POOL_PARTS = 32;  // parts of a unit at most: 128 rows by 4

/* Parts are numbered over the blocks of a (batch, head): part i of block b is b * per_block + i,
 * per_block being block_parts for the queries and 4 for the keys. */
struct Unit {
    bool queries;
    int first, count;  // parts
    int per_block;
};

__device__ __forceinline__ Unit unit_of(const Selection &s, int number, int q_units)
{
    if (number >= q_units) return {false, (number - q_units) * 8, 8, 4};
    const int parts = s.p.score == LF_SCORE_MEAN ? q_unit_blocks(s.block_parts) * s.block_parts : 8;
    return {true, number * parts, parts, s.block_parts};
}

/* The rows of a part, and in *n how many (below 1: none). */
template <typename T>
__device__ __forceinline__ Rows<T> rows_of_part(const Selection &s, const Unit &u, int bh, int part,
                                                int octet, int *n)
{
    int row;
    *n = 0;
    if (u.queries) {
        const int block = quotient(part, s.over_block_parts);
        if (block < s.q_blocks) *n = part_rows(s, block, part - block * s.block_parts, &row);
        return rows_of<T>(s.p.q, s, bh, row, octet, s.q_vectors);
    }
    const int block = part / 4, frame = quotient(block, s.over_frame_blocks);
    if (frame < s.new_frames)
        *n = key_part_tokens(s, block - frame * s.frame_blocks, part % 4, &row);
    const int64_t token = (s.p.means_frames + frame) * s.p.frame_tokens + row;
    return rows_of<T>(s.p.k, s, bh, token, octet, s.k_vectors);
}

/* Mean score: the means of the blocks of a unit from those of its parts, in shared memory. */
__device__ __forceinline__ void store_blocks(const Selection &s, const Unit &u, int bh,
                                             const float *parts, const int *tokens)
{
    const int d = threadIdx.y * (s.dim / 8) + threadIdx.x;  // as many threads as elements
    for (int at = 0; at < u.count; at += u.per_block) {
        const int block = (u.first + at) / u.per_block;
        float *to = u.queries ? s.q_means + (int64_t(bh) * s.q_blocks + block) * s.dim
                              : new_mean(s, bh, block);
        combine(parts + at * s.dim, u.per_block, s.dim, d, tokens + at, to + d);
    }
}

/* Scores mass, lse: a row of a tile of 8 query parts, split for the tensor cores; a part that does
 * not exist is zeros. */
__device__ __forceinline__ void store_q_part(const Selection &s, int bh, int part, int octet,
                                             int octets, const float (&mean)[8])
{
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(mean[i]));
    for (int step = octets / 2; step > 0; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    const int e = split_exponent(largest), slot = part % 8;
    const SplitOctet x = split(mean, power_of_two(-e));

    const int64_t tile = int64_t(bh) * s.q_tiles + part / 8;
    uint4 *to = s.q_split + tile * (octets * 12);
    const int lane = slot * 4 + octet % 4, step = octet / 4;
    to[step * 32 + lane] = make_uint4(x.hi[0], x.hi[1], x.hi[2], x.hi[3]);
    reinterpret_cast<uint2 *>(to + octets * 8 + step / 2 * 32 + lane)[step % 2] =
        make_uint2(x.lo8[0], x.lo8[1]);
    if (octet == 0) s.q_factor[tile * 8 + slot] = float(s.p.scale) * power_of_two(e);
}

__device__ __forceinline__ void store_k_part(const Selection &s, int bh, int part, int octet,
                                             const float (&mean)[8])
{
    const int frame = part / (4 * s.frame_blocks), i = part - frame * 4 * s.frame_blocks;
    float *to = new_mean(s, bh, frame * s.frame_parts + i) + octet * 8;
    if (s.new_vectors) {
        store_octet(to, mean);
    } else {
#pragma unroll
        for (int d = 0; d < 8; d++) to[d] = mean[d];
    }
}

/* Asks for the given means of this (batch, head), which the next kernel reads: their latency hides
 * behind this one, and DRAM has nothing else to do while q and k come from L2. Four threads take a
 * row of up to 128 elements. */
__device__ __forceinline__ void prefetch_given_means(const Selection &s, int bh)
{
    const int of_frame = s.p.score == LF_SCORE_MEAN ? s.frame_blocks : s.frame_parts;
    const int all = int(s.p.means_frames) * of_frame, per = (blockDim.x + 3) / 4;
    const int first = (blockIdx.y * blockDim.y + threadIdx.y) * per + threadIdx.x / 4;
#pragma unroll 1
    for (int row = first; row < all; row += gridDim.y * blockDim.y * per)
#pragma unroll 1
        for (int d = threadIdx.x % 4 * 32; d < s.dim; d += 128)
            prefetch_l2(given_mean(s, bh, row) + d);
}

// 64 registers let an SM hold every thread of a call of 4680 + 4680 rows; where a row takes more
// of them, spills would cost more than the rest of a wave.
template <typename T, int PART>
constexpr int POOL_RESIDENT = PART < 32 ? (sizeof(T) == 2 ? 4 : 2) : 1;

template <typename T, int PART>
__global__ void __launch_bounds__(256, (POOL_RESIDENT<T, PART>))
    pool_kernel(const __grid_constant__ Selection s, int q_units, int octets)
{
    extern __shared__ float4 pool_shared[];  // [parts of a unit][D] float, mean only
    __shared__ int tokens[POOL_PARTS];
    const int bh = blockIdx.x, octet = threadIdx.x;
    const Unit u = unit_of(s, blockIdx.y, q_units);
    float *shared = reinterpret_cast<float *>(pool_shared);

    grid_launch_dependents();
    prefetch_given_means(s, bh);
    for (int i = threadIdx.y; i < u.count; i += 8) {
        int n;
        float mean[8];
        const Rows<T> rows = rows_of_part<T>(s, u, bh, u.first + i, octet, &n);
        mean_rows<T, PART>(rows, octet * 8 < s.dim ? n : 0, mean);
        if (s.p.score == LF_SCORE_MEAN) {
            store_octet(shared + i * s.dim + octet * 8, mean);
            if (octet == 0) tokens[i] = n;
        } else if (u.queries) {
            store_q_part(s, bh, u.first + i, octet, octets, mean);
        } else if (n > 0 && octet * 8 < s.dim) {
            store_k_part(s, bh, u.first + i, octet, mean);
        }
    }
    if (s.p.score != LF_SCORE_MEAN) return;
    __syncthreads();
    store_blocks(s, u, bh, shared, tokens);
}

}  // namespace lf
