// Products of matrices by one thread, from parts that need not lie side by side. Written for operands of a few hundred
// rows: a panel of b (two or four vectors of columns) is packed and stays in the first cache, or near it, while the rows of
// a come from the second: where they lie, if they lie in order, are taken as they are and serve few columns, else packed as
// well. `Kind` is Exact or Rounded.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "operands.h"

constexpr int64_t TILE_ROWS = 6;          // with two vectors of columns: twelve sums, of sixteen registers
constexpr int64_t TILE_COLUMNS = 2 * LANES;
constexpr int64_t WIDE_TILE = TILE_VECTORS * LANES;  // where there are columns for it: the same sums, to the bit
constexpr int64_t DEPTH = 256;            // terms of a panel: 16 KiB of two vectors of eight lanes, 64 of four of sixteen
constexpr int64_t CACHE_LINE = 16;        // floats
// From so many columns on they repay the packing of a block of a that could be read as it lies: rows a power of two apart
// evict each other from the second cache, for which tiles of four vectors would wait.
constexpr int64_t PACKED_COLUMNS = 8 * TILE_COLUMNS;
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

template <typename Kind>
struct Panel {
    alignas(64) typename Kind::Number at[DEPTH / Kind::STEP * WIDE_TILE];
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

// Rows [k0, k0 + depth) and columns [j0, j0 + columns) of b, a panel of WIDE columns; missing ones are zero.
template <typename Kind, int64_t WIDE>
static inline void pack(Panel<Kind> &panel, const Matrix &b, int64_t k0, int64_t depth, int64_t j0, int64_t columns) {
    constexpr int64_t STEP = Kind::STEP;
    const int64_t count = numbers_of<Kind>(depth);
    if (b.column == 1 && columns == WIDE) {
        for (int64_t n = 0; n < count; n++) {
            const bool two = (n + 1) * STEP <= depth;
            const float *first = b.at(k0 + n * STEP) + j0, *second = two ? b.at(k0 + n * STEP + STEP - 1) + j0 : nullptr;
            for (int64_t j = 0; j < WIDE; j += LANES) {
                const auto made = Kind::made(load(first + j), two ? load(second + j) : Vector{});
                std::memcpy(panel.at + n * WIDE + j, &made, sizeof made);
            }
        }
        return;
    }
    if (columns < WIDE) std::memset(panel.at, 0, count * WIDE * sizeof(panel.at[0]));
    int64_t n = 0;
    if (b.row == 1 && columns == WIDE) {  // columns that lie one behind the other
        typename Kind::Number lines[8][LANES];
        const float *rows[8];
        for (; (n + LANES) * STEP <= depth; n += LANES)
            for (int64_t j = 0; j < WIDE; j += 8) {
                for (int64_t i = 0; i < 8; i++) {
                    const auto made = Kind::row(b.from + (j0 + j + i) * b.column + k0 + n * STEP);
                    std::memcpy(lines[i], &made, sizeof made);
                }
                for (int64_t part = 0; part < LANES; part += 8) {
                    for (int64_t i = 0; i < 8; i++) rows[i] = reinterpret_cast<const float *>(lines[i] + part);
                    float *to = reinterpret_cast<float *>(panel.at + (n + part) * WIDE + j);
                    transpose(rows, to, WIDE);
                }
            }
    }
    for (; n < count; n++) {
        const bool two = (n + 1) * STEP <= depth;
        const float *first = b.at(k0 + n * STEP), *second = two ? b.at(k0 + n * STEP + STEP - 1) : nullptr;
        for (int64_t j = 0; j < columns; j++)
            panel.at[n * WIDE + j] =
                Kind::made(first[(j0 + j) * b.column], two ? second[(j0 + j) * b.column] : 0.0f);
    }
}

// s += a's rows, `stride` between the numbers of one, times a panel; the sums stay in registers.
template <typename Kind, int64_t ROWS, int64_t VECTORS>
static inline __attribute__((always_inline)) void add_products(
    Vector (&s)[ROWS][VECTORS], const typename Kind::Number *const *a, int64_t stride, const typename Kind::Number *panel,
    int64_t count
) {
    const typename Kind::Number *rows[ROWS];
    std::memcpy(rows, a, sizeof rows);
    for (int64_t at = 0; at < count * stride; at += stride, panel += VECTORS * LANES) {
        typename Kind::Numbers b[VECTORS];
#pragma GCC unroll 4
        for (int64_t v = 0; v < VECTORS; v++) std::memcpy(&b[v], panel + v * LANES, sizeof b[v]);
#pragma GCC unroll 6
        for (int64_t i = 0; i < ROWS; i++) {
            const typename Kind::Numbers x = Kind::spread(rows[i][at]);
#pragma GCC unroll 4
            for (int64_t v = 0; v < VECTORS; v++) s[i][v] = Kind::add(s[i][v], x, b[v]);
        }
    }
}

// The last rows of a block, fewer than a tile has: the sum of the products is added last to what is there. (What sums in
// which order router/few_of_many.h repeats.)
template <typename Kind, int64_t ROWS, int64_t WIDE>
static inline void low_tile(
    const typename Kind::Number *const *a, int64_t stride, const typename Kind::Number *panel, int64_t count, float *c,
    int64_t c_row, bool add
) {
    constexpr int64_t VECTORS = WIDE / LANES;
    Vector s[ROWS][VECTORS] = {};
    add_products<Kind>(s, a, stride, panel, count);
#pragma GCC unroll 5
    for (int64_t i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int64_t v = 0; v < VECTORS; v++) {
            float *to = c + i * c_row + v * LANES;
            store(to, (add ? load(to) : Vector{}) + s[i][v]);
        }
}

template <typename Kind, int64_t WIDE>
static inline void low_tile_of(
    int64_t rows, const typename Kind::Number *const *a, int64_t stride, const typename Kind::Number *panel, int64_t count,
    float *c, int64_t c_row, bool add
) {
    static_assert(TILE_ROWS == 6);
    switch (rows) {
        case 1: return low_tile<Kind, 1, WIDE>(a, stride, panel, count, c, c_row, add);
        case 2: return low_tile<Kind, 2, WIDE>(a, stride, panel, count, c, c_row, add);
        case 3: return low_tile<Kind, 3, WIDE>(a, stride, panel, count, c, c_row, add);
        case 4: return low_tile<Kind, 4, WIDE>(a, stride, panel, count, c, c_row, add);
        default: return low_tile<Kind, 5, WIDE>(a, stride, panel, count, c, c_row, add);
    }
}

// A tile of c, (TILE_ROWS, WIDE): the sum begins with what is there, or with zero.
template <typename Kind, int64_t WIDE>
static inline void tile(
    const typename Kind::Number *const *a, int64_t stride, const typename Kind::Number *panel, int64_t count, float *c,
    int64_t c_row, bool add
) {
    constexpr int64_t VECTORS = WIDE / LANES;
    Vector s[TILE_ROWS][VECTORS];
#pragma GCC unroll 6
    for (int64_t i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 4
        for (int64_t v = 0; v < VECTORS; v++) s[i][v] = add ? load(c + i * c_row + v * LANES) : Vector{};
    add_products<Kind>(s, a, stride, panel, count);
#pragma GCC unroll 6
    for (int64_t i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 4
        for (int64_t v = 0; v < VECTORS; v++) store(c + i * c_row + v * LANES, s[i][v]);
}

// A block of a, packed: its rows one behind the other, `step` 1 between the numbers of a row; or, where a's columns lie
// apart, in strips of TILE_ROWS rows, (strip, count, TILE_ROWS), missing rows zero.
template <typename Kind>
struct Block {
    std::vector<typename Kind::Number> numbers;
    bool strips = false;
    int64_t count = 0;

    const typename Kind::Number *row(int64_t strip, int64_t r) const {
        return numbers.data() + (strips ? strip * count + r : (strip + r) * count);
    }
    int64_t step() const { return strips ? TILE_ROWS : 1; }

    void pack(const Matrix &a, int64_t i0, int64_t rows, int64_t k0, int64_t depth) {
        numbers.resize(BLOCK_ROWS * (DEPTH / Kind::STEP));
        count = numbers_of<Kind>(depth);
        strips = a.column != 1 || a.depth_order != nullptr;
        if (strips) return pack_strips(a, i0, rows, k0, depth);
        for (int64_t i = 0; i < rows; i++) pack_row<Kind>(a.at(i0 + i) + k0, depth, numbers.data() + i * count);
    }

  private:
    void pack_strips(const Matrix &a, int64_t i0, int64_t rows, int64_t k0, int64_t depth) {
        const auto column = [&](int64_t k) {
            return a.from + (a.depth_order ? a.depth_order[k0 + k] : k0 + k) * a.column + i0 * a.row;
        };
        typename Kind::Number line[BLOCK_ROWS + LANES];
        const int64_t tall = (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
        std::fill(line + rows, line + tall, 0);
        for (int64_t n = 0; n < count; n++) {
            const bool two = (n + 1) * Kind::STEP <= depth;
            const float *first = column(n * Kind::STEP), *second = two ? column(n * Kind::STEP + Kind::STEP - 1) : nullptr;
            int64_t i = 0;
            for (; a.row == 1 && i + LANES <= rows; i += LANES) {
                const auto made = Kind::made(load(first + i), two ? load(second + i) : Vector{});
                std::memcpy(line + i, &made, sizeof made);
            }
            for (; i < rows; i++) line[i] = Kind::made(first[i * a.row], two ? second[i * a.row] : 0.0f);
            for (i = 0; i < tall; i += TILE_ROWS)
                std::memcpy(numbers.data() + i * count + n * TILE_ROWS, line + i, TILE_ROWS * sizeof line[0]);
        }
    }
};

// A block's rows of a: where they lie, or packed.
template <typename Kind>
struct Rows {
    const Matrix &a;
    const Block<Kind> &packed;
    bool as_they_lie;
    int64_t first, count, column;  // the first of a's rows and their number, and the first of its columns

    int64_t step() const { return as_they_lie ? 1 : packed.step(); }

    // TILE_ROWS rows from i on, of which there are `high`.
    void find(int64_t i, int64_t high, const typename Kind::Number **starts) const {
        for (int64_t r = 0; r < TILE_ROWS; r++) {
            if constexpr (std::is_same_v<Kind, Exact>)
                if (as_they_lie) {
                    starts[r] = a.at(first + i + std::min(r, high - 1)) + column;
                    continue;
                }
            starts[r] = packed.row(i, packed.strips ? r : std::min(r, high - 1));
        }
    }
};

// `wide` columns of a block's rows of c, at most WIDE: its rows of a times a panel of b.
template <typename Kind, int64_t WIDE>
static inline void times_panel(
    const Rows<Kind> &rows, const typename Kind::Number *panel, int64_t count, int64_t wide, float *c, int64_t c_row,
    bool add
) {
    for (int64_t i = 0; i < rows.count; i += TILE_ROWS) {
        const int64_t high = std::min(TILE_ROWS, rows.count - i), step = rows.step();
        const typename Kind::Number *starts[TILE_ROWS];
        rows.find(i, high, starts);
        float *to = c + i * c_row;
        for (int64_t r = i + TILE_ROWS; r < std::min(i + 2 * TILE_ROWS, rows.count); r++)
            for (int64_t j = 0; j < wide; j += CACHE_LINE) __builtin_prefetch(c + r * c_row + j, 1);
        if (wide == WIDE) {
            if (high == TILE_ROWS)
                tile<Kind, WIDE>(starts, step, panel, count, to, c_row, add);
            else
                low_tile_of<Kind, WIDE>(high, starts, step, panel, count, to, c_row, add);
            continue;
        }
        float edge[TILE_ROWS * WIDE];
        tile<Kind, WIDE>(starts, step, panel, count, edge, WIDE, false);
        for (int64_t r = 0; r < high; r++)
            for (int64_t w = 0; w < wide; w++)
                to[r * c_row + w] = (add ? to[r * c_row + w] : 0.0f) + edge[r * WIDE + w];
    }
}

// c (rows, columns), its rows `c_row` apart, = a (rows, depth) · b (depth, columns), or that added to it.
template <typename Kind>
static void product(
    const Matrix &a, const Matrix &b, float *c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth,
    bool add
) {
    static thread_local Block<Kind> packed;
    Panel<Kind> panel;
    if (depth == 0 && !add)
        for (int64_t i = 0; i < rows; i++) std::memset(c + i * c_row, 0, columns * sizeof(float));
    const bool many = TILE_VECTORS > 2 && columns >= PACKED_COLUMNS;
    const bool as_they_lie = std::is_same_v<Kind, Exact> && a.column == 1 && a.depth_order == nullptr && !many;
    const int64_t most = block_rows(rows);
    for (int64_t i0 = 0; i0 < rows; i0 += most)
        for (int64_t k0 = 0; k0 < depth; k0 += DEPTH) {
            const int64_t here = std::min(DEPTH, depth - k0), count = numbers_of<Kind>(here);
            const Rows<Kind> block{a, packed, as_they_lie, i0, std::min(most, rows - i0), k0};
            const bool more = add || k0 > 0;
            if (!as_they_lie) packed.pack(a, i0, block.count, k0, here);
            for (int64_t j = 0; j < columns;) {
                float *to = c + i0 * c_row + j;
                if (columns - j >= WIDE_TILE) {
                    pack<Kind, WIDE_TILE>(panel, b, k0, here, j, WIDE_TILE);
                    times_panel<Kind, WIDE_TILE>(block, panel.at, count, WIDE_TILE, to, c_row, more);
                    j += WIDE_TILE;
                    continue;
                }
                const int64_t wide = std::min(TILE_COLUMNS, columns - j);
                pack<Kind, TILE_COLUMNS>(panel, b, k0, here, j, wide);
                times_panel<Kind, TILE_COLUMNS>(block, panel.at, count, wide, to, c_row, more);
                j += wide;
            }
        }
}

// The product of numbers as they are, or of those nearest to them in bfloat16.
typedef void (*Product)(const Matrix &, const Matrix &, float *, int64_t, int64_t, int64_t, int64_t, bool);

static inline Product product_of(int64_t rounded) { return rounded ? product<Rounded> : product<Exact>; }
