// Latent attention of new tokens over a cache of latents (token.h): a task is a token with all its heads.
#include "token.h"

// Queries (B, S, H, N + R) and (latent, key) (B, S, C + R), as projected; a row's slot holds its places side by side,
// `slot` numbers from one to the next; or where there is a table (B, `pages`), its places are those of the slots that are
// named there, of `count`, of `page` places each. Token s of row b is at place start[b] + s; `up` (H, N + W, C); out
// (B, S, H, W); `logs` (B, S, H), where they are wanted, log Σ exp of the scaled scores. Nothing is written, and the
// result is 1, where the table names a slot that is not there.
extern "C" int decode(
    const float *q, int64_t q_row, const float *kv, int64_t kv_row, float *cache, int64_t slot, const int64_t *table,
    int64_t pages, int64_t page, int64_t count, const int64_t *start, const float *cosine, const float *sine,
    const float *norm, const float *up, float *out, float *logs, int64_t batch, int64_t length, int64_t heads,
    int64_t plain, int64_t turning, int64_t value, int64_t latent, double eps, double scale, int64_t threads
) {
    const latent_attention::Sizes n{heads, plain, turning, value, latent};
    const int64_t half = turning / 2;
    for (int64_t b = 0; table && b < batch; b++)
        for (int64_t j = 0; j * page < start[b] + length; j++)
            if (table[b * pages + j] < 0 || table[b * pages + j] >= count) return 1;
    const auto row = [&](int64_t b) {
        return table ? latent_attention::Places{cache, table + b * pages, page, slot}
                     : latent_attention::Places{cache + b * slot};
    };
#pragma omp parallel num_threads(threads)
    {
        latent_attention::Room room(n);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < batch * length; t++) {
            const int64_t b = t / length, s = t % length;
            float *at = row(b).at(start[b] + s, n.cached());
            latent_attention::keep(kv + t * kv_row, norm, eps, cosine + t * half, sine + t * half, at, n);
        }
#pragma omp for schedule(dynamic, 2)
        for (int64_t t = 0; t < batch * length; t++) {
            const int64_t b = t / length, places = start[b] + t % length + 1;
            latent_attention::attend(
                q + t * q_row, row(b), places, cosine + t * half, sine + t * half, up, scale,
                out + t * heads * value, n, room, logs ? logs + t * heads : nullptr
            );
        }
    }
    return 0;
}
