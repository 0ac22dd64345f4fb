/* Last kernel of select_blocks: from scores (mean) or logits (mass, lse) to the list of a row.
 *
 *   grid   query blocks * batch * heads
 *   block  4 warps; 8 for mass and lse, of which 4 leave when the row has its scores
 *   shared the row's scores, which become sort keys in place; frames; for mass 8 rows of shares
 *
 * Block scores, frame scores and the choice of frames, then the cut: the kept-th largest sort key,
 * by histograms of a shrinking range; then the list, in order of the index. Bound by latency (of
 * memory, barriers, shuffles) and by issuing instructions: one warp a row waits for itself in every
 * step, eight that all scan the bins have the schedulers wait for each other. */
#pragma once

#include "select_row.cuh"

namespace lf {

constexpr int CUT_WARPS = 4, CUT_THREADS = 32 * CUT_WARPS;
constexpr int BINS = 256, ROUNDS = 4;  // 8 bits of a sort key a round
constexpr int EACH = 5;                // values of a thread at once: rows of 640 blocks in one go

struct ChooseShared {
    alignas(16) uint32_t bins[ROUNDS][BINS];
    uint32_t low[CUT_WARPS], high[CUT_WARPS];
    uint32_t bin, above, inside;  // of the kept-th key: its bin, keys above that, keys in it
    RowSums sums;
};

/* A threshold and a number: keys above the threshold are kept, and so are the first `equal` of
 * those that are it, `kept` altogether. 1 <= kept <= number of keys that are not 0. */
struct Cut {
    uint32_t threshold, equal;
};

/* Bytes of the dynamic part: scores [J rounded up to 8], the shares of 8 rows if lanes hold whole
 * rows, frames [2][F], words [3][ceil(J / 32)]. */
__host__ __device__ inline int64_t choose_bytes(int64_t blocks, int64_t frames, bool shares)
{
    const int64_t words = (blocks + 31) / 32, padded = (blocks + 7) / 8 * 8;
    return 4 * (padded * (shares ? 9 : 1) + 2 * frames + 3 * words);
}

/* Larger for a higher score; -0 equals +0. NaN is 1, below every number; 0 is no candidate. */
__device__ __forceinline__ uint32_t sort_key(float score)
{
    const uint32_t bits = __float_as_uint(score + 0.0f);
    if (isnan(score)) return 1;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// ---- frames ------------------------------------------------------------------------------------

/* Mass adds up, mean is the token-weighted mean (in double as on the CPU), lse the log-sum-exp. */
template <lf_score SCORE>
__device__ __forceinline__ float frame_score(const Selection &s, const float *scores)
{
    if constexpr (SCORE == LF_SCORE_LSE) {
        float most = -FLT_MAX, sum = 0.0f;
        for (int b = 0; b < s.frame_blocks; b++) most = fmaxf(most, scores[b]);
        for (int b = 0; b < s.frame_blocks; b++) sum += expf(scores[b] - most);
        return most + logf(sum);
    } else {
        const int last = s.frame_blocks - 1, full = int(s.p.block_k);
        const double rest = double(int(s.p.frame_tokens) - last * full), whole = double(full);
        double sum = 0;
#pragma unroll 8
        for (int b = 0; b < last; b++)
            sum += SCORE == LF_SCORE_MASS ? double(scores[b]) : whole * double(scores[b]);
        sum += SCORE == LF_SCORE_MASS ? double(scores[last]) : rest * double(scores[last]);
        return float(SCORE == LF_SCORE_MASS ? sum : sum / double(int(s.p.frame_tokens)));
    }
}

/* A barrier of the CUT_THREADS threads that choose. */
__device__ __forceinline__ void cut_sync() { bar_sync(1, CUT_THREADS); }

/* chosen[t]: 1 if the blocks of frame t are candidates. Ends with a barrier. */
template <lf_score SCORE>
__device__ __forceinline__ void choose_frames(const Selection &s, const float *scores,
                                              uint32_t *keys, uint32_t *chosen)
{
    const int all = int(s.p.k_frames), past = all - int(s.p.q_frames);
    const int first = int(s.p.sink_frames), last = past - int(s.p.near_frames);
    const int wanted = int(s.p.keep_frames) - first - int(s.p.near_frames);

    for (int t = first + int(threadIdx.x); t < last; t += CUT_THREADS)
        keys[t] = sort_key(frame_score<SCORE>(s, scores + t * s.frame_blocks));
    cut_sync();
    for (int t = threadIdx.x; t < all; t += CUT_THREADS) {
        const bool middle = t >= first && t < last;
        int better = 0;
        for (int u = first; middle && u < last; u++)  // a tie goes to the lower number
            better += keys[u] + uint32_t(u < t) > keys[t];
        chosen[t] = !middle || better < wanted;
    }
    cut_sync();
}

// ---- the cut -----------------------------------------------------------------------------------

/* Calls f(j, values[j]) for this thread's j below n, EACH at a time: one latency for all. */
template <typename V, typename F>
__device__ __forceinline__ void for_each(const V *values, int n, F &&f)
{
#pragma unroll 1
    for (int base = threadIdx.x; base < n; base += EACH * CUT_THREADS) {
        V value[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (base + i * CUT_THREADS < n) value[i] = values[base + i * CUT_THREADS];
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (base + i * CUT_THREADS < n) f(base + i * CUT_THREADS, value[i]);
    }
}

/* Turns the scores into sort keys in place, 0 for blocks that are no candidates, and leaves each
 * warp's smallest (but 0), less 1, and largest in shared.low and high; clears the bins. Ends with a
 * barrier. */
__device__ __forceinline__ void make_keys(const Selection &s, const float *scores,
                                          const uint32_t *frames, bool by_frame, uint32_t *keys,
                                          ChooseShared &shared)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t low = ~0u, high = 0;
    for_each(scores, s.blocks, [&](int j, float score) {
        const uint32_t key =
            by_frame && !frames[quotient(j, s.over_frame_blocks)] ? 0 : sort_key(score);
        keys[j] = key;
        low = min(low, key - 1);  // 0, no candidate, becomes the largest
        high = max(high, key);
    });
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    if (lane == 0) shared.low[warp] = low, shared.high[warp] = high;
    for (int i = threadIdx.x; i < ROUNDS * BINS / 4; i += CUT_THREADS)
        reinterpret_cast<uint4 *>(shared.bins)[i] = make_uint4(0, 0, 0, 0);
    cut_sync();
}

/* A warp finds the bin of the kept-th largest key. */
__device__ __forceinline__ void scan_bins(const uint32_t *bins, uint32_t kept, ChooseShared &shared)
{
    const int lane = threadIdx.x % 32, top = BINS - 8 * (lane + 1);  // this lane's 8 bins
    const uint4 a = reinterpret_cast<const uint4 *>(bins + top)[0];
    const uint4 b = reinterpret_cast<const uint4 *>(bins + top)[1];
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
    if (above < kept && above + sum >= kept) {
#pragma unroll
        for (int i = 7; i >= 0; i--) {
            if (above < kept && above + count[i] >= kept) {
                shared.bin = top + i;
                shared.above = above;
                shared.inside = count[i];
            }
            above += count[i];
        }
    }
}

/* The kept-th largest of n keys, of which low and high are known by warps. */
__device__ __forceinline__ Cut find_cut(const uint32_t *keys, int n, uint32_t kept,
                                        ChooseShared &shared)
{
    uint32_t low = shared.low[0], high = shared.high[0];
#pragma unroll
    for (int i = 1; i < CUT_WARPS; i++) {
        low = min(low, shared.low[i]);
        high = max(high, shared.high[i]);
    }
    low++;  // not before: a warp without a candidate has the largest number there is

    // It is in [low, high]: cut that into at most 256 bins, take its bin.
#pragma unroll 1
    for (int round = 0; low < high; round++) {
        const int shift = max(24 - __clz(high - low), 0);
        for_each(keys, n, [&](int, uint32_t key) {
            if (key - low <= high - low) atomicAdd(&shared.bins[round][(key - low) >> shift], 1u);
        });
        cut_sync();
        if (threadIdx.x < 32) scan_bins(shared.bins[round], kept, shared);
        cut_sync();
        kept -= shared.above;
        low += shared.bin << shift;
        high = min(high, low + ((1u << shift) - 1));
        if (shared.inside == kept) return {low - 1, 0};  // the whole bin
    }
    return {low, kept};
}

/* The indices of the kept keys, ascending. `words`: [3][ceil(n / 32)]: one bit a key for those
 * above the threshold and those that are it, then how many of both the words below have, in two
 * halves. */
__device__ __forceinline__ void write_list(const uint32_t *keys, int n, Cut cut, uint32_t *words,
                                           int32_t *list)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = (n + 31) / 32;
    uint32_t *above = words, *equal = words + count, *before = equal + count;
    for (int w = warp; w < count; w += CUT_WARPS) {
        const int j = 32 * w + lane;
        const uint32_t key = j < n ? keys[j] : 0;
        const uint32_t is_above = __ballot_sync(~0u, key > cut.threshold);
        const uint32_t is_equal = __ballot_sync(~0u, j < n && key == cut.threshold);
        if (lane == 0) above[w] = is_above, equal[w] = is_equal;
    }
    cut_sync();
    if (warp == 0) {
        uint32_t all = 0;
#pragma unroll 1
        for (int base = 0; base < count; base += 32) {
            const int w = base + lane;
            const uint32_t own = w < count ? __popc(above[w]) | __popc(equal[w]) << 16 : 0;
            uint32_t sum = own;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const uint32_t other = __shfl_up_sync(~0u, sum, step);
                if (lane >= step) sum += other;
            }
            if (w < count) before[w] = all + sum - own;
            all += __shfl_sync(~0u, sum, 31);
        }
    }
    cut_sync();
    for (int w = warp; w < count; w += CUT_WARPS) {
        const uint32_t mask = (1u << lane) - 1, bit = 1u << lane, counts = before[w];
        const uint32_t greater = (counts & 0xffff) + __popc(above[w] & mask);
        const uint32_t ties = (counts >> 16) + __popc(equal[w] & mask);
        if (above[w] & bit || (equal[w] & bit && ties < cut.equal))
            list[greater + min(ties, cut.equal)] = 32 * w + lane;
    }
}

// 64 registers: the 444 blocks of a call of 12 heads and 4680 rows are resident at once.
template <lf_score SCORE>
__global__ void __launch_bounds__(CHOOSE_THREADS, 4)
    choose_kernel(const __grid_constant__ Selection s)
{
    extern __shared__ __align__(16) uint32_t choose_shared[];
    __shared__ ChooseShared shared;
    const bool has_shares = SCORE == LF_SCORE_MASS && warp_holds_row(s.blocks);
    float *scores = reinterpret_cast<float *>(choose_shared);  // [padded J]
    uint32_t *keys = choose_shared;                            // [J], in place of the scores
    float *shares = scores + s.padded_blocks;                  // [8][padded J], mass
    uint32_t *frame_keys = keys + s.padded_blocks * (has_shares ? 9 : 1);  // [F]
    uint32_t *frames = frame_keys + s.p.k_frames;                          // [F] 1: candidates
    uint32_t *words = frames + s.p.k_frames;                               // [3][ceil(J / 32)]
    const int64_t row = blockIdx.x;                                        // of [B, H, R]
    const int r = int(blockIdx.x % unsigned(s.q_blocks));
    const bool by_frame = s.p.hierarchy && s.p.k_frames - s.p.q_frames > s.p.keep_frames;

    grid_launch_dependents();
    grid_dependency_wait();
    if constexpr (SCORE == LF_SCORE_MEAN) {
        for_each(s.scores + row * s.blocks, s.blocks, [&](int j, float x) { scores[j] = x; });
        if (by_frame) cut_sync();  // otherwise a thread needs its own scores alone
    } else {
        score_row<SCORE>(s, row, r, scores, shares, shared.sums);
        if (threadIdx.x >= CUT_THREADS) return;
    }
    if (by_frame) choose_frames<SCORE>(s, scores, frame_keys, frames);
    make_keys(s, scores, frames, by_frame, keys, shared);
    write_list(keys, s.blocks, find_cut(keys, s.blocks, uint32_t(s.p.kept), shared), words,
               s.p.indices + row * s.p.kept);
}

}  // namespace lf
