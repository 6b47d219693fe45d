// Latent attention of one new token over its slot of a cache of latents, in float32 and in its absorbed form: scores and
// values are taken in the latent, so that the cache is read as it lies, and a token's heads share the cache's rows. A
// token's result does not depend on those beside it.
#pragma once

#include <cmath>
#include <vector>

#include "dots.h"

namespace latent_attention {

struct Sizes {
    int64_t heads, plain, turning, value, latent;

    int64_t cached() const { return latent + turning; }
};

// Interleaved pairs, rotated, as halves.
inline void rotate(const float *from, const float *cosine, const float *sine, float *to, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float a = from[2 * i], b = from[2 * i + 1];
        to[i] = a * cosine[i] - b * sine[i];
        to[half + i] = a * sine[i] + b * cosine[i];
    }
}

// The latent's RMS norm and the rotated key, as the cache keeps them.
inline void keep(const float *kv, const float *norm, float eps, const float *cosine, const float *sine, float *to, const Sizes &n) {
    Vector squares{};
    for (int64_t c = 0; c < n.latent; c += LANES) {
        const Vector v = load(kv + c, n.latent - c);
        squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(total(squares) / n.latent + eps);
    for (int64_t c = 0; c < n.latent; c += LANES) {
        const int64_t left = n.latent - c;
        store(to + c, load(kv + c, left) * scale * load(norm + c, left), left);
    }
    rotate(kv + n.latent, cosine, sine, to + n.latent, n.turning / 2);
}

// out (BLOCK vectors) = Σ weight[i] · row i of `from`, the rows `stride` apart; or `more` of the sum that is there.
template <int64_t BLOCK>
inline void weighted_block(
    const float *weight, int64_t rows, const float *from, int64_t stride, float *out, bool more
) {
    Vector s[BLOCK];
    for (int64_t v = 0; v < BLOCK; v++) s[v] = more ? load(out + v * LANES) : Vector{};
    for (int64_t i = 0; i < rows; i++)
        for (int64_t v = 0; v < BLOCK; v++) s[v] += weight[i] * load(from + i * stride + v * LANES);
    for (int64_t v = 0; v < BLOCK; v++) store(out + v * LANES, s[v]);
}

// The same of so many columns: several vectors at once, whose sums do not wait for each other.
inline void weighted(
    const float *weight, int64_t rows, const float *from, int64_t stride, float *out, int64_t columns,
    bool more = false
) {
    int64_t c = 0;
    for (; c + 8 * LANES <= columns; c += 8 * LANES) weighted_block<8>(weight, rows, from + c, stride, out + c, more);
    for (; c + 4 * LANES <= columns; c += 4 * LANES) weighted_block<4>(weight, rows, from + c, stride, out + c, more);
    for (; c + 2 * LANES <= columns; c += 2 * LANES) weighted_block<2>(weight, rows, from + c, stride, out + c, more);
    for (; c < columns; c += LANES) {
        Vector s = more ? load(out + c, columns - c) : Vector{};
        for (int64_t i = 0; i < rows; i++) s += weight[i] * load(from + i * stride + c, columns - c);
        store(out + c, s, columns - c);
    }
}

// And the logarithm of the sum of the exponentials.
inline float softmax(float *scores, int64_t places) {
    Vector most = all(-__builtin_inff());
    for (int64_t p = 0; p < places; p += LANES) {
        Vector v = load(scores + p, places - p);
        for (int64_t i = places - p; i < LANES; i++) v[i] = -__builtin_inff();
        most = larger(most, v);
    }
    const float high = largest(most);
    Vector sums{};
    for (int64_t p = 0; p < places; p += LANES) {
        Vector v = exponential_of_low(load(scores + p, places - p) - high);
        for (int64_t i = places - p; i < LANES; i++) v[i] = 0;
        store(scores + p, v, places - p);
        sums += v;
    }
    const float sum = total(sums), scale = 1.0f / sum;
    for (int64_t p = 0; p < places; p += LANES) store(scores + p, load(scores + p, places - p) * scale, places - p);
    return high + std::log(sum);
}

// A row's places: side by side at `first`, or in pages of so many, `stride` numbers apart, which a table names in order.
// Each sum goes over the places in their order, so that it has the same bits wherever pages lie.
struct Places {
    float *first;
    const int64_t *table = nullptr;
    int64_t page = INT64_MAX, stride = 0;

    float *of_page(int64_t number) const { return table ? first + table[number] * stride : first; }
    float *at(int64_t place, int64_t width) const { return of_page(place / page) + place % page * width; }
};

// What a thread needs beside its inputs.
struct Room {
    std::vector<float> query, scores, mixed;
    std::vector<const float *> from;
    std::vector<float *> to, at;

    explicit Room(const Sizes &n) : query(n.heads * n.cached()), mixed(n.heads * n.latent), from(n.heads), to(n.heads), at(n.heads) {}
};

// out (H, W) of queries (H, N + R) as projected, over the first places of a row; `up` (H, N + W, C). Where `logs` are
// wanted, (H), they are log Σ exp of the scaled scores.
inline void attend(
    const float *q, const Places &cache, int64_t places, const float *cosine, const float *sine, const float *up,
    float scale, float *out, const Sizes &n, Room &room, float *logs = nullptr
) {
    const int64_t width = n.cached(), half = n.turning / 2;
    room.scores.resize(n.heads * places);
    for (int64_t h = 0; h < n.heads; h++) {
        const float *head = q + h * (n.plain + n.turning);
        float *mine = room.query.data() + h * width;
        weighted(head, n.plain, up + h * (n.plain + n.value) * n.latent, n.latent, mine, n.latent);
        rotate(head + n.plain, cosine, sine, mine + n.latent, half);
        for (int64_t c = 0; c < width; c++) mine[c] *= scale;
        room.from[h] = mine;
        room.to[h] = room.scores.data() + h * places;
    }
    for (int64_t p = 0; p < places; p += std::min(cache.page, places)) {
        for (int64_t h = 0; h < n.heads; h++) room.at[h] = room.to[h] + p;
        const int64_t here = std::min(cache.page, places - p);
        dots(room.from.data(), n.heads, cache.of_page(p / cache.page), width, here, width, room.at.data());
    }
    for (int64_t h = 0; h < n.heads; h++) {
        const float log = softmax(room.to[h], places);
        if (logs) logs[h] = log;
        float *mixed = room.mixed.data() + h * n.latent;
        for (int64_t p = 0; p < places; p += std::min(cache.page, places)) {
            const int64_t here = std::min(cache.page, places - p);
            weighted(room.to[h] + p, here, cache.of_page(p / cache.page), width, mixed, n.latent, p > 0);
        }
        const float *latents = mixed;
        float *result = out + h * n.value;
        dots(&latents, 1, up + (h * (n.plain + n.value) + n.plain) * n.latent, n.latent, n.value, n.latent, &result);
    }
}

}  // namespace latent_attention
