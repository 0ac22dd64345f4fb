/* Block-sparse and dense attention on Hopper: wgmma, TMA, mbarrier, setmaxnreg.
 *
 * A tile is the query rows of one (batch, head) that share a list, 128 or 64; a step is two
 * gathered 64-key blocks side by side, so that the products are 64 x 128 x D for a warpgroup. Two
 * consumer warpgroups share a tile of 128 rows, or have a tile, a ring and a producer warp of 64
 * rows each. The grid is one CTA an SM, persistent.
 *
 *   producer            K of step j + 1 before V of step j, in one ring, as they are used
 *   consumer, step j:   QK(j) issued | PV(j-1) issued | maxima | wait PV | P(j) = exp2, packed
 *   the two warpgroups: on one list their issue slots alternate (named barriers 1 and 2), so one's
 *                       exponentials lie under the other's products
 *   between tiles:      the stream goes on: QK of the next tile's first step is issued before
 *                       the last PV of this one, whose O is written while P is packed
 *
 * A warpgroup's own chain is the limit, not the tensor cores (75 %): issuing holds its warps until
 * the products before are done (QK and PV 1024 clocks of 2740 a step), then come comparisons, 64
 * exponentials (512 clocks at best, 1000 beside the other warpgroup) and two hand-overs. So P is
 * packed between the exponentials, and nothing but the comparisons comes before them.
 *
 * The last wave: the tiles that do not fill the grid are cut along their lists into equal pieces,
 * one for each list of a CTA. The one with a tile's first steps merges the others' float32 sums, in
 * list order. It waits for CTAs of lower index only (or its own), which started before it and had
 * their pieces first, so it cannot wait for one that has no SM yet. No second launch; bit-stable.
 *
 * Limits (H100, short burst): 0.75 us a key block of a 128-row tile, 740 TFLOP/s, where L2 serves
 * 64 KB a step to every SM, 5.8 TB/s; sparse lists wait for it. benchmarks/results/LOG.md has the
 * climbs. */
#include "attend_sm90_rows.cuh"
#include "kernels.h"
#include <atomic>
#include <random>
#include <cudaTypedefs.h>

namespace {

/* Takes the i-th item, writing out the empty ones before it. What a producer hands over is read by
 * lane 0 of every warp alone, which also gives it back: so each reader signals for itself. */
template <typename T, class S>
__device__ __forceinline__ Item take_item(Feed<S> &f, const Params &p, int &i, int group, bool lead)
{
    for (;; i++) {
        const int buffer = i % S::Q_BUFFERS;
        mbarrier_wait(&f.q_full[buffer], i / S::Q_BUFFERS & 1);
        Item item = {};
        if (lead) item = f.item[buffer];
        item.steps = __shfl_sync(~0u, item.steps, 0);
        item.tile = __shfl_sync(~0u, item.tile, 0);
        item.pieces = __shfl_sync(~0u, item.pieces, 0);
        if (item.steps != 0) return item;
        finish_empty<T, S>(p, item, group);
        if (lead) mbarrier_arrive(&f.q_empty[buffer]);
    }
}

/* Two warpgroups that share a list take turns; with a list each they have no common pace. */
template <class S> __device__ __forceinline__ void my_turn(int group)
{
    if constexpr (S::GROUPS == 2) bar_sync(1 + group, CONSUMERS);
}

template <class S> __device__ __forceinline__ void your_turn(int group)
{
    if constexpr (S::GROUPS == 2) bar_arrive(2 - group, CONSUMERS);
}

template <typename T, class S>
__device__ __forceinline__ void consume(Feed<S> &f, const Params &p, int group)
{
    const bool lead = threadIdx.x % 32 == 0;
    float logits[64], o[S::DIM / 2], alpha[2];
    uint32_t pr[32];
    RowState state;
    Cursor<S> k = {FIRST_K}, v = {FIRST_V};
    uint32_t valid;
    int i = 0;

    const auto issue_logits = [&]() {
        const uint8_t *rows = f.q[i % S::Q_BUFFERS][group % S::GROUPS];
        mbarrier_wait(&f.full[k.slot], k.parity);
        valid = __shfl_sync(~0u, lead ? f.valid[k.slot] : 0, 0);
        my_turn<S>(group);
        issue_qk<T, S>(logits, rows_descriptor(smem_address(rows)),
                       rows_descriptor(smem_address(f.ring[k.slot])));
    };
    const auto issue_sums = [&](bool accumulate) {
        mbarrier_wait(&f.full[v.slot], v.parity);
        issue_pv<T>(o, pr, v_descriptor(smem_address(f.ring[v.slot])), accumulate);
    };
    // K is free, and with an item's last step Q.
    const auto release_k = [&](bool last) {
        if (lead) {
            mbarrier_arrive(&f.empty[k.slot]);
            if (last) mbarrier_arrive(&f.q_empty[i % S::Q_BUFFERS]);
        }
    };
    const auto release_v = [&]() {
        if (lead) mbarrier_arrive(&f.empty[v.slot]);
        v.advance(2);
    };
    const auto raise = [&]() {
        if (valid != ALL_VALID) mask(logits, valid);
        return raise_max(logits, state, alpha, p);
    };

    Item item = take_item<T>(f, p, i, group, lead);
    if (group == 1) your_turn<S>(1);  // the first warpgroup begins

    if (item.steps > 0) {
        // The first step of all has no PV before it.
        issue_logits();
        your_turn<S>(group);
        wgmma_wait_group<0>();
        release_k(item.steps == 1);
        k.advance(1);
        reset(state);
        raise();
        weigh<T>(logits, state, pr, p.scale_log2);

        for (;;) {
            for (int j = 1; j < item.steps; j++) {
                issue_logits();
                issue_sums(j > 1);
                your_turn<S>(group);
                wgmma_wait_group<1>();
                release_k(j == item.steps - 1);
                k.advance(2);
                const bool raised = raise();
                wgmma_wait_group<0>();
                release_v();
                if (raised) rescale(o, alpha);
                weigh<T>(logits, state, pr, p.scale_log2);
            }
            i++;
            const Item next = take_item<T>(f, p, i, group, lead);
            if (next.steps < 0) {
                issue_sums(item.steps > 1);
                wgmma_wait_group<0>();
                release_v();
                finish<T, S>(p, o, state, item, group);
                break;
            }
            // The next tile's first step over this tile's last PV.
            issue_logits();
            issue_sums(item.steps > 1);
            your_turn<S>(group);
            wgmma_wait_group<1>();
            release_k(next.steps == 1);
            k.advance(2);
            RowState done = state;
            reset(state);
            raise();
            wgmma_wait_group<0>();
            release_v();
            weigh<T>(logits, state, pr, p.scale_log2);
            finish<T, S>(p, o, done, item, group);
            item = next;
        }
    }
    if (group == 0) my_turn<S>(0);  // takes the arrival that the last step left behind
}

template <typename T, class S>
__global__ void __launch_bounds__(384, 1)
    attend_sm90_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                       const __grid_constant__ CUtensorMap v, const Params p)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ uint8_t raw[];
    Shared<S> &s = *reinterpret_cast<Shared<S> *>((reinterpret_cast<uintptr_t>(raw) + 1023) &
                                                  ~uintptr_t(1023));
    // From lane 0 of the warp, so that the compiler knows it to be uniform.
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);

    static_assert(SHARED_BYTES<S> <= 232448, "one CTA has 227 KB of shared memory");
    if (threadIdx.x < S::LISTS) {
        Feed<S> &f = s.feed[threadIdx.x];
        for (int i = 0; i < S::Q_BUFFERS; i++) {
            mbarrier_init(&f.q_full[i], 1);
            mbarrier_init(&f.q_empty[i], 4 * S::GROUPS);
        }
        for (int i = 0; i < S::SLOTS; i++) {
            mbarrier_init(&f.full[i], 1);
            mbarrier_init(&f.empty[i], 4 * S::GROUPS);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (group == 0) {
        setmaxnreg_dec<56>();
        const int list = __shfl_sync(~0u, threadIdx.x / 32, 0);
        if (list < S::LISTS) {
            if (threadIdx.x == 0) {
                prefetch_tensormap(&q);
                prefetch_tensormap(&k);
                prefetch_tensormap(&v);
            }
            grid_dependency_wait();
            grid_launch_dependents();
            produce(s.feed[list], p, {&q, &k, &v}, list);
        }
    } else {
        setmaxnreg_inc<224>();
        consume<T>(s.feed[(group - 1) / S::GROUPS], p, group - 1);
    }
#endif
}

// ---- host ---------------------------------------------------------------------------------------

using kernel_fn = void (*)(CUtensorMap, CUtensorMap, CUtensorMap, Params);

/* A kernel, and what its shape asks of the launch. */
struct Kernel {
    kernel_fn launch;
    int shared_bytes;
    int rows, lists;      // query rows of a list, lists of a CTA
    int64_t piece_bytes;  // of workspace
};

template <typename T, int DIM, int ROWS> Kernel describe()
{
    using S = Shape<DIM, ROWS>;
    return {attend_sm90_kernel<T, S>, SHARED_BYTES<S>, ROWS, S::LISTS,
            int64_t(S::GROUPS * (SUMS<S> * sizeof(float) + sizeof(uint64_t)))};
}

template <typename T> Kernel pick(int64_t dim, int64_t rows)
{
    if (dim == 64) return rows == 64 ? describe<T, 64, 64>() : describe<T, 64, 128>();
    return rows == 64 ? describe<T, 128, 64>() : describe<T, 128, 128>();
}

Kernel pick(const lf_attend_params *p)
{
    const int64_t rows = p->indices ? p->block_q : 128;
    return p->dtype == LF_BF16 ? pick<__nv_bfloat16>(p->dim, rows) : pick<__half>(p->dim, rows);
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
    const cuuint64_t sizes[4] = {cuuint64_t(p->dim), cuuint64_t(p->heads), cuuint64_t(tokens),
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

/* Whole tiles for the full waves of lists, equal pieces of at least MIN_PIECE steps for the rest.
 */
void plan(Params *a, const lf_attend_params *p, const Kernel &kernel, int grid)
{
    constexpr int64_t MIN_PIECE = 3;  // a piece costs its CTA about two steps more

    const int lists = grid * kernel.lists;
    if (lists < 1) return;
    const int64_t blocks = p->indices ? p->max_count : lf_ceil_div(p->k_len, HALF);
    a->list_steps = int(lf_ceil_div(blocks < 1 ? 1 : blocks, 2));
    a->whole_waves = a->tiles / lists;
    a->rest = a->tiles % lists;
    const int64_t most = int64_t(a->rest) * a->list_steps / MIN_PIECE;
    a->cutters = a->rest == 0 ? 0 : int(most < a->rest ? a->rest : most < lists ? most : lists);
}

/* A number that no earlier launch used and that memory does not hold by chance. */
uint64_t next_ticket()
{
    static std::atomic<uint64_t> count{uint64_t(std::random_device{}()) << 32 | 1u};
    return count.fetch_add(1) * 0x9e3779b97f4a7c15u;
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
    if (p->dtype != LF_BF16 && p->dtype != LF_F16) return no("bfloat16 and float16");
    if (p->dim != 64 && p->dim != 128) return no("head sizes 64 and 128");
    if (p->indices && ((p->block_q != 64 && p->block_q != 128) || p->block_k != HALF))
        return no("query blocks of 64 or 128 rows with key blocks of 64 tokens");
    if (!fits_tma(p->q) || !fits_tma(p->k) || !fits_tma(p->v))
        return no("q, k and v with strides and addresses in units of 16 bytes");
    if (p->out.token % 4 || p->out.head % 4 || p->out.batch % 4 ||
        reinterpret_cast<uintptr_t>(p->out.data) % 16 || p->out.token % 8)
        return no("out with strides and addresses in units of 16 bytes");
    if (p->k_len >= INT32_MAX / 2 || p->q_len >= INT32_MAX / 2 ||
        p->batch * p->heads * lf_ceil_div(p->q_len, HALF) >= INT32_MAX / 4)
        return no("fewer than 2^29 tiles and 2^30 tokens");
    if (!encoder()) return no("a driver with tensor maps (CUDA 12)");
    return 1;
}

extern "C" int lf_attend_sm90_warmup(lf_error *err)
{
    static std::atomic<uint64_t> prepared{0};  // a bit for each device
    int device = 0;
    LF_CUDA_TRY(cudaGetDevice(&device));
    if (device < 64 && (prepared.load() >> device & 1)) return 0;
    for (const int dim : {64, 128})
        for (const int rows : {64, 128})
            for (const Kernel &kernel : {pick<__nv_bfloat16>(dim, rows), pick<__half>(dim, rows)})
                LF_CUDA_TRY(cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel.launch),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 kernel.shared_bytes));
    (void)encoder();
    if (device < 64) prepared.fetch_or(uint64_t(1) << device);
    return 0;
}

extern "C" int64_t lf_attend_sm90_workspace(const lf_attend_params *p, int device)
{
    Params a = {};
    const Kernel kernel = pick(p);
    a.tiles = int(p->batch * p->heads * lf_ceil_div(p->q_len, kernel.rows));
    plan(&a, p, kernel, multiprocessors(device));
    return a.cutters * kernel.piece_bytes;
}

extern "C" int lf_attend_sm90(const lf_attend_params *p, void *workspace, lf_place place,
                              lf_error *err)
{
    const lf::DeviceGuard guard(place.device);
    CUtensorMap q, k, v;
    const Kernel kernel = pick(p);
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
    a.q_tiles = int(lf_ceil_div(p->q_len, kernel.rows));
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
    a.slack = fminf(SLACK / a.scale_log2, 1e30f);  // max + slack stays finite
    if (a.tiles == 0) return 0;

    if (lf_attend_sm90_warmup(err) < 0) return -1;
    const int grid = multiprocessors(place.device);
    if (grid == 0) return lf_fail(err, LF_CUDA, "device %d: no multiprocessor found", place.device);
    plan(&a, p, kernel, grid);
    if (a.cutters > 0) {
        a.sums = static_cast<float *>(workspace);
        a.handed = reinterpret_cast<uint64_t *>(static_cast<char *>(workspace) +
                                                a.cutters * kernel.piece_bytes) -
                   a.cutters * (2 / kernel.lists);
        a.ticket = next_ticket();
    }
    if (encode(&q, p->q, p, p->q_len, err) < 0 || encode(&k, p->k, p, p->k_len, err) < 0 ||
        encode(&v, p->v, p, p->k_len, err) < 0)
        return -1;
    // The kernel before may let this one start early: it reads nothing before that one's end.
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(grid));
    config.blockDim = dim3(384);
    config.dynamicSmemBytes = size_t(kernel.shared_bytes);
    config.stream = static_cast<cudaStream_t>(place.stream);
    config.attrs = &overlap;
    config.numAttrs = 1;
    LF_CUDA_TRY(cudaLaunchKernelEx(&config, kernel.launch, q, k, v, a));
    return 0;
}
