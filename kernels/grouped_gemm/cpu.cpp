// Products of groups of rows in float32. A task is a block of one group's result, which a thread takes whole. Where a
// result's tiles lie depends on neither the blocks nor the threads, and so do no bits of it.
#include "dots.h"
#include "gemm.h"

namespace {

constexpr int64_t STRIP = 16 * TILE_COLUMNS;  // columns of a block
constexpr int64_t FEW_ROWS = 24;              // of a group; for fewer, packing its matrix costs more than it saves

struct Task {
    int64_t group, row, rows, column, columns;
};

int64_t begin_of(const int64_t *ends, int64_t group) { return group ? ends[group - 1] : 0; }

// Blocks of a group's result, more of them where there are more threads than groups.
void cut(std::vector<Task> &tasks, int64_t group, int64_t groups, int64_t rows, int64_t columns, int64_t threads) {
    const int64_t strips = (columns + STRIP - 1) / STRIP;
    if (!strips) return;
    const int64_t high = block_rows(rows, (threads + groups * strips - 1) / (groups * strips));
    for (int64_t j = 0; j < columns; j += STRIP)
        for (int64_t i = 0; i < rows; i += high)
            tasks.push_back({group, i, std::min(high, rows - i), j, std::min(STRIP, columns - j)});
}

// The rows of a block by a matrix whose columns have the depth side by side: read as it lies.
void few(const float *x, const float *w, float *y, int64_t rows, int64_t columns, int64_t depth, int64_t y_row) {
    const float *from[FEW_ROWS];
    float *to[FEW_ROWS];
    for (int64_t r = 0; r < rows; r++) from[r] = x + r * depth, to[r] = y + r * y_row;
    dots(from, rows, w, depth, columns, depth, to);
}

}  // namespace

// y (rows, columns) = x (rows, depth) · the matrix (depth, columns) of each row's group, whose numbers lie `w_row` and
// `w_column` apart, one of these being 1. `ends` says where groups end.
extern "C" void product(
    const float *x, const float *w, int64_t w_row, int64_t w_column, const int64_t *ends, float *y, int64_t groups,
    int64_t columns, int64_t depth, int64_t rounded, int64_t threads
) {
    const Product multiply = product_of(rounded);
    std::vector<Task> tasks;
    for (int64_t e = 0; e < groups; e++) cut(tasks, e, groups, ends[e] - begin_of(ends, e), columns, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (size_t t = 0; t < tasks.size(); t++) {
        const auto [e, i, rows, j, wide] = tasks[t];
        const int64_t begin = begin_of(ends, e), row = begin + i;
        const float *from = w + e * depth * columns + j * w_column;
        float *to = y + row * columns + j;
        if (!rounded && w_row == 1 && ends[e] - begin < FEW_ROWS)
            few(x + row * depth, from, to, rows, wide, depth, columns);
        else
            multiply({x + row * depth, depth}, {from, w_row, w_column}, to, columns, rows, wide, depth, false);
    }
}

// grad_w (groups, outer, inner): of each group gradᵀ · x, of its rows of grad (rows, outer) and x (rows, inner); zero of a
// group without rows.
extern "C" void weight_gradient(
    const float *grad, const float *x, const int64_t *ends, float *grad_w, int64_t groups, int64_t outer, int64_t inner,
    int64_t rounded, int64_t threads
) {
    const Product multiply = product_of(rounded);
    std::vector<Task> tasks;
    for (int64_t e = 0; e < groups; e++) cut(tasks, e, groups, outer, inner, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (size_t t = 0; t < tasks.size(); t++) {
        const auto [e, i, rows, j, wide] = tasks[t];
        const int64_t begin = begin_of(ends, e);
        multiply(
            {grad + begin * outer + i, 1, outer}, {x + begin * inner + j, inner}, grad_w + (e * outer + i) * inner + j,
            inner, rows, wide, ends[e] - begin, false
        );
    }
}
