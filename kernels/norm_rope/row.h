// RMSNorm of one row.
#pragma once

#include <cmath>

#include "vectors.h"

static inline float square(const float *a, int64_t size) {
    Vector one{}, two{};
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        one += load(a + i) * load(a + i);
        two += load(a + i + LANES) * load(a + i + LANES);
    }
    float rest = 0;
    for (; i < size; i++) rest += a[i] * a[i];
    return sum(one + two) + rest;
}

// y = x / √(mean x² + eps) · weight; gives the 1 / √.
static inline float norm_row(
    const float *__restrict x, const float *__restrict weight, float *__restrict y, int64_t width, double eps
) {
    const float by = 1.0f / std::sqrt(square(x, width) / width + static_cast<float>(eps));
    for (int64_t i = 0; i < width; i++) y[i] = x[i] * by * weight[i];
    return by;
}

// total = a + b, and its norm.
static inline float add_norm_row(
    const float *__restrict a, const float *__restrict b, const float *__restrict weight, float *__restrict total,
    float *__restrict y, int64_t width, double eps
) {
    for (int64_t i = 0; i < width; i++) total[i] = a[i] + b[i];
    return norm_row(total, weight, y, width, eps);
}
