/* Block scores of a query block from its logits (mass, lse), by the 8 warps of select_choose.cuh.
 */
#pragma once

#include "select.cuh"

namespace lf {

constexpr int CHOOSE_WARPS = 8, CHOOSE_THREADS = 32 * CHOOSE_WARPS;
constexpr float CHOOSE_LOG2_E = 1.44269504f;
constexpr int ROW_KEYS = 20;  // logits of a lane, where a warp holds a row: 4 of every 128

__host__ __device__ inline bool warp_holds_row(int64_t blocks) { return blocks <= 32 * ROW_KEYS; }

/* Of a query block's parts: the largest logit, and their tokens over the sum of exponentials. */
struct RowSums {
    float most[32], weight[32];
};

__device__ __forceinline__ float warp_max(float x)
{
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

__device__ __forceinline__ bool marks_nan(float logit) { return __float_as_uint(logit) & 1; }

/* exp(logit - most) of finite logits. */
__device__ __forceinline__ float share(float logit, float most)
{
    return ex2_approx_ftz((logit - most) * CHOOSE_LOG2_E);
}

/* Four logits of a row from number j on, those past the end as the lowest. */
__device__ __forceinline__ void load_logits(const float *row, int j, int blocks, float *x)
{
    const float4 v = j < blocks ? *reinterpret_cast<const float4 *>(row + j) : float4{};
    x[0] = j < blocks ? v.x : -FLT_MAX, x[1] = j + 1 < blocks ? v.y : -FLT_MAX;
    x[2] = j + 2 < blocks ? v.z : -FLT_MAX, x[3] = j + 3 < blocks ? v.w : -FLT_MAX;
}

/* scores[j] = sum over the rows a of n_a softmax_j(logits of a); a warp has a row, a lane 4
 * neighbours of every 128. `shares`: [8][padded J]. */
__device__ __forceinline__ void mass_by_lanes(const Selection &s, int r, int rows,
                                              const float *logits, float *scores, float *shares)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int base = 0; base < rows; base += 8) {
        if (base + warp < rows) {
            const float *row = logits + int64_t(base + warp) * s.padded_blocks;
            float x[ROW_KEYS], most = -FLT_MAX, sum = 0.0f;
            uint32_t bits = 0;
            int first;
#pragma unroll
            for (int i = 0; i < ROW_KEYS; i += 4)
                load_logits(row, 4 * lane + 32 * i, s.blocks, x + i);
#pragma unroll
            for (int i = 0; i < ROW_KEYS; i++) {
                bits |= uint32_t(marks_nan(x[i])) << i;
                most = fmaxf(most, x[i]);
            }
            most = warp_max(most);
#pragma unroll
            for (int i = 0; i < ROW_KEYS; i++) sum += x[i] = share(x[i], most);
            const float weight = float(part_rows(s, r, base + warp, &first)) / warp_sum(sum);
#pragma unroll
            for (int i = 0; i < ROW_KEYS; i++)
                x[i] = bits >> i & 1 ? __uint_as_float(0x7fffffffu) : x[i] * weight;
#pragma unroll
            for (int i = 0; i < ROW_KEYS; i += 4)
                if (4 * lane + 32 * i < s.blocks)
                    *reinterpret_cast<float4 *>(shares + warp * s.padded_blocks + 4 * lane +
                                                32 * i) =
                        make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
        }
        __syncthreads();
        for (int j = 4 * threadIdx.x; j < s.blocks; j += 4 * CHOOSE_THREADS) {
            float4 *to = reinterpret_cast<float4 *>(scores + j);
            float4 sum = base > 0 ? *to : float4{};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (base + i >= rows) break;
                const float4 x =
                    *reinterpret_cast<const float4 *>(shares + i * s.padded_blocks + j);
                sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
            }
            *to = sum;
        }
        __syncthreads();
    }
}

/* The same for rows of any length: the sums first, then the shares. */
__device__ __forceinline__ void mass_by_passes(const Selection &s, int r, int rows,
                                               const float *logits, float *scores, RowSums &sums)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int a = warp; a < rows; a += CHOOSE_WARPS) {
        const float *row = logits + int64_t(a) * s.padded_blocks;
        float most = -FLT_MAX, sum = 0.0f;
        int first;
        for (int j = lane; j < s.blocks; j += 32) most = fmaxf(most, row[j]);
        most = warp_max(most);
        for (int j = lane; j < s.blocks; j += 32) sum += share(row[j], most);
        sum = warp_sum(sum);
        if (lane == 0) {
            sums.most[a] = most;
            sums.weight[a] = float(part_rows(s, r, a, &first)) / sum;
        }
    }
    __syncthreads();
    for (int j = threadIdx.x; j < s.blocks; j += CHOOSE_THREADS) {
        float sum = 0.0f;
        for (int a = 0; a < rows; a++) {
            const float x = logits[int64_t(a) * s.padded_blocks + j];
            sum += marks_nan(x) ? __uint_as_float(0x7fffffffu)
                                : share(x, sums.most[a]) * sums.weight[a];
        }
        scores[j] = sum;
    }
    __syncthreads();
}

/* scores[j] = log sum_a n_a exp(logit of a and j), each with its own shift. */
__device__ __forceinline__ void lse_of_rows(const Selection &s, int r, int rows,
                                            const float *logits, float *scores)
{
    for (int j = threadIdx.x; j < s.blocks; j += CHOOSE_THREADS) {
        float most = -FLT_MAX, sum = 0.0f;
        bool nan = false;
        for (int a = 0; a < rows; a++) {
            const float x = logits[int64_t(a) * s.padded_blocks + j];
            nan |= marks_nan(x);
            most = fmaxf(most, x);
        }
        for (int a = 0; a < rows; a++) {
            int first;
            const float n = float(part_rows(s, r, a, &first));
            sum += n * share(logits[int64_t(a) * s.padded_blocks + j], most);
        }
        scores[j] = nan ? __uint_as_float(0x7fffffffu) : most + logf(sum);
    }
    __syncthreads();
}

/* The scores of a row (mass, lse) into shared memory, and to the caller. Ends with a barrier. */
template <lf_score SCORE>
__device__ __forceinline__ void score_row(const Selection &s, int64_t row, int r, float *scores,
                                          float *shares, RowSums &sums)
{
    const float *logits = s.logits + row * s.block_parts * s.padded_blocks;
    const int rows_here = min(int(s.p.block_q), s.q_len - r * int(s.p.block_q));
    const int rows = (rows_here + s.part - 1) / s.part;
    if constexpr (SCORE == LF_SCORE_LSE)
        lse_of_rows(s, r, rows, logits, scores);
    else if (warp_holds_row(s.blocks))
        mass_by_lanes(s, r, rows, logits, scores, shares);
    else
        mass_by_passes(s, r, rows, logits, scores, sums);
    if (s.p.scores) {
        for (int j = threadIdx.x; j < s.blocks; j += CHOOSE_THREADS)
            s.p.scores[row * s.blocks + j] = scores[j];
        __syncthreads();  // before they turn into sort keys
    }
}

}  // namespace lf
