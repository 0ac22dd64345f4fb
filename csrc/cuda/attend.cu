/* Block-sparse and dense attention on any chip since sm_80: mma.sync, ldmatrix, cp.async.
 *
 * A block takes the 128 (or 64) query rows of one list and walks the kept keys in steps of 64. Its
 * eight warps are two groups of four; group g takes steps g, g + 2, ... with copies, barrier and
 * online softmax of its own, so that one group's exponentials lie under the other's products:
 *
 *   group 0   | q k  | softmax | p v  | q k  | softmax | p v  |            \
 *   group 1        | q k  | softmax | p v  | q k  | softmax | p v  |  ----- merge, store
 *   copies      k v k v k v ...  each group's K and V tile in turn
 *
 * In a group of 128 rows each warp has 32 rows and all 64 keys of a step; of 64 rows, 32 rows and
 * 32 keys. 32 rows a warp because a fragment read from shared memory must serve two products: with
 * 16 the reads (2 clocks a product) would bound Hopper and Ampere. In the end the parts of a row
 * are merged pairwise, each warp passing on half of its columns, always in the same order.
 *
 *   grid    one block a list row; those past the last whole round over the SMs come as two halves
 *           of 64 rows, if that saves half a round
 *   shared  Q, a K and a V tile for each group: 96 KB (D = 128). A ring of two each, 160 KB, was
 *           no faster: 0.319 against 0.311 ms at 10 % of chunk 7 (H100)
 *   limits  255 registers (no second block an SM); shared memory reads, then the tensor cores */
#include "attend_rows.cuh"
#include "kernels.h"
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace {

using namespace lf;
using namespace lf::portable;

// ---- a block ------------------------------------------------------------------------------

/* The item's rows, at most 32 * ROW_WARPS: warps of a group by rows, then by keys of a step. */
template <typename T, int DIM, int ROW_WARPS>
__device__ __forceinline__ void attend_rows(const lf_attend_params &p, const Plan &plan,
                                            const Work &work, uint8_t *smem)
{
    constexpr uint32_t ROW_BYTES = Tile<DIM>::ROW_BYTES, UNITS = Tile<DIM>::UNITS;
    constexpr uint32_t Q_BYTES = TILE_ROWS * ROW_BYTES, TILE_BYTES = STEP * ROW_BYTES;
    constexpr int KEYS = 16 * ROW_WARPS;  // of a step, for one warp
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t group = warp / GROUP_WARPS;
    const uint32_t row_warp = warp % ROW_WARPS, part = warp % GROUP_WARPS / ROW_WARPS;
    const uint32_t q_smem = smem_address(smem);

    // Q, all threads; rows past the end become zeros
    const char *q = static_cast<const char *>(p.q.data) +
                    2 * (work.batch * p.q.batch + work.head * p.q.head) +
                    work.first * plan.q_token + threadIdx.x % UNITS * 16;
#pragma unroll
    for (uint32_t i = 0; i < WARP_ROWS * ROW_WARPS / (THREADS / UNITS); i++) {
        const uint32_t at = threadIdx.x / UNITS + i * (THREADS / UNITS);
        const bool inside = at < work.count;
        cp_async_16_zfill(q_smem + Tile<DIM>::at(at, threadIdx.x % UNITS),
                          q + (inside ? at * plan.q_token : 0), inside ? 16 : 0);
    }
    cp_async_commit_group();
    KeyStream<DIM> keys(plan, work, q_smem + Q_BYTES);
    keys.copy_k(0, 0);
    cp_async_wait_group<1>();
    __syncthreads();  // Q has arrived

    const uint32_t q_at = q_smem + row_warp * (WARP_ROWS * ROW_BYTES) + Tile<DIM>::rows_first(lane);
    const uint32_t ring = q_smem + Q_BYTES + group * plan.ring_bytes;
    const uint32_t k_at = ring + part * (KEYS * ROW_BYTES) + Tile<DIM>::columns_first(lane);
    const uint32_t v_at =
        ring + TILE_BYTES + part * (KEYS * ROW_BYTES) + Tile<DIM>::rows_first(lane);
    WarpRows<DIM> rows;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < DIM / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) rows.out[m][n][i] = 0.0f;
        rows.top[m][0] = rows.top[m][1] = -FLT_MAX;
        rows.sum[m][0] = rows.sum[m][1] = 0.0f;
    }

#pragma unroll 1
    while (keys.more()) {
        // logits of 32 rows x KEYS keys
        float s[2][KEYS / 8][4] = {};
        keys.wait();
        keys.copy_v(TILE_BYTES, 0);
#pragma unroll
        for (uint32_t i = 0; i < DIM / 16; i++) {
            uint32_t a[2][4];
            ldmatrix_x4(a[0], Tile<DIM>::column(q_at, i));
            ldmatrix_x4(a[1], Tile<DIM>::column(q_at, i) + 16 * ROW_BYTES);
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                uint32_t b[4];
                ldmatrix_x4(b, Tile<DIM>::column(k_at, i) + n * (16 * ROW_BYTES));
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    mma_m16n8k16<T>(s[m][2 * n], a[m], b[0], b[1]);
                    mma_m16n8k16<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
        const uint32_t valid = keys.ahead & 0xff;
        keys.wait();
        keys.copy_k(0, 1);
        keys.ahead >>= 8;

        // new maxima
        float top[2][2];
        bool masked = __any_sync(ALL, valid != 1u << plan.piece_log2), clamped = false;
        while (true) {
            if (masked) mask(s, part * KEYS, plan.piece_log2, valid, clamped ? FLT_MAX : INFINITY);
            row_tops(s, top);
            if (clamped || !any_infinite(top)) break;
            masked = clamped = true;  // once more: an overflow, or a row without keys
        }
        bool higher = false;
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) higher |= top[m][half] > rows.top[m][half];
        if (__any_sync(ALL, higher)) {
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float raised = fmaxf(top[m][half], rows.top[m][half]);
                    const float factor =
                        ex2_approx_ftz((rows.top[m][half] - raised) * plan.scale_log2);
                    rows.top[m][half] = raised;
                    rows.sum[m][half] *= factor;
#pragma unroll
                    for (int n = 0; n < DIM / 8; n++) {
                        rows.out[m][n][2 * half] *= factor;
                        rows.out[m][n][2 * half + 1] *= factor;
                    }
                }
            }
        }

        // weights of 16 keys at a time; those of the next 16 between the products of these
        uint32_t weights[2][2][4];  // [turn][half of the rows]
        const auto weigh = [&](int turn, int quarter) {
            const int m = quarter / 2, n = 2 * turn + quarter % 2;
            float w[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                w[i] = ex2_approx_ftz(
                    fmaf(s[m][n][i] - rows.top[m][i / 2], plan.scale_log2, -WEIGHT_SHIFT<T>));
            rows.sum[m][0] += w[0] + w[1];
            rows.sum[m][1] += w[2] + w[3];
            weights[turn % 2][m][quarter % 2 * 2] = pack2<T>(w[0], w[1]);
            weights[turn % 2][m][quarter % 2 * 2 + 1] = pack2<T>(w[2], w[3]);
        };
#pragma unroll
        for (int quarter = 0; quarter < 4; quarter++) weigh(0, quarter);
#pragma unroll
        for (int turn = 0; turn < KEYS / 16; turn++) {
#pragma unroll
            for (uint32_t n = 0; n < DIM / 16; n++) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, Tile<DIM>::column(v_at, n) + turn * (16 * ROW_BYTES));
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    mma_m16n8k16<T>(rows.out[m][2 * n], weights[turn % 2][m], b[0], b[1]);
                    mma_m16n8k16<T>(rows.out[m][2 * n + 1], weights[turn % 2][m], b[2], b[3]);
                }
                if (turn + 1 < KEYS / 16 && n % (DIM / 64) == 0) weigh(turn + 1, n / (DIM / 64));
            }
        }
    }

    // sums over the four lanes of a row, then over the parts
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            rows.sum[m][half] += __shfl_xor_sync(ALL, rows.sum[m][half], 1);
            rows.sum[m][half] += __shfl_xor_sync(ALL, rows.sum[m][half], 2);
        }
    }
    float4 *boxes = reinterpret_cast<float4 *>(smem + Q_BYTES);
    RowStats *stats = reinterpret_cast<RowStats *>(smem + Q_BYTES + GROUPS * plan.ring_bytes);
    constexpr int TILES = DIM / 8 / (2 * GROUP_WARPS / ROW_WARPS);  // of columns, in the end
    uint32_t column = 0;
    cp_async_wait_group<0>();
    keys.catch_up();
    __syncthreads();  // the rings are free
    if constexpr (ROW_WARPS < GROUP_WARPS) {
        merge<DIM, DIM / 8>(rows, plan.scale_log2, boxes, stats, warp ^ ROW_WARPS, part);
        column += part * (DIM / 2);
        __syncthreads();
    }
    merge<DIM, 2 * TILES>(rows, plan.scale_log2, boxes, stats, warp ^ GROUP_WARPS, group);
    column += group * (8 * TILES);

    char *out = static_cast<char *>(p.out.data) +
                2 * (work.batch * p.out.batch + work.head * p.out.head) +
                work.first * plan.out_token;
    store<T, DIM, TILES>(rows, smem, out, plan.out_token, row_warp * WARP_ROWS, column, work.count);
    if (p.lse && column == 0 && lane % 4 == 0) {
        float *lse =
            p.lse + (int64_t(work.batch) * p.heads + work.head) * p.q_len + work.first;  // [count]
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t at = row_warp * WARP_ROWS + m * 16 + half * 8 + lane / 4;
                if (at < work.count)
                    lse[at] = fminf(fmaxf(rows.top[m][half] * p.scale, -FLT_MAX), FLT_MAX) +
                              (logf(rows.sum[m][half]) + WEIGHT_SHIFT<T> * LN_2);
            }
        }
    }
}

template <typename T, int DIM>
__global__ void __launch_bounds__(THREADS, 1)
    attend_kernel(const __grid_constant__ lf_attend_params p, const __grid_constant__ Plan plan)
{
    extern __shared__ __align__(1024) uint8_t smem[];
    Work &work = *reinterpret_cast<Work *>(smem + plan.work_at);
    if (threadIdx.x == 0) work = find_work(p, plan);
    __syncthreads();
    if (work.count > TILE_ROWS / 2)
        attend_rows<T, DIM, 4>(p, plan, work, smem);
    else if (work.count > 0)
        attend_rows<T, DIM, 2>(p, plan, work, smem);
}

// ---- the variants that exist, all on one screen ----------------------------------------------

using kernel_fn = void (*)(lf_attend_params, Plan);

kernel_fn pick(lf_dtype dtype, int64_t dim)
{
    if (dtype == LF_BF16 && dim == 64) return attend_kernel<__nv_bfloat16, 64>;
    if (dtype == LF_BF16 && dim == 128) return attend_kernel<__nv_bfloat16, 128>;
    if (dtype == LF_F16 && dim == 64) return attend_kernel<__half, 64>;
    if (dtype == LF_F16 && dim == 128) return attend_kernel<__half, 128>;
    return nullptr;
}

uint32_t shared_bytes(int64_t dim)
{
    return uint32_t(dim * 2 * (TILE_ROWS + GROUPS * 2 * STEP) +
                    WARPS * WARP_ROWS * sizeof(RowStats) + sizeof(Work));
}

// ---- devices, asked once each -----------------------------------------------------------------

constexpr int MOST_DEVICES = 64;

struct Device {
    std::atomic<bool> ready;
    int sms;  // processors
};
Device devices[MOST_DEVICES];

/* Fills devices[device], the current one. Threads that meet here write the same values. */
int prepare(int device, lf_error *err)
{
    Device &d = devices[device];
    if (d.ready.load(std::memory_order_acquire)) return 0;
    int sms = 0;
    LF_CUDA_TRY(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    for (const lf_dtype dtype : {LF_BF16, LF_F16})
        for (const int64_t dim : {64, 128})
            LF_CUDA_TRY(cudaFuncSetAttribute(
                pick(dtype, dim), cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes(dim)));
    d.sms = sms;
    d.ready.store(true, std::memory_order_release);
    return 0;
}

// ---- what the kernel needs to know ----------------------------------------------------------

/* A sentence about the first tensor that 16-byte copies cannot serve, or 0. */
int check_alignment(const lf_attend_params *p, lf_error *err)
{
    const struct {
        const char *name;
        const lf_tensor *x;
        int64_t length;
    } tensors[] = {{"q", &p->q, p->q_len},
                   {"k", &p->k, p->k_len},
                   {"v", &p->v, p->k_len},
                   {"out", &p->out, p->q_len}};

    for (const auto &t : tensors) {
        const struct {
            const char *name;
            int64_t size, stride;
        } axes[] = {{"batch", p->batch, t.x->batch},
                    {"token", t.length, t.x->token},
                    {"head", p->heads, t.x->head}};
        if (reinterpret_cast<uintptr_t>(t.x->data) % 16)
            return lf_fail(err, LF_UNSUPPORTED,
                           "%s: the CUDA kernels expect data at a multiple of 16 bytes", t.name);
        for (const auto &axis : axes)
            if (axis.size > 1 && axis.stride % 8)
                return lf_fail(err, LF_UNSUPPORTED,
                               "%s: the CUDA kernels expect strides of a multiple of 8 elements, "
                               "got a %s stride of %lld",
                               t.name, axis.name, (long long)axis.stride);
    }
    return 0;
}

int log2_of(int64_t x)
{
    int n = 0;
    while (int64_t(1) << n < x) n++;
    return n;
}

Plan make_plan(const lf_attend_params *p, const Device &device, int64_t *blocks)
{
    Plan plan = {};
    const bool list = p->indices != nullptr;
    const int64_t block_k = list ? p->block_k : STEP;
    const int64_t frame_tokens = list ? p->frame_tokens : p->k_len;

    plan.q_token = 2 * p->q.token;
    plan.k_token = 2 * p->k.token;
    plan.v_token = 2 * p->v.token;
    plan.out_token = 2 * p->out.token;
    plan.k_pass = plan.k_token * (GROUP_THREADS * 8 / p->dim);
    plan.v_pass = plan.v_token * (GROUP_THREADS * 8 / p->dim);
    plan.frame_tokens = uint32_t(frame_tokens);
    plan.block_keys = uint32_t(block_k);
    plan.frame_blocks = uint32_t(lf_frame_blocks(frame_tokens, block_k));
    plan.blocks = uint32_t(p->k_len / frame_tokens * plan.frame_blocks);
    plan.entries = list ? uint32_t(p->max_count) : plan.blocks;
    plan.piece_log2 = uint32_t(log2_of(block_k < STEP ? block_k : STEP));
    plan.pieces_log2 = uint32_t(log2_of(STEP)) - plan.piece_log2;
    plan.steps_log2 = block_k > STEP;
    // Exact for j < 2^31: the error of magic, less than frame_blocks <= 2^k, times j < 2^(31 + k).
    plan.shift = uint32_t(31 + log2_of(plan.frame_blocks));
    plan.magic =
        uint32_t(((uint64_t(1) << plan.shift) + plan.frame_blocks - 1) / plan.frame_blocks);
    plan.scale_log2 = p->scale / LN_2;
    plan.ring_bytes = uint32_t(2 * STEP * p->dim * 2);
    plan.work_at = shared_bytes(p->dim) - uint32_t(sizeof(Work));

    plan.rows_per_item = list ? uint32_t(p->block_q) : p->q_len <= 64 ? 64 : TILE_ROWS;
    plan.row_items = uint32_t(lf_ceil_div(p->q_len, plan.rows_per_item));
    const int64_t items = p->batch * p->heads * plan.row_items;
    const int64_t last_round = items % device.sms;
    const bool halve = plan.rows_per_item > TILE_ROWS / 2 && 2 * last_round <= device.sms;
    plan.whole_items = uint32_t(halve ? items - last_round : items);
    *blocks = halve ? items + last_round : items;
    return plan;
}

// ---- which kernel -------------------------------------------------------------------------------

enum Choice { AUTO, PORTABLE, SM90, UNKNOWN };

Choice choice_named(const char *name)
{
    if (!name || !*name || !strcmp(name, "auto")) return AUTO;
    if (!strcmp(name, "portable")) return PORTABLE;
    return strcmp(name, "sm90") ? UNKNOWN : SM90;
}

/* The choice of every later call; at first what LIGHTFORCING_KERNEL says. */
std::atomic<Choice> &choice()
{
    static std::atomic<Choice> chosen(choice_named(getenv("LIGHTFORCING_KERNEL")));
    return chosen;
}

/* Whether the Hopper kernel takes this call; -1, with `err` filled, if it must and cannot. */
int on_sm90(const lf_attend_params *p, int device, lf_error *err)
{
    lf_error reason;
    switch (choice().load()) {
    case PORTABLE: return 0;
    case SM90: return lf_attend_sm90_can_run(p, device, err) ? 1 : -1;
    case UNKNOWN:
        return lf_fail(err, LF_UNSUPPORTED,
                       "LIGHTFORCING_KERNEL: expected auto, portable or sm90, got %.100s",
                       getenv("LIGHTFORCING_KERNEL"));
    default: return lf_attend_sm90_can_run(p, device, &reason);
    }
}

}  // namespace

extern "C" int lf_cuda_force_kernel(const char *name)
{
    const Choice named = choice_named(name);
    if (named == UNKNOWN) return -1;
    choice().store(named);
    return 0;
}

extern "C" int lf_cuda_portable_only(void) { return choice().load() == PORTABLE; }

extern "C" int lf_attend_portable_warmup(lf_error *err)
{
    int device = 0;
    LF_CUDA_TRY(cudaGetDevice(&device));
    return device < MOST_DEVICES ? prepare(device, err) : 0;
}

extern "C" int lf_attend_portable(const lf_attend_params *p, lf_place place, lf_error *err)
{
    const kernel_fn kernel = pick(p->dtype, p->dim);
    const bool list = p->indices != nullptr;

    if (p->dtype == LF_F32)
        return lf_fail(err, LF_UNSUPPORTED,
                       "block_sparse_attention: on CUDA q, k and v are float16 or bfloat16, got "
                       "float32 (the CPU takes it)");
    if (!kernel)
        return lf_fail(err, LF_UNSUPPORTED,
                       "block_sparse_attention: on CUDA D is 64 or 128, got %lld",
                       (long long)p->dim);
    if (list && (p->block_q < 1 || p->block_q > TILE_ROWS))
        return lf_fail(err, LF_UNSUPPORTED,
                       "block_sparse_attention: on CUDA block_q is at most %u, got %lld", TILE_ROWS,
                       (long long)p->block_q);
    if (list && p->block_k != 16 && p->block_k != 32 && p->block_k != 64 && p->block_k != 128)
        return lf_fail(err, LF_UNSUPPORTED,
                       "block_sparse_attention: on CUDA block_k is 16, 32, 64 or 128, got %lld",
                       (long long)p->block_k);
    if (p->batch == 0 || p->heads == 0 || p->q_len == 0) return 0;
    const int64_t lists = p->batch * p->heads * lf_ceil_div(p->q_len, list ? p->block_q : 64);
    if (p->k_len >> 31 || lists >> 30)
        return lf_fail(err, LF_UNSUPPORTED,
                       "block_sparse_attention: on CUDA Lk is below 2^31 and the number of query "
                       "blocks below 2^30, got %lld and %lld",
                       (long long)p->k_len, (long long)lists);
    if (place.device >= MOST_DEVICES)
        return lf_fail(err, LF_UNSUPPORTED,
                       "block_sparse_attention: the CUDA kernels know devices 0 to %d, got %d",
                       MOST_DEVICES - 1, place.device);
    if (check_alignment(p, err)) return -1;

    const DeviceGuard guard(place.device);
    if (prepare(place.device, err)) return -1;
    int64_t blocks = 0;
    const Plan plan = make_plan(p, devices[place.device], &blocks);
    const auto stream = static_cast<cudaStream_t>(place.stream);
    kernel<<<unsigned(blocks), THREADS, shared_bytes(p->dim), stream>>>(*p, plan);
    LF_CUDA_TRY(cudaGetLastError());
    return 0;
}

extern "C" int64_t lf_attend_cuda_workspace(const lf_attend_params *p, int device)
{
    lf_error reason;
    return on_sm90(p, device, &reason) == 1 ? lf_attend_sm90_workspace(p, device) : 0;
}

extern "C" int lf_attend_cuda(const lf_attend_params *p, void *workspace, lf_place place,
                              lf_error *err)
{
    const int sm90 = on_sm90(p, place.device, err);
    if (sm90 < 0) return -1;
    return sm90 ? lf_attend_sm90(p, workspace, place, err) : lf_attend_portable(p, place, err);
}
