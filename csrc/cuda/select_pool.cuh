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

template <typename T, int PART>
__device__ __forceinline__ void pool_q_blocks(const Selection &s, int bh, int unit, float *shared,
                                              int *tokens)
{
    const int dim = s.dim, slot = threadIdx.y, octet = threadIdx.x;
    const int per_unit = q_unit_blocks(s.block_parts), first = unit * per_unit;
    const int here = min(per_unit, s.q_blocks - first), parts = here * s.block_parts;

    for (int i = slot; i < parts; i += 8) {
        const int block = per_unit > 1 ? i / s.block_parts : 0;
        int row;
        const int n = part_rows(s, first + block, i - block * s.block_parts, &row);
        float mean[8];
        mean_rows<T, PART>(rows_of<T>(s.p.q, s, bh, row, octet, s.q_vectors), n, mean);
        store_octet(shared + i * dim + octet * 8, mean);
        if (octet == 0) tokens[i] = n;
    }
    __syncthreads();
    const int d = slot * (dim / 8) + octet;  // as many threads as elements
    for (int block = 0; block < here; block++)
        combine(shared + block * s.block_parts * dim, s.block_parts, dim, d,
                tokens + block * s.block_parts,
                s.q_means + (int64_t(bh) * s.q_blocks + first + block) * dim + d);
}

template <typename T, int PART>
__device__ __forceinline__ void pool_k_blocks(const Selection &s, int bh, int unit, float *shared,
                                              int *tokens)
{
    const int dim = s.dim, blocks = s.new_frames * s.frame_blocks;
    const int slot = threadIdx.y, octet = threadIdx.x;
    const int block = unit * 2 + slot / 4, frame = block / s.frame_blocks;
    int start;
    int n = key_part_tokens(s, block % s.frame_blocks, slot % 4, &start);
    if (block >= blocks) n = 0;

    const int64_t token = (s.p.means_frames + frame) * s.p.frame_tokens + start;
    float mean[8];
    mean_rows<T, PART>(rows_of<T>(s.p.k, s, bh, token, octet, s.k_vectors), n, mean);
    store_octet(shared + slot * dim + octet * 8, mean);
    if (octet == 0) tokens[slot] = n;
    __syncthreads();
    const int d = slot * (dim / 8) + octet;  // as many threads as elements
#pragma unroll
    for (int which = 0; which < 2; which++)
        combine(shared + which * 4 * dim, 4, dim, d, tokens + which * 4,
                new_mean(s, bh, unit * 2 + which) + d);
}

/* A tile of 8 query parts, split for the tensor cores; parts that do not exist are zeros. */
template <typename T, int PART>
__device__ __forceinline__ void pool_q_parts(const Selection &s, int bh, int unit, int octets)
{
    const int slot = threadIdx.y, octet = threadIdx.x;
    const int a = unit * 8 + slot;
    int row = 0, n = 0;
    if (a < s.q_parts && octet * 8 < s.dim)
        n = part_rows(s, a / s.block_parts, a % s.block_parts, &row);

    float mean[8];
    mean_rows<T, PART>(rows_of<T>(s.p.q, s, bh, row, octet, s.q_vectors), n, mean);
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(mean[i]));
    for (int step = octets / 2; step > 0; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    const int e = split_exponent(largest);
    const SplitOctet x = split(mean, power_of_two(-e));

    const int64_t tile = int64_t(bh) * s.q_tiles + unit;
    uint4 *to = s.q_split + tile * (octets * 12);
    const int lane = slot * 4 + octet % 4, step = octet / 4;
    to[step * 32 + lane] = make_uint4(x.hi[0], x.hi[1], x.hi[2], x.hi[3]);
    reinterpret_cast<uint2 *>(to + octets * 8 + step / 2 * 32 + lane)[step % 2] =
        make_uint2(x.lo8[0], x.lo8[1]);
    if (octet == 0) s.q_factor[tile * 8 + slot] = float(s.p.scale) * power_of_two(e);
}

template <typename T, int PART>
__device__ __forceinline__ void pool_k_parts(const Selection &s, int bh, int unit, int octets)
{
    const int slot = threadIdx.y, octet = threadIdx.x;
    const int block = unit * 2 + slot / 4, frame = block / s.frame_blocks;
    const int b = block % s.frame_blocks, i = slot % 4;
    int start;
    const int n = key_part_tokens(s, b, i, &start);
    if (frame >= s.new_frames || n <= 0 || octet * 8 >= s.dim) return;

    const int64_t token = (s.p.means_frames + frame) * s.p.frame_tokens + start;
    float mean[8];
    mean_rows<T, PART>(rows_of<T>(s.p.k, s, bh, token, octet, s.k_vectors), n, mean);
    float *to = new_mean(s, bh, frame * s.frame_parts + 4 * b + i) + octet * 8;
    if (s.new_vectors) {
        store_octet(to, mean);
    } else {
#pragma unroll
        for (int d = 0; d < 8; d++) to[d] = mean[d];
    }
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
    const int bh = blockIdx.x, unit = blockIdx.y;
    float *shared = reinterpret_cast<float *>(pool_shared);

    grid_launch_dependents();
    if (s.p.score == LF_SCORE_MEAN) {
        if (unit < q_units)
            pool_q_blocks<T, PART>(s, bh, unit, shared, tokens);
        else
            pool_k_blocks<T, PART>(s, bh, unit - q_units, shared, tokens);
    } else {
        if (unit < q_units)
            pool_q_parts<T, PART>(s, bh, unit, octets);
        else
            pool_k_parts<T, PART>(s, bh, unit - q_units, octets);
    }
}

}  // namespace lf
