// What a gate does behind its logits, a row at a time: affinities, the biased and group-limited choice, gates and loads;
// the choices in the order of their experts; and the way back to the gradient of the logits.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "choose.h"
#include "few_of_many.h"

namespace {

constexpr int64_t LEAST_SCORES = 1 << 13;  // below so many the other threads are not woken
constexpr int64_t MANY = 4;  // so many experts a chosen one: then products with the zeros of the others take longer

// The gradients of a token's gates, as those of its chosen affinities.
struct OfGates {
    const float *grad;
    float total = 1e-20f, along = 0, scale;
    bool normalised;

    OfGates(const float *s, const int64_t *mine, const float *grad, int64_t chosen, bool normalised, double scale)
        : grad(grad), scale(static_cast<float>(scale)), normalised(normalised) {
        for (int64_t k = 0; k < chosen; k++) {
            total += s[mine[k]];
            along += grad[k] * s[mine[k]];
        }
    }
    float affinity(int64_t k) const { return scale * (normalised ? (grad[k] - along / total) / total : grad[k]); }
};

bool all_finite(const float *numbers, int64_t count) {
    bool finite = true;
    for (int64_t i = 0; i < count; i++) finite &= numbers[i] - numbers[i] == 0;
    return finite;
}

}  // namespace

extern "C" {

// Of x (T, D) and weight (E, D), or where there is no x of logits in `score`: affinities, score (T, E); expert and gate
// (T, K), counts (E). The choices in the order of their experts, those of one in their own: order (T·K), and where each
// expert's end (E).
void route(
    const float *x, const float *weight, float *score, const float *bias, int64_t *expert, float *gate, int64_t *counts,
    int64_t *order, int64_t *ends, int64_t groups, int64_t groups_allowed, int64_t tokens, int64_t width, int64_t experts,
    int64_t chosen, int64_t sigmoid_affinity, int64_t normalised, double scale, int64_t threads
) {
    const router::Sizes n{
        experts, chosen, groups, groups_allowed, sigmoid_affinity, normalised, static_cast<float>(scale)
    };
    if (!x && tokens * experts < LEAST_SCORES) threads = 1;
    // Choices in each thread's tokens, and then where the next one goes; no two threads in one line of the cache
    const int64_t apart = (experts + 15) / 8 * 8;
    std::vector<int64_t> next(threads * apart);
#pragma omp parallel num_threads(threads)
    {
        if (x) multiply_by_all({x, width}, {weight, 1, width}, score, tokens, experts, width, 0, threads);
#pragma omp barrier
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        const int64_t begin = tokens * thread / team, end = tokens * (thread + 1) / team;
        int64_t *own = next.data() + thread * apart;
        router::Room room(n);
        for (int64_t t = begin; t < end; t++) {
            const int64_t *mine = expert + t * chosen;
            router::choose_row(score + t * experts, bias, expert + t * chosen, gate + t * chosen, n, room);
            for (int64_t k = 0; k < chosen; k++) own[mine[k]]++;
        }
#pragma omp barrier
#pragma omp single
        for (int64_t e = 0, at = 0; e < experts; e++) {
            const int64_t first = at;
            for (int64_t i = 0; i < team; i++) {
                const int64_t here = next[i * apart + e];
                next[i * apart + e] = at;
                at += here;
            }
            counts[e] = at - first;
            ends[e] = at;
        }
        for (int64_t i = begin * chosen; i < end * chosen; i++) order[own[expert[i]]++] = i;
    }
}

// Of the gradients of the gates (T, K) and of the affinities (T, E), of which there may be none: those of the logits, slope
// (T, E), of x (T, D) and of the weight (E, D), where these are wanted. Where an affinity is a sigmoid and no gradient of
// all of them is given, the chosen logits alone have one. Few of many are then multiplied without the zeros of the others,
// to the same bits, and slope begins with them, (T, K). But where x or the weight is not finite, zeros count: 0 · ∞ is not
// a number.
void route_backward(
    const float *x, const float *weight, const float *score, const int64_t *expert, const int64_t *order,
    const int64_t *ends, const float *grad_gate, const float *grad_score, float *slope, float *grad_x, float *grad_weight,
    int64_t tokens, int64_t width, int64_t experts, int64_t chosen, int64_t sigmoid_affinity, int64_t normalised,
    double scale, int64_t threads
) {
    const bool few = sigmoid_affinity && !grad_score && experts >= MANY * chosen && all_finite(weight, experts * width);
    bool spoilt = false;
#pragma omp parallel num_threads(threads)
    {
        if (few) {
#pragma omp for schedule(static) reduction(|| : spoilt)
            for (int64_t t = 0; t < tokens; t++) {
                const float *s = score + t * experts;
                const int64_t *mine = expert + t * chosen;
                const OfGates of(s, mine, grad_gate + t * chosen, chosen, normalised, scale);
                bool far = false;
                for (int64_t k = 0; k < chosen; k++) {
                    const float a = s[mine[k]];
                    slope[t * chosen + k] = of.affinity(k) * (a * (1.0f - a));
                    spoilt = spoilt || a != a;
                    far = far || a == 0 || a == 1;
                }
                // Of a token that is not finite all logits are so, and tell it; of another they may be far out as well
                if (far) spoilt = spoilt || !all_finite(x + t * width, width);
            }
        }
        if (few && !spoilt) {
            if (grad_x) router::by_token(weight, slope, expert, grad_x, {tokens, width, experts, chosen});
            if (grad_weight) router::by_expert(x, slope, order, ends, grad_weight, {tokens, width, experts, chosen});
        } else {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tokens; t++) {
                const float *s = score + t * experts;
                const int64_t *mine = expert + t * chosen;
                const OfGates of(s, mine, grad_gate + t * chosen, chosen, normalised, scale);
                float *d = slope + t * experts;
                if (grad_score) std::copy_n(grad_score + t * experts, experts, d);
                else std::fill_n(d, experts, 0.0f);
                for (int64_t k = 0; k < chosen; k++) d[mine[k]] += of.affinity(k);
                if (sigmoid_affinity) {
                    for (int64_t e = 0; e < experts; e++) d[e] *= s[e] * (1.0f - s[e]);
                } else {
                    float mean = 0;
                    for (int64_t e = 0; e < experts; e++) mean += d[e] * s[e];
                    for (int64_t e = 0; e < experts; e++) d[e] = s[e] * (d[e] - mean);
                }
            }
            if (grad_x) multiply_by_all({slope, experts}, {weight, width}, grad_x, tokens, width, experts, 0, threads);
            if (grad_weight)
                multiply_by_all({slope, 1, experts}, {x, width}, grad_weight, experts, width, tokens, 0, threads);
        }
    }
}
}
