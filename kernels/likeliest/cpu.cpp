// The place of the highest of each row's numbers and the logarithm of its share under a softmax: two passes over a row.
#include <cmath>

#include "dots.h"

namespace {

constexpr int64_t SHARED = 1 << 15;  // numbers from which on a second thread is worth its start

// The first that is not a number, which counts as the highest; where there is none, `otherwise`.
int64_t first_unordered(const float *row, int64_t columns, int64_t otherwise) {
    for (int64_t c = 0; c < columns; c++)
        if (row[c] != row[c]) return c;
    return otherwise;
}

}  // namespace

extern "C" void likeliest(
    const float *logits, int64_t *token, float *log_p, int64_t rows, int64_t columns, int64_t threads
) {
#pragma omp parallel for schedule(static) num_threads(rows * columns < SHARED ? 1 : threads)
    for (int64_t r = 0; r < rows; r++) {
        const float *row = logits + r * columns;
        const int64_t whole = columns / LANES * LANES;
        Vector most = all(row[0]);
        Integers place{}, here{};
        for (int64_t i = 0; i < LANES; i++) here[i] = i;
        for (int64_t c = 0; c < whole; c += LANES, here += LANES) {
            const Vector v = load(row + c);
            place = v > most ? here : place;
            most = larger(v, most);
        }
        int64_t at = 0;
        float high = row[0];
        for (int64_t i = 0; i < LANES && whole; i++)
            if (most[i] > high || (most[i] == high && place[i] < at)) {
                high = most[i];
                at = place[i];
            }
        for (int64_t c = whole; c < columns; c++)
            if (row[c] > high) {
                high = row[c];
                at = c;
            }
        Vector sums{};
        for (int64_t c = 0; c < whole; c += LANES) sums += exponential_of_low(load(row + c) - high);
        float sum = total(sums);
        for (int64_t c = whole; c < columns; c++) sum += std::exp(row[c] - high);
        token[r] = sum == sum ? at : first_unordered(row, columns, at);
        log_p[r] = -std::log(sum);
    }
}
