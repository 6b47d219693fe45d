// A product of two matrices by all threads of a parallel region, in blocks that each thread takes whole.
#pragma once

#include "gemm.h"

// c (rows, columns), its rows side by side, = a · b, of their numbers as they are or rounded to bfloat16. Without a barrier
// at its end.
static void multiply_by_all(
    const Matrix &a, const Matrix &b, float *c, int64_t rows, int64_t columns, int64_t depth, int64_t rounded,
    int64_t threads
) {
    constexpr int64_t STRIP = 16 * TILE_COLUMNS;  // columns of a block
    const Product multiply_block = product_of(rounded);
    int64_t strip = STRIP, across = (columns + STRIP - 1) / STRIP;
    // Each thread packs what its blocks share with the others': of few rows and more columns, rather the rows
    const bool by_columns = across < threads && rows < columns && rows <= BLOCK_ROWS;
    if (by_columns) {
        strip = ((columns + threads - 1) / threads + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS;
        across = (columns + strip - 1) / strip;
    }
    const int64_t high = block_rows(rows, by_columns || across % threads == 0 ? 1 : threads);
    const int64_t down = (rows + high - 1) / high;
#pragma omp for schedule(dynamic) nowait
    for (int64_t block = 0; block < down * across; block++) {
        const int64_t i = block % down * high, j = block / down * strip;
        multiply_block(
            {a.from + i * a.row, a.row, a.column}, {b.from + j * b.column, b.row, b.column}, c + i * columns + j, columns,
            std::min(high, rows - i), std::min(strip, columns - j), depth, false
        );
    }
}
