/* Every PTX instruction that this library writes by hand, one function each, named after it.
 *
 * Source: the PTX ISA. Addresses are shared-window addresses (smem_address). */
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#include <type_traits>

namespace lf {

__device__ __forceinline__ uint32_t smem_address(const void *pointer)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/* ---- any chip since sm_80: cp.async, ldmatrix, mma.sync (kernels: attend.cu, select.cu) ---- */

/* %tid.x: threadIdx.x read anew, where a register kept for it would be one too many. */
__device__ __forceinline__ uint32_t tid_x()
{
    uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

/* cp.async of 16 bytes from global to shared memory, past L1; both 16-byte aligned. */
__device__ __forceinline__ void cp_async_16(uint32_t to, const void *from)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)
                 : "memory");
}

/* The same of the first `bytes` (0 to 16), the rest zeros; with 0 nothing is read. */
__device__ __forceinline__ void cp_async_16_zfill(uint32_t to, const void *from, uint32_t bytes)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(bytes)
                 : "memory");
}

/* cp.async.commit_group: this thread's copies since the last call become a group. */
__device__ __forceinline__ void cp_async_commit_group()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* cp.async.wait_group: at most PENDING of this thread's groups, the latest, are under way. */
template <int PENDING> __device__ __forceinline__ void cp_async_wait_group()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* ldmatrix: four 8x8 matrices of 16-bit elements; lane 8 i + r has the address of row r of i. */
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&to)[4], uint32_t from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

/* ldmatrix.trans: the same, each matrix transposed. */
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&to)[4], uint32_t from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

/* mma.m16n8k16: c (16 x 8, float32) += a (16 x 16) b (16 x 8), b in two registers. */
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                            uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* mma.m16n8k32: c (16 x 8) += a (16 x 32) b (32 x 8), signed bytes, exact 32-bit sums. */
__device__ __forceinline__ void mma_m16n8k32_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* ld.global.nc of 16 bytes that are read once: past L1, but kept in L2, where no_allocate without
 * the size of a prefetch would evict them (28.8 MB in 11.3 us instead of 6.3 on an H100). */
__device__ __forceinline__ uint4 load_streaming(const uint4 *from)
{
    uint4 x;
    asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
        : "l"(from));
    return x;
}

/* prefetch.global.L2 of the 128 bytes around an address. */
__device__ __forceinline__ void prefetch_l2(const void *at)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

/* ex2.approx: 2^x to about 2 ulp, below 2^-126 zero; exp2f() takes two instructions more. */
__device__ __forceinline__ float ex2_approx_ftz(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* lg2.approx: log2 x to about 2^-22 (absolute near 1, else relative). */
__device__ __forceinline__ float lg2_approx_ftz(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* griddepcontrol.launch_dependents: from here on the next kernel of the stream may start, if it was
 * launched to; griddepcontrol.wait: until the previous one is complete and its writes are seen.
 * Both do nothing in code for chips before sm_90, which must not be launched that way. */
__device__ __forceinline__ void grid_launch_dependents()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void grid_dependency_wait()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Before and after every hand-over of a pipeline (signals, waits, bulk copies). Empty, but in a
 * build with LF_FUZZ a nanosleep of random length: such a build must give the ordinary one's bits,
 * and a stage released early or a phase taken for another then shows. Half of the calls do not
 * sleep, one in 64 sleeps up to 8 us, the time of several stages. The clock feeds the generator, so
 * no two launches agree. For 64 us at a time one warpgroup in four sleeps four times as long: each
 * role is the slow one at times. */
__device__ __forceinline__ void handover_pause()
{
#if defined(LF_FUZZ) && defined(__CUDA_ARCH__)
    uint32_t now, smid;
    uint64_t ns;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now));
    asm volatile("mov.u32 %0, %%smid;" : "=r"(smid));
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    const uint32_t warp = threadIdx.x / 32;
    uint32_t x = (now ^ warp << 20 ^ smid << 25) * 0x9e3779b9u;
    x = (x ^ x >> 15) * 0x85ebca6bu;
    x ^= x >> 13;
    uint32_t epoch = (uint32_t(ns >> 16) ^ smid << 8) * 0x9e3779b9u;
    const bool slow = (epoch >> 28 & 3) == warp / 4 % 4;
    uint32_t length = 0;
    if ((x & 63) == 0)
        length = x >> 19;  // below 8192 ns
    else if (x & 1)
        length = x >> 24;  // below 256 ns
    if (slow) length *= 4;
    asm volatile("nanosleep.u32 %0;" ::"r"(length));
#endif
}

/* ld.acquire / st.release at the scope of the GPU. */
__device__ __forceinline__ uint64_t load_acquire(const uint64_t *address)
{
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ void store_release(uint64_t *address, uint64_t value)
{
    handover_pause();
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
    handover_pause();
}

/* bar.sync on a named barrier (1 to 15; 0 is __syncthreads) that `threads` threads reach. */
__device__ __forceinline__ void bar_sync(uint32_t barrier, uint32_t threads)
{
    handover_pause();
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
    handover_pause();
}

/* ---- Hopper: mbarrier, TMA, wgmma, setmaxnreg (kernels: *_sm90.cu) ----------------------------
 */

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* mbarrier.init: opens a phase after `arrivals` arrivals (and the bytes announced meanwhile). */
__device__ __forceinline__ void mbarrier_init(uint64_t *barrier, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}

/* fence.mbarrier_init: makes initialised barriers visible to the copy engine. */
__device__ __forceinline__ void fence_mbarrier_init()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t *barrier)
{
    handover_pause();
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier))
                 : "memory");
    handover_pause();
}

/* mbarrier.arrive.expect_tx: one arrival, and `bytes` more to come from the copy engine. */
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t *barrier, uint32_t bytes)
{
    handover_pause();
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)),
        "r"(bytes)
        : "memory");
    handover_pause();
}

/* mbarrier.try_wait: true once the phase with this parity is complete. */
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t *barrier, uint32_t parity)
{
    uint32_t done;
    asm volatile("{\n\t"
                 ".reg .pred p;\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                 "selp.u32 %0, 1, 0, p;\n\t"
                 "}"
                 : "=r"(done)
                 : "r"(smem_address(barrier)), "r"(parity)
                 : "memory");
    return done;
}

__device__ __forceinline__ void mbarrier_wait(uint64_t *barrier, uint32_t parity)
{
    handover_pause();
    while (!mbarrier_try_wait(barrier, parity)) {
    }
    handover_pause();
}

/* bar.arrive: counts this thread in without waiting. */
__device__ __forceinline__ void bar_arrive(uint32_t barrier, uint32_t threads)
{
    handover_pause();
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
    handover_pause();
}

/* setmaxnreg: registers a thread of this warpgroup from here on. */
template <int REGISTERS> __device__ __forceinline__ void setmaxnreg_inc()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> __device__ __forceinline__ void setmaxnreg_dec()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ __forceinline__ void prefetch_tensormap(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* cp.async.bulk.tensor.4d: one box of a 4-D tensor map into shared memory. */
__device__ __forceinline__ void tma_load_4d(uint32_t target, const CUtensorMap *map,
                                            uint64_t *barrier, int c0, int c1, int c2, int c3)
{
    handover_pause();
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
                 "l"(map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

/* A wgmma matrix descriptor: 128-byte swizzle, byte offsets as the PTX ISA names them. */
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t leading,
                                                     uint32_t stride)
{
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 |
           uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

/* fence.proxy.async: this thread's stores to shared memory come before wgmma's reads. */
__device__ __forceinline__ void fence_proxy_async()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit_group()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING> __device__ __forceinline__ void wgmma_wait_group()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The 64 accumulators of a 64 x 128 tile, as operands and as the list in the instruction.
#define LF_ACC8(c, i)                                                                              \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]),    \
        "+f"(c[i + 6]), "+f"(c[i + 7])
#define LF_ACC64(c)                                                                                \
    LF_ACC8(c, 0), LF_ACC8(c, 8), LF_ACC8(c, 16), LF_ACC8(c, 24), LF_ACC8(c, 32), LF_ACC8(c, 40),  \
        LF_ACC8(c, 48), LF_ACC8(c, 56)
#define LF_LIST64                                                                                  \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "  \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "   \
    "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "   \
    "%56, %57, %58, %59, %60, %61, %62, %63}"

/* wgmma.mma_async m64n128k16, A and B from shared memory, both K-major:
 * c = A B^T + (accumulate ? c : 0). */
template <typename T>
__device__ __forceinline__ void wgmma_m64n128k16(float (&c)[64], uint64_t a, uint64_t b,
                                                 int accumulate)
{
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " LF_LIST64
                     ", %64, %65, p, 1, 1, 0, 0;\n\t}"
                     : LF_ACC64(c)
                     : "l"(a), "l"(b), "r"(accumulate));
    else
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " LF_LIST64
                     ", %64, %65, p, 1, 1, 0, 0;\n\t}"
                     : LF_ACC64(c)
                     : "l"(a), "l"(b), "r"(accumulate));
}

/* The same with A from registers and B rows of N (transposed): c = A B + (accumulate ? c : 0). */
template <typename T>
__device__ __forceinline__ void wgmma_m64n128k16_rs(float (&c)[64], const uint32_t *a, uint64_t b,
                                                    int accumulate)
{
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %69, 0;\n\t"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " LF_LIST64
                     ", {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n\t}"
                     : LF_ACC64(c)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
    else
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %69, 0;\n\t"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " LF_LIST64
                     ", {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n\t}"
                     : LF_ACC64(c)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// The same for a 64 x 64 tile.
#define LF_ACC32(c) LF_ACC8(c, 0), LF_ACC8(c, 8), LF_ACC8(c, 16), LF_ACC8(c, 24)
#define LF_LIST32                                                                                  \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "  \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"

/* wgmma.mma_async m64n64k16, A from registers and B rows of N, as above. */
template <typename T>
__device__ __forceinline__ void wgmma_m64n64k16_rs(float (&c)[32], const uint32_t *a, uint64_t b,
                                                   int accumulate)
{
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %37, 0;\n\t"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " LF_LIST32
                     ", {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n\t}"
                     : LF_ACC32(c)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
    else
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %37, 0;\n\t"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " LF_LIST32
                     ", {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n\t}"
                     : LF_ACC32(c)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

/* The same of float16 with B K-major: c = A B^T + (accumulate ? c : 0). */
__device__ __forceinline__ void wgmma_m64n64k16_rs_kmajor(float (&c)[32], const uint32_t (&a)[4],
                                                          uint64_t b, int accumulate)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %37, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " LF_LIST32
                 ", {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n\t}"
                 : LF_ACC32(c)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

#define LF_INT8(c, i)                                                                              \
    "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3]), "+r"(c[i + 4]), "+r"(c[i + 5]),    \
        "+r"(c[i + 6]), "+r"(c[i + 7])

/* wgmma.mma_async m64n64k32 of signed bytes with exact 32-bit sums, A from registers, B K-major. */
__device__ __forceinline__ void wgmma_m64n64k32_s8_rs(int (&c)[32], const uint32_t (&a)[4],
                                                      uint64_t b, int accumulate)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %37, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " LF_LIST32
                 ", {%32, %33, %34, %35}, %36, p;\n\t}"
                 : LF_INT8(c, 0), LF_INT8(c, 8), LF_INT8(c, 16), LF_INT8(c, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

#undef LF_ACC8
#undef LF_ACC32
#undef LF_ACC64
#undef LF_INT8
#undef LF_LIST32
#undef LF_LIST64

#endif  // sm_90a

}  // namespace lf
