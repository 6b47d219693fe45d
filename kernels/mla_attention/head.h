// One head of attention as its products read it: rows of whole vectors, tiles of them, and what each query sees.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "vectors.h"

namespace {

constexpr int64_t ROWS = 6;           // of a tile: 6 × 2 sums, 2 vectors and a factor fill 15 of 16 registers
constexpr int64_t PANEL = 2 * LANES;  // columns of a tile, which may be two panels where there are more registers

constexpr int64_t CACHE_LINE = 16;    // floats
constexpr int64_t AHEAD = 8;          // rows that are asked for before they are read or written

// What native.py writes down, in its order. Strides are in floats, between sequences, positions and heads.
struct Shape {
    int64_t sequences, length, heads, groups, width, rotary, values;
    int64_t q[3], k[3], v[3], key[3], grad_out[3], grad_k[3], grad_v[3];
};

// The keys [first, end) that a query sees, and whether some between them are hidden.
struct Reach {
    int64_t first, end, holes;
};

struct Span {
    int64_t begin, end;
    bool empty() const { return end <= begin; }
};

// What both passes are given.
struct Call {
    const Shape &shape;
    const float *q, *k, *v, *key, *cos, *sin;  // angles (B, S, R/2)
    const uint8_t *mask;                       // (B, S, S), or none: no holes
    const Reach *reach;                        // (B, S)
    float scale;
};

int64_t rounded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

struct Free {
    void operator()(float *at) const { ::operator delete(at, std::align_val_t(64)); }
};
typedef std::unique_ptr<float[], Free> Floats;

Floats floats(int64_t size) {
    return Floats(static_cast<float *>(::operator new(size * sizeof(float), std::align_val_t(64))));
}

// What is summed: a[i · a_row + t · a_step] over `inner` terms with b, of which a term's columns begin b_step behind the
// last one's, and each PANEL of them `beside` behind the one before.
struct Sum {
    const float *a;
    int64_t a_row, a_step;
    const float *b;
    int64_t b_step, beside, inner;
};

// c (ROWS × PANELS · PANEL) = or += Σₜ a[·, t] b[t, ·], in order, from what is there on: a tile that is summed apart and then
// added, as the head's are (cross_entropy/tiles.h), has other bits.
template <bool ADDS, int64_t PANELS>
inline void tile(const Sum &of, float *c, int64_t c_row) {
    constexpr int64_t VECTORS = 2 * PANELS;
    Vector sums[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int64_t i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int64_t v = 0; v < VECTORS; v++) sums[i][v] = ADDS ? load(c + i * c_row + v * LANES) : Vector{};
    const float *a = of.a, *b = of.b;
    for (int64_t t = 0; t < of.inner; t++, a += of.a_step, b += of.b_step) {
        Vector row[VECTORS];
#pragma GCC unroll 4
        for (int64_t v = 0; v < VECTORS; v++) row[v] = load(b + v / 2 * of.beside + v % 2 * LANES);
#pragma GCC unroll 6
        for (int64_t i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int64_t v = 0; v < VECTORS; v++) sums[i][v] += a[i * of.a_row] * row[v];
    }
#pragma GCC unroll 6
    for (int64_t i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int64_t v = 0; v < VECTORS; v++) store(c + i * c_row + v * LANES, sums[i][v]);
}

// The same of so many columns, whole panels.
template <bool ADDS>
inline void tiles(Sum of, float *c, int64_t c_row, int64_t columns) {
    constexpr int64_t MOST = TILE_VECTORS / 2;
    int64_t j = 0;
    for (; j + MOST * PANEL <= columns; j += MOST * PANEL, of.b += MOST * of.beside) tile<ADDS, MOST>(of, c + j, c_row);
    for (; j < columns; j += PANEL, of.b += of.beside) tile<ADDS, 1>(of, c + j, c_row);
}

// Rows of a head lie too far apart for the processor to see which comes next.
inline void soon(const float *row, int64_t width) {
    for (int64_t j = 0; j < width; j += CACHE_LINE) __builtin_prefetch(row + j);
}

inline void soon_written(float *row, int64_t width) {
    for (int64_t j = 0; j < width; j += CACHE_LINE) __builtin_prefetch(row + j, 1);
}

inline void scaled(const float *from, float by, int64_t width, float *to) {
    for (int64_t j = 0; j < width; j += LANES) store(to + j, load(from + j, width - j) * by, width - j);
}

inline float product(const float *a, const float *b, int64_t width) {
    Vector sums = {};
    for (int64_t j = 0; j < width; j += LANES) sums += load(a + j, width - j) * load(b + j, width - j);
    return sum(sums);
}

// Interleaved pairs are rotated; the result is half-split, as the model's `rotate` has it.
inline void rotate(const float *__restrict from, const float *__restrict cos, const float *__restrict sin,
                   int64_t width, float by, float *__restrict to) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        const float even = from[2 * i] * by, odd = from[2 * i + 1] * by;
        to[i] = even * cos[i] - odd * sin[i];
        to[half + i] = odd * cos[i] + even * sin[i];
    }
}

inline void rotate_back(const float *__restrict from, const float *__restrict cos, const float *__restrict sin,
                        int64_t width, float by, float *__restrict to) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        const float first = from[i] * by, second = from[half + i] * by;
        to[2 * i] = first * cos[i] + second * sin[i];
        to[2 * i + 1] = second * cos[i] - first * sin[i];
    }
}

// `count` rows of `width` numbers, zeros behind them to `padded` rows of `line`.
inline void copy_rows(const float *from, int64_t stride, float by, int64_t count, int64_t width, int64_t padded,
                      int64_t line, float *to) {
    for (int64_t i = 0; i < padded; i++, to += line) {
        const int64_t real = i < count ? width : 0;
        if (i + AHEAD < count) soon(from + (i + AHEAD) * stride, width);
        scaled(from + i * stride, by, real, to);
        for (int64_t j = real; j < line; j++) to[j] = 0;
    }
}

// Rows by panels of keys: (panel, number of the row, PANEL).
void transpose(const float *rows, int64_t line, int64_t count, int64_t width, float *to) {
    for (int64_t panel = 0; panel < count; panel += PANEL, rows += PANEL * line)
        for (int64_t t = 0; t < width; t++, to += PANEL)
            for (int64_t j = 0; j < PANEL; j++) to[j] = rows[j * line + t];
}

// The keys and values of one head, and how its queries see them.
struct Head {
    const Call &call;
    const Shape &shape;
    const int64_t wide, line, value_line;  // numbers of a query, and of rows filled up to whole panels
    const int64_t keys, queries;           // filled up to whole panels, and to whole tiles
    int64_t sequence = 0;
    Floats k, v, k_columns, v_columns;

    explicit Head(const Call &c)
        : call(c), shape(c.shape), wide(shape.width + shape.rotary), line(rounded(wide, PANEL)),
          value_line(rounded(shape.values, PANEL)), keys(rounded(shape.length, PANEL)),
          queries(rounded(shape.length, ROWS)), k(floats(keys * line)), v(floats(keys * value_line)),
          k_columns(floats(keys * wide)), v_columns(floats(keys * shape.values)) {}

    int64_t angle(int64_t position) const { return (sequence * shape.length + position) * (shape.rotary / 2); }

    void take(int64_t b, int64_t g) {
        const Shape &s = shape;
        sequence = b;
        copy_rows(call.k + b * s.k[0] + g * s.k[2], s.k[1], 1, s.length, s.width, keys, line, k.get());
        for (int64_t j = 0; j < s.length && s.rotary; j++)
            rotate(call.key + b * s.key[0] + j * s.key[1], call.cos + angle(j), call.sin + angle(j), s.rotary, 1,
                   k.get() + j * line + s.width);
        copy_rows(call.v + b * s.v[0] + g * s.v[2], s.v[1], 1, s.length, s.values, keys, value_line, v.get());
        transpose(k.get(), line, keys, wide, k_columns.get());
    }

    // All queries of a head, scaled.
    void take_queries(int64_t h, float *to) const {
        const Shape &s = shape;
        const float *from = call.q + sequence * s.q[0] + h * s.q[2];
        copy_rows(from, s.q[1], call.scale, s.length, s.width, queries, line, to);
        for (int64_t i = 0; i < s.length && s.rotary; i++)
            rotate(from + i * s.q[1] + s.width, call.cos + angle(i), call.sin + angle(i), s.rotary, call.scale,
                   to + i * line + s.width);
    }

    Reach reach(int64_t query) const {
        return query < shape.length ? call.reach[sequence * shape.length + query] : Reach{0, 0, 0};
    }

    // What a tile of queries sees of the keys within `all`, in whole panels.
    Span seen(int64_t query, Span all) const {
        Span span = {all.end, all.begin};
        for (int64_t i = query; i < query + ROWS; i++) {
            const Reach r = reach(i);
            if (r.end <= r.first) continue;
            span.begin = std::min(span.begin, r.first);
            span.end = std::max(span.end, r.end);
        }
        span.begin = std::max(all.begin, span.begin / PANEL * PANEL);
        span.end = std::min(all.end, rounded(span.end, PANEL));
        return span.empty() ? Span{all.begin, all.begin} : span;
    }

    // Scores of a tile of queries, unmasked: `to` is where those of the first key of the span go.
    void scores(const float *rows, Span span, float *to, int64_t to_row) const {
        tiles<false>(
            {rows, line, 1, k_columns.get() + span.begin * wide, PANEL, PANEL * wide, wide}, to, to_row,
            span.end - span.begin
        );
    }

    // The scores of a query become −∞ where it does not see the key.
    void hide(int64_t query, Span span, float *row) const {
        const Reach r = reach(query);
        const int64_t first = std::clamp(r.first, span.begin, span.end), last = std::clamp(r.end, first, span.end);
        for (int64_t j = span.begin; j < first; j++) row[j - span.begin] = -INFINITY;
        for (int64_t j = last; j < span.end; j++) row[j - span.begin] = -INFINITY;
        if (!r.holes) return;
        const uint8_t *bytes = call.mask + (sequence * shape.length + query) * shape.length;
        for (int64_t j = first; j < last; j++)
            if (!bytes[j]) row[j - span.begin] = -INFINITY;
    }
};

}  // namespace
