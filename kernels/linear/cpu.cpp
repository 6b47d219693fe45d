// Products with a weight: of many rows, packed, by all threads in blocks; of few, which read the weight as it lies.
#include "dots.h"
#include "products.h"

// c (rows, columns), its rows side by side, = a · b, of their numbers as they are or rounded to bfloat16; strides of a and
// b in numbers, one of each matrix's being 1.
extern "C" void multiply(
    const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row, int64_t b_column, float *c,
    int64_t rows, int64_t columns, int64_t depth, int64_t rounded, int64_t threads
) {
#pragma omp parallel num_threads(threads)
    multiply_by_all({a, a_row, a_column}, {b, b_row, b_column}, c, rows, columns, depth, rounded, threads);
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
