/* Second kernel of select_blocks, score mean: <query block mean, key block mean>.
 *
 *   grid   key chunks * row tiles * batch * heads
 *   block  8 warps; a warp has 5 query blocks, a lane 2 key blocks
 *
 * Each product is one chain of fused multiply-adds over d, as on the CPU, so the scores are
 * bit-equal to the CPU's and so are the lists. Bound by shared memory and the FMA units alike. */
#pragma once

#include "select.cuh"

namespace lf {

constexpr int MEAN_WARPS = 8, MEAN_ROWS = 5, MEAN_KEYS = 64, MEAN_DIM = 128;
constexpr int MEAN_TILE = MEAN_WARPS * MEAN_ROWS;

struct MeanShared {
    float k[MEAN_KEYS][MEAN_DIM + 4];  // 4 more: 8 lanes' 16 bytes fall into 8 bank groups
    float q[MEAN_TILE][MEAN_DIM];
};

/* Elements [d0, d0 + dim) of key blocks [first, ..) into k, those of given or of new means: a warp
 * copies a block's, so that nothing is divided. */
__device__ __forceinline__ void load_key_means(const Selection &s, int bh, int first, int d0,
                                               int dim, bool given, MeanShared &shared)
{
    const int limit = int(s.p.means_frames) * s.frame_blocks, d = threadIdx.x % 32 * 4;
    const float *from = given ? given_mean(s, bh, 0) : s.k_means;
    const int64_t stride = given ? s.p.k_means.token : s.dim;
    const int64_t offset = given ? 0 : int64_t(bh) * (s.blocks - limit) - limit;
    if (d >= dim) return;
#pragma unroll
    for (int i = 0; i < MEAN_KEYS / MEAN_WARPS; i++) {
        const int at = int(threadIdx.x) / 32 + i * MEAN_WARPS, j = min(first + at, s.blocks - 1);
        if ((j < limit) != given) continue;
        const float *mean = from + (offset + j) * stride + d0 + d;
        float *to = &shared.k[at][d];
        if (!given || s.means_vectors) {
            cp_async_16(smem_address(to), mean);
        } else {
            for (int e = 0; e < 4; e++) to[e] = mean[e];
        }
    }
}

__device__ __forceinline__ void load_q_means(const Selection &s, int bh, int first, int d0, int dim,
                                             MeanShared &shared)
{
    const int d = threadIdx.x % 32 * 4;
    if (d >= dim) return;
#pragma unroll
    for (int i = 0; i < MEAN_ROWS; i++) {
        const int at = int(threadIdx.x) / 32 + i * MEAN_WARPS, r = min(first + at, s.q_blocks - 1);
        cp_async_16(smem_address(&shared.q[at][d]),
                    s.q_means + (int64_t(bh) * s.q_blocks + r) * s.dim + d0 + d);
    }
}

static __global__ void __launch_bounds__(32 * MEAN_WARPS, 1)
    mean_scores_kernel(const __grid_constant__ Selection s, int key_chunks, int row_tiles)
{
    extern __shared__ float4 mean_shared[];
    MeanShared &shared = *reinterpret_cast<MeanShared *>(mean_shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int chunk = blockIdx.x % key_chunks;
    const int tile = blockIdx.x / key_chunks % row_tiles;
    const int bh = blockIdx.x / key_chunks / row_tiles;
    const int j0 = chunk * MEAN_KEYS, r0 = tile * MEAN_TILE + warp * MEAN_ROWS;
    float sum[MEAN_ROWS][2] = {};

    grid_launch_dependents();
    for (int d0 = 0; d0 < s.dim; d0 += MEAN_DIM) {
        const int dim = min(MEAN_DIM, s.dim - d0);

        if (d0 > 0) __syncthreads();
        load_key_means(s, bh, j0, d0, dim, true, shared);
        if (d0 == 0) grid_dependency_wait();
        load_key_means(s, bh, j0, d0, dim, false, shared);
        load_q_means(s, bh, tile * MEAN_TILE, d0, dim, shared);
        cp_async_commit_group();
        cp_async_wait_group<0>();
        __syncthreads();
        if (r0 >= s.q_blocks) continue;

#pragma unroll 2
        for (int d = 0; d < dim; d += 4) {
            const float4 a = *reinterpret_cast<const float4 *>(&shared.k[lane][d]);
            const float4 b = *reinterpret_cast<const float4 *>(&shared.k[lane + 32][d]);
#pragma unroll
            for (int i = 0; i < MEAN_ROWS; i++) {
                const float4 q =
                    *reinterpret_cast<const float4 *>(&shared.q[warp * MEAN_ROWS + i][d]);
                sum[i][0] = fmaf(q.x, a.x, sum[i][0]);
                sum[i][1] = fmaf(q.x, b.x, sum[i][1]);
                sum[i][0] = fmaf(q.y, a.y, sum[i][0]);
                sum[i][1] = fmaf(q.y, b.y, sum[i][1]);
                sum[i][0] = fmaf(q.z, a.z, sum[i][0]);
                sum[i][1] = fmaf(q.z, b.z, sum[i][1]);
                sum[i][0] = fmaf(q.w, a.w, sum[i][0]);
                sum[i][1] = fmaf(q.w, b.w, sum[i][1]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < MEAN_ROWS; i++) {
        if (r0 + i >= s.q_blocks) break;
        float *to = s.scores + (int64_t(bh) * s.q_blocks + r0 + i) * s.blocks + j0;
        if (j0 + lane < s.blocks) to[lane] = sum[i][0];
        if (j0 + lane + 32 < s.blocks) to[lane + 32] = sum[i][1];
    }
}

}  // namespace lf
