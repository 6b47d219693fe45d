// A gate's choice for one row behind its logits: affinities, the biased and group-limited choice, and gates.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace router {

struct Sizes {
    int64_t experts, chosen, groups, groups_allowed, sigmoid_affinity, normalised;
    float scale;
};

inline int64_t padded(int64_t numbers) { return (numbers + LANES - 1) / LANES * LANES; }

// What is not a number as the highest of all.
inline float rank_of(float value) { return value != value ? __builtin_inff() : value; }

// What a thread needs beside its inputs; keys in whole vectors.
struct Room {
    std::vector<int32_t> key, group_key;
    std::vector<int64_t> best;

    explicit Room(const Sizes &n) : key(padded(n.experts)), group_key(padded(n.groups)), best(n.groups) {}
};

constexpr int32_t LOWEST = INT32_MIN, NO_NUMBER = 0x7f800001;  // a key below all values', and one above infinity's

// Whole numbers that ascend as the values do, which are sums and so never -0. What is not a number is above all numbers,
// so that it is chosen and seen.
inline Integers keys_of(Vector value) {
    Integers bits;
    std::memcpy(&bits, &value, sizeof bits);
    return value != value ? Integers{} + NO_NUMBER : bits ^ (bits >> 31 & INT32_MAX);
}

inline float value_of(int32_t key) {
    const int32_t bits = key ^ (key >> 31 & INT32_MAX);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline int32_t key_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return value != value ? NO_NUMBER : bits ^ (bits >> 31 & INT32_MAX);
}

inline Integers keys_at(const int32_t *from) {
    Integers keys;
    std::memcpy(&keys, from, sizeof keys);
    return keys;
}

inline int32_t largest(Integers keys) {
#ifdef __AVX512F__
    return _mm512_reduce_max_epi32((__m512i)keys);
#else
    int32_t most = keys[0];
    for (int64_t i = 1; i < LANES; i++) most = std::max(most, keys[i]);
    return most;
#endif
}

// Where the first of these keys is that equals `wanted`, which one does.
inline int64_t place_of(int32_t wanted, const int32_t *key) {
    int64_t at = 0;
#ifdef __AVX512F__
    for (;; at += LANES)
        if (const auto equal = _mm512_cmpeq_epi32_mask((__m512i)keys_at(key + at), _mm512_set1_epi32(wanted)))
            return at + __builtin_ctz(equal);
#else
    while (key[at] != wanted) at++;
    return at;
#endif
}

// A whole vector is written, as whole ones are read next: a part would have to reach the cache first.
inline void lower(int32_t *key, int64_t at) {
    int32_t *from = key + at / LANES * LANES;
    Integers lane;
    for (int64_t i = 0; i < LANES; i++) lane[i] = i;
    const Integers keys = lane == static_cast<int32_t>(at % LANES) ? Integers{} + LOWEST : keys_at(from);
    std::memcpy(from, &keys, sizeof keys);
}

// Where the `count` highest of so many keys, in whole vectors, are, highest first; of equal ones the first. They are lowered.
inline void highest(int32_t *key, int64_t keys, int64_t count, int64_t *found) {
    for (int64_t k = 0; k < count; k++) {
        Integers most = keys_at(key);
        for (int64_t i = LANES; i < keys; i += LANES) {
            const Integers here = keys_at(key + i);
            most = here > most ? here : most;
        }
        found[k] = place_of(largest(most), key);
        lower(key, found[k]);
    }
}

typedef int32_t Same __attribute__((vector_size(16)));  // one number four times: vectors' maxima have no branches

// Lowers the keys of all groups but the best; a group's score is the sum of its two highest values, or the highest.
inline void keep_best_groups(const Sizes &n, Room &room) {
    const int64_t size = n.experts / n.groups;
    for (int64_t g = 0; g < n.groups; g++) {
        const int32_t *here = room.key.data() + g * size;
        Same first = Same{} + LOWEST, second = first;
        for (int64_t e = 0; e < size; e++) {
            const Same own = Same{} + here[e], lesser = first < own ? first : own;
            second = second > lesser ? second : lesser;
            first = first > own ? first : own;
        }
        room.group_key[g] = n.sigmoid_affinity ? key_of(value_of(first[0]) + value_of(second[0])) : first[0];
    }
    const int64_t groups = room.group_key.size();
    std::fill(room.group_key.begin() + n.groups, room.group_key.end(), LOWEST);
    highest(room.group_key.data(), groups, n.groups_allowed, room.best.data());
    for (int64_t g = 0; g < n.groups; g++)  // those that were found are lowered
        if (room.group_key[g] != LOWEST) std::fill_n(room.key.begin() + g * size, size, LOWEST);
}

// s (E) holds logits, and affinities afterwards; `mine` and `gate` (K).
inline void choose_row(float *s, const float *bias, int64_t *mine, float *gate, const Sizes &n, Room &room) {
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
    for (int64_t e = 0; e < n.experts; e += LANES) {
        const int64_t left = n.experts - e;
        Integers keys = keys_of(load(s + e, left) + load(bias + e, left));
        for (int64_t i = left; i < LANES; i++) keys[i] = LOWEST;
        std::memcpy(room.key.data() + e, &keys, sizeof keys);
    }
    if (n.groups > 1) keep_best_groups(n, room);
    highest(room.key.data(), room.key.size(), n.chosen, mine);
    float total = 0;
    for (int64_t k = 0; k < n.chosen; k++) total += s[mine[k]];
    for (int64_t k = 0; k < n.chosen; k++)
        gate[k] = s[mine[k]] / (n.normalised ? total + 1e-20f : 1.0f) * n.scale;
}

}  // namespace router
