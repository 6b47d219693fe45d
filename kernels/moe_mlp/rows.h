// Rows of the routed experts in float32: their order, the activation, few rows through one expert, and sums by token.
#pragma once

#include <numeric>
#include <vector>

#include "dots.h"

namespace moe {

// h (F) = weight · silu(a) · b of a row of pre (2F).
inline void activate(const float *pre, float weight, float *h, int64_t hidden) {
    for (int64_t f = 0; f < hidden; f += LANES) {
        const Vector left = load(pre + f, hidden - f), right = load(pre + hidden + f, hidden - f);
        store(h + f, weight * (left * sigmoid(left)) * right, hidden - f);
    }
}

// out[t] = the sum of y's rows at t's places, in the order of its choices.
inline void sum_choices(const float *y, const int64_t *place, float *out, int64_t t, int64_t choices, int64_t width) {
    for (int64_t j = 0; j < width; j += LANES) {
        Vector total{};
        for (int64_t k = 0; k < choices; k++) total += load(y + place[t * choices + k] * width + j, width - j);
        store(out + t * width + j, total, width - j);
    }
}

// Sort the choices (T·K) by expert, those of one expert in their order: order (M), bounds (E + 1).
inline void sort_choices(
    const int64_t *expert, int64_t *order, int64_t *bounds, int64_t rows, int64_t experts
) {
    std::fill(bounds, bounds + experts + 1, 0);
    for (int64_t i = 0; i < rows; i++) bounds[expert[i] + 1]++;
    std::partial_sum(bounds, bounds + experts + 1, bounds);
    std::vector<int64_t> next(bounds, bounds + experts);
    for (int64_t i = 0; i < rows; i++) order[next[expert[i]]++] = i;
}

// Of an order: the token of each row and the place of each choice (M).
inline void places(const int64_t *order, int64_t *token, int64_t *place, int64_t rows, int64_t choices) {
    for (int64_t i = 0; i < rows; i++) {
        token[i] = order[i] / choices;
        place[order[i]] = i;
    }
}

// What a thread needs beside its inputs.
struct Room {
    std::vector<float> pre, h;
    std::vector<const float *> from;
    std::vector<float *> to;
};

// out[r] (D) = down · (weight[r] · silu(a) · b) with (a, b) = gate_up · x[r], matrices read as they lie.
inline void few_rows(
    const float *const *x, const float *weight, const float *gate_up, const float *down, float *const *out,
    int64_t rows, int64_t width, int64_t hidden, Room &room
) {
    room.pre.resize(rows * 2 * hidden);
    room.h.resize(rows * hidden);
    room.from.resize(rows);
    room.to.resize(rows);
    for (int64_t r = 0; r < rows; r++) room.to[r] = room.pre.data() + r * 2 * hidden;
    dots(x, rows, gate_up, width, 2 * hidden, width, room.to.data());
    for (int64_t r = 0; r < rows; r++) {
        activate(room.to[r], weight[r], room.h.data() + r * hidden, hidden);
        room.from[r] = room.h.data() + r * hidden;
    }
    dots(room.from.data(), rows, down, hidden, width, hidden, out);
}

}  // namespace moe
