// RMSNorm and rotary embedding, a pass over the rows each way. Rows of x may lie apart; results lie one behind the other.
#include "row.h"

namespace {

constexpr int64_t SHARED = 1 << 14;  // numbers from which on a second thread is worth its start

int64_t threads_for(int64_t numbers, int64_t threads) { return numbers < SHARED ? 1 : threads; }

// Σ a · b · c
float summed(const float *a, const float *b, const float *c, int64_t size) {
    Vector one{}, two{};
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        one += load(a + i) * load(b + i) * load(c + i);
        two += load(a + i + LANES) * load(b + i + LANES) * load(c + i + LANES);
    }
    float rest = 0;
    for (; i < size; i++) rest += a[i] * b[i] * c[i];
    return sum(one + two) + rest;
}

// The members of pair i are x[step · i] and x[step · i + apart].
struct Pairs {
    int64_t step, apart;
    Pairs(bool interleaved, int64_t half) : step(interleaved ? 2 : 1), apart(interleaved ? 1 : half) {}
};

}  // namespace

// y = x / √(mean x² + eps) · weight; of each row the 1 / √ is kept in `scale`, where it is asked for.
extern "C" void rms_norm(
    const float *x, const float *__restrict weight, float *y, float *scale, int64_t rows, int64_t width, int64_t x_row,
    double eps, int64_t threads
) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * width, threads))
    for (int64_t row = 0; row < rows; row++) {
        const float by = norm_row(x + row * x_row, weight, y + row * width, width, eps);
        if (scale) scale[row] = by;
    }
}

// total = a + b and y = total / √(mean total² + eps) · weight, row by row while it lies in the first cache.
extern "C" void add_rms_norm(
    const float *a, const float *b, const float *__restrict weight, float *total, float *y, float *scale, int64_t rows,
    int64_t width, int64_t a_row, int64_t b_row, double eps, int64_t threads
) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * width, threads))
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row * width;
        const float by = add_norm_row(a + row * a_row, b + row * b_row, weight, total + at, y + at, width, eps);
        if (scale) scale[row] = by;
    }
}

// Gradients of x and of the weight; that of x is added to `more`, where there is such: that of another use of x. The
// weight's is summed over blocks of rows, (blocks, width) in `partial`, and then over the blocks, so that the order is
// that of the rows and not of the threads.
extern "C" void rms_norm_backward(
    const float *x, const float *__restrict weight, const float *scale, const float *grad, const float *more,
    float *grad_x, float *__restrict grad_weight, float *partial, int64_t rows, int64_t width, int64_t x_row,
    int64_t block_rows, int64_t threads
) {
    const int64_t blocks = (rows + block_rows - 1) / block_rows;
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * width, threads))
    for (int64_t block = 0; block < blocks; block++) {
        float *__restrict total = partial + block * width;
        for (int64_t i = 0; i < width; i++) total[i] = 0;
        const int64_t end = block == blocks - 1 ? rows : (block + 1) * block_rows;
        for (int64_t row = block * block_rows; row < end; row++) {
            const float *__restrict from = x + row * x_row, *__restrict slope = grad + row * width;
            float *__restrict to = grad_x + row * width;
            const float by = scale[row];
            const float along = summed(slope, weight, from, width) * by * by / width;
            for (int64_t i = 0; i < width; i++) {
                to[i] = (slope[i] * weight[i] - from[i] * along) * by;
                total[i] += slope[i] * (from[i] * by);
            }
            if (more)  // by itself, so that a sum of both gradients has the same bits
                for (int64_t i = 0; i < width; i++) to[i] += more[row * width + i];
        }
    }
    for (int64_t i = 0; i < width; i++) grad_weight[i] = 0;
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t i = 0; i < width; i++) grad_weight[i] += partial[block * width + i];
}

// The heads of a token are turned by the token's angles, whose cosines and sines begin `angle_row` apart. Pairs of x lie
// interleaved or half a head apart, those of y half a head apart.
extern "C" void rotate(
    const float *x, const float *cosine, const float *sine, float *y, int64_t half, int64_t tokens, int64_t heads,
    int64_t x_token, int64_t x_head, int64_t angle_row, int64_t interleaved, int64_t threads
) {
    const Pairs pairs(interleaved, half);
#pragma omp parallel for schedule(static) num_threads(threads_for(2 * tokens * heads * half, threads))
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < heads; head++) {
            const float *__restrict first = x + token * x_token + head * x_head;
            const float *__restrict second = first + pairs.apart;
            const float *__restrict c = cosine + token * angle_row, *__restrict s = sine + token * angle_row;
            float *__restrict to = y + (token * heads + head) * 2 * half;
            for (int64_t i = 0; i < half; i++) {
                const float a = first[i * pairs.step], b = second[i * pairs.step];
                to[i] = a * c[i] - b * s[i];
                to[half + i] = b * c[i] + a * s[i];
            }
        }
}

// The other way round, from a gradient whose pairs lie half a head apart.
extern "C" void rotate_backward(
    const float *grad, const float *cosine, const float *sine, float *grad_x, int64_t half, int64_t tokens,
    int64_t heads, int64_t angle_row, int64_t interleaved, int64_t threads
) {
    const Pairs pairs(interleaved, half);
#pragma omp parallel for schedule(static) num_threads(threads_for(2 * tokens * heads * half, threads))
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < heads; head++) {
            const int64_t at = (token * heads + head) * 2 * half;
            const float *__restrict c = cosine + token * angle_row, *__restrict s = sine + token * angle_row;
            const float *__restrict from = grad + at;
            float *__restrict to = grad_x + at;
            for (int64_t i = 0; i < half; i++) {
                const float a = from[i], b = from[half + i];
                to[i * pairs.step] = a * c[i] + b * s[i];
                to[i * pairs.step + pairs.apart] = b * c[i] - a * s[i];
            }
        }
}
