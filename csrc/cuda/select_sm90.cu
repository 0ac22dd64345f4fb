/* The second kernel of select_blocks on Hopper, scores mass and lse; what it computes is in
 * select_pairs.cuh, the portable one, and so is what it reads and writes.
 *
 *   grid   key chunks * query ranges * batch * heads
 *   block  3 warpgroups
 *   shared the keys of 48 key blocks (192 parts) as operands: 96 KB
 *
 * A unit is 64 query parts (rows, from registers) times 16 key blocks (64 columns): one float16
 * and two 8-bit products (split.cuh). The columns are dealt so that a thread gets all the parts of
 * a key block. While a warpgroup turns products into log-sum-exps, the tensor cores have the units
 * of the other two. At 12 heads, 4680 rows and 525 blocks, on an H100: the products alone would
 * take 4.1 us, the exponentials 2.7; the units took 9.3, reading and splitting the keys 4 before.
 */
#include "kernels.h"
#include "select.cuh"
#include "select_lse.cuh"
#include "split.cuh"

namespace lf {
namespace {

constexpr int GROUPS = 3, THREADS = 128 * GROUPS, WARPS = THREADS / 32;
constexpr int SLICES = 3, SLICE_BLOCKS = 16, SLICE_ROWS = 4 * SLICE_BLOCKS;
constexpr int CHUNK = SLICES * SLICE_BLOCKS;  // key blocks of a thread block
constexpr int TILE = 64;                      // query parts of a unit
constexpr uint32_t PLANE = SLICE_ROWS * 128;  // bytes of 128 swizzled columns of bytes of a slice
constexpr int WARP_ROWS = 4 * CHUNK / WARPS;  // key parts that a warp splits
// Sums of 8-bit products, as the low bits of a float, carry this offset: see split.cuh.
constexpr float OFFSET = -SPLIT_START;

template <int DIM> struct alignas(1024) Keys {
    uint8_t hi[SLICES][DIM / 64][PLANE];  // float16
    uint8_t hi8[SLICES][PLANE], lo8[SLICES][PLANE];
    float4 tokens[CHUNK];  // n_b of the parts of a key block; 0: no such part
    float factor[CHUNK];   // 2^e
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Row of an operand for part i of block b of a slice: the 16 columns of two accumulator tiles
 * hold 4 blocks that are 4 apart, so that a thread's blocks are neighbours. */
__device__ __forceinline__ int operand_row(int b, int i)
{
    return 16 * (b % 4) + 8 * (i / 2) + 2 * (b / 4) + i % 2;
}

/* Byte c of row r of a plane, 128-byte swizzle. */
__device__ __forceinline__ uint32_t swizzled(int r, int c)
{
    return r * 128 + ((c / 16 ^ (r & 7)) * 16) + c % 16;
}

/* Splits the warp's 4 key blocks into shared memory: a lane has 8 elements of 2 parts of each. A
 * part that does not exist repeats the last one, so that it is NaN only where a real one is. */
template <int DIM>
__device__ __forceinline__ void split_keys(const Selection &s, int bh, int chunk, Keys<DIM> &keys)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int octet = lane % 16, d = octet * 8, limit = int(s.p.means_frames);
    const bool vectors = s.means_vectors && s.new_vectors;
    const float *given = given_mean(s, bh, 0) + d;
    const float *fresh = new_mean(s, bh, int64_t(-limit) * s.frame_parts) + d;
    const int first = min(chunk * CHUNK + warp * (WARP_ROWS / 4), s.blocks - 1);
    int frame = first / s.frame_blocks, b = first - frame * s.frame_blocks;
    const float *row[WARP_ROWS / 2];
    float x[WARP_ROWS / 2][8];

#pragma unroll
    for (int i = 0; i < WARP_ROWS / 2; i++) {
        const int part = min(4 * b + i % 2 * 2 + lane / 16, s.frame_parts - 1);
        const bool old = frame < limit;
        row[i] = (old ? given : fresh) +
                 (frame * s.frame_parts + part) * (old ? s.p.k_means.token : s.new_means.token);
        // the next block; past the last one it stays
        if (i % 2 == 1 && first + i / 2 + 1 < s.blocks && ++b == s.frame_blocks) b = 0, frame++;
    }
    // all of the keys at once: one latency
    if (vectors && d < s.dim) {
#pragma unroll
        for (int i = 0; i < WARP_ROWS / 2; i++) {
            const float4 lo = reinterpret_cast<const float4 *>(row[i])[0];
            const float4 hi = reinterpret_cast<const float4 *>(row[i])[1];
            x[i][0] = lo.x, x[i][1] = lo.y, x[i][2] = lo.z, x[i][3] = lo.w;
            x[i][4] = hi.x, x[i][5] = hi.y, x[i][6] = hi.z, x[i][7] = hi.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < WARP_ROWS / 2; i++)
#pragma unroll
            for (int e = 0; e < 8; e++) x[i][e] = d < s.dim ? row[i][e] : 0.0f;
    }

#pragma unroll
    for (int at = 0; at < WARP_ROWS / 4; at++) {
        const int block = warp * (WARP_ROWS / 4) + at;
        float largest = 0.0f;
#pragma unroll
        for (int i = 2 * at; i < 2 * at + 2; i++)
#pragma unroll
            for (int e = 0; e < 8; e++)  // an infinity leaves the scale to the other elements
                largest = fmaxf(largest, fabsf(x[i][e]) <= FLT_MAX ? fabsf(x[i][e]) : 0.0f);
#pragma unroll
        for (int step = 16; step > 0; step /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
        const int exponent = split_exponent(largest);
        const float scale = power_of_two(-exponent);
        if (lane == 0) keys.factor[block] = power_of_two(exponent);
        if (d >= DIM) continue;  // DIM = 64: half of the lanes
#pragma unroll
        for (int i = 2 * at; i < 2 * at + 2; i++) {
            const SplitOctet o = split(x[i], scale);
            const int row = operand_row(block % SLICE_BLOCKS, i % 2 * 2 + lane / 16);
            const int slice = block / SLICE_BLOCKS, t = octet % 4 * 4;
            uint8_t *hi = keys.hi[slice][octet / 8];
            const int c = octet / 4 % 2 * 64;  // two k-steps of float16, one of bytes
#pragma unroll
            for (int e = 0; e < 4; e++)
                *reinterpret_cast<uint32_t *>(hi + swizzled(row, c + e * 16 + t)) = o.hi[e];
            const uint32_t low = swizzled(row, octet / 4 * 32 + t);
            const uint32_t high = swizzled(row, octet / 4 * 32 + 16 + t);
            *reinterpret_cast<uint32_t *>(keys.lo8[slice] + low) = o.lo8[0];
            *reinterpret_cast<uint32_t *>(keys.lo8[slice] + high) = o.lo8[1];
            *reinterpret_cast<uint32_t *>(keys.hi8[slice] + low) = split_hi8(o.hi[0], o.hi[1]);
            *reinterpret_cast<uint32_t *>(keys.hi8[slice] + high) = split_hi8(o.hi[2], o.hi[3]);
        }
    }
}

/* A warp's 16 query parts as operands. */
template <int DIM> struct Queries {
    uint32_t hi[DIM / 16][4], hi8[DIM / 32][4], lo8[DIM / 32][4];
    float factor[2];  // of rows g and g + 8
};

/* Asks for rows g and g + 8 of a tile; split_queries() waits for them. */
template <int DIM>
__device__ __forceinline__ void load_queries(const Selection &s, int bh, int tile, Queries<DIM> &q)
{
    const int lane = threadIdx.x % 32;
    const int first = tile * 8 + threadIdx.x % 128 / 32 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int64_t at = int64_t(bh) * s.q_tiles + min(first + half, s.q_tiles - 1);
        const uint4 *from = s.q_split + at * SPLIT_TILE<DIM> + lane;
        q.factor[half] = s.q_factor[at * 8 + lane / 4];
#pragma unroll
        for (int i = 0; i < DIM / 32; i++) {
            const uint4 hi = from[i * 32];
            q.hi[2 * i][half] = hi.x, q.hi[2 * i][half + 2] = hi.y;
            q.hi[2 * i + 1][half] = hi.z, q.hi[2 * i + 1][half + 2] = hi.w;
        }
#pragma unroll
        for (int i = 0; i < DIM / 64; i++) {
            const uint4 lo = from[SPLIT_LO_AT<DIM> + i * 32];
            q.lo8[2 * i][half] = lo.x, q.lo8[2 * i][half + 2] = lo.y;
            q.lo8[2 * i + 1][half] = lo.z, q.lo8[2 * i + 1][half + 2] = lo.w;
        }
    }
}

template <int DIM> __device__ __forceinline__ void split_queries(Queries<DIM> &q)
{
#pragma unroll
    for (int i = 0; i < DIM / 32; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            q.hi8[i][half] = split_hi8(q.hi[2 * i][half], q.hi[2 * i][half + 2]);
            q.hi8[i][half + 2] = split_hi8(q.hi[2 * i + 1][half], q.hi[2 * i + 1][half + 2]);
        }
}

/* The products of 64 query parts with the 64 key parts of a slice. */
template <int DIM>
__device__ __forceinline__ void multiply(const Queries<DIM> &q, const Keys<DIM> &keys, int slice,
                                         float (&sum)[32], int (&cross)[32])
{
    const uint64_t hi = wgmma_descriptor(smem_address(keys.hi[slice]), 16, 1024);
    const uint64_t hi8 = wgmma_descriptor(smem_address(keys.hi8[slice]), 16, 1024);
    const uint64_t lo8 = wgmma_descriptor(smem_address(keys.lo8[slice]), 16, 1024);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < DIM / 16; i++)
        wgmma_m64n64k16_rs_kmajor(sum, q.hi[i], hi + (i / 4 * PLANE + i % 4 * 32) / 16, i > 0);
#pragma unroll
    for (int i = 0; i < DIM / 32; i++) {
        wgmma_m64n64k32_s8_rs(cross, q.hi8[i], lo8 + i * 32 / 16, i > 0);
        wgmma_m64n64k32_s8_rs(cross, q.lo8[i], hi8 + i * 32 / 16, 1);
    }
    wgmma_commit_group();
    wgmma_wait_group<0>();
}

/* The log-sum-exps of a thread's query parts a and a + 8 and 4 key blocks from `first` on, which
 * is number `at` of the thread block. */
template <int DIM>
__device__ __forceinline__ void finish(const Selection &s, const Keys<DIM> &keys, int bh, int a,
                                       int first, int at, const float (&factor)[2],
                                       const float (&sum)[32], const int (&cross)[32])
{
    float y[8];
    uint32_t odd = 0;
    const float4 k_factor = *reinterpret_cast<const float4 *>(&keys.factor[at]);
    const float k_factors[4] = {k_factor.x, k_factor.y, k_factor.z, k_factor.w};
    const auto products = [&](int i, int half, float (&x)[4]) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int c = 8 * i + e / 2 * 4 + half * 2 + e % 2;
            x[e] = fmaf(__int_as_float(cross[c] + SPLIT_BITS), SPLIT_CROSS, sum[c]);
        }
    };
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float4 n = keys.tokens[at + i];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x[4];
            bool is_odd;
            products(i, half, x);
            y[4 * half + i] = log_sum_exp(x, n, factor[half] * k_factors[i], OFFSET, &is_odd);
            odd |= uint32_t(is_odd) << (4 * half + i);
        }
    }
    if (odd) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float x[4];
            if (!(odd >> i & 1)) continue;
            products(i % 4, i / 4, x);
#pragma unroll
            for (int e = 0; e < 4; e++) x[e] -= OFFSET;
            y[i] = odd_log_sum_exp(x, keys.tokens[at + i % 4], factor[i / 4], k_factors[i % 4]);
        }
    }
    float *to = s.logits + (int64_t(bh) * s.q_parts + a) * s.padded_blocks + first;
#pragma unroll
    for (int half = 0; half < 2; half++)
        if (first < s.blocks && a + 8 * half < s.q_parts)
            *reinterpret_cast<float4 *>(to + int64_t(8 * half) * s.padded_blocks) =
                make_float4(y[4 * half], y[4 * half + 1], y[4 * half + 2], y[4 * half + 3]);
}

#endif  // sm_90a

template <int DIM>
__global__ void __launch_bounds__(THREADS, 1)
    pair_sm90_kernel(const __grid_constant__ Selection s, int key_chunks, int ranges)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ uint8_t pair_shared[];
    Keys<DIM> &keys = *reinterpret_cast<Keys<DIM> *>(
        pair_shared + (1024 - smem_address(pair_shared) % 1024) % 1024);
    const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
    const int chunk = blockIdx.x % key_chunks, range = blockIdx.x / key_chunks % ranges;
    const int bh = blockIdx.x / key_chunks / ranges;
    const int tiles = (s.q_parts + TILE - 1) / TILE;
    const int first = tiles * range / ranges;  // both below 2^16: see launch_pairs_sm90()
    const int units = (tiles * (range + 1) / ranges - first) * SLICES;
    const int u = units * group / GROUPS;
    int left = units * (group + 1) / GROUPS - u, tile = first + u / SLICES, slice = u % SLICES;

    // The keys: given means may be read before the pooling kernel is done, new ones and queries may
    // not.
    grid_launch_dependents();
    if (min((chunk + 1) * CHUNK, s.blocks) > int(s.p.means_frames) * s.frame_blocks)
        grid_dependency_wait();
    if (threadIdx.x < CHUNK) {
        const int b = min(chunk * CHUNK + int(threadIdx.x), s.blocks - 1) % s.frame_blocks;
        float n[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int start;
            n[i] = float(max(key_part_tokens(s, b, i, &start), 0));
        }
        keys.tokens[threadIdx.x] = make_float4(n[0], n[1], n[2], n[3]);
    }
    split_keys(s, bh, chunk, keys);
    fence_proxy_async();
    __syncthreads();
    grid_dependency_wait();

    Queries<DIM> q;
    float factor[2];
    load_queries(s, bh, tile, q);
    bool fresh = true;
    for (; left > 0; left--) {
        float sum[32];
        int cross[32];
        if (fresh) {
            split_queries(q);
            factor[0] = q.factor[0], factor[1] = q.factor[1];
        }
        multiply(q, keys, slice, sum, cross);

        const int a = tile * TILE + threadIdx.x % 128 / 32 * 16 + lane / 4;
        const int at = slice * SLICE_BLOCKS + lane % 4 * 4;
        fresh = ++slice == SLICES;
        if (fresh) {
            slice = 0;
            tile++;
            if (left > 1) load_queries(s, bh, tile, q);
        }
        finish(s, keys, bh, a, chunk * CHUNK + at, at, factor, sum, cross);
    }
#endif
}

template <int DIM> constexpr int SHARED = int(sizeof(Keys<DIM>)) + 1024;

}  // namespace

int launch_pairs_sm90(const Selection &s, int multiprocessors, lf_place place, lf_error *err)
{
    const int chunks = int(lf_ceil_div(s.blocks, CHUNK));
    const int64_t most = lf_ceil_div(s.q_parts, TILE);
    int64_t ranges = multiprocessors / (int64_t(chunks) * s.batch_heads);
    ranges = ranges < 1 ? 1 : ranges > most ? most : ranges;

    const bool small = s.dim <= 64;
    LF_CUDA_TRY(launch_after(true, small ? pair_sm90_kernel<64> : pair_sm90_kernel<128>,
                             unsigned(chunks * ranges * s.batch_heads), THREADS,
                             small ? SHARED<64> : SHARED<128>, place, s, chunks, int(ranges)));
    return 0;
}

}  // namespace lf

extern "C" int lf_select_sm90_warmup(lf_error *err)
{
    using namespace lf;
    LF_CUDA_TRY(cudaFuncSetAttribute(pair_sm90_kernel<64>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED<64>));
    LF_CUDA_TRY(cudaFuncSetAttribute(pair_sm90_kernel<128>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED<128>));
    return 0;
}
