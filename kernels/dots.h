// Products of few rows with a matrix whose rows have the depth side by side, as weights lie: nothing is packed, and each
// weight is read once. A result is a sum over the depth in an order of its own, whatever is computed beside it: what a row
// gives does not depend on how many others there are.
#pragma once

#include <algorithm>

#include "vectors.h"

typedef float Quad __attribute__((vector_size(16)));

// The sum of a vector's numbers, by halves.
static inline float total(Vector v) {
    Quad q[LANES / 4];
    std::memcpy(q, &v, sizeof v);
    for (int64_t i = 1; i < LANES / 4; i++) q[0] += q[i];
    q[0] += __builtin_shufflevector(q[0], q[0], 2, 3, 0, 1);
    return q[0][0] + q[0][1];
}

// out[r][c] = x[r] · w[c], where w's rows are `w_row` apart; of the columns so many are kept. All are computed, the last
// one again where there are fewer: a compiler may round a lone sum otherwise (as a product and a sum).
template <int ROWS, int COLUMNS>
static inline void dots_tile(
    const float *const *x, const float *w, int64_t w_row, int64_t kept, int64_t depth, float *const *out,
    int64_t column, const float *ahead
) {
    Vector s[ROWS][COLUMNS] = {};
    const float *from[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) from[c] = w + std::min<int64_t>(c, kept - 1) * w_row;
    const int64_t whole = depth / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
        if (ahead != nullptr && k % (2 * LANES) == 0)
            for (int c = 0; c < COLUMNS; c++) __builtin_prefetch(ahead + c * w_row + k);
        Vector b[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) b[c] = load(from[c] + k);
        for (int r = 0; r < ROWS; r++) {
            const Vector a = load(x[r] + k);
            for (int c = 0; c < COLUMNS; c++) s[r][c] += a * b[c];
        }
    }
    if (whole < depth)
        for (int r = 0; r < ROWS; r++) {
            const Vector a = load(x[r] + whole, depth - whole);
            for (int c = 0; c < COLUMNS; c++) s[r][c] += a * load(from[c] + whole, depth - whole);
        }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS && c < kept; c++) out[r][column + c] = total(s[r][c]);
}

template <int ROWS>
static inline void dots_rows(
    const float *const *x, const float *w, int64_t w_row, int64_t columns, int64_t depth, float *const *out,
    const float *ahead
) {
    constexpr int WIDE = ROWS == 4 ? 3 : ROWS == 3 ? 4 : ROWS == 2 ? 6 : 8;  // twelve sums at most, of sixteen registers
    for (int64_t c = 0; c < columns; c += WIDE)
        dots_tile<ROWS, WIDE>(
            x, w + c * w_row, w_row, columns - c, depth, out, c, ahead ? ahead + c * w_row : nullptr
        );
}

// Columns of w that stay in the first cache while all rows pass; the first rows fetch the next ones, which come from memory.
constexpr int64_t DOTS_COLUMNS = 24;

// out[r][c] = x[r] · w[c] for all rows and columns.
static inline void dots(
    const float *const *x, int64_t rows, const float *w, int64_t w_row, int64_t columns, int64_t depth,
    float *const *out
) {
    for (int64_t c = 0; c < columns; c += DOTS_COLUMNS) {
        const int64_t here = std::min(DOTS_COLUMNS, columns - c);
        const float *from = w + c * w_row;
        for (int64_t r = 0; r < rows; r += 4) {
            float *to[4];
            const int64_t high = std::min<int64_t>(4, rows - r);
            const float *ahead = r == 0 && c + DOTS_COLUMNS < columns ? from + DOTS_COLUMNS * w_row : nullptr;
            for (int64_t i = 0; i < high; i++) to[i] = out[r + i] + c;
            switch (high) {
                case 1: dots_rows<1>(x + r, from, w_row, here, depth, to, ahead); break;
                case 2: dots_rows<2>(x + r, from, w_row, here, depth, to, ahead); break;
                case 3: dots_rows<3>(x + r, from, w_row, here, depth, to, ahead); break;
                default: dots_rows<4>(x + r, from, w_row, here, depth, to, ahead);
            }
        }
    }
}
