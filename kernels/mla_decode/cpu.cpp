// Latent attention of new tokens over a cache of latents (token.h): a task is a token with all its heads.
#include "token.h"

// Queries (B, S, H, N + R) and (latent, key) (B, S, C + R), as projected; a slot's places lie side by side, `slot` numbers
// from one slot to the next; token s of row b is at place start[b] + s; `up` (H, N + W, C); out (B, S, H, W).
extern "C" void decode(
    const float *q, int64_t q_row, const float *kv, int64_t kv_row, float *cache, int64_t slot, const int64_t *start,
    const float *cosine, const float *sine, const float *norm, const float *up, float *out, int64_t batch,
    int64_t length, int64_t heads, int64_t plain, int64_t turning, int64_t value, int64_t latent, double eps,
    double scale, int64_t threads
) {
    const latent_attention::Sizes n{heads, plain, turning, value, latent};
    const int64_t half = turning / 2;
#pragma omp parallel num_threads(threads)
    {
        latent_attention::Room room(n);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < batch * length; t++) {
            const int64_t b = t / length, s = t % length;
            float *at = cache + b * slot + (start[b] + s) * n.cached();
            latent_attention::keep(kv + t * kv_row, norm, eps, cosine + t * half, sine + t * half, at, n);
        }
#pragma omp for schedule(dynamic, 2)
        for (int64_t t = 0; t < batch * length; t++) {
            const int64_t b = t / length, places = start[b] + t % length + 1;
            latent_attention::attend(
                q + t * q_row, cache + b * slot, places, cosine + t * half, sine + t * half, up, scale,
                out + t * heads * value, n, room
            );
        }
    }
}
