/* Second kernel of select_blocks, scores mass and lse: for every query part a and key block j the
 * log-sum-exp of the logits of the (at most 4) parts b of j, log sum_b n_b exp(scale <q_a, k_b>).
 *
 *   grid   key chunks * query ranges * batch * heads
 *   block  12 warps: 6 groups of 8 key blocks (32 parts), two warps each, which take turns
 *          with the tiles of 8 query parts
 *   shared 3 stages of 8 query tiles, filled by cp.async
 *
 * The keys of a warp stay in its registers as operands (rows) of the tensor cores, split as in
 * split.cuh; the queries pass by (columns). Rows are dealt so that a thread gets all the parts of
 * a key block: neither a shuffle nor a maximum over the row is needed here. Bound by the tensor
 * cores: 2/3 of three float16 products. */
#pragma once

#include "select.cuh"
#include "select_lse.cuh"
#include "split.cuh"

namespace lf {

constexpr int PAIR_GROUPS = 6, PAIR_THREADS = 2 * 32 * PAIR_GROUPS;
constexpr int PAIR_BLOCKS = 8 * PAIR_GROUPS;  // key blocks of a thread block
constexpr int PAIR_TILES = 8, PAIR_STAGES = 3;

template <int DIM> struct PairShared {
    uint4 tiles[PAIR_STAGES][PAIR_TILES * SPLIT_TILE<DIM>];
    float factors[PAIR_STAGES][PAIR_TILES * 8];
    float4 tokens[PAIR_BLOCKS];  // n_b of the parts of a key block; 0: no such part
};

/* Query tiles [first, first + count) of a (batch, head) into a stage. */
template <int DIM>
__device__ __forceinline__ void fetch_tiles(const Selection &s, int64_t first, int count,
                                            PairShared<DIM> &shared, int stage)
{
    const uint4 *from = s.q_split + first * SPLIT_TILE<DIM>;
    for (int i = threadIdx.x; i < count * SPLIT_TILE<DIM>; i += PAIR_THREADS)
        cp_async_16(smem_address(&shared.tiles[stage][i]), from + i);
    for (int i = threadIdx.x; i < count * 2; i += PAIR_THREADS)
        cp_async_16(smem_address(&shared.factors[stage][i * 4]), s.q_factor + first * 8 + i * 4);
}

/* The parts of one key block, as rows g and g + 8 of two 16-row operands. */
template <int DIM> struct KeyOperands {
    uint32_t hi[2][DIM / 16][4], hi8[2][DIM / 32][4], lo8[2][DIM / 32][4];
    float factor;  // 2^e
};

__device__ __forceinline__ void load8(const float *from, bool vectors, float (&x)[8])
{
    if (vectors) {
        const float4 a = reinterpret_cast<const float4 *>(from)[0];
        const float4 b = reinterpret_cast<const float4 *>(from)[1];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
        x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = from[i];
    }
}

/* Key block j into operands: 8 elements of each of 4 parts a k-step. A part that does not exist
 * repeats the last one, so that it is NaN only where a real one is. */
template <int DIM>
__device__ __forceinline__ void load_keys(const Selection &s, int bh, int j, KeyOperands<DIM> &keys,
                                          float4 *tokens)
{
    const int frame = j / s.frame_blocks, b = j % s.frame_blocks, t = threadIdx.x % 4;
    const bool given = frame < s.p.means_frames, vectors = given ? s.means_vectors : s.new_vectors;
    const float *row[4];
    float n[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int start;
        const int part = min(4 * b + i, s.frame_parts - 1);
        n[i] = float(max(key_part_tokens(s, b, i, &start), 0));
        if (given) {
            row[i] = given_mean(s, bh, int64_t(frame) * s.frame_parts + part);
        } else {
            row[i] = new_mean(s, bh, (frame - s.p.means_frames) * s.frame_parts + part);
        }
    }

    if (t == 0) *tokens = make_float4(n[0], n[1], n[2], n[3]);

    // all of the keys at once: one latency, and nothing is read twice
    float x[4][DIM / 32][8];
    float largest = 0.0f;
#pragma unroll
    for (int step = 0; step < DIM / 32; step++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (32 * step + 8 * t < s.dim) {
                load8(row[i] + 32 * step + 8 * t, vectors, x[i][step]);
            } else {
#pragma unroll
                for (int d = 0; d < 8; d++) x[i][step][d] = 0.0f;
            }
#pragma unroll
    for (int step = 0; step < DIM / 32; step++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int d = 0; d < 8; d++) largest = fmaxf(largest, fabsf(x[i][step][d]));
    if (largest > FLT_MAX) {  // an infinity leaves the scale to the other parts
        largest = 0.0f;
#pragma unroll 1
        for (int d = 8 * t; d < s.dim; d += d % 8 < 7 ? 1 : 25)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (fabsf(row[i][d]) <= FLT_MAX) largest = fmaxf(largest, fabsf(row[i][d]));
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const int e = split_exponent(largest);
    const float scale = power_of_two(-e);
    keys.factor = power_of_two(e);

#pragma unroll
    for (int step = 0; step < DIM / 32; step++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const SplitOctet octet = split(x[i][step], scale);
            const int tile = i / 2, half = i % 2;  // row g or g + 8
            keys.hi[tile][2 * step][half] = octet.hi[0];
            keys.hi[tile][2 * step][half + 2] = octet.hi[1];
            keys.hi[tile][2 * step + 1][half] = octet.hi[2];
            keys.hi[tile][2 * step + 1][half + 2] = octet.hi[3];
            keys.lo8[tile][step][half] = octet.lo8[0];
            keys.lo8[tile][step][half + 2] = octet.lo8[1];
            keys.hi8[tile][step][half] = split_hi8(octet.hi[0], octet.hi[1]);
            keys.hi8[tile][step][half + 2] = split_hi8(octet.hi[2], octet.hi[3]);
        }
    }
}

/* Products of the warp's 32 key parts with a tile of 8 query parts; x[c][i] is that of the thread's
 * part i with query part 2 t + c. */
template <int DIM>
__device__ __forceinline__ void multiply(const KeyOperands<DIM> &keys, const uint4 *tile, int lane,
                                         float (&x)[2][4])
{
    float sum[2][4];
    int cross[2][4];
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[m][i] = SPLIT_START, cross[m][i] = SPLIT_BITS;

#pragma unroll
    for (int pair = 0; pair < DIM / 64; pair++) {
        const uint4 lo = tile[SPLIT_LO_AT<DIM> + pair * 32 + lane];
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const int step = 2 * pair + odd;
            const uint4 hi = tile[step * 32 + lane];
            const uint32_t hi8[2] = {split_hi8(hi.x, hi.y), split_hi8(hi.z, hi.w)};
            const uint32_t lo8[2] = {odd ? lo.z : lo.x, odd ? lo.w : lo.y};
#pragma unroll
            for (int m = 0; m < 2; m++) {
                mma_m16n8k16<__half>(sum[m], keys.hi[m][2 * step], hi.x, hi.y);
                mma_m16n8k32_s8(cross[m], keys.lo8[m][step], hi8[0], hi8[1]);
            }
#pragma unroll
            for (int m = 0; m < 2; m++) {
                mma_m16n8k16<__half>(sum[m], keys.hi[m][2 * step + 1], hi.z, hi.w);
                mma_m16n8k32_s8(cross[m], keys.hi8[m][step], lo8[0], lo8[1]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            x[i % 2][2 * m + i / 2] = fmaf(__int_as_float(cross[m][i]), SPLIT_CROSS, sum[m][i]);
}

/* Out of line: beside the keys' operands there is no register for it. */
__device__ __noinline__ float rare_log_sum_exp(float4 x, const float4 *tokens, float q_factor,
                                               float k_factor)
{
    return odd_log_sum_exp({x.x, x.y, x.z, x.w}, *tokens, q_factor, k_factor);
}

/* log sum_b n_b exp(x[b] * factors), of any logits. */
__device__ __forceinline__ float pair_log_sum_exp(const float (&x)[4], const float4 *tokens,
                                                  float q_factor, float k_factor)
{
    bool odd;
    const float y = log_sum_exp(x, *tokens, q_factor * k_factor, 0.0f, &odd);
    if (!odd) return y;
    return rare_log_sum_exp(make_float4(x[0], x[1], x[2], x[3]), tokens, q_factor, k_factor);
}

template <int DIM>
__global__ void __launch_bounds__(PAIR_THREADS, 1)
    pair_kernel(const __grid_constant__ Selection s, int key_chunks, int ranges)
{
    extern __shared__ uint4 pair_shared[];
    PairShared<DIM> &shared = *reinterpret_cast<PairShared<DIM> *>(pair_shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int chunk = blockIdx.x % key_chunks, range = blockIdx.x / key_chunks % ranges;
    const int bh = blockIdx.x / key_chunks / ranges;
    const int tiles = s.q_tiles;
    const int first = int(int64_t(tiles) * range / ranges);
    const int last = int(int64_t(tiles) * (range + 1) / ranges);
    const int64_t tile0 = int64_t(bh) * tiles;
    const int own = warp / 2 * 8 + lane / 4, j = chunk * PAIR_BLOCKS + own;

    auto fetch = [&](int tile, int stage) {
        if (tile < last) fetch_tiles(s, tile0 + tile, min(PAIR_TILES, last - tile), shared, stage);
        cp_async_commit_group();
    };

    // Given means may be read before the pooling kernel is done, new ones and queries may not.
    grid_launch_dependents();
    const bool reads_new =
        min((chunk + 1) * PAIR_BLOCKS, s.blocks) > int(s.p.means_frames) * s.frame_blocks;
    KeyOperands<DIM> keys;
    if (reads_new) grid_dependency_wait();
    load_keys(s, bh, min(j, s.blocks - 1), keys, &shared.tokens[own]);
    grid_dependency_wait();
    fetch(first, 0);
    fetch(first + PAIR_TILES, 1);

    int stage = 0;
    for (int at = first; at < last; at += PAIR_TILES) {
        cp_async_wait_group<1>();
        __syncthreads();
        fetch(at + 2 * PAIR_TILES, (stage + 2) % PAIR_STAGES);

        const int here = min(PAIR_TILES, last - at);
#pragma unroll 1
        for (int i = warp % 2; i < here; i += 2) {
            float x[2][4];
            multiply(keys, &shared.tiles[stage][i * SPLIT_TILE<DIM>], lane, x);
            const float2 q_factor =
                *reinterpret_cast<const float2 *>(&shared.factors[stage][i * 8 + lane % 4 * 2]);
            const float4 *tokens = &shared.tokens[own];
            const int a = (at + i) * 8 + lane % 4 * 2;
            const float y0 = pair_log_sum_exp(x[0], tokens, q_factor.x, keys.factor);
            const float y1 = pair_log_sum_exp(x[1], tokens, q_factor.y, keys.factor);
            float *to = s.logits + (int64_t(bh) * s.q_parts + a) * s.padded_blocks + j;
            if (j < s.blocks && a < s.q_parts) to[0] = y0;
            if (j < s.blocks && a + 1 < s.q_parts) to[s.padded_blocks] = y1;
        }
        stage = (stage + 1) % PAIR_STAGES;
    }
}

}  // namespace lf
