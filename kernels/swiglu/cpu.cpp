// SwiGLU of rows that hold the gate and beside it what is gated.
#include "vectors.h"

namespace {

constexpr int64_t SHARED = 1 << 13;  // numbers from which on a second thread is worth its start

int64_t threads_for(int64_t numbers, int64_t threads) { return numbers < SHARED ? 1 : threads; }

}  // namespace

// y = silu(gate) · up
extern "C" void swiglu(const float *gate_up, float *y, int64_t rows, int64_t hidden, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * hidden, threads))
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_up + 2 * row * hidden, *up = gate + hidden;
        for (int64_t i = 0; i < hidden; i += LANES) {
            const int64_t left = hidden - i;
            const Vector a = load(gate + i, left), b = load(up + i, left);
            store(y + row * hidden + i, a * sigmoid(a) * b, left);
        }
    }
}

extern "C" void swiglu_backward(
    const float *gate_up, const float *grad, float *grad_gate_up, int64_t rows, int64_t hidden, int64_t threads
) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * hidden, threads))
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_up + 2 * row * hidden, *up = gate + hidden;
        float *to_gate = grad_gate_up + 2 * row * hidden, *to_up = to_gate + hidden;
        for (int64_t i = 0; i < hidden; i += LANES) {
            const int64_t left = hidden - i;
            const Vector a = load(gate + i, left), b = load(up + i, left), g = load(grad + row * hidden + i, left);
            const Vector s = sigmoid(a);
            store(to_gate + i, g * b * s * (1.0f + a * (1.0f - s)), left);
            store(to_up + i, g * a * s, left);
        }
    }
}
