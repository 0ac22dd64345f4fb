/* The tile of attend_tile.h on AVX-512: 32 queries a panel, 8 rows a micro-kernel. Head sizes
 * and key blocks are multiples of 8, so the micro-kernel has no remainder. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>

#define VEC 16
#define ROWS 8
#define ENGINE lf_attend_avx512
#define TILE_RUN __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define TILE_FN TILE_RUN __attribute__((always_inline)) static inline

typedef float vf __attribute__((vector_size(64), may_alias));
typedef int32_t vi __attribute__((vector_size(64), may_alias));

TILE_FN vf vec_splat(float x) { return _mm512_set1_ps(x); }
TILE_FN vf vec_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
TILE_FN vf vec_max(vf a, vf b) { return _mm512_max_ps(a, b); }  // b if either is NaN
TILE_FN int vec_any(vi mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }

TILE_FN void widen_f16(const uint16_t *from, float *to, int64_t n)  // n: a multiple of 8
{
    for (int64_t i = 0; i < n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
}

#include "attend_tile.h"
#endif
