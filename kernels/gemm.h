// Products of matrices by one thread, from parts that need not lie side by side. Written for operands of a few hundred
// rows: a panel of b (16 columns) is packed and stays in the first cache while the rows of a, which are read where they
// lie, come from the second.
#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

constexpr int64_t TILE_ROWS = 6;          // with two vectors of columns: twelve sums, of sixteen registers
constexpr int64_t TILE_COLUMNS = 2 * LANES;
constexpr int64_t DEPTH = 256;            // of a panel: 16 KiB of eight lanes
constexpr int64_t BLOCK_ROWS = 48 * TILE_ROWS;  // of a, at most: 288 KiB of a panel's depth

// Rows of each of as few blocks as there can be, as even as whole tiles are; their number a multiple of `times`, if
// there are rows for that.
static inline int64_t block_rows(int64_t rows, int64_t times = 1) {
    const int64_t least = std::max<int64_t>(1, (rows + BLOCK_ROWS - 1) / BLOCK_ROWS);
    const int64_t blocks = (least + times - 1) / times * times;
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    return std::max<int64_t>(1, (tiles + blocks - 1) / blocks) * TILE_ROWS;
}

// Element (i, j) is at from[order[i] * row + depth_order[j] * column], where no order stands for 0, 1, 2, …
struct Matrix {
    const float *from;
    int64_t row, column = 1;
    const int64_t *order = nullptr, *depth_order = nullptr;

    const float *at(int64_t i) const { return from + (order ? order[i] : i) * row; }
};

struct Panel {
    alignas(64) float at[DEPTH * TILE_COLUMNS];
};

typedef float Eight __attribute__((vector_size(32)));

// Eight rows of eight, as eight columns.
static inline void transpose(const float *const *rows, float *to, int64_t stride) {
    Eight r[8], t[8];
    for (int i = 0; i < 8; i++) std::memcpy(&r[i], rows[i], 32);
    for (int i = 0; i < 4; i++) {
        t[2 * i] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        t[2 * i + 1] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < 2; i++) {
            r[4 * h + i] = __builtin_shufflevector(t[4 * h + i], t[4 * h + i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            r[4 * h + i + 2] = __builtin_shufflevector(t[4 * h + i], t[4 * h + i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        t[i + 4] = __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 8; i++) std::memcpy(to + i * stride, &t[i], 32);
}

// Rows [k0, k0 + depth) and columns [j0, j0 + columns) of b; missing columns are zero.
static inline void pack(Panel &panel, const Matrix &b, int64_t k0, int64_t depth, int64_t j0, int64_t columns) {
    if (columns < TILE_COLUMNS) std::memset(panel.at, 0, depth * TILE_COLUMNS * sizeof(float));
    if (b.column == 1 && columns == TILE_COLUMNS) {
        for (int64_t k = 0; k < depth; k++)
            std::memcpy(panel.at + k * TILE_COLUMNS, b.at(k0 + k) + j0, TILE_COLUMNS * sizeof(float));
        return;
    }
    if (b.row == 1 && columns == TILE_COLUMNS) {  // columns that lie one behind the other
        int64_t k = 0;
        for (; k + 8 <= depth; k += 8)
            for (int64_t j = 0; j < TILE_COLUMNS; j += 8) {
                const float *rows[8];
                for (int64_t i = 0; i < 8; i++) rows[i] = b.from + (j0 + j + i) * b.column + k0 + k;
                transpose(rows, panel.at + k * TILE_COLUMNS + j, TILE_COLUMNS);
            }
        for (; k < depth; k++)
            for (int64_t j = 0; j < TILE_COLUMNS; j++)
                panel.at[k * TILE_COLUMNS + j] = b.from[(j0 + j) * b.column + k0 + k];
        return;
    }
    for (int64_t k = 0; k < depth; k++)
        for (int64_t j = 0; j < columns; j++)
            panel.at[k * TILE_COLUMNS + j] = b.at(k0 + k)[(j0 + j) * b.column];
}

// A tile of c, (TILE_ROWS, TILE_COLUMNS): a's rows, `stride` between the numbers of one, times a panel; added to what is
// there or written over it.
static inline void tile(
    const float *const *a, int64_t stride, const float *panel, int64_t depth, float *c, int64_t c_row, bool add
) {
    Vector s[TILE_ROWS][2];
    for (int64_t i = 0; i < TILE_ROWS; i++)
        for (int64_t v = 0; v < 2; v++) s[i][v] = add ? load(c + i * c_row + v * LANES) : Vector{};
    const float *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];
    for (int64_t at = 0; at < depth * stride; at += stride) {
        const Vector b0 = load(panel), b1 = load(panel + LANES);
        panel += TILE_COLUMNS;
        Vector x;
        x = all(a0[at]); s[0][0] += x * b0; s[0][1] += x * b1;
        x = all(a1[at]); s[1][0] += x * b0; s[1][1] += x * b1;
        x = all(a2[at]); s[2][0] += x * b0; s[2][1] += x * b1;
        x = all(a3[at]); s[3][0] += x * b0; s[3][1] += x * b1;
        x = all(a4[at]); s[4][0] += x * b0; s[4][1] += x * b1;
        x = all(a5[at]); s[5][0] += x * b0; s[5][1] += x * b1;
    }
    for (int64_t i = 0; i < TILE_ROWS; i++)
        for (int64_t v = 0; v < 2; v++) store(c + i * c_row + v * LANES, s[i][v]);
}

// A block of a, whose columns lie apart, in strips of TILE_ROWS: (strip, depth, TILE_ROWS), missing rows zero.
static inline void pack_strips(
    std::vector<float> &strips, const Matrix &a, int64_t i0, int64_t rows, int64_t k0, int64_t depth
) {
    strips.resize(BLOCK_ROWS * DEPTH);
    for (int64_t k = 0; k < depth; k++) {
        const float *from = a.from + (a.depth_order ? a.depth_order[k0 + k] : k0 + k) * a.column;
        for (int64_t i = 0; i < rows; i += TILE_ROWS) {
            float *to = strips.data() + i * depth + k * TILE_ROWS;
            if (a.row == 1 && i + TILE_ROWS <= rows)
                std::memcpy(to, from + i0 + i, TILE_ROWS * sizeof(float));
            else
                for (int64_t r = 0; r < TILE_ROWS; r++) to[r] = i + r < rows ? from[(i0 + i + r) * a.row] : 0.0f;
        }
    }
}

// c (rows, columns), its rows `c_row` apart, = a (rows, depth) · b (depth, columns), or that added to it.
static inline void product(
    const Matrix &a, const Matrix &b, float *c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth,
    bool add = false
) {
    static thread_local std::vector<float> strips;
    const bool apart = a.column != 1 || a.depth_order != nullptr;
    Panel panel;
    if (depth == 0 && !add)
        for (int64_t i = 0; i < rows; i++) std::memset(c + i * c_row, 0, columns * sizeof(float));
    const int64_t most = block_rows(rows);
    for (int64_t i0 = 0; i0 < rows; i0 += most)
        for (int64_t k0 = 0; k0 < depth; k0 += DEPTH) {
            const int64_t here = std::min(DEPTH, depth - k0), block = std::min(most, rows - i0);
            const bool more = add || k0 > 0;
            if (apart) pack_strips(strips, a, i0, block, k0, here);
            for (int64_t j = 0; j < columns; j += TILE_COLUMNS) {
                const int64_t wide = std::min(TILE_COLUMNS, columns - j);
                pack(panel, b, k0, here, j, wide);
                for (int64_t i = 0; i < block; i += TILE_ROWS) {
                    const int64_t high = std::min(TILE_ROWS, block - i);
                    const float *starts[TILE_ROWS];
                    for (int64_t r = 0; r < TILE_ROWS; r++)
                        starts[r] = apart ? strips.data() + i * here + r : a.at(i0 + i + std::min(r, high - 1)) + k0;
                    float *to = c + (i0 + i) * c_row + j;
                    if (high == TILE_ROWS && wide == TILE_COLUMNS) {
                        tile(starts, apart ? TILE_ROWS : 1, panel.at, here, to, c_row, more);
                        continue;
                    }
                    float edge[TILE_ROWS * TILE_COLUMNS];
                    tile(starts, apart ? TILE_ROWS : 1, panel.at, here, edge, TILE_COLUMNS, false);
                    for (int64_t r = 0; r < high; r++)
                        for (int64_t w = 0; w < wide; w++)
                            to[r * c_row + w] = (more ? to[r * c_row + w] : 0.0f) + edge[r * TILE_COLUMNS + w];
                }
            }
        }
}
