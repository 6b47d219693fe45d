// Latent attention of new tokens over a cache of latents, in float32 and in its absorbed form: scores and values are taken
// in the latent, so that a task reads the cache as it lies. A task is a token with all its heads, whose queries share the
// cache's rows. A token's result does not depend on those beside it.
#include <cmath>
#include <vector>

#include "dots.h"

namespace {

struct Sizes {
    int64_t length, heads, plain, turning, value, latent;

    int64_t cached() const { return latent + turning; }
};

// Interleaved pairs, rotated, as halves.
void rotate(const float *from, const float *cosine, const float *sine, float *to, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float a = from[2 * i], b = from[2 * i + 1];
        to[i] = a * cosine[i] - b * sine[i];
        to[half + i] = a * sine[i] + b * cosine[i];
    }
}

// The latent's RMS norm and the rotated key, as the cache keeps them.
void keep(const float *kv, const float *norm, float eps, const float *cosine, const float *sine, float *to, const Sizes &n) {
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

// out (columns) = Σ weight[i] · row i of `from`, the rows `stride` apart.
void weighted(const float *weight, int64_t rows, const float *from, int64_t stride, float *out, int64_t columns) {
    constexpr int64_t BLOCK = 8;  // vectors at once
    for (int64_t c = 0; c < columns; c += BLOCK * LANES) {
        const int64_t left = columns - c;
        if (left >= BLOCK * LANES) {
            Vector s[BLOCK] = {};
            for (int64_t i = 0; i < rows; i++)
                for (int64_t v = 0; v < BLOCK; v++) s[v] += weight[i] * load(from + i * stride + c + v * LANES);
            for (int64_t v = 0; v < BLOCK; v++) store(out + c + v * LANES, s[v]);
            continue;
        }
        for (int64_t v = 0; v < left; v += LANES) {
            Vector s{};
            for (int64_t i = 0; i < rows; i++) s += weight[i] * load(from + i * stride + c + v, left - v);
            store(out + c + v, s, left - v);
        }
    }
}

void softmax(float *scores, int64_t places) {
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
    const float scale = 1.0f / total(sums);
    for (int64_t p = 0; p < places; p += LANES) store(scores + p, load(scores + p, places - p) * scale, places - p);
}

}  // namespace

// Queries (B, S, H, N + R) and (latent, key) (B, S, C + R), as projected; a slot's places lie side by side, `slot` numbers
// from one slot to the next; token s of row b is at place start[b] + s; `up` (H, N + W, C); out (B, S, H, W).
extern "C" void decode(
    const float *q, int64_t q_row, const float *kv, int64_t kv_row, float *cache, int64_t slot, const int64_t *start,
    const float *cosine, const float *sine, const float *norm, const float *up, float *out, int64_t batch,
    int64_t length, int64_t heads, int64_t plain, int64_t turning, int64_t value, int64_t latent, double eps,
    double scale, int64_t threads
) {
    const Sizes n{length, heads, plain, turning, value, latent};
    const int64_t width = n.cached(), half = turning / 2;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> query(heads * width), scores, mixed(heads * latent);
        std::vector<const float *> from(heads);
        std::vector<float *> to(heads);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < batch * length; t++) {
            const int64_t b = t / length, s = t % length;
            float *at = cache + b * slot + (start[b] + s) * width;
            keep(kv + t * kv_row, norm, eps, cosine + t * half, sine + t * half, at, n);
        }
#pragma omp for schedule(dynamic, 2)
        for (int64_t t = 0; t < batch * length; t++) {
            const int64_t b = t / length, places = start[b] + t % length + 1;
            scores.resize(heads * places);
            for (int64_t h = 0; h < heads; h++) {
                const float *head = q + t * q_row + h * (plain + turning);
                float *mine = query.data() + h * width;
                weighted(head, plain, up + h * (plain + value) * latent, latent, mine, latent);
                rotate(head + plain, cosine + t * half, sine + t * half, mine + latent, half);
                for (int64_t c = 0; c < width; c++) mine[c] *= scale;
                from[h] = mine;
                to[h] = scores.data() + h * places;
            }
            dots(from.data(), heads, cache + b * slot, width, places, width, to.data());
            for (int64_t h = 0; h < heads; h++) {
                softmax(to[h], places);
                const float *latents = mixed.data() + h * latent;
                weighted(to[h], places, cache + b * slot, width, mixed.data() + h * latent, latent);
                float *result = out + (t * heads + h) * value;
                dots(&latents, 1, up + (h * (plain + value) + plain) * latent, latent, value, latent, &result);
            }
        }
    }
}
