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
 * The last wave: the tiles that do not fill the grid are cut along their lists into equal pieces,
 * one a CTA. The CTA with a tile's first steps merges the others' float32 sums, in list order. It
 * waits for CTAs of lower index only, which started before it and had their pieces first, so it
 * cannot wait for one that has no SM yet. No second launch; bit-stable.
 *
 * Limits (H100, short burst): the loop runs at 671 TFLOP/s, 0.82 us a key block of a tile; at that
 * rate L2 serves 64 KB a step to every SM, 5.2 TB/s. benchmarks/results/LOG.md has the fit. */
#include "attend_sm90_rows.cuh"
#include "kernels.h"
#include <atomic>
#include <random>
#include <cudaTypedefs.h>

namespace {

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
        finish_empty<T>(p, item, group);
        bar_sync(3 + group, 128);  // all have read the item
        if (lead) mbarrier_arrive(&s.q_empty[i & 1]);
    }
}

__device__ __forceinline__ void my_turn(int group) { bar_sync(1 + group, CONSUMERS); }
__device__ __forceinline__ void your_turn(int group) { bar_arrive(2 - group, CONSUMERS); }

template <typename T> __device__ __forceinline__ void consume(Shared &s, const Params &p, int group)
{
    const bool lead = threadIdx.x % 128 == 0;
    float logits[64], o[64], alpha[2];
    uint32_t pr[32];
    RowState state;
    Ring ring;
    int i = 0;

    const auto q_rows = [&]() {
        return rows_descriptor(smem_address(s.q[i & 1]) + group * 2 * BOX);
    };
    Item item = take_item<T>(s, p, i, group, lead);
    if (group == 1) your_turn(1);  // the first warpgroup begins

    if (item.steps > 0) {
        // The first step of the stream has no PV before it.
        int stage = ring.stage();
        mbarrier_wait(&s.k_full[stage], ring.parity());
        uint32_t valid = s.valid[stage];
        my_turn(group);
        issue_qk<T>(logits, q_rows(), k_tile(s, stage));
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
                issue_qk<T>(logits, q_rows(), k_tile(s, stage));
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
            if (next.steps < 0) {
                mbarrier_wait(&s.v_full[before], before_parity);
                issue_pv<T>(o, pr, v_tile(s, before), item.steps > 1);
                wgmma_wait_group<0>();
                if (lead) mbarrier_arrive(&s.v_empty[before]);
                finish<T>(p, o, state, item, group);
                break;
            }
            // The next tile's first step over this tile's last PV.
            stage = ring.stage();
            mbarrier_wait(&s.k_full[stage], ring.parity());
            valid = s.valid[stage];
            my_turn(group);
            issue_qk<T>(logits, q_rows(), k_tile(s, stage));
            mbarrier_wait(&s.v_full[before], before_parity);
            issue_pv<T>(o, pr, v_tile(s, before), item.steps > 1);
            your_turn(group);
            wgmma_wait_group<1>();
            if (lead) mbarrier_arrive(&s.k_empty[stage]);
            RowState done = state;
            reset(state);
            if (valid != ALL_VALID) mask(logits, valid);
            softmax(logits, state, alpha, p.scale_log2);
            wgmma_wait_group<0>();
            if (lead) mbarrier_arrive(&s.v_empty[before]);
            pack<T>(logits, pr);
            finish<T>(p, o, done, item, group);
            item = next;
        }
    }
    if (group == 0) my_turn(0);  // takes the arrival that the last step left behind
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
        setmaxnreg_dec<56>();
        if (threadIdx.x < 32) {
            if (threadIdx.x == 0) {
                prefetch_tensormap(&q);
                prefetch_tensormap(&k);
                prefetch_tensormap(&v);
            }
            grid_dependency_wait();
            grid_launch_dependents();
            produce(s, p, {&q, &k, &v});
        }
    } else {
        setmaxnreg_inc<224>();
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

/* Whole tiles for the full waves, equal pieces of at least MIN_PIECE steps for the rest. */
void plan(Params *a, const lf_attend_params *p, int grid)
{
    constexpr int64_t MIN_PIECE = 3;  // a piece costs its CTA about two steps more

    if (grid < 1) return;
    const int64_t blocks = p->indices ? p->max_count : lf_ceil_div(p->k_len, HALF);
    a->list_steps = int(lf_ceil_div(blocks < 1 ? 1 : blocks, 2));
    a->whole_waves = a->tiles / grid;
    a->rest = a->tiles % grid;
    const int64_t most = int64_t(a->rest) * a->list_steps / MIN_PIECE;
    a->cutters = a->rest == 0 ? 0 : int(most < a->rest ? a->rest : most < grid ? most : grid);
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
    static std::atomic<uint64_t> prepared{0};  // a bit for each device
    int device = 0;
    LF_CUDA_TRY(cudaGetDevice(&device));
    if (device < 64 && (prepared.load() >> device & 1)) return 0;
    const lf_dtype dtypes[] = {LF_BF16, LF_F16};
    for (const lf_dtype dtype : dtypes)
        LF_CUDA_TRY(cudaFuncSetAttribute(reinterpret_cast<const void *>(pick(dtype)),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         SHARED_BYTES));
    (void)encoder();
    if (device < 64) prepared.fetch_or(uint64_t(1) << device);
    return 0;
}

extern "C" int64_t lf_attend_sm90_workspace(const lf_attend_params *p, int device)
{
    Params a = {};
    a.tiles = int(p->batch * p->heads * lf_ceil_div(p->q_len, TILE));
    plan(&a, p, multiprocessors(device));
    return int64_t(a.cutters) * (SUMS * sizeof(float) + 2 * sizeof(uint64_t));
}

extern "C" int lf_attend_sm90(const lf_attend_params *p, void *workspace, lf_place place,
                              lf_error *err)
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

    if (lf_attend_sm90_warmup(err) < 0) return -1;
    const int grid = multiprocessors(place.device);
    if (grid == 0) return lf_fail(err, LF_CUDA, "device %d: no multiprocessor found", place.device);
    plan(&a, p, grid);
    if (a.cutters > 0) {
        a.sums = static_cast<float *>(workspace);
        a.handed = reinterpret_cast<uint64_t *>(a.sums + int64_t(a.cutters) * SUMS);
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
    config.dynamicSmemBytes = SHARED_BYTES;
    config.stream = static_cast<cudaStream_t>(place.stream);
    config.attrs = &overlap;
    config.numAttrs = 1;
    LF_CUDA_TRY(cudaLaunchKernelEx(&config, pick(p->dtype), q, k, v, a));
    return 0;
}
