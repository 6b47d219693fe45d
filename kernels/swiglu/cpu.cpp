// SwiGLU of rows that hold the gate and beside it what is gated.
#include "vectors.h"

namespace {

constexpr int64_t SHARED = 1 << 13;  // numbers from which on a second thread is worth its start

int64_t threads_for(int64_t numbers, int64_t threads) { return numbers < SHARED ? 1 : threads; }

// One vector at a time of a row, the last one filled up with zeros.
template <typename Work>
inline void by_vectors(int64_t size, Work work) {
    for (int64_t i = 0; i < size; i += LANES) work(i, i + LANES <= size ? LANES : size - i);
}

inline Vector load_part(const float *from, int64_t count) {
    if (count == LANES) return load(from);
    Vector v{};
    std::memcpy(&v, from, count * sizeof(float));
    return v;
}

inline void store_part(float *to, Vector v, int64_t count) {
    if (count == LANES)
        store(to, v);
    else
        std::memcpy(to, &v, count * sizeof(float));
}

}  // namespace

// y = silu(gate) · up
extern "C" void swiglu(const float *gate_up, float *y, int64_t rows, int64_t hidden, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * hidden, threads))
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_up + 2 * row * hidden, *up = gate + hidden;
        float *to = y + row * hidden;
        by_vectors(hidden, [=](int64_t i, int64_t count) {
            const Vector a = load_part(gate + i, count), b = load_part(up + i, count);
            store_part(to + i, a * sigmoid(a) * b, count);
        });
    }
}

extern "C" void swiglu_backward(const float *gate_up, const float *grad, float *grad_gate_up, int64_t rows,
                                int64_t hidden, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * hidden, threads))
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_up + 2 * row * hidden, *up = gate + hidden, *slope = grad + row * hidden;
        float *to_gate = grad_gate_up + 2 * row * hidden, *to_up = to_gate + hidden;
        by_vectors(hidden, [=](int64_t i, int64_t count) {
            const Vector a = load_part(gate + i, count), b = load_part(up + i, count), g = load_part(slope + i, count);
            const Vector s = sigmoid(a);
            store_part(to_gate + i, g * b * s * (1.0f + a * (1.0f - s)), count);
            store_part(to_up + i, g * a * s, count);
        });
    }
}
