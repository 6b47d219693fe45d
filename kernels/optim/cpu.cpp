// AdamW over many tensors in one pass: a parameter, its gradient and its moments are read and written once.
#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t CHUNK = 1 << 14;  // numbers that a thread takes at a time

struct Rates {
    float coefficient, shrink, beta1, beta2, eps, size, second_correction;
};

Vector read(const float *from, int64_t left) { return load(from, left); }

void write(float *to, Vector v, int64_t left) { store(to, v, left); }

// bfloat16: the upper half of a float, rounded to the nearest, ties to even
Vector read(const uint16_t *from, int64_t left) {
    Vector v{};
    for (int64_t i = 0; i < std::min(left, LANES); i++) {
        const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
        float one;
        std::memcpy(&one, &bits, 4);
        v[i] = one;
    }
    return v;
}

void write(uint16_t *to, Vector v, int64_t left) {
    for (int64_t i = 0; i < std::min(left, LANES); i++) {
        const float one = v[i];
        uint32_t bits;
        std::memcpy(&bits, &one, 4);
        to[i] = one != one ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

template <typename Moment>
void update(float *p, const float *g, Moment *m, Moment *v, int64_t count, const Rates &r) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t left = count - i;
        const Vector gradient = load(g + i, left) * r.coefficient;
        const Vector before = read(m + i, left);
        const Vector first = before + (gradient - before) * (1 - r.beta1);
        const Vector second = read(v + i, left) * r.beta2 + gradient * gradient * (1 - r.beta2);
        write(m + i, first, left);
        write(v + i, second, left);
        Vector root = second * r.second_correction;
        for (int64_t l = 0; l < LANES; l++) root[l] = std::sqrt(root[l]);
        store(p + i, load(p + i, left) * r.shrink - r.size * first / (root + r.eps), left);
    }
}

template <typename Moment>
void update_all(const int64_t *at, const int64_t *counts, int64_t tensors, const Rates &r, int64_t threads) {
    std::vector<int64_t> tensor, start;
    for (int64_t t = 0; t < tensors; t++)
        for (int64_t i = 0; i < counts[t]; i += CHUNK) tensor.push_back(t), start.push_back(i);
    const int64_t chunks = tensor.size();
#pragma omp parallel for num_threads(threads)
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t t = tensor[c], i = start[c];
        const auto of = [&](int64_t kind) { return at[kind * tensors + t]; };
        update(
            reinterpret_cast<float *>(of(0)) + i, reinterpret_cast<const float *>(of(1)) + i,
            reinterpret_cast<Moment *>(of(2)) + i, reinterpret_cast<Moment *>(of(3)) + i,
            std::min(CHUNK, counts[t] - i), r
        );
    }
}

}  // namespace

// `at` (4, tensors) holds addresses: of parameters, gradients, first and second moments.
extern "C" void adamw(
    const int64_t *at, const int64_t *counts, int64_t tensors, int64_t bfloat16_moments, double coefficient,
    double shrink, double beta1, double beta2, double eps, double size, double second_correction, int64_t threads
) {
    const Rates r{
        static_cast<float>(coefficient), static_cast<float>(shrink), static_cast<float>(beta1),
        static_cast<float>(beta2), static_cast<float>(eps), static_cast<float>(size),
        static_cast<float>(second_correction),
    };
    if (bfloat16_moments)
        update_all<uint16_t>(at, counts, tensors, r, threads);
    else
        update_all<float>(at, counts, tensors, r, threads);
}
