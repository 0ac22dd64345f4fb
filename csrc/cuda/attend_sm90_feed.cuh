/* The Hopper attention's division of work and its producer warp: see attend_sm90.cu. */
#pragma once

#include "launch.cuh"
#include "ptx.cuh"

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
    int steps;  // of this item; -1: there is no more
    int tile;
    int pieces;  // 0: a whole tile; -1: a piece to hand over; n: the first piece, n others follow
};

struct Shared {
    uint8_t q[2][TILE * DIM * 2];       // [buffer][row half][column half][64 rows][128 B]
    uint8_t k[STAGES][STEP * DIM * 2];  // [stage][column half][128 keys][128 B]
    uint8_t v[STAGES][STEP * DIM * 2];
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
    const int32_t *indices;  // NULL: dense
    const int32_t *counts;   // NULL: all rows have max_count
    int64_t out_batch, out_token, out_head;
    int64_t max_count;
    int heads, q_tiles, tiles, q_len, k_len;
    int frame_tokens, frame_blocks, blocks;
    int whole_waves;  // full tiles that every CTA takes
    int rest;         // tiles after those, cut into pieces for `cutters` CTAs
    int cutters;
    int list_steps;    // steps of the longest list
    float *sums;       // [cutters][2 warpgroups][64 + 4][128 threads]
    uint64_t *handed;  // [cutters][2]: `ticket` once the sums are there
    uint64_t ticket;   // unlike anything that memory holds by chance
    float scale_log2, scale;
};
constexpr int SUMS = 2 * 68 * 128;  // floats of one CTA's piece

/* Where the pieces of the last wave begin, in steps over all its tiles. */
__device__ __forceinline__ int piece_begin(const Params &p, int piece)
{
    return int(int64_t(p.rest) * p.list_steps * piece / p.cutters);
}

/* The i-th item of this CTA: its tile, steps [*first, *first + item->steps) and place in it.
 * NOTE: pieces come last. With those to hand over first nobody would wait, but the whole tiles then
 * sweep the keys out of step and miss the L2: 1.48 against 1.41 ms, dense, chunk 7 (H100). */
__device__ __forceinline__ bool item_at(const Params &p, int i, Item *item, int *first)
{
    item->pieces = 0;
    item->steps = p.list_steps;
    item->tile = i * gridDim.x + blockIdx.x;
    *first = 0;
    if (i < p.whole_waves) return true;
    if (int(blockIdx.x) >= p.cutters) return false;

    const int piece = p.cutters - 1 - int(blockIdx.x);
    const int end = piece_begin(p, piece + 1);
    int begin = piece_begin(p, piece);                                         // in steps
    if (i > p.whole_waves) begin = (begin / p.list_steps + 1) * p.list_steps;  // its second tile
    if (i > p.whole_waves + 1 || begin >= end) return false;
    const int tile = begin / p.list_steps, tile_end = (tile + 1) * p.list_steps;
    *first = begin % p.list_steps;
    item->tile = p.whole_waves * gridDim.x + tile;
    item->steps = min(end, tile_end) - begin;
    if (*first > 0) {
        item->pieces = -1;
    } else {
        for (int next = piece + 1; next < p.cutters && piece_begin(p, next) < tile_end; next++)
            item->pieces++;
    }
    return true;
}

/* ---- producer: one warp, lane 0 issues ---- */

struct Maps {
    const CUtensorMap *q, *k, *v;
};

__device__ __forceinline__ void load_q(Shared &s, const Params &p, const Maps &maps, int tile,
                                       int buffer)
{
    const int m = tile % p.q_tiles, bh = tile / p.q_tiles;
    const uint32_t target = smem_address(s.q[buffer]);

    mbarrier_arrive_expect_tx(&s.q_full[buffer], 4 * BOX);
    for (int w = 0; w < 2; w++)
        for (int x = 0; x < 2; x++)
            tma_load_4d(target + (w * 2 + x) * BOX, maps.q, &s.q_full[buffer], x * HALF,
                        bh % p.heads, m * TILE + w * HALF, bh / p.heads);
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

/* What the producer knows of an item before it gets there: fetched while it feeds the one before,
 * since a count and the indices behind it are two dependent reads from memory. */
struct Ahead {
    Item item;
    int first;  // step
    int count;  // blocks of its list
    int index;  // this lane's block of the first 32
    bool more;
};

__device__ __forceinline__ Ahead look_ahead(const Params &p, int i)
{
    Ahead a = {};
    a.more = item_at(p, i, &a.item, &a.first);
    if (!a.more) return a;
    const int at = 2 * a.first + int(threadIdx.x) % 32;
    a.index = -1;
    if (p.indices) {
        // [B, H, R] is the order of the tiles
        a.count = p.counts ? p.counts[a.item.tile] : int(p.max_count);
        if (at < p.max_count) a.index = p.indices[a.item.tile * p.max_count + at];
    } else {
        a.count = (p.k_len + HALF - 1) / HALF;
    }
    return a;
}

__device__ __forceinline__ void produce(Shared &s, const Params &p, const Maps &maps)
{
    const int lane = threadIdx.x % 32;
    uint32_t step = 0;  // of the rings, over all items
    Ahead next = look_ahead(p, 0);

    for (int i = 0;; i++) {
        const int buffer = i & 1;
        const Ahead now = next;
        Item item = now.item;
        const int begin = 2 * now.first;
        const int end = min(now.count, begin + 2 * item.steps);  // a short list ends early
        item.steps = now.more ? max(0, (end - begin + 1) / 2) : -1;

        mbarrier_wait(&s.q_empty[buffer], (i >> 1 & 1) ^ 1);
        if (lane == 0) {
            s.item[buffer] = item;
            if (item.steps > 0)
                load_q(s, p, maps, item.tile, buffer);
            else
                mbarrier_arrive(&s.q_full[buffer]);
        }
        if (!now.more) return;
        next = look_ahead(p, i + 1);

        const int bh = item.tile / p.q_tiles, head = bh % p.heads, batch = bh / p.heads;
        for (int base = begin; base < end; base += 32) {
            int key, valid;  // key: 32-bit, as the copy engine's coordinates are
            const int at = base + lane;
            if (p.indices) {
                int index = now.index;
                if (base > begin) index = at < end ? p.indices[item.tile * p.max_count + at] : -1;
                locate(p, at < end ? index : -1, &key, &valid);
            } else {
                key = at * HALF;
                valid = max(0, min(HALF, p.k_len - key));
            }
            const int here = min(32, end - base);
            for (int j = 0; j < here; j += 2, step++) {
                const int stage = step % STAGES;
                const uint32_t parity = step / STAGES & 1;
                const int first = __shfl_sync(~0u, key, j), keys = __shfl_sync(~0u, valid, j);
                // An odd list's last slot repeats the block before it, with no valid key.
                const int pair = j + 1 < here ? j + 1 : j;
                const int second = __shfl_sync(~0u, key, pair);
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

}  // namespace
