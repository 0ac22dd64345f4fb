/* What every launcher needs: checked calls, the caller's device kept, dtypes as types. */
#pragma once

#include "../lightforcing.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cstdint>

/* Runs a CUDA call; on failure clears the last error, fills `err` and returns -1. */
#define LF_CUDA_TRY(call)                                                                          \
    do {                                                                                           \
        const cudaError_t status_ = (call);                                                        \
        if (status_ != cudaSuccess) {                                                              \
            (void)cudaGetLastError();                                                              \
            return lf_fail(err, LF_CUDA, "%s: %s", #call, cudaGetErrorString(status_));            \
        }                                                                                          \
    } while (0)

namespace lf {

/* Makes `device` current for a scope: a stream only takes launches from its own device. */
struct DeviceGuard {
    int before = -1;
    explicit DeviceGuard(int device)
    {
        (void)cudaGetDevice(&before);
        if (before != device)
            (void)cudaSetDevice(device);
        else
            before = -1;
    }
    ~DeviceGuard()
    {
        if (before >= 0) (void)cudaSetDevice(before);
    }
    DeviceGuard(const DeviceGuard &) = delete;
    DeviceGuard &operator=(const DeviceGuard &) = delete;
};

/* A launch that may begin before the kernel in front of it has ended, if `overlaps`. */
template <typename... Parameters, typename... Arguments>
inline cudaError_t launch_after(bool overlaps, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                int64_t shared, lf_place place, Arguments... arguments)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = size_t(shared);
    config.stream = static_cast<cudaStream_t>(place.stream);
    config.attrs = &attribute;
    config.numAttrs = overlaps ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

/* Two floats as one register of two 16-bit values, the first in the low half. */
template <typename T> __device__ inline uint32_t pack2(float low, float high);
template <> __device__ inline uint32_t pack2<__nv_bfloat16>(float low, float high)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&pair);
}
template <> __device__ inline uint32_t pack2<__half>(float low, float high)
{
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

}  // namespace lf
