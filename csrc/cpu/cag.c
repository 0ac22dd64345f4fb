/* Chunk-aware growth: the sparsity of every chunk of a video (arXiv 2602.04789, section CAG).
 *
 * One unknown is solved so that the mean sparsity of the chunks inside the budget, weighted by
 * their resident frames l, is the target:
 *
 *   linear       s = clip(base - beta / sqrt(n))
 *   exponential  s = clip(base - 1 + exp(-beta / sqrt(n)))
 *   count        s = clip(1 - kept / l)
 *
 * Each mean is monotone in its unknown, so bisection to the last bit solves all three, clipped or
 * not; a few dozen chunks cost microseconds, once a video. */
#include "../lightforcing.h"
#include <math.h>

static double clip(double s) { return s < 0 ? 0 : s > 1 ? 1 : s; }

static int is_dense(const lf_cag_params *p, int64_t c)
{
    return c == 0 || p->chunk_ends[c - 1] < p->dense_frames;
}

static double resident(const lf_cag_params *p, int64_t c)
{
    const int64_t n = p->chunk_ends[c];
    return (double)(p->window > 0 && p->window < n ? p->window : n);
}

static double law(const lf_cag_params *p, int64_t c, double x)
{
    const double alpha = 1.0 / sqrt((double)p->chunk_ends[c]);
    switch (p->law) {
    case LF_LAW_LINEAR: return clip(p->base - alpha * x);
    case LF_LAW_EXPONENTIAL: return clip(p->base - 1 + exp(-alpha * x));
    case LF_LAW_COUNT: return clip(1 - x / resident(p, c));
    case LF_LAW_CONSTANT: break;
    }
    return p->target;
}

/* Mean sparsity of the chunks inside the budget for the unknown x; falls as x grows. */
static double mean_sparsity(const lf_cag_params *p, double x)
{
    double sum = 0, weight = 0;
    for (int64_t c = 0; c < p->chunks; c++) {
        if (is_dense(p, c)) continue;
        sum += resident(p, c) * law(p, c, x);
        weight += resident(p, c);
    }
    return weight > 0 ? sum / weight : p->target;
}

static double solve(const lf_cag_params *p)
{
    double low = 0, high = 1;
    if (p->law == LF_LAW_CONSTANT) return p->target;
    // Doubling reaches a mean below any positive target: each law falls to 0 as x grows.
    while (mean_sparsity(p, high) > p->target && high < 0x1p60) high *= 2;
    for (;;) {
        const double middle = low + (high - low) / 2;
        if (middle <= low || middle >= high) return high;
        if (mean_sparsity(p, middle) > p->target)
            low = middle;
        else
            high = middle;
    }
}

int lf_cag(const lf_cag_params *p, double *solved, lf_error *err)
{
    (void)err;
    *solved = solve(p);
    for (int64_t c = 0; c < p->chunks; c++)
        p->sparsity[c] = is_dense(p, c) || p->target == 0 ? 0 : law(p, c, *solved);
    return 0;
}
