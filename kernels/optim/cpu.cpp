// AdamW over many tensors in one pass: a parameter, its gradient and its moments are read and written once.
#include <algorithm>
#include <vector>

#include "quotients.h"
#include "rounding.h"

namespace {

constexpr int64_t CHUNK = 1 << 14;  // numbers that a thread takes at a time

struct Rates {
    float coefficient, shrink, beta1, beta2, eps, size, second_correction;
};

Vector read(const float *from, int64_t left) { return load(from, left); }

Vector read(const uint16_t *from, int64_t left) { return rounding::read(from, left); }

// How moments are put down: floats as they are, bfloat16 to the nearest, or as a row of words says.
struct Nearest {
    void move_to(int64_t) {}
    void first(float *to, Vector v, int64_t, int64_t left) const { store(to, v, left); }
    void second(float *to, Vector v, int64_t, int64_t left) const { store(to, v, left); }
    void first(uint16_t *to, Vector v, int64_t, int64_t left) const {
        rounding::write(to, v, rounding::to_nearest(v), left);
    }
    void second(uint16_t *to, Vector v, int64_t i, int64_t left) const { first(to, v, i, left); }
};

struct Stochastic {
    rounding::Stream stream;
    rounding::Row row;

    void move_to(int64_t at) { row.move_to(at, stream); }
    void first(uint16_t *to, Vector v, int64_t i, int64_t left) const { rounding::write(to, v, row[i] & 0xffff, left); }
    void second(uint16_t *to, Vector v, int64_t i, int64_t left) const { rounding::write(to, v, row[i] >> 16, left); }
};

// Calls step(i, its place in the row of words, how many numbers from i on) for vectors of numbers [start, start + count) of a
// tensor: whole ones, whose loads look at no end, and what is left.
template <typename Round, typename Step>
void in_rows(int64_t start, int64_t count, Round &round, const Step &step) {
    for (int64_t row = start; row < start + count; row += rounding::Row::LENGTH) {
        const int64_t here = std::min(rounding::Row::LENGTH, start + count - row);
        round.move_to(row);
        int64_t along = 0;
        for (; along + LANES <= here; along += LANES) step(row + along, along, LANES);
        if (along < here) step(row + along, along, here - along);
    }
}

// The first number of the tensor is at p[0], g[0] and so on. Rates are a copy, which no number that is written can change.
template <typename Moment, typename Round>
void update(float *p, const float *g, Moment *m, Moment *v, int64_t start, int64_t count, const Rates r, Round &round) {
    in_rows(start, count, round, [&](int64_t i, int64_t along, int64_t left) __attribute__((always_inline)) {
        const Vector gradient = load(g + i, left) * r.coefficient;
        const Vector before = read(m + i, left);
        const Vector first = before + (gradient - before) * (1 - r.beta1);
        const Vector second = read(v + i, left) * r.beta2 + gradient * gradient * (1 - r.beta2);
        round.first(m + i, first, along, left);
        round.second(v + i, second, along, left);
        const Vector moved = quotients::over_root(r.size * first, second * r.second_correction, r.eps);
        store(p + i, load(p + i, left) * r.shrink - moved, left);
    });
}

// Calls take(tensor, its first number, how many) for pieces of all tensors.
template <typename Take>
void in_chunks(const int64_t *counts, int64_t tensors, int64_t threads, const Take &take) {
    std::vector<int64_t> tensor, start;
    for (int64_t t = 0; t < tensors; t++)
        for (int64_t i = 0; i < counts[t]; i += CHUNK) tensor.push_back(t), start.push_back(i);
    const int64_t chunks = tensor.size();
#pragma omp parallel for num_threads(threads)
    for (int64_t c = 0; c < chunks; c++) take(tensor[c], start[c], std::min(CHUNK, counts[tensor[c]] - start[c]));
}

template <typename Moment, typename RoundOf>
void update_all(
    const int64_t *at, const int64_t *counts, int64_t tensors, const Rates &r, const RoundOf &round_of, int64_t threads
) {
    in_chunks(counts, tensors, threads, [&](int64_t t, int64_t start, int64_t count) {
        const auto of = [&](int64_t kind) { return at[kind * tensors + t]; };
        auto round = round_of(t);
        update(
            reinterpret_cast<float *>(of(0)), reinterpret_cast<const float *>(of(1)), reinterpret_cast<Moment *>(of(2)),
            reinterpret_cast<Moment *>(of(3)), start, count, r, round
        );
    });
}

// `origins` (2, tensors): each tensor's stream, and the place of its first number in the whole.
rounding::Stream stream_of(const int64_t *origins, int64_t tensors, int64_t t, int64_t seed, int64_t step) {
    return {
        static_cast<uint64_t>(seed), static_cast<uint64_t>(origins[tensors + t]), static_cast<uint32_t>(step),
        static_cast<uint32_t>(origins[t])
    };
}

}  // namespace

extern "C" {

// `at` (4, tensors) holds addresses: of parameters, gradients, first and second moments. Without origins bfloat16 moments
// are rounded to nearest.
void adamw(
    const int64_t *at, const int64_t *counts, int64_t tensors, int64_t bfloat16_moments, double coefficient,
    double shrink, double beta1, double beta2, double eps, double size, double second_correction,
    const int64_t *origins, int64_t seed, int64_t step, int64_t threads
) {
    const Rates r{
        static_cast<float>(coefficient), static_cast<float>(shrink), static_cast<float>(beta1),
        static_cast<float>(beta2), static_cast<float>(eps), static_cast<float>(size),
        static_cast<float>(second_correction),
    };
    const auto nearest = [](int64_t) { return Nearest{}; };
    const auto stochastic = [&](int64_t t) { return Stochastic{stream_of(origins, tensors, t, seed, step), {}}; };
    if (!bfloat16_moments)
        update_all<float>(at, counts, tensors, r, nearest, threads);
    else if (origins == nullptr)
        update_all<uint16_t>(at, counts, tensors, r, nearest, threads);
    else
        update_all<uint16_t>(at, counts, tensors, r, stochastic, threads);
}

// `at` (2, tensors) holds addresses: of floats, and of bfloat16 numbers that they are rounded to stochastically.
void round_stochastically(
    const int64_t *at, const int64_t *counts, int64_t tensors, const int64_t *origins, int64_t seed, int64_t step,
    int64_t threads
) {
    in_chunks(counts, tensors, threads, [&](int64_t t, int64_t start, int64_t count) {
        const float *from = reinterpret_cast<const float *>(at[t]);
        uint16_t *to = reinterpret_cast<uint16_t *>(at[tensors + t]);
        Stochastic round{stream_of(origins, tensors, t, seed, step), {}};
        in_rows(start, count, round, [&](int64_t i, int64_t along, int64_t left) {
            round.first(to + i, load(from + i, left), along, left);
        });
    });
}

}  // extern "C"
