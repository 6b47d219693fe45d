// Products with a matrix (T, E) of which each row has K numbers, and zeros: those of the logits' gradient where only the
// chosen experts have one. Called by all threads of a parallel region.
//
// A zero adds nothing to a sum, so these have the bits of `multiply_by_all` where all is finite (but for a zero's sign): as
// there, a number is one sum in the order of the terms, except in the last rows, which are no whole tile's, and in the last
// columns. There each DEPTH terms, zeros counted, are summed by themselves, and these sums added.
#pragma once

#include "products.h"

namespace router {

struct Few {
    int64_t tokens, width, experts, chosen;
};

constexpr int64_t SUMS = 8, WIDE = SUMS * LANES;  // vectors of sums in registers, and their columns

// Rows, or columns, before the last that are no whole tile's.
inline int64_t in_tiles(int64_t count, int64_t tile) { return count - count % tile; }

// Σ factor(i) · row(i), in the order of i, to COUNT vectors, or to one of at most `left` numbers. term(i) is the place of i
// among the zeros; `by_depth` says whether each DEPTH of these are summed by themselves.
template <int64_t COUNT, typename Factor, typename Row, typename Term>
inline void weighted_sum(
    int64_t terms, const Factor &factor, const Row &row, const Term &term, bool by_depth, float *to, int64_t left
) {
    Vector sum[COUNT] = {}, before[COUNT] = {};
    int64_t until = DEPTH;
    for (int64_t i = 0; i < terms; i++) {
        if (by_depth && term(i) >= until) {
            for (int64_t v = 0; v < COUNT; v++) before[v] += sum[v], sum[v] = Vector{};
            until = (term(i) / DEPTH + 1) * DEPTH;
        }
        const Vector by = all(factor(i));
        const float *from = row(i);
        for (int64_t v = 0; v < COUNT; v++)
            sum[v] += by * (COUNT > 1 ? load(from + v * LANES) : load(from, left));
    }
    for (int64_t v = 0; v < COUNT; v++) {
        const Vector whole = by_depth ? before[v] + sum[v] : sum[v];
        if (COUNT > 1) store(to + v * LANES, whole);
        else store(to, whole, left);
    }
}

// The same over `columns` columns from `first` on, of rows and of `to` alike, of `width` in all; by depth in the last
// columns, and in all of a `low` row.
template <typename Factor, typename Row, typename Term>
inline void weighted_sums(
    int64_t terms, const Factor &factor, const Row &row, const Term &term, bool low, float *to, int64_t first,
    int64_t columns, int64_t width
) {
    const int64_t edge = in_tiles(width, TILE_COLUMNS), end = first + columns;
    int64_t j = first;
    const auto from = [&](int64_t i) { return row(i) + j; };
    for (; j + WIDE <= std::min(end, edge); j += WIDE) weighted_sum<SUMS>(terms, factor, from, term, low, to + j, WIDE);
    for (; j < end; j += LANES) weighted_sum<1>(terms, factor, from, term, low || j >= edge, to + j, end - j);
}

// grad_x (T, D) = the sparse matrix · weight (E, D), of its numbers `own` (T, K) at the columns `expert`.
inline void by_token(const float *weight, const float *own, const int64_t *expert, float *grad_x, const Few &n) {
    std::vector<int64_t> rank(n.chosen);
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < n.tokens; t++) {
        const float *mine = own + t * n.chosen;
        const int64_t *column = expert + t * n.chosen;
        for (int64_t k = 0; k < n.chosen; k++) {  // by expert
            int64_t at = k;
            for (; at > 0 && column[rank[at - 1]] > column[k]; at--) rank[at] = rank[at - 1];
            rank[at] = k;
        }
        weighted_sums(
            n.chosen, [&](int64_t i) { return mine[rank[i]]; },
            [&](int64_t i) { return weight + column[rank[i]] * n.width; }, [&](int64_t i) { return column[rank[i]]; },
            t >= in_tiles(n.tokens, TILE_ROWS), grad_x + t * n.width, 0, n.width, n.width
        );
    }
}

// grad_weight (E, D) = its transpose · x (T, D); `order` has its places (T·K) expert by expert, until `ends`.
inline void by_expert(
    const float *x, const float *own, const int64_t *order, const int64_t *ends, float *grad_weight, const Few &n
) {
    const int64_t strips = (n.width + WIDE - 1) / WIDE;
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < strips * n.experts; block++) {  // a strip of x stays in the cache from expert to expert
        const int64_t e = block % n.experts, j = block / n.experts * WIDE;
        const int64_t *place = order + (e ? ends[e - 1] : 0);
        const auto token = [&](int64_t i) { return place[i] / n.chosen; };
        weighted_sums(
            order + ends[e] - place, [&](int64_t i) { return own[place[i]]; },
            [&](int64_t i) { return x + token(i) * n.width; }, token, e >= in_tiles(n.experts, TILE_ROWS),
            grad_weight + e * n.width, j, std::min(WIDE, n.width - j), n.width
        );
    }
}

}  // namespace router
