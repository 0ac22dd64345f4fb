/* Every PTX instruction that this library writes by hand, one function each, named after it.
 *
 * Source: the PTX ISA. Addresses are shared-window addresses (smem_address). */
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

namespace lf {

__device__ __forceinline__ uint32_t smem_address(const void *pointer)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/* ---- any chip since sm_80: cp.async, ldmatrix, mma.sync (kernels: attend.cu, select.cu) ------- */

/* ---- Hopper: mbarrier, TMA, wgmma, setmaxnreg (kernels: *_sm90.cu) ---------------------------- */

}  // namespace lf
