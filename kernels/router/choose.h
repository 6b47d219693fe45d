// A gate's choice for one row behind its logits: affinities, the biased and group-limited choice, and gates.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace router {

struct Sizes {
    int64_t experts, chosen, groups, groups_allowed, sigmoid_affinity, normalised;
    float scale;
};

// What a thread needs beside its inputs.
struct Room {
    std::vector<float> choice, group_score;
    std::vector<char> allowed;
    std::vector<int64_t> best;

    explicit Room(const Sizes &n)
        : choice(n.experts), group_score(n.groups), allowed(n.experts), best(std::max<int64_t>(2, n.groups)) {}
};

// What is not a number is above all numbers, so that it is chosen and seen.
inline float rank_of(float value) { return value != value ? __builtin_inff() : value; }

// The `count` highest of the values whose place is allowed, highest first; of equal ones the first.
inline void highest(const float *value, const char *allowed, int64_t values, int64_t count, int64_t *found) {
    int64_t filled = 0;
    for (int64_t i = 0; i < values; i++) {
        if (allowed && !allowed[i]) continue;
        const float own = rank_of(value[i]);
        if (filled == count && !(own > rank_of(value[found[count - 1]]))) continue;
        int64_t at = filled < count ? filled++ : count - 1;
        for (; at > 0 && own > rank_of(value[found[at - 1]]); at--) found[at] = found[at - 1];
        found[at] = i;
    }
}

// s (E) holds logits, and affinities afterwards; `mine` and `gate` (K).
inline void choose_row(float *s, const float *bias, int64_t *mine, float *gate, const Sizes &n, Room &room) {
    const int64_t size = n.experts / n.groups;
    if (n.sigmoid_affinity) {
        for (int64_t e = 0; e < n.experts; e += LANES)
            store(s + e, sigmoid(load(s + e, n.experts - e)), n.experts - e);
    } else {
        float most = rank_of(s[0]), total = 0;
        for (int64_t e = 1; e < n.experts; e++) most = std::max(most, rank_of(s[e]));
        for (int64_t e = 0; e < n.experts; e += LANES)
            store(s + e, exponential(load(s + e, n.experts - e) - most), n.experts - e);
        for (int64_t e = 0; e < n.experts; e++) total += s[e];
        for (int64_t e = 0; e < n.experts; e++) s[e] /= total;
    }
    for (int64_t e = 0; e < n.experts; e++) room.choice[e] = s[e] + bias[e];
    if (n.groups > 1) {
        for (int64_t g = 0; g < n.groups; g++) {
            const int64_t of_it = n.sigmoid_affinity ? 2 : 1;
            const float *here = room.choice.data() + g * size;
            highest(here, nullptr, size, of_it, room.best.data());
            room.group_score[g] = here[room.best[0]] + (of_it == 2 ? here[room.best[1]] : 0.0f);
        }
        highest(room.group_score.data(), nullptr, n.groups, n.groups_allowed, room.best.data());
        std::fill(room.allowed.begin(), room.allowed.end(), 0);
        for (int64_t i = 0; i < n.groups_allowed; i++)
            std::fill_n(room.allowed.begin() + room.best[i] * size, size, 1);
    }
    highest(room.choice.data(), n.groups > 1 ? room.allowed.data() : nullptr, n.experts, n.chosen, mine);
    float total = 0;
    for (int64_t k = 0; k < n.chosen; k++) total += s[mine[k]];
    for (int64_t k = 0; k < n.chosen; k++)
        gate[k] = s[mine[k]] / (n.normalised ? total + 1e-20f : 1.0f) * n.scale;
}

}  // namespace router
