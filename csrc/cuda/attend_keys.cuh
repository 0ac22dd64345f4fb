/* Portable attention, the way in: what the host plans, what a block works on, and the copies of
 * the kept keys to shared memory. Private to attend.cu. */
#pragma once

#include "launch.cuh"
#include "ptx.cuh"
#include "tile.cuh"

namespace lf::portable {

constexpr uint32_t GROUPS = 2, GROUP_WARPS = 4, WARPS = GROUPS * GROUP_WARPS;
constexpr uint32_t GROUP_THREADS = 32 * GROUP_WARPS, THREADS = 32 * WARPS;
constexpr uint32_t STEP = 64;        // keys of a step
constexpr uint32_t TILE_ROWS = 128;  // most query rows of a block
constexpr uint32_t WARP_ROWS = 32;
constexpr uint32_t ALL = 0xffffffffu;
constexpr float LN_2 = 0.693147180559945f;

/* What the host derives from the parameters. Byte strides; a piece is the run of consecutive keys
 * that a step takes from one list entry (min(block_k, 64)); without a list the entries are the
 * 64-key blocks of one frame of Lk tokens. */
struct Plan {
    int64_t q_token, k_token, v_token, out_token;
    int64_t k_pass, v_pass;             // of the rows that a group copies at once
    uint32_t rows_per_item, row_items;  // query rows of a list row; list rows of a (b, h)
    uint32_t whole_items;               // blocks that take a whole list row; the others take halves
    uint32_t entries;                   // most entries of a list
    uint32_t frame_tokens, block_keys;
    uint32_t blocks, frame_blocks;  // entries outside [0, blocks) are skipped
    uint32_t magic, shift;          // j / frame_blocks = j * magic >> shift for j < 2^31
    uint32_t piece_log2, pieces_log2, steps_log2;  // keys of a piece; pieces of a step; or steps
    uint32_t ring_bytes;                           // of a group: its K and its V tile
    uint32_t work_at;                              // in shared memory
    float scale_log2;                              // q . k times this is an exponent of 2
};

/* A block's work, in shared memory: read again where it is needed, it costs no registers. */
struct Work {
    const char *k, *v;    // row 0 of this (b, h)
    const int32_t *list;  // [entries]; null: entry i is block i
    uint32_t entries, steps;
    uint32_t batch, head;
    int64_t first;   // query rows [first, first + count)
    uint32_t count;  // 0: none
};

__device__ inline Work find_work(const lf_attend_params &p, const Plan &plan)
{
    uint32_t i = blockIdx.x, skipped = 0, most = TILE_ROWS;
    if (i >= plan.whole_items) {
        skipped = (i - plan.whole_items) % 2 * (TILE_ROWS / 2);
        i = plan.whole_items + (i - plan.whole_items) / 2;
        most = TILE_ROWS / 2;
    }
    const uint32_t heads = uint32_t(p.heads), list_row = i % plan.row_items;
    Work w;
    w.head = i / plan.row_items % heads;
    w.batch = i / plan.row_items / heads;
    w.k = static_cast<const char *>(p.k.data) + 2 * (w.batch * p.k.batch + w.head * p.k.head);
    w.v = static_cast<const char *>(p.v.data) + 2 * (w.batch * p.v.batch + w.head * p.v.head);
    w.list = p.indices ? p.indices + i * p.max_count : nullptr;
    w.entries = plan.entries;
    if (p.counts) w.entries = uint32_t(min(max(p.counts[i], 0), int32_t(plan.entries)));
    w.steps = ((w.entries << plan.steps_log2) + (1u << plan.pieces_log2) - 1) >> plan.pieces_log2;
    w.first = int64_t(list_row) * plan.rows_per_item + skipped;
    const int64_t rows = min(int64_t(plan.rows_per_item) - skipped, p.q_len - w.first);
    w.count = uint32_t(min(max(rows, int64_t(0)), int64_t(most)));
    return w;
}

// ---- the keys of a group, on their way to shared memory ---------------------------------

__device__ __forceinline__ void sync_group()
{
    bar_sync(1 + tid_x() / GROUP_THREADS, GROUP_THREADS);
}

/* Copies the group's steps into its ring, tile by tile: K of a step, V of it, K of the next. The
 * lanes hold the entries of a step, piece i in lane i, and the entry of the next one early, so
 * that no copy waits for the list. */
template <int DIM> struct KeyStream {
    static constexpr uint32_t UNITS = Tile<DIM>::UNITS;
    static constexpr uint32_t PASS_ROWS = GROUP_THREADS / UNITS, PASSES = STEP / PASS_ROWS;

    const Plan &plan;
    const Work &work;
    uint32_t rings;  // shared-window address of both rings
    uint32_t step;   // whose K comes next
    uint32_t first;  // token of this lane's piece in the step whose V comes next
    uint32_t ahead;  // valid keys of that piece in the steps under way, a byte each, oldest lowest
    int32_t next;    // entry of that piece in the step whose K comes next

    __device__ KeyStream(const Plan &plan, const Work &work, uint32_t rings)
        : plan(plan), work(work), rings(rings), step(threadIdx.x / GROUP_THREADS), first(0),
          ahead(0)
    {
        next = entry();
    }

    /* A step of the group is left to compute, with one step's K on its way. */
    __device__ bool more() const { return __any_sync(ALL, step < work.steps + GROUPS); }

    __device__ int32_t entry() const
    {
        const uint32_t piece = tid_x() & (1u << plan.pieces_log2) - 1;
        const uint32_t at = (step << plan.pieces_log2 >> plan.steps_log2) + piece;
        if (at >= work.entries) return -1;
        return work.list ? __ldg(work.list + at) : int32_t(at);
    }

    /* K of the next step to byte `to` of the ring; it will be computed `lead` steps from now. */
    __device__ __forceinline__ void copy_k(uint32_t to, uint32_t lead)
    {
        const uint32_t frame = uint32_t(uint64_t(uint32_t(next)) * plan.magic >> plan.shift);
        const uint32_t within = (uint32_t(next) - frame * plan.frame_blocks) * plan.block_keys +
                                (step & (1u << plan.steps_log2) - 1) * STEP;
        const bool some = uint32_t(next) < plan.blocks && within < plan.frame_tokens;
        first = some ? frame * plan.frame_tokens + within : 0;
        const uint32_t valid = some ? min(plan.frame_tokens - within, 1u << plan.piece_log2) : 0;
        ahead |= valid << 8 * lead;
        copy(to, work.k, plan.k_token, plan.k_pass, valid);
        cp_async_commit_group();
        step += GROUPS;
        next = entry();
    }

    /* V of the step whose K was copied last, which will be computed `lead` steps from now. */
    __device__ __forceinline__ void copy_v(uint32_t to, uint32_t lead)
    {
        copy(to, work.v, plan.v_token, plan.v_pass, ahead >> 8 * lead & 0xff);
        cp_async_commit_group();
    }

    __device__ __forceinline__ void copy(uint32_t to, const char *rows, int64_t token_bytes,
                                         int64_t pass_bytes, uint32_t valid)
    {
        const uint32_t thread = tid_x() % GROUP_THREADS, unit = thread % UNITS;
        const uint32_t mine = thread / UNITS;
        to += rings + tid_x() / GROUP_THREADS * plan.ring_bytes + Tile<DIM>::at(mine, unit);
        // Added to the pointer or to the offset, whichever spares the compiler its 256th register.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
        const uint32_t within = unit * 16;
#else
        constexpr uint32_t within = 0;
        rows += unit * 16;
#endif
        if (__all_sync(ALL, valid == STEP)) {
            const char *from = rows + ((first + mine) * token_bytes + within);
#pragma unroll
            for (uint32_t i = 0; i < PASSES; i++) {
                cp_async_16(to + i * (PASS_ROWS * Tile<DIM>::ROW_BYTES), from);
                from += pass_bytes;
            }
            return;
        }
        // Rows that are no key become zeros: finite, whatever lies there. Not unrolled: the loop's
        // constants would be kept in registers throughout.
#pragma unroll 1
        for (uint32_t i = 0; i < PASSES; i++) {
            const uint32_t key = mine + i * PASS_ROWS, piece = key >> plan.piece_log2;
            const uint32_t in_piece = key & (1u << plan.piece_log2) - 1;
            const int64_t from = __shfl_sync(ALL, first, piece) + in_piece;
            const bool inside = in_piece < __shfl_sync(ALL, valid, piece);
            cp_async_16_zfill(to + i * (PASS_ROWS * Tile<DIM>::ROW_BYTES),
                              rows + (inside ? from * token_bytes + within : 0), inside ? 16 : 0);
        }
    }

    /* The oldest tile under way has arrived, for the whole group, and the tile used last is free.
     * Past the end tiles of zeros are copied, so the number to wait for is constant. */
    __device__ __forceinline__ void wait() const
    {
        cp_async_wait_group<0>();
        sync_group();
    }

    /* As many barriers as the group with one step more has passed, while that one computes it:
     * racecheck counts a thread's barriers, whichever they are, and took what the two groups hand
     * each other across a later barrier of the whole block for a hazard. */
    __device__ __forceinline__ void catch_up() const
    {
        const uint32_t last = work.steps % GROUPS;
        if (last == 0 || tid_x() / GROUP_THREADS < last) return;
        sync_group();
        sync_group();
    }
};

}  // namespace lf::portable
