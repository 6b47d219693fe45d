// Vectors of as many floats as a register holds, and what is done with them. The compiler's own vector types: they are
// the same to gcc and clang, on x86 and ARM.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif

// Whether the processor multiplies two whole vectors of 512 bits a cycle: taken to be so of all with AVX-512 but Zen 4 (a
// Zen 3 to older compilers), which takes each in two halves, and whose divisions keep up. Some have one such unit.
#if defined(__AVX512F__) && !defined(__znver3__) && !defined(__znver4__)
constexpr bool WHOLE_VECTORS = true;
#else
constexpr bool WHOLE_VECTORS = false;
#endif

// Of columns of a product's tile: of two, six rows' sums would wait for their operands there.
constexpr int64_t TILE_VECTORS = WHOLE_VECTORS ? 4 : 2;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

static inline Vector load(const float *from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

static inline void store(float *to, Vector v) { std::memcpy(to, &v, sizeof v); }

// As many numbers as are left, where these are fewer than a vector's; the others are zero.
static inline Vector load(const float *from, int64_t left) {
    if (left >= LANES) return load(from);
    Vector v{};
    for (int64_t i = 0; i < left; i++) v[i] = from[i];
    return v;
}

static inline void store(float *to, Vector v, int64_t left) {
    if (left >= LANES) return store(to, v);
    for (int64_t i = 0; i < left; i++) to[i] = v[i];
}

static inline Vector all(float value) { return value - Vector{}; }  // minus zero: what every float survives

static inline float sum(Vector v) {
    float total = 0;
    for (int64_t i = 0; i < LANES; i++) total += v[i];
    return total;
}

static inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

static inline float largest(Vector v) {
    float most = v[0];
    for (int64_t i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}

// exp, within two units in the last place; 0 below -87.3, infinity above 88.7, and what is not a number stays so.
// x = n·ln 2 + r with |r| <= ln 2 / 2, n added to the exponent of a Taylor polynomial of degree 7 in r.
static inline Vector exponential(Vector x) {
    const Vector low = all(-87.3365f), high = all(88.7228f);
    Vector within = x < low ? low : x;
    within = within > high ? high : within;
    const Vector shifter = all(12582912.0f);  // 1.5 · 2^23: added and taken off, it rounds to an integer
    const Vector n = (within * 1.44269504f + shifter) - shifter;
    const Vector r = (within - n * 0.693359375f) - n * -2.12194440e-4f;
    Vector p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // 2^n in two factors: n may be 128, whose power of two is no float
    const Integers whole = __builtin_convertvector(n, Integers), half = whole >> 1;
    const Integers one = (half + 127) << 23, two = (whole - half + 127) << 23;
    Vector first, second;
    std::memcpy(&first, &one, sizeof first);
    std::memcpy(&second, &two, sizeof second);
    Vector y = p * first * second;
    y = x < low ? all(0.0f) : y;
    y = x > high ? all(__builtin_inff()) : y;
    return x != x ? x : y;
}

// The same of what is at most 1, as a softmax has it, for half the instructions: no infinity, and 2^n in one factor.
static inline Vector exponential_of_low(Vector x) {
    const Vector low = all(-87.3365f), shifter = all(12582912.0f);
    const Vector within = x < low ? low : x;
    const Vector n = (within * 1.44269504f + shifter) - shifter;
    const Vector r = (within - n * 0.693359375f) - n * -2.12194440e-4f;
    Vector p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    Vector factor;
    std::memcpy(&factor, &power, sizeof factor);
    return x < low ? all(0.0f) : p * factor;  // what is not a number is so in p
}

static inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }
