/* select_blocks on the device: three kernels, each started while the one before it runs out
 * (programmatic dependent launch, Hopper and later).
 *
 *   pool    select_pool.cuh    means of q and of the key frames without given means
 *   scores  select_scores.cuh  mean: products of block means, in the CPU's order of operations
 *           select_pairs.cuh   mass, lse: log-sum-exp of every query part and key block
 *   choose  select_choose.cuh  block and frame scores, frames, blocks, the ascending list
 *
 * The workspace is cut by lay_out(), which lf_select_cuda_workspace() runs without memory. */
#include "kernels.h"
#include "select_choose.cuh"
#include "select_pairs.cuh"
#include "select_pool.cuh"
#include "select_scores.cuh"
#include <algorithm>
#include <atomic>

namespace {

using namespace lf;

constexpr int64_t ALIGNMENT = 256, CHOOSE_BYTES_MOST = 96 * 1024;

// ---- geometry and workspace
// ----------------------------------------------------------------------

Selection measure(const lf_select_params &p)
{
    Selection s = {};
    s.p = p;
    s.batch_heads = int(p.batch * p.heads);
    s.heads = int(p.heads);
    s.dim = int(p.dim);
    s.part = int(p.block_k / 4);
    s.frame_blocks = int(lf_frame_blocks(p.frame_tokens, p.block_k));
    s.frame_parts = int(lf_frame_blocks(p.frame_tokens, p.block_k / 4));
    s.blocks = int(p.k_frames) * s.frame_blocks;
    s.padded_blocks = int(lf_ceil_div(s.blocks, 8) * 8);
    s.q_len = int(p.q_frames * p.frame_tokens);
    s.q_blocks = int(lf_ceil_div(s.q_len, p.block_q));
    s.block_parts = int(lf_ceil_div(p.block_q, s.part));
    s.q_parts = s.q_blocks * s.block_parts;
    s.q_tiles = int(lf_ceil_div(s.q_parts, 8));
    s.new_frames = int(p.k_frames - p.means_frames);
    s.over_block_parts = reciprocal(s.block_parts);
    s.over_frame_blocks = reciprocal(s.frame_blocks);
    return s;
}

/* The head size that the tensor cores see; elements past D are zeros. */
int padded_dim(const lf_select_params &p) { return p.dim <= 64 ? 64 : 128; }

/* Points the workspace members into `memory` (may be NULL); returns the bytes they take. */
int64_t lay_out(Selection &s, char *memory)
{
    int64_t used = 0;
    const auto take = [&](auto *&pointer, int64_t bytes) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + used);
        used += lf_ceil_div(bytes, ALIGNMENT) * ALIGNMENT;
    };
    const int64_t heads = s.batch_heads, dim = s.p.dim, size = sizeof(float);
    const auto take_means = [&](int64_t of_frame) {
        const int64_t rows = s.new_frames * of_frame, done = s.p.means_frames * of_frame;
        float *mine = nullptr;
        if (s.p.store_means) {
            s.new_means = s.p.k_means;
            s.new_means.data = static_cast<float *>(s.p.k_means.data) + done * s.p.k_means.token;
        } else {
            take(mine, heads * rows * dim * size);
            s.new_means = {mine, s.p.heads * rows * dim, dim, rows * dim};
        }
    };
    const int64_t tiles = heads * s.q_tiles;

    if (s.p.score == LF_SCORE_MEAN) {
        take(s.q_means, heads * s.q_blocks * dim * size);
        take_means(s.frame_blocks);
        if (s.p.scores)
            s.scores = s.p.scores;
        else
            take(s.scores, heads * s.q_blocks * s.blocks * size);
    } else {
        take(s.q_split, tiles * padded_dim(s.p) * 24);
        take(s.q_factor, tiles * 8 * size);
        take_means(s.frame_parts);
        take(s.logits, heads * s.q_parts * s.padded_blocks * size);
    }
    return used;
}

/* True when the rows of a tensor with such elements can be read 16 bytes at a time. */
bool allows_vectors(const lf_tensor &x, int64_t size)
{
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch * size % 16 == 0 &&
           x.token * size % 16 == 0 && x.head * size % 16 == 0 && x.token < MOST_STRIDE;
}

// ---- the variants that exist
// ---------------------------------------------------------------------

using pool_fn = void (*)(Selection, int, int);
using pair_fn = void (*)(Selection, int, int);
using choose_fn = void (*)(Selection);

template <typename T> pool_fn pick_pool(int part)
{
    switch (part) {
    case 4: return pool_kernel<T, 4>;
    case 8: return pool_kernel<T, 8>;
    case 16: return pool_kernel<T, 16>;
    default: return pool_kernel<T, 32>;
    }
}

pool_fn pick_pool(lf_dtype dtype, int part)
{
    switch (dtype) {
    case LF_F16: return pick_pool<__half>(part);
    case LF_BF16: return pick_pool<__nv_bfloat16>(part);
    default: return pick_pool<float>(part);
    }
}

pair_fn pick_pair(int dim) { return dim == 64 ? pair_kernel<64> : pair_kernel<128>; }

int pair_bytes(int dim)
{
    return dim == 64 ? int(sizeof(PairShared<64>)) : int(sizeof(PairShared<128>));
}

choose_fn pick_choose(lf_score score)
{
    switch (score) {
    case LF_SCORE_MASS: return choose_kernel<LF_SCORE_MASS>;
    case LF_SCORE_LSE: return choose_kernel<LF_SCORE_LSE>;
    default: return choose_kernel<LF_SCORE_MEAN>;
    }
}

// ---- the device
// ------------------------------------------------------------------------------------

struct Device {
    int multiprocessors;
    bool overlaps;  // the code is for sm_90 or later and has griddepcontrol
    bool hopper;    // compute capability 9.0: select_sm90.cu
    int shared;     // bytes of shared memory of a multiprocessor
};

/* Bytes of shared memory with which at most `blocks` thread blocks fit on a multiprocessor: those
 * that start early take what places there are, and would pile up on a few. `fixed`: what a thread
 * block has beside these. */
int64_t spread(const Device &device, int64_t bytes, int64_t fixed, int64_t blocks)
{
    const int64_t least = device.overlaps ? device.shared / (blocks + 1) + 1 - fixed : 0;
    return bytes > least ? bytes : least;
}

/* One thread block of scores on a multiprocessor. */
int64_t mean_bytes(const Device &device) { return spread(device, sizeof(MeanShared), 0, 1); }

Device unpack(int fact)
{
    return {fact >> 2 & 0x3fff, (fact & 1) != 0, (fact & 2) != 0, (fact >> 16) * 1024};
}

template <typename F> cudaError_t allow_shared(F *kernel, int bytes)
{
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

/* Facts of the current device; the first call there loads the kernels and sets their limits. */
int prepare(Device *device, lf_error *err)
{
    constexpr int MOST = 64;
    // KB of shared memory (from bit 16), multiprocessors (from bit 2), hopper, overlaps; 0: not
    // asked
    static std::atomic<int> known[MOST];
    int index, processors, shared, major, minor, fact;

    LF_CUDA_TRY(cudaGetDevice(&index));
    fact = index < MOST ? known[index].load(std::memory_order_acquire) : 0;
    if (fact == 0) {
        cudaFuncAttributes attributes;
        for (lf_dtype dtype : {LF_F32, LF_F16, LF_BF16})
            for (int part : {4, 8, 16, 32})
                LF_CUDA_TRY(cudaFuncGetAttributes(&attributes, pick_pool(dtype, part)));
        for (int dim : {64, 128}) LF_CUDA_TRY(allow_shared(pick_pair(dim), pair_bytes(dim)));
        for (lf_score score : {LF_SCORE_MEAN, LF_SCORE_MASS, LF_SCORE_LSE})
            LF_CUDA_TRY(allow_shared(pick_choose(score), int(CHOOSE_BYTES_MOST)));
        LF_CUDA_TRY(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
        LF_CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
        LF_CUDA_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
        const bool hopper = major == 9 && minor == 0;
        if (hopper && lf_select_sm90_warmup(err) < 0) return -1;
        LF_CUDA_TRY(
            cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index));
        // Code compiled on the spot from PTX of sm_80 does not wait, whatever the chip.
        const bool overlaps = attributes.ptxVersion >= 90;
        fact = shared / 1024 << 16 | processors << 2 | int(hopper) << 1 | int(overlaps);
        const int64_t bytes = mean_bytes(unpack(fact));
        LF_CUDA_TRY(allow_shared(mean_scores_kernel, int(bytes)));
        if (index < MOST) known[index].store(fact, std::memory_order_release);
    }
    *device = unpack(fact);
    return 0;
}

// ---- launches
// --------------------------------------------------------------------------------------

int launch_pool(const Selection &s, lf_place place, lf_error *err)
{
    const bool mean = s.p.score == LF_SCORE_MEAN;
    const int octets = int(mean ? s.p.dim : padded_dim(s.p)) / 8;
    const int per_unit = q_unit_blocks(s.block_parts);
    const int64_t q_units = mean ? lf_ceil_div(s.q_blocks, per_unit) : s.q_tiles;
    const int64_t k_units = lf_ceil_div(int64_t(s.new_frames) * s.frame_blocks, 2);
    const int64_t parts = per_unit * s.block_parts > 8 ? per_unit * s.block_parts : 8;
    const int64_t shared = mean ? parts * s.p.dim * int64_t(sizeof(float)) : 0;

    LF_CUDA_TRY(launch_after(false, pick_pool(s.p.dtype, s.part),
                             dim3(unsigned(s.batch_heads), unsigned(q_units + k_units)),
                             dim3(unsigned(octets), 8), shared, place, s, int(q_units), octets));
    return 0;
}

int launch_mean_scores(const Selection &s, const Device &device, lf_place place, lf_error *err)
{
    const int chunks = int(lf_ceil_div(s.blocks, MEAN_KEYS));
    const int tiles = int(lf_ceil_div(s.q_blocks, MEAN_TILE));

    LF_CUDA_TRY(launch_after(device.overlaps, mean_scores_kernel,
                             unsigned(chunks * tiles * s.batch_heads), 32 * MEAN_WARPS,
                             mean_bytes(device), place, s, chunks, tiles));
    return 0;
}

/* The queries are cut into ranges only if the key chunks alone leave processors idle: each range
 * splits the keys again. */
int launch_pairs(const Selection &s, const Device &device, lf_place place, lf_error *err)
{
    if (device.hopper && !lf_cuda_portable_only())
        return launch_pairs_sm90(s, device.multiprocessors, place, err);

    const int dim = padded_dim(s.p), chunks = int(lf_ceil_div(s.blocks, PAIR_BLOCKS));
    const int64_t most = lf_ceil_div(s.q_tiles, PAIR_TILES);
    int64_t ranges = device.multiprocessors / (int64_t(chunks) * s.batch_heads);
    ranges = ranges < 1 ? 1 : ranges > most ? most : ranges;

    LF_CUDA_TRY(launch_after(device.overlaps, pick_pair(dim),
                             unsigned(chunks * ranges * s.batch_heads), PAIR_THREADS,
                             pair_bytes(dim), place, s, chunks, int(ranges)));
    return 0;
}

int launch_choose(const Selection &s, const Device &device, lf_place place, lf_error *err)
{
    const bool mean = s.p.score == LF_SCORE_MEAN;
    const bool shares = s.p.score == LF_SCORE_MASS && warp_holds_row(s.blocks);
    const int64_t rows = int64_t(s.q_blocks) * s.batch_heads;
    // As many on a multiprocessor as evenly dealt ones would be: mass of 12 heads and 4680 rows
    // takes 35.7 us, not 36.8, where 4 fit instead of 5. For one alone the bytes would be too many.
    const int64_t most = std::max<int64_t>(lf_ceil_div(rows, device.multiprocessors), 2);
    const int64_t bytes = spread(device, choose_bytes(s.blocks, s.p.k_frames, shares),
                                 sizeof(ChooseShared) + 1024, most);
    LF_CUDA_TRY(launch_after(device.overlaps, pick_choose(s.p.score), unsigned(rows),
                             mean ? CUT_THREADS : CHOOSE_THREADS, bytes, place, s));
    return 0;
}

/* What these kernels cannot do, as a sentence. */
int check_limits(const lf_select_params *p, lf_error *err)
{
    const int64_t blocks = p->k_frames * lf_frame_blocks(p->frame_tokens, p->block_k);
    if (choose_bytes(blocks, p->k_frames, false) > CHOOSE_BYTES_MOST)
        return lf_fail(err, LF_UNSUPPORTED,
                       "select_blocks: expected at most about 23000 key blocks and frames (twice) "
                       "on CUDA, got %lld key blocks of %lld frames",
                       (long long)blocks, (long long)p->k_frames);
    if (p->score != LF_SCORE_MEAN && p->dim > 128)
        return lf_fail(err, LF_UNSUPPORTED,
                       "select_blocks: expected a head size of at most 128 for the scores mass and "
                       "lse on CUDA, got %lld",
                       (long long)p->dim);
    return 0;
}

}  // namespace

extern "C" int lf_select_warmup(lf_error *err)
{
    Device device;
    return prepare(&device, err);
}

extern "C" int64_t lf_select_cuda_workspace(const lf_select_params *p)
{
    Selection s = measure(*p);
    return lay_out(s, nullptr);
}

extern "C" int lf_select_cuda(const lf_select_params *p, void *workspace, lf_place place,
                              lf_error *err)
{
    const lf::DeviceGuard guard(place.device);
    Device device;

    if (p->batch * p->heads * p->q_frames == 0) return 0;
    if (check_limits(p, err) < 0 || prepare(&device, err) < 0) return -1;

    const int64_t size = p->dtype == LF_F32 ? 4 : 2;
    Selection s = measure(*p);
    lay_out(s, static_cast<char *>(workspace));
    s.q_vectors = allows_vectors(p->q, size);
    s.k_vectors = allows_vectors(p->k, size);
    s.means_vectors = allows_vectors(p->k_means, sizeof(float));
    s.new_vectors = allows_vectors(s.new_means, sizeof(float));

    if (launch_pool(s, place, err) < 0) return -1;
    if (p->score == LF_SCORE_MEAN) {
        if (launch_mean_scores(s, device, place, err) < 0) return -1;
    } else {
        if (launch_pairs(s, device, place, err) < 0) return -1;
    }
    return launch_choose(s, device, place, err);
}
