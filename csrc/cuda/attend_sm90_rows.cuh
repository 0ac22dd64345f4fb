/* The Hopper attention's rows: products, softmax, output, pieces: see attend_sm90.cu. */
#pragma once

#include "attend_sm90_feed.cuh"
#include <cfloat>

namespace {

/* ---- consumers: two warpgroups ---- */

/* Rows of a thread: lane / 4 and lane / 4 + 8 of its warp's 16; element i is row (i >> 1) & 1,
 * column 8 * (i / 4) + 2 * (lane % 4) + (i & 1). */
struct RowState {
    float max[2], sum[2];  // max of the unscaled logits; sum over this thread's columns only
    bool huge;  // max * scale is so large that a fused s * scale - max * scale is not exact
};

__device__ __forceinline__ void reset(RowState &r)
{
    // A finite floor: -inf - -inf cannot happen, and an all -inf row ends with sum 0.
    r.max[0] = r.max[1] = -FLT_MAX;
    r.sum[0] = r.sum[1] = 0.0f;
    r.huge = true;  // the floor is
}

/* Descriptors of the first k16 slice; the others lie at constant distances in 16-byte units, so
 * one addition each finds them (a descriptor made afresh is a dozen instructions). */
__device__ __forceinline__ uint64_t rows_descriptor(uint32_t address)
{
    return wgmma_descriptor(address, 16, 1024);
}

__device__ __forceinline__ uint64_t v_descriptor(uint32_t address)
{
    return wgmma_descriptor(address, PLANE, 1024);
}

template <typename T, class S>
__device__ __forceinline__ void issue_qk(float (&s)[64], uint64_t q, uint64_t k)
{
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < S::DIM / 16; i++)
        wgmma_m64n128k16<T>(s, q + (i / 4 * BOX + i % 4 * 32) / 16,
                            k + (i / 4 * PLANE + i % 4 * 32) / 16, i);
    wgmma_commit_group();
}

template <typename T, int N>
__device__ __forceinline__ void issue_pv(float (&o)[N], const uint32_t (&pr)[32], uint64_t v,
                                         int accumulate)
{
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < STEP / 16; i++) {
        if constexpr (N == 64)
            wgmma_m64n128k16_rs<T>(o, pr + 4 * i, v + i * 2048 / 16, i ? 1 : accumulate);
        else
            wgmma_m64n64k16_rs<T>(o, pr + 4 * i, v + i * 2048 / 16, i ? 1 : accumulate);
    }
    wgmma_commit_group();
}

/* Keys past the end of a slot get no weight. */
__device__ __forceinline__ void mask(float (&s)[64], uint32_t valid)
{
    const int first = int(valid & 0xffff), second = int(valid >> 16);
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int c = 8 * (i / 4 % 8) + (i & 1) + column;
        if (c >= (i < 32 ? first : second)) s[i] = -INFINITY;
    }
}

/* Raises the maxima that a new logit passes by 2^SLACK or more; true if one of the warp's rows did,
 * with alpha what earlier sums and O must be multiplied with. Sums divide by the same maximum in
 * the end, so nothing is lost by one that is a little low, and after a tile's first steps it
 * stands: a step then pays for 64 comparisons and a vote, no shuffle, no product. */
constexpr float SLACK = 8.0f;

__device__ __forceinline__ bool raise_max(const float (&s)[64], RowState &state, float (&alpha)[2],
                                          const Params &p)
{
    float high[2] = {-FLT_MAX, -FLT_MAX}, limit[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        limit[r] = state.max[r] + p.slack;
#pragma unroll
        for (int i = 0; i < 64; i += 4)
            high[r] = fmaxf(high[r], fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
    }
    if (!__any_sync(~0u, high[0] > limit[0] || high[1] > limit[1])) return false;
    float shift = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        high[r] = fmaxf(high[r], __shfl_xor_sync(~0u, high[r], 1));
        high[r] = fmaxf(high[r], __shfl_xor_sync(~0u, high[r], 2));
        high[r] = high[r] > limit[r] ? fminf(high[r], FLT_MAX) : state.max[r];
        alpha[r] = ex2_approx_ftz((state.max[r] - high[r]) * p.scale_log2);
        state.sum[r] *= alpha[r];
        state.max[r] = high[r];
        shift = fmaxf(shift, fabsf(high[r] * p.scale_log2));
    }
    state.huge = __any_sync(~0u, shift > 1e8f);  // one rounding leaves up to 2^-24 of it
    return true;
}

template <int N> __device__ __forceinline__ void rescale(float (&o)[N], const float (&alpha)[2])
{
#pragma unroll
    for (int i = 0; i < N; i++) o[i] *= alpha[i >> 1 & 1];
}

/* s becomes exp2((s - max) * scale), as the A fragments of the next product: the accumulators of a
 * 64 x 128 tile are that, two by two. */
template <typename T>
__device__ __forceinline__ void weigh(float (&s)[64], RowState &state, uint32_t (&pr)[32],
                                      float scale_log2)
{
    float shift[2] = {state.max[0] * scale_log2, state.max[1] * scale_log2}, sum[2] = {};
    if (state.huge) {
#pragma unroll
        for (int i = 0; i < 64; i++)
            s[i] = (s[i] > FLT_MAX ? FLT_MAX : s[i]) - state.max[i >> 1 & 1];
        shift[0] = shift[1] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 64; i += 2) {
        const int r = i >> 1 & 1;
        const float a = ex2_approx_ftz(fmaf(s[i], scale_log2, -shift[r]));
        const float b = ex2_approx_ftz(fmaf(s[i + 1], scale_log2, -shift[r]));
        sum[r] += a + b;
        pr[i / 2] = pack2<T>(a, b);
    }
    state.sum[0] += sum[0];
    state.sum[1] += sum[1];
}

/* O / sum in the output's type and the LSE, straight to global memory: 8 bytes a lane, whole
 * 32-byte sectors a quad. */
template <typename T, class S>
__device__ __forceinline__ void store(const Params &p, float (&o)[S::DIM / 2],
                                      const RowState &state, const Item &item, int group)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const int m = item.tile % p.q_tiles, bh = item.tile / p.q_tiles;
    const int first = m * S::ROWS + group % S::GROUPS * HALF + warp * 16 + lane / 4;
    T *out = static_cast<T *>(p.out) + bh / p.heads * p.out_batch + bh % p.heads * p.out_head;

#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int64_t row = first + 8 * r;
        float sum = state.sum[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        T *line = out + row * p.out_token + lane % 2 * 8 + lane % 4 / 2 * 4;
#pragma unroll
        for (int i = 0; i < S::DIM / 2; i += 8) {
            const uint32_t low = pack2<T>(o[i + 2 * r] * inverse, o[i + 2 * r + 1] * inverse);
            const uint32_t high =
                pack2<T>(o[i + 4 + 2 * r] * inverse, o[i + 4 + 2 * r + 1] * inverse);
            // Even lanes collect the first 8 columns, odd lanes the next 8.
            const uint32_t mine = lane % 2 ? high : low;
            const uint32_t theirs = __shfl_xor_sync(~0u, lane % 2 ? low : high, 1);
            const uint2 four = lane % 2 ? make_uint2(theirs, mine) : make_uint2(mine, theirs);
            if (row < p.q_len) *reinterpret_cast<uint2 *>(line + 2 * i) = four;
        }
        if (p.lse && lane % 4 == 0 && row < p.q_len)
            p.lse[int64_t(bh) * p.q_len + row] =
                sum == 0.0f ? -INFINITY : state.max[r] * p.scale + logf(sum);
    }
}

/* A list without a block: zeros, and LSE -inf. */
template <typename T, class S>
__device__ __forceinline__ void store_nothing(const Params &p, const Item &item, int group)
{
    const int lane = threadIdx.x % 128;
    const int m = item.tile % p.q_tiles, bh = item.tile / p.q_tiles;
    const int first = m * S::ROWS + group % S::GROUPS * HALF;
    T *out = static_cast<T *>(p.out) + bh / p.heads * p.out_batch + bh % p.heads * p.out_head;

    for (int i = lane; i < HALF * S::DIM / 8; i += 128) {
        const int64_t row = first + i / (S::DIM / 8);
        if (row < p.q_len)
            *reinterpret_cast<uint4 *>(out + row * p.out_token + i % (S::DIM / 8) * 8) =
                make_uint4(0, 0, 0, 0);
    }
    if (p.lse && lane < HALF && first + lane < p.q_len)
        p.lse[int64_t(bh) * p.q_len + first + lane] = -INFINITY;
}

/* This warpgroup's sums are in memory: tell the one that merges them. */
__device__ __forceinline__ void announce(const Params &p, int group)
{
    __threadfence();
    bar_sync(3 + group, 128);
    if (threadIdx.x % 128 == 0) store_release(&p.handed[blockIdx.x * 2 + group], p.ticket);
}

/* Waits for the sums of the piece that lies `piece` places after this one. */
template <class S>
__device__ __forceinline__ const float *await(const Params &p, int piece, int group)
{
    const int slot = int(blockIdx.x) * 2 + group - piece * S::GROUPS;
    if (threadIdx.x % 128 == 0) {
        while (load_acquire(&p.handed[slot]) != p.ticket) __nanosleep(64);
        p.handed[slot] = ~p.ticket;  // for a graph's next replay
    }
    bar_sync(3 + group, 128);
    return p.sums + int64_t(slot) * SUMS<S> + threadIdx.x % 128;
}

/* The sums of a piece, to the warpgroup that has its tile's first steps. */
template <class S>
__device__ __forceinline__ void hand_over(const Params &p, const float (&o)[S::DIM / 2],
                                          const RowState &state, int group)
{
    constexpr int N = S::DIM / 2;
    float *sums = p.sums + int64_t(blockIdx.x * 2 + group) * SUMS<S> + threadIdx.x % 128;

#pragma unroll
    for (int i = 0; i < N; i++) sums[i * 128] = o[i];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sums[(N + r) * 128] = state.max[r];
        sums[(N + 2 + r) * 128] = state.sum[r];
    }
    announce(p, group);
}

/* Adds the other pieces of a tile to its first one, in the order of the list. A thread's sums are
 * over the same columns as those of the thread in its place. */
template <class S>
__device__ __forceinline__ void merge(const Params &p, float (&o)[S::DIM / 2], RowState &state,
                                      int pieces, int group)
{
    constexpr int N = S::DIM / 2;

    for (int piece = 1; piece <= pieces; piece++) {
        const float *sums = await<S>(p, piece, group);
        float mine[2], theirs[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float other = __ldcg(&sums[(N + r) * 128]);
            const float high = fmaxf(state.max[r], other);
            mine[r] = ex2_approx_ftz((state.max[r] - high) * p.scale_log2);
            theirs[r] = ex2_approx_ftz((other - high) * p.scale_log2);
            state.sum[r] = state.sum[r] * mine[r] + __ldcg(&sums[(N + 2 + r) * 128]) * theirs[r];
            state.max[r] = high;
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int r = i >> 1 & 1;
            o[i] = o[i] * mine[r] + __ldcg(&sums[i * 128]) * theirs[r];
        }
    }
}

template <typename T, class S>
__device__ __forceinline__ void finish(const Params &p, float (&o)[S::DIM / 2], RowState &state,
                                       const Item &item, int group)
{
    if (item.pieces < 0) {
        hand_over<S>(p, o, state, group);
        return;
    }
    merge<S>(p, o, state, item.pieces, group);
    store<T, S>(p, o, state, item, group);
}

/* An item without a step: a whole empty list, or the part past the end of a short one. Where the
 * first piece has no step, the others have none either. */
template <typename T, class S>
__device__ __forceinline__ void finish_empty(const Params &p, const Item &item, int group)
{
    if (item.pieces >= 0) {
        for (int piece = 1; piece <= item.pieces; piece++) await<S>(p, piece, group);
        store_nothing<T, S>(p, item, group);
        return;
    }
    constexpr int N = S::DIM / 2;
    float *sums = p.sums + int64_t(blockIdx.x * 2 + group) * SUMS<S> + threadIdx.x % 128;
    for (int i = 0; i < N + 4; i++) sums[i * 128] = i == N || i == N + 1 ? -FLT_MAX : 0.0f;
    announce(p, group);
}

}  // namespace
