/* The two process-wide settings of the CPU operators: instruction set and threads.
 *
 * Both are atomics that an operator reads once at its start, so a change from another
 * Python thread takes effect between calls, never inside one. */
#include "isa.h"
#include "../lightforcing.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

static const char *const NAMES[LF_ISA_COUNT] = {
    [LF_ISA_SCALAR] = "scalar",
    [LF_ISA_VECTOR] = "vector",
    [LF_ISA_AVX2] = "avx2",
    [LF_ISA_AVX512] = "avx512",
};

static atomic_int forced_isa = -1;    // -1: the best one
static atomic_int asked_threads = 0;  // 0: OpenMP's default

static atomic_int best_known = -1;  // cpuid leaves a virtual machine: asked once, not a call

static lf_isa_level find_best_isa(void)
{
#if defined(__x86_64__)
    unsigned a, b, c = 0, d;
    // GCC 10's __builtin_cpu_supports() does not know "f16c"; whether the system saves
    // the wide registers is in its answer for "avx2" and "avx512f".
    const int has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    const int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!has_avx2 || !has_f16c) return LF_ISA_VECTOR;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return LF_ISA_AVX512;
    return LF_ISA_AVX2;
#else
    return LF_ISA_VECTOR;
#endif
}

static lf_isa_level best_isa(void)
{
    int best = atomic_load_explicit(&best_known, memory_order_relaxed);
    if (best < 0) {
        best = (int)find_best_isa();
        atomic_store_explicit(&best_known, best, memory_order_relaxed);
    }
    return (lf_isa_level)best;
}

lf_isa_level lf_isa_active(void)
{
    const int forced = atomic_load_explicit(&forced_isa, memory_order_relaxed);
    return forced < 0 ? best_isa() : (lf_isa_level)forced;
}

const char *lf_isa_name(int level)
{
    return level >= 0 && level <= (int)best_isa() ? NAMES[level] : NULL;
}

const char *lf_isa(void) { return NAMES[lf_isa_active()]; }

/* NULL goes back to the best level of this processor. */
int lf_force_isa(const char *name)
{
    int level = -1;

    if (name) {
        level = (int)best_isa();
        while (level >= 0 && strcmp(name, NAMES[level]) != 0) level--;
        if (level < 0) return -1;
    }
    atomic_store_explicit(&forced_isa, level, memory_order_relaxed);
    return 0;
}

/* GNU OpenMP's team does not survive a fork, and a call that waits for it never returns: a child
 * computes with the one thread that it has. */
static atomic_int in_child = 0;

static void note_child(void) { atomic_store_explicit(&in_child, 1, memory_order_relaxed); }

int lf_watch_forks(void) { return pthread_atfork(NULL, NULL, note_child); }

void lf_set_threads(int threads)
{
    atomic_store_explicit(&asked_threads, threads > 0 ? threads : 0, memory_order_relaxed);
}

int lf_threads(void)
{
    const int asked = atomic_load_explicit(&asked_threads, memory_order_relaxed);
    if (atomic_load_explicit(&in_child, memory_order_relaxed)) return 1;
#ifdef _OPENMP
    return asked > 0 ? asked : omp_get_max_threads();
#else
    (void)asked;
    return 1;
#endif
}
