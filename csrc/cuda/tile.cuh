/* Tiles of 16-bit elements in shared memory, and the lanes' places in ldmatrix reads of them.
 *
 * A row of DIM elements is DIM / 8 units of 16 bytes. Unit u of row r lies at u ^ (r & 7): eight
 * consecutive rows hold the same unit in eight different groups of banks, so neither the copies
 * in (rows) nor ldmatrix (columns of units) has bank conflicts. A tile begins at a multiple of
 * 256 bytes. */
#pragma once

#include <cstdint>

namespace lf {

template <int DIM> struct Tile {
    static_assert(DIM == 64 || DIM == 128, "the swizzle permutes groups of eight units");
    static constexpr uint32_t UNITS = DIM / 8;
    static constexpr uint32_t ROW_BYTES = DIM * 2;

    static __device__ __forceinline__ uint32_t at(uint32_t row, uint32_t unit)
    {
        return row * ROW_BYTES + (unit ^ (row & 7)) * 16;
    }

    /* A lane's address `of` in columns [0, 16), moved to columns [16 i, 16 i + 16). */
    static __device__ __forceinline__ uint32_t column(uint32_t of, uint32_t i)
    {
        return (of ^ (i % 4 * 32)) + i / 4 * 128;
    }

    /* Lane's address in a 16 x 16 piece whose matrices come as rows 0, rows 8, then the second
     * eight columns: an A operand, or a B operand when read transposed. */
    static __device__ __forceinline__ uint32_t rows_first(uint32_t lane)
    {
        return at(lane % 16, lane / 16);
    }

    /* The same with the second eight columns before rows 8: two B operands, eight rows each. */
    static __device__ __forceinline__ uint32_t columns_first(uint32_t lane)
    {
        return at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }
};

}  // namespace lf
