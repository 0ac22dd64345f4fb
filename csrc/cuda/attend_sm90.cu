/* Block-sparse and dense attention on Hopper: wgmma, TMA, mbarrier, setmaxnreg.
 *
 * A tile is 128 query rows of one (batch, head) that share a list; a step is two gathered 64-key
 * blocks side by side, so that the products are 64 x 128 x 128 for each of two consumer
 * warpgroups. One producer warp walks the lists and feeds two-stage rings of K and V and a pair
 * of Q buffers. The grid is one CTA an SM, persistent.
 *
 *   consumer, step j:   QK(j) issued | PV(j-1) issued | softmax(j) while PV(j-1) runs | O *= a
 *   the two warpgroups: their issue slots alternate (named barriers 1 and 2), so one's softmax
 *                       lies under the other's products
 *   between tiles:      the stream goes on: QK of the next tile's first step is issued before
 *                       the last PV of this one, whose O is written while P is packed
 *
 * The last wave: where at most half of the SMs would have a tile, each tile is cut into two
 * 64-row halves, one a CTA, and the two warpgroups share a half by taking every other step and
 * merging once through shared memory. No second launch, no workspace, a fixed order of sums.
 *
 * Limits measured: the probe's main loop ran at 720 TFLOP/s (H100, short burst); L2 serves
 * 64 KB a step, 5.5 TB/s at that rate. */
#include "kernels.h"
#include "launch.cuh"
#include "ptx.cuh"
#include <cfloat>
#include <cudaTypedefs.h>

namespace {

using namespace lf;

constexpr int DIM = 128;
constexpr int TILE = 128;  // query rows of a tile
constexpr int HALF = 64;   // rows of a warpgroup, keys of a slot, columns of a swizzled box
constexpr int STEP = 128;  // keys of a step: two slots
constexpr int STAGES = 2;
constexpr int CONSUMERS = 256;
constexpr int BOX = HALF * HALF * 2;    // bytes of one TMA box: 64 rows of 128 bytes
constexpr int PLANE = STEP * HALF * 2;  // bytes of one 64-column half of K or V of a step

constexpr uint32_t ALL_VALID = 64u | 64u << 16;

struct Item {
    int steps;  // -1: no more
    int tile;
    int half;  // -1: a whole tile
};

struct Shared {
    uint8_t q[2][TILE * DIM * 2];       // [buffer][row half][column half][64 rows][128 B]
    uint8_t k[STAGES][STEP * DIM * 2];  // [stage][column half][128 keys][128 B]
    uint8_t v[STAGES][STEP * DIM * 2];
    float other[128][4];  // max and sum of the second warpgroup of a half tile
    uint64_t q_full[2], q_empty[2];
    uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    Item item[2];            // of each Q buffer
    uint32_t valid[STAGES];  // keys of the two slots of each K stage
};
constexpr int SHARED_BYTES = sizeof(Shared) + 1024;  // the swizzle needs 1024-byte alignment
static_assert(SHARED_BYTES <= 232448, "one CTA has 227 KB of shared memory");

struct Params {
    void *out;
    float *lse;
    const int32_t *indices, *counts;  // NULL: dense
    int64_t out_batch, out_token, out_head;
    int64_t max_count;
    int heads, q_tiles, tiles, q_len, k_len;
    int frame_tokens, frame_blocks, blocks;
    int whole_waves, rest, is_split;
    float scale_log2, scale;
};

/* The i-th item of this CTA. */
__device__ __forceinline__ bool item_at(const Params &p, int i, int *tile, int *half)
{
    *half = -1;
    *tile = i * gridDim.x + blockIdx.x;
    if (i < p.whole_waves) return true;
    if (i > p.whole_waves) return false;
    if (!p.is_split) return int(blockIdx.x) < p.rest;
    *tile = i * gridDim.x + blockIdx.x / 2;
    *half = blockIdx.x % 2;
    return int(blockIdx.x) < 2 * p.rest;
}

/* ---- producer: one warp, lane 0 issues ---------------------------------------------------------
 */

struct Maps {
    const CUtensorMap *q, *k, *v;
};

__device__ __forceinline__ void load_q(Shared &s, const Params &p, const Maps &maps, int tile,
                                       int half, int buffer)
{
    const int m = tile % p.q_tiles, bh = tile / p.q_tiles;
    const int row = m * TILE + (half > 0 ? HALF : 0), rows = half < 0 ? 2 : 1;
    const uint32_t target = smem_address(s.q[buffer]);

    mbarrier_arrive_expect_tx(&s.q_full[buffer], rows * 2 * BOX);
    for (int w = 0; w < rows; w++)
        for (int x = 0; x < 2; x++)
            tma_load_4d(target + (w * 2 + x) * BOX, maps.q, &s.q_full[buffer], x * HALF,
                        bh % p.heads, row + w * HALF, bh / p.heads);
}

__device__ __forceinline__ void load_slots(uint32_t target, const CUtensorMap *map,
                                           uint64_t *barrier, int head, int batch, int first,
                                           int second)
{
    mbarrier_arrive_expect_tx(barrier, 4 * BOX);
    for (int x = 0; x < 2; x++) {
        tma_load_4d(target + x * PLANE, map, barrier, x * HALF, head, first, batch);
        tma_load_4d(target + x * PLANE + BOX, map, barrier, x * HALF, head, second, batch);
    }
}

/* Start token and length of the key block that this lane holds; an index out of range has none. */
__device__ __forceinline__ void locate(const Params &p, int j, int *start, int *valid)
{
    *start = *valid = 0;
    if (unsigned(j) >= unsigned(p.blocks)) return;
    const int in_frame = j % p.frame_blocks * HALF;
    *start = j / p.frame_blocks * p.frame_tokens + in_frame;
    *valid = min(HALF, p.frame_tokens - in_frame);
}

__device__ __forceinline__ void produce(Shared &s, const Params &p, const Maps &maps)
{
    const int lane = threadIdx.x % 32;
    uint32_t step = 0;  // of the rings, over all items

    for (int i = 0;; i++) {
        const int buffer = i & 1;
        Item item;
        const bool more = item_at(p, i, &item.tile, &item.half);
        const int64_t row = item.tile;  // [B, H, R] is the order of the tiles
        const int count = !more ? 0 : p.counts ? p.counts[row] : (p.k_len + HALF - 1) / HALF;
        item.steps = more ? (count + 1) / 2 : -1;

        mbarrier_wait(&s.q_empty[buffer], (i >> 1 & 1) ^ 1);
        if (lane == 0) {
            s.item[buffer] = item;
            if (item.steps > 0)
                load_q(s, p, maps, item.tile, item.half, buffer);
            else
                mbarrier_arrive(&s.q_full[buffer]);
        }
        if (!more) return;

        const int bh = item.tile / p.q_tiles, head = bh % p.heads, batch = bh / p.heads;
        for (int base = 0; base < count; base += 32) {
            int start, valid;
            const int at = base + lane;
            if (p.indices) {
                locate(p, at < count ? p.indices[row * p.max_count + at] : -1, &start, &valid);
            } else {
                start = at * HALF;
                valid = max(0, min(HALF, p.k_len - start));
            }
            const int here = min(32, count - base);
            for (int j = 0; j < here; j += 2, step++) {
                const int stage = step % STAGES;
                const uint32_t parity = step / STAGES & 1;
                const int first = __shfl_sync(~0u, start, j), keys = __shfl_sync(~0u, valid, j);
                // An odd list's last slot repeats the block before it, with no valid key.
                const int pair = j + 1 < here ? j + 1 : j;
                const int second = __shfl_sync(~0u, start, pair);
                const int more_keys = pair == j ? 0 : __shfl_sync(~0u, valid, pair);
                mbarrier_wait(&s.k_empty[stage], parity ^ 1);
                if (lane == 0) {
                    s.valid[stage] = uint32_t(keys) | uint32_t(more_keys) << 16;
                    load_slots(smem_address(s.k[stage]), maps.k, &s.k_full[stage], head, batch,
                               first, second);
                }
                mbarrier_wait(&s.v_empty[stage], parity ^ 1);
                if (lane == 0)
                    load_slots(smem_address(s.v[stage]), maps.v, &s.v_full[stage], head, batch,
                               first, second);
                __syncwarp();
            }
        }
    }
}

/* ---- consumers: two warpgroups -----------------------------------------------------------------
 */

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
        for (int i = 0; i < 64; i += 4)
            high = fmaxf(high, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
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
    const int first = m * TILE + (item.half < 0 ? group : item.half) * HALF + warp * 16 + lane / 4;
    T *out = static_cast<T *>(p.out) + bh / p.heads * p.out_batch + bh % p.heads * p.out_head;

#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = first + 8 * r;
        float sum = state.sum[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        T *line = out + int64_t(row) * p.out_token + lane % 2 * 8 + lane % 4 / 2 * 4;
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
    const int first = m * TILE + (item.half < 0 ? group : item.half) * HALF;
    T *out = static_cast<T *>(p.out) + bh / p.heads * p.out_batch + bh % p.heads * p.out_head;

    if (item.half >= 0 && group == 1) return;
    for (int i = lane; i < HALF * DIM / 8; i += 128) {
        const int row = first + i / (DIM / 8);
        if (row < p.q_len)
            *reinterpret_cast<uint4 *>(out + int64_t(row) * p.out_token + i % (DIM / 8) * 8) =
                make_uint4(0, 0, 0, 0);
    }
    if (p.lse && lane < HALF && first + lane < p.q_len)
        p.lse[int64_t(bh) * p.q_len + first + lane] = -INFINITY;
}

/* What a warpgroup carries from step to step. */
struct Ring {
    uint32_t step = 0;  // the next step's number over all items
    __device__ __forceinline__ int stage() const { return step % STAGES; }
    __device__ __forceinline__ uint32_t parity() const { return step / STAGES & 1; }
};

/* Takes the item of the i-th Q buffer, writing out the empty ones before it. */
template <typename T>
__device__ __forceinline__ Item take_item(Shared &s, const Params &p, int &i, int group, bool lead)
{
    for (;; i++) {
        mbarrier_wait(&s.q_full[i & 1], i >> 1 & 1);
        const Item item = s.item[i & 1];
        if (item.steps != 0) return item;
        store_nothing<T>(p, item, group);
        if (lead) mbarrier_arrive(&s.q_empty[i & 1]);
    }
}

__device__ __forceinline__ void my_turn(int group) { bar_sync(1 + group, CONSUMERS); }
__device__ __forceinline__ void your_turn(int group) { bar_arrive(2 - group, CONSUMERS); }

/* A stage that only one warpgroup reads: it arrives for both, so that neither waits for the other. */
__device__ __forceinline__ void release_alone(uint64_t *empty)
{
    mbarrier_arrive(empty);
    mbarrier_arrive(empty);
}

/* A half tile: this warpgroup takes steps group, group + 2, ...; the second hands its sums over. */
template <typename T>
__device__ __forceinline__ void consume_half(Shared &s, const Params &p, const Item &item,
                                             uint64_t q, Ring ring, int buffer, int group,
                                             bool lead)
{
    float logits[64], o[64], alpha[2];
    uint32_t pr[32];
    RowState state;
    int before = -1;  // stage whose V is still to be multiplied
    uint32_t before_parity = 0;

    reset(state);
#pragma unroll
    for (int i = 0; i < 64; i++) o[i] = 0.0f;
    ring.step += group;
    for (int j = group; j < item.steps; j += 2, ring.step += 2) {
        const int stage = ring.stage();
        const uint32_t parity = ring.parity();
        mbarrier_wait(&s.k_full[stage], parity);
        const uint32_t valid = s.valid[stage];
        issue_qk<T>(logits, q, k_tile(s, stage));
        if (before >= 0) {
            mbarrier_wait(&s.v_full[before], before_parity);
            issue_pv<T>(o, pr, v_tile(s, before), 1);
            wgmma_wait_group<1>();
        } else {
            wgmma_wait_group<0>();
        }
        if (lead) release_alone(&s.k_empty[stage]);
        if (valid != ALL_VALID) mask(logits, valid);
        softmax(logits, state, alpha, p.scale_log2);
        wait_and_rescale(o, alpha);
        if (before >= 0 && lead) release_alone(&s.v_empty[before]);
        pack<T>(logits, pr);
        before = stage;
        before_parity = parity;
    }
    if (before >= 0) {
        mbarrier_wait(&s.v_full[before], before_parity);
        issue_pv<T>(o, pr, v_tile(s, before), 1);
        wgmma_wait_group<0>();
    }

    // Once both are here nobody reads the other Q buffer: it takes the second warpgroup's O.
    float *exchange = reinterpret_cast<float *>(s.q[buffer ^ 1]);
    const int thread = threadIdx.x % 128;
    if (group == 0) bar_arrive(4, CONSUMERS);
    if (group == 1) {
        bar_sync(4, CONSUMERS);
#pragma unroll
        for (int i = 0; i < 64; i++) exchange[i * 128 + thread] = o[i];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            s.other[thread][r] = state.max[r];
            s.other[thread][2 + r] = state.sum[r];
        }
    }
    bar_sync(3, CONSUMERS);
    if (group == 1) return;
    float mine[2], theirs[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float high = fmaxf(state.max[r], s.other[thread][r]);
        mine[r] = ex2_approx_ftz_pinned((state.max[r] - high) * p.scale_log2);
        theirs[r] = ex2_approx_ftz_pinned((s.other[thread][r] - high) * p.scale_log2);
        state.sum[r] = state.sum[r] * mine[r] + s.other[thread][2 + r] * theirs[r];
        state.max[r] = high;
    }
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int r = i >> 1 & 1;
        o[i] = o[i] * mine[r] + exchange[i * 128 + thread] * theirs[r];
    }
    store<T>(p, o, state, item, group);
}

template <typename T> __device__ __forceinline__ void consume(Shared &s, const Params &p, int group)
{
    const bool lead = threadIdx.x % 128 == 0;
    float logits[64], o[64], alpha[2];
    uint32_t pr[32];
    RowState state;
    Ring ring;
    int i = 0;

    const auto q_rows = [&](int half) {
        return rows_descriptor(smem_address(s.q[i & 1]) + (half < 0 ? group * 2 * BOX : 0));
    };
    Item item = take_item<T>(s, p, i, group, lead);
    if (group == 1) your_turn(1);  // the first warpgroup begins

    if (item.steps > 0 && item.half < 0) {
        // The first step of the stream has no PV before it.
        int stage = ring.stage();
        mbarrier_wait(&s.k_full[stage], ring.parity());
        uint32_t valid = s.valid[stage];
        my_turn(group);
        issue_qk<T>(logits, q_rows(-1), k_tile(s, stage));
        your_turn(group);
        wgmma_wait_group<0>();
        if (lead) mbarrier_arrive(&s.k_empty[stage]);
        reset(state);
        if (valid != ALL_VALID) mask(logits, valid);
        softmax(logits, state, alpha, p.scale_log2);
        pack<T>(logits, pr);

        for (;;) {
            for (int j = 1; j < item.steps; j++) {
                const int before = ring.stage();
                const uint32_t before_parity = ring.parity();
                ring.step++;
                stage = ring.stage();
                mbarrier_wait(&s.k_full[stage], ring.parity());
                valid = s.valid[stage];
                my_turn(group);
                issue_qk<T>(logits, q_rows(-1), k_tile(s, stage));
                mbarrier_wait(&s.v_full[before], before_parity);
                issue_pv<T>(o, pr, v_tile(s, before), j > 1);
                your_turn(group);
                wgmma_wait_group<1>();
                if (lead) mbarrier_arrive(&s.k_empty[stage]);
                if (valid != ALL_VALID) mask(logits, valid);
                softmax(logits, state, alpha, p.scale_log2);
                wait_and_rescale(o, alpha);
                if (lead) mbarrier_arrive(&s.v_empty[before]);
                pack<T>(logits, pr);
            }
            if (lead) mbarrier_arrive(&s.q_empty[i & 1]);
            i++;
            const Item next = take_item<T>(s, p, i, group, lead);
            const int before = ring.stage();
            const uint32_t before_parity = ring.parity();
            ring.step++;
            if (next.steps < 0 || next.half >= 0) {
                mbarrier_wait(&s.v_full[before], before_parity);
                issue_pv<T>(o, pr, v_tile(s, before), item.steps > 1);
                wgmma_wait_group<0>();
                if (lead) mbarrier_arrive(&s.v_empty[before]);
                store<T>(p, o, state, item, group);
                item = next;
                break;
            }
            // The next tile's first step over this tile's last PV.
            stage = ring.stage();
            mbarrier_wait(&s.k_full[stage], ring.parity());
            valid = s.valid[stage];
            my_turn(group);
            issue_qk<T>(logits, q_rows(-1), k_tile(s, stage));
            mbarrier_wait(&s.v_full[before], before_parity);
            issue_pv<T>(o, pr, v_tile(s, before), item.steps > 1);
            your_turn(group);
            wgmma_wait_group<1>();
            if (lead) mbarrier_arrive(&s.k_empty[stage]);
            const RowState done = state;
            reset(state);
            if (valid != ALL_VALID) mask(logits, valid);
            softmax(logits, state, alpha, p.scale_log2);
            wgmma_wait_group<0>();
            if (lead) mbarrier_arrive(&s.v_empty[before]);
            pack<T>(logits, pr);
            store<T>(p, o, done, item, group);
            item = next;
        }
    }
    if (group == 0) my_turn(0);  // takes the arrival that the last step left behind
    if (item.steps > 0) consume_half<T>(s, p, item, q_rows(item.half), ring, i & 1, group, lead);
}

template <typename T>
__global__ void __launch_bounds__(384, 1)
    attend_sm90_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                       const __grid_constant__ CUtensorMap v, const Params p)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ uint8_t raw[];
    Shared &s =
        *reinterpret_cast<Shared *>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
    // From lane 0 of the warp, so that the compiler knows it to be uniform.
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);

    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            mbarrier_init(&s.q_full[i], 1);
            mbarrier_init(&s.q_empty[i], 2);
        }
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(&s.k_full[i], 1);
            mbarrier_init(&s.k_empty[i], 2);
            mbarrier_init(&s.v_full[i], 1);
            mbarrier_init(&s.v_empty[i], 2);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (group == 0) {
        setmaxnreg_dec<40>();
        if (threadIdx.x < 32) produce(s, p, {&q, &k, &v});
    } else {
        setmaxnreg_inc<232>();
        consume<T>(s, p, group - 1);
    }
#endif
}

}  // namespace

namespace {

// ---- host ---------------------------------------------------------------------------------------

using kernel_fn = void (*)(CUtensorMap, CUtensorMap, CUtensorMap, Params);

kernel_fn pick(lf_dtype dtype)
{
    switch (dtype) {
    case LF_BF16: return attend_sm90_kernel<__nv_bfloat16>;
    case LF_F16: return attend_sm90_kernel<__half>;
    default: return nullptr;
    }
}

/* cuTensorMapEncodeTiled, from the driver without linking it. */
PFN_cuTensorMapEncodeTiled_v12000 encoder()
{
    static const auto found = []() -> PFN_cuTensorMapEncodeTiled_v12000 {
        void *function = nullptr;
        cudaDriverEntryPointQueryResult result;
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                             cudaEnableDefault, &result) != cudaSuccess) {
            (void)cudaGetLastError();
            return nullptr;
        }
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
    }();
    return found;
}

/* Boxes of 64 tokens by 64 columns of one head; tokens past the end read as zeros. */
int encode(CUtensorMap *map, const lf_tensor &x, const lf_attend_params *p, int64_t tokens,
           lf_error *err)
{
    const cuuint64_t sizes[4] = {DIM, cuuint64_t(p->heads), cuuint64_t(tokens),
                                 cuuint64_t(p->batch)};
    const cuuint64_t strides[3] = {cuuint64_t(x.head) * 2, cuuint64_t(x.token) * 2,
                                   cuuint64_t(x.batch) * 2};
    const cuuint32_t box[4] = {HALF, 1, HALF, 1}, every[4] = {1, 1, 1, 1};
    const CUresult status = encoder()(
        map,
        p->dtype == LF_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
        x.data, sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status == CUDA_SUCCESS) return 0;
    return lf_fail(err, LF_CUDA, "block_sparse_attention: tensor map refused, CUresult %d",
                   int(status));
}

bool fits_tma(const lf_tensor &x)
{
    const int64_t strides[3] = {x.batch, x.token, x.head};
    for (const int64_t stride : strides)
        if (stride <= 0 || stride % 8 || stride >= (int64_t(1) << 39)) return false;
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

int multiprocessors(int device)
{
    int count = 0;
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess
               ? count
               : 0;
}

}  // namespace

extern "C" int lf_attend_sm90_can_run(const lf_attend_params *p, int device, lf_error *err)
{
    const auto no = [err](const char *reason) {
        lf_fail(err, LF_UNSUPPORTED, "the Hopper kernel takes %s", reason);
        return 0;
    };
    int major = 0, minor = 0;
    (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    (void)cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (major != 9 || minor != 0) return no("compute capability 9.0 only");
    if (!pick(p->dtype)) return no("bfloat16 and float16");
    if (p->dim != DIM) return no("head size 128");
    if (p->indices && (p->block_q != TILE || p->block_k != HALF))
        return no("query blocks of 128 rows with key blocks of 64 tokens");
    if (!fits_tma(p->q) || !fits_tma(p->k) || !fits_tma(p->v))
        return no("q, k and v with strides and addresses in units of 16 bytes");
    if (p->out.token % 4 || p->out.head % 4 || p->out.batch % 4 ||
        reinterpret_cast<uintptr_t>(p->out.data) % 16 || p->out.token % 8)
        return no("out with strides and addresses in units of 16 bytes");
    if (p->k_len >= INT32_MAX / 2 || p->q_len >= INT32_MAX / 2 ||
        p->batch * p->heads * lf_ceil_div(p->q_len, TILE) >= INT32_MAX / 4)
        return no("fewer than 2^29 tiles and 2^30 tokens");
    if (!encoder()) return no("a driver with tensor maps (CUDA 12)");
    return 1;
}

extern "C" int lf_attend_sm90_warmup(lf_error *err)
{
    const lf_dtype dtypes[] = {LF_BF16, LF_F16};
    for (const lf_dtype dtype : dtypes)
        LF_CUDA_TRY(cudaFuncSetAttribute(reinterpret_cast<const void *>(pick(dtype)),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         SHARED_BYTES));
    (void)encoder();
    return 0;
}

extern "C" int lf_attend_sm90(const lf_attend_params *p, lf_place place, lf_error *err)
{
    const lf::DeviceGuard guard(place.device);
    CUtensorMap q, k, v;
    Params a = {};

    a.out = p->out.data;
    a.out_batch = p->out.batch;
    a.out_token = p->out.token;
    a.out_head = p->out.head;
    a.lse = p->lse;
    a.indices = p->indices;
    a.counts = p->counts;
    a.max_count = p->max_count;
    a.heads = int(p->heads);
    a.q_tiles = int(lf_ceil_div(p->q_len, TILE));
    a.tiles = int(p->batch * p->heads) * a.q_tiles;
    a.q_len = int(p->q_len);
    a.k_len = int(p->k_len);
    if (p->indices) {
        a.frame_tokens = int(p->frame_tokens);
        a.frame_blocks = int(lf_frame_blocks(p->frame_tokens, HALF));
        a.blocks = int(p->k_len / p->frame_tokens) * a.frame_blocks;
    }
    a.scale = p->scale;
    a.scale_log2 = p->scale * 1.4426950408889634f;
    if (a.tiles == 0) return 0;

    const int grid = multiprocessors(place.device);
    if (grid == 0) return lf_fail(err, LF_CUDA, "device %d: no multiprocessor found", place.device);
    a.whole_waves = a.tiles / grid;
    a.rest = a.tiles % grid;
    a.is_split = 2 * a.rest <= grid;
    if (encode(&q, p->q, p, p->q_len, err) < 0 || encode(&k, p->k, p, p->k_len, err) < 0 ||
        encode(&v, p->v, p, p->k_len, err) < 0)
        return -1;
    const auto stream = static_cast<cudaStream_t>(place.stream);
    pick(p->dtype)<<<grid, 384, SHARED_BYTES, stream>>>(q, k, v, a);
    LF_CUDA_TRY(cudaGetLastError());
    return 0;
}
