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
};

__device__ __forceinline__ void reset(RowState &r)
{
    // A finite floor: -inf - -inf cannot happen, and an all -inf row ends with sum 0.
    r.max[0] = r.max[1] = -FLT_MAX;
    r.sum[0] = r.sum[1] = 0.0f;
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

__device__ __forceinline__ uint64_t k_tile(Shared &s, int stage)
{
    return rows_descriptor(smem_address(s.k[stage]));
}

__device__ __forceinline__ uint64_t v_tile(Shared &s, int stage)
{
    return v_descriptor(smem_address(s.v[stage]));
}

template <typename T>
__device__ __forceinline__ void issue_qk(float (&s)[64], uint64_t q, uint64_t k)
{
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < DIM / 16; i++)
        wgmma_m64n128k16<T>(s, q + (i / 4 * BOX + i % 4 * 32) / 16,
                            k + (i / 4 * PLANE + i % 4 * 32) / 16, i);
    wgmma_commit_group();
}

template <typename T>
__device__ __forceinline__ void issue_pv(float (&o)[64], const uint32_t (&pr)[32], uint64_t v,
                                         int accumulate)
{
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < STEP / 16; i++)
        wgmma_m64n128k16_rs<T>(o, pr + 4 * i, v + i * 2048 / 16, i ? 1 : accumulate);
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

/* s becomes exp2((s - max) * scale); alpha is what earlier sums and O must be multiplied with. */
__device__ __forceinline__ void softmax(float (&s)[64], RowState &state, float (&alpha)[2],
                                        float scale_log2)
{
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float high = state.max[r];
#pragma unroll
        for (int i = 0; i < 64; i += 4) high = fmaxf(high, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
        high = fminf(high, FLT_MAX);
        alpha[r] = ex2_approx_ftz_pinned((state.max[r] - high) * scale_log2);
        state.max[r] = high;
        shift[r] = high * scale_log2;
    }
    // s * scale - shift in one rounding leaves up to 2^-24 of shift, which must stay small.
    if (__any_sync(~0u, fmaxf(fabsf(shift[0]), fabsf(shift[1])) > 1e8f)) {
#pragma unroll
        for (int i = 0; i < 64; i++)
            s[i] = (s[i] > FLT_MAX ? FLT_MAX : s[i]) - state.max[i >> 1 & 1];
        shift[0] = shift[1] = 0.0f;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 64; i += 4) {
            s[i + 2 * r] = ex2_approx_ftz_pinned(fmaf(s[i + 2 * r], scale_log2, -shift[r]));
            s[i + 2 * r + 1] = ex2_approx_ftz_pinned(fmaf(s[i + 2 * r + 1], scale_log2, -shift[r]));
            sum += s[i + 2 * r] + s[i + 2 * r + 1];
        }
        state.sum[r] = state.sum[r] * alpha[r] + sum;
    }
}

/* Accumulators of a 64 x 128 tile are, two by two, the A fragments of the next product. */
template <typename T> __device__ __forceinline__ void pack(const float (&s)[64], uint32_t (&pr)[32])
{
#pragma unroll
    for (int i = 0; i < 32; i++) pr[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
}

/* Waits for the product in flight and brings O to the new maxima. The decision comes first and ends
 * a basic block: without that the assembler moves the exponentials behind the wait, where nothing
 * hides them. Once the maxima stand, which they soon do, 64 multiplications are skipped. */
__device__ __forceinline__ void wait_and_rescale(float (&o)[64], const float (&alpha)[2])
{
    if (__any_sync(~0u, alpha[0] != 1.0f || alpha[1] != 1.0f)) {
        wgmma_wait_group<0>();
#pragma unroll
        for (int i = 0; i < 64; i++) o[i] *= alpha[i >> 1 & 1];
    } else {
        wgmma_wait_group<0>();
    }
}

/* O / sum in the output's type and the LSE, straight to global memory: 8 bytes a lane, whole
 * 32-byte sectors a quad. */
template <typename T>
__device__ __forceinline__ void store(const Params &p, float (&o)[64], const RowState &state,
                                      const Item &item, int group)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const int m = item.tile % p.q_tiles, bh = item.tile / p.q_tiles;
    const int first = m * TILE + group * HALF + warp * 16 + lane / 4;
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
        for (int i = 0; i < 64; i += 8) {
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
template <typename T>
__device__ __forceinline__ void store_nothing(const Params &p, const Item &item, int group)
{
    const int lane = threadIdx.x % 128;
    const int m = item.tile % p.q_tiles, bh = item.tile / p.q_tiles;
    const int first = m * TILE + group * HALF;
    T *out = static_cast<T *>(p.out) + bh / p.heads * p.out_batch + bh % p.heads * p.out_head;

    for (int i = lane; i < HALF * DIM / 8; i += 128) {
        const int64_t row = first + i / (DIM / 8);
        if (row < p.q_len)
            *reinterpret_cast<uint4 *>(out + row * p.out_token + i % (DIM / 8) * 8) =
                make_uint4(0, 0, 0, 0);
    }
    if (p.lse && lane < HALF && first + lane < p.q_len)
        p.lse[int64_t(bh) * p.q_len + first + lane] = -INFINITY;
}

/* This CTA's sums are in memory: tell the CTA that merges them. */
__device__ __forceinline__ void announce(const Params &p, int group)
{
    __threadfence();
    bar_sync(3 + group, 128);
    if (threadIdx.x % 128 == 0) store_release(&p.handed[blockIdx.x * 2 + group], p.ticket);
}

/* Waits for the sums of the piece that lies `piece` places after this CTA's. */
__device__ __forceinline__ const float *await(const Params &p, int piece, int group)
{
    const int slot = (int(blockIdx.x) - piece) * 2 + group;
    if (threadIdx.x % 128 == 0) {
        while (load_acquire(&p.handed[slot]) != p.ticket) __nanosleep(64);
        p.handed[slot] = ~p.ticket;  // for a graph's next replay
    }
    bar_sync(3 + group, 128);
    return p.sums + int64_t(slot) * (SUMS / 2) + threadIdx.x % 128;
}

/* The sums of a piece, to the CTA that has its tile's first steps. */
__device__ __forceinline__ void hand_over(const Params &p, const float (&o)[64],
                                          const RowState &state, int group)
{
    float *sums = p.sums + int64_t(blockIdx.x * 2 + group) * (SUMS / 2) + threadIdx.x % 128;

#pragma unroll
    for (int i = 0; i < 64; i++) sums[i * 128] = o[i];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sums[(64 + r) * 128] = state.max[r];
        sums[(66 + r) * 128] = state.sum[r];
    }
    announce(p, group);
}

/* Adds the other pieces of a tile to its first one, in the order of the list. A thread's sums are
 * over the same columns as those of the thread in its place. */
__device__ __forceinline__ void merge(const Params &p, float (&o)[64], RowState &state, int pieces,
                                      int group)
{
    for (int piece = 1; piece <= pieces; piece++) {
        const float *sums = await(p, piece, group);
        float mine[2], theirs[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float other = __ldcg(&sums[(64 + r) * 128]);
            const float high = fmaxf(state.max[r], other);
            mine[r] = ex2_approx_ftz((state.max[r] - high) * p.scale_log2);
            theirs[r] = ex2_approx_ftz((other - high) * p.scale_log2);
            state.sum[r] = state.sum[r] * mine[r] + __ldcg(&sums[(66 + r) * 128]) * theirs[r];
            state.max[r] = high;
        }
#pragma unroll
        for (int i = 0; i < 64; i++) {
            const int r = i >> 1 & 1;
            o[i] = o[i] * mine[r] + __ldcg(&sums[i * 128]) * theirs[r];
        }
    }
}

template <typename T>
__device__ __forceinline__ void finish(const Params &p, float (&o)[64], RowState &state,
                                       const Item &item, int group)
{
    if (item.pieces < 0) {
        hand_over(p, o, state, group);
        return;
    }
    merge(p, o, state, item.pieces, group);
    store<T>(p, o, state, item, group);
}

/* An item without a step: a whole empty list, or the part past the end of a short one. Where the
 * first piece has no step, the others have none either. */
template <typename T>
__device__ __forceinline__ void finish_empty(const Params &p, const Item &item, int group)
{
    if (item.pieces >= 0) {
        for (int piece = 1; piece <= item.pieces; piece++) await(p, piece, group);
        store_nothing<T>(p, item, group);
        return;
    }
    float *sums = p.sums + int64_t(blockIdx.x * 2 + group) * (SUMS / 2) + threadIdx.x % 128;
    for (int i = 0; i < 68; i++) sums[i * 128] = i == 64 || i == 65 ? -FLT_MAX : 0.0f;
    announce(p, group);
}

}  // namespace
