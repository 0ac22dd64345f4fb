/* Last kernel of select_blocks: from scores (mean) or logits (mass, lse) to the list of a row.
 *
 *   grid   query blocks * batch * heads
 *   block  8 warps
 *   shared the row's scores, which become sort keys in place; frames; for mass 8 rows of shares
 *
 * Block scores, frame scores and the choice of frames, then the cut: the kept-th largest sort key,
 * by histograms of a shrinking range; then the list, in order of the index. Bound by latency. */
#pragma once

#include "select_row.cuh"

namespace lf {

constexpr int CHOOSE_WARPS = 8, CHOOSE_THREADS = 32 * CHOOSE_WARPS;
constexpr float CHOOSE_LOG2_E = 1.44269504f, EXP_FLOOR = -87.0f;

struct ChooseShared {
    alignas(16) uint32_t bins[CHOOSE_THREADS];
    uint32_t low[CHOOSE_WARPS], high[CHOOSE_WARPS];
    uint32_t bin, above, inside;
    float row_most[32], row_weight[32];
};

/* Bytes of the dynamic part: scores [J], frames [2][F], words [2][ceil(J / 32)], and the shares of
 * 8 rows if lanes hold whole rows. */
__host__ __device__ inline int64_t choose_bytes(int64_t blocks, int64_t frames, bool shares)
{
    const int64_t words = (blocks + 31) / 32;
    return 4 * (blocks + 2 * frames + 2 * words + (shares ? 8 * blocks : 0));
}

/* Larger for a higher score; -0 equals +0. NaN is 1, below every number; 0 is no candidate. */
__device__ __forceinline__ uint32_t sort_key(float score)
{
    const uint32_t bits = __float_as_uint(score + 0.0f);
    if (isnan(score)) return 1;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

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

// ---- block scores ------------------------------------------------------------------------------

__device__ __forceinline__ bool marks_nan(float logit) { return __float_as_uint(logit) & 1; }

/* exp(logit - most), zero below the floor. */
__device__ __forceinline__ float share(float logit, float most)
{
    const float shifted = logit - most;
    return shifted >= EXP_FLOOR ? ex2_approx_ftz(shifted * CHOOSE_LOG2_E) : 0.0f;
}

/* scores[j] = sum over the rows a of n_a softmax_j(logits of a); a warp has a row. */
__device__ __forceinline__ void mass_by_lanes(const Selection &s, int r, int rows,
                                              const float *logits, float *scores, float *shares)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int base = 0; base < rows; base += 8) {
        if (base + warp < rows) {
            const float *row = logits + int64_t(base + warp) * s.padded_blocks;
            float x[ROW_KEYS], most = -FLT_MAX, sum = 0.0f;
            uint32_t nan = 0;
            int first;
#pragma unroll
            for (int i = 0; i < ROW_KEYS; i++)
                x[i] = lane + 32 * i < s.blocks ? row[lane + 32 * i] : -FLT_MAX;
#pragma unroll
            for (int i = 0; i < ROW_KEYS; i++) {
                nan |= uint32_t(marks_nan(x[i])) << i;
                most = fmaxf(most, x[i]);
            }
            most = warp_max(most);
#pragma unroll
            for (int i = 0; i < ROW_KEYS; i++) {
                x[i] = lane + 32 * i < s.blocks ? share(x[i], most) : 0.0f;
                sum += x[i];
            }
            const float weight = float(part_rows(s, r, base + warp, &first)) / warp_sum(sum);
#pragma unroll
            for (int i = 0; i < ROW_KEYS; i++)
                if (lane + 32 * i < s.blocks)
                    shares[warp * s.blocks + lane + 32 * i] =
                        nan >> i & 1 ? __uint_as_float(0x7fffffffu) : x[i] * weight;
        }
        __syncthreads();
        for (int j = threadIdx.x; j < s.blocks; j += CHOOSE_THREADS) {
            float sum = base > 0 ? scores[j] : 0.0f;
            for (int i = 0; i < min(8, rows - base); i++) sum += shares[i * s.blocks + j];
            scores[j] = sum;
        }
        __syncthreads();
    }
}

/* The same for rows of any length: the sums first, then the shares. */
__device__ __forceinline__ void mass_by_passes(const Selection &s, int r, int rows,
                                               const float *logits, float *scores,
                                               ChooseShared &shared)
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
            shared.row_most[a] = most;
            shared.row_weight[a] = float(part_rows(s, r, a, &first)) / sum;
        }
    }
    __syncthreads();
    for (int j = threadIdx.x; j < s.blocks; j += CHOOSE_THREADS) {
        float sum = 0.0f;
        for (int a = 0; a < rows; a++) {
            const float x = logits[int64_t(a) * s.padded_blocks + j];
            sum += marks_nan(x) ? __uint_as_float(0x7fffffffu)
                                : share(x, shared.row_most[a]) * shared.row_weight[a];
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

/* Of all threads, or of the first warp alone. */
template <bool WARP> __device__ __forceinline__ void sync()
{
    if constexpr (WARP)
        __syncwarp();
    else
        __syncthreads();
}

/* chosen[t]: 1 if the blocks of frame t are candidates. Ends with a barrier. */
template <lf_score SCORE, bool WARP>
__device__ __forceinline__ void choose_frames(const Selection &s, const float *scores,
                                              uint32_t *keys, uint32_t *chosen)
{
    const int all = int(s.p.k_frames), past = all - int(s.p.q_frames);
    const int first = int(s.p.sink_frames), last = past - int(s.p.near_frames);
    const int wanted = int(s.p.keep_frames) - first - int(s.p.near_frames);
    constexpr int THREADS = WARP ? 32 : CHOOSE_THREADS;

    for (int t = first + int(threadIdx.x); t < last; t += THREADS)
        keys[t] = sort_key(frame_score<SCORE>(s, scores + t * s.frame_blocks));
    sync<WARP>();
    for (int t = threadIdx.x; t < all; t += THREADS) {
        int better = 0;
        if (t >= first && t < last)
            for (int u = first; u < last; u++)
                better += keys[u] > keys[t] || (keys[u] == keys[t] && u < t);
        chosen[t] = t < first || t >= last || better < wanted;
    }
    sync<WARP>();
}

// ---- the cut -----------------------------------------------------------------------------------

__device__ __forceinline__ Cut find_cut(const uint32_t *keys, int n, uint32_t kept,
                                        ChooseShared &shared)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t low = ~0u, high = 0;
    for (int j = threadIdx.x; j < n; j += CHOOSE_THREADS) {
        if (keys[j] > 0) low = min(low, keys[j]);
        high = max(high, keys[j]);
    }
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    if (lane == 0) shared.low[warp] = low, shared.high[warp] = high;
    shared.bins[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < CHOOSE_WARPS; i++) {
        low = min(low, shared.low[i]);
        high = max(high, shared.high[i]);
    }

    // The kept-th largest key is in [low, high]: cut that into at most 256 bins, take its bin.
    while (low < high) {
        const int shift = max(24 - __clz(high - low), 0);
        for (int j = threadIdx.x; j < n; j += CHOOSE_THREADS)
            if (keys[j] >= low && keys[j] <= high)
                atomicAdd(&shared.bins[(keys[j] - low) >> shift], 1u);
        __syncthreads();
        if (warp == 0) {
            const int top = CHOOSE_THREADS - 8 * (lane + 1);  // this lane's 8 bins begin here
            uint32_t count[8], own = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) own += count[i] = shared.bins[top + i];
            uint32_t above = own;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const uint32_t other = __shfl_up_sync(~0u, above, step);
                if (lane >= step) above += other;
            }
            above -= own;
            if (above < kept && above + own >= kept) {
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
        __syncthreads();
        const uint32_t inside = shared.inside;
        kept -= shared.above;
        low += shared.bin << shift;
        high = min(high, low + ((1u << shift) - 1));
        if (inside == kept) return {low - 1, 0};  // the whole bin
        shared.bins[threadIdx.x] = 0;
        __syncthreads();
    }
    return {low, kept};
}

/* The indices of the kept keys, ascending. `words`: [2][ceil(n / 32)]. */
__device__ __forceinline__ void write_list(const uint32_t *keys, int n, Cut cut, uint32_t *words,
                                           int32_t *list)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = (n + 31) / 32;
    uint32_t *above = words, *equal = words + count;
    for (int w = warp; w < count; w += CHOOSE_WARPS) {
        const int j = 32 * w + lane;
        const uint32_t key = j < n ? keys[j] : 0;
        const uint32_t is_above = __ballot_sync(~0u, key > cut.threshold);
        const uint32_t is_equal = __ballot_sync(~0u, j < n && key == cut.threshold);
        if (lane == 0) above[w] = is_above, equal[w] = is_equal;
    }
    __syncthreads();
    for (int w = warp; w < count; w += CHOOSE_WARPS) {
        uint32_t before = 0;  // of the words below: those above in the low half, those equal
        for (int i = lane; i < w; i += 32) before += __popc(above[i]) | __popc(equal[i]) << 16;
        before = __reduce_add_sync(~0u, before);
        const uint32_t mask = (1u << lane) - 1, bit = 1u << lane;
        const uint32_t greater = (before & 0xffff) + __popc(above[w] & mask);
        const uint32_t ties = (before >> 16) + __popc(equal[w] & mask);
        if (above[w] & bit || (equal[w] & bit && ties < cut.equal))
            list[greater + min(ties, cut.equal)] = 32 * w + lane;
    }
}

/* The scores of a row (mass, lse) into shared memory, and to the caller. Ends with a barrier. */
template <lf_score SCORE>
__device__ __forceinline__ void score_row(const Selection &s, int64_t row, int r, float *scores,
                                          float *shares, ChooseShared &shared)
{
    const float *logits = s.logits + row * s.block_parts * s.padded_blocks;
    const int rows_here = min(int(s.p.block_q), s.q_len - r * int(s.p.block_q));
    const int rows = (rows_here + s.part - 1) / s.part;
    if constexpr (SCORE == LF_SCORE_LSE)
        lse_of_rows(s, r, rows, logits, scores);
    else if (warp_holds_row(s.blocks))
        mass_by_lanes(s, r, rows, logits, scores, shares);
    else
        mass_by_passes(s, r, rows, logits, scores, shared);
    if (s.p.scores)
        for (int j = threadIdx.x; j < s.blocks; j += CHOOSE_THREADS)
            s.p.scores[row * s.blocks + j] = scores[j];
}

// 64 registers: the 444 blocks of a call of 12 heads and 4680 rows are resident at once.
template <lf_score SCORE, bool WARP>
__global__ void __launch_bounds__(CHOOSE_THREADS, 4)
    choose_kernel(const __grid_constant__ Selection s)
{
    extern __shared__ uint32_t choose_shared[];
    __shared__ ChooseShared shared;
    float *scores = reinterpret_cast<float *>(choose_shared);  // [J]
    uint32_t *keys = choose_shared;                            // [J], in place of the scores
    uint32_t *frame_keys = keys + s.blocks;                    // [F]
    uint32_t *frames = frame_keys + s.p.k_frames;              // [F] 1: candidates
    uint32_t *words = frames + s.p.k_frames;                   // [2][ceil(J / 32)]
    float *shares = reinterpret_cast<float *>(words + 2 * ((s.blocks + 31) / 32));
    const int64_t row = blockIdx.x;  // of [B, H, R]
    const int r = int(blockIdx.x % unsigned(s.q_blocks)), lane = threadIdx.x % 32;
    const bool by_frame = s.p.hierarchy && s.p.k_frames - s.p.q_frames > s.p.keep_frames;
    int32_t *list = s.p.indices + row * s.p.kept;

    grid_launch_dependents();
    grid_dependency_wait();
    if constexpr (SCORE != LF_SCORE_MEAN) score_row<SCORE>(s, row, r, scores, shares, shared);

    if constexpr (WARP) {
        if (threadIdx.x >= 32) return;
        const float *from = SCORE == LF_SCORE_MEAN ? s.scores + row * s.blocks : scores;
        float x[ROW_KEYS];
        uint32_t key[ROW_KEYS];
#pragma unroll
        for (int i = 0; i < ROW_KEYS; i++)
            x[i] = lane + 32 * i < s.blocks ? from[lane + 32 * i] : 0.0f;
#pragma unroll
        for (int i = 0; i < ROW_KEYS; i++) key[i] = lane + 32 * i < s.blocks ? sort_key(x[i]) : 0;
        if (by_frame) {
            if constexpr (SCORE == LF_SCORE_MEAN) {
#pragma unroll
                for (int i = 0; i < ROW_KEYS; i++)
                    if (lane + 32 * i < s.blocks) scores[lane + 32 * i] = x[i];
                __syncwarp();
            }
            choose_frames<SCORE, true>(s, scores, frame_keys, frames);
            drop_frames(s, frames, key);
        }
        warp_list(key, s.blocks, warp_cut(key, uint32_t(s.p.kept), shared.bins), list);
    } else {
        if constexpr (SCORE == LF_SCORE_MEAN) {
            for (int j = threadIdx.x; j < s.blocks; j += CHOOSE_THREADS)
                scores[j] = s.scores[row * s.blocks + j];
            __syncthreads();
        }
        if (by_frame) choose_frames<SCORE, false>(s, scores, frame_keys, frames);
        for (int j = threadIdx.x; j < s.blocks; j += CHOOSE_THREADS)
            keys[j] = by_frame && !frames[j / s.frame_blocks] ? 0 : sort_key(scores[j]);
        __syncthreads();
        write_list(keys, s.blocks, find_cut(keys, s.blocks, uint32_t(s.p.kept), shared), words,
                   list);
    }
}

}  // namespace lf
