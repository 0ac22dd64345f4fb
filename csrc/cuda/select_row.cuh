/* Frames, cut and list of a row by one warp, which holds the row's scores: no barriers.
 *
 * For rows of at most ROW_KEYS * 32 key blocks. Bound by latency: about 250 cycles a round of the
 * histogram, of which there are two or three. */
#pragma once

#include "select.cuh"

namespace lf {

constexpr int ROW_KEYS = 20;  // keys of a lane: key j is number j / 32 of lane j % 32
constexpr int ROW_BINS = 256;

__host__ __device__ inline bool warp_holds_row(int64_t blocks) { return blocks <= 32 * ROW_KEYS; }

/* Leaves 0 in the keys of blocks whose frame is not chosen. */
__device__ __forceinline__ void drop_frames(const Selection &s, const uint32_t *chosen,
                                            uint32_t (&keys)[ROW_KEYS])
{
    const int lane = threadIdx.x % 32, per = s.frame_blocks;
    const int step = 32 / per, rest = 32 - step * per;
    int frame = lane / per, b = lane - frame * per;
#pragma unroll
    for (int i = 0; i < ROW_KEYS; i++) {
        if (lane + 32 * i < s.blocks && !chosen[frame]) keys[i] = 0;
        frame += step, b += rest;
        if (b >= per) frame++, b -= per;
    }
}

/* A threshold T and a number: keys above T are kept, and so are the first `equal` of those that
 * are T, `kept` altogether. 1 <= kept <= number of keys that are not 0. */
struct Cut {
    uint32_t threshold, equal;
};

/* The kept-th largest key, by histograms of a shrinking range. bins: [ROW_BINS] of this warp. */
__device__ __forceinline__ Cut warp_cut(const uint32_t (&keys)[ROW_KEYS], uint32_t kept,
                                        uint32_t *bins)
{
    const int lane = threadIdx.x % 32;
    uint32_t low = ~0u, high = 0;
#pragma unroll
    for (int i = 0; i < ROW_KEYS; i++) {
        low = min(low, keys[i] - 1);  // 0, no candidate, is the largest here
        high = max(high, keys[i]);
    }
    low = __reduce_min_sync(~0u, low) + 1;
    high = __reduce_max_sync(~0u, high);

    const int top = ROW_BINS - 8 * (lane + 1);  // this lane's 8 bins begin here
    uint4 *own = reinterpret_cast<uint4 *>(bins + top);
    while (low < high) {
        const int shift = max(24 - __clz(high - low), 0);
        own[0] = own[1] = make_uint4(0, 0, 0, 0);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < ROW_KEYS; i++)
            if (keys[i] - low <= high - low) atomicAdd(&bins[(keys[i] - low) >> shift], 1u);
        __syncwarp();
        const uint4 a = own[0], b = own[1];
        const uint32_t count[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        uint32_t sum = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) sum += count[i];
        uint32_t above = sum;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const uint32_t other = __shfl_up_sync(~0u, above, step);
            if (lane >= step) above += other;
        }
        above -= sum;
        // The lane whose bins hold the kept-th tells the bin, the keys above it and those in it.
        const uint32_t holds = __ballot_sync(~0u, above < kept && above + sum >= kept);
        uint32_t bin = 0, before = 0, inside = 0;
#pragma unroll
        for (int i = 7; i >= 0; i--) {
            if (above < kept && above + count[i] >= kept) {
                bin = top + i;
                before = above;
                inside = count[i];
            }
            above += count[i];
        }
        const int teller = __ffs(int(holds)) - 1;
        const uint32_t told = __shfl_sync(~0u, bin << 16 | before, teller);
        inside = __shfl_sync(~0u, inside, teller);
        kept -= told & 0xffff;
        low += (told >> 16) << shift;
        high = min(high, low + ((1u << shift) - 1));
        if (inside == kept) return {low - 1, 0};  // the whole bin
    }
    return {low, kept};
}

/* The indices of the kept keys, ascending. */
__device__ __forceinline__ void warp_list(const uint32_t (&keys)[ROW_KEYS], int n, Cut cut,
                                          int32_t *list)
{
    const int lane = threadIdx.x % 32;
    const uint32_t below = (1u << lane) - 1;
    uint32_t greater = 0, ties = 0;  // of the keys before number i
#pragma unroll
    for (int i = 0; i < ROW_KEYS; i++) {
        const bool exists = lane + 32 * i < n;
        const bool is_above = exists && keys[i] > cut.threshold;
        const bool is_equal = exists && keys[i] == cut.threshold;
        const uint32_t above = __ballot_sync(~0u, is_above);
        const uint32_t equal = __ballot_sync(~0u, is_equal);
        const uint32_t tie = ties + __popc(equal & below);
        if (is_above || (is_equal && tie < cut.equal))
            list[greater + __popc(above & below) + min(tie, cut.equal)] = lane + 32 * i;
        greater += __popc(above);
        ties += __popc(equal);
    }
}

}  // namespace lf
