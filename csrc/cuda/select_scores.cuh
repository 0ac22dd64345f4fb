/* Second kernel of select_blocks, score mean: <query block mean, key block mean>.
 *
 *   grid   key chunks * row tiles * batch * heads
 *   block  4 warps; half a warp has 5 query blocks, a lane 3 key blocks
 *
 * Each product is one chain of fused multiply-adds over d, as on the CPU, so the scores are
 * bit-equal to the CPU's and so are the lists. Bound by shared memory, which serves 16 bytes for
 * all lanes no faster than 16 for each: 8 reads for 60 multiply-adds, 2.2 us at 12 heads, 37 query
 * and 525 key blocks, for which 132 thread blocks are one each of an H100's processors. */
#pragma once

#include "select.cuh"

namespace lf {

constexpr int MEAN_WARPS = 4, MEAN_ROWS = 5, MEAN_LANE_KEYS = 3, MEAN_DIM = 128;
constexpr int MEAN_TILE = MEAN_WARPS * 2 * MEAN_ROWS, MEAN_KEYS = 16 * MEAN_LANE_KEYS;

struct MeanShared {  // 4 more a row: 8 lanes' 16 bytes fall into 8 bank groups
    float k[MEAN_KEYS][MEAN_DIM + 4];
    float q[MEAN_TILE][MEAN_DIM + 4];
};

/* Elements [d0, d0 + dim) of key blocks [first, last) into k from row `at` on, those of given or of
 * new means: a warp copies a block's, so that nothing is divided. Short loops, here and below:
 * instructions that run once are fetched more slowly than the copies start. */
__device__ __forceinline__ void load_key_means(const Selection &s, int bh, int first, int last,
                                               int at, int d0, int dim, bool given,
                                               MeanShared &shared)
{
    const int limit = int(s.p.means_frames) * s.frame_blocks, d = threadIdx.x % 32 * 4;
    const int64_t stride = given ? s.p.k_means.token : s.new_means.token;
    const bool vectors = given ? s.means_vectors : s.new_vectors;
    const int warp = threadIdx.x / 32;
    const float *mean =
        (given ? given_mean(s, bh, first) : new_mean(s, bh, first - limit)) + d0 + d;
    if (d >= dim) return;
#pragma unroll 1
    for (int i = warp; i < last - first; i += MEAN_WARPS) {
        float *to = &shared.k[at + i][d];
        if (vectors)
            cp_async_16(smem_address(to), mean + i * stride);
        else
            for (int e = 0; e < 4; e++) to[e] = mean[i * stride + e];
    }
}

__device__ __forceinline__ void load_q_means(const Selection &s, int bh, int first, int last,
                                             int d0, int dim, MeanShared &shared)
{
    const int d = threadIdx.x % 32 * 4, warp = threadIdx.x / 32;
    const float *mean = s.q_means + (int64_t(bh) * s.q_blocks + first) * s.dim + d0 + d;
    if (d >= dim) return;
#pragma unroll 1
    for (int i = warp; i < last - first; i += MEAN_WARPS)
        cp_async_16(smem_address(&shared.q[i][d]), mean + i * s.dim);
}

__device__ __forceinline__ void add_products(float &sum, float4 q, float4 k)
{
    sum = fmaf(q.x, k.x, sum);
    sum = fmaf(q.y, k.y, sum);
    sum = fmaf(q.z, k.z, sum);
    sum = fmaf(q.w, k.w, sum);
}

static __global__ void __launch_bounds__(32 * MEAN_WARPS, 5)
    mean_scores_kernel(const __grid_constant__ Selection s, int key_chunks, int row_tiles)
{
    extern __shared__ float4 mean_shared[];
    MeanShared &shared = *reinterpret_cast<MeanShared *>(mean_shared);
    const int lane = threadIdx.x % 16, row = int(threadIdx.x) / 16 * MEAN_ROWS;
    const int chunk = blockIdx.x % key_chunks;
    const int tile = blockIdx.x / key_chunks % row_tiles;
    const int bh = blockIdx.x / key_chunks / row_tiles;
    const int j0 = chunk * MEAN_KEYS, j1 = min(j0 + MEAN_KEYS, s.blocks);
    const int r0 = tile * MEAN_TILE, r1 = min(r0 + MEAN_TILE, s.q_blocks);
    const int limit = min(max(int(s.p.means_frames) * s.frame_blocks, j0), j1);
    float sum[MEAN_ROWS][MEAN_LANE_KEYS] = {};

    grid_launch_dependents();
    for (int d0 = 0; d0 < s.dim; d0 += MEAN_DIM) {
        const int dim = min(MEAN_DIM, s.dim - d0);

        if (d0 > 0) __syncthreads();
        if (limit > j0) load_key_means(s, bh, j0, limit, 0, d0, dim, true, shared);
        if (d0 == 0) grid_dependency_wait();
        if (j1 > limit) load_key_means(s, bh, limit, j1, limit - j0, d0, dim, false, shared);
        load_q_means(s, bh, r0, r1, d0, dim, shared);
        cp_async_commit_group();
        cp_async_wait_group<0>();
        __syncthreads();

#pragma unroll 2
        for (int d = 0; d < dim; d += 4) {
            float4 k[MEAN_LANE_KEYS];
#pragma unroll
            for (int m = 0; m < MEAN_LANE_KEYS; m++)
                k[m] = *reinterpret_cast<const float4 *>(&shared.k[lane + 16 * m][d]);
#pragma unroll
            for (int i = 0; i < MEAN_ROWS; i++) {
                const float4 q = *reinterpret_cast<const float4 *>(&shared.q[row + i][d]);
#pragma unroll
                for (int m = 0; m < MEAN_LANE_KEYS; m++) add_products(sum[i][m], q, k[m]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < MEAN_ROWS; i++) {
        if (r0 + row + i >= s.q_blocks) break;
        float *to = s.scores + (int64_t(bh) * s.q_blocks + r0 + row + i) * s.blocks + j0;
#pragma unroll
        for (int m = 0; m < MEAN_LANE_KEYS; m++)
            if (j0 + lane + 16 * m < s.blocks) to[lane + 16 * m] = sum[i][m];
    }
}

}  // namespace lf
