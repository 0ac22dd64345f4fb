/* compress on the CPU: float32 means of the key blocks of every frame.
 *
 * Memory-bound: every element is read once and added once. Threads share (batch, frame, head). */
#include "means.h"
#include "convert.h"
#include "isa.h"

void lf_mean_rows(const void *rows, lf_dtype dtype, int64_t token_stride, int64_t n, int64_t part,
                  int64_t dim, float *out)
{
    const int64_t row_bytes = token_stride * lf_dtype_size(dtype);

    for (int64_t d = 0; d < dim; d++) out[d] = 0;
    if (part <= 1) {
        for (int64_t i = 0; i < n; i++)
            lf_add_row(out, (const char *)rows + i * row_bytes, dtype, dim);
    } else {
        float mean[LF_MAX_DIM];
        for (int64_t i = 0; i < n; i += part) {
            const int64_t rows_here = n - i < part ? n - i : part;
            lf_mean_rows((const char *)rows + i * row_bytes, dtype, token_stride, rows_here,
                         part / 4, dim, mean);
            for (int64_t d = 0; d < dim; d++) out[d] += (float)rows_here * mean[d];
        }
    }
    for (int64_t d = 0; d < dim; d++) out[d] /= (float)n;
}

int lf_compress_cpu(const lf_compress_params *p, lf_error *err)
{
    const int64_t per_frame = lf_frame_blocks(p->frame_tokens, p->block);
    const int64_t items = p->batch * p->frames * p->heads;

    (void)err;
#pragma omp parallel for schedule(static) num_threads(lf_threads())
    for (int64_t item = 0; item < items; item++) {
        const int64_t head = item % p->heads;
        const int64_t frame = item / p->heads % p->frames;
        const int64_t batch = item / p->heads / p->frames;
        for (int64_t j = 0; j < per_frame; j++) {
            const int64_t block = frame * per_frame + j;
            const int64_t start = lf_block_start(block, p->frame_tokens, p->block);
            lf_mean_rows(lf_at(&p->x, p->dtype, batch, start, head), p->dtype, p->x.token,
                         lf_block_tokens(block, p->frame_tokens, p->block), p->block / 4, p->dim,
                         (float *)lf_at(&p->out, LF_F32, batch, block, head));
        }
    }
    return 0;
}
