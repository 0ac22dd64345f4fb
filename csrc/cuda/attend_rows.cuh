/* Portable attention, the way out: maxima and masks of the logits, the merging of the parts of a
 * row, and the output. Private to attend.cu. */
#pragma once

#include "attend_keys.cuh"
#include <cmath>

namespace lf::portable {

/* Weights are 2^(x - max - shift): with bf16 values near the largest float, 2^16 keys of equal
 * weight still sum without overflow. fp16 weights have no room for it, fp16 values no need. */
template <typename T> constexpr float WEIGHT_SHIFT = 0.0f;
template <> constexpr float WEIGHT_SHIFT<__nv_bfloat16> = 16.0f;

// ---- the rows of a warp -------------------------------------------------------------------

/* Softmax state of 32 rows x COLUMNS columns in the layout of mma accumulators: value i of tile n
 * of half m is row 16 m + lane / 4 + i / 2 * 8, column 8 n + lane % 4 * 2 + i % 2. */
template <int DIM> struct WarpRows {
    float out[2][DIM / 8][4];
    float top[2][2];  // largest q . k, -FLT_MAX before the first: finite, so never -inf - -inf
    float sum[2][2];  // of this lane's columns
};

/* q . k of keys clamped to [-most, most], of other columns -inf; the first is `first_column`. */
template <int TILES>
__device__ __forceinline__ void mask(float (&s)[2][TILES][4], uint32_t first_column,
                                     uint32_t piece_log2, uint32_t valid, float most)
{
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const uint32_t column = first_column + n * 8;
        const uint32_t piece = column >> piece_log2;
        const uint32_t end = (piece << piece_log2) + __shfl_sync(ALL, valid, piece);
        const int keys = int(end) - int(column + tid_x() % 4 * 2);  // from this lane's first on
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float &x = s[m][n][i];
                x = x > most ? most : x;
                x = x < -most ? -most : x;  // a NaN stays
                if (i % 2 >= keys) x = -INFINITY;
            }
        }
    }
}

/* The rows' maxima over the columns that four lanes hold together. */
template <int TILES>
__device__ __forceinline__ void row_tops(const float (&s)[2][TILES][4], float (&top)[2][2])
{
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x = -INFINITY;
#pragma unroll
            for (int n = 0; n < TILES; n++)
                x = fmaxf(x, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
            x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
            top[m][half] = fmaxf(x, __shfl_xor_sync(ALL, x, 2));
        }
    }
}

__device__ __forceinline__ bool any_infinite(const float (&top)[2][2])
{
    const float most =
        fmaxf(fmaxf(fabsf(top[0][0]), fabsf(top[0][1])), fmaxf(fabsf(top[1][0]), fabsf(top[1][1])));
    return __any_sync(ALL, most == INFINITY);
}

// ---- merging the parts of a row -----------------------------------------------------------

struct RowStats {
    float top, sum;
};

/* The warp gives `partner` one half of its columns and takes the partner's part of the other: the
 * upper one if `upper`. TILES is the columns' number / 8 before, at most DIM / 8. All warps of the
 * block come, after a barrier; a warp's box has one place for all merges, in its group's ring. */
template <int DIM, int TILES>
__device__ __forceinline__ void merge(WarpRows<DIM> &rows, float scale, float4 *boxes,
                                      RowStats *stats, uint32_t partner, bool upper)
{
    constexpr int KEPT = TILES / 2, BOX = DIM / 8 * 32;  // in float4
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;

#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < KEPT; n++) {
            float4 given;
            float *give = &given.x;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float low = rows.out[m][n][i], high = rows.out[m][n + KEPT][i];
                give[i] = upper ? low : high;
                rows.out[m][n][i] = upper ? high : low;
            }
            boxes[warp * BOX + (m * KEPT + n) * 32 + lane] = given;
        }
#pragma unroll
        for (int half = 0; half < 2; half++)
            stats[warp * WARP_ROWS + m * 16 + half * 8 + lane / 4] = {rows.top[m][half],
                                                                      rows.sum[m][half]};
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 2; m++) {
        float mine[2], theirs[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const RowStats other = stats[partner * WARP_ROWS + m * 16 + half * 8 + lane / 4];
            const float top = fmaxf(rows.top[m][half], other.top);
            mine[half] = ex2_approx_ftz((rows.top[m][half] - top) * scale);
            theirs[half] = ex2_approx_ftz((other.top - top) * scale);
            rows.top[m][half] = top;
            rows.sum[m][half] = rows.sum[m][half] * mine[half] + other.sum * theirs[half];
        }
#pragma unroll
        for (int n = 0; n < KEPT; n++) {
            const float4 taken = boxes[partner * BOX + (m * KEPT + n) * 32 + lane];
            const float *take = &taken.x;
#pragma unroll
            for (int i = 0; i < 4; i++)
                rows.out[m][n][i] = rows.out[m][n][i] * mine[i / 2] + take[i] * theirs[i / 2];
        }
    }
}

/* Divides and writes TILES * 8 columns from `column` of the warp's rows, by way of the Q tile,
 * whose rows and columns are this warp's alone by now. */
template <typename T, int DIM, int TILES>
__device__ __forceinline__ void store(const WarpRows<DIM> &rows, uint8_t *q_smem, char *out,
                                      int64_t token_bytes, uint32_t warp_row, uint32_t column,
                                      uint32_t count)
{
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float sum = rows.sum[m][half], inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
            const uint32_t at = warp_row + m * 16 + half * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < TILES; n++)
                *reinterpret_cast<uint32_t *>(q_smem + Tile<DIM>::at(at, column / 8 + n) +
                                              lane % 4 * 4) =
                    pack2<T>(rows.out[m][n][2 * half] * inverse,
                             rows.out[m][n][2 * half + 1] * inverse);
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < TILES; i++) {  // 32 rows of TILES units, 32 units at a time
        const uint32_t at = warp_row + (i * 32 + lane) / TILES;
        const uint32_t unit = column / 8 + (i * 32 + lane) % TILES;
        if (at < count)
            *reinterpret_cast<uint4 *>(out + at * token_bytes + unit * 16) =
                *reinterpret_cast<const uint4 *>(q_smem + Tile<DIM>::at(at, unit));
    }
}

}  // namespace lf::portable
