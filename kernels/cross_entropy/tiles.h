// Tiles of the head's products: sums that stay in registers, and where their operands and results lie.
#pragma once

#include <algorithm>
#include <type_traits>

#include "operands.h"

namespace {

constexpr int64_t TALL = 6, WIDE = 2 * LANES;  // rows and columns of a tile

// Sums of so many tiles, one below the other or side by side: as many as registers have room for.
template <int64_t DOWN, int64_t ACROSS>
struct Tile {
    static constexpr int64_t ROWS = DOWN * TALL, VECTORS = ACROSS * 2;
    Vector at[ROWS][VECTORS];
};

// Where a product's operands lie: a's number (i, k) at a[i / TALL · below + i % TALL · row + k · step], b's (k, j) at
// b[j / WIDE · beside + k · pitch + j % WIDE].
template <typename Number>
struct Operands {
    const Number *a;
    int64_t below, row, step;
    const Number *b;
    int64_t beside, pitch;
};

// tile(i, j) = Σ_k a(i, k) · b(k, j), over so many numbers
template <typename Kind, int64_t DOWN, int64_t ACROSS>
inline __attribute__((always_inline)) Tile<DOWN, ACROSS> product(
    const Operands<typename Kind::Number> &of, int64_t count
) {
    Tile<DOWN, ACROSS> tile;
#pragma GCC unroll 12
    for (int64_t i = 0; i < tile.ROWS; i++)
#pragma GCC unroll 4
        for (int64_t v = 0; v < tile.VECTORS; v++) tile.at[i][v] = Vector{};
    const typename Kind::Number *a = of.a, *b = of.b;
    for (int64_t k = 0; k < count; k++, a += of.step, b += of.pitch) {
        typename Kind::Numbers column[tile.VECTORS];
#pragma GCC unroll 4
        for (int64_t v = 0; v < tile.VECTORS; v++)
            std::memcpy(&column[v], b + v / 2 * of.beside + v % 2 * LANES, sizeof column[v]);
#pragma GCC unroll 12
        for (int64_t i = 0; i < tile.ROWS; i++) {
            const typename Kind::Numbers x = Kind::spread(a[i / TALL * of.below + i % TALL * of.row]);
#pragma GCC unroll 4
            for (int64_t v = 0; v < tile.VECTORS; v++) tile.at[i][v] = Kind::add(tile.at[i][v], column[v], x);
        }
    }
    return tile;
}

// Calls each(i, j, DOWN, ACROSS), two constants, for all tiles of `rows`, a multiple of TALL, and `columns`, one of WIDE.
// Where TILE_VECTORS is 4 these are (1, 2); in a last odd WIDE of columns (2, 1), and (1, 1) for the rows left over.
template <typename Each>
inline void in_tiles(int64_t rows, int64_t columns, const Each &each) {
    typedef std::integral_constant<int64_t, 1> One;
    typedef std::integral_constant<int64_t, TILE_VECTORS / 2> Most;
    int64_t j = 0;
    for (; j + Most() * WIDE <= columns; j += Most() * WIDE)
        for (int64_t i = 0; i < rows; i += TALL) each(i, j, One(), Most());
    if (j == columns) return;
    int64_t i = 0;
    for (; i + Most() * TALL <= rows; i += Most() * TALL) each(i, j, Most(), One());
    for (; i < rows; i += TALL) each(i, j, One(), One());
}

template <int64_t DOWN, int64_t ACROSS>
inline void put(const Tile<DOWN, ACROSS> &tile, float *to, int64_t pitch) {
#pragma GCC unroll 12
    for (int64_t i = 0; i < tile.ROWS; i++)
#pragma GCC unroll 4
        for (int64_t v = 0; v < tile.VECTORS; v++) store(to + i * pitch + v * LANES, tile.at[i][v]);
}

template <int64_t DOWN, int64_t ACROSS>
inline void add(const Tile<DOWN, ACROSS> &tile, float *to, int64_t pitch) {
#pragma GCC unroll 12
    for (int64_t i = 0; i < tile.ROWS; i++)
#pragma GCC unroll 4
        for (int64_t v = 0; v < tile.VECTORS; v++) {
            float *place = to + i * pitch + v * LANES;
            store(place, load(place) + tile.at[i][v]);
        }
}

// The part of a tile that lies within the matrix.
template <int64_t DOWN, int64_t ACROSS>
void add_part(const Tile<DOWN, ACROSS> &tile, float *to, int64_t pitch, int64_t rows, int64_t columns) {
    constexpr int64_t LINE = ACROSS * WIDE;
    float whole[DOWN * TALL * LINE];
    put(tile, whole, LINE);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) to[i * pitch + j] += whole[i * LINE + j];
}

}  // namespace
