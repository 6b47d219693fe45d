// What a gate does behind its logits, a row at a time: affinities, the biased and group-limited choice, gates and loads;
// and the way back to the gradient of the logits.
#include <algorithm>
#include <vector>

#include "choose.h"

namespace {

constexpr int64_t LEAST_SCORES = 1 << 13;  // below so many the other threads are not woken

}  // namespace

extern "C" {

// score (T, E) holds logits, and affinities afterwards; expert and gate (T, K), counts (E).
void choose(
    float *score, const float *bias, int64_t *expert, float *gate, int64_t *counts, int64_t tokens, int64_t experts,
    int64_t chosen, int64_t groups, int64_t groups_allowed, int64_t sigmoid_affinity, int64_t normalised, double scale,
    int64_t threads
) {
    std::fill(counts, counts + experts, 0);
    const router::Sizes n{
        experts, chosen, groups, groups_allowed, sigmoid_affinity, normalised, static_cast<float>(scale)
    };
    if (tokens * experts < LEAST_SCORES) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        router::Room room(n);
        std::vector<int64_t> own_load(experts);
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t *mine = expert + t * chosen;
            router::choose_row(score + t * experts, bias, expert + t * chosen, gate + t * chosen, n, room);
            for (int64_t k = 0; k < chosen; k++) own_load[mine[k]]++;
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
