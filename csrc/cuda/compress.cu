/* compress: float32 means of the key blocks of every frame, bit-equal to the CPU's.
 *
 * A warp makes 64 columns of one block: four quarters of the block times 8 lanes of 8 columns. A
 * lane sums the rows of its quarter (means.cuh), lane 0 to 7 the four quarters.
 *
 *   grid    the warps, WARPS a block; the columns of a head fastest, then the heads
 *   shared  none
 *   limits  reading x once */
#include "kernels.h"
#include "means.cuh"

namespace {

using namespace lf;

constexpr int WARPS = 8;
constexpr int COLUMNS = 64;  // of a warp
/* Thread blocks of an SM, 0: as many as there are registers for. Left to itself the compiler gives
 * Blackwell 48 registers a thread and spills. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int RESIDENT = 2;
#else
constexpr int RESIDENT = 0;
#endif

struct Plan {
    uint32_t items, pieces, heads, blocks, frame_blocks;  // warps; of them a head; blocks of (b, h)
    int part;                                             // rows of a quarter block
    bool vectors_in, vectors_out;                         // 16-byte accesses are allowed
};

/* The mean of the first n rows, at most `part`. */
template <typename T>
__device__ __forceinline__ void quarter_mean(const Rows<T> &rows, int part, int n, float (&out)[8])
{
    switch (part) {
    case 1: return mean_rows<T, 1>(rows, n, out);
    case 2: return mean_rows<T, 2>(rows, n, out);
    case 4: return mean_rows<T, 4>(rows, n, out);
    case 8: return mean_rows<T, 8>(rows, n, out);
    case 16: return mean_rows<T, 16>(rows, n, out);
    default: return mean_rows<T, 32>(rows, n, out);
    }
}

template <typename T>
__global__ void __launch_bounds__(32 * WARPS, RESIDENT)
    compress_kernel(const __grid_constant__ lf_compress_params p, const __grid_constant__ Plan plan)
{
    const uint32_t item = blockIdx.x * WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32, quarter = lane / 8;
    if (item >= plan.items) return;  // whole warps leave together

    const int64_t column = item % plan.pieces * COLUMNS + lane % 8 * 8;
    const int64_t head = item / plan.pieces % plan.heads;
    const uint32_t rest = item / plan.pieces / plan.heads;
    const int64_t block = rest % plan.blocks, batch = rest / plan.blocks;
    const int64_t within = block % plan.frame_blocks * p.block;
    const int tokens = int(min(p.block, p.frame_tokens - within));

    // the mean of a quarter, weighed
    const int64_t from = block / plan.frame_blocks * p.frame_tokens + within + quarter * plan.part;
    const int n = column < p.dim ? min(max(tokens - quarter * plan.part, 0), plan.part) : 0;
    const Rows<T> rows = {static_cast<const T *>(p.x.data) + batch * p.x.batch + from * p.x.token +
                              head * p.x.head + column,
                          p.x.token, plan.vectors_in};
    float mean[8];
    quarter_mean<T>(rows, plan.part, n, mean);

    // their sum, in ascending order; a quarter without rows adds nothing
    float sum[8];
    clear(sum);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int source = i * 8 + lane % 8;
        const float weight = float(__shfl_sync(0xffffffffu, n, source));
        float theirs[8];
#pragma unroll
        for (int d = 0; d < 8; d++) theirs[d] = __shfl_sync(0xffffffffu, mean[d], source);
        if (weight > 0.0f) add_scaled(sum, weight, theirs);
    }
    if (quarter > 0 || column >= p.dim) return;
#pragma unroll
    for (int d = 0; d < 8; d++) sum[d] = __fdiv_rn(sum[d], float(tokens));

    float *out = static_cast<float *>(p.out.data) + batch * p.out.batch + block * p.out.token +
                 head * p.out.head + column;
    if (plan.vectors_out) {
        reinterpret_cast<float4 *>(out)[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        reinterpret_cast<float4 *>(out)[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    } else {
#pragma unroll
        for (int d = 0; d < 8; d++) out[d] = sum[d];
    }
}

// ---- the variants that exist ---------------------------------------------------------------

using kernel_fn = void (*)(lf_compress_params, Plan);

kernel_fn pick(lf_dtype dtype)
{
    switch (dtype) {
    case LF_F32: return compress_kernel<float>;
    case LF_F16: return compress_kernel<__half>;
    case LF_BF16: return compress_kernel<__nv_bfloat16>;
    default: return nullptr;
    }
}

bool in_sixteens(const lf_tensor &x, int64_t element_bytes)
{
    const int64_t strides = x.batch | x.token | x.head;
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && strides * element_bytes % 16 == 0 &&
           x.token < MOST_STRIDE;
}

}  // namespace

extern "C" int lf_compress_warmup(lf_error *err)
{
    cudaFuncAttributes attributes;
    for (const lf_dtype dtype : {LF_F32, LF_F16, LF_BF16})
        LF_CUDA_TRY(cudaFuncGetAttributes(&attributes, pick(dtype)));
    return 0;
}

extern "C" int lf_compress_cuda(const lf_compress_params *p, lf_place place, lf_error *err)
{
    const kernel_fn kernel = pick(p->dtype);
    const int64_t per_frame = lf_frame_blocks(p->frame_tokens, p->block);
    const int64_t pieces = lf_ceil_div(p->dim, COLUMNS);
    const int64_t items = p->batch * p->frames * per_frame * p->heads * pieces;

    if (!kernel)
        return lf_fail(err, LF_UNSUPPORTED,
                       "compress: on CUDA x is float32, float16 or bfloat16, got another dtype");
    if (items >= int64_t(1) << 32)
        return lf_fail(err, LF_UNSUPPORTED,
                       "compress: on CUDA x has fewer than 2^32 pieces of 64 means, got %lld",
                       (long long)items);
    if (items == 0) return 0;

    Plan plan = {};
    plan.items = uint32_t(items);
    plan.pieces = uint32_t(pieces);
    plan.heads = uint32_t(p->heads);
    plan.blocks = uint32_t(p->frames * per_frame);
    plan.frame_blocks = uint32_t(per_frame);
    plan.part = int(p->block / 4);
    plan.vectors_in = in_sixteens(p->x, p->dtype == LF_F32 ? 4 : 2);
    plan.vectors_out = in_sixteens(p->out, 4);

    const DeviceGuard guard(place.device);
    const auto stream = static_cast<cudaStream_t>(place.stream);
    kernel<<<unsigned(lf_ceil_div(items, WARPS)), 32 * WARPS, 0, stream>>>(*p, plan);
    LF_CUDA_TRY(cudaGetLastError());
    return 0;
}
