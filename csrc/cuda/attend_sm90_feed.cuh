/* The Hopper attention's division of work and its producer warp: see attend_sm90.cu. */
#pragma once

#include "launch.cuh"
#include "ptx.cuh"

namespace {

using namespace lf;

constexpr int HALF = 64;   // rows of a warpgroup, keys of a block, columns of a swizzled box
constexpr int STEP = 128;  // keys of a step: two blocks
constexpr int CONSUMERS = 256;
constexpr int BOX = HALF * HALF * 2;    // bytes of one TMA box: 64 rows of 128 bytes
constexpr int PLANE = STEP * HALF * 2;  // bytes of one 64-column half of K or V of a step

constexpr uint32_t ALL_VALID = 64u | 64u << 16;

/* Head size and query rows of a list. A CTA has two warpgroups of 64 rows: they share a list of 128
 * rows, or walk one of 64 rows each. The ring has as many slots as shared memory holds. */
template <int DIM_, int ROWS_> struct Shape {
    static constexpr int DIM = DIM_, ROWS = ROWS_;
    static constexpr int GROUPS = ROWS / HALF, LISTS = 2 / GROUPS;
    static constexpr int PLANES = DIM / HALF;
    static constexpr int Q_BUFFERS = DIM == 128 && LISTS == 2 ? 1 : 2;
    static constexpr int SLOTS = LISTS == 1 ? (DIM == 128 ? 5 : 8) : (DIM == 128 ? 3 : 5);
};

struct Item {
    int steps;  // of this item; -1: there is no more
    int tile;
    int pieces;  // 0: a whole tile; -1: a piece to hand over; n: the first piece, n others follow
};

/* What a producer warp and its consumers share. K and V of the steps take turns in one ring, in the
 * order of their use: K 0, K 1, V 0, K 2, V 1, ... */
template <class S> struct Feed {
    alignas(1024) uint8_t q[S::Q_BUFFERS][S::GROUPS][S::PLANES * BOX];  // planes of 64 x 128 bytes
    alignas(1024) uint8_t ring[S::SLOTS][S::PLANES * PLANE];            // planes of 128 x 128 bytes
    uint64_t q_full[S::Q_BUFFERS], q_empty[S::Q_BUFFERS];
    uint64_t full[S::SLOTS], empty[S::SLOTS];
    Item item[S::Q_BUFFERS];
    uint32_t valid[S::SLOTS];  // keys of the two blocks of a K
};

template <class S> struct Shared {
    Feed<S> feed[S::LISTS];
};
// The swizzle needs 1024-byte alignment.
template <class S> constexpr int SHARED_BYTES = int(sizeof(Shared<S>)) + 1024;

/* A walk over the ring's slots: of the K or of the V of all steps. */
template <class S> struct Cursor {
    int slot;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance(int by)
    {
        slot += by;
        if (slot >= S::SLOTS) {
            slot -= S::SLOTS;
            parity ^= 1;
        }
    }
};
constexpr int FIRST_K = 0, FIRST_V = 2;  // then K is advanced by 1, and both by 2 ever after

struct Params {
    void *out;
    float *lse;
    const int32_t *indices;  // NULL: dense
    const int32_t *counts;   // NULL: all rows have max_count
    int64_t out_batch, out_token, out_head;
    int64_t max_count;
    int heads, q_tiles, tiles, q_len, k_len;
    int frame_tokens, frame_blocks, blocks;
    int whole_waves;  // full tiles that every list of a CTA takes
    int rest;         // tiles after those, cut into `cutters` pieces, one for a list of a CTA
    int cutters;
    int list_steps;    // steps of the longest list
    float *sums;       // [cutters][S::GROUPS][S::DIM / 2 + 4][128 threads]
    uint64_t *handed;  // [cutters][S::GROUPS]: `ticket` once the sums are there
    uint64_t ticket;   // unlike anything that memory holds by chance
    float scale_log2, scale;
    float slack;  // SLACK in units of a logit
};
// Floats of a warpgroup's piece.
template <class S> constexpr int SUMS = (S::DIM / 2 + 4) * 128;

/* Where the pieces of the last wave begin, in steps over all its tiles. */
__device__ __forceinline__ int piece_begin(const Params &p, int piece)
{
    return int(int64_t(p.rest) * p.list_steps * piece / p.cutters);
}

/* The i-th item of the n-th of `all` lists: its tile, steps [*first, *first + item->steps) and
 * place in it. NOTE: pieces come last. With those to hand over first nobody would wait, but the
 * whole tiles then sweep the keys out of step and miss the L2: 1.48 against 1.41 ms, dense, chunk 7
 * (H100). */
__device__ __forceinline__ bool item_at(const Params &p, int n, int all, int i, Item *item,
                                        int *first)
{
    item->pieces = 0;
    item->steps = p.list_steps;
    item->tile = i * all + n;
    *first = 0;
    if (i < p.whole_waves) return true;
    if (n >= p.cutters) return false;

    const int piece = p.cutters - 1 - n;
    const int end = piece_begin(p, piece + 1);
    int begin = piece_begin(p, piece);                                         // in steps
    if (i > p.whole_waves) begin = (begin / p.list_steps + 1) * p.list_steps;  // its second tile
    if (i > p.whole_waves + 1 || begin >= end) return false;
    const int tile = begin / p.list_steps, tile_end = (tile + 1) * p.list_steps;
    *first = begin % p.list_steps;
    item->tile = p.whole_waves * all + tile;
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

template <class S>
__device__ __forceinline__ void load_q(Feed<S> &f, const Params &p, const Maps &maps, int tile,
                                       int buffer)
{
    const int m = tile % p.q_tiles, bh = tile / p.q_tiles;

    mbarrier_arrive_expect_tx(&f.q_full[buffer], sizeof f.q[buffer]);
    for (int g = 0; g < S::GROUPS; g++)
        for (int x = 0; x < S::PLANES; x++)
            tma_load_4d(smem_address(f.q[buffer][g]) + x * BOX, maps.q, &f.q_full[buffer], x * HALF,
                        bh % p.heads, m * S::ROWS + g * HALF, bh / p.heads);
}

/* Two blocks of K or V of one head, `first` and `second` their tokens. */
struct Blocks {
    int first, second, head, batch;
};

template <class S>
__device__ __forceinline__ void load_blocks(Feed<S> &f, int slot, const CUtensorMap *map,
                                            const Blocks &b)
{
    const uint32_t target = smem_address(f.ring[slot]);
    uint64_t *full = &f.full[slot];

    mbarrier_arrive_expect_tx(full, sizeof f.ring[slot]);
    for (int x = 0; x < S::PLANES; x++) {
        tma_load_4d(target + x * PLANE, map, full, x * HALF, b.head, b.first, b.batch);
        tma_load_4d(target + x * PLANE + BOX, map, full, x * HALF, b.head, b.second, b.batch);
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

__device__ __forceinline__ Ahead look_ahead(const Params &p, int n, int all, int i)
{
    Ahead a = {};
    a.more = item_at(p, n, all, i, &a.item, &a.first);
    if (!a.more) return a;
    const int at = 2 * a.first + int(threadIdx.x) % 32;
    a.index = -1;
    if (p.indices) {
        // [B, H, R] is the order of the tiles
        a.count = int(p.max_count);
        if (p.counts) a.count = min(max(p.counts[a.item.tile], 0), a.count);
        if (at < p.max_count) a.index = p.indices[a.item.tile * p.max_count + at];
    } else {
        a.count = (p.k_len + HALF - 1) / HALF;
    }
    return a;
}

template <class S>
__device__ __forceinline__ void produce(Feed<S> &f, const Params &p, const Maps &maps, int list)
{
    const int lane = threadIdx.x % 32;
    const int n = blockIdx.x * S::LISTS + list, all = gridDim.x * S::LISTS;
    Cursor<S> k = {FIRST_K}, v = {FIRST_V};
    Blocks before = {};  // whose V is to load next
    bool first_step = true;
    Ahead next = look_ahead(p, n, all, 0);

    const auto load_v = [&]() {
        mbarrier_wait(&f.empty[v.slot], v.parity ^ 1);
        if (lane == 0) load_blocks(f, v.slot, maps.v, before);
        v.advance(2);
    };
    for (int i = 0;; i++) {
        const int buffer = i % S::Q_BUFFERS;
        const Ahead now = next;
        Item item = now.item;
        const int begin = 2 * now.first;
        const int end = min(now.count, begin + 2 * item.steps);  // a short list ends early
        item.steps = now.more ? max(0, (end - begin + 1) / 2) : -1;

        mbarrier_wait(&f.q_empty[buffer], (i / S::Q_BUFFERS & 1) ^ 1);
        if (lane == 0) {
            f.item[buffer] = item;
            if (item.steps > 0)
                load_q(f, p, maps, item.tile, buffer);
            else
                mbarrier_arrive(&f.q_full[buffer]);
        }
        if (!now.more) break;
        next = look_ahead(p, n, all, i + 1);

        const int bh = item.tile / p.q_tiles;
        Blocks blocks = {0, 0, bh % p.heads, bh / p.heads};
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
            for (int j = 0; j < here; j += 2) {
                blocks.first = __shfl_sync(~0u, key, j);
                const int keys = __shfl_sync(~0u, valid, j);
                // An odd list's last slot repeats the block before it, with no valid key.
                const int pair = j + 1 < here ? j + 1 : j;
                blocks.second = __shfl_sync(~0u, key, pair);
                const int more_keys = pair == j ? 0 : __shfl_sync(~0u, valid, pair);
                mbarrier_wait(&f.empty[k.slot], k.parity ^ 1);
                if (lane == 0) {
                    f.valid[k.slot] = uint32_t(keys) | uint32_t(more_keys) << 16;
                    load_blocks(f, k.slot, maps.k, blocks);
                }
                k.advance(first_step ? 1 : 2);
                if (!first_step) load_v();
                first_step = false;
                before = blocks;
                __syncwarp();
            }
        }
    }
    if (!first_step) load_v();
}

}  // namespace
