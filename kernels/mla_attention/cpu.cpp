// Softmax attention and its gradients, float32. One thread takes one head of keys of one sequence, with all its queries,
// from beginning to end: nothing is added up across threads, so no bit depends on them.
//
// Queries, keys and values are first copied into rows of whole vectors (rotated, queries scaled), keys and values also
// transposed by panels, so that every product is a sum of ROWS × PANEL tiles which stay in registers. A query knows the
// first and the last key it sees (`Reach`), and what lies outside is left out by whole tiles.
#include "mla_attention/head.h"

namespace {

constexpr int64_t QUERIES = 16 * ROWS;  // of a block in the backward pass, whose weights stay in the cache
constexpr int64_t KEYS = 2 * 96;        // as many keys: a multiple of ROWS and of PANEL

// The row becomes exp(row − its largest), and `log_sum` log Σ exp of what it was; returned is the sum of what it is.
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

// A thread's forward pass: a tile of queries has all its scores side by side.
struct Forward {
    Head head;
    const int64_t score_line;  // past a power of two, whose rows would share a set of the cache
    Floats queries, scores, sums;
    float *out, *log_sums;

    Forward(const Call &call, float *to, float *logs)
        : head(call), score_line(head.keys + PANEL), queries(floats(head.queries * head.line)),
          scores(floats(ROWS * score_line)), sums(floats(ROWS * head.value_line)), out(to), log_sums(logs) {}

    void run(int64_t h, int64_t query) {
        const Shape &s = head.shape;
        const Span span = head.seen(query, {0, head.keys});
        const int64_t count = span.end - span.begin;
        float *to = out + ((head.sequence * s.length + query) * s.heads + h) * s.values;
        for (int64_t r = 0; r < ROWS; r++) soon_written(to + r * s.heads * s.values, s.values);
        head.scores(queries.get() + query * head.line, span, scores.get(), score_line);
        float part[ROWS] = {};
        for (int64_t r = 0; r < ROWS; r++) {
            float *row = scores.get() + r * score_line, log_sum = INFINITY;
            const Reach reach = head.reach(query + r);
            head.hide(query + r, span, row);
            if (reach.end > reach.first)
                part[r] = 1 / softmax(row, count, log_sum);
            else
                std::fill_n(row, count, 0.0f);
            if (query + r < s.length) log_sums[(head.sequence * s.heads + h) * s.length + query + r] = log_sum;
        }
        tiles<false>(
            {scores.get(), score_line, 1, head.v.get() + span.begin * head.value_line, head.value_line, PANEL, count},
            sums.get(), head.value_line, head.value_line
        );
        for (int64_t r = 0; r < std::min(ROWS, s.length - query); r++)
            scaled(sums.get() + r * head.value_line, part[r], s.values,
                   to + r * s.heads * s.values);
    }
};

struct Gradients {
    float *q, *k, *v, *key;
};

// A thread's backward pass, block by block of queries and keys. With P = softmax: dV = Pᵀ dO, dP = dO Vᵀ,
// dS = P ∘ (dP − Σ dO ∘ O), dQ = dS K, dK = dSᵀ Q.
struct Backward {
    Head head;
    const Shape &shape;
    const float *out, *log_sums, *grad_out;
    const Gradients to;
    const int64_t line, value_line, key_rows;  // the last tile of keys may reach beyond them
    Floats queries, grads, delta, log_sum, weights, slopes, q_slopes, k_slopes, v_slopes;
    Span seen[QUERIES / ROWS];  // by the tiles of a block

    Backward(const Call &call, const float *o, const float *logs, const float *grad, Gradients gradients)
        : head(call), shape(call.shape), out(o), log_sums(logs), grad_out(grad), to(gradients), line(head.line),
          value_line(head.value_line), key_rows(head.keys + ROWS), queries(floats(head.queries * line)),
          grads(floats(head.queries * value_line)), delta(floats(head.queries)), log_sum(floats(head.queries)),
          weights(floats(QUERIES * KEYS)), slopes(floats(QUERIES * KEYS)), q_slopes(floats(head.queries * line)),
          k_slopes(floats(key_rows * line)), v_slopes(floats(key_rows * value_line)) {}

    void run(int64_t b, int64_t g) {
        const int64_t shared = shape.heads / shape.groups;
        head.take(b, g);
        transpose(head.v.get(), value_line, head.keys, shape.values, head.v_columns.get());
        std::fill_n(k_slopes.get(), key_rows * line, 0.0f);
        std::fill_n(v_slopes.get(), key_rows * value_line, 0.0f);
        for (int64_t h = g * shared; h < (g + 1) * shared; h++) {
            take_queries(h);
            for (int64_t query = 0; query < head.queries; query += QUERIES)
                for (int64_t key = 0; key < head.keys; key += KEYS) block(query, key);
            give_queries(h);
        }
        give_keys(g);
    }

    void take_queries(int64_t h) {
        const Shape &s = shape;
        const int64_t b = head.sequence;
        head.take_queries(h, queries.get());
        copy_rows(grad_out + b * s.grad_out[0] + h * s.grad_out[2], s.grad_out[1], 1, s.length, s.values, head.queries,
                  value_line, grads.get());
        std::fill_n(q_slopes.get(), head.queries * line, 0.0f);
        for (int64_t i = 0; i < head.queries; i++) {
            const float *row = out + ((b * s.length + i) * s.heads + h) * s.values;
            soon(row + AHEAD * s.heads * s.values, s.values);
            delta[i] = i < s.length ? product(row, grads.get() + i * value_line, s.values) : 0;
            log_sum[i] = i < s.length ? log_sums[(b * s.heads + h) * s.length + i] : INFINITY;
        }
    }

    void block(int64_t query, int64_t key) {
        const int64_t query_end = std::min(query + QUERIES, head.queries);
        const Span keys = {key, std::min(key + KEYS, head.keys)};
        Span met = {keys.end, keys.begin};
        for (int64_t i = query; i < query_end; i += ROWS) {
            const Span span = seen[(i - query) / ROWS] = head.seen(i, keys);
            if (span.empty()) continue;
            met = {std::min(met.begin, span.begin), std::max(met.end, span.end)};
        }
        if (met.empty()) return;
        for (int64_t i = query; i < query_end; i += ROWS)
            queries_of(i, (i - query) * KEYS, key, seen[(i - query) / ROWS]);
        for (int64_t j = met.begin / ROWS * ROWS; j < met.end; j += ROWS) keys_of(j, j - key, query, query_end);
    }

    // Weights and slopes of scores of a tile of queries, zero outside what it sees, and its part of dQ. `at` is where
    // the tile begins in the block.
    void queries_of(int64_t query, int64_t at, int64_t key, Span span) {
        const int64_t first = span.begin - key, last = span.end - key;
        for (int64_t r = 0; r < ROWS; r++)
            for (float *row : {weights.get() + at + r * KEYS, slopes.get() + at + r * KEYS}) {
                std::fill(row, row + first, 0.0f);
                std::fill(row + last, row + KEYS, 0.0f);
            }
        if (span.empty()) return;
        head.scores(queries.get() + query * line, span, weights.get() + at + first, KEYS);
        tiles<false>(
            {grads.get() + query * value_line, value_line, 1, head.v_columns.get() + (key + first) * shape.values, PANEL,
             PANEL * shape.values, shape.values},
            slopes.get() + at + first, KEYS, last - first
        );
        for (int64_t r = 0; r < ROWS; r++) {
            float *p = weights.get() + at + r * KEYS, *ds = slopes.get() + at + r * KEYS;
            head.hide(query + r, span, p + first);
            const float whole = log_sum[query + r], mean = delta[query + r];
            for (int64_t j = first; j < last; j += LANES) {
                const Vector weight = exponential_of_low(load(p + j) - whole);
                store(p + j, weight);
                store(ds + j, weight * (load(ds + j) - mean));
            }
        }
        tiles<true>(
            {slopes.get() + at + first, KEYS, 1, head.k.get() + span.begin * line, line, PANEL, last - first},
            q_slopes.get() + query * line, line, line
        );
    }

    // A block's part of dK and dV of a tile of keys, which begins in column `at` of the block.
    void keys_of(int64_t key, int64_t at, int64_t query, int64_t query_end) {
        Span by = {query_end, query};  // the queries that see some of it, in whole tiles
        for (int64_t i = query; i < query_end; i += ROWS) {
            const Span &span = seen[(i - query) / ROWS];
            if (span.begin >= key + ROWS || span.end <= key) continue;
            by = {std::min(by.begin, i), std::min(i + ROWS, shape.length)};
        }
        if (by.empty()) return;
        const int64_t from = (by.begin - query) * KEYS + at, count = by.end - by.begin;
        tiles<true>(
            {weights.get() + from, 1, KEYS, grads.get() + by.begin * value_line, value_line, PANEL, count},
            v_slopes.get() + key * value_line, value_line, value_line
        );
        tiles<true>(
            {slopes.get() + from, 1, KEYS, queries.get() + by.begin * line, line, PANEL, count},
            k_slopes.get() + key * line, line, line
        );
    }

    void give_queries(int64_t h) const {
        const float *cos = head.call.cos, *sin = head.call.sin;
        for (int64_t i = 0; i < shape.length; i++) {
            const float *row = q_slopes.get() + i * line;
            float *of = to.q + ((head.sequence * shape.length + i) * shape.heads + h) * head.wide;
            soon_written(of + AHEAD * shape.heads * head.wide, head.wide);
            scaled(row, head.call.scale, shape.width, of);
            if (shape.rotary)
                rotate_back(row + shape.width, cos + head.angle(i), sin + head.angle(i), shape.rotary, head.call.scale,
                            of + shape.width);
        }
    }

    void give_keys(int64_t g) const {
        const Shape &s = shape;
        const int64_t b = head.sequence;
        for (int64_t j = 0; j < s.length; j++) {
            const float *row = k_slopes.get() + j * line;
            float *of_k = to.k + b * s.grad_k[0] + j * s.grad_k[1] + g * s.grad_k[2];
            float *of_v = to.v + b * s.grad_v[0] + j * s.grad_v[1] + g * s.grad_v[2];
            soon_written(of_k + AHEAD * s.grad_k[1], s.width);
            soon_written(of_v + AHEAD * s.grad_v[1], s.values);
            scaled(row, 1, s.width, of_k);
            scaled(v_slopes.get() + j * value_line, 1, s.values, of_v);
            if (s.rotary)
                rotate_back(row + s.width, head.call.cos + head.angle(j), head.call.sin + head.angle(j), s.rotary, 1,
                            to.key + ((b * s.groups + g) * s.length + j) * s.rotary);
        }
    }
};

}  // namespace

extern "C" {

// reach (B, S, 3) of a mask (B, S, S), or without one of queries that see the keys up to their own: from `first_seen` (B, S)
// on, or all of them.
void attention_reach(const uint8_t *mask, const int64_t *first_seen, Reach *reach, int64_t sequences, int64_t length,
                     int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < sequences * length; row++) {
        if (!mask) {
            const int64_t end = row % length + 1;
            reach[row] = {first_seen ? std::min(first_seen[row], end) : 0, end, 0};
            continue;
        }
        const uint8_t *bytes = mask + row * length;
        int64_t first = 0, end = length, count = 0;
        while (first < length && !bytes[first]) first++;
        while (end > first && !bytes[end - 1]) end--;
        for (int64_t j = first; j < end; j++) count += bytes[j];
        reach[row] = {first, end, count != end - first};
    }
}

// out (B, S, H, W) and log Σ exp of the scores (B, H, S); a query that sees nothing has zeros and ∞.
void attention_forward(const Shape *shape, const float *q, const float *k, const float *v, const float *key,
                       const float *cos, const float *sin, const uint8_t *mask, const Reach *reach, float *out,
                       float *log_sums, double scale, int64_t threads) {
    const Call call{*shape, q, k, v, key, cos, sin, mask, reach, static_cast<float>(scale)};
    const int64_t groups = shape->groups, shared = shape->heads / groups;
#pragma omp parallel num_threads(threads)
    {
        Forward forward(call, out, log_sums);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < shape->sequences * groups; item++) {
            const int64_t g = item % groups;
            forward.head.take(item / groups, g);
            for (int64_t h = g * shared; h < (g + 1) * shared; h++) {
                forward.head.take_queries(h, forward.queries.get());
                for (int64_t query = 0; query < shape->length; query += ROWS) forward.run(h, query);
            }
        }
    }
}

// Gradients of q (B, S, H, N + R), of k and v with the strides given, and of the shared key by head, (B, G, S, R).
void attention_backward(const Shape *shape, const float *q, const float *k, const float *v, const float *key,
                        const float *cos, const float *sin, const uint8_t *mask, const Reach *reach, const float *out,
                        const float *log_sums, const float *grad_out, float *grad_q, float *grad_k, float *grad_v,
                        float *grad_key, double scale, int64_t threads) {
    const Call call{*shape, q, k, v, key, cos, sin, mask, reach, static_cast<float>(scale)};
#pragma omp parallel num_threads(threads)
    {
        Backward backward(call, out, log_sums, grad_out, {grad_q, grad_k, grad_v, grad_key});
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < shape->sequences * shape->groups; item++)
            backward.run(item / shape->groups, item % shape->groups);
    }
}
}
