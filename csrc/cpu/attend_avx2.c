/* The tile of attend_tile.h on AVX2 and FMA: 16 queries a panel, 6 rows a micro-kernel
 * (12 sums, 2 query vectors and a broadcast fill the 16 registers). */
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>

#define VEC 8
#define ROWS 6
#define ENGINE lf_attend_avx2
#define TILE_RUN __attribute__((target("avx2,fma,f16c")))
#define TILE_FN TILE_RUN __attribute__((always_inline)) static inline

typedef float vf __attribute__((vector_size(32), may_alias));
typedef int32_t vi __attribute__((vector_size(32), may_alias));

TILE_FN vf vec_splat(float x) { return _mm256_set1_ps(x); }
TILE_FN vf vec_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
TILE_FN vf vec_max(vf a, vf b) { return _mm256_max_ps(a, b); }  // b if either is NaN
TILE_FN int vec_any(vi mask) { return _mm256_movemask_ps((vf)mask) != 0; }

TILE_FN void widen_f16(const uint16_t *from, float *to, int64_t n)  // n: a multiple of 8
{
    for (int64_t i = 0; i < n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
}

#include "attend_tile.h"
#endif
