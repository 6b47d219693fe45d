// Products of few rows with a matrix whose rows have the depth side by side, as weights lie: nothing is packed, and each
// weight is read once. A result is a sum over the depth in an order of its own, whatever is computed beside it: what a row
// gives does not depend on how many others there are.
#pragma once

#include <algorithm>
#include <utility>

#include "vectors.h"

// Both vectors hold numbers in groups of 2·HALF lanes; what comes out holds the groups' lower halves plus their upper ones,
// those of a first. Four such steps (of 16 lanes) leave the sums of as many vectors as there are lanes, each added up in
// the same order.
template <int64_t HALF>
constexpr int64_t lane_of(int64_t j) {
    return j / (LANES / 2) * LANES + j % (LANES / 2) / HALF * 2 * HALF + j % HALF;
}

template <int64_t HALF, int64_t... J>
static inline Vector halves_added(Vector a, Vector b, std::integer_sequence<int64_t, J...>) {
    return __builtin_shufflevector(a, b, lane_of<HALF>(J)...) + __builtin_shufflevector(a, b, (lane_of<HALF>(J) + HALF)...);
}

// The sums of these vectors' numbers, as many as there are lanes.
template <int64_t HALF = LANES / 2>
static inline Vector totals(const Vector *v) {
    if constexpr (HALF == 0) {
        return v[0];
    } else {
        constexpr int64_t LEFT = HALF;  // vectors behind this step
        Vector added[LEFT];
        for (int64_t i = 0; i < LEFT; i++)
            added[i] = halves_added<HALF>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int64_t, LANES>{});
        return totals<HALF / 2>(added);
    }
}

typedef float Eight __attribute__((vector_size(32)));
typedef float Quad __attribute__((vector_size(16)));

static inline float total(Eight v) {
    Quad q = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
    q += __builtin_shufflevector(q, q, 2, 3, 0, 1);
    return q[0] + q[1];
}

#ifdef __AVX512F__
// The sum of a vector's numbers in that order.
static inline float total(Vector v) {
    return total(
        __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)
    );
}
#endif

// out[r][c] = x[r] · w[c], where w's rows are `w_row` apart; of the columns so many are kept. All are computed, the last
// one again where there are fewer: a compiler may round a lone sum otherwise (as a product and a sum).
template <int ROWS, int COLUMNS>
static inline void dots_tile(
    const float *const *x, const float *w, int64_t w_row, int64_t kept, int64_t depth, float *const *out,
    int64_t column, const float *ahead
) {
    constexpr bool TOGETHER = ROWS > 2;  // a sum at a time hides behind the weights' loads where these serve few rows
    Vector s[std::max<int64_t>(LANES, ROWS * COLUMNS)] = {};
    const float *from[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) from[c] = w + std::min<int64_t>(c, kept - 1) * w_row;
    const int64_t whole = depth / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
        if (ahead != nullptr && k % (2 * LANES) == 0)
            for (int c = 0; c < COLUMNS; c++) __builtin_prefetch(ahead + c * w_row + k);
        Vector a[ROWS];
        for (int r = 0; r < ROWS; r++) a[r] = load(x[r] + k);
        for (int c = 0; c < COLUMNS; c++) {
            const Vector b = load(from[c] + k);
            for (int r = 0; r < ROWS; r++) s[r * COLUMNS + c] += a[r] * b;
        }
    }
    if (whole < depth)
        for (int r = 0; r < ROWS; r++) {
            const Vector a = load(x[r] + whole, depth - whole);
            for (int c = 0; c < COLUMNS; c++) s[r * COLUMNS + c] += a * load(from[c] + whole, depth - whole);
        }
    const Vector sums = TOGETHER ? totals(s) : Vector{};
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS && c < kept; c++)
            out[r][column + c] = TOGETHER ? sums[r * COLUMNS + c] : total(s[r * COLUMNS + c]);
}

template <int ROWS>
static inline void dots_rows(
    const float *const *x, const float *w, int64_t w_row, int64_t columns, int64_t depth, float *const *out,
    const float *ahead
) {
    constexpr int WIDE = ROWS > 2 ? LANES / ROWS : ROWS == 2 ? 6 : 8;  // as many sums as registers have room for
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
