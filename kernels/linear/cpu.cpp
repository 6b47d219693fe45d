// A product of two matrices by all threads, in blocks that each thread takes whole.
#include "dots.h"
#include "gemm.h"

namespace {
constexpr int64_t STRIP = 16 * TILE_COLUMNS;  // columns of a block
}  // namespace

// c (rows, columns), its rows side by side, = a · b, of their numbers as they are or rounded to bfloat16; strides of a and
// b in numbers, one of each matrix's being 1.
extern "C" void multiply(
    const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row, int64_t b_column, float *c,
    int64_t rows, int64_t columns, int64_t depth, int64_t rounded, int64_t threads
) {
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
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t block = 0; block < down * across; block++) {
        const int64_t i = block % down * high, j = block / down * strip;
        multiply_block(
            {a + i * a_row, a_row, a_column}, {b + j * b_column, b_row, b_column}, c + i * columns + j, columns,
            std::min(high, rows - i), std::min(strip, columns - j), depth, false
        );
    }
}

// y (rows, columns) = x (rows, depth) · wᵀ, w (columns, depth), for few rows.
extern "C" void few(
    const float *x, const float *w, float *y, int64_t rows, int64_t columns, int64_t depth, int64_t threads
) {
    std::vector<const float *> from(rows);
    for (int64_t r = 0; r < rows; r++) from[r] = x + r * depth;
    const int64_t strip = 4 * DOTS_COLUMNS, blocks = (columns + strip - 1) / strip;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float *> to(rows);
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t c = b * strip;
            for (int64_t r = 0; r < rows; r++) to[r] = y + r * columns + c;
            dots(from.data(), rows, w + c * depth, depth, std::min(strip, columns - c), depth, to.data());
        }
    }
}
