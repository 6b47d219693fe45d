// What a gate does behind its logits, a row at a time: affinities, the biased and group-limited choice, gates and loads;
// and the way back to the gradient of the logits.
#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t LEAST_SCORES = 1 << 13;  // below so many the other threads are not woken

// What is not a number is above all numbers, so that it is chosen and seen.
float rank_of(float value) { return value != value ? __builtin_inff() : value; }

// The `count` highest of the values whose place is allowed, highest first; of equal ones the first.
void highest(const float *value, const char *allowed, int64_t values, int64_t count, int64_t *found) {
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

}  // namespace

extern "C" {

// score (T, E) holds logits, and affinities afterwards; expert and gate (T, K), counts (E).
void choose(
    float *score, const float *bias, int64_t *expert, float *gate, int64_t *counts, int64_t tokens, int64_t experts,
    int64_t chosen, int64_t groups, int64_t groups_allowed, int64_t sigmoid_affinity, int64_t normalised, double scale,
    int64_t threads
) {
    std::fill(counts, counts + experts, 0);
    if (tokens * experts < LEAST_SCORES) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        const int64_t size = experts / groups;
        std::vector<float> choice(experts), group_score(groups);
        std::vector<char> allowed(experts);
        std::vector<int64_t> best(std::max<int64_t>(2, groups)), own_load(experts);
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < tokens; t++) {
            float *s = score + t * experts;
            if (sigmoid_affinity) {
                for (int64_t e = 0; e < experts; e += LANES)
                    store(s + e, sigmoid(load(s + e, experts - e)), experts - e);
            } else {
                float most = rank_of(s[0]), total = 0;
                for (int64_t e = 1; e < experts; e++) most = std::max(most, rank_of(s[e]));
                for (int64_t e = 0; e < experts; e += LANES)
                    store(s + e, exponential(load(s + e, experts - e) - most), experts - e);
                for (int64_t e = 0; e < experts; e++) total += s[e];
                for (int64_t e = 0; e < experts; e++) s[e] /= total;
            }
            for (int64_t e = 0; e < experts; e++) choice[e] = s[e] + bias[e];
            if (groups > 1) {
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t of_it = sigmoid_affinity ? 2 : 1;
                    const float *here = choice.data() + g * size;
                    highest(here, nullptr, size, of_it, best.data());
                    group_score[g] = here[best[0]] + (of_it == 2 ? here[best[1]] : 0.0f);
                }
                highest(group_score.data(), nullptr, groups, groups_allowed, best.data());
                std::fill(allowed.begin(), allowed.end(), 0);
                for (int64_t i = 0; i < groups_allowed; i++)
                    std::fill_n(allowed.begin() + best[i] * size, size, 1);
            }
            int64_t *mine = expert + t * chosen;
            highest(choice.data(), groups > 1 ? allowed.data() : nullptr, experts, chosen, mine);
            float total = 0;
            for (int64_t k = 0; k < chosen; k++) {
                own_load[mine[k]]++;
                total += s[mine[k]];
            }
            for (int64_t k = 0; k < chosen; k++)
                gate[t * chosen + k] = s[mine[k]] / (normalised ? total + 1e-20f : 1.0f) * static_cast<float>(scale);
        }
#pragma omp critical
        for (int64_t e = 0; e < experts; e++) counts[e] += own_load[e];
    }
}

// grad_score (T, E) holds the gradient of the affinities, and that of the logits afterwards.
void choose_backward(
    const float *score, const int64_t *expert, const float *grad_gate, float *grad_score, int64_t tokens,
    int64_t experts, int64_t chosen, int64_t sigmoid_affinity, int64_t normalised, double scale, int64_t threads
) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) {
        const float *s = score + t * experts, *g = grad_gate + t * chosen;
        const int64_t *mine = expert + t * chosen;
        float *d = grad_score + t * experts, total = 1e-20f, along = 0;
        for (int64_t k = 0; k < chosen; k++) {
            total += s[mine[k]];
            along += g[k] * s[mine[k]];
        }
        for (int64_t k = 0; k < chosen; k++)
            d[mine[k]] += static_cast<float>(scale) * (normalised ? (g[k] - along / total) / total : g[k]);
        if (sigmoid_affinity) {
            for (int64_t e = 0; e < experts; e++) d[e] *= s[e] * (1.0f - s[e]);
        } else {
            float mean = 0;
            for (int64_t e = 0; e < experts; e++) mean += d[e] * s[e];
            for (int64_t e = 0; e < experts; e++) d[e] = s[e] * (d[e] - mean);
        }
    }
}
}
