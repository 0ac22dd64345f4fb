/* Which instruction set the CPU operators run on: private to csrc/cpu. */
#ifndef LIGHTFORCING_CPU_ISA_H
#define LIGHTFORCING_CPU_ISA_H

typedef enum {
    LF_ISA_SCALAR,
    LF_ISA_VECTOR,
    LF_ISA_AVX2,
    LF_ISA_AVX512,
    LF_ISA_COUNT
} lf_isa_level;

/* The level in force: the best one of this processor, or what lf_force_isa() asked for.
 * LF_ISA_AVX2 promises avx2, fma and f16c; LF_ISA_AVX512 promises avx512f, bw, dq and vl too.
 * Another thread may change it at any time, so a kernel whose results depend on the level asks once
 * per call; the products and exponentials of the scores do not, and ask where they stand. */
lf_isa_level lf_isa_active(void);

#endif
