// Softmax attention and its gradients, float32. One thread takes one head of keys of one sequence, with all its queries,
// from beginning to end: nothing is added up across threads, so no bit depends on them.
//
// Queries, keys and values are first copied into rows of whole vectors (rotated, queries scaled), keys and values also
// transposed by panels, so that every product is a sum of ROWS × PANEL tiles which stay in registers. A row of queries
// knows the first and the last key it sees (`Reach`), and tiles outside it are left out.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "vectors.h"

namespace {

constexpr int64_t ROWS = 6;              // of a tile: 6 × 2 sums, 2 vectors and a factor fill 15 of 16 registers
constexpr int64_t PANEL = 2 * LANES;     // columns of a tile
constexpr int64_t QUERIES = 16 * ROWS;   // of a block in the backward pass, whose weights stay in the cache
constexpr int64_t KEYS = 2 * 96;         // as many keys: a multiple of ROWS and of PANEL

// What native.py writes down, in its order. Strides count floats between sequences, positions and heads.
struct Shape {
    int64_t sequences, queries, keys, heads, groups, width, rotary, values;
    int64_t q[3], k[3], v[3], key[3], grad_out[3], grad_k[3], grad_v[3];
};

// The keys [first, end) that a query sees, and whether some between them are hidden.
struct Reach {
    int64_t first, end, holes;
};

struct Rotation {
    const float *cos, *sin;  // (B, S, R/2)
};

int64_t rounded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

struct Free {
    void operator()(float *at) const { ::operator delete(at, std::align_val_t(64)); }
};
typedef std::unique_ptr<float[], Free> Floats;

Floats floats(int64_t size) {
    return Floats(static_cast<float *>(::operator new(size * sizeof(float), std::align_val_t(64))));
}

// c (ROWS × PANEL) = or += Σₜ a[·, t] b[t, ·] over `inner` terms, in order.
template <bool ADDS>
inline void tile(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_step, int64_t inner, float *c,
                 int64_t c_row) {
    Vector sums[ROWS][2];
#pragma GCC unroll 6
    for (int64_t i = 0; i < ROWS; i++) {
        sums[i][0] = ADDS ? load(c + i * c_row) : Vector{};
        sums[i][1] = ADDS ? load(c + i * c_row + LANES) : Vector{};
    }
    for (int64_t t = 0; t < inner; t++, a += a_step, b += b_step) {
        const Vector left = load(b), right = load(b + LANES);
#pragma GCC unroll 6
        for (int64_t i = 0; i < ROWS; i++) {
            sums[i][0] += a[i * a_row] * left;
            sums[i][1] += a[i * a_row] * right;
        }
    }
#pragma GCC unroll 6
    for (int64_t i = 0; i < ROWS; i++) {
        store(c + i * c_row, sums[i][0]);
        store(c + i * c_row + LANES, sums[i][1]);
    }
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
inline void rotate(const float *__restrict from, const float *__restrict cos, const float *__restrict sin, int64_t width,
                   float by, float *__restrict to) {
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

// What one thread works with: the keys and values of one head.
struct Head {
    const Shape &shape;
    const int64_t wide, line, value_line;  // a query's width, and of rows filled up to whole panels
    const int64_t keys, queries;           // filled up to whole panels, and tiles
    Floats k, v, k_columns, v_columns;
    const Reach *reach = nullptr;
    const uint8_t *mask = nullptr;

    explicit Head(const Shape &s)
        : shape(s), wide(s.width + s.rotary), line(rounded(wide, PANEL)), value_line(rounded(s.values, PANEL)),
          keys(rounded(s.keys, PANEL)), queries(rounded(s.queries, ROWS)), k(floats(keys * line)),
          v(floats(keys * value_line)), k_columns(floats(keys * wide)), v_columns(floats(keys * s.values)) {}

    void take(int64_t b, int64_t g, const float *from_k, const float *from_v, const float *key, Rotation turn) {
        const Shape &s = shape;
        copy_rows(from_k + b * s.k[0] + g * s.k[2], s.k[1], 1, s.keys, s.width, keys, line, k.get());
        if (s.rotary)
            for (int64_t j = 0; j < s.keys; j++) {
                const int64_t at = (b * s.keys + j) * (s.rotary / 2);
                const float *of = key + b * s.key[0] + j * s.key[1];
                rotate(of, turn.cos + at, turn.sin + at, s.rotary, 1, k.get() + j * line + s.width);
            }
        copy_rows(from_v + b * s.v[0] + g * s.v[2], s.v[1], 1, s.keys, s.values, keys, value_line, v.get());
        transpose(k.get(), line, keys, wide, k_columns.get());
    }

    // Query rows [begin, end) of the padded ones, scaled.
    void take_queries(int64_t b, int64_t h, int64_t begin, int64_t end, const float *q, Rotation turn, float scale,
                      float *to) const {
        const Shape &s = shape;
        const float *from = q + b * s.q[0] + begin * s.q[1] + h * s.q[2];
        const int64_t real = std::min(end, s.queries) - begin;
        copy_rows(from, s.q[1], scale, real, s.width, end - begin, line, to);
        for (int64_t i = 0; i < real; i++) {
            const float *row = from + i * s.q[1] + s.width;
            const int64_t at = (b * s.queries + begin + i) * (s.rotary / 2);
            if (s.rotary) rotate(row, turn.cos + at, turn.sin + at, s.rotary, scale, to + i * line + s.width);
        }
    }

    // The keys [begin, end) of whole panels that queries of the tile see among [from, to).
    void seen(int64_t tile_begin, int64_t from, int64_t to, int64_t &begin, int64_t &end) const {
        begin = to, end = from;
        for (int64_t i = tile_begin; i < std::min(tile_begin + ROWS, shape.queries); i++)
            if (reach[i].end > reach[i].first) {
                begin = std::min(begin, reach[i].first);
                end = std::max(end, reach[i].end);
            }
        begin = std::max(from, begin / PANEL * PANEL);
        end = std::min(to, rounded(end, PANEL));
        if (end <= begin) begin = end = from;
    }

    // Scores of a query for keys [begin, end), which start at `row`; those that it does not see become −∞.
    void hide(int64_t query, int64_t begin, int64_t end, float *row) const {
        const Reach r = query < shape.queries ? reach[query] : Reach{0, 0, 0};
        const int64_t first = std::clamp(r.first, begin, end), last = std::clamp(r.end, first, end);
        for (int64_t j = begin; j < first; j++) row[j - begin] = -INFINITY;
        for (int64_t j = last; j < end; j++) row[j - begin] = -INFINITY;
        if (!r.holes) return;
        for (int64_t j = first; j < last; j++)
            if (!mask[query * shape.keys + j]) row[j - begin] = -INFINITY;
    }
};

// The row becomes exp(row − its largest); the sum of it, and log Σ exp of what it was.
float softmax(float *row, int64_t count, float &log_sum) {
    Vector most = all(-INFINITY), total = {};
    for (int64_t j = 0; j < count; j += LANES) most = larger(load(row + j), most);
    const float top = largest(most);
    for (int64_t j = 0; j < count; j += LANES) {
        const Vector weight = exponential_of_low(load(row + j) - top);
        store(row + j, weight);
        total += weight;
    }
    const float whole = sum(total);
    log_sum = top + std::log(whole);
    return whole;
}

}  // namespace

extern "C" {

// reach (B, S, 3) of a mask (B, S, keys), or without one of queries that see the keys up to their own.
void attention_reach(const uint8_t *mask, int64_t *reach, int64_t sequences, int64_t queries, int64_t keys,
                     int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < sequences * queries; row++) {
        int64_t *of = reach + row * 3;
        if (!mask) {
            of[0] = 0, of[1] = std::min(row % queries + 1, keys), of[2] = 0;
            continue;
        }
        const uint8_t *bytes = mask + row * keys;
        int64_t first = 0, end = keys, count = 0;
        while (first < keys && !bytes[first]) first++;
        while (end > first && !bytes[end - 1]) end--;
        for (int64_t j = first; j < end; j++) count += bytes[j];
        of[0] = first, of[1] = end, of[2] = count != end - first;
    }
}

// out (B, S, H, W) and log Σ exp of the scores (B, H, S); a query that sees nothing has zeros and ∞.
void attention_forward(const int64_t *sizes, const float *q, const float *k, const float *v, const float *key,
                       const float *cos, const float *sin, const uint8_t *mask, const int64_t *reach, float *out,
                       float *log_sums, double scale, int64_t threads) {
    const Shape &s = *reinterpret_cast<const Shape *>(sizes);
    const Rotation turn{cos, sin};
#pragma omp parallel num_threads(threads)
    {
        Head head(s);
        const int64_t score_line = head.keys + PANEL;  // past a power of two, whose rows would share a set of the cache
        const Floats queries = floats(ROWS * head.line), scores = floats(ROWS * score_line);
        const Floats sums = floats(ROWS * head.value_line);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < s.sequences * s.groups; item++) {
            const int64_t b = item / s.groups, g = item % s.groups, shared = s.heads / s.groups;
            head.take(b, g, k, v, key, turn);
            head.reach = reinterpret_cast<const Reach *>(reach) + b * s.queries;
            head.mask = mask + b * s.queries * s.keys;
            for (int64_t h = g * shared; h < (g + 1) * shared; h++)
                for (int64_t i = 0; i < s.queries; i += ROWS) {
                    int64_t begin, end;
                    head.seen(i, 0, head.keys, begin, end);
                    head.take_queries(b, h, i, i + ROWS, q, turn, scale, queries.get());
                    for (int64_t j = begin; j < end; j += PANEL)
                        tile<false>(queries.get(), head.line, 1, head.k_columns.get() + j * head.wide, PANEL, head.wide,
                                    scores.get() + j, score_line);
                    float part[ROWS] = {};
                    for (int64_t r = 0; r < ROWS; r++) {
                        float *row = scores.get() + r * score_line + begin, log_sum = INFINITY;
                        head.hide(i + r, begin, end, row);
                        if (i + r < s.queries && head.reach[i + r].end > head.reach[i + r].first)
                            part[r] = 1 / softmax(row, end - begin, log_sum);
                        else
                            std::fill(row, row + (end - begin), 0.0f);
                        if (i + r < s.queries) log_sums[(b * s.heads + h) * s.queries + i + r] = log_sum;
                    }
                    for (int64_t w = 0; w < head.value_line; w += PANEL)
                        tile<false>(scores.get() + begin, score_line, 1, head.v.get() + begin * head.value_line + w,
                                    head.value_line, end - begin, sums.get() + w, head.value_line);
                    for (int64_t r = 0; r < std::min(ROWS, s.queries - i); r++) {
                        float *to = out + ((b * s.queries + i + r) * s.heads + h) * s.values;
                        scaled(sums.get() + r * head.value_line, part[r], s.values, to);
                    }
                }
        }
    }
}

// Gradients of q (B, S, H, N + R), of k and v with the strides given, and of the rotated key from each head,
// (B, G, keys, R). With P = softmax: dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP − Σ dO ∘ O), dQ = dS K, dK = dSᵀ Q.
void attention_backward(const int64_t *sizes, const float *q, const float *k, const float *v, const float *key,
                        const float *cos, const float *sin, const uint8_t *mask, const int64_t *reach, const float *out,
                        const float *log_sums, const float *grad_out, float *grad_q, float *grad_k, float *grad_v,
                        float *grad_key, double scale, int64_t threads) {
    const Shape &s = *reinterpret_cast<const Shape *>(sizes);
    const Rotation turn{cos, sin};
#pragma omp parallel num_threads(threads)
    {
        Head head(s);
        const int64_t line = head.line, value_line = head.value_line, rows = head.keys + KEYS;
        const Floats queries = floats(head.queries * line), slopes = floats(head.queries * line);
        const Floats grads = floats(head.queries * value_line), delta = floats(head.queries);
        const Floats weights = floats(QUERIES * KEYS), scores = floats(QUERIES * KEYS);
        const Floats key_slopes = floats(rows * line), value_slopes = floats(rows * value_line);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < s.sequences * s.groups; item++) {
            const int64_t b = item / s.groups, g = item % s.groups, shared = s.heads / s.groups;
            head.take(b, g, k, v, key, turn);
            transpose(head.v.get(), value_line, head.keys, s.values, head.v_columns.get());
            head.reach = reinterpret_cast<const Reach *>(reach) + b * s.queries;
            head.mask = mask + b * s.queries * s.keys;
            std::fill_n(key_slopes.get(), rows * line, 0.0f);
            std::fill_n(value_slopes.get(), rows * value_line, 0.0f);
            for (int64_t h = g * shared; h < (g + 1) * shared; h++) {
                const float *log_sum = log_sums + (b * s.heads + h) * s.queries;
                head.take_queries(b, h, 0, head.queries, q, turn, scale, queries.get());
                copy_rows(grad_out + b * s.grad_out[0] + h * s.grad_out[2], s.grad_out[1], 1, s.queries, s.values,
                          head.queries, value_line, grads.get());
                std::fill_n(slopes.get(), head.queries * line, 0.0f);
                for (int64_t i = 0; i < s.queries; i++) {
                    const float *of = out + ((b * s.queries + i) * s.heads + h) * s.values;
                    delta[i] = product(of, grads.get() + i * value_line, s.values);
                }
                for (int64_t q0 = 0; q0 < head.queries; q0 += QUERIES)
                    for (int64_t k0 = 0; k0 < head.keys; k0 += KEYS) {
                        const int64_t q1 = std::min(q0 + QUERIES, head.queries), k1 = std::min(k0 + KEYS, head.keys);
                        int64_t low = k1, high = k0, begins[QUERIES / ROWS], ends[QUERIES / ROWS];
                        for (int64_t i = q0; i < q1; i += ROWS) {
                            int64_t &begin = begins[(i - q0) / ROWS], &end = ends[(i - q0) / ROWS];
                            head.seen(i, k0, k1, begin, end);
                            float *p = weights.get() + (i - q0) * KEYS, *ds = scores.get() + (i - q0) * KEYS;
                            if (begin == end) continue;
                            low = std::min(low, begin), high = std::max(high, end);
                            for (int64_t j = begin; j < end; j += PANEL) {
                                tile<false>(queries.get() + i * line, line, 1, head.k_columns.get() + j * head.wide,
                                            PANEL, head.wide, p + j - k0, KEYS);
                                tile<false>(grads.get() + i * value_line, value_line, 1,
                                            head.v_columns.get() + j * s.values, PANEL, s.values, ds + j - k0, KEYS);
                            }
                            for (int64_t r = 0; r < ROWS; r++, p += KEYS, ds += KEYS) {
                                head.hide(i + r, begin, end, p + begin - k0);
                                const bool real = i + r < s.queries;
                                const float whole = real ? log_sum[i + r] : INFINITY, mean = real ? delta[i + r] : 0;
                                for (int64_t j = begin - k0; j < end - k0; j += LANES) {
                                    const Vector weight = exponential_of_low(load(p + j) - whole);
                                    store(p + j, weight);
                                    store(ds + j, weight * (load(ds + j) - mean));
                                }
                            }
                            ds = scores.get() + (i - q0) * KEYS + begin - k0;
                            for (int64_t n = 0; n < line; n += PANEL)
                                tile<true>(ds, KEYS, 1, head.k.get() + begin * line + n, line, end - begin,
                                           slopes.get() + i * line + n, line);
                        }
                        if (high <= low) continue;
                        for (int64_t i = q0; i < q1; i++) {  // the tiles of keys below are not those of the queries
                            const int64_t begin = begins[(i - q0) / ROWS], end = ends[(i - q0) / ROWS];
                            for (float *row : {weights.get() + (i - q0) * KEYS, scores.get() + (i - q0) * KEYS}) {
                                std::fill(row, row + (begin - k0), 0.0f);
                                std::fill(row + (end - k0), row + KEYS, 0.0f);
                            }
                        }
                        for (int64_t j = low / ROWS * ROWS; j < high; j += ROWS) {
                            int64_t first = q1, last = q0;
                            for (int64_t i = q0; i < q1; i += ROWS)
                                if (begins[(i - q0) / ROWS] < j + ROWS && ends[(i - q0) / ROWS] > j) {
                                    first = std::min(first, i);
                                    last = std::min(i + ROWS, s.queries);
                                }
                            if (last <= first) continue;
                            const int64_t at = (first - q0) * KEYS + j - k0;
                            for (int64_t w = 0; w < value_line; w += PANEL)
                                tile<true>(weights.get() + at, 1, KEYS, grads.get() + first * value_line + w, value_line,
                                           last - first, value_slopes.get() + j * value_line + w, value_line);
                            for (int64_t n = 0; n < line; n += PANEL)
                                tile<true>(scores.get() + at, 1, KEYS, queries.get() + first * line + n, line,
                                           last - first, key_slopes.get() + j * line + n, line);
                        }
                    }
                for (int64_t i = 0; i < s.queries; i++) {
                    const float *row = slopes.get() + i * line;
                    float *to = grad_q + ((b * s.queries + i) * s.heads + h) * head.wide;
                    scaled(row, scale, s.width, to);
                    const int64_t at = (b * s.queries + i) * (s.rotary / 2);
                    if (s.rotary) rotate_back(row + s.width, cos + at, sin + at, s.rotary, scale, to + s.width);
                }
            }
            for (int64_t j = 0; j < s.keys; j++) {
                const float *row = key_slopes.get() + j * line, *value_row = value_slopes.get() + j * value_line;
                scaled(row, 1, s.width, grad_k + b * s.grad_k[0] + j * s.grad_k[1] + g * s.grad_k[2]);
                scaled(value_row, 1, s.values, grad_v + b * s.grad_v[0] + j * s.grad_v[1] + g * s.grad_v[2]);
                const int64_t at = (b * s.keys + j) * (s.rotary / 2);
                float *to = grad_key + ((b * s.groups + g) * s.keys + j) * s.rotary;
                if (s.rotary) rotate_back(row + s.width, cos + at, sin + at, s.rotary, 1, to);
            }
        }
    }
}
}
