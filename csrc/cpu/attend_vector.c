/* The tile of attend_tile.h on the 16-byte vectors that every x86-64 and AArch64 processor
 * has: 8 queries a panel. */
#include <stdint.h>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define VEC 4
#define ROWS 6
#define ENGINE lf_attend_vector
#define TILE_RUN
#define TILE_FN __attribute__((always_inline)) static inline

typedef float vf __attribute__((vector_size(16), may_alias));
typedef int32_t vi __attribute__((vector_size(16), may_alias));

TILE_FN vf vec_splat(float x) { return (vf){x, x, x, x}; }

TILE_FN vf vec_fma(vf a, vf b, vf c)
{
#if defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

TILE_FN vf vec_max(vf a, vf b)  // b if either is NaN
{
    const vi larger = a > b;
    return (vf)((larger & (vi)a) | (~larger & (vi)b));
}

TILE_FN int vec_any(vi mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }

#include "attend.h"

TILE_FN void widen_f16(const uint16_t *from, float *to, int64_t n)
{
    for (int64_t i = 0; i < n; i++) to[i] = lf_from_f16(from[i]);
}

#include "attend_tile.h"
