// Newton–Schulz iterations of a stack of matrices: a thread takes a matrix through all steps, in its own caches; those that
// are left over are taken by all threads together, strip by strip. Either way every sum is the same, to the bit.
#include <cmath>

#include "gemm.h"

namespace {

struct Sizes {
    int64_t rows, columns, steps;  // rows <= columns
    float a, b, c;
};

// One matrix's numbers: two that x goes back and forth between, (rows, columns), and the products, (rows, rows).
struct Room {
    std::vector<float> x, next, gram, polynomial;

    explicit Room(const Sizes &n)
        : x(n.rows * n.columns), next(n.rows * n.columns), gram(n.rows * n.rows), polynomial(n.rows * n.rows) {}
};

// to (columns, rows) = the transpose of from (rows, columns).
void transpose_all(const float *from, float *to, int64_t rows, int64_t columns) {
    for (int64_t i0 = 0; i0 < rows; i0 += 8)
        for (int64_t j0 = 0; j0 < columns; j0 += 8) {
            const int64_t high = std::min<int64_t>(8, rows - i0), wide = std::min<int64_t>(8, columns - j0);
            const float *lines[8];
            for (int64_t i = 0; i < high; i++) lines[i] = from + (i0 + i) * columns + j0;
            if (high == 8 && wide == 8) {
                transpose(lines, to + j0 * rows + i0, rows);
                continue;
            }
            for (int64_t i = 0; i < high; i++)
                for (int64_t j = 0; j < wide; j++) to[(j0 + j) * rows + i0 + i] = lines[i][j];
        }
}

void normalise(float *x, int64_t numbers) {
    double squares = 0;
    for (int64_t i = 0; i < numbers; i++) squares += static_cast<double>(x[i]) * x[i];
    const float norm = static_cast<float>(std::sqrt(squares)) + 1e-7f;
    for (int64_t i = 0; i < numbers; i++) x[i] /= norm;
}

constexpr int64_t STRIP = 2 * TILE_COLUMNS;  // columns of a product that are one piece of work

int64_t strips(int64_t columns) { return (columns + STRIP - 1) / STRIP; }

// Strip s of the lower half of x·xᵀ, x (rows, depth); its diagonal blocks are whole.
void half_strip(const float *x, float *to, int64_t rows, int64_t depth, int64_t s) {
    const int64_t j = s * STRIP, wide = std::min(STRIP, rows - j);
    product<Exact>({x + j * depth, depth}, {x + j * depth, 1, depth}, to + j * rows + j, rows, rows - j, wide, depth, false);
}

// The upper half of strip s, from the lower one.
void mirror(float *square, int64_t rows, int64_t s) {
    const int64_t begin = s * STRIP, end = std::min(begin + STRIP, rows);
    for (int64_t j = begin; j < end; j++)
        for (int64_t i = j + 1; i < rows; i++) square[j * rows + i] = square[i * rows + j];
}

// Rows of the polynomial a + b·gram + c·gram², whose lower half holds gram²; the mirrored one is whole.
void combine(const Room &room, float *polynomial, const Sizes &n, int64_t s) {
    const int64_t begin = s * STRIP, end = std::min(begin + STRIP, n.rows);
    for (int64_t i = begin; i < n.rows; i++)
        for (int64_t j = begin; j < std::min(end, i + 1); j++) {
            float &p = polynomial[i * n.rows + j];
            p = n.b * room.gram[i * n.rows + j] + n.c * p + (i == j ? n.a : 0.0f);
        }
}

void times_strip(const Room &room, float *next, const Sizes &n, int64_t s) {
    const int64_t j = s * STRIP, wide = std::min(STRIP, n.columns - j);
    product<Exact>(
        {room.polynomial.data(), n.rows}, {room.x.data() + j, n.columns}, next + j, n.columns, n.rows, wide, n.rows, false
    );
}

// Calls piece(s) for all pieces of work, by one thread or by all.
template <typename Piece>
void each(int64_t pieces, int64_t threads, const Piece &piece) {
    if (threads == 1) {
        for (int64_t s = 0; s < pieces; s++) piece(s);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t s = 0; s < pieces; s++) piece(s);
}

// room.x, normalised, to its orthogonal factor.
void iterate(Room &room, const Sizes &n, int64_t threads) {
    const int64_t halves = strips(n.rows);
    float *gram = room.gram.data(), *polynomial = room.polynomial.data();
    for (int64_t step = 0; step < n.steps; step++) {
        each(halves, threads, [&](int64_t s) {
            half_strip(room.x.data(), gram, n.rows, n.columns, s);
            mirror(gram, n.rows, s);
        });
        each(halves, threads, [&](int64_t s) {
            half_strip(gram, polynomial, n.rows, n.rows, s);
            combine(room, polynomial, n, s);
            mirror(polynomial, n.rows, s);
        });
        each(strips(n.columns), threads, [&](int64_t s) { times_strip(room, room.next.data(), n, s); });
        room.x.swap(room.next);
    }
}

void orthogonalise_one(const float *from, float *to, bool tall, Room &room, const Sizes &n, int64_t threads) {
    const int64_t numbers = n.rows * n.columns;
    if (tall)
        transpose_all(from, room.x.data(), n.columns, n.rows);
    else
        std::memcpy(room.x.data(), from, numbers * sizeof(float));
    normalise(room.x.data(), numbers);
    iterate(room, n, threads);
    if (tall)
        transpose_all(room.x.data(), to, n.rows, n.columns);
    else
        std::memcpy(to, room.x.data(), numbers * sizeof(float));
}

}  // namespace

// from and to (matrices, rows, columns); a, b and c are the polynomial's coefficients.
extern "C" void orthogonalise(
    const float *from, float *to, int64_t matrices, int64_t rows, int64_t columns, int64_t steps, double a, double b,
    double c, int64_t threads
) {
    const bool tall = rows > columns;
    const Sizes n{
        std::min(rows, columns), std::max(rows, columns), steps,
        static_cast<float>(a), static_cast<float>(b), static_cast<float>(c),
    };
    const int64_t numbers = rows * columns, apart = matrices / threads * threads;
#pragma omp parallel num_threads(threads) if (apart > 0)
    if (apart > 0) {
        Room room(n);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < apart; i++)
            orthogonalise_one(from + i * numbers, to + i * numbers, tall, room, n, 1);
    }
    if (apart == matrices) return;
    Room room(n);
    for (int64_t i = apart; i < matrices; i++)
        orthogonalise_one(from + i * numbers, to + i * numbers, tall, room, n, threads);
}
