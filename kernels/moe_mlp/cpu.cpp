// The routed experts in float32: a task is some rows of one expert (forward) or all of them (backward), which one thread
// takes through every step while they lie in its cache. M = T·K rows, sorted by expert; `order` names a row's choice,
// `token` its token, `place` where a choice lies. As in cpu.py the gate is multiplied into the activation.
#include <cstddef>
#include <numeric>

#include "gemm.h"
#include "rows.h"

namespace {

constexpr int64_t PASS_ROWS = 4 * BLOCK_ROWS;  // of an expert, whose gradients are read and written once a pass

struct Task {
    int64_t expert, begin, end;
};

}  // namespace

extern "C" {

// Sort the choices (T·K) by expert, those of one expert in their order: order (M), bounds (E + 1).
void sort_choices(
    const int64_t *expert, int64_t *order, int64_t *bounds, int64_t rows, int64_t experts, int64_t
) {
    moe::sort_choices(expert, order, bounds, rows, experts);
}

// Whether an order is not that of `sort_choices`: a row that is none, or not behind the one before it.
int is_other(const int64_t *order, const int64_t *expert, int64_t rows, int64_t) {
    for (int64_t i = 0; i < rows; i++) {
        if (order[i] < 0 || order[i] >= rows) return 1;
        if (i == 0) continue;
        const int64_t before = expert[order[i - 1]], here = expert[order[i]];
        if (here < before || (here == before && order[i] <= order[i - 1])) return 1;
    }
    return 0;
}

// Of an order: the token of each row and the place of each choice (M).
void places(const int64_t *order, int64_t *token, int64_t *place, int64_t rows, int64_t choices, int64_t) {
    moe::places(order, token, place, rows, choices);
}

// pre (M, 2F) = x · gate_upᵀ; y (M, D) = (gate · silu(a) · b) · downᵀ; out (T, D) the sums of the tokens' rows.
void forward(
    const float *x, const float *gate, const float *gate_up, const float *down, const int64_t *order,
    const int64_t *token, const int64_t *place, const int64_t *bounds, float *pre, float *y, float *out,
    int64_t tokens, int64_t choices, int64_t experts, int64_t width, int64_t hidden, int64_t rounded,
    int64_t threads
) {
    const Product multiply = product_of(rounded);
    std::vector<Task> tasks;
    for (int64_t e = 0; e < experts; e++)
        for (int64_t begin = bounds[e], most = block_rows(bounds[e + 1] - begin); begin < bounds[e + 1]; begin += most)
            tasks.push_back({e, begin, std::min(begin + most, bounds[e + 1])});
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> h;
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < tasks.size(); i++) {
            const auto [e, begin, end] = tasks[i];
            const int64_t rows = end - begin;
            float *ab = pre + begin * 2 * hidden;
            multiply(
                {x, width, 1, token + begin}, {gate_up + e * 2 * hidden * width, 1, width}, ab, 2 * hidden, rows,
                2 * hidden, width, false
            );
            h.resize(rows * hidden);
            for (int64_t r = 0; r < rows; r++)
                moe::activate(ab + r * 2 * hidden, gate[order[begin + r]], h.data() + r * hidden, hidden);
            multiply(
                {h.data(), hidden}, {down + e * width * hidden, 1, hidden}, y + begin * width, width, rows, width,
                hidden, false
            );
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) moe::sum_choices(y, place, out, t, choices, width);
    }
}

// The same for few rows an expert, whose matrices are read as they lie, and without what a backward pass needs; `expert`
// and `gate` are of the tokens' choices (T, K), y (M, D) is room.
void few(
    const float *x, const int64_t *expert, const float *gate, const float *gate_up, const float *down, float *y,
    float *out, int64_t tokens, int64_t choices, int64_t experts, int64_t width, int64_t hidden, int64_t threads
) {
    const int64_t rows = tokens * choices;
    std::vector<int64_t> order(rows), bounds(experts + 1), token(rows), place(rows);
    moe::sort_choices(expert, order.data(), bounds.data(), rows, experts);
    moe::places(order.data(), token.data(), place.data(), rows, choices);
#pragma omp parallel num_threads(threads)
    {
        moe::Room room;
        std::vector<float> weight;
        std::vector<const float *> from;
        std::vector<float *> to;
#pragma omp for schedule(dynamic)
        for (int64_t e = 0; e < experts; e++) {
            const int64_t begin = bounds[e], here = bounds[e + 1] - begin;
            if (here == 0) continue;
            from.resize(here);
            to.resize(here);
            weight.resize(here);
            for (int64_t r = 0; r < here; r++) {
                from[r] = x + token[begin + r] * width;
                to[r] = y + (begin + r) * width;
                weight[r] = gate[order[begin + r]];
            }
            const float *up_e = gate_up + e * 2 * hidden * width, *down_e = down + e * width * hidden;
            moe::few_rows(from.data(), weight.data(), up_e, down_e, to.data(), here, width, hidden, room);
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) moe::sum_choices(y, place.data(), out, t, choices, width);
    }
}

// The gradients in x (T, D), by way of those of the rows (M, D); in gate (T, K), and in both stacks of matrices.
void backward(
    const float *grad, const float *x, const float *gate, const float *gate_up, const float *down,
    const int64_t *order, const int64_t *token, const int64_t *place, const int64_t *bounds, const float *pre,
    float *grad_rows, float *grad_x, float *grad_gate, float *grad_gate_up, float *grad_down, int64_t tokens,
    int64_t choices, int64_t experts, int64_t width, int64_t hidden, int64_t rounded,
    int64_t threads
) {
    const Product multiply = product_of(rounded);
    std::vector<int64_t> longest(experts);  // first: the last to be done is short
    std::iota(longest.begin(), longest.end(), 0);
    std::stable_sort(longest.begin(), longest.end(), [&](int64_t a, int64_t b) {
        return bounds[a + 1] - bounds[a] > bounds[b + 1] - bounds[b];
    });
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> h, slope;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < experts; i++) {
            const int64_t e = longest[i], first = bounds[e], last = bounds[e + 1];
            const Matrix up_e{gate_up + e * 2 * hidden * width, width}, down_e{down + e * width * hidden, hidden};
            float *grad_up_e = grad_gate_up + e * 2 * hidden * width, *grad_down_e = grad_down + e * width * hidden;
            if (first == last) {
                std::fill(grad_up_e, grad_up_e + 2 * hidden * width, 0.0f);
                std::fill(grad_down_e, grad_down_e + width * hidden, 0.0f);
            }
            for (int64_t begin = first; begin < last; begin += PASS_ROWS) {
                const int64_t rows = std::min(PASS_ROWS, last - begin);
                const int64_t *from = token + begin;
                h.resize(rows * hidden);
                slope.resize(rows * 2 * hidden);
                multiply({grad, width, 1, from}, down_e, h.data(), hidden, rows, hidden, width, false);
                for (int64_t r = 0; r < rows; r++) {
                    const float *a = pre + (begin + r) * 2 * hidden, weight = gate[order[begin + r]];
                    float *to = slope.data() + r * 2 * hidden;
                    Vector of_gate{};
                    for (int64_t f = 0; f < hidden; f += LANES) {
                        const int64_t left = hidden - f;
                        const Vector va = load(a + f, left), vb = load(a + hidden + f, left);
                        float *at = h.data() + r * hidden + f;
                        const Vector slope_h = load(at, left), s = sigmoid(va), silu = va * s;
                        of_gate += slope_h * (silu * vb);
                        store(to + f, weight * slope_h * vb * (s + silu * (1.0f - s)), left);
                        store(to + hidden + f, weight * slope_h * silu, left);
                        store(at, weight * silu * vb, left);
                    }
                    grad_gate[order[begin + r]] = sum(of_gate);
                }
                const bool more = begin > first;
                const Matrix grad_of{grad, 1, width, nullptr, from}, slope_of{slope.data(), 1, 2 * hidden};
                multiply(grad_of, {h.data(), hidden}, grad_down_e, hidden, width, hidden, rows, more);
                multiply(slope_of, {x, width, 1, from}, grad_up_e, width, 2 * hidden, width, rows, more);
                multiply(
                    {slope.data(), 2 * hidden}, up_e, grad_rows + begin * width, width, rows, width, 2 * hidden,
                    false
                );
            }
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) moe::sum_choices(grad_rows, place, grad_x, t, choices, width);
    }
}
}
