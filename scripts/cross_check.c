/* Runs the core without Python: hashes of the selections, error of the attention.
 *
 * cross_check.py builds it for this machine and for aarch64 and compares what the two print:
 * selections are defined to the bit, so their hashes must be equal. */
#include "../csrc/lightforcing.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { B = 2, H = 3, D = 64, T = 78, F = 9, QF = 3, BQ = 48, BK = 32, PER_FRAME = 3 };
enum { LQ = QF * T, LK = F * T, R = (LQ + BQ - 1) / BQ, J = F * PER_FRAME, SUBS = F * 10 };

static uint64_t state = 1;

static float draw(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(state >> 32) * 0x1p-30f;
}

static uint64_t hash(const void *data, size_t size)
{
    uint64_t h = 14695981039346656037u;
    for (size_t i = 0; i < size; i++) h = (h ^ ((const unsigned char *)data)[i]) * 1099511628211u;
    return h;
}

static lf_tensor tensor(float *data, int64_t tokens)
{
    return (lf_tensor){data, tokens * H * D, H * D, D};
}

/* Largest difference of the sparse attention to a plain double loop. */
static double attention_error(const float *q, const float *k, const float *v, const float *out,
                              const int32_t *indices, int64_t kept)
{
    double worst = 0;
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++)
            for (int i = 0; i < LQ; i++) {
                const int32_t *row = indices + ((b * H + h) * R + i / BQ) * kept;
                const float *qi = q + ((b * LQ + i) * H + h) * D;
                double sum = 0, acc[D] = {0};
                for (int64_t n = 0; n < kept; n++) {
                    const int64_t start = lf_block_start(row[n], T, BK);
                    for (int64_t t = start; t < start + lf_block_tokens(row[n], T, BK); t++) {
                        const int64_t at = ((b * LK + t) * H + h) * D;
                        double dot = 0;
                        for (int d = 0; d < D; d++) dot += (double)qi[d] * k[at + d];
                        const double p = exp(dot / 8);
                        sum += p;
                        for (int d = 0; d < D; d++) acc[d] += p * v[at + d];
                    }
                }
                for (int d = 0; d < D; d++) {
                    const double e = fabs(acc[d] / sum - out[((b * LQ + i) * H + h) * D + d]);
                    if (!(e <= worst)) worst = e;
                }
            }
    return worst;
}

int main(void)
{
    float *q = malloc(sizeof(float) * B * LQ * H * D), *k = malloc(sizeof(float) * B * LK * H * D);
    float *v = malloc(sizeof(float) * B * LK * H * D),
          *out = malloc(sizeof(float) * B * LQ * H * D);
    float *means = malloc(sizeof(float) * B * SUBS * H * D);
    int32_t *indices = malloc(sizeof(int32_t) * B * H * R * J), counts[B * H * R];
    lf_error err = {0};
    double solved, sparsity[7];
    const int64_t ends[7] = {3, 6, 9, 12, 15, 18, 21};

    for (int i = 0; i < B * LQ * H * D; i++) q[i] = draw();
    for (int i = 0; i < B * LK * H * D; i++) k[i] = draw();
    for (int i = 0; i < B * LK * H * D; i++) v[i] = draw();

    const lf_cag_params cag = {ends, sparsity, 7, 3, 0, 0.88, 0.98, LF_LAW_LINEAR};
    if (lf_cag(&cag, &solved, &err) < 0) return 1;
    printf("cag %.12f %.12f\n", sparsity[1], sparsity[6]);

    const lf_compress_params c = {tensor(k, LK), tensor(means, SUBS), B, H, D, F, T, 8, LF_F32};
    if (lf_compress_cpu(&c, &err) < 0) return 1;
    printf("compress %016llx\n", (unsigned long long)hash(means, sizeof(float) * B * SUBS * H * D));

    const lf_select_budget budget = lf_select_plan(QF, F, T, BK, 0.7, 4, 1);
    for (int score = 0; score < 3; score++) {
        const lf_select_params s = {.q = tensor(q, LQ),
                                    .k = tensor(k, LK),
                                    .indices = indices,
                                    .batch = B,
                                    .heads = H,
                                    .dim = D,
                                    .q_frames = QF,
                                    .k_frames = F,
                                    .frame_tokens = T,
                                    .block_q = BQ,
                                    .block_k = BK,
                                    .kept = budget.kept,
                                    .keep_frames = budget.keep_frames,
                                    .sink_frames = 1,
                                    .near_frames = 1,
                                    .hierarchy = 1,
                                    .scale = 0.125,
                                    .score = (lf_score)score,
                                    .dtype = LF_F32};
        if (lf_select_cpu(&s, &err) < 0) return 1;
        printf("select %d %016llx\n", score,
               (unsigned long long)hash(indices, sizeof(int32_t) * B * H * R * budget.kept));
    }
    for (int i = 0; i < B * H * R; i++) counts[i] = (int32_t)budget.kept;
    for (int level = 0; lf_isa_name(level); level++) {
        const lf_attend_params a = {.q = tensor(q, LQ),
                                    .k = tensor(k, LK),
                                    .v = tensor(v, LK),
                                    .out = tensor(out, LQ),
                                    .indices = indices,
                                    .counts = counts,
                                    .batch = B,
                                    .heads = H,
                                    .dim = D,
                                    .q_len = LQ,
                                    .k_len = LK,
                                    .frame_tokens = T,
                                    .block_q = BQ,
                                    .block_k = BK,
                                    .max_count = budget.kept,
                                    .scale = 0.125f,
                                    .dtype = LF_F32};
        lf_force_isa(lf_isa_name(level));
        if (lf_attend_cpu(&a, &err) < 0) return 1;
        const double error = attention_error(q, k, v, out, indices, budget.kept);
        printf("attend %s error %.1e\n", lf_isa(), error);
        if (!(error < 1e-5)) return 1;
    }
    return 0;
}
